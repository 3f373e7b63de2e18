import faulthandler
import multiprocessing
import os
import random
import runpy
import socket
import sys
import tempfile

import pytest
import torch

LONGEST = 300                                                 # seconds that a script may take
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 2)))
os.environ['PYTHONPATH'] = os.pathsep.join([ROOT, os.environ.get('PYTHONPATH', '')])
forks = multiprocessing.get_context('forkserver')             # a process that has imported torch once, for all scripts
forks.set_forkserver_preload(['stream', 'torch._dynamo', 'torch.distributed.fsdp',
                              'diffusers.models.autoencoders.autoencoder_kl_wan',
                              'transformers.models.umt5.modeling_umt5',
                              'transformers.models.auto.tokenization_auto'])


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """A small folder of lowpoly clips: 12 to train on, 4 held out, 5 frames of 32 x 32."""
    from data import Config, make
    return make(Config(out=str(tmp_path_factory.mktemp('data') / 'lowpoly'), plans=5, clips=12, val_clips=4, frames=5,
                       height=32, width=32))


def _script(script, args, cwd, env, log):
    os.chdir(cwd)
    os.environ.update(env)
    for fd, end in ((1, 'out'), (2, 'err')):
        os.dup2(os.open(f'{log}.{end}', os.O_WRONLY | os.O_CREAT), fd)
    faulthandler.enable(2)                                    # where, if the process is aborted
    faulthandler.dump_traceback_later(LONGEST, exit=True, file=2)                    # or hangs
    torch.set_num_threads(int(env['OMP_NUM_THREADS']))
    sys.argv = [os.path.join(ROOT, script), *map(str, args)]
    sys.path[:0] = [ROOT, *env.get('PYTHONPATH', '').split(os.pathsep)]
    if script.endswith('.py'):
        runpy.run_path(sys.argv[0], run_name='__main__')
    else:                                                     # as python -m experiments.NAME
        runpy.run_module(script, run_name='__main__', alter_sys=True)


def free_port():
    """A port below those that a system gives to outgoing connections: one of these, made before rank 0 listens, could
    take it, and the other rank would wait for ever."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as s:
            if s.connect_ex(('127.0.0.1', port)) != 0:
                return port


def start(script, *args, torchrun=0, cwd=ROOT, **env):
    """Start a script (name.py, or a module: experiments.name): processes that are spared the imports, and the folder of
    their output. torchrun: so many of them, with the environment that torchrun would give them."""
    settings = {'OMP_NUM_THREADS': '1' if torchrun else os.environ.get('OMP_NUM_THREADS', '2')}
    if torchrun:
        settings |= {'WORLD_SIZE': str(torchrun), 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port())}
    logs, ps = tempfile.TemporaryDirectory(), []
    for r in map(str, range(max(1, torchrun))):
        mine = settings | {'RANK': r, 'LOCAL_RANK': r} | env
        ps.append(forks.Process(target=_script, args=(script, args, cwd, mine, f'{logs.name}/{r}')))
        ps[-1].start()
    return ps, logs


def finish(ps, logs, ok=True):
    """Wait for what was started; returns its output. With ok=False it must fail with one clear sentence."""
    for p in ps:
        p.join(LONGEST + 60)                                  # by then faulthandler has said where it stood
        if p.is_alive():
            p.kill()
            p.join()
    out, errs = ([open(f'{logs.name}/{r}.{end}').read() for r in range(len(ps))] for end in ('out', 'err'))
    if ok:
        report = [f'{p.name}, exit code {p.exitcode}:\n{err[-2000:]}' for p, err in zip(ps, errs)]
        assert not any(p.exitcode for p in ps), '\n\n'.join(report)
        return ''.join(out)
    assert ps[0].exitcode == 1
    err = ''.join(errs)
    last = [line for line in err.splitlines() if line.strip()][-1]
    assert last.startswith('error: ') and 'Traceback' not in err, err[-3000:]
    return last


def run(*args, ok=True, **more):
    """Run a script as a user would."""
    return finish(*start(*args, **more), ok)


FLAGS = ['--frames', 5, '--batch', 4, '--log_every', 1, '--device', 'cpu']
SMALL = [*FLAGS, '--sample_steps', 2]                         # for the stages that have it


@pytest.fixture(scope='session')
def chain(data, tmp_path_factory):
    """base -> camera -> ar -> ode, cd -> dmd, four steps each; the folder with their files."""
    out = str(tmp_path_factory.mktemp('out'))
    args = ['--data', data, '--out', out, '--steps', 4, '--eval_every', 2, *SMALL]
    run('finetune_camera.py', '--camera', 'none', '--preset', 'tiny', *args)
    text = run('finetune_camera.py', '--init', f'{out}/base.safetensors', *args)
    assert 'start from ' in text and 'base, 4 steps' in text and 'effective batch 4 = 1 x 1 x 4' in text
    text = run('train_ar.py', '--init', f'{out}/camera.safetensors', *args)
    assert 'camera, 4 steps' in text and 'gate: ' in text
    few = ['--data', data, '--out', out, '--steps', 4, '--eval_every', 2, *FLAGS, '--init', f'{out}/ar.safetensors',
           '--teacher_steps', 8, '--pairs', 6]
    text = run('distill_ode.py', *few)
    assert 'ar, 4 steps' in text and '6 pairs, ' in text and ' MB' in text
    run('distill_ode.py', '--method', 'cd', *few)
    text = run('distill_dmd.py', *dmd_args(data, out), '--out', out)
    assert 'gate: ' in text
    return out


def dmd_args(data, out):
    return ['--data', data, '--init', f'{out}/ode.safetensors', '--score', f'{out}/camera.safetensors', '--frames', 5,
            '--batch', 4, '--critic', 2, '--before', 8, '--steps', 4, '--eval_every', 2, '--log_every', 1,
            '--device', 'cpu']
