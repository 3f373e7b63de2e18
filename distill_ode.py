"""
Stage 2: the multi-step causal model learns to jump, in 4, 2 or 1 steps, to where its own flow would end.

In:  clips with poses and the causal model (out/ar.safetensors), which is both teacher and start.
Out: out/ode.safetensors (--method ode, Causal Forcing) or out/cd.safetensors (--method cd, Causal Forcing++),
     each for 4, 2 and 1 steps.

    python distill_ode.py --teacher_steps 8 --guidance 1.3                                # laptop
    torchrun --nproc_per_node=1 distill_ode.py --batch 64                                 # one GPU
    torchrun --nproc_per_node=8 distill_ode.py --batch 256                                # eight

--method ode makes pairs (state, end point) of the teacher's ODE once, then regresses them; few guided steps
(--teacher_steps, --guidance) are better here than 48. Why the teacher must be causal, and what happens if it
is not: experiments/why_causal.py.

Different from minWM: 1) the history is encoded once, not at each of the teacher's steps, and noised as in
stage 1, or the student forgets what the history of a rollout looks like; 2) one set of pairs, from any number
of steps, serves 4, 2 and 1; 3) times and dt in float32, masters in float32 (in bfloat16 dt is wrong by up to
64 %).
"""
import math
import os
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import tqdm

from camera import BadInput, Camera
from common import (Log, Meter, checksum, clip_gradients, command_line, describe, find_checkpoint,
                    fixed_settings, learning_rate, load_model, load_resume, make_optimizers, save_resume,
                    save_stage, save_tensors, score, setup, shard, sync_gradients, take_step, update_ema,
                    write_json)
from data import Clips, batches, get_batch, load_manifest, noise_for, open_clips, path_metrics, write_strip
from model import (add_noise, causal_mask, chunk_ids, encoder_inputs, null_condition, rollout_clip,
                   schedule, teacher_forced, teacher_forcing_mask, v_to_x0)


@dataclass
class Config:
    # what
    preset: str = 'nano'          # whose thresholds to compare with at the end
    method: str = 'ode'           # ode: regress pairs of the teacher's ODE | cd: consistency, no pairs
    init: str = 'out/ar.safetensors'          # the student's start, and the teacher
    data: str = 'data/lowpoly'    # folder of clips
    out: str = 'out'              # folder for checkpoints, log, strip and pairs
    # lengths
    frames: int = 9               # frames of a training clip
    steps: int = 300
    batch: int = 8                # effective batch: over all processes and micro-batches
    accum: int = 1                # micro-batches a step, on each process
    # optimizer
    lr: float = 2e-3
    warmup: int = 20              # steps
    decay: float = 0.5            # last fraction of the steps, over which lr falls to 0
    muon: bool = True             # Muon for the blocks' matrices; False: AdamW alone
    beta1: float = 0.9            # AdamW's memory of the gradient, and of its square
    beta2: float = 0.99
    clip: float = 1.0             # gradient norm
    ema: float = 0.99             # also the target of cd
    # objective
    student_steps: int = 4        # the student's longest schedule; 2 and 1 steps use a part of it
    teacher_steps: int = 48       # Euler steps of the teacher from noise to frame
    guidance: float = 1.0         # of the teacher (1: none)
    over: str = 'camera'          # what guidance drops: camera | text
    pairs: int = 256              # clips of the ode method
    pair_batch: int = 32          # as many of them are integrated at once
    drift: float = 0.0            # share of these batches whose history is the teacher's own rollout
    context_noise: float = 0.3    # the history is noised up to this time, as in stage 1 (0: as in the papers)
    context: float = 0.1          # noise level of a rollout's own history
    # run
    seed: int = 0
    device: str = 'auto'          # auto | cpu | cuda
    dtype: str = 'auto'           # compute: auto | float32 | bfloat16
    shard: str = 'ddp'            # several processes: ddp | fsdp, which splits the weights
    checkpoint: bool = False      # keep one activation a block and compute the others again
    compile: bool = False         # torch.compile the blocks (a minute or two; needs a C++ compiler)
    log_every: int = 50           # steps between log lines
    save_every: int = 200         # steps between resume checkpoints
    eval_clips: int = 64          # held-out clips of the evaluation, all at once
    eval_every: int = 300         # steps between evaluations; one is at the end anyway

