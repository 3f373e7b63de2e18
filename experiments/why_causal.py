"""
Why must the teacher of a causal student be causal itself?

Stage 2 regresses the student on the end points of its teacher's probability-flow ODE. Causal Forcing's
argument: a bidirectional teacher moves all frames together, so where frame 1 ends depends on the noise of
frame 2. A causal student of frame 1 does not see that noise. Its best answer under squared error is the mean
of all end points that share the noise it sees: an error remains that no training removes (lemma 3.2), and a
mean is blurred (proposition 3.3). After a causal teacher neither happens, because its end point is a
function of what the student sees.

1. In closed form. A video of two frames, one number each, from a mixture of two Gaussians at (-1, -1) and
(1, 1). The scores of all its noised versions are known, so the ODEs of both teachers are exact up to the
integrator's step. Prints, at four times t, the error that remains, E Var(Y | X), and how much energy the
mean keeps, E|Y^|^2 / E|Y|^2, where Y is the end point and X what the student sees. Ten seconds:

    python -m experiments.why_causal

2. On lowpoly. The same student, regressed on pairs of the causal and of the bidirectional teacher (the
models of stages 1 and 0): equal data and steps, three seeds of pairs, noise and order. Prints a row for each
teacher and number of steps. Twelve minutes; needs ar and camera.safetensors in the first folder, clips in
the second:

    python -m experiments.why_causal out data/lowpoly-500
"""
import json
import sys
from dataclasses import replace

import numpy as np
import torch

import distill_ode
from common import load_model, save_tensors, setup, write_json
from data import Clips, find_codec, get_batch, open_clips
from experiments import table
from experiments.score import Config as ScoreConfig
from experiments.score import score
from model import causal_mask, chunk_ids, schedule, v_to_x0

# -----------------------------------------------------------------------------
# 1. in closed form

MEANS = torch.tensor([[-1., -1.], [1., 1.]], dtype=torch.float64)  # (components, frames)
STD = .2


def velocity(x, t, means, log_weights=0.0):
    """Exact (x - E[x0 | x_t = x]) / t of a mixture of N(means, STD^2). x (n, d), means (k, d), log_weights
    (n, k)."""
    variance = (1 - t) ** 2 * STD ** 2 + t ** 2                    # of each component, noised
    offset = x[:, None] - (1 - t) * means                          # (n, k, d)
    logits = -offset.square().sum(-1) / (2 * variance) + log_weights
    ends = means + (1 - t) * STD ** 2 / variance * offset          # E[x0 | x_t, component]
    x0 = (logits.softmax(-1)[..., None] * ends).sum(1)             # (n, d)
    return (x - x0) / t


def flow(x, means, log_weights=0.0, start=1.0, steps=100):
    """The end point of the ODE from x at time `start`, by Heun steps, the last one Euler's."""
    times = torch.linspace(start, 0, steps + 1).tolist()
    for t, t_next in zip(times, times[1:]):
        v = velocity(x, t, means, log_weights)
        if t_next > 0:
            ahead = velocity(x + (t_next - t) * v, t_next, means, log_weights)
            v = (v + ahead) / 2
        x = x + (t_next - t) * v
    return x


def best_regression(y, *seen, bins=200):
    """The best answer to y (n,) given the variables seen (n,): its error E Var(y | seen) and its energy E
    y^^2 / E y^2. The mean of y in each of many small cells, between quantiles of each variable, stands for
    it."""
    n = len(y)
    per_variable = int(bins ** (1 / len(seen)))
    cells = per_variable ** len(seen)
    cell = torch.zeros(n, dtype=torch.long)
    for variable in seen:
        rank = variable.argsort().argsort()                        # 0 .. n - 1
        cell = cell * per_variable + rank * per_variable // n
    count = torch.zeros(cells, dtype=y.dtype).index_add(0, cell, torch.ones_like(y))
    total = torch.zeros(cells, dtype=y.dtype).index_add(0, cell, y)
    answer = (total / count.clamp(min=1))[cell]
    error = (y - answer).square().mean()
    energy = answer.square().mean() / y.square().mean()
    return error.item(), energy.item()


