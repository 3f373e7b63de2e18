"""
The model as its own discriminator: Direct Discriminative Optimization (DDO, arXiv 2503.01103, ICML 2025).

Claim. A diffusion model that maximises likelihood covers all of the data, and blurs. A GAN does not, but
needs a second network. DDO needs none: the best discriminator is sigmoid(log p_data / p_fake), so the model
and a frozen copy of it, the reference, which also makes the fakes, are one:

    r    = log p_theta(x) - log p_ref(x)
    loss = - E_data log sigmoid(beta r) - alpha E_ref log sigmoid(-beta r)

As it learns to tell clips from its own frames, it becomes better, without guidance. For a diffusion model r
is estimated from one noise and one time, which all four calls share:

    Delta = |x0_ref(x_t) - x0|^2 - |x0_theta(x_t) - x0|^2

    python -m papers.ddo          # after bash run.sh; 20 minutes on one core; leaves out/ddo/

Here x is a frame, given its history and its camera: fakes follow the true history, all frames of a clip at
once, as in stage 2's pairs. The causal model of run.sh is refined for one round; the control is plain
training of equal cost. Then stage 2 distils the refined model, without guidance.

What shows at this size (three seeds, one in stage 2; LOG.md, 2026-12-01): after 80 steps walks are as sharp
as guided ones at as many calls (.83; before .65, plain training .68), and follow the camera as before. But
the Fréchet distance does not fall (.026; before .024, guided .022), and there is no best step within the
round: its last is the best. Sharing the noise cuts the variance of Delta a thousandfold. A student of the
refined model is as sharp without guidance as today's with it (.79 and .76; of the reference, unguided, .61),
but moves less.

What is ours: the condition; Delta as a mean over numbers, not a sum, and of x0, not of the noise; fakes of 8
Euler steps, as the model is used, which are more blurred than its density; the checkpoint of a round is
chosen as in stage 3, by the Fréchet distance and a penalty for blur and stillness. The paper plays 12 to 28
rounds. Its own text could not be seen, only summaries, notes and a transcription of its appendix.
"""
import copy
import json
import os
import sys
from dataclasses import replace

import torch
from torch.nn.functional import logsigmoid

import distill_ode
import train_ar
from camera import BadInput
from common import load_model, make_optimizers, save_model, take_step, update_ema, write_json
from data import Clips, find_codec, get_batch, noise_for
from distill_dmd import picture_metrics
from experiments.score import Config as ScoreConfig
from experiments.score import score
from experiments.table import COLUMNS, mean_and_spread, summary
from model import add_noise, rollout_clip, schedule, shift_time, teacher_forced, v_to_x0

REFERENCE = 'out/ar.safetensors'
DATA = 'data/lowpoly-500'
OUT = 'out/ddo'
SEEDS = range(3)
ALPHA = 1.                            # weight of the fakes
BETA = 300.                           # 1 / the standard deviation of Delta after 30 steps
LR = 6e-5
WINDOWS = 512                         # of a round, each real and fake
FRAMES = 9                            # of a window
BATCH = 8                             # windows a step
STEPS = 80                            # of a round
EVERY = 10                            # steps between evaluations
PLAIN_EVERY = 35                      # steps of plain training at the same cost, fakes included
EULER = 8                             # steps of the sampler
GUIDANCE = 1.3                        # of the camera, as in stage 2 of run.sh
TITLES = {                            # of the picture
    'fd': 'Fréchet distance to renders: no better',
    'sharpness': 'sharpness (the codec: 1): better',
}

# -----------------------------------------------------------------------------
# the idea

def ddo_loss(real, fake, alpha, beta):
    """The loss of a discriminator whose logit is beta times Delta, of real and of fake samples."""
    loss = -logsigmoid(beta * real).mean() - alpha * logsigmoid(-beta * fake).mean()
    return loss / max(alpha, 1)


def error(net, batch, x0, eps, t):
    """Squared error (B, F) of what `net` makes of frames x0 (B, F, C, H, W), noised to times t (B, F). Each
    follows the same history: batch.x0, which is noised to the times `level`."""
    level = batch.more[-1]
    x_t = add_noise(x0, eps, t)
    v = teacher_forced(net, net.cfg, batch, x_t, t, level)
    return (v_to_x0(x_t, v, t) - x0).square().mean((2, 3, 4))


