"""
What matters for control: short runs of finetune_camera.py, one thing changed at a time, three seeds each; a table, and a
plot where matplotlib is installed.

    python tests/ablate.py batch             # or camera, steps, poses, shift, gamma, first, text, muon
    python tests/ablate.py batch camera --table                              # of the runs that are there

Needs out/base.safetensors and data/lowpoly-500 (bash run.sh); leaves out/ablate/. Stopped? Start it again: it goes on.
The measure of control is gap@7: by how many dB frame 7 is nearer to the truth on its own path than on another clip's.
"""
import json
import os
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace

import numpy as np
import torch
from safetensors import safe_open

from conftest import ROOT
import data
import finetune_camera
from camera import make_pose
from model import load_tensors, save_tensors

DATA, OUT = f'{ROOT}/data/lowpoly-500', f'{ROOT}/out/ablate'
SCRATCH = dict(init='none', steps=800)                        # what the base model, too, must have been trained with
EXPERIMENTS = {                                               # name: (what is varied, {value: what it changes})
    'camera': ('camera path', {f'{path}, {n} steps': dict(camera=path, steps=n) if path != 'none' else dict(drop_camera=1., steps=n)
                               for path in ('plucker', 'prope', 'plucker+prope', 'none') for n in (150, 400)}),
    'steps': ('steps', {n: dict(steps=n) for n in (100, 200, 400, 800, 1600)}),
    'batch': ('batch', {f'{b} x {n} steps': dict(batch=b, steps=n) for b, n in ((2, 400), (8, 400), (32, 400), (2, 1600), (32, 100))}),
    'poses': ('noise of the training poses', {f'{d} degrees, {m} m': dict(poses=(d, m)) for d, m in ((0, 0), (1, .02), (3, .06), (10, .2))}),
    'shift': ('shift of t, from scratch', {s: dict(shift=s, **SCRATCH) for s in (1., 2., 4., 8.)}),
    'gamma': ('codec scale, from scratch', {g: dict(gamma=g, **SCRATCH) for g in (0., .5, 1.)}),
    'first': ('p_first', {p: dict(p_first=p) for p in (0., .5, 1.)}),
    'text': ('text dropout', {p: dict(drop_text=p) for p in (0., .1, .5)}),
    'muon': ('optimizer', {'Muon 8e-3': {}, 'AdamW 1e-3': dict(muon=False, lr=1e-3), 'AdamW 3e-3': dict(muon=False, lr=3e-3)}),
}


def copy_clips(folder, change):
    """The clips once more, each shard's tensors changed in place by change(tensors, is it a training shard?)."""
    os.makedirs(folder + '.tmp', exist_ok=True)
    for name in sorted(os.listdir(DATA)):
        if name.endswith('.safetensors'):
            tensors, header = load_tensors(f'{DATA}/{name}')
            change(tensors, name.startswith('train'))
            save_tensors(f'{folder}.tmp/{name}', tensors, header)
        else:
            shutil.copy(f'{DATA}/{name}', folder + '.tmp')
    os.rename(folder + '.tmp', folder)


def noisy_poses(degrees, metres):
    """Puts a random turn and move upon every training pose, as an estimator would."""
    r = np.random.default_rng(0)

    def change(tensors, train):
        shape, normal = tensors['c2w'].shape[:2], lambda s, *n: torch.tensor(r.normal(0, s, n), dtype=torch.float32)
        if train:
            tensors['c2w'] = tensors['c2w'] @ make_pose(normal(metres, *shape, 3), normal(degrees, *shape), normal(degrees, *shape))
    return change


def one(out, seed, gamma=data.GAMMA, shift=None, poses=None, **changed):
    """One run, in this process."""
    folder = DATA
    if gamma != data.GAMMA:
        old, data.SCALE = data.SCALE, data.DCT_STD ** gamma * (data.DCT_STD ** (2 - 2 * gamma)).mean().sqrt()
        folder = f'{OUT}/clips-gamma-{gamma}'
        if not os.path.exists(folder):
            copy_clips(folder, lambda x, train: x['latents'].mul_((old / data.SCALE)[:, None, None]))
    if poses:
        folder = f'{OUT}/clips-poses-{poses[0]}'
        if not os.path.exists(folder):
            copy_clips(folder, noisy_poses(*poses))
    if shift:
        start = finetune_camera.start_model

        def start_model(*a):
            model = start(*a)
            model.cfg = replace(model.cfg, shift=shift)
            return model
        finetune_camera.start_model = start_model
    settings = dict(init=f'{ROOT}/out/base.safetensors', steps=400) | changed
    finetune_camera.main(finetune_camera.Config(data=folder, out=out, seed=seed, **settings), 'camera')


def main(names, train):
    for name in names:
        what, values = EXPERIMENTS[name]
        rows = {}
        for seed in range(3):
            for i, (value, changed) in enumerate(values.items()):
                out = f'{OUT}/{name}-{i}-{seed}'
                if train and not os.path.exists(f'{out}/camera.safetensors'):
                    code = f'import ablate; ablate.one({out!r}, {seed}, **{changed!r})'
                    subprocess.run([sys.executable, '-c', code], check=True, cwd=f'{ROOT}/tests', env=os.environ | {'PYTHONPATH': ROOT})
                    os.remove(f'{out}/camera.resume.safetensors')
                if os.path.exists(f'{out}/camera.safetensors'):
                    with safe_open(f'{out}/camera.safetensors', 'pt') as f:
                        rows.setdefault(value, []).append(json.loads(f.metadata()['meta'])['metrics'])
        table(name, what, rows)


def table(name, what, rows):
    """Mean and standard deviation over the seeds, printed; with matplotlib, the control drawn against what is varied."""
    keys = 'val_loss', 'psnr@1', 'psnr@7', 'gap@7'
    spread = lambda x: statistics.stdev(x) if len(x) > 1 else float('nan')
    print(f'\n| {what} | seeds | ' + ' | '.join(keys) + ' |\n' + '|---' * (len(keys) + 2) + '|')
    for value, runs in rows.items():
        cells = ([run[k] for run in runs] for k in keys)
        print(f'| {value} | {len(runs)} | ' + ' | '.join(f'{statistics.mean(x):.2f} ± {spread(x):.2f}' for x in cells) + ' |')
    try:
        from matplotlib import pyplot
    except ImportError:
        return
    gaps = [[run['gap@7'] for run in runs] for runs in rows.values()]
    pyplot.figure(figsize=(5, 3))
    pyplot.errorbar(range(len(gaps)), [statistics.mean(g) for g in gaps], [spread(g) for g in gaps], marker='o', capsize=3)
    pyplot.xticks(range(len(gaps)), [str(v).replace(', ', '\n') for v in rows], fontsize=7)
    pyplot.xlabel(what)
    pyplot.ylabel('gap@7, dB')
    pyplot.tight_layout()
    pyplot.savefig(f'{OUT}/{name}.png', dpi=130)
    pyplot.close()


if __name__ == '__main__':
    main([a for a in sys.argv[1:] if a != '--table'], '--table' not in sys.argv)
