"""
How good are these checkpoints, in how many steps? One table of many: mean over three noise seeds, and spread.

    python -m experiments.table out/ar.safetensors:48p,4p,2,1 out/dmd.safetensors:4p,2,1p

Prints a row for each checkpoint and number of steps. Where the steps end in p, the poses at which the
generated frames were taken are found as well, for the first seed (rot deg, trans m: means over the frames).
A row takes some minutes, one with p several more.
"""
import sys

import numpy as np
import torch

from common import load_model
from data import find_codec
from experiments.score import Config, score

SEEDS = 3
COLUMNS = {                           # of a table: digits
    'psnr@1': 2, 'psnr@7': 2, 'seen@7': 2, 'gap@7': 2,
    'sharpness': 2, 'motion': 2, 'fd': 3, 'drift dB': 2,
}


def summary(s):
    """The numbers of a score that tables show. @7: of frame 7; seen: of what frame 0 showed too."""
    return {
        'psnr@1': s['psnr'][1],
        'psnr@7': s['psnr'][7],
        'seen@7': s['psnr_seen'][7],
        'gap@7': s['psnr'][7] - s['psnr_wrong_path'][7],
        'sharpness': np.mean(s['sharpness'][1:]),
        'motion': np.mean(s['motion'][1:]),
        'fd': s['fd'],
        'drift dB': s['drift_db_per_frame'],
    }


def mean_over_frames(values):
    """Mean of a score's list over frames 1, 2, ..., without those that have no value."""
    return float(np.nanmean(np.array(values[1:], dtype=float)))


def mean_and_spread(rows, key):
    """'mean ± standard deviation' of one number of several runs."""
    values = [row[key] for row in rows]
    digits = COLUMNS[key]
    return f'{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}'


def print_row(path, steps, find_poses):
    model, header = load_model(path)
    model.eval()
    codec, cpu = find_codec(), torch.device('cpu')
    rows = []
    for seed in range(SEEDS):
        cfg = Config(ckpt=path, steps=steps, seed=seed)
        rows.append(summary(score(model, cfg, header, codec, cpu, find_poses=False)))
    rotation = translation = ''
    if find_poses:
        s = score(model, Config(ckpt=path, steps=steps), header, codec, cpu)
        rotation = f'{mean_over_frames(s["rot_err_deg"]):.1f}'
        translation = f'{mean_over_frames(s["trans_err_m"]):.2f}'
    cells = [mean_and_spread(rows, key) for key in COLUMNS]
    cells = [path, str(steps)] + cells[:4] + [rotation, translation] + cells[4:]
    print('| ' + ' | '.join(cells) + ' |', flush=True)


if __name__ == '__main__':
    print('| checkpoint | steps | psnr@1 | psnr@7 | seen@7 | gap@7 | rot deg | trans m | '
          'sharpness | motion | fd | drift dB |')
    print('|' + '---|' * 12)
    for argument in sys.argv[1:]:
        path, steps = argument.split(':')
        for n in steps.split(','):
            print_row(path, int(n.strip('p')), n.endswith('p'))
