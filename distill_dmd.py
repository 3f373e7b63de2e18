"""
Stage 3: the few-step causal model learns from its own rollouts, by asymmetric distribution matching (DMD).

In:  clips (only their first frames, poses and captions are used) and three networks:

    network      starts from                         trained?    causal?    learning rate
    generator    out/ode.safetensors (stage 2)       yes         yes        --lr
    real score   out/camera.safetensors (stage 0)    no          no         -
    fake score   the same                            yes         no         --critic_lr

Out: out/dmd.safetensors, the one with the best pictures, and out/dmd.last.safetensors; for 4, 2 and 1 steps.

    python distill_dmd.py --guidance 1.4                                                  # laptop
    torchrun --nproc_per_node=1 distill_dmd.py --batch 64                                 # one GPU
    torchrun --nproc_per_node=8 distill_dmd.py --batch 64                                 # eight

Different from minWM: 1) both scores are given the true time; 2) masters in float32; 3) the data's frame 0 is
given, without gradient or loss; 4) the fake score learns from the generator's own rollout, not from another;
5) gradients are averaged by hand.
"""
import collections
import math
import os
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional
from tqdm import tqdm

from camera import BadInput, Camera, moves, relative, starts_elsewhere
from common import (Log, clip_gradients, command_line, describe, find_checkpoint, fixed_settings, gate,
                    learning_rate, load_model, load_resume, load_tensors, make_header, save_model,
                    save_resume, score, setup, shard, update_ema)
from data import Batch, get_batch, noise_for, open_clips, path_metrics, psnr, write_strip
from model import (add_noise, chunk_ids, null_condition, rollout, rollout_clip, schedule, shift_time,
                   v_to_x0)


@dataclass
class Config:
    # what
    preset: str = 'nano'          # whose thresholds to compare with at the end
    init: str = 'out/ode.safetensors'         # the generator's start
    score: str = 'out/camera.safetensors'     # the real score, and the fake score's start
    data: str = 'data/lowpoly'    # folder of clips
    out: str = 'out'              # folder for checkpoints, log and strip
    # lengths
    frames: int = 9               # frames that the scores see
    steps: int = 60               # generator updates
    batch: int = 8                # effective batch: over all processes and micro-batches
    accum: int = 1                # micro-batches an update, on each process
    critic: int = 4               # updates of the fake score, on the same rollout, for one of the generator
    # optimizer
    lr: float = 1e-4
    critic_lr: float = 1e-3
    warmup: int = 10              # steps
    decay: float = 0.5            # last fraction of the steps, over which both lr fall to 0
    clip: float = 1.0             # gradient norm, of each network
    ema: float = 0.97
    # objective
    student_steps: int = 4        # steps of a rollout's schedule
    guidance: float = 1.0         # of the real score (1: none)
    over: str = 'camera'          # what guidance drops: camera | text
    p_first: float = 1.0          # how often the data's frame 0 is given; else it is generated too
    context: float = 0.2          # noise level of a rollout's own history
    before: int = 24              # up to so many frames are generated before those that the scores see
    # run
    seed: int = 0
    device: str = 'auto'          # auto | cpu | cuda
    dtype: str = 'auto'           # compute: auto (on a CPU float32) | float32 | bfloat16
    shard: str = 'ddp'            # several processes: ddp | fsdp, which splits the weights of all networks
    offload: bool = False         # fsdp: the frozen real score waits in the processor's memory
    checkpoint: bool = False      # keep one activation a block and compute the others again
    log_every: int = 10           # steps between log lines
    save_every: int = 50          # steps between resume checkpoints
    eval_clips: int = 64          # held-out clips of the evaluation, all at once
    eval_every: int = 20          # steps between evaluations, which choose the best

# -----------------------------------------------------------------------------
# the lesson: distribution matching on self-rollouts (DMD: Yin et al. 2024, eq. 7; Self Forcing, algorithm 1)

def there_and_back(c2w, length):
    """Frame indices (length,) that go through the frames of paths c2w (B, F, 4, 4) to the end, back to the
    start, and so on. If a path starts elsewhere (a clip with a door), none comes back to frame 0."""
    n = c2w.shape[1]
    i = torch.arange(length) % max(1, 2 * n - 2)
    path = torch.minimum(i, 2 * n - 2 - i)
    if starts_elsewhere(c2w).any():
        path[1:] = path[1:].clamp(min=1)
    return path


