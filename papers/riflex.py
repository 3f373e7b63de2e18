"""
One frequency makes long videos loop: RIFLEx (arXiv 2502.15894, ICML 2025).

Claim. A bidirectional video model that is sampled for more frames than it was trained on repeats itself. A
frame's position enters attention as rotations: the k-th of a head's d / 2 pairs of channels for the frame
turns by theta_k radians a frame, so to this pair a frame one period away looks like the frame itself:

    theta_k = 10000^(-2 (k - 1) / d)       period N_k = 2 pi / theta_k: here 6.3, 13.5, 29.2, 63, ... frames

The video comes back after the period of one k: in the paper's models the first one beyond the trained frames,
which here would be 13.5. Lower this frequency alone for the L frames that are to be sampled (algorithm 1; the
.9 is from the authors' code), and the loop is gone while the motion stays:

    theta_k <- .9 * 2 pi / L

Lowering all frequencies (position interpolation) slows the motion down.

    python -m papers.riflex                # ten minutes on one core

It makes data/lowpoly-500 if it is missing, trains three base models as run.sh does, prints two tables and
draws assets/papers/riflex.png. Models and videos stay in out/riflex/.

What shows here (tables in LOG.md, 2026-12-01). The loop is reproduced: trained on 9 frames and sampled for 18
or 27, 92 and 96 % of the videos come back, most after 13 to 15 frames. Lowering the 1st frequency changes
nothing; lowering the 2nd for 18 frames leaves 8 % that come back. Over 4 frames that costs 8 % of the motion,
interpolation 21 %. For 27 frames the rule moves the return to frame 26: a rotation brings frames nearer again
after half a period, which is now 30. Only twice as low is the loop gone, and as slow as by interpolation.

In a rolling window as long as the training clips no distance is new, and the rule lowers nothing. Lowered
all the same, the 2nd frequency costs 1.5 dB in frames 1 to 8. A sink changes nothing here, as
model.KVCache.move_sink turns its keys along. With minWM's eviction the sink stays where it was, and its
distance grows. There, and in a longer window, a lowered frequency helps the later frames, but only to what a
window of the trained length has anyway.

What is ours: a return is found from how much the frames of a video differ, by their distance in time; the
paper looks at the videos. The base models are small and little trained. Their pictures are blurred, and most
of the difference of neighbours is flicker, so motion is also measured over 4 frames.
"""
import functools
import math
import os
import statistics
from dataclasses import dataclass
from unittest import mock

import torch

import data
import finetune_camera
import model as network
from camera import BadInput
from common import command_line, load_model, load_tensors, save_tensors
from data import Clips, find_codec, get_batch, noise_for
from experiments.score import Config as ScoreConfig
from experiments.score import score
from model import rotary_table, sample_clip, schedule


@dataclass
class Config:
    seeds: int = 3                    # base models


STEPS = 300                           # of training
TRAINED = 9                           # frames of a training clip
LENGTHS = 18, 27                      # frames that are sampled
CLIPS = 8                             # for each seed
FOLDER = 'data/lowpoly-500'           # as run.sh makes it
OUT = 'out/riflex'
ARMS = 'as trained', '1st lowered', '2nd lowered', '2nd, twice as far', 'all slowed'

# -----------------------------------------------------------------------------
# the idea

def frequencies(n, base=10000):
    """theta (n,), float64, in radians a frame: how fast each of the n pairs of the frame axis turns."""
    return base ** (-torch.arange(n, dtype=torch.float64) / n)


def lower(theta, k, frames, margin=.9):
    """RIFLEx: theta_k (the first is 1) low enough for `frames` frames. It is never raised."""
    lowered = theta.clone()
    lowered[k - 1] = min(theta[k - 1], margin * 2 * math.pi / frames)
    return lowered


def turned(theta, pos, h, w, Dh, device):
    """model.rotary_table with other frequencies of the frame axis, theta (n,): its first n columns."""
    table = rotary_table(pos, h, w, Dh, device)                       # (F h w, 1, Dh / 2)
    angle = torch.tensor(pos, dtype=torch.float64)[:, None] * theta   # (F, n)
    turns = torch.polar(torch.ones_like(angle), angle).to(table)
    turns = turns.repeat_interleave(h * w, 0)[:, None]                # (F h w, 1, n)
    return torch.cat([turns, table[..., len(theta):]], -1)


