"""
What matters for control: short runs of finetune_camera.py, one thing changed at a time, three seeds each; a table, and a
plot where matplotlib is installed.

    python tests/ablate.py batch             # or camera, steps, poses, shift, gamma, first, text, muon
    python tests/ablate.py batch camera --table                              # of the runs that are there

Needs out/base.safetensors and data/lowpoly-500 (bash run.sh); leaves out/ablate/. Stopped? Start it again: it goes on.
The measure of control is gap@7: by how many dB frame 7 is nearer to the truth on its own path than on another clip's. `camera`
is a curve: there the frames' poses are found, too, by looking, every 200 steps.
"""
import itertools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace

import numpy as np
import torch
from safetensors import safe_open

try:
    from matplotlib import pyplot
except ImportError:
    pyplot = None

from conftest import ROOT
import data
import finetune_camera
import stream
from camera import make_pose, pose_error
from model import load_tensors, sample_clip, save_tensors, schedule

DATA, OUT = f'{ROOT}/data/lowpoly-500', f'{ROOT}/out/ablate'
SCRATCH = dict(init='none', steps=800)                        # what the base model, too, must have been trained with
EXPERIMENTS = {                                               # name: (what is varied, {value: what it changes})
    'camera': ('camera path', {path: dict(steps=600, eval_every=200, poses_of=(1, 4, 7)) |
                               (dict(camera=path) if path != 'none' else dict(drop_camera=1.))
                               for path in ('plucker', 'prope', 'plucker+prope', 'none')}),
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


def with_poses(evaluate, frames):
    """`evaluate`, which also finds by looking where the camera stood: medians over the clips, degrees and metres, by frame."""
    known = []

    @torch.no_grad()
    def evaluate_and_look(model, cfg, clips, device, strip=None):
        n = min(cfg.eval_clips, len(clips))
        batch = data.get_batch(clips, 0, n, cfg.frames, model.cfg, cfg.seed, device)
        dream = clips.codec().decode(sample_clip(model, batch.eps, batch.text, batch.camera,
                                                 schedule(cfg.sample_steps, model.cfg.shift), batch.x0[:, :1]))
        world, _ = stream.held_out(stream.Config(), {'data': clips.manifest}, range(n), clips.manifest['recipe']['frames'])
        c2w, at = world['c2w'][:, frames], torch.tensor(frames)

        def errors(pictures):
            found = [stream.locate(data.Lowpoly([plan], [palette]), x, at, path[0], K) for plan, palette, x, path, K in
                     zip(world['plan'].tolist(), world['palette'].tolist(), pictures[:, frames], world['c2w'], world['K'])]
            return pose_error(torch.stack(found), c2w)
        if not known:                             # the true frame itself cannot be located: a bare wall
            rot, trans = errors(clips.truth(n, cfg.frames))
            known.append((rot > 2) | (trans > .15))
        rot, trans = (x.masked_fill(known[0], torch.nan).nanmedian(0)[0].tolist() for x in errors(dream))
        return evaluate(model, cfg, clips, device, strip) | {f'rot@{f}': x for f, x in zip(frames, rot)} | {
            f'trans@{f}': x for f, x in zip(frames, trans)}
    return evaluate_and_look


def one(out, seed, gamma=data.GAMMA, shift=None, poses=None, poses_of=None, **changed):
    """One run, in this process."""
    if poses_of:
        finetune_camera.evaluate = with_poses(finetune_camera.evaluate, list(poses_of))
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
    panels = {}
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
                    if name == 'camera':
                        with open(f'{out}/camera.jsonl') as f:
                            for line in map(json.loads, f):
                                if 'rot@7' in line:
                                    rows.setdefault((value, line['step']), []).append(line)
                    else:
                        with safe_open(f'{out}/camera.safetensors', 'pt') as f:
                            rows.setdefault(value, []).append(json.loads(f.metadata()['meta'])['metrics'])
        if name == 'camera':
            curves(what, rows)
        else:
            table(what, rows)
            panels[what] = rows
    if pyplot and panels:
        draw(panels)


def spread(runs, key):
    """Mean and standard deviation over the seeds."""
    x = [run[key] for run in runs]
    return statistics.mean(x), statistics.stdev(x) if len(x) > 1 else math.nan


def cells(runs, keys):
    return ['{:.2f} ± {:.2f}'.format(*spread(runs, k)) for k in keys]


def table(what, rows):
    """Mean and standard deviation over the seeds."""
    keys = 'val_loss', 'psnr@1', 'psnr@7', 'gap@7'
    print(f'\n| {what} | seeds | ' + ' | '.join(keys) + ' |\n' + '|---' * (len(keys) + 2) + '|')
    for value, runs in rows.items():
        print(f'| {value} | {len(runs)} | ' + ' | '.join(cells(runs, keys)) + ' |')


def draw(panels):
    """The control against each thing that is varied, all to one scale."""
    across = min(4, len(panels))
    down = math.ceil(len(panels) / across)
    _, axes = pyplot.subplots(down, across, figsize=(2.7 * across, 2.2 * down), sharey=True, squeeze=False)
    for axis, (what, rows) in itertools.zip_longest(axes.flat, panels.items(), fillvalue=(None, None)):
        if not rows:
            axis.axis('off')
            continue
        mean, deviation = zip(*(spread(runs, 'gap@7') for runs in rows.values()))
        axis.bar(range(len(rows)), mean, .6, yerr=deviation, capsize=3)
        axis.set_xticks(range(len(rows)), [re.sub(', | x ', '\n', str(v)) for v in rows])
        axis.tick_params(labelsize=6)
        axis.set_title(what, fontsize=9)
    for row in axes:
        row[0].set_ylabel('gap@7, dB', fontsize=8)
    save('control')


def curves(what, rows):
    """The same against steps, with the errors of the pose."""
    keys = 'val_loss', 'psnr@7', 'gap@7', 'rot@1', 'rot@4', 'rot@7', 'trans@1', 'trans@4', 'trans@7'
    print(f'\n| {what} | steps | seeds | ' + ' | '.join(keys) + ' |\n' + '|---' * (len(keys) + 3) + '|')
    for (value, step), runs in rows.items():
        print(f'| {value} | {step} | {len(runs)} | ' + ' | '.join(cells(runs, keys)) + ' |')
    if pyplot:
        _, axes = pyplot.subplots(1, 3, figsize=(10, 3))
        for axis, key, title in zip(axes, ('gap@7', 'rot@4', 'trans@4'), ('right path against wrong, frame 7, dB',
                                    'rotation error, frame 4, degrees', 'translation error, frame 4, m')):
            for path in dict.fromkeys(value for value, _ in rows):
                steps = [step for value, step in rows if value == path]
                axis.errorbar(steps, *zip(*(spread(rows[path, step], key) for step in steps)), marker='o', capsize=3, label=path)
            axis.set_title(title, fontsize=9)
            axis.set_xlabel('steps')
        axes[0].legend(fontsize=8)
        save('camera')


def save(name):
    pyplot.tight_layout()
    pyplot.savefig(f'{OUT}/{name}.png', dpi=130)
    pyplot.close()


if __name__ == '__main__':
    main([a for a in sys.argv[1:] if a != '--table'], '--table' not in sys.argv)