# -----------------------------------------------------------------------------
# the lesson, 1: pairs of the probability-flow ODE (Causal Forcing, section 3.2)

def noised_history(cfg, batch, model_cfg):
    """The batch with its frames noised as stage 1 noises the history, and their times (B, F). Teacher and
    student see the same."""
    ids = chunk_ids(batch.x0.shape[1], model_cfg.chunk, model_cfg.first_chunk)
    level = cfg.context_noise * batch.draws.t_history[:, ids]
    return replace(batch, x0=add_noise(batch.x0, batch.eps, level)), level


@torch.no_grad()
def ode_states(model, batch, level, times, at, guidance=1.0, over='camera'):
    """Integrate the teacher's ODE by Euler steps through `times`, all chunks at once, each conditioned on the
    history batch.x0 at times `level` (B, F). Where a frame ends is then a function of what a causal student
    sees: the history and the frame's own noise.

    Returns (B, len(at) + 1, F, C, H, W): the states at the times `at`, interpolated linearly within a step,
    and the end point.
    """
    B, F, _, H, W = batch.x0.shape
    text, camera = batch.text, batch.camera
    history = batch.x0
    if guidance != 1:                                  # the null branch is the second half of the batch
        null_text, null_camera = null_condition(over, text, camera, batch.null_text)
        text = torch.cat([text, null_text])
        camera = Camera.cat([camera, null_camera], 0)
        history, level = torch.cat([history, history]), torch.cat([level, level])

    # the history is encoded once; chunk i sees history chunks < i and itself
    ids = chunk_ids(F, model.cfg.chunk, model.cfg.first_chunk)
    if model.cfg.encoder_blocks:
        context = model.encode_clip(text, encoder_inputs(model.cfg, history, level, camera))
        options = dict(mask=causal_mask(ids), context=context)
    else:
        L = H * W // model.cfg.patch ** 2
        cache = model.cache_type(model.cfg, len(text), 2 * F, L, history.device)
        model(history, level, text, camera, causal_mask(ids), cache=cache)
        cache.end = F
        options = dict(mask=teacher_forcing_mask(ids)[F:], pos=range(F), cache=cache)

    x = batch.eps.clone()
    states = []
    for t, t_next in zip(times[:-1].tolist(), times[1:].tolist()):
        x_t = x if guidance == 1 else torch.cat([x, x])
        t_all = torch.full((len(x_t), F), t, device=x.device)
        v = model(x_t, t_all, text, camera, **options)
        if guidance != 1:
            cond, null = v[:B], v[B:]
            v = null + guidance * (cond - null)
        for s in at.tolist():
            if t_next < s <= t:
                states.append(x + (s - t) * v)
        x = x + (t_next - t) * v
    return torch.stack([*states, x], 1)


def ode_loss(net, cfg, batch):
    """Regress a state of the ODE to its end point: (scalar, errors of x0 (B, F), their times (B, F))."""
    B, F = batch.x0.shape[:2]
    # batch.x0 of a pair (make_shard) is the history, noised to the times `level` already. Its moves are
    # stored too, as get_batch cannot know where frame 0, a sink, does not lead to frame 1
    states, move, level = batch.more
    batch = replace(batch, camera=replace(batch.camera, move=move))
    # 1) one of the student's times for each clip, and the teacher's state there
    times = schedule(cfg.student_steps, net.cfg.shift).to(states.device)
    s = (batch.draws.t[:, 0] * cfg.student_steps).long()                   # (B,)
    x_t = states[range(B), s].float()
    t = times[s][:, None].expand(B, F)
    # 2) the student sees the teacher's history, and should jump to the end point
    v = teacher_forced(net, net.cfg, batch, x_t, t, level)
    error = (v_to_x0(x_t, v, t) - states[:, -1]).square().mean((2, 3, 4))  # (B, F)
    return error.mean(), error, t

# -----------------------------------------------------------------------------
# the lesson, 2: causal consistency distillation (Causal Forcing++, section 3.2): the same map, without pairs