def use(theta):
    """with use(theta): every network turns its frames by these frequencies."""
    return mock.patch.object(network, 'rotary_table', functools.partial(turned, theta))

# -----------------------------------------------------------------------------
# videos that are longer than trained

def frame_frequencies(cfg):
    """theta of a network: 12 pairs of the 32 of a head, see model.rotary_table."""
    Dh = cfg.dim // cfg.num_heads
    return frequencies(Dh // 2 - 2 * (Dh // 6))


def arms(theta, frames):
    """{name: frequencies} that are compared. The last is position interpolation: all in the trained range."""
    changed = (
        theta,
        lower(theta, 1, frames),
        lower(theta, 2, frames),
        lower(theta, 2, 2 * frames),
        theta * TRAINED / frames,
    )
    return dict(zip(ARMS, changed))


def base_model(seed):
    """Text to video, without a camera: a camera would say where each frame is."""
    out = f'{OUT}/{seed}'
    if not os.path.exists(f'{out}/base.safetensors'):
        settings = dict(camera='none', steps=STEPS, frames=TRAINED, seed=seed)
        finetune_camera.main(finetune_camera.Config(data=FOLDER, out=out, **settings))
    model, _ = load_model(f'{out}/base.safetensors')
    return model.eval()


def sample(seed):
    """{length and arm: latents (CLIPS, length, C, H, W)}, no frame given; kept in a file."""
    path = f'{OUT}/{seed}/videos.safetensors'
    if not os.path.exists(path):
        model = base_model(seed)
        batch = get_batch(Clips(FOLDER, 'val'), 0, CLIPS, TRAINED, model.cfg)
        theta = frame_frequencies(model.cfg)
        times = schedule(8, model.cfg.shift)
        videos = {}
        for frames in LENGTHS:
            noise = noise_for([(seed, i) for i in range(CLIPS)], batch.x0.shape[2:], 'cpu')(frames)
            for name, changed in arms(theta, frames).items():
                with use(changed):
                    videos[f'{frames} {name}'] = sample_clip(model, noise, batch.text, None, times).half()
        save_tensors(path, videos, {})
    return load_tensors(path)[0]


def differences(pictures):
    """Root mean square difference of all pairs of frames of videos (n, F, H, W, 3): (n, F, F)."""
    x = pictures.flatten(2)
    return torch.cdist(x, x, compute_mode='donot_use_mm_for_euclid_dist') / x.shape[-1] ** .5


def by_lag(pairs):
    """How much frames differ that are 0, 1, ... F - 1 apart: (n, F), means over a video's pairs (n, F, F)."""
    return torch.stack([pairs.diagonal(lag, 1, 2).mean(1) for lag in range(pairs.shape[1])], 1)


def first_return(curve, after=TRAINED, reach=3, depth=.2):
    """The first lag, from `after` on, at which frames are more alike than at the `reach` lags at either side,
    and by the share `depth` more alike than at the worst lag before. None: the video does not come back.
    curve: a row of by_lag, as a list."""
    for lag in range(after, len(curve)):
        nearby = min(curve[lag - reach:lag + reach + 1])
        if curve[lag] == nearby <= (1 - depth) * max(curve[:lag]):
            return lag
    return None


def measure(latents):
    """Numbers of some videos (n, F, C, H, W)."""
    pairs = differences(find_codec().decode(latents))                 # (n, F, F)
    curves = by_lag(pairs)                                            # (n, F)
    returns = [first_return(curve) for curve in curves.tolist()]
    returns = [lag for lag in returns if lag is not None]
    return {
        'pairs': pairs.mean(0),
        'curve': curves.mean(0),
        'returns': returns,
        'share': 100 * len(returns) / len(curves),
        'motion': curves[:, 1].mean().item(),
        'motion over 4': curves[:, 4].mean().item(),
    }

# -----------------------------------------------------------------------------
# a causal walk in a rolling window: nothing to cure?

def print_walks():
    """What the lowered frequency does to checkpoints/ar.safetensors, in windows of several kinds."""
    model, header = load_model('checkpoints/ar.safetensors')
    theta = frame_frequencies(model.eval().cfg)
    print('\n| window | eviction | frequencies | psnr, frames 1 to 8 | 9 to 26 |\n' + '|---' * 5 + '|')
    for window, eviction in ((TRAINED, 'chunks'), (TRAINED, 'frames'), (LENGTHS[-1], 'chunks')):
        model.cfg.eviction = eviction
        cfg = ScoreConfig(frames=LENGTHS[-1], paths=8, steps=4, window=window)
        for name, changed in list(arms(theta, LENGTHS[-1]).items())[:3:2]:
            with use(changed):
                scores = score(model, cfg, header, find_codec(), torch.device('cpu'), find_poses=False)
            early = statistics.mean(scores['psnr'][1:TRAINED])
            late = statistics.mean(scores['psnr'][TRAINED:])
            print(f'| {window} | {eviction} | {name} | {early:.2f} | {late:.2f} |', flush=True)

# -----------------------------------------------------------------------------
# table and picture

def print_table(results):
    """results: {length and arm: [measure of each seed]}"""
    columns = ['frames', 'frequencies', 'comes back, %', 'after', 'motion', 'motion over 4']
    print('\n| ' + ' | '.join(columns) + ' |\n' + '|---' * len(columns) + '|')
    for name, rows in results.items():
        returns = sum((row['returns'] for row in rows), [])
        after = '-'
        if len(returns) > 1:
            tenths = statistics.quantiles(returns, n=10, method='inclusive')
            after = f'{tenths[4]:.0f} ({tenths[0]:.0f} to {tenths[8]:.0f})'
        cells = [*name.split(' ', 1), spread(rows, 'share', 0), after]
        cells += [spread(rows, key, 3) for key in ('motion', 'motion over 4')]
        print('| ' + ' | '.join(cells) + ' |')


def spread(rows, key, digits):
    """'mean ± standard deviation' over the seeds."""
    values = [row[key] for row in rows]
    return f'{statistics.mean(values):.{digits}f} ± {statistics.pstdev(values):.{digits}f}'


def draw(results, path):
    """Left: how much all pairs of frames differ, before and after. Right: the same by their distance."""
    try:
        from matplotlib import pyplot
    except ImportError:
        return print('no picture: pip install matplotlib')
    frames = LENGTHS[-1]
    size = dict(figsize=(10, 3.2), width_ratios=[1, 1, 1.5], layout='constrained')
    figure, (*maps, lines) = pyplot.subplots(1, 3, **size)

    def mean(arm, key):
        return torch.stack([row[key] for row in results[f'{frames} {arm}']]).mean(0)

    for panel, arm in zip(maps, ARMS[::2]):
        panel.imshow(mean(arm, 'pairs'), cmap='magma', vmin=.03, vmax=.07)
        panel.set(title=f'{arm} (dark: alike)', xlabel='frame', ylabel='frame')
    for arm, style in zip(ARMS, ('-', '--', '-', '-')):
        lines.plot(mean(arm, 'curve'), style, label=arm)
    lines.axvline(2 * math.pi / frequencies(12)[1], color='grey', linestyle=':', label='period of the 2nd')
    lines.set(ylim=(.02, .07), xlabel='frames apart', ylabel='RMS difference (white: 1)')
    lines.set_title('frames one period apart are alike')
    lines.legend(ncols=2)
    figure.savefig(path, dpi=100)
    print(f'wrote {path}')


def main(cfg):
    if cfg.seeds < 1:
        raise BadInput(f'--seeds {cfg.seeds}: at least 1')
    data.make(data.Config(plans=500, out=FOLDER))
    clips = [clip for clip, in map(Clips(FOLDER, 'val', ['latents']).read, range(64))]
    results = {'17 the clips themselves': [measure(torch.stack(clips).float())]}
    for name in (f'{frames} {arm}' for frames in LENGTHS for arm in ARMS):
        results[name] = [measure(sample(seed)[name].float()) for seed in range(cfg.seeds)]
    print_table(results)
    print_walks()
    draw(results, 'assets/papers/riflex.png')


if __name__ == '__main__':
    command_line(main, Config, __doc__)
