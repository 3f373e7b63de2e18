"""
What matters for control? Short runs of finetune_camera.py, one thing changed at a time, three seeds each.

    python -m experiments.ablate batch           # or some of: camera steps poses shift gamma first text muon
    python -m experiments.ablate batch camera --table                        # of the runs that are there

Needs out/base.safetensors and data/lowpoly-500 (bash run.sh) and leaves out/ablate/. If it is stopped, run
it again: it continues. Prints a table for each name, and draws it where matplotlib is installed. The measure
of control is gap@7: how much PSNR frame 7 loses when the model is driven along another clip's path. `camera`
is a curve: there the poses of the generated frames are found as well, by looking, every 200 steps. A run
takes minutes, so a name takes an hour or two.
"""
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
from einops import reduce, repeat

try:
    from matplotlib import pyplot
except ImportError:
    pyplot = None

import data
import finetune_camera
import model as network
from camera import make_pose, pose_error
from common import load_tensors, save_tensors
from experiments.score import locate
from model import sample_clip, schedule
from stream import Config, held_out

DATA = 'data/lowpoly-500'
BASE = 'out/base.safetensors'
OUT = 'out/ablate'
SEEDS = 3

# -----------------------------------------------------------------------------
# what is changed: arguments of `train_one`

def curve(**changed):
    return dict(steps=600, eval_every=200, poses_of=(1, 4, 7), **changed)


def from_scratch(**changed):
    """The base model, too, must have been trained with this."""
    return dict(init='none', steps=800, **changed)


EXPERIMENTS = {                       # name: (what is varied, {value: what it changes})
    'camera': ('camera path', {
        'plucker': curve(camera='plucker'),
        'prope': curve(camera='prope'),
        'plucker+prope': curve(camera='plucker+prope'),
        'none': curve(drop_camera=1.),
        'prope, pooled': curve(camera='prope', pooled=True),
    }),
    'steps': ('steps', {n: dict(steps=n) for n in (100, 200, 400, 800, 1600)}),
    'batch': ('batch', {
        '2 x 400 steps': dict(batch=2, steps=400),
        '8 x 400 steps': dict(batch=8, steps=400),
        '32 x 400 steps': dict(batch=32, steps=400),
        '2 x 1600 steps': dict(batch=2, steps=1600),
        '32 x 100 steps': dict(batch=32, steps=100),
    }),
    'poses': ('noise of the training poses', {
        '0 degrees, 0 m': dict(poses=(0, 0)),
        '1 degrees, 0.02 m': dict(poses=(1, .02)),
        '3 degrees, 0.06 m': dict(poses=(3, .06)),
        '10 degrees, 0.2 m': dict(poses=(10, .2)),
    }),
    'shift': ('shift of t, from scratch', {s: from_scratch(shift=s) for s in (1., 2., 4., 8.)}),
    'gamma': ('codec scale, from scratch', {g: from_scratch(gamma=g) for g in (0., .5, 1.)}),
    'first': ('p_first', {p: dict(p_first=p) for p in (0., .5, 1.)}),
    'text': ('text dropout', {p: dict(drop_text=p) for p in (0., .1, .5)}),
    'muon': ('optimizer', {
        'Muon 8e-3': {},
        'AdamW 1e-3': dict(muon=False, lr=1e-3),
        'AdamW 3e-3': dict(muon=False, lr=3e-3),
    }),
}

# -----------------------------------------------------------------------------
# changed clips

def copy_clips(folder, change):
    """The clips once more, with change(tensors, is it a training shard?) applied to each shard, in place."""
    if os.path.exists(folder):
        return
    os.makedirs(f'{folder}.tmp', exist_ok=True)
    for name in sorted(os.listdir(DATA)):
        if name.endswith('.safetensors'):
            tensors, header = load_tensors(f'{DATA}/{name}')
            change(tensors, name.startswith('train'))
            save_tensors(f'{folder}.tmp/{name}', tensors, header)
        else:
            shutil.copy(f'{DATA}/{name}', f'{folder}.tmp')
    os.rename(f'{folder}.tmp', folder)


def noisy_poses(degrees, metres):
    """A change that turns and moves every training pose at random, as an estimator's errors would."""
    rng = np.random.default_rng(0)

    def normal(deviation, *shape):
        return torch.tensor(rng.normal(0, deviation, shape), dtype=torch.float32)

    def change(tensors, train):
        if train:
            clips, frames = tensors['c2w'].shape[:2]
            position = normal(metres, clips, frames, 3)
            yaw = normal(degrees, clips, frames)
            pitch = normal(degrees, clips, frames)
            tensors['c2w'] = tensors['c2w'] @ make_pose(position, yaw, pitch)
    return change


def scaled_latents(old, new):
    """A change from one scale of the codec's channels to another."""
    def change(tensors, train):
        tensors['latents'].mul_((old / new)[:, None, None])
    return change