def closed_form(n=20_000, t=1.0, seed=0):
    """{teacher, frame: (error, energy)} of the best causal student at time t."""
    rng = torch.Generator().manual_seed(seed)
    data = MEANS[torch.randint(2, (n,), generator=rng)]
    data = data + STD * torch.randn(n, 2, generator=rng, dtype=torch.float64)
    x_t = (1 - t) * data + t * torch.randn(n, 2, generator=rng, dtype=torch.float64)
    x_1, x_2 = x_t[:, :1], x_t[:, 1:]
    true_1 = data[:, :1]
    # the bidirectional teacher moves both frames together
    both = flow(x_t, MEANS, start=t)
    # the autoregressive one moves frame 1 alone, then frame 2 given the true frame 1
    y_1 = flow(x_1, MEANS[:, :1], start=t)
    offset = true_1[..., None] - MEANS[:, :1]                      # (n, k, 1)
    log_weights = -offset.square().sum(-1) / (2 * STD ** 2)        # log p(true frame 1 | component)
    y_2 = flow(x_2, MEANS[:, 1:], log_weights, start=t)
    return {
        'bidirectional teacher, frame 1': best_regression(both[:, 0], x_1[:, 0]),
        'autoregressive teacher, frame 1': best_regression(y_1[:, 0], x_1[:, 0]),
        'autoregressive teacher, frame 2': best_regression(y_2[:, 0], x_2[:, 0], true_1[:, 0], bins=10_000),
    }


def print_closed_form():
    for t in (1.0, .9375, .8333, .625):                            # the student's times
        for name, (error, energy) in closed_form(t=t).items():
            print(f't {t:.4f}  {name:32s} loss floor {error:.4f}   E|Y^|^2 / E|Y|^2 {energy:.4f}')

# -----------------------------------------------------------------------------
# 2. on lowpoly: what stage 2 would be with a bidirectional teacher

STEPS = 4, 1                          # of the student, when it is scored
COLUMNS = 'psnr@1', 'psnr@7', 'gap@7', 'sharpness', 'fd'
SEEDS = 3


@torch.no_grad()
def whole_clip_states(teacher, batch, times, at):
    """As distill_ode.ode_states, of the bidirectional teacher: Euler steps of its ODE on the whole clip,
    frame 0 given. (B, len(at) + 1, F, C, H, W): the states at the times `at`, and the end point."""
    x = batch.eps.clone()
    x[:, 0] = batch.x0[:, 0]
    states = []
    for t, t_next in zip(times[:-1].tolist(), times[1:].tolist()):
        time = torch.full(x.shape[:2], t, device=x.device)
        time[:, 0] = 0
        v = teacher(x, time, batch.text, batch.camera)
        v[:, 0] = 0
        states += [x + (s - t) * v for s in at.tolist() if t_next < s <= t]
        x = x + (t_next - t) * v
    return torch.stack([*states, x], 1)


def whole_clip_loss(net, cfg, batch):
    """As distill_ode.ode_loss, for states of the bidirectional teacher. All frames of a state are at one
    time: the student of a frame sees the noisy past of the same trajectory. Frame 0 is given, has no loss."""
    B, F = batch.x0.shape[:2]
    states, move = batch.more
    camera = replace(batch.camera, move=move)
    times = schedule(cfg.student_steps, net.cfg.shift).to(states.device)
    s = (batch.draws.t[:, 0] * cfg.student_steps).long()           # (B,)
    x_t = states[range(B), s].float()
    t = times[s][:, None].repeat(1, F)
    t[:, 0] = 0
    mask = causal_mask(chunk_ids(F, net.cfg.chunk, net.cfg.first_chunk))
    v = net(x_t, t, batch.text, camera, mask=mask)
    error = (v_to_x0(x_t, v, t) - states[:, -1]).square().mean((2, 3, 4))    # (B, F)
    return error[:, 1:].mean(), error, t


