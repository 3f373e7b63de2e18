"""What the repository promises about itself: how densely it is written, what imports what, what its documents say."""
import ast
import glob
import io
import os
import re
import tokenize

import pytest
from conftest import ROOT, run

# tokens a file: what one can read in an evening
MOST_TOKENS = {'model.py': 8925, 'common.py': 4960, 'camera.py': 2080, 'data.py': 6735, 'stream.py': 6155}
STAGES = ['finetune_camera.py', 'train_ar.py', 'distill_ode.py', 'distill_dmd.py']
FOLDERS = ['worlds', 'backbones', 'papers', 'experiments']
TOP = [os.path.basename(path) for path in sorted(glob.glob(f'{ROOT}/*.py'))]
CODE = TOP + [os.path.relpath(path, ROOT) for folder in FOLDERS for path in sorted(glob.glob(f'{ROOT}/{folder}/*.py'))]


def read(name):
    with open(os.path.join(ROOT, name)) as f:
        return f.read()


def tokens_by_line(source):
    """{line: names, operators, numbers and strings on it}, docstrings left out."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    counts = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        counted = token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
        if counted and token.start[0] not in docstrings:
            counts[token.start[0]] = counts.get(token.start[0], 0) + 1
    return counts


def size(name):
    return sum(tokens_by_line(read(name)).values())


@pytest.mark.parametrize('name', CODE)
def test_code_is_written_out(name):
    source = read(name)
    counts = tokens_by_line(source)
    assert not [i for i, line in enumerate(source.splitlines(), 1) if len(line) > 110], 'wider than 110 columns'
    assert sum(counts.values()) <= 13 * len(counts), f'{sum(counts.values()) / len(counts):.1f} tokens a code line'
    assert not [i for i, n in counts.items() if n > 40], 'lines of more than 40 tokens'
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    assert not [f.name for f in functions if f.end_lineno - f.lineno >= 60], 'functions of more than 60 lines'


def test_one_can_read_it_in_an_evening():
    sizes = {name: size(name) for name in TOP}
    assert set(TOP) == set(MOST_TOKENS) | set(STAGES)
    assert not {name: n for name, n in sizes.items() if n > MOST_TOKENS.get(name, n)}, sizes
    assert sum(sizes[name] for name in STAGES) <= 11335, sizes
    assert sum(sizes.values()) <= 40000, sizes


def test_tests_fit_120_columns():
    for path in glob.glob(f'{ROOT}/tests/*.py'):
        assert not [i for i, line in enumerate(read(path).splitlines(), 1) if len(line) > 120], path


def test_imports_run_downward():
    """A file imports only what is above it here; what is in a folder is imported where it is used, or never."""
    order = ['camera', 'model', 'common', 'data', *[name[:-3] for name in STAGES], 'stream']
    for name in TOP:
        tree = ast.parse(read(name))
        above = order[:4] if name in STAGES + ['stream.py'] else order[:order.index(name[:-3])]
        for node in tree.body:
            for module in imported(node):
                assert module in above or module not in order + FOLDERS, f'{name} imports {module}'
    for name in set(CODE) - set(TOP):
        if name.startswith(('worlds', 'backbones')):        # data.py runs as __main__, which they must not import
            assert not {'data', 'stream'} & {m for node in ast.walk(ast.parse(read(name))) for m in imported(node)}


def imported(node):
    """The top-level modules of an import statement."""
    if isinstance(node, ast.Import):
        return [alias.name.split('.')[0] for alias in node.names]
    return [node.module.split('.')[0]] if isinstance(node, ast.ImportFrom) else []


def test_training_is_the_same_word_for_word():
    """Stage 3 trains two networks and has a loop that differs."""
    title = '# same in every stage: train\n'
    loops = {read(script).split(title)[1].split("if __name__ == '__main__'")[0] for script in STAGES[:3]}
    assert len(loops) == 1 and len(loops.pop().splitlines()) > 35


def test_every_command_of_the_documents_parses():
    text = read('README.md') + read('NUMBERS.md') + read('expected/minwm/README.md')
    commands = re.findall(r'^(?:python|torchrun --nproc_per_node=\d+) (\w+\.py|-m [\w.]+)(.*?)(?:#.*)?$', text, re.M)
    assert len(commands) >= 20
    known = {}
    for script in {script for script, _ in commands}:
        path = script if script.endswith('.py') else script[3:].replace('.', '/') + '.py'
        parses = 'argparse' in read(path) or 'command_line' in read(path)
        known[script] = run(path, '-h') if parses else ''
    for script, rest in commands:
        for flag in re.findall(r'--\w+', rest):
            assert f'{flag} ' in known[script], f'{script} {flag}'


def test_the_recipes_of_minwm_parse():
    for path in glob.glob(f'{ROOT}/expected/minwm/*.txt'):
        name = os.path.basename(path).replace('_cd', '_ode').replace('.txt', '.py')
        assert 'show this help' in run(name, f'@{path}', '-h')


def test_pictures_and_files_of_the_documents_exist():
    for document in ('README.md', 'NUMBERS.md', 'LOG.md'):
        text = read(document)
        for path in re.findall(r'\]\(([^)#:]+)\)', text) + re.findall(r'src="([^":]+)"', text):
            assert os.path.exists(os.path.join(ROOT, path)), f'{document}: {path}'


def test_the_documents_are_short():
    assert len(read('README.md').splitlines()) <= 250 and len(read('NUMBERS.md').splitlines()) <= 250
    prose = re.sub(r'```.*?```|<[^>]+>|^\|[^\n]*$', '', read('README.md'), flags=re.S | re.M)
    assert len(prose.split()) <= 2000
    for sentence in re.split(r'(?<=[.!?:])\s+|\n\n|\n- ', prose):
        assert len(sentence.split()) <= 35, sentence
