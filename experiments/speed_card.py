"""
How fast is each checkpoint, and what makes `rollout` fast?

    python -m experiments.speed_card checkpoints/ar.safetensors:8,1 checkpoints/dmd.safetensors:4,2,1

Prints a row for each checkpoint and number of steps: `experiments.bench`, each in its own process. Then, for
the last checkpoint, the same frames by a naive loop over the same weights (no cache of the prompt, a KV cache
that grows by concatenation, tables and camera made again at every call), with one improvement added after the
other, and by `rollout`. Ten minutes; let nothing else run.
"""
import json
import os
import subprocess
import sys
import tempfile
import time

import torch

from camera import Camera, keys_to_poses, moves, relative
from common import load_model
from data import decode, embed_text, encode, noise_for
from model import KVCache, rollout, rotary_table, schedule
from stream import Config, held_out

TITLE = ('| checkpoint | pixels | steps | frames/s | without decoding | key to frame p50 / p95, ms | '
         'first frame, s | peak MB | time / floor | latency growth |')
TABLES = 'rotary tables kept'
CAMERA = 'camera embedded once a frame'
PROMPT = 'prompt kept'
CACHE = 'cache preallocated'
INFERENCE = 'inference mode'
PARTS = TABLES, CAMERA, PROMPT, CACHE, INFERENCE                   # in the order in which they are added

# -----------------------------------------------------------------------------
# how fast is each checkpoint?

def bench_row(path, steps):
    """(row of the table, what experiments.bench found)."""
    frames = 2100 if steps <= 4 else 300
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, '-m', 'experiments.bench', '--ckpt', path, '--steps', f'{steps}',
                   '--frames', f'{frames}', '--out', f'{folder}/bench.json']
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        with open(f'{folder}/bench.json') as f:
            b = json.load(f)
    cells = [
        os.path.basename(path),
        f'{b["width"]} x {b["height"]}',
        f'{steps}',
        f'{b["fps"]:.0f}',
        f'{b["fps_denoiser"]:.0f}',
        f'{b["latency_ms_p50"]:.0f} / {b["latency_ms_p95"]:.0f}',
        f'{b["first_frame_s"]:.1f}',
        f'{b["peak_mb"]:.0f}',
        f'{b["floor_ratio"]:.0f}',
        f'{b["latency_growth"]:.2f}',
    ]
    return '| ' + ' | '.join(cells) + ' |', b

# -----------------------------------------------------------------------------
# what makes rollout fast?

class Concatenated:
    """A KV cache as one writes it at first: it grows by concatenation."""

    def __init__(self, layers):
        self.text = [None] * layers   # keys and values of the prompt
        self.kept = {}                # layer: keys and values of the frames that are final
        self.new = {}                 # the same with those of the newest call
        self.end = self.gone = 0

    def update(self, layer, k, v):
        if layer in self.kept:
            k_past, v_past = self.kept[layer]
            k = torch.cat([k_past, k], 1)
            v = torch.cat([v_past, v], 1)
        self.new[layer] = k, v
        return k, v

    def prepare(self, n, mask):
        return mask

    def commit(self):
        self.kept = dict(self.new)


def naive(model, c2w, K, text, times, noise, first, parts=()):
    """The few-step rollout within one window, with some of the PARTS that make `rollout` fast."""
    cfg = model.cfg
    frames = c2w.shape[1]
    if CACHE in parts:
        tokens = first[0, 0, 0].numel() // cfg.patch ** 2
        cache = KVCache(cfg, 1, frames, tokens, 'cpu')
    else:
        cache = Concatenated(cfg.num_layers)

    def call(x, t, camera):
        if TABLES not in parts:
            rotary_table.cache_clear()
        if PROMPT not in parts:
            cache.text = [None] * cfg.num_layers
        return model(x, torch.full((1, 1), t), text, camera, cache=cache)

    before = None
    for f in range(frames):
        here = c2w[:, f:f + 1]
        camera = Camera(relative(here, c2w[:, 0]), K[:, None], move=moves(here, before))
        before = here
        x = noise(1) if f else first
        if CAMERA in parts:
            camera = model.embed_camera(camera, *x.shape[-2:])
        if f > 0:
            for t, t_next in zip(times[:-1].tolist(), times[1:].tolist()):
                x = x - t * call(x, t, camera)
                if t_next > 0:
                    x = (1 - t_next) * x + t_next * noise(1)
        yield x
        call(x, 0., camera)
        if CACHE not in parts:
            cache.commit()
        cache.end += 1


def against_naive(path, steps):
    """{name: median milliseconds a frame} of one path: naive, with one part after the other, by `rollout`."""
    model, header = load_model(path)
    cfg = model.eval().cfg
    frames = header['frames']
    world, captions = held_out(Config(), header, [0])
    text = embed_text(captions, cfg.text_len, cfg.text_dim)
    K = world['K']
    c2w = relative(keys_to_poses(f'wl*{frames - 1}')[None])
    first = encode(world['frames'][:, :1])
    times = schedule(steps, cfg.shift)

    def run(name, noise):
        """Pictures, by one of the ways."""
        if name == 'rollout':
            cameras = (Camera(c2w[:, f:f + 1], K[:, None]) for f in range(frames))
            chunks = rollout(model, cameras, text, times, noise, first, window=frames + 1, renoise=True)
        else:
            parts = PARTS[:PARTS.index(name) + 1] if name in PARTS else ()
            chunks = naive(model, c2w, K, text, times, noise, first, parts)
        return torch.cat([decode(x) for x in chunks])

    took = {name: [] for name in ('naive', *PARTS, 'rollout')}
    for turn in range(12):                                         # in turn, so that all see the same machine
        pictures = []
        for name in took:
            noise = noise_for([turn], first.shape[2:], 'cpu')
            began = time.perf_counter()
            with torch.inference_mode(name in (INFERENCE, 'rollout')), torch.no_grad():
                pictures.append(run(name, noise))
            took[name].append((time.perf_counter() - began) / frames * 1e3)
        assert max((x - pictures[0]).abs().max() for x in pictures) < 1e-4
    medians = {}
    for name, ms in took.items():
        ms = sorted(ms[1:])                                        # the first turn warms up
        medians[name] = ms[len(ms) // 2]
    return medians

# -----------------------------------------------------------------------------
# both tables

def main(arguments):
    print(TITLE)
    print('|' + '---|' * 10)
    for argument in arguments:
        path, steps = argument.split(':')
        for n in steps.split(','):
            row, b = bench_row(path, int(n))
            print(row, flush=True)
    dtype = b['dtype'].removeprefix('torch.')
    print(f'\n{b["device"]}, {dtype}\n')

    names = ['The same frames, ms each', 'naive', *[f'+ {part}' for part in PARTS], '`rollout`', 'gain']
    print('| ' + ' | '.join(names) + ' |')
    print('|' + '---|' * len(names))
    for n in (4, 1):
        ms = against_naive(path, n)
        name = '1 step' if n == 1 else f'{n} steps'
        gain = ms['naive'] / ms['rollout']
        cells = [name, *[f'{x:.1f}' for x in ms.values()], f'{gain:.2f}']
        print('| ' + ' | '.join(cells) + ' |', flush=True)


if __name__ == '__main__':
    main(sys.argv[1:])
