"""
What the recipe takes at Wan2.1's size, computed, nothing measured: memory a GPU and hours per 1,000 updates.

    python tests/h100.py wan-1.3b                # or wan-14b; clips of 20 latents of 480 x 832, chunks of 4, as minWM; batch 16, its least

One clip at a time on a GPU, activation checkpointing (a training pass costs four forward passes instead of three), with
several GPUs --shard fsdp; 80 GB a GPU; 40 % of an H100's 989 TFLOP/s in bfloat16.
"""
import dataclasses
import sys

import torch

from conftest import ROOT                                                     # noqa: F401 (finds the scripts)
from model import PRESETS, DiT, flops, forced_flops

SPEED, GIB = .4 * 989e12, 2 ** 30
H, W, F, CHUNK, BATCH = 480, 832, 20, 4, 16


def main(preset):
    cfg = dataclasses.replace(PRESETS[preset], camera='prope')
    with torch.device('meta'):
        P = sum(p.numel() for p in DiT(cfg).parameters())
    L, chunks = H * W // 256, F // CHUNK
    full, forced = flops(cfg, F, L, F), forced_flops(cfg, F, L)                     # one forward pass of a clip
    step = sum(flops(cfg, CHUNK, L, CHUNK * (i + 1)) for i in range(chunks))       # one call for every chunk of a walk
    walk = 3.5 * step                                                              # 1 to 4 calls, 2.5 on average, and the clean one
    generator, critic = walk + 3 * step + 2 * full + full, 4 * full                # + 3: the backward pass, forward again
    # bytes a parameter: fp32 weights, gradient, Adam's two averages 16; their EMA 4; frozen networks 4
    keep = 8 * F * L * cfg.dim * cfg.num_layers                                    # one float32 and its gradient a token and block
    cache = 2 * 2 * 2 * cfg.num_layers * F * L * cfg.dim                           # bfloat16 k, v of both attentions
    rows = [('0, finetune_camera.py', 4 * full, 20, keep), ('1, train_ar.py', 4 * forced, 20, 2 * keep),
            ('2, ode: 1,000 pairs', 48 * 2 * flops(cfg, F, L, (F + CHUNK) / 2), 4, 4 * cache), ('2, ode', 4 * forced, 24, 2 * keep),
            ('2, cd', 4 * forced + 3 * forced, 28, 2 * keep), ('3, distill_dmd.py, critic 5', generator + 5 * critic, 20 + 16 + 4, keep + cache)]
    print(f'{preset}: {P / 1e9:.2f} B parameters with PRoPE, {L} tokens a latent, {F} latents\n')
    print('| stage | PFLOP a clip | 1 H100: GiB | hours | 8 H100: GiB each | hours |\n|---|---|---|---|---|---|')
    for name, work, state, more in rows:
        samples = 1000 * (1 if 'pairs' in name else BATCH)
        cells = []
        for gpus in (1, 8):
            need = (P * state / gpus + more) / GIB
            cells += [f'{need:.0f}' + ' (too much)' * (need > 74), f'{samples * work / SPEED / gpus / 3600:.0f}']
        print(f'| {name} | {work / 1e15:.1f} | ' + ' | '.join(cells) + ' |')


if __name__ == '__main__':
    main(*sys.argv[1:])
