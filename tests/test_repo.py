"""What the repository promises about itself."""
import glob
import os
import re
import subprocess
import sys

from conftest import ROOT

BUDGET = {'model.py': 650, 'camera.py': 200, 'data.py': 450, 'finetune_camera.py': 350, 'train_ar.py': 350, 'stream.py': 450}


def read(name):
    with open(os.path.join(ROOT, name)) as f:
        return f.read()


def test_line_budgets():
    lines = {name: len(read(name).splitlines()) for name in BUDGET}
    over = {k: v for k, v in lines.items() if v > BUDGET[k]}
    assert not over and sum(lines.values()) <= 3200, lines
    assert {os.path.basename(f) for f in glob.glob(f'{ROOT}/*.py')} <= set(BUDGET)


def test_the_plumbing_of_the_stages_is_the_same_word_for_word():
    regions = [re.findall(r'# same in every stage.*', read(s), re.S) for s in ('finetune_camera.py', 'train_ar.py')]
    body = [r[0].split("    try:\n        main(")[0] for r in regions]
    assert len(body[0].splitlines()) > 90 and body[0] == body[1]


def test_every_readme_command_parses():
    commands = re.findall(r'^(?:python|torchrun --nproc_per_node=\d+) (\w+\.py)(.*?)(?:#.*)?$', read('README.md'), re.M)
    assert len(commands) >= 6
    for script, rest in commands:
        known = subprocess.run([sys.executable, f'{ROOT}/{script}', '-h'], capture_output=True, text=True, check=True).stdout
        for flag in re.findall(r'--\w+', rest):
            assert f'{flag} ' in known, f'{script} {flag}'


def test_pictures_and_files_of_the_readme_exist():
    for path in re.findall(r'\]\(([^)#:]+)\)', read('README.md')) + re.findall(r'src="([^":]+)"', read('README.md')):
        assert os.path.exists(os.path.join(ROOT, path)), path
