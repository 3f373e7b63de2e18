import os
import subprocess
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 2)))


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """A small folder of lowpoly clips: 12 to train on, 4 held out, 5 frames of 32 x 32."""
    from data import Config, make
    return make(Config(out=str(tmp_path_factory.mktemp('data') / 'lowpoly'), plans=5, clips=12, val_clips=4, frames=5,
                       height=32, width=32))


def run(script, *args, ok=True, torchrun=0, cwd=ROOT, **env):
    """Run a script as a user would; returns its output. With ok=False it must fail with one clear sentence."""
    launch = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={torchrun}'] if torchrun else []
    p = subprocess.run([sys.executable, *launch, os.path.join(ROOT, script), *map(str, args)], cwd=cwd, text=True,
                       capture_output=True, env={'OMP_NUM_THREADS': '2'} | os.environ | ({'OMP_NUM_THREADS': '1'} if torchrun else {}) | env)
    if ok:
        assert p.returncode == 0, p.stderr[-3000:]
        return p.stdout
    assert p.returncode != 0
    last = [line for line in p.stderr.splitlines() if line.strip()][-1]
    assert last.startswith('error: ') and 'Traceback' not in p.stderr, p.stderr[-3000:]
    return last
