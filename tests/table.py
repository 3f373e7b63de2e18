"""
One table of many checkpoints and numbers of steps: mean over three noise seeds, with the spread. Where the steps end in p,
poses are found too (slow), for the first seed, averaged over the frames.

    python tests/table.py out/ar.safetensors:48p,4p,2,1 out/ode.safetensors:4p,2,1p out/dmd.safetensors:4p,2,1p
"""
import sys

import numpy as np
import torch

from conftest import ROOT  # noqa: F401  (finds the scripts)
from model import load_model
from data import find_codec
from stream import Config, score

SEEDS = 3


if __name__ == '__main__':
    print('| checkpoint | steps | psnr@1 | psnr@7 | seen@7 | gap@7 | rot deg | trans m | sharpness | motion | fd | drift dB |')
    print('|' + '---|' * 12)
    for argument in sys.argv[1:]:
        path, steps = argument.split(':')
        model, header = load_model(path)
        for n in steps.split(','):
            n, find, rows = int(n.strip('p')), n.endswith('p'), []
            for seed in range(SEEDS):
                s = score(model.eval(), Config(ckpt=path, steps=n, seed=seed), header, find_codec(), torch.device('cpu'), find_poses=False)
                rows.append([s['psnr'][1], s['psnr'][7], s['psnr_seen'][7], s['psnr'][7] - s['psnr_wrong_path'][7],
                             np.mean(s['sharpness'][1:]), np.mean(s['motion'][1:]), s['fd'], s['drift_db_per_frame']])
            s = score(model, Config(ckpt=path, steps=n), header, find_codec(), torch.device('cpu')) if find else {}
            mean, spread = np.mean(rows, 0), np.std(rows, 0)
            cells = [f'{m:.{d}f} ± {e:.{d}f}' for m, e, d in zip(mean, spread, (2, 2, 2, 2, 2, 2, 3, 2))]
            poses = [f'{np.nanmean(np.array(s[k][1:], dtype=float)):.{d}f}' if find else '' for k, d in (('rot_err_deg', 1), ('trans_err_m', 2))]
            print('|', ' | '.join([path, str(n), *cells[:4], *poses, *cells[4:]]), '|', flush=True)
