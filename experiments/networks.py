"""
Does the kind of network matter? Wan's (nano) and HunyuanVideo-1.5's (hy-nano) through stages 0 and 1.

    OMP_NUM_THREADS=1 python -m experiments.networks

Three seeds of each; clips (data/lowpoly-500, which run.sh makes), batches and steps as in run.sh, but clean
histories, which hy-nano needs; about as many parameters. Leaves out/networks/PRESET-SEED/ and trains nothing
twice; 10 to 20 minutes a run on one core. The scores are those that each stage prints at its end, ms a frame
is of a walk in 4 Euler steps.
"""
import itertools
import os

import numpy as np

import finetune_camera
import train_ar
from common import load_model
from experiments import bench
from stream import prepare

DATA = 'data/lowpoly-500'
SEEDS = 3
COLUMNS = {                           # metric: digits
    'val_loss': 3, 'psnr@1': 2, 'psnr@7': 2, 'gap@7': 2,
}


def train(preset, seed, out):
    """base, camera and causal model with the settings of run.sh."""
    same = dict(preset=preset, seed=seed, data=DATA, out=out)
    if not os.path.exists(f'{out}/base.safetensors'):
        finetune_camera.main(finetune_camera.Config(camera='none', steps=300, init='none', **same))
    if not os.path.exists(f'{out}/camera.safetensors'):
        finetune_camera.main(finetune_camera.Config(sink=True, init=f'{out}/base.safetensors', **same))
    if not os.path.exists(f'{out}/ar.safetensors'):
        train_ar.main(train_ar.Config(init=f'{out}/camera.safetensors', context_noise=0., context=0., **same))


def ms_a_frame(path):
    """Milliseconds that a frame of a walk takes, decoding included."""
    cfg = bench.Config(ckpt=path, steps=4, frames=200)
    model, header, codec, device = prepare(cfg)
    return 1e3 / bench.bench(model, cfg, header, codec, device)['fps']


def main():
    rows = {}                         # {(preset, stage): [{metric: value} of each seed]}
    for seed, preset in itertools.product(range(SEEDS), ('nano', 'hy-nano')):
        out = f'out/networks/{preset}-{seed}'
        train(preset, seed, out)
        for stage in ('camera', 'ar'):
            model, header = load_model(f'{out}/{stage}.safetensors')
            header['metrics']['million'] = sum(p.numel() for p in model.parameters()) / 1e6
            rows.setdefault((preset, stage), []).append(header['metrics'])
    print('\n| network | stage | M parameters | ' + ' | '.join(COLUMNS) + ' |')
    print('|---' * (3 + len(COLUMNS)) + '|')
    for (preset, stage), metrics in rows.items():
        cells = [f'{metrics[0]["million"]:.2f}']
        for key, digits in COLUMNS.items():
            values = [row[key] for row in metrics]
            cells.append(f'{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}')
        print(f'| {preset} | {stage} | ' + ' | '.join(cells) + ' |')
    for preset in ('nano', 'hy-nano'):
        print(f'{preset}: {ms_a_frame(f"out/networks/{preset}-0/ar.safetensors"):.1f} ms a frame')


if __name__ == '__main__':
    main()
