"""
The README's speed table, written by one command between its two marks:

    python tests/speed_card.py checkpoints/ar.safetensors:8,1 checkpoints/dmd.safetensors:4,2,1

Each row is `stream.py --bench` in a process of its own. Then the same frames by a naive loop over the same weights (no
cache of the prompt, a key-value cache that is concatenated anew, tables and camera made at every call), and with one
part after the other, all in one run.
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
from model import KVCache, embed_text, load_model, rollout, rotary_table, schedule
from stream import Config, held_out

MARKS = '<!-- speed -->\n', '<!-- /speed -->\n'


class Concatenated:
    """A KV cache as one first writes it."""

    def __init__(self, prompt):
        self.prompt, self.kv, self.new, self.end, self.gone = [None] * 99 if prompt else None, {}, {}, 0, 0

    @property
    def text(self):
        return self.prompt or [None] * 99

    def update(self, layer, k, v):
        past = self.kv.get(layer)
        self.new[layer] = (k, v) if past is None else (torch.cat([past[0], k], 1), torch.cat([past[1], v], 1))
        return self.new[layer]


PARTS = 'rotary tables kept', 'camera embedded once a frame', 'prompt kept', 'cache preallocated', 'inference mode'


def naive(model, c2w, K, text, times, noise, first, parts=()):
    """The few-step rollout within one window, with some of the parts that make `rollout` fast."""
    window, before = c2w.shape[1], None
    cache = KVCache(model.cfg, 1, window, first[0, 0, 0].numel() // model.cfg.patch ** 2, 'cpu') if PARTS[3] in parts else Concatenated(PARTS[2] in parts)
    for f in range(window):
        camera = Camera(relative(c2w[:, f:f + 1], c2w[:, 0]), K[:, None], step=steps(c2w[:, f:f + 1], before))
        x, before = noise(1) if f else first, c2w[:, f:f + 1]
        camera = model.embed_camera(camera, *x.shape[-2:]) if PARTS[1] in parts else camera

        def call(x, t):
            if PARTS[0] not in parts:
                rotary_table.cache_clear()
            return model(x, torch.full((1, 1), t), text, camera, cache=cache)
        for t, t_next in zip(times[:-1].tolist(), times[1:].tolist()) if f else ():
            x = x - t * call(x, t)
            x = (1 - t_next) * x + t_next * noise(1) if t_next else x
        yield x
        call(x, 0.)
        if PARTS[3] not in parts:
            cache.kv = dict(cache.new)
        cache.end += 1


def against_naive(path, n):
    """Median milliseconds a frame of the same walk: naive, with one part after the other, and by `rollout`."""
    model, header = load_model(path)
    cfg, frames = model.eval().cfg, header['frames']
    world, captions = held_out(Config(), header, [0])
    text, K, c2w = embed_text(captions, cfg.text_len, cfg.text_dim), world['K'], relative(keys_to_poses(f'wl*{frames - 1}')[None])
    first, times, took = encode(world['frames'][:, :1]), schedule(n, cfg.shift), {}
    for turn in range(12):                                                    # alternating; the first of each warms up
        same = []
        for name in ('naive', *PARTS, 'rollout'):
            noise, began = noise_for([turn], first.shape[2:], 'cpu'), time.perf_counter()
            cameras = (Camera(c2w[:, f:f + 1], K[:, None]) for f in range(frames))
            parts = PARTS[:PARTS.index(name) + 1] if name in PARTS else ()
            with torch.inference_mode() if name in (PARTS[4], 'rollout') else torch.no_grad():
                walk = rollout(model, cameras, text, times, noise, first, window=frames + 1, renoise=True) if name == 'rollout' else \
                    naive(model, c2w, K, text, times, noise, first, parts)
                same.append(torch.cat([decode(x) for x in walk]))
            took.setdefault(name, []).append((time.perf_counter() - began) / frames * 1e3)
        assert max((x - same[0]).abs().max() for x in same) < 1e-4            # equal output
    return {name: sorted(ms[1:])[len(ms) // 2] for name, ms in took.items()}


if __name__ == '__main__':
    lines = ['| checkpoint | pixels | steps | frames/s | without decoding | key to frame p50 / p95, ms | first frame, s | peak MB | time / floor | latency growth |',
             '|' + '---|' * 10]
    for argument in sys.argv[1:]:
        path, steps_ = argument.split(':')
        for n in steps_.split(','):
            with tempfile.TemporaryDirectory() as folder:
                subprocess.run([sys.executable, f'{ROOT}/stream.py', '--ckpt', path, '--steps', n, '--frames', '2100' if int(n) <= 4 else '300',
                                '--bench', f'{folder}/bench.json'],
                               check=True, stdout=subprocess.DEVNULL)
                with open(f'{folder}/bench.json') as f:
                    b = json.load(f)
            lines.append(f'| {os.path.basename(path)} | {b["width"]} x {b["height"]} | {n} | {b["fps"]:.0f} | {b["fps_denoiser"]:.0f} | {b["latency_ms_p50"]:.0f} / '
                         f'{b["latency_ms_p95"]:.0f} | {b["first_frame_s"]:.1f} | {b["peak_mb"]:.0f} | {b["floor_ratio"]:.0f} | {b["latency_growth"]:.2f} |')
            print(lines[-1], flush=True)
    lines += ['', 'The same frames, ms each | naive | ' + ' | '.join(f'+ {p}' for p in PARTS) + ' | `rollout` | gain', '|'.join(['---'] * (len(PARTS) + 4))]
    for n in (4, 1):
        ms = against_naive(path, n)
        lines.append(f'{n} step{"s" * (n > 1)} | ' + ' | '.join(f'{x:.1f}' for x in ms.values()) + f' | {ms["naive"] / ms["rollout"]:.2f}')
    card = f'{b["device"]}, {b["dtype"].removeprefix("torch.")}:\n\n' + '\n'.join(lines) + '\n'
    print(card)
    with open(f'{ROOT}/README.md') as f:
        text = f.read()
    assert all(m in text for m in MARKS), 'README.md has lost its marks'
    text = re.sub(f'(?s){MARKS[0]}.*{MARKS[1]}', lambda _: MARKS[0] + card + MARKS[1], text)
    with open(f'{ROOT}/README.md.tmp', 'w') as f:
        f.write(text)
    os.replace(f'{ROOT}/README.md.tmp', f'{ROOT}/README.md')
