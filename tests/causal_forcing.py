"""
Causal Forcing's claim on lowpoly: the same student regressed on ODE pairs of the causal and of the bidirectional teacher,
equal data and steps, three seeds of pairs, noise and training order. About 12 minutes.

    python tests/causal_forcing.py out data/lowpoly-500         # folder with ar and camera.safetensors; folder of clips
"""
import json
import sys

import numpy as np
import torch

from conftest import run
from model import load_model
from data import find_codec
from stream import Config, score

if __name__ == '__main__':
    start, data = sys.argv[1:]
    print('| teacher | regression loss, last 100 steps | steps | psnr@1 | psnr@7 | gap@7 | sharpness | fd |\n' + '|---' * 8 + '|')
    for teacher, stage in (('causal', 'ode'), ('bidirectional', 'ode-bidirectional')):
        losses, rows = [], {4: [], 1: []}
        for seed in range(3):
            out = f'{start}/causal-forcing-{seed}'
            run('distill_ode.py', '--teacher', teacher, '--init', f'{start}/ar.safetensors', '--bidirectional', f'{start}/camera.safetensors',
                '--data', data, '--pairs', 128, '--steps', 200, '--seed', seed, '--out', out)
            losses.append(np.mean([line['loss'] for line in map(json.loads, open(f'{out}/{stage}.jsonl')) if 'loss' in line][-2:]))
            model, header = load_model(f'{out}/{stage}.safetensors')
            for steps, cells in rows.items():
                s = score(model.eval(), Config(steps=steps), header, find_codec(), torch.device('cpu'), find_poses=False)
                cells.append([s['psnr'][1], s['psnr'][7], s['psnr'][7] - s['psnr_wrong_path'][7], np.mean(s['sharpness'][1:]), s['fd']])
        for steps, cells in rows.items():
            print(f'| {teacher} | {np.mean(losses):.4f} ± {np.std(losses):.4f} | {steps} | ' + ' | '.join(
                f'{m:.{d}f} ± {e:.{d}f}' for m, e, d in zip(np.mean(cells, 0), np.std(cells, 0), (2, 2, 2, 2, 3))) + ' |', flush=True)