def cd_loss(net, cfg, batch, teacher, averaged):
    """One teacher step links two neighbouring times: the student at t and its EMA at t' < t must predict the
    same x0. Returns the same three as ode_loss."""
    B, F = batch.x0.shape[:2]
    # 1) neighbours t > t' on the grid, one pair for each clip, in float32
    grid = schedule(cfg.teacher_steps, net.cfg.shift).to(batch.x0.device)
    i = (batch.draws.t[:, 0] * cfg.teacher_steps).long()                   # (B,)
    t = grid[i][:, None].expand(B, F)
    t_next = grid[i + 1][:, None].expand(B, F)
    x_t = add_noise(batch.x0, batch.eps, t)
    past, level = noised_history(cfg, batch, net.cfg)
    with torch.no_grad():
        # 2) the frozen teacher goes one Euler step from t to t'
        v = teacher_forced(teacher, net.cfg, past, x_t, t, level)
        if cfg.guidance != 1:
            text, camera = null_condition(cfg.over, past.text, past.camera, past.null_text)
            without = replace(past, text=text, camera=camera)
            null = teacher_forced(teacher, net.cfg, without, x_t, t, level)
            v = null + cfg.guidance * (v - null)
        x_next = x_t + (t_next - t)[..., None, None, None] * v
        # 3) the student's EMA jumps from there: the target. At t' = 0 it is x_next, the boundary condition
        v_ema = teacher_forced(averaged, net.cfg, past, x_next, t_next, level)
        target = v_to_x0(x_next, v_ema, t_next)
    # 4) the student jumps from t
    v_student = teacher_forced(net, net.cfg, past, x_t, t, level)
    error = (v_to_x0(x_t, v_student, t) - target).square().mean((2, 3, 4)) # (B, F)
    return error.mean(), error, t

# -----------------------------------------------------------------------------
# pairs on disk, in the format of data.py, so that get_batch reads them

def make_pairs(cfg, clips, teacher, run):
    """Integrate cfg.pairs clips, cfg.pair_batch at a time, each shard by one process; shards that exist are
    kept. Returns the folder."""
    folder = f'{cfg.out}/pairs-causal'
    starts = range(0, cfg.pairs, cfg.pair_batch)
    shards = {f'train_{start:06d}.safetensors': min(cfg.pair_batch, cfg.pairs - start) for start in starts}
    begin_folder(cfg, clips, folder, shards, run)
    mine = list(zip(starts, shards.items()))[run.rank::run.world]
    for start, (name, count) in tqdm(mine, desc=folder, unit='shard', disable=run.rank > 0):
        if not os.path.exists(f'{folder}/{name}'):
            tensors, captions = make_shard(cfg, clips, teacher, run, start, count)
            save_tensors(f'{folder}/{name}', tensors, {'captions': captions})
    run.barrier()
    size = sum(os.path.getsize(f'{folder}/{name}') for name in shards)
    run.say(f'{folder}: {cfg.pairs} pairs, {size / 2 ** 20:.0f} MB')
    return folder


def begin_folder(cfg, clips, folder, shards, run):
    """Write the manifest of a folder of pairs. Raises BadInput if it holds pairs of other settings."""
    names = ('frames', 'student_steps', 'teacher_steps', 'guidance', 'over', 'pairs', 'pair_batch', 'drift',
             'context_noise', 'context', 'seed')
    recipe = {'teacher': 'causal', **{name: getattr(cfg, name) for name in names},
              'crc32': checksum(cfg.init), 'data': clips.manifest['recipe']}
    if os.path.exists(f'{folder}/manifest.json'):
        old = load_manifest(folder)['recipe']
        changed = ', '.join(name for name in recipe if recipe[name] != old.get(name))
        if changed:
            raise BadInput(f'{folder} was made with another {changed}: delete it, or give another --out')
    if run.rank == 0:
        os.makedirs(folder, exist_ok=True)
        entries = [{'file': name, 'clips': count} for name, count in shards.items()]
        write_json(f'{folder}/manifest.json', {'recipe': recipe, 'shards': entries})