def log_ratio(net, reference, batch, x0, eps, t):
    """Delta (B, F - 1): how much better than the reference `net` predicts frames x0, from the same noise,
    times and history. Frame 0 is given in a walk, so it is left out."""
    with torch.no_grad():
        before = error(reference, batch, x0, eps, t)
    return (before - error(net, batch, x0, eps, t))[:, 1:]


def draw(batch, shift):
    """Noise (B, F, C, H, W), and a time for each frame (B, F)."""
    eps = torch.randn(batch.x0.shape)
    u = torch.rand(batch.x0.shape[:2])
    return eps, shift_time(u, shift)


def both_ratios(net, reference, batch):
    """Delta of the real frames and of the fakes, with one draw for both."""
    real, fake, _ = batch.more
    eps, t = draw(batch, net.cfg.shift)
    return [log_ratio(net, reference, batch, x0, eps, t) for x0 in (real, fake)]


@torch.no_grad()
def make_windows(model, clips, seed):
    """The batches of a round. x0 is the history, noised as in stage 1; `more` holds the frames of the clip,
    the fakes, which the model generates each from that history, and the history's times."""
    batches = []
    times = schedule(EULER, model.cfg.shift)
    for start in range(0, WINDOWS, BATCH):
        batch = get_batch(clips, start, BATCH, FRAMES, model.cfg, seed)
        past, level = distill_ode.noised_history(distill_ode.Config, batch, model.cfg)
        fake = distill_ode.ode_states(model, past, level, times, at=times[:0])[:, -1]
        batches.append(replace(past, more=(batch.x0, fake, level)))
    return batches

# -----------------------------------------------------------------------------
# a round, and plain training of equal cost

@torch.inference_mode()
def evaluate(model, clips):
    """Fréchet distance, sharpness and motion of walks along held-out paths."""
    n = len(clips)
    batch = get_batch(clips, 0, n, FRAMES, model.cfg)
    noise = noise_for(range(n), batch.x0.shape[2:], 'cpu')
    times = schedule(EULER, model.cfg.shift)
    z = rollout_clip(model, batch.camera.c2w, batch.camera.K, batch.text, times, noise, batch.x0[:, :1],
                     window=FRAMES, context=train_ar.Config.context)
    decode = clips.codec().decode
    return picture_metrics(decode(z), clips.truth(n, FRAMES), decode(batch.x0))


