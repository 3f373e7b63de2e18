"""What the repository promises about itself."""
import glob
import os
import re

from conftest import ROOT, run

BUDGET = {'model.py': 1036, 'camera.py': 202, 'data.py': 745, 'finetune_camera.py': 300, 'train_ar.py': 300, 'distill_ode.py': 398,
          'distill_dmd.py': 380, 'stream.py': 660}


def read(name):
    with open(os.path.join(ROOT, name)) as f:
        return f.read()


def test_line_budgets():
    lines = {name: len(read(name).splitlines()) for name in BUDGET}
    over = {k: v for k, v in lines.items() if v > BUDGET[k]}
    assert not over and sum(lines.values()) <= 3900, lines
    assert {os.path.basename(f) for f in glob.glob(f'{ROOT}/*.py')} <= set(BUDGET)


def test_the_plumbing_of_the_stages_is_the_same_word_for_word():
    """A region runs from its title to the next rule. Stage 3 trains two networks and has a loop of its own."""
    region = lambda script, title: re.split(r'\n *# -{60,}\n', read(script).split(f'# same in every stage: {title}\n')[1])[0]
    stages = ['finetune_camera.py', 'train_ar.py', 'distill_ode.py']
    for title, lines, scripts in (('setup', 15, stages + ['distill_dmd.py']), ('optimizer, resume, loop', 50, stages),
                                  ('evaluate, save the EMA, gate', 7, stages)):
        texts = {re.split('    model = start_model|    command_line', region(s, title))[0].rstrip() for s in scripts}
        assert len(texts) == 1 and len(texts.pop().splitlines()) > lines, title


def test_every_readme_command_parses():
    commands = re.findall(r'^(?:python|torchrun --nproc_per_node=\d+) (\w+\.py)(.*?)(?:#.*)?$', read('README.md') + read('NUMBERS.md'), re.M)
    assert len(commands) >= 20
    known = {script: run(script, '-h') for script in {script for script, _ in commands}}
    for script, rest in commands:
        for flag in re.findall(r'--\w+', rest):
            assert f'{flag} ' in known[script], f'{script} {flag}'


def test_the_recipes_of_minwm_parse():
    for path in glob.glob(f'{ROOT}/expected/minwm/*.txt'):
        name = os.path.basename(path).replace('_cd', '_ode').replace('.txt', '.py')
        assert 'show this help' in run(name, f'@{path}', '-h')


def test_pictures_and_files_of_the_readme_exist():
    text = read('README.md') + read('NUMBERS.md')
    for path in re.findall(r'\]\(([^)#:]+)\)', text) + re.findall(r'src="([^":]+)"', text):
        assert os.path.exists(os.path.join(ROOT, path)), path