@torch.no_grad()
def make_shard(cfg, clips, teacher, run, start, count):
    """`count` pairs from clip `start` of the stream: (tensors, captions)."""
    rng = np.random.default_rng([12, cfg.seed, start])
    drift = rng.random() < cfg.drift
    n_clips = count
    if drift:                                                              # a whole clip has many windows
        n_clips = math.ceil(count * cfg.frames / len(clips.read(0)[0]))
    batch = get_batch(clips, start, n_clips, cfg.frames, teacher.cfg, cfg.seed + 1, run.device, whole=drift)
    if drift:
        from papers.drift import rolled_out_windows
        batch = rolled_out_windows(teacher, cfg, batch, rng, count)
    batch, level = noised_history(cfg, batch, teacher.cfg)
    times = schedule(cfg.teacher_steps, teacher.cfg.shift)
    at = schedule(cfg.student_steps, teacher.cfg.shift)[:-1]
    with run.autocast():
        states = ode_states(teacher, batch, level, times, at, cfg.guidance, cfg.over)
    tensors = dict(
        latents=batch.x0.half(),
        c2w=batch.camera.c2w,
        K=batch.camera.K[:, 0].contiguous(),
        step=batch.camera.move,
        states=states.half(),
        level=level,
    )
    if clips.embedded:
        rows = batch.text.any(2).any(0).nonzero()                          # zeros may lie between them
        longest = int(rows.max()) + 1 if len(rows) else 0
        tensors['text'] = batch.text[:, :longest].bfloat16()
    return {name: x.cpu() for name, x in tensors.items()}, batch.captions

# -----------------------------------------------------------------------------
# evaluate: rollouts along held-out paths in 4, 2 and 1 steps, and how far the student lands from the teacher

@torch.inference_mode()
def evaluate(model, cfg, clips, device, strip=None):
    """PSNR to the true frames in a few steps, on the right path and on another clip's, and the distance to
    where the teacher ends."""
    n = min(cfg.eval_clips, len(clips))
    batch = get_batch(clips, 0, n, cfg.frames, model.cfg, cfg.seed, device)
    truth = clips.truth(n, cfg.frames).to(device)                          # (n, F, H, W, 3)
    decode = clips.codec(device).decode
    metrics = {}

    def generate(c2w, steps):
        noise = noise_for(range(n), batch.x0.shape[2:], device)
        times = schedule(steps, model.cfg.shift)
        return decode(rollout_clip(model, c2w, batch.camera.K, batch.text, times, noise, batch.x0[:, :1],
                                   window=cfg.frames, renoise=True, context=cfg.context))

    for steps, suffix in ((4, ''), (2, ', 2 steps'), (1, ', 1 step')):
        video = generate(batch.camera.c2w, steps)
        wrong = generate(batch.camera.c2w.roll(-1, 0), steps)
        metrics |= path_metrics(video, wrong, truth, suffix)
        if strip and steps == 4:
            write_strip(strip, truth[:6], video[:6])
    return metrics | distance_to_teacher(model, cfg, clips, device)


def distance_to_teacher(model, cfg, clips, device):
    """Mean squared distance between where the student jumps and where the teacher's ODE ends, by time."""
    n = min(16, cfg.pair_batch, cfg.eval_clips, len(clips))
    batch = get_batch(clips, 0, n, cfg.frames, model.cfg, cfg.seed, device)
    batch, level = noised_history(cfg, batch, model.cfg)
    times = schedule(cfg.teacher_steps, model.cfg.shift)
    at = schedule(cfg.student_steps, model.cfg.shift)[:-1]
    teacher, _ = load_model(cfg.init, device)
    half = device.type == 'cuda' and cfg.dtype != 'float32'                # a Wan clip's cache is large
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        states = ode_states(teacher, batch, level, times, at, cfg.guidance, cfg.over)
    metrics = {}
    for x_t, t in zip(states.unbind(1), at.tolist()):
        time = torch.full(level.shape, t, device=device)
        x0 = v_to_x0(x_t, teacher_forced(model, model.cfg, batch, x_t, time, level), time)
        metrics[f'to end, t {t:.2f}'] = (x0 - states[:, -1]).square().mean().item()
    return metrics


# -----------------------------------------------------------------------------
# the model and its loss

