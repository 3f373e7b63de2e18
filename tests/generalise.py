"""
How many plans must a model see to walk through new ones? Stage 1 from scratch, equal steps, on 1 to 4096 plans, scored on the
same 32 clips of plans that none of them saw; a table, and a plot where matplotlib is installed.

    python tests/generalise.py

Leaves out/plans/. Stopped? Start it again: it goes on. `python tests/generalise.py 512 4096` does only these, for a second process.
"""
import json
import os
import sys

import numpy as np
import torch

from conftest import ROOT
import data
import train_ar
from model import load_model
from stream import Config, score

OUT, PLANS, KEYS = f'{ROOT}/out/plans', (1, 8, 64, 512, 4096), ('met', 'psnr_seen@7', 'gap@7', 'rot deg', 'trans m', 'fd')


def one(plans):
    """Trains and scores, if that has not been done: the numbers of KEYS."""
    clips, out = f'{OUT}/clips-{plans}', f'{OUT}/{plans}'
    if os.path.exists(f'{out}/score.json'):
        with open(f'{out}/score.json') as f:
            return json.load(f)
    if not os.path.exists(f'{clips}/manifest.json'):
        data.make(data.Config(world='lowpoly', plans=plans, clips=max(1600, plans * 3 // 2), out=clips))
    if not os.path.exists(f'{out}/ar.safetensors'):
        train_ar.main(train_ar.Config(init='none', data=clips, out=out, steps=1200), 'ar')
    model, header = load_model(f'{out}/ar.safetensors')
    header['data']['recipe']['plans'] = 500                                   # whose held-out plans are new to all of them
    s = score(model.eval(), Config(steps=8, paths=32), header, data.find_codec(), torch.device('cpu'))
    mean = lambda k: float(np.nanmean(np.array(s[k][1:], dtype=float)))
    read = data.Clips(clips)                                                  # a clip's plan is drawn: some are never met
    met = len({int(read.read(i, ['plan'])[0]) for i in range(len(read))})
    row = met, s['psnr_seen'][7], s['psnr'][7] - s['psnr_wrong_path'][7], mean('rot_err_deg'), mean('trans_err_m'), s['fd']
    with open(f'{out}/score.json', 'w') as f:
        json.dump(row, f)
    return row


if __name__ == '__main__':
    rows = {n: one(n) for n in map(int, sys.argv[1:] or PLANS)}
    print('\n| training plans | ' + ' | '.join(KEYS) + ' |\n' + '|---' * (len(KEYS) + 1) + '|')
    for n, x in rows.items():
        print(f'| {n} | ' + ' | '.join(f'{v:.{d}f}' for v, d in zip(x, (0, 2, 2, 1, 2, 3))) + ' |')
    try:
        from matplotlib import pyplot
    except ImportError:
        raise SystemExit from None
    if len(rows) < len(PLANS):
        raise SystemExit
    _, axes = pyplot.subplots(1, 3, figsize=(9, 2.7))
    for axis, i in zip(axes, (1, 2, 5)):
        axis.semilogx([rows[n][0] for n in PLANS], [rows[n][i] for n in PLANS], marker='o', base=8)
        axis.set_xlabel('training plans met')
        axis.set_title(KEYS[i])
    pyplot.tight_layout()
    pyplot.savefig(f'{OUT}/plans.png', dpi=130)
