"""
The README's speed table, written by one command between its two marks:

    python tests/speed_card.py checkpoints/ar.safetensors:48,16 checkpoints/dmd.safetensors:4,2,1

Each row is `stream.py --bench` in a process of its own. Then the same frames by a naive loop over the same weights (no
cache of the prompt, a key-value cache that is concatenated anew, tables and camera made at every call), both in one run.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
import time

import torch

from conftest import ROOT
from camera import Camera, keys_to_poses, relative, steps
from data import decode, encode, noise_for
from model import embed_text, load_model, rollout, schedule
from stream import Config, held_out

MARKS = '<!-- speed -->\n', '<!-- /speed -->\n'


class Concatenated:
    """A KV cache as one first writes it."""
    text = property(lambda self: [None] * 99)

    def __init__(self):
        self.kv, self.new, self.end = {}, {}, 0

    def update(self, layer, k, v):
        past = self.kv.get(layer)
        self.new[layer] = (k, v) if past is None else (torch.cat([past[0], k], 1), torch.cat([past[1], v], 1))
        return self.new[layer]


def naive(model, c2w, K, text, times, noise, first):
    """The few-step rollout, within one window."""
    cache, before = Concatenated(), None
    for f in range(c2w.shape[1]):
        def call(x, t):
            model.tables.clear()
            camera = Camera(relative(c2w[:, f:f + 1], c2w[:, 0]), K[:, None], step=steps(c2w[:, f:f + 1], before))
            return model(x, torch.full((1, 1), t), text, camera, cache=cache)
        x = noise(1) if f else first
        for t, t_next in zip(times[:-1].tolist(), times[1:].tolist()) if f else ():
            x = x - t * call(x, t)
            x = (1 - t_next) * x + t_next * noise(1) if t_next else x
        yield x
        call(x, 0.)
        cache.kv, cache.end, before = dict(cache.new), cache.end + 1, c2w[:, f:f + 1]


@torch.no_grad()
def against_naive(path, n):
    model, header = load_model(path)
    cfg, frames = model.eval().cfg, header['frames']
    world, captions = held_out(Config(), header, [0])
    text, K, c2w = embed_text(captions, cfg.text_len, cfg.text_dim), world['K'], relative(keys_to_poses(f'wl*{frames - 1}')[None])
    first, times, took, last = encode(world['frames'][:, :1]), schedule(n, cfg.shift), {}, {}
    for turn in range(12):                                                    # alternating; the first of each warms up
        for name in ('ours', 'naive'):
            noise, began = noise_for([turn], first.shape[2:], 'cpu'), time.perf_counter()
            cameras = (Camera(c2w[:, f:f + 1], K[:, None]) for f in range(frames))
            walk = rollout(model, cameras, text, times, noise, first, window=frames, renoise=True) if name == 'ours' else \
                naive(model, c2w, K, text, times, noise, first)
            last[name] = [decode(x) for x in walk]
            took.setdefault(name, []).append((time.perf_counter() - began) / frames * 1e3)
        assert max((a - b).abs().max() for a, b in zip(*last.values())) < 1e-4
    return {name: sorted(ms[1:])[len(ms) // 2] for name, ms in took.items()}


if __name__ == '__main__':
    lines = ['| checkpoint | steps | frames/s | without decoding | key to frame p50 / p95, ms | first frame, s | peak MB | time / floor | latency growth |',
             '|' + '---|' * 9]
    for argument in sys.argv[1:]:
        path, steps_ = argument.split(':')
        for n in steps_.split(','):
            with tempfile.TemporaryDirectory() as folder:
                subprocess.run([sys.executable, f'{ROOT}/stream.py', '--ckpt', path, '--steps', n, '--bench', f'{folder}/bench.json'],
                               check=True, stdout=subprocess.DEVNULL)
                with open(f'{folder}/bench.json') as f:
                    b = json.load(f)
            lines.append(f'| {os.path.basename(path)} | {n} | {b["fps"]:.0f} | {b["fps_denoiser"]:.0f} | {b["latency_ms_p50"]:.0f} / '
                         f'{b["latency_ms_p95"]:.0f} | {b["first_frame_s"]:.1f} | {b["peak_mb"]:.0f} | {b["floor_ratio"]:.0f} | {b["latency_growth"]:.2f} |')
            print(lines[-1], flush=True)
    for n in (4, 1):
        ms = against_naive(path, n)
        lines += ['' if n == 4 else None, f'{n} step{"s" * (n > 1)}, the same frames: {ms["ours"]:.1f} ms a frame, naive {ms["naive"]:.1f} ms: '
                  f'{ms["naive"] / ms["ours"]:.2f} times as fast.']
    card = f'{b["device"]}, {b["dtype"].removeprefix("torch.")}, {b["width"]} x {b["height"]} pixels:\n\n' + '\n'.join(x for x in lines if x is not None) + '\n'
    print(card)
    with open(f'{ROOT}/README.md') as f:
        text = f.read()
    assert all(m in text for m in MARKS), 'README.md has lost its marks'
    text = re.sub(f'(?s){MARKS[0]}.*{MARKS[1]}', lambda _: MARKS[0] + card + MARKS[1], text)
    with open(f'{ROOT}/README.md.tmp', 'w') as f:
        f.write(text)
    os.replace(f'{ROOT}/README.md.tmp', f'{ROOT}/README.md')
