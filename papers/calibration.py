"""
Does a world model know what it does not know? Calibration, after "Unveiling Uncertainty: A Deep Dive into
Calibration and Performance of Multimodal Large Language Models" (arXiv 2412.14660, COLING 2025).

Claim. Large models are over-confident, one temperature fitted on other data repairs much of it, and they
answer where they should say "I don't know". Calibration there compares a confidence with how often the answer
is right: ECE = sum_m |B_m| / n |acc(B_m) - conf(B_m)| over bins B_m of the confidence. A world model gives no
confidence, but it can dream many times from one frame along one path. Here K = 19 walks say how wide the
future is, and the truth should be inside as often as they say. With x_(1) <= .. <= x_(K) for their colours of
a block of 8 x 8 pixels, and y for the true one (through the codec, as the network can draw no more),

    coverage error = mean over j of | share of y in [x_(j), x_(K + 1 - j)] - (K + 1 - 2 j) / (K + 1) |
    tempered       = mean + T (x - mean), one T for each frame number, fitted on every second world
    "I don't know" = AUROC of the spread: blocks that frame 0 did not show, against those it showed

    python -m papers.calibration          # 11 minutes on one core, 280 MB in out/calibration

If y is a draw like the x, the expected shares are exact for any K; so one more walk, in the place of the
truth, must have an error of about 0.

What shows (LOG.md): `ar` is over-confident, and the students far more: what should hold the truth in 90 % of
cases holds it in 76, 43 (`ode`) and 47 % (`dmd`). So not DMD takes the spread away but stage 2; the shipped
`ode` learned from a teacher of one step, which may be the reason. One temperature a frame removes nine tenths
of the error on other worlds. Spread tells what frame 0 did not show with an AUROC of .71, in the students
.63: less than the .8 we had asked for. Contrast alone, a trivial reason for spread, has .48.

What is ours: samples of colours in the place of answers, and every number here. Of the paper we know the
abstract and the code, not its tables. Its prompts have no counterpart here.
"""
import itertools
import os
import sys

import torch
from einops import rearrange, reduce
from PIL import Image

from camera import BadInput, relative
from common import load_tensors, save_tensors
from data import Lowpoly, noise_for
from experiments.score import visible_pixels
from stream import Config, generate, held_out, prepare

# -----------------------------------------------------------------------------
# calibration of samples: copy these