# -----------------------------------------------------------------------------
# a cheaper PRoPE

def pool_prope(frames=9):
    """From now on PRoPE's attention reads means of 2 x 2 tokens, a quarter of the queries and of the keys (as
    E-PRoPE in DreamX-World)."""
    attend = network.cached_attention

    def attend_pooled(q, k, v, mask, cache, slot):
        if slot < network.PRESETS['nano'].num_layers:                # the first attention
            return attend(q, k, v, mask, cache, slot)
        side = math.isqrt(q.shape[1] // frames)                    # tokens of a frame: side x side
        cells = dict(f=frames, h=side // 2, i=2, w=side // 2, j=2)
        q, k, v = (reduce(x, 'b (f h i w j) n d -> b (f h w) n d', 'mean', **cells) for x in (q, k, v))
        y = attend(q, k, v, mask, cache, slot)
        return repeat(y, 'b (f h w) n d -> b (f h i w j) n d', **cells)

    network.cached_attention = attend_pooled

# -----------------------------------------------------------------------------
# an evaluation that also finds poses

def find_poses(manifest, pictures, frames):
    """Where were these frames of n held-out clips taken, by their pictures (n, F, H, W, 3) alone? The errors
    of the poses found, degrees (n, len(frames)) and metres."""
    world, _ = held_out(Config(), {'data': manifest}, range(len(pictures)), manifest['recipe']['frames'])
    found = []
    for i, clip in enumerate(pictures):
        lowpoly = data.Lowpoly([int(world['plan'][i])], [int(world['palette'][i])])
        start = world['c2w'][i, 0]
        found.append(locate(lowpoly, clip[frames], torch.tensor(frames), start, world['K'][i]))
    return pose_error(torch.stack(found), world['c2w'][:, frames])


def with_poses(evaluate, frames):
    """The stage's `evaluate`, with the errors of the pose at some frames added: medians over the clips."""
    lost = []                                                      # one mask, found at the first evaluation

    @torch.no_grad()
    def evaluate_and_look(model, cfg, clips, device, strip=None):
        n = min(cfg.eval_clips, len(clips))
        batch = data.get_batch(clips, 0, n, cfg.frames, model.cfg, cfg.seed, device)
        times = schedule(cfg.sample_steps, model.cfg.shift)
        latents = sample_clip(model, batch.eps, batch.text, batch.camera, times, batch.x0[:, :1])
        video = clips.codec().decode(latents)
        if not lost:                              # where the true frame itself cannot be located: a bare wall
            degrees, metres = find_poses(clips.manifest, clips.truth(n, cfg.frames), frames)
            lost.append((degrees > 2) | (metres > .15))
        metrics = evaluate(model, cfg, clips, device, strip)
        degrees, metres = find_poses(clips.manifest, video, frames)
        for name, error in (('rot', degrees), ('trans', metres)):
            medians, _ = error.masked_fill(lost[0], torch.nan).nanmedian(0)
            metrics |= {f'{name}@{frame}': x for frame, x in zip(frames, medians.tolist())}
        return metrics
    return evaluate_and_look

# -----------------------------------------------------------------------------
# runs

def train_one(out, seed, gamma=data.GAMMA, shift=None, poses=None, poses_of=None, pooled=False, **changed):
    """One run, in this process, whose modules it changes. gamma: of the codec's scale; shift: of the
    schedule; poses: (degrees, metres) of their noise; poses_of: frames whose poses are found; pooled: see
    pool_prope; the rest: stage 0's flags."""
    folder = DATA
    if pooled:
        pool_prope()
    if gamma != data.GAMMA:
        folder = f'{OUT}/clips-gamma-{gamma}'
        old = data.SCALE
        data.SCALE = data.DCT_STD ** gamma * (data.DCT_STD ** (2 - 2 * gamma)).mean().sqrt()
        copy_clips(folder, scaled_latents(old, data.SCALE))
    if poses:
        folder = f'{OUT}/clips-poses-{poses[0]}'
        copy_clips(folder, noisy_poses(*poses))
    if poses_of:
        finetune_camera.evaluate = with_poses(finetune_camera.evaluate, list(poses_of))
    if shift:
        start_model = finetune_camera.start_model

        def start_shifted(*args):
            model = start_model(*args)
            model.cfg = replace(model.cfg, shift=shift)
            return model
        finetune_camera.start_model = start_shifted
    settings = dict(init=BASE, steps=400) | changed
    finetune_camera.main(finetune_camera.Config(data=folder, out=out, seed=seed, **settings))


def folders(name):
    """(value, what it changes, seed, folder) of each run of an experiment."""
    _, values = EXPERIMENTS[name]
    for seed in range(SEEDS):
        for i, (value, changed) in enumerate(values.items()):
            yield value, changed, seed, f'{OUT}/{name}-{i}-{seed}'


def train(name):
    """Make the runs that are missing, each in its own process."""
    for _, changed, seed, out in folders(name):
        if not os.path.exists(f'{out}/camera.safetensors'):
            code = f'from experiments.ablate import train_one; train_one({out!r}, {seed}, **{changed!r})'
            subprocess.run([sys.executable, '-c', code], check=True)
            os.remove(f'{out}/camera.resume.safetensors')


def results(name):
    """{value: [metrics of each seed]} of the runs that are there."""
    rows = {}
    for value, _, _, out in folders(name):
        if os.path.exists(f'{out}/camera.safetensors'):
            _, header = load_tensors(f'{out}/camera.safetensors')
            rows.setdefault(value, []).append(header['metrics'])
    return rows


def logged(name):
    """{(value, step): [metrics of each seed]} of the evaluations that found poses."""
    rows = {}
    for value, _, _, out in folders(name):
        if os.path.exists(f'{out}/camera.safetensors'):
            with open(f'{out}/camera.jsonl') as f:
                lines = [json.loads(line) for line in f]
            for line in lines:
                if 'rot@7' in line:
                    rows.setdefault((value, line['step']), []).append(line)
    return rows

# -----------------------------------------------------------------------------
# tables and pictures

def spread(runs, key):
    """Mean and standard deviation over the seeds."""
    values = [run[key] for run in runs]
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return statistics.mean(values), deviation


def print_row(names, runs, keys):
    cells = [str(name) for name in names]
    for key in keys:
        mean, deviation = spread(runs, key)
        cells.append(f'{mean:.2f} ± {deviation:.2f}')
    print('| ' + ' | '.join(cells) + ' |')


def print_title(names):
    print('\n| ' + ' | '.join(names) + ' |\n' + '|---' * len(names) + '|')


def table(what, rows):
    """A row for each value that was tried."""
    keys = 'val_loss', 'psnr@1', 'psnr@7', 'gap@7'
    print_title([what, 'seeds', *keys])
    for value, runs in rows.items():
        print_row([value, len(runs)], runs, keys)


def curve_table(what, rows):
    """A row for each value and step."""
    keys = 'val_loss', 'psnr@7', 'gap@7', 'rot@1', 'rot@4', 'rot@7', 'trans@1', 'trans@4', 'trans@7'
    print_title([what, 'steps', 'seeds', *keys])
    for (value, step), runs in rows.items():
        print_row([value, step, len(runs)], runs, keys)


def draw_bars(panels):
    """Control against each thing that is varied, all to one scale."""
    across = min(4, len(panels))
    down = math.ceil(len(panels) / across)
    _, axes = pyplot.subplots(down, across, figsize=(2.7 * across, 2.2 * down), sharey=True, squeeze=False)
    for axis in axes.flat[len(panels):]:
        axis.axis('off')
    for axis, (what, rows) in zip(axes.flat, panels.items()):
        points = [spread(runs, 'gap@7') for runs in rows.values()]
        mean, deviation = zip(*points)
        axis.bar(range(len(rows)), mean, .6, yerr=deviation, capsize=3)
        labels = [re.sub(', | x ', '\n', str(value)) for value in rows]
        axis.set_xticks(range(len(rows)), labels)
        axis.tick_params(labelsize=6)
        axis.set_title(what, fontsize=9)
    for row in axes:
        row[0].set_ylabel('gap@7, dB', fontsize=8)
    save('control')


def draw_curves(rows):
    """Control and the errors of the pose against steps, a line for each value."""
    titles = {
        'gap@7': 'right path against wrong, frame 7, dB',
        'rot@4': 'rotation error, frame 4, degrees',
        'trans@4': 'translation error, frame 4, m',
    }
    _, axes = pyplot.subplots(1, 3, figsize=(10, 3))
    for axis, (key, title) in zip(axes, titles.items()):
        for value in dict.fromkeys(value for value, _ in rows):
            steps = [step for other, step in rows if other == value]
            points = [spread(rows[value, step], key) for step in steps]
            mean, deviation = zip(*points)
            axis.errorbar(steps, mean, deviation, marker='o', capsize=3, label=value)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel('steps')
    axes[0].legend(fontsize=8)
    save('camera')


def save(name):
    pyplot.tight_layout()
    pyplot.savefig(f'{OUT}/{name}.png', dpi=130)
    pyplot.close()


def main(names, only_table):
    panels = {}
    for name in names:
        what, _ = EXPERIMENTS[name]
        if not only_table:
            train(name)
        if name == 'camera':
            rows = logged(name)
            curve_table(what, rows)
            if pyplot:
                draw_curves(rows)
        else:
            rows = results(name)
            table(what, rows)
            panels[what] = rows
    if pyplot and panels:
        draw_bars(panels)


if __name__ == '__main__':
    names = [argument for argument in sys.argv[1:] if argument != '--table']
    main(names, only_table='--table' in sys.argv)
