"""
What does the recipe take at Wan2.1's and HunyuanVideo-1.5's size? Memory a GPU and hours per 1,000 updates;
computed, not measured.

    python -m experiments.h100 wan-1.3b          # or wan-14b, hy1.5-8b; seconds, no GPU

Prints a row for each stage: arithmetic of one clip, then GiB a GPU and hours, on one H100 and on eight.
Assumed: clips of 20 latents of 480 x 832 in chunks of 4 and a batch of 16, as in minWM (its smallest); one
clip at a time on a GPU; activation checkpointing (a training pass costs four forward passes, not three);
--shard fsdp where there are several GPUs; 80 GB a GPU; 40 % of an H100's 989 TFLOP/s in bfloat16.
"""
import sys
from dataclasses import replace

import torch

from backbones.layouts import flops, forced_flops
from common import find_preset

HEIGHT, WIDTH = 480, 832              # pixels
FRAMES, CHUNK, BATCH = 20, 4, 16      # latents of a clip, of a chunk; clips of a batch
TOKENS = HEIGHT * WIDTH // 256        # of a latent: 16 x 16 pixels each
SPEED = .4 * 989e12                   # floating-point operations a second
GIB = 2 ** 30
MOST = 74                             # GiB that 80 GB hold


def stages(cfg):
    """{stage: (floating-point operations a clip, bytes a parameter, other bytes)}."""
    # arithmetic
    full = flops(cfg, FRAMES, TOKENS, FRAMES)             # one forward pass over a clip
    forced = forced_flops(cfg, FRAMES, TOKENS)            # the same over [history | noisy]
    ode_step = 2 * flops(cfg, FRAMES, TOKENS, (FRAMES + CHUNK) / 2)     # guided: two passes
    calls = 0                                             # a call of the network for each chunk of a rollout
    for end in range(CHUNK, FRAMES + 1, CHUNK):
        calls += flops(cfg, CHUNK, TOKENS, end, words=False)
    rollout = 3.5 * calls                                 # 1 to 4 to denoise, 2.5 on average; the clean one
    generator = rollout + 3 * calls                       # its backward pass, forward again
    generator = generator + 2 * full + full               # real score, guided, and fake score
    critic = 4 * full
    # bytes: a trained parameter has 16 (fp32, gradient, Adam's two averages), its EMA or a frozen one 4
    activations = FRAMES * TOKENS * cfg.dim * cfg.num_layers           # but for HunyuanVideo's words, 6 %
    kept = 8 * activations                                # in float32, with gradient
    cache = 2 * 2 * 2 * activations                       # keys and values of both attentions, in bfloat16
    return {
        '0, finetune_camera.py': (4 * full, 20, kept),
        '1, train_ar.py': (4 * forced, 20, 2 * kept),
        '2, ode: 1,000 pairs': (48 * ode_step, 4, 4 * cache),
        '2, ode': (4 * forced, 24, 2 * kept),
        '2, cd': (4 * forced + 3 * forced, 28, 2 * kept),
        '3, distill_dmd.py, critic 5': (generator + 5 * critic, 20 + 16 + 4, kept + cache),
    }


def main(preset):
    cfg = replace(find_preset(preset), camera='prope')
    with torch.device('meta'):
        model = cfg.build()
    parameters = sum(p.numel() for p in model.parameters())
    print(f'{preset}: {parameters / 1e9:.2f} B parameters with PRoPE, {TOKENS} tokens a latent, '
          f'{FRAMES} latents\n')
    print('| stage | PFLOP a clip | 1 H100: GiB | hours | 8 H100: GiB each | hours |')
    print('|---|---|---|---|---|---|')
    for name, (work, state, more) in stages(cfg).items():
        clips = 1000 if 'pairs' in name else 1000 * BATCH
        cells = [f'{work / 1e15:.1f}']
        for gpus in (1, 8):
            memory = (parameters * state / gpus + more) / GIB
            remark = ' (too much)' if memory > MOST else ''
            hours = clips * work / SPEED / gpus / 3600
            cells += [f'{memory:.0f}{remark}', f'{hours:.0f}']
        print(f'| {name} | ' + ' | '.join(cells) + ' |')


if __name__ == '__main__':
    main(*sys.argv[1:])