def train(loss_fn, every, held_out, path):
    """Train the reference on, with `every` steps between evaluations, and return these. Saves the average of
    its weights that stage 3 would choose."""
    net, header = load_model(REFERENCE)
    average = copy.deepcopy(net)
    ema = average.state_dict()
    optimizers = make_optimizers(net, LR, True, (.9, .99), torch.float32)
    curve = []
    for step in range(STEPS // EVERY * every + 1):
        if step % every == 0:
            curve.append(evaluate(average, held_out))
            if curve[-1]['score'] == min(point['score'] for point in curve):
                save_model(path, ema, net.cfg, **header)
        loss_fn(net, step).backward()
        take_step(optimizers, LR)
        update_ema(ema, net, .95, step)
    return curve


def play_round(seed):
    """The curves of DDO and of plain training, and what sharing noise does for Delta."""
    reference, _ = load_model(REFERENCE)
    clips = Clips(DATA)
    held_out = Clips(DATA, 'val').part(64, 128)           # the table shows the first 64
    windows = make_windows(reference, clips, 1000 + seed)
    torch.manual_seed(seed)

    def ddo(net, step):
        real, fake = both_ratios(net, reference, windows[step % len(windows)])
        return ddo_loss(real, fake, ALPHA, BETA)

    def plain(net, step):
        batch = get_batch(clips, step * BATCH, BATCH, FRAMES, net.cfg, 2000 + seed)
        return train_ar.loss_fn(net, train_ar.Config, batch)[0]

    best = f'{OUT}/DDO-{seed}.safetensors'
    curve = train(ddo, EVERY, held_out, best)
    control = train(plain, PLAIN_EVERY, held_out, f'{OUT}/plain-{seed}.safetensors')
    refined, _ = load_model(best)
    variance = variance_ratio(refined, reference, windows[:16])
    return {'DDO': curve, 'plain': control, 'variance': variance}


@torch.no_grad()
def variance_ratio(net, reference, windows):
    """By how much the variance of Delta grows if the two networks see noise and times of their own."""
    shared, own = [], []
    for batch in windows:
        x0 = batch.more[0]
        one, other = (draw(batch, net.cfg.shift) for _ in range(2))
        shared.append(log_ratio(net, reference, batch, x0, *one))
        own.append(error(reference, batch, x0, *one) - error(net, batch, x0, *other))
    return (torch.cat(own)[:, 1:].var() / torch.cat(shared).var()).item()

# -----------------------------------------------------------------------------
# the table, the picture

def measure(path, steps, guidance, seed):
    """The columns of the table, in walks along the first 64 held-out paths."""
    model, header = load_model(path)
    cfg = ScoreConfig(ckpt=path, steps=steps, guidance=guidance, seed=seed)
    return summary(score(model, cfg, header, find_codec(), 'cpu', find_poses=False))


def kept(name, make, *args):
    """make(*args), from a file if it is there."""
    path = f'{OUT}/{name}.json'
    if not os.path.exists(path):
        write_json(path, make(*args))
    with open(path) as f:
        return json.load(f)


def print_row(name, path, steps=EULER, guidance=1.):
    """Walks with three seeds of noise. The model, too, is of that seed where the path says so."""
    runs = [kept(f'{name}, {steps} steps, {seed}', measure, path.format(seed), steps, guidance, seed)
            for seed in SEEDS]
    cells = [mean_and_spread(runs, key) for key in COLUMNS]
    print(f'| {name} | {steps} | ' + ' | '.join(cells) + ' |', flush=True)


def draw_curves(rounds):
    """Both scores against the cost, a line for each seed."""
    try:
        from matplotlib import pyplot
    except ImportError:
        print('no picture: pip install matplotlib')
        return
    steps = range(0, STEPS + 1, EVERY)
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout='constrained')
    for axis, (key, title) in zip(axes, TITLES.items()):
        for name, style in ('plain', 'k:'), ('DDO', 'r'):
            curves = torch.tensor([[point[key] for point in one[name]] for one in rounds])
            axis.plot(steps, curves.T, style)
            axis.plot([], style, label=name)
        axis.set(xlabel='steps of DDO, or plain training of equal cost', title=title, ylim=(0, None))
    axes[1].legend()
    figure.savefig('assets/papers/ddo.png')


def main():
    rounds = [kept(f'round-{seed}', play_round, seed) for seed in SEEDS]
    draw_curves(rounds)
    for one in rounds:
        curve = [round(point['fd'], 3) for point in one['DDO']]
        print(f'fd every {EVERY} steps: {curve}, separate noise: variance x {one["variance"]:.0f}')

    print('\n| model | steps | ' + ' | '.join(COLUMNS) + ' |\n' + '|---' * (2 + len(COLUMNS)) + '|')
    print_row('reference', REFERENCE)
    print_row('reference, guided', REFERENCE, EULER // 2, GUIDANCE)
    for name in 'plain', 'DDO':
        print_row(name, f'{OUT}/{name}-{{}}.safetensors')
    print_row('guided student', 'out/ode.safetensors', 4)
    teachers = {'student': REFERENCE, 'student of DDO': f'{OUT}/DDO-0.safetensors'}
    for name, teacher in teachers.items():
        out = f'{OUT}/{name}'
        if not os.path.exists(f'{out}/ode.safetensors'):
            distill_ode.main(distill_ode.Config(init=teacher, teacher_steps=EULER, data=DATA, out=out))
        print_row(name, f'{out}/ode.safetensors', 4)


if __name__ == '__main__':
    try:
        main()
    except BadInput as problem:
        sys.exit(f'error: {problem}')
