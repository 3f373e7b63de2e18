"""
How many plans must a model see before it can walk through new ones? Stage 1 from scratch, equal steps, on 1
to 4,096 plans, scored on the same 32 held-out paths through plans that none of the models saw.

    python -m experiments.generalise
    python -m experiments.generalise 512 4096         # only these, for a second process

Prints a table, a row for each number of plans, and draws out/plans/plans.png where matplotlib is installed.
About half an hour a row on 2 cores. If it is stopped, run it again: what is in out/plans/ is kept.
"""
import json
import os
import sys

import torch

import data
import train_ar
from common import load_model, write_json
from experiments.score import Config, score
from experiments.table import mean_over_frames

OUT = 'out/plans'
PLANS = 1, 8, 64, 512, 4096
HELD_OUT = 500                        # the held-out plans of a recipe with so many are new to all models
COLUMNS = {                           # of the table: digits
    'met': 0, 'psnr_seen@7': 2, 'gap@7': 2, 'rot deg': 1, 'trans m': 2, 'fd': 3,
}
DRAWN = 'psnr_seen@7', 'gap@7', 'fd'


def train(plans):
    """Make clips of so many plans and train on them, if that has not been done: (clips, checkpoint)."""
    clips = f'{OUT}/clips-{plans}'
    out = f'{OUT}/{plans}'
    if not os.path.exists(f'{clips}/manifest.json'):
        data.make(data.Config(world='lowpoly', plans=plans, clips=max(1600, plans * 3 // 2), out=clips))
    if not os.path.exists(f'{out}/ar.safetensors'):
        train_ar.main(train_ar.Config(init='none', data=clips, out=out, steps=1200))
    return clips, f'{out}/ar.safetensors'


def plans_met(folder):
    """How many plans the clips show: each clip's plan is drawn, so some are never met."""
    clips = data.Clips(folder)
    return len({int(clips.read(i, ['plan'])[0]) for i in range(len(clips))})


def measure(plans):
    """Train and score: a row of the table."""
    path = f'{OUT}/{plans}/score.json'
    if os.path.exists(path):
        with open(path) as f:
            return json.load(f)
    clips, ckpt = train(plans)
    model, header = load_model(ckpt)
    header['data']['recipe']['plans'] = HELD_OUT
    cfg = Config(steps=8, paths=32)
    s = score(model.eval(), cfg, header, data.find_codec(), torch.device('cpu'))
    row = {
        'met': plans_met(clips),
        'psnr_seen@7': s['psnr_seen'][7],
        'gap@7': s['psnr'][7] - s['psnr_wrong_path'][7],
        'rot deg': mean_over_frames(s['rot_err_deg']),
        'trans m': mean_over_frames(s['trans_err_m']),
        'fd': s['fd'],
    }
    write_json(path, row)
    return row


def draw(rows):
    """The columns DRAWN against the plans that were met."""
    from matplotlib import pyplot
    _, axes = pyplot.subplots(1, len(DRAWN), figsize=(9, 2.7))
    met = [row['met'] for row in rows]
    for axis, key in zip(axes, DRAWN):
        axis.semilogx(met, [row[key] for row in rows], marker='o', base=8)
        axis.set_xlabel('training plans met')
        axis.set_title(key)
    pyplot.tight_layout()
    pyplot.savefig(f'{OUT}/plans.png', dpi=130)


if __name__ == '__main__':
    wanted = [int(n) for n in sys.argv[1:] or PLANS]
    rows = [measure(plans) for plans in wanted]
    print('\n| training plans | ' + ' | '.join(COLUMNS) + ' |\n' + '|---' * (len(COLUMNS) + 1) + '|')
    for plans, row in zip(wanted, rows):
        cells = [f'{row[key]:.{digits}f}' for key, digits in COLUMNS.items()]
        print(f'| {plans} | ' + ' | '.join(cells) + ' |')
    if wanted == list(PLANS):
        try:
            draw(rows)
        except ImportError:
            print('no picture: pip install matplotlib')
