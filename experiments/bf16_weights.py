"""
What becomes of stages 2 and 3 if the weights themselves are bfloat16, rather than float32 under bfloat16
autocast?

    python -m experiments.bf16_weights out data/lowpoly-500     # after run.sh: 300 steps of CD, 60 of DMD

bfloat16 has 8 bits of precision: a weight does not move unless a step changes it by more than one part in
512. Users of the reference codes report that consistency distillation and DMD collapse so. Same start, data,
seed and learning rates; the weights, their average and the optimizer's state are float32 in one run and
bfloat16 in the other. What moved: the share of the weights above .01 that training has changed at all, and by
how much (the median of those that did).
"""
import json
import sys

import torch

import distill_dmd
import distill_ode
from common import load_tensors


def in_bfloat16(make):
    """A function that makes a network, or a dict of networks, as one that makes it with bfloat16 weights."""
    def made(*args):
        made = make(*args)
        for net in made.values() if isinstance(made, dict) else [made]:
            net.bfloat16()
        return made
    return made


def train(method, start, data, out, bfloat16):
    """Train in the folder `out`; returns its header and the path of the checkpoint that it started from."""
    module = distill_ode if method == 'cd' else distill_dmd
    name = 'start_model' if method == 'cd' else 'start_nets'
    usual = getattr(module, name)
    if bfloat16:
        setattr(module, name, in_bfloat16(usual))
    if method == 'cd':
        cfg = module.Config(method='cd', init=f'{start}/ar.safetensors', data=data, out=out, dtype='bfloat16')
    else:
        cfg = module.Config(init=f'{start}/ode.safetensors', score=f'{start}/camera.safetensors', data=data,
                            out=out, dtype='bfloat16')
    module.main(cfg)
    setattr(module, name, usual)
    return cfg.init


def moved(before, after, bfloat16):
    """(Share of the weights above .01 that differ, the median of their relative changes). What the start
    loses when it is rounded to bfloat16 does not count."""
    old, _ = load_tensors(before)
    new, _ = load_tensors(after)
    prefix = 'model.generator.' if 'model.generator.head.head.weight' in new else 'model.'
    old_all = torch.cat([old[name].flatten() for name in sorted(old)])
    if bfloat16:
        old_all = old_all.bfloat16().float()
    new_all = torch.cat([new[prefix + name].flatten().float() for name in sorted(old)])
    large = old_all.abs() > .01
    change = ((new_all - old_all).abs() / old_all.abs())[large]
    return (change > 0).float().mean().item(), change[change > 0].median().item()


def main(start, data, *methods):
    rows = []
    for method in methods or ('cd', 'dmd'):
        for bfloat16 in (False, True):
            kind = 'bfloat16 weights' if bfloat16 else 'float32 masters'
            out = f'{start}/bf16-weights-{method}-{bfloat16}'
            before = train(method, start, data, out, bfloat16)
            share, change = moved(before, f'{out}/{method}.resume.safetensors', bfloat16)
            with open(f'{out}/{method}.jsonl') as f:
                entries = [json.loads(line) for line in f]
            losses = [entry['loss'] for entry in entries if 'lr' in entry]
            last = 'dmd.last' if method == 'dmd' else method
            metrics = load_tensors(f'{out}/{last}.safetensors')[1]['metrics']
            rows.append((method, kind, losses[0], losses[-1], share, change, metrics))
    names = 'psnr@1', 'psnr@7', 'gap@7', 'sharpness', 'fd'
    print('\n| method | weights | loss, first and last line | moved | by |', ' | '.join(names), '|')
    print('|---' * (5 + len(names)) + '|')
    for method, kind, first, last, share, change, metrics in rows:
        scores = ' | '.join(f'{metrics[name]:.3g}' if name in metrics else '' for name in names)
        print(f'| {method} | {kind} | {first:.2g}, {last:.2g} | {share:.0%} | {change:.2%} | {scores} |')


if __name__ == '__main__':
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