def start_model(cfg, run):
    model, header = load_model(cfg.init, run.device)
    run.say(f'start from {cfg.init}: {header["stage"]}, {header["step"]} steps')
    return model


def choose_objective(cfg, run, ema, clips):
    """The loss function of cfg.method, and the clips that it reads."""
    teacher, _ = load_model(cfg.init, run.device)
    if cfg.method == 'ode':
        folder = make_pairs(cfg, clips, teacher, run)
        return ode_loss, Clips(folder, keys=('latents', 'c2w', 'K', 'states', 'step', 'level'))
    average, _ = load_model(cfg.init, run.device)
    if cfg.shard == 'fsdp':
        teacher = shard(teacher, cfg.shard)
        average = shard(average, cfg.shard)

    def averaged(*args, **options):                                        # the student with its EMA weights
        if hasattr(average, 'reshard'):
            average.reshard()
        for mine, newest in zip(average.state_dict().values(), ema.values()):
            mine.copy_(newest)
        return average(*args, **options)

    def objective(net, cfg, batch):
        return cd_loss(net, cfg, batch, teacher, averaged)
    return objective, clips


def main(cfg):
    if cfg.method not in ('ode', 'cd'):
        raise BadInput(f'--method {cfg.method}: choose ode or cd')
    init = find_checkpoint(cfg.init, Config.init)
    if init is None:
        raise BadInput(f'--init {cfg.init}: no such file: run train_ar.py first')
    cfg = replace(cfg, init=init)
    run = setup(cfg)
    clips, held_out = open_clips(cfg, run)
    model = start_model(cfg, run)
    model.checkpoint = cfg.checkpoint
    net = shard(model, cfg.shard, compiled=cfg.compile)
    ema = {name: x.clone() for name, x in model.state_dict().items()}
    objective, clips = choose_objective(cfg, run, ema, clips)
    train(cfg, cfg.method, run, net, ema, objective, clips, held_out)

# -----------------------------------------------------------------------------
# same in every stage: train

def train(cfg, stage, run, net, ema, objective, clips, held_out):
    """Minimise objective(net, cfg, batch) over the clips; save the EMA and what a resumed run needs."""
    path = f'{cfg.out}/{stage}'
    model = getattr(net, 'module', net)
    optimizers = make_optimizers(model, cfg.lr, cfg.muon, (cfg.beta1, cfg.beta2), run.dtype)
    resume = f'{path}.resume.safetensors', model, ema, optimizers
    settings = fixed_settings(cfg, clips)
    start = load_resume(*resume, settings, run)
    describe(stage, model, cfg, run, clips)
    log = Log(f'{path}.jsonl', run, start, again=cfg.steps)
    meter = Meter(run)
    samples = batches(start, clips, cfg, model.cfg, run)

    for step in tqdm(range(start, cfg.steps), stage, cfg.steps, initial=start, disable=run.rank > 0):
        began = time.time()
        lr = learning_rate(step, cfg.steps, cfg.lr, cfg.warmup, cfg.decay)
        for i in range(cfg.accum):
            batch = next(samples)
            sync_gradients(net, i == cfg.accum - 1)
            with run.autocast():
                loss, error, t = objective(net, cfg, batch)
            (loss / cfg.accum).backward()
            meter.add(loss / cfg.accum, error, t)
        norm = clip_gradients(model.parameters(), cfg.clip)
        take_step(optimizers, lr)
        update_ema(ema, model, cfg.ema, step)
        meter.end_step(began)

        done = step + 1
        if done % cfg.log_every == 0 or done == cfg.steps:
            meter.write(log, cfg, stage, done, norm, lr)
        if done % cfg.eval_every == 0 and done < cfg.steps:
            score(evaluate, cfg, stage, run, model, ema, held_out, log, done)
        if done % cfg.save_every == 0 or done == cfg.steps:
            save_resume(*resume, done, settings)

    state, metrics = score(evaluate, cfg, stage, run, model, ema, held_out, log, cfg.steps)
    save_stage(cfg, stage, run, state, model.cfg, metrics, held_out)
    run.end()


if __name__ == '__main__':
    command_line(main, Config, __doc__)