@dataclass
class Rollout:
    """The frames of a rollout that the scores see."""
    x: torch.Tensor               # (B, F, C, H, W)
    given: int                    # the first `given` of them come from the data
    batch: Batch                  # cameras, captions and true frames at these places


def plan_rollout(model_cfg, cfg, index):
    """(exit step, given frames, frames generated before those that are scored) of this update. They depend on
    (seed, update) alone, so that all processes agree. index: (seed, update, sample) for each clip."""
    seed, update, _ = index[0]
    rng = np.random.default_rng([8, seed, update])
    exit_step = int(rng.integers(cfg.student_steps))
    given = model_cfg.first_chunk if rng.random() < cfg.p_first else 0
    before = model_cfg.chunk * int(rng.integers(cfg.before // model_cfg.chunk + 1))
    return exit_step, given, before


def scored_window(model_cfg, batch, path, before, frames):
    """(indices into the rollout, the batch) of what the scores see: the last F = `frames` frames or, with a
    sink, frame 0 and the last F - 1."""
    kept = list(range(before, before + frames))
    jump = torch.zeros(len(batch.x0), dtype=torch.bool, device=batch.x0.device)
    if model_cfg.sink:
        kept[0] = 0
        jump = (before > 0) | starts_elsewhere(batch.camera.c2w)           # frame 0 does not lead to frame 1
    c2w, K = batch.camera.c2w[:, path[kept]], batch.camera.K[:, path[kept]]
    camera = Camera(relative(c2w), K, move=moves(c2w, jump=jump))
    return kept, replace(batch, x0=batch.x0[:, path[kept]], eps=batch.eps[:, :frames], camera=camera)


def self_rollout(model, cfg, batch, index):
    """What the scores see of a rollout of the generator along the batch's cameras.

    Self Forcing, algorithm 1: all chunks stop at one random step, whose call carries the gradient, if any.
    Up to cfg.before frames are generated first, without gradient, so that the generator learns on histories
    as imperfect as those of a long walk.
    """
    m, n = model.cfg, cfg.frames
    grad = torch.is_grad_enabled()
    if hasattr(model, 'unshard'):                                          # FSDP: for embed_camera
        model.unshard()
    exit_step, given, before = plan_rollout(m, cfg, index)
    path = there_and_back(batch.camera.c2w, before + n)
    kept, scored = scored_window(m, batch, path, before, n)
    sizes = torch.bincount(chunk_ids(before + n, m.chunk, m.first_chunk)).tolist()
    c2w, K = batch.camera.c2w[:, path], batch.camera.K[:, path]
    chunks = rollout(
        model,
        map(Camera, c2w.split(sizes, 1), K.split(sizes, 1)),
        batch.text,
        schedule(cfg.student_steps, m.shift),
        noise_for(index, batch.x0.shape[2:], batch.x0.device, stream=13),
        batch.x0[:, :given] if given else None,
        window=n,
        renoise=True,
        exit_step=exit_step,
        context=cfg.context,
        jump=starts_elsewhere(batch.camera.c2w),
    )
    frames = []
    done = 0
    for size in sizes:
        scored_here = done >= before and not set(kept).isdisjoint(range(done, done + size))
        with torch.set_grad_enabled(grad and scored_here):                 # a generator runs in the grad mode
            frames.append(next(chunks))                                    # of whoever calls next()
        done += size
    if before > 0 and not m.sink:
        given = 0                                                          # it has left the window
    return Rollout(torch.cat(frames, 1)[:, kept], given, scored)


def noised(x, batch, shift, given):
    """x at one random time for each clip, and its times (B, F); given frames stay clean, at t = 0."""
    t = shift_time(batch.draws.t[:, :1], shift).clamp(.02, .98)
    t = t.expand(x.shape[:2]).clone()
    t[:, :given] = 0
    return add_noise(x, batch.eps[:, :x.shape[1]], t), t


def dmd_gradient(x, x_t, t, batch, real, fake, guidance, given=0, over='camera'):
    """(x0_fake - x0_real) / mean |x - x0_real|, the mean over the frames of a clip that are not given.

    A score is ((1 - t) x0 - x_t) / t^2, so this is, up to a positive factor, score_fake - score_real: the
    gradient in x_t of KL(noised rollouts || noised data). Only the real score is guided.
    """
    v = real(x_t, t, batch.text, batch.camera)
    if guidance != 1:
        null = real(x_t, t, *null_condition(over, batch.text, batch.camera, batch.null_text))
        v = null + guidance * (v - null)
    real_x0 = v_to_x0(x_t, v, t)
    fake_x0 = v_to_x0(x_t, fake(x_t, t, batch.text, batch.camera), t)
    size = (x - real_x0)[:, given:].abs().mean((1, 2, 3, 4), keepdim=True)              # (B, 1, 1, 1, 1)
    return (fake_x0 - real_x0) / size


def generator_loss(nets, cfg, batch, index):
    """(loss, mean size of the gradient, the Rollout)."""
    # 1) rollout: the generator continues from its own frames
    out = self_rollout(nets['generator'], cfg, batch, index)
    with torch.no_grad():
        # 2) noise: one time for each clip
        x_t, t = noised(out.x, out.batch, nets['generator'].cfg.shift, out.given)
        # 3) two scores, at that very time: of the data, and of the generator's own rollouts
        # 4) gradient: towards the data's, away from its own
        grad = dmd_gradient(out.x, x_t, t, out.batch, nets['real'], nets['fake'], cfg.guidance, out.given,
                            cfg.over)
    target = (out.x - grad).detach()
    loss = .5 * (out.x - target)[:, out.given:].square().mean()            # its gradient in x is grad / numel
    return loss, grad[:, out.given:].abs().mean(), replace(out, x=out.x.detach())


def critic_loss(nets, cfg, batch, out):
    """5) critic: the fake score follows the generator, by flow matching on its rollout. The batch gives fresh
    noise and times; cameras and captions are the rollout's."""
    x_t, t = noised(out.x, batch, nets['fake'].cfg.shift, out.given)
    v = nets['fake'](x_t, t, out.batch.text, out.batch.camera)
    eps = batch.eps[:, :out.x.shape[1]]
    return (v - (eps - out.x))[:, out.given:].square().mean()

# -----------------------------------------------------------------------------
# what pictures look like, whatever they show: the checkpoint is chosen by it

def sharpness(x):
    """Gradient energy of pictures (..., H, W, 3) in grey -> (...)."""
    grey = x.mean(-1)
    across, down = grey.diff(dim=-1), grey.diff(dim=-2)
    return across.square().mean((-2, -1)) + down.square().mean((-2, -1))


def motion(x):
    """Energy of the frame differences of videos (..., F, H, W, 3) -> (..., F - 1)."""
    return x.diff(dim=-4).square().mean((-3, -2, -1))


def frechet_features(x):
    """80 numbers of each picture (n, H, W, 3): 4 x 4 means of the colours, of the gradient energy in grey and
    of its square root. (n, 80) float64."""
    x = x.movedim(-1, 1).double()
    grey = x.mean(1, keepdim=True)
    across = functional.pad(grey.diff(dim=-1), (0, 1))
    down = functional.pad(grey.diff(dim=-2), (0, 0, 0, 1))
    energy = across.square() + down.square()
    maps = torch.cat([x, energy * 10, energy.sqrt()], 1)
    return functional.adaptive_avg_pool2d(maps, 4).flatten(1)


def frechet(a, b):
    """Fréchet distance of two sets of pictures (n, H, W, 3), between Gaussians fitted to their features."""
    x, y = (torch.cat([frechet_features(part) for part in pictures.split(500)]) for pictures in (a, b))
    cov_x, cov_y = torch.cov(x.T), torch.cov(y.T)
    if not (cov_x @ cov_y).isfinite().all():
        return float('nan')                                                # some LAPACKs would crash
    root = torch.linalg.eigvals(cov_x @ cov_y).real.clamp(min=0).sqrt().sum()           # tr (cov_x cov_y)^1/2
    between = (x.mean(0) - y.mean(0)).square().sum()
    return (between + cov_x.trace() + cov_y.trace() - 2 * root).item()


def liveliness(video, truth):
    """Sharpness and motion of generated frames relative to the truth's, both (n, F, H, W, 3)."""
    sharp = sharpness(video[:, 1:]).mean() / sharpness(truth[:, 1:]).mean()
    moving = motion(video).mean() / motion(truth).mean()
    return {'sharpness': sharp.item(), 'motion': moving.item()}


def picture_metrics(video, truth, decoded):
    """fd, sharpness and motion of rollouts against the truth along the same paths, (n, F, H, W, 3) each.

    decoded is the truth, encoded and decoded: what a perfect model would show. Sharpness and motion are
    relative to it, and fd_floor is its fd. `score` chooses the checkpoint, lower is better: the Fréchet
    distance plus a penalty for blur and stillness.
    """
    def distance(pictures):
        return frechet(pictures[:, 1:].flatten(0, 1), truth[:, 1:].flatten(0, 1))

    lively = liveliness(video, decoded)
    penalty = sum(abs(1 - x) for x in lively.values())
    fd = distance(video)
    return {**lively, 'fd': fd, 'fd_floor': distance(decoded), 'score': fd + .1 * penalty}

# -----------------------------------------------------------------------------
# evaluate: rollouts along held-out paths in a few steps.

@torch.inference_mode()
def evaluate(model, cfg, clips, device, strip=None, before=None):
    """The metrics of held-out rollouts of `before` + cfg.frames frames; before=None: the most that training
    generates first."""
    chunk = model.cfg.chunk
    if before is None:
        before = cfg.before
    n = min(cfg.eval_clips, len(clips))
    batch = get_batch(clips, 0, n, cfg.frames, model.cfg, cfg.seed, device, whole=before > 0)
    length = batch.x0.shape[1]
    codec = clips.codec(device)
    if codec.stride > 1:                       # a latent is several pictures, which do not run backwards
        before = min(before, length - cfg.frames)
    before = before // chunk * chunk
    path = there_and_back(batch.camera.c2w, before + cfg.frames)
    truth = clips.truth(n, length).to(device)                              # (n, pictures, H, W, 3)
    truth = truth[:, path] if codec.stride == 1 else truth[:, :1 + path[-1] * codec.stride]
    c2w, K = batch.camera.c2w[:, path], batch.camera.K[:, path]
    times = schedule(cfg.student_steps, model.cfg.shift)

    def generate(c2w):
        noise = noise_for([(cfg.seed, i) for i in range(n)], batch.x0.shape[2:], device)
        z = rollout_clip(model, c2w, K[:, :c2w.shape[1]], batch.text, times, noise, batch.x0[:, :1],
                         window=cfg.frames, renoise=True, context=cfg.context)
        return codec.decode(z)

    near = cfg.frames if cfg.frames > 7 else c2w.shape[1]                  # the wrong path stops early
    video = generate(c2w)
    wrong = generate(c2w.roll(-1, 0)[:, :near])
    pictures = wrong.shape[1]
    metrics = path_metrics(video[:, :pictures], wrong, truth[:, :pictures])
    metrics |= picture_metrics(video, truth, codec.decode(batch.x0[:, path]))
    metrics[f'psnr@{truth.shape[1] - 1}'] = psnr(video, truth).mean(0)[-1].item()
    if strip:
        write_strip(strip, truth[:6], video[:6], most=cfg.frames)
    return metrics

# -----------------------------------------------------------------------------
# the three networks: from --init and --score; where a default is not there, from checkpoints/

def start_nets(cfg, run):
    def load(path, default, role):
        found = find_checkpoint(path, default)
        if found is None:
            raise BadInput(f'{path}: no such file: the {role} needs it, run the stage before first')
        model, header = load_model(found, run.device)
        run.say(f'{role} from {found}: {header["stage"]}, {header["step"]} steps')
        return model

    nets = {
        'generator': load(cfg.init, Config.init, 'generator'),
        'real': load(cfg.score, Config.score, 'real score'),
        'fake': load(cfg.score, Config.score, 'fake score'),
    }
    m = nets['generator'].cfg
    chunk_ids(cfg.frames, m.chunk, m.first_chunk)                          # raises if it does not divide
    nets['real'].requires_grad_(False)
    nets['generator'].checkpoint = nets['fake'].checkpoint = cfg.checkpoint
    return nets


def main(cfg):
    run = setup(cfg)
    if cfg.dtype == 'auto' and run.device.type == 'cpu':
        run.dtype = torch.float32              # calls of a rollout are small: casts cost more than they save
    clips, held_out = open_clips(cfg, run)
    nets = start_nets(cfg, run)
    if run.world > 1 and cfg.shard != 'ddp':   # under ddp step_on averages the gradients
        for name, net in nets.items():
            shard(net, cfg.shard, cfg.offload and name == 'real')
    train(cfg, run, nets, clips, held_out)

# -----------------------------------------------------------------------------
# train: for one update of the generator, cfg.critic of the fake score on the same rollouts

def micro_batches(update, model, cfg, run, clips):
    """This process's share of update number `update`: (batch, index) of each micro-batch, where index is
    (seed, update, sample) for each clip."""
    plain = replace(model.cfg, sink=False)                                 # self_rollout places the sink
    from_door = model.cfg.sink and clips.manifest['recipe'].get('door', False)
    for i in range(cfg.accum):
        start = (run.rank * cfg.accum + i) * run.micro
        batch = get_batch(clips, update * cfg.batch + start, run.micro, cfg.frames, plain, cfg.seed,
                          run.device, whole=cfg.before > 0 or from_door)   # a whole clip begins at its door
        yield batch, [(cfg.seed, update, j) for j in range(start, start + run.micro)]


def step_on(net, optimizer, cfg, run):
    """One optimizer step on the gradients, averaged over the processes; returns their norm."""
    params = [p for p in net.parameters() if p.grad is not None]
    if run.world > 1 and cfg.shard == 'ddp':   # by hand: DDP's hooks would miss a rollout's many calls
        for p in params:
            dist.all_reduce(p.grad.div_(run.world))
    norm = clip_gradients(params, cfg.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def update_generator(update, nets, optimizer, cfg, run, clips, values):
    """One update of the generator. Returns its rollouts; what the log shows goes into values."""
    rollouts = []
    for batch, index in micro_batches(update, nets['generator'], cfg, run, clips):
        with run.autocast():
            loss, gap, out = generator_loss(nets, cfg, batch, index)
        (loss / cfg.accum).backward()
        rollouts.append(out)
        values['loss'].append(loss.item())
        values['gap'].append(gap.item())
    norm = step_on(nets['generator'], optimizer, cfg, run)
    values['norm'].append(norm)
    return rollouts


def update_critic(update, nets, optimizer, cfg, run, clips, rollouts, values):
    """cfg.critic updates of the fake score on the same rollouts, each with the noise and times of a batch of
    its own."""
    for i in range(cfg.critic):
        fresh = micro_batches(update + i, nets['generator'], cfg, run, clips)
        for (batch, _), out in zip(fresh, rollouts):
            with run.autocast():
                loss = critic_loss(nets, cfg, batch, out)
            (loss / cfg.accum).backward()
            values['critic'].append(loss.item())
        norm = step_on(nets['fake'], optimizer, cfg, run)
        values['critic_norm'].append(norm)


@torch.no_grad()
def first_rollouts(update, nets, cfg, run, clips):
    """Rollouts of the generator as it is, for the critic to begin with."""
    rollouts = []
    for batch, index in micro_batches(update, nets['generator'], cfg, run, clips):
        with run.autocast():
            rollouts.append(self_rollout(nets['generator'], cfg, batch, index))
    return rollouts


def liveliness_of(rollouts, clips, run):
    """Sharpness and motion of these rollouts, for the log."""
    decode = clips.codec(run.device).decode
    video = decode(torch.cat([out.x for out in rollouts]))
    truth = decode(torch.cat([out.batch.x0 for out in rollouts]))
    return liveliness(video, truth)


def means(values, run):
    """The mean of each list, over all processes."""
    mean = torch.tensor([np.mean(v) for v in values.values()], device=run.device) / run.world
    if run.world > 1:
        dist.all_reduce(mean)
    return dict(zip(values, mean.tolist()))


LINE = ('dmd {:6d} | loss {loss:.4f} gap {gap:.3f} norm {norm:6.3f} | critic {critic:.4f} norm '
        '{critic_norm:6.3f} | sharpness {sharpness:.2f} motion {motion:.2f} | lr {lr:.1e} | {ms:6.0f} ms')


def best_score(path, start):
    """The score of the checkpoint that a resumed run goes on to beat."""
    if start == 0 or not os.path.exists(f'{path}.safetensors'):
        return math.inf
    _, header = load_tensors(f'{path}.safetensors')
    chosen_by = header.get('choice', header['metrics'])
    return chosen_by['score'] if header['step'] <= start else math.inf


def train(cfg, run, nets, clips, held_out):
    path = f'{cfg.out}/dmd'
    model = nets['generator']
    # the best checkpoint is chosen in one half of the held-out worlds, and its metrics are of the other half
    half = (len(held_out) + 1) // 2
    choice, report = held_out.part(len(held_out) - half, len(held_out)), held_out.part(0, half)
    lrs = {'generator': cfg.lr, 'fake': cfg.critic_lr}
    optimizers = {}
    for name, lr in lrs.items():
        params = nets[name].parameters()
        # beta1 = 0, as DMD2: no momentum while the other network changes
        optimizers[name] = torch.optim.AdamW(params, lr, (0., .999), weight_decay=.01, fused=True)
    trained = torch.nn.ModuleDict({name: nets[name] for name in lrs})
    ema = {name: x.clone() for name, x in model.state_dict().items()}
    settings = fixed_settings(cfg, clips)
    resume = f'{path}.resume.safetensors', trained, ema, list(optimizers.values())
    start = load_resume(*resume, settings, run)
    best = best_score(path, start)
    describe('dmd: 3 networks', model, cfg, run, clips)
    log = Log(f'{path}.jsonl', run, start)
    values = collections.defaultdict(list)                                 # since the last log line
    began = time.time()

    for step in tqdm(range(start, cfg.steps), 'dmd', cfg.steps, initial=start, disable=run.rank > 0):
        for name, lr in lrs.items():
            for group in optimizers[name].param_groups:
                group['lr'] = learning_rate(step, cfg.steps, lr, cfg.warmup, cfg.decay)
        updates = (step + 1) * (1 + cfg.critic)                            # their numbers: a batch for each
        if step == 0:                          # the critic goes first: while fake = real, nothing is to learn
            rollouts = first_rollouts(0, nets, cfg, run, clips)
            update_critic(1, nets, optimizers['fake'], cfg, run, clips, rollouts, values)
        rollouts = update_generator(updates, nets, optimizers['generator'], cfg, run, clips, values)
        update_ema(ema, model, cfg.ema, step)
        update_critic(updates + 1, nets, optimizers['fake'], cfg, run, clips, rollouts, values)

        done = step + 1
        if done % cfg.log_every == 0 or done == cfg.steps:
            ms = (time.time() - began) * 1e3 / len(values['norm'])
            for name, value in liveliness_of(rollouts, clips, run).items():
                values[name].append(value)
            line = dict(means(values, run), lr=optimizers['generator'].param_groups[0]['lr'], ms=ms)
            log.write(LINE.format(done, **line), step=done, **line, batch=cfg.batch)
            values.clear()
            began = time.time()
        if done % cfg.eval_every == 0 or done == cfg.steps:
            state, metrics = score(evaluate, cfg, 'dmd', run, model, ema, choice, log, done)
            header = make_header(cfg, 'dmd', done, metrics, held_out)
            if run.rank == 0 and metrics['score'] < best:
                save_model(f'{path}.safetensors', state, model.cfg, **header)
                best = metrics['score']
            if run.rank == 0 and done == cfg.steps:
                save_model(f'{path}.last.safetensors', state, model.cfg, **header)
        if done % cfg.save_every == 0 or done == cfg.steps:
            save_resume(*resume, done, settings)

    if run.rank == 0:
        report_best(path, best, cfg, run, report)
    run.end()


def report_best(path, best, cfg, run, clips):
    """Measure the best checkpoint in worlds that it was not chosen by, write that into its header, say it.
    best: the score that it was chosen by, infinite if there is none."""
    if best == math.inf:
        raise BadInput(f'{path}: no evaluation of these {cfg.steps} steps gave a score, so no checkpoint is '
                       'kept: try more --steps, or a smaller --lr and --critic_lr')
    model, header = load_model(f'{path}.safetensors', run.device)
    if 'choice' not in header:
        metrics = evaluate(model, cfg, clips, run.device, f'{path}.png')
        header |= {'choice': header['metrics'], 'metrics': metrics}
        save_model(f'{path}.safetensors', model.state_dict(), model.cfg, **header)
    text = ', '.join(f'{name} {value:.3f}' for name, value in header['metrics'].items())
    print(f'{path}.safetensors, step {header["step"]}: {text}')
    print(gate('dmd', cfg.preset, header['metrics'], clips.manifest['recipe']))


if __name__ == '__main__':
    command_line(main, Config, __doc__)