def coverage(samples, truth):
    """Which central intervals of its samples (K, ...), K odd, hold the truth (...)? (levels, ...) of 0 or 1.

    Interval j = 1, 2, ... reaches from the j-th smallest sample to the j-th largest. If truth and samples are
    drawn from one distribution, each rank 0 .. K of the truth is as likely, so that interval j holds it in
    exactly (K + 1 - 2 j) / (K + 1) of all cases: with 19 samples 90, 80 ... 10 %.
    """
    K = len(samples)
    below = (samples < truth).sum(0)
    fewer = torch.minimum(below, K - below)               # samples on the side that has fewer
    return torch.stack([fewer >= j for j in range(1, (K + 1) // 2)]).float()


def coverage_error(shares):
    """Mean over levels of |share held - what a calibrated sampler would hold|: (levels, ...) -> (...)."""
    levels = len(shares)
    ideal = 1 - torch.arange(1, levels + 1) / (levels + 1)            # .9, .8 ... if there are nine
    return (shares.movedim(0, -1) - ideal).abs().mean(-1)


def temper(samples, T):
    """Samples (K, ...) with their deviations from their mean multiplied by T."""
    mean = samples.mean(0)
    return mean + T * (samples - mean)


def auroc(spread, novel):
    """How often has a novel one more spread than one that is not? Both (n,), novel bool."""
    known = spread[~novel].sort().values
    smaller = torch.searchsorted(known, spread[novel])
    return smaller.float().mean() / len(known)

# -----------------------------------------------------------------------------
# many walks from one frame

RUNS = {'ar': 8, 'ode': 4, 'dmd': 4}  # checkpoints, and their steps a frame
WORLDS = range(64, 96)                # held out; no checkpoint was chosen by these
K = 19                                # walks, and one more that plays the truth
FRAMES = 9                            # as trained; frame 0 is given
SHOWN = [2, 4, 8]                     # frames of the picture
DREAM = 7                             # and which world, of those above


def block_means(x):
    """(..., H, W, C) -> (..., H / 8, W / 8, C)"""
    return reduce(x, '... (h a) (w b) c -> ... h w c', 'mean', a=8, b=8)


def walk_often(cfg, model, header, codec, index):
    """K + 1 walks through a held-out world from one frame along one path: what is kept of them."""
    world, captions = held_out(cfg, header, [index], FRAMES)
    c2w, intrinsics = world['c2w'], world['K']
    z = codec.encode(world['frames'])
    truth = codec.decode(z)[0]                            # what latents can say of it: the ideal
    lowpoly = Lowpoly(world['plan'].tolist(), world['palette'].tolist())
    seen = visible_pixels([lowpoly], c2w, intrinsics, *truth.shape[1:3])           # (1, F, H, W)

    noise = noise_for([(index, walk) for walk in range(K + 1)], z.shape[2:], 'cpu')
    video = generate(
        model, cfg, header, codec,
        relative(c2w).repeat(K + 1, 1, 1, 1),
        intrinsics.repeat(K + 1, 1),
        captions * (K + 1),
        z[:, :1].repeat(K + 1, 1, 1, 1, 1),               # frame 0
        noise,
    )
    shown = video[:K, SHOWN]
    error = shown.mean(0) - truth[SHOWN]
    variance = block_means(truth.square()) - block_means(truth).square()
    return {
        'walks': block_means(video),                      # (K + 1, F, h, w, 3)
        'truth': block_means(truth),                      # (F, h, w, 3)
        'seen': block_means(seen[0, ..., None].float()).squeeze(-1),  # (F, h, w)
        'contrast': variance.sum(-1),
        # (4, frames, H, W, 3)
        'shown': torch.stack([truth[SHOWN], shown[0], 4 * shown.std(0), 4 * error.abs()]),
    }


def walks_of(name):
    """walk_often of all worlds, stacked; kept in out/calibration."""
    path = f'out/calibration/{name}.safetensors'
    if not os.path.exists(path):
        cfg = Config(ckpt=f'checkpoints/{name}.safetensors', steps=RUNS[name], device='cpu')
        model, header, codec, _ = prepare(cfg)
        rows = [walk_often(cfg, model, header, codec, i) for i in WORLDS]
        save_tensors(path, {key: torch.stack([row[key] for row in rows]) for key in rows[0]}, {})
    return load_tensors(path)[0]

# -----------------------------------------------------------------------------
# how well is a checkpoint calibrated?

GRID = torch.logspace(-.5, 1.5, 81)   # temperatures: .3 to 32


def error_by_frame(samples, truth):
    """Coverage error (frames,) of the colours (K, worlds, frames, h, w, 3) of all blocks and worlds."""
    return coverage_error(coverage(samples, truth).mean((1, 3, 4, 5)))


def fit_temperature(samples, truth):
    """T (frames,) of the least coverage error, each frame on its own."""
    errors = torch.stack([error_by_frame(temper(samples, T), truth) for T in GRID])
    return GRID[errors.argmin(0)]


def novelty_auroc(value, seen):
    """AUROC at equal frame number, (frames,), of a value (worlds, frames, h, w): blocks of which frame 0
    showed less than a tenth against those of which it showed more than nine."""
    clear = (seen < .1) | (seen > .9)
    rows = zip(value.unbind(1), seen.unbind(1), clear.unbind(1))
    return torch.stack([auroc(value[clear], seen[clear] < .1) for value, seen, clear in rows])


def resampled(function):
    """Its values for 300 sets of worlds drawn with replacement, the same sets at each call."""
    generator = torch.Generator().manual_seed(0)
    worlds = torch.randint(len(WORLDS), (300, len(WORLDS)), generator=generator)
    return torch.stack([function(i) for i in worlds])


def measure(found):
    """The numbers of one checkpoint, by frame from 1 on; and two means over frames for resampled worlds."""
    walks = found['walks'][:, :, 1:].movedim(1, 0)        # (K + 1, worlds, frames, h, w, 3)
    samples, stand_in = walks[:K], walks[K]
    truth = found['truth'][:, 1:]
    seen = found['seen'][:, 1:]                           # (worlds, frames, h, w)
    spread = samples.std(0).mean(-1)
    held = coverage(samples, truth).mean((3, 4, 5))       # (levels, worlds, frames)
    T = fit_temperature(samples[:, ::2], truth[::2])
    tempered = temper(samples[:, 1::2], T.view(-1, 1, 1, 1))
    return {
        'coverage error': error_by_frame(samples, truth),
        'if a walk is the truth': error_by_frame(samples, stand_in),
        '90 % hold': held[0].mean(0),
        'T of half of the worlds': T,
        'error of the others': error_by_frame(samples[:, 1::2], truth[1::2]),
        'at this T': error_by_frame(tempered, truth[1::2]),
        'AUROC of spread': novelty_auroc(spread, seen),
        'of contrast': novelty_auroc(found['contrast'][:, 1:], seen),
        'errors': resampled(lambda i: coverage_error(held[:, i].mean(1)).mean()),
        'aurocs': resampled(lambda i: novelty_auroc(spread[i], seen[i]).mean()),
    }

# -----------------------------------------------------------------------------
# the table and the picture

PICTURE = 'assets/papers/calibration.png'
TITLES = ['truth', 'ar: one walk', 'spread x 4', 'error x 4', 'dmd: one walk', 'spread x 4', 'error x 4']


def print_tables(rows):
    """Of each number its mean over the frames, and those of the first and the last one."""
    columns = list(rows['ar'])[:-2]
    print('| ' + ' | '.join(['checkpoint', *columns]) + ' |\n|' + '---|' * (len(columns) + 1))
    for name, row in rows.items():
        cells = [f'{x.mean():.3f} ({x[0]:.2f} .. {x[-1]:.2f})' for x in map(row.get, columns)]
        print(f'| {name} | ' + ' | '.join(cells) + ' |')
    for before, after in itertools.combinations(rows, 2):
        for what in ('errors', 'aurocs'):
            difference = rows[after][what] - rows[before][what]
            low, high = difference.quantile(torch.tensor([.025, .975])).tolist()
            print(f'\n{after} - {before}, {what}: {low:+.3f} .. {high:+.3f} for 95 % of resampled worlds')


def draw(rows):
    """A dream, its spread and its error side by side; and the coverage error by frame."""
    try:
        from matplotlib import pyplot
    except ImportError:
        return print('no picture: pip install matplotlib')
    figure, (dream, error) = pyplot.subplots(2, figsize=(9.4, 7), height_ratios=(4, 2), layout='constrained')
    # (7, frames, H, W, 3)
    shown = torch.cat([walks_of('ar')['shown'][DREAM], walks_of('dmd')['shown'][DREAM, 1:]])
    dream.imshow(rearrange(shown.clamp(0, 1), 'column frame h w c -> (frame h) (column w) c'))
    dream.set_xticks([128 * (i + .5) for i in range(7)], TITLES)
    dream.set_yticks([128 * (i + .5) for i in range(3)], SHOWN)
    dream.set(ylabel='frame')
    for name, row in rows.items():
        frames = range(1, FRAMES)
        line, = error.plot(frames, row['coverage error'], label=name)
        error.plot(frames, row['at this T'], ':', color=line.get_color())
        error.plot(frames, row['if a walk is the truth'], 'grey', linewidth=.8)
    error.set_title('dotted: with the temperatures of other worlds; grey: one of the walks plays the truth')
    error.set(xlabel='frame', ylabel='coverage error')
    error.legend()
    figure.savefig(PICTURE)
    Image.open(PICTURE).convert('RGB').quantize(128).save(PICTURE)    # a third of the bytes
    return None


if __name__ == '__main__':
    try:
        rows = {name: measure(walks_of(name)) for name in RUNS}
    except BadInput as e:
        sys.exit(f'error: {e}')
    print_tables(rows)
    draw(rows)
