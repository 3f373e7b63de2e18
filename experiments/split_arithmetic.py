"""
What would a split network (papers/scd.py) save at Wan2.1's size? Arithmetic of a streamed chunk; computed,
not measured. experiments/bench_cuda.py measures it where there is a GPU.

    python -m experiments.split_arithmetic       # seconds, no GPU

A chunk is 4 latents of 480 x 832, and sees a window of 20. The dense network has 30 blocks and runs steps + 1
times: once more for the cache. The split one is as large as the paper's, 25 blocks that run once a chunk and
10 that render. Concatenated: the 10 read [context; chunk], twice the tokens. PRoPE is a second attention in
every block; pooled, its queries and keys are means of 2 x 2 tokens (as E-PRoPE in DreamX-World).
"""
from dataclasses import replace

from backbones.layouts import flops
from experiments.h100 import CHUNK, FRAMES, TOKENS
from model import PRESETS

DENSE, ENCODER, DECODER = 30, 25, 10  # blocks
STEPS = 4, 2, 1


def work(camera, kind, steps, pooled=False):
    """Floating-point operations of a chunk: dense, or a split network whose context is added or
    concatenated. pooled: PRoPE's attention has a quarter of the queries and of the keys."""
    cfg = replace(PRESETS['wan-1.3b'], camera=camera)
    if kind == 'dense':
        passes = [(steps + 1, DENSE, CHUNK, FRAMES)]      # (how often, blocks, frames, frames that they see)
    elif kind == 'added':
        passes = [(1, ENCODER, CHUNK, FRAMES), (steps, DECODER, CHUNK, CHUNK)]
    else:
        passes = [(1, ENCODER, CHUNK, FRAMES), (steps, DECODER, 2 * CHUNK, 2 * CHUNK)]
    total = 0
    for times, blocks, frames, seen in passes:
        one = flops(replace(cfg, num_layers=blocks), frames, TOKENS, seen)
        if pooled:
            scores = 4 * blocks * frames * TOKENS * seen * TOKENS * cfg.dim
            one -= 15 / 16 * scores
        total += times * one
    return total


def main():
    cameras = {
        'Plücker maps': ('plucker', False),
        'PRoPE': ('prope', False),
        'PRoPE, pooled': ('prope', True),
    }
    print('TFLOP a chunk of 4 latents (16 pictures), full window\n')
    print('| camera | network | ' + ' | '.join(f'steps {n}' for n in STEPS) + ' |\n' + '|---' * 5 + '|')
    for name, (camera, pooled) in cameras.items():
        for kind in ('dense', 'concatenated', 'added'):
            cells = []
            for steps in STEPS:
                mine, dense = (work(camera, k, steps, pooled) for k in (kind, 'dense'))
                cells.append(f'{mine / 1e12:.0f} ({dense / mine:.1f}x)')
            print(f'| {name} | {kind} | ' + ' | '.join(cells) + ' |')


if __name__ == '__main__':
    main()