def make_pairs(cfg, clips, teacher, run):
    """Write cfg.pairs pairs of the bidirectional teacher, in the format of data.py. Returns the folder."""
    folder = f'{cfg.out}/pairs-bidirectional'
    times = schedule(cfg.teacher_steps, teacher.cfg.shift)
    at = schedule(cfg.student_steps, teacher.cfg.shift)[:-1]
    shards = []
    for start in range(0, cfg.pairs, cfg.pair_batch):
        count = min(cfg.pair_batch, cfg.pairs - start)
        batch = get_batch(clips, start, count, cfg.frames, teacher.cfg, cfg.seed + 1, run.device)
        with run.autocast():
            states = whole_clip_states(teacher, batch, times, at)
        tensors = dict(
            latents=batch.x0.half(),
            c2w=batch.camera.c2w,
            K=batch.camera.K[:, 0].contiguous(),
            move=batch.camera.move,
            states=states.half(),
        )
        name = f'train_{start:06d}.safetensors'
        tensors = {key: x.cpu() for key, x in tensors.items()}
        save_tensors(f'{folder}/{name}', tensors, {'captions': batch.captions})
        shards.append({'file': name, 'clips': count})
    recipe = {'teacher': 'bidirectional', 'data': clips.manifest['recipe']}
    write_json(f'{folder}/manifest.json', {'recipe': recipe, 'shards': shards})
    return folder


def train_on_bidirectional(cfg, checkpoint):
    """Stage 2 with the pairs of that stage-0 checkpoint. Leaves ode-bidirectional.safetensors."""
    run = setup(cfg)
    clips, held_out = open_clips(cfg, run)
    student = distill_ode.start_model(cfg, run)
    teacher, _ = load_model(checkpoint, run.device)
    folder = make_pairs(cfg, clips, teacher, run)
    pairs = Clips(folder, keys=('latents', 'c2w', 'K', 'states', 'move'))
    ema = {name: x.clone() for name, x in student.state_dict().items()}
    distill_ode.train(cfg, 'ode-bidirectional', run, student, ema, whole_clip_loss, pairs, held_out)


def train_student(teacher, folder, data, seed):
    """Regress the student, folder/ar.safetensors, on pairs of a teacher. Returns its path without ending."""
    out = f'{folder}/causal-forcing-{seed}'
    cfg = distill_ode.Config(init=f'{folder}/ar.safetensors', data=data, out=out, seed=seed,
                             pairs=128, steps=200)
    if teacher == 'causal':
        distill_ode.main(cfg)
        return f'{cfg.out}/ode'
    cfg.context_noise = cfg.context = 0.0                          # its history is the noisy past
    train_on_bidirectional(cfg, f'{folder}/camera.safetensors')
    return f'{cfg.out}/ode-bidirectional'


def last_loss(path):
    """Mean of the last 100 steps of a log, which has a line every 50."""
    with open(path) as f:
        lines = [json.loads(line) for line in f]
    losses = [line['loss'] for line in lines if 'loss' in line]
    return np.mean(losses[-2:])


def measure(path):
    """{steps: numbers of the student on held-out paths}."""
    model, header = load_model(f'{path}.safetensors')
    model.eval()
    scores = {}
    for steps in STEPS:
        cfg = ScoreConfig(steps=steps)
        s = score(model, cfg, header, find_codec(), torch.device('cpu'), find_poses=False)
        scores[steps] = table.summary(s)
    return scores


def compare_teachers(folder, data):
    print('| teacher | regression loss, last 100 steps | steps | ' + ' | '.join(COLUMNS) + ' |')
    print('|---' * (3 + len(COLUMNS)) + '|')
    for teacher in ('causal', 'bidirectional'):
        losses, scores = [], []
        for seed in range(SEEDS):
            path = train_student(teacher, folder, data, seed)
            losses.append(last_loss(f'{path}.jsonl'))
            scores.append(measure(path))
        loss = f'{np.mean(losses):.4f} ± {np.std(losses):.4f}'
        for steps in STEPS:
            rows = [by_steps[steps] for by_steps in scores]
            cells = [table.mean_and_spread(rows, key) for key in COLUMNS]
            print(f'| {teacher} | {loss} | {steps} | ' + ' | '.join(cells) + ' |', flush=True)


if __name__ == '__main__':
    if len(sys.argv) == 1:
        print_closed_form()
    else:
        compare_teachers(*sys.argv[1:])
