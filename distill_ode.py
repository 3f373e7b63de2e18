"""
Stage 2: the multi-step causal model learns to jump, in 4, 2 or 1 steps, to where its own flow would have ended.

In:  clips with poses and the causal model (out/ar.safetensors), which is both teacher and start.
Out: out/ode.safetensors (--method ode, Causal Forcing) or out/cd.safetensors (--method cd, Causal Forcing++): for 4, 2 and 1 steps.

    python distill_ode.py --method cd                                                     # laptop
    torchrun --nproc_per_node=1 distill_ode.py --method cd --batch 64                     # one GPU
    torchrun --nproc_per_node=8 distill_ode.py --method cd --batch 256                    # eight

--method ode makes pairs (state, end point) of the teacher's ODE once, then regresses them; few guided steps (--teacher_steps,
--guidance) are better here than 48. --teacher bidirectional makes them with the stage-0 model, as CausVid and Self Forcing do,
for comparison: a frame then depends on the noise of later ones, which a causal student cannot see: blur.

Different from minWM: 1) the history is encoded once, not at each of the teacher's steps, and noised as in stage 1, or the student
forgets what a walk's history looks like; 2) one set of pairs, from any number of steps, serves 4, 2 and 1; 3) times and dt in
float32, masters in float32 (in bfloat16 dt is wrong by up to 64 %).
"""
import json
import os
import sys
import time
import zlib
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from camera import BadInput, Camera, jumps, relative, steps
from data import Batch, Clips, batches, get_batch, load_manifest, make, noise_for, psnr, write_strip
from data import Config as DataConfig
from model import (DiT, KVCache, add_noise, attention_path, causal_mask, chunk_ids, clip_gradients, command_line, gate, learning_rate,
                   load_model, load_resume, make_optimizers, pick_device, save_model, save_resume, save_tensors, schedule, shard,
                   sync_gradients, teacher_forced, teacher_forcing_mask, update_ema, v_to_x0, walk_clip, whole, without)


@dataclass
class Config:
    # what
    preset: str = 'nano'          # whose thresholds to compare with at the end
    method: str = 'ode'           # ode: regress pairs of the teacher's ODE | cd: consistency, no pairs
    teacher: str = 'causal'       # ode: causal | bidirectional: the stage-0 model, for comparison
    init: str = 'out/ar.safetensors'          # the student's start, and the causal teacher
    bidirectional: str = 'out/camera.safetensors'
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
    drift: float = 0.0            # share of these batches whose history is what the teacher has walked
    context_noise: float = 0.3    # the history is noised up to this time, as in stage 1 (0: clean, as in the papers)
    context: float = 0.1          # noise level of a walk's own history
    # run
    seed: int = 0
    device: str = 'auto'          # auto | cpu | cuda
    dtype: str = 'auto'           # compute: auto | float32 | bfloat16
    shard: str = 'ddp'            # several processes: ddp | fsdp, which splits the weights
    checkpoint: bool = False      # keep one activation a block and compute the others again
    compile: bool = False         # torch.compile the blocks: a minute or two to start with; needs a C++ compiler
    log_every: int = 50           # steps between log lines
    save_every: int = 200         # steps between resume checkpoints
    eval_clips: int = 64          # held-out clips of the evaluation, all at once
    eval_every: int = 300         # steps between evaluations; one is at the end anyway

# -----------------------------------------------------------------------------
# the lesson, 1: pairs of the probability-flow ODE (Causal Forcing, section 3.2)

def noised_history(cfg, batch, m):
    """The batch with its frames noised as stage 1 noises the history, and their times (B, F): teacher and student see the same."""
    F = batch.x0.shape[1]
    level = cfg.context_noise * batch.u[:, F + 4:][:, chunk_ids(F, m.chunk, m.first)]
    return replace(batch, x0=add_noise(batch.x0, batch.eps, level)), level


@torch.no_grad()
def ode_states(model, batch, level, times, at, causal=True, guidance=1.0, over='camera'):
    """Integrate the teacher's ODE by Euler steps through `times`: the states at the times `at`, on the straight lines
    of the steps, and the end point, (B, len(at) + 1, F, C, H, W). Noise to frame is then a function of what a causal
    student sees: its own noise and the history, batch.x0 at times `level`. With causal=False the bidirectional teacher
    runs on the whole clip, frame 0 given. guidance: its branch without camera or prompt (`over`) shares the batch."""
    B, F, _, H, W = batch.x0.shape
    x, states, text, camera = batch.eps.clone(), [], batch.text, batch.camera
    twice = (lambda y: torch.cat([y, y])) if guidance != 1 else (lambda y: y)
    if guidance != 1:
        no_text, no_camera = without(over, text, camera)
        text, camera = torch.cat([text, no_text]), Camera.cat([camera, no_camera], 0)
    if causal:                                   # all chunks in parallel: the history is encoded once, into a cache
        ids = chunk_ids(F, model.cfg.chunk, model.cfg.first)
        cache = KVCache(model.cfg, len(text), 2 * F, H * W // model.cfg.patch ** 2, x.device)
        model(twice(batch.x0), twice(level), text, camera, causal_mask(ids), cache=cache)
        cache.end = F
        known = dict(mask=teacher_forcing_mask(ids)[F:], pos=range(F), cache=cache)
    else:
        x[:, 0], known = batch.x0[:, 0], {}
    for t, t_next in zip(times[:-1].tolist(), times[1:].tolist()):
        time = torch.full((B, F), t, device=x.device)
        time[:, 0] *= causal                                                  # the given frame stays at t = 0
        v = model(twice(x), twice(time), text, camera, **known)
        if guidance != 1:
            v = v[B:] + guidance * (v[:B] - v[B:])
        v[:, 0] *= causal
        states += [x + (s - t) * v for s in at.tolist() if t_next < s <= t]
        x = x + (t_next - t) * v
    return torch.stack([*states, x], 1)


def ode_loss(net, cfg, batch):
    """Regress a state of the ODE to its end point: (scalar, squared errors of x0 (B, F), their times (B, F))."""
    B, F = batch.x0.shape[:2]
    states, batch.camera.step, level = batch.more
    # 1) one of the student's times for each clip, and the teacher's state there
    times = schedule(cfg.student_steps, net.cfg.shift).to(states.device)
    s = (batch.u[:, 0] * cfg.student_steps).long()
    x_t, t = states[range(B), s].float(), times[s][:, None].expand(B, F)
    # 2) the student sees the teacher's history; after the bidirectional teacher, the noisy past of the same trajectory
    if cfg.teacher == 'causal':
        v = teacher_forced(net, net.cfg, batch, x_t, t, level)
    else:
        t = t.clone()
        t[:, 0] = 0
        v = net(x_t, t, batch.text, batch.camera, mask=causal_mask(chunk_ids(F, net.cfg.chunk, net.cfg.first)))
    # 3) it should jump to the end point
    error = (v_to_x0(x_t, v, t) - states[:, -1]).square().mean((2, 3, 4))
    return error[:, cfg.teacher != 'causal':].mean(), error, t

# -----------------------------------------------------------------------------
# the lesson, 2: causal consistency distillation (Causal Forcing++, section 3.2): the same map, without pairs

def cd_loss(net, cfg, batch, teacher, averaged):
    """One teacher step links two neighbouring times; where the student and its average land from them must agree. Returns as ode_loss."""
    B, F = batch.x0.shape[:2]
    # 1) neighbours t > t' on the grid, one pair for each clip, in float32
    grid = schedule(cfg.teacher_steps, net.cfg.shift).to(batch.x0.device)
    i = (batch.u[:, 0] * cfg.teacher_steps).long()
    t, t_next = grid[i][:, None].expand(B, F), grid[i + 1][:, None].expand(B, F)
    x_t = add_noise(batch.x0, batch.eps, t)
    batch, level = noised_history(cfg, batch, net.cfg)
    with torch.no_grad():
        # 2) the frozen teacher goes one Euler step from t to t'
        v = teacher_forced(teacher, net.cfg, batch, x_t, t, level)
        if cfg.guidance != 1:
            text, camera = without(cfg.over, batch.text, batch.camera)
            null = teacher_forced(teacher, net.cfg, replace(batch, text=text, camera=camera), x_t, t, level)
            v = null + cfg.guidance * (v - null)
        x_next = x_t + (t_next - t)[..., None, None, None] * v
        # 3) the student's EMA jumps from there: the target. At t' = 0 it is x' itself, the boundary condition
        target = v_to_x0(x_next, teacher_forced(averaged, net.cfg, batch, x_next, t_next, level), t_next)
    # 4) the student jumps from t
    error = (v_to_x0(x_t, teacher_forced(net, net.cfg, batch, x_t, t, level), t) - target).square().mean((2, 3, 4))
    return error.mean(), error, t

# -----------------------------------------------------------------------------
# pairs on disk, in the format of data.py, so that get_batch reads them

@torch.no_grad()
def walked(teacher, cfg, clip, rng, count):
    """Whole clips -> `count` windows of them, their frames (the history of the pairs) as the teacher has walked them from the first:
    the student, too, will stray, and must know the way on from there (DAgger: Ross et al. 2011). A clip is walked once for all its windows."""
    m, n, (B, F, *shape), jump, K = teacher.cfg, cfg.frames, clip.x0.shape, jumps(clip.camera.c2w), clip.camera.K
    times, noise = schedule(min(cfg.student_steps, cfg.teacher_steps), m.shift), noise_for(rng.integers(2 ** 31, size=B), shape, K.device)
    x0 = walk_clip(teacher, clip.camera.c2w, K, clip.text, times, noise, clip.x0[:, :1], jump=jump, guidance=cfg.guidance, over=cfg.over,
                   window=n, context=cfg.context)
    row, before = torch.from_numpy(np.stack([np.arange(count) % B, m.chunk * rng.integers((F - n) // m.chunk + 1, size=count)]))[..., None].to(K.device)
    at = before + torch.arange(n, device=K.device)
    kept = torch.where(m.sink & (at == before), 0, at)                        # (count, n): frames of the walk
    c2w, u = clip.camera.c2w[row, kept], clip.u[row, before + torch.arange(2 * n + 4, device=K.device)]
    camera = Camera(relative(c2w), K[row, kept], step=steps(c2w, jump=m.sink & ((before > 0) | jump[row])[:, 0]))
    return Batch(x0[row, kept], camera, clip.text[row[:, 0]], clip.eps[row, at], u, tuple(clip.captions[b] for b in row))


def make_pairs(cfg, clips, teacher, device, dtype, say, rank=0, world=1):
    """Integrate cfg.pairs clips, cfg.pair_batch at a time, each shard by one rank; shards that exist are kept. Returns the folder."""
    folder = f'{cfg.out}/pairs-{cfg.teacher}'
    recipe = {k: getattr(cfg, k) for k in 'teacher frames student_steps teacher_steps guidance over pairs pair_batch drift context_noise context seed'.split()}
    with open(cfg.init if cfg.teacher == 'causal' else cfg.bidirectional, 'rb') as f:
        recipe |= {'checkpoint': f.name, 'crc32': zlib.crc32(f.read()), 'data': clips.manifest['recipe']}
    if os.path.exists(f'{folder}/manifest.json') and (old := load_manifest(folder)['recipe']) != recipe:
        changed = ', '.join(k for k in recipe if recipe[k] != old.get(k))
        raise BadInput(f'{folder} was made with another {changed}: delete it, or give another --out')
    shards = [(f'train_{a:06d}.safetensors', a, min(cfg.pair_batch, cfg.pairs - a)) for a in range(0, cfg.pairs, cfg.pair_batch)]
    if rank == 0:
        os.makedirs(folder, exist_ok=True)
        with open(f'{folder}/manifest.json.tmp', 'w') as f:
            json.dump({'recipe': recipe, 'shards': [{'file': name, 'clips': n} for name, a, n in shards]}, f, indent=1)
        os.replace(f'{folder}/manifest.json.tmp', f'{folder}/manifest.json')
    for name, a, n in tqdm(shards[rank::world], desc=folder, unit='shard', disable=rank > 0):
        if not os.path.exists(f'{folder}/{name}'):
            rng = np.random.default_rng([12, cfg.seed, a])
            drift = rng.random() < cfg.drift
            few = -(-n * cfg.frames // len(clips.read(0)[0])) if drift else n  # a walk of a whole clip has many windows
            batch = get_batch(clips, a, few, cfg.frames, teacher.cfg, cfg.seed + 1, device, whole=drift)
            batch, level = noised_history(cfg, walked(teacher, cfg, batch, rng, n) if drift else batch, teacher.cfg)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                times, at = (schedule(n, teacher.cfg.shift) for n in (cfg.teacher_steps, cfg.student_steps))
                states = ode_states(teacher, batch, level, times, at[:-1], cfg.teacher == 'causal', cfg.guidance, cfg.over)
            tensors = dict(latents=batch.x0.half(), c2w=batch.camera.c2w, K=batch.camera.K[:, 0].contiguous(), step=batch.camera.step,
                           states=states.half(), level=level)
            if clips.embedded:
                tensors['text'] = batch.text[:, :(batch.text != 0).any(2).sum(1).max()].bfloat16()
            save_tensors(f'{folder}/{name}', {k: v.cpu() for k, v in tensors.items()}, {'captions': batch.captions})
    if world > 1:
        dist.barrier()
    say(f'{folder}: {cfg.pairs} pairs, {sum(os.path.getsize(os.path.join(folder, name)) for name, _, _ in shards) / 2 ** 20:.0f} MB')
    return folder

# -----------------------------------------------------------------------------
# evaluate: walk held-out paths in 4, 2 and 1 steps; and how far the student lands from the teacher's end points

@torch.inference_mode()
def evaluate(model, cfg, clips, device, strip=None):
    """PSNR to the true frames in a few steps, on the right path and on another clip's; distance to the teacher."""
    n = min(cfg.eval_clips, len(clips))
    batch = get_batch(clips, 0, n, cfg.frames, model.cfg, cfg.seed, device)
    truth, decode = clips.truth(n, cfg.frames).to(device), clips.codec(device).decode
    last, metrics = min(7, truth.shape[1] - 1), {}

    def generate(c2w, steps):
        return decode(walk_clip(model, c2w, batch.camera.K, batch.text, schedule(steps, model.cfg.shift),
                                noise_for(range(n), batch.x0.shape[2:], device), batch.x0[:, :1], window=cfg.frames, renoise=True, context=cfg.context))
    for steps in (4, 2, 1):
        walk = generate(batch.camera.c2w, steps)
        right, wrong = (psnr(x, truth).mean(0).tolist() for x in (walk, generate(batch.camera.c2w.roll(-1, 0), steps)))
        name = '' if steps == 4 else f', {steps} step' + 's' * (steps > 1)
        metrics |= {f'psnr@1{name}': right[1], f'psnr@{last}{name}': right[last], f'gap@{last}{name}': right[last] - wrong[last]}
        if strip and steps == 4:
            write_strip(strip, truth[:6], walk[:6])
    part, level = noised_history(cfg, get_batch(clips, 0, min(16, cfg.pair_batch, n), cfg.frames, model.cfg, cfg.seed, device), model.cfg)
    half = device.type == 'cuda' and pick_device(cfg.device, cfg.dtype)[1] != torch.float32      # a Wan clip's cache is large
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        times, at = (schedule(n, model.cfg.shift) for n in (cfg.teacher_steps, cfg.student_steps))
        states = ode_states(load_model(cfg.init, device)[0], part, level, times, at[:-1], guidance=cfg.guidance, over=cfg.over)
    for s, t in enumerate(at[:-1].tolist()):
        t = torch.full(part.x0.shape[:2], t, device=device)
        jump = v_to_x0(states[:, s], teacher_forced(model, model.cfg, part, states[:, s], t, level), t)
        metrics[f'to end, t {t[0, 0]:.2f}'] = (jump - states[:, -1]).square().mean().item()
    return metrics

# -----------------------------------------------------------------------------
# the model: student and teacher from --init; where the default is not there, from checkpoints/

def start_model(cfg, device, say):
    for path in (cfg.init, os.path.join('checkpoints', os.path.basename(cfg.init)))[:1 + (cfg.init == Config.init)]:
        if os.path.exists(path):
            model, header = load_model(path, device)
            say(f'start from {path}: {header["stage"]}, {header["step"]} steps')
            cfg.init = path
            return model
    raise BadInput(f'--init {cfg.init}: no such file: run train_ar.py first')

# -----------------------------------------------------------------------------
# same in every stage: setup

def main(cfg, stage):
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    device, dtype = pick_device(cfg.device, cfg.dtype, int(os.environ.get('LOCAL_RANK', 0)))
    if world > 1:
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
    say = print if rank == 0 else lambda *a: None
    micro = cfg.batch // (world * cfg.accum)
    if micro * world * cfg.accum != cfg.batch:
        raise BadInput(f'--batch {cfg.batch} does not divide by {world} processes x --accum {cfg.accum}')
    if rank == 0:
        os.makedirs(cfg.out, exist_ok=True)
        if not os.path.exists(f'{cfg.data}/manifest.json'):
            make(DataConfig(out=cfg.data))
    if world > 1:
        dist.barrier()
    clips, held_out = Clips(cfg.data), Clips(cfg.data, 'val')
    torch.manual_seed(cfg.seed)
    model = start_model(cfg, device, say)

    # -------------------------------------------------------------------------
    # the teacher, its pairs, the loss
    if cfg.method not in ('ode', 'cd') or cfg.teacher not in ('causal', 'bidirectional') or min(cfg.teacher_steps, cfg.student_steps) < 1:
        raise BadInput(f'--method {cfg.method} --teacher {cfg.teacher}: choose ode or cd, causal or bidirectional, and at least one step of both')
    if cfg.teacher != 'causal' and (cfg.method == 'cd' or cfg.drift):
        raise BadInput('--method cd and --drift need the causal teacher: --teacher bidirectional goes with --method ode alone')
    if cfg.teacher != 'causal':
        cfg.context_noise = cfg.context = 0.0                                 # its student's history is the trajectory's noisy past
    teacher, _ = load_model(cfg.init if cfg.teacher == 'causal' else cfg.bidirectional, device)
    if cfg.method == 'ode':
        clips = Clips(make_pairs(cfg, clips, teacher, device, dtype, say, rank, world), keys=('latents', 'c2w', 'K', 'states', 'step', 'level'))
        loss_fn = ode_loss
    else:
        average, _ = load_model(cfg.init, device)
        if cfg.shard == 'fsdp':
            teacher, average = shard(teacher, cfg.shard), shard(average, cfg.shard)

        def averaged(*args, **kw):                                            # the student's EMA weights
            if hasattr(average, 'reshard'):
                average.reshard()
            for mine, value in zip(average.state_dict().values(), ema.values()):
                mine.copy_(value)
            return average(*args, **kw)
        loss_fn = lambda net, cfg, batch: cd_loss(net, cfg, batch, teacher, averaged)

    # -------------------------------------------------------------------------
    # same in every stage: optimizer, resume, loop
    config = {k: v for k, v in asdict(cfg).items() if k not in ('device', 'accum', 'shard', 'checkpoint', 'compile', 'log_every', 'save_every', 'eval_every')}
    model.checkpoint = cfg.checkpoint
    net = shard(model, cfg.shard, compiled=cfg.compile)
    optimizers = make_optimizers(model, cfg.lr, cfg.muon, (cfg.beta1, cfg.beta2), dtype)
    ema = {k: v.clone() for k, v in model.state_dict().items()}
    path = f'{cfg.out}/{stage}'
    start = load_resume(f'{path}.resume.safetensors', model, ema, optimizers, config, say)
    tokens = held_out.read(0)[0][0, 0].numel() // model.cfg.patch ** 2
    say(f'{stage}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {tokens} tokens a frame, '
        f'effective batch {cfg.batch} = {world} x {cfg.accum} x {micro}, {device}, {dtype}, '
        f'{attention_path(device, dtype)}, {len(clips)} clips')
    if rank == 0:
        lines = open(f'{path}.jsonl').read().split('\n')[:-1] if start and os.path.exists(f'{path}.jsonl') else []
        log = open(f'{path}.jsonl', 'w', buffering=1)                        # a line at a time
        log.writelines(line + '\n' for line in lines if (x := json.loads(line))['step'] <= start and ('lr' in x or x['step'] < cfg.steps))
    def score(step):
        """The EMA's weights, and how well they do: a line in the log."""
        state, metrics = {k: whole(v) for k, v in ema.items()}, {}
        if rank == 0:
            frozen = DiT(model.cfg).to(device)
            frozen.load_state_dict(state)
            metrics = evaluate(frozen, cfg, held_out, device, f'{path}.png')
            tqdm.write(f'{stage} {step:6d} | ' + ', '.join(f'{k} {v:.3f}' for k, v in metrics.items()))
            log.write(json.dumps(dict(step=step, **metrics)) + '\n')
        return state, metrics
    sums, began = torch.zeros(9, device=device), time.time()   # of the loss; by noise level, of the error and the count
    firsts = [s * cfg.batch + (rank * cfg.accum + i) * micro for s in range(start, cfg.steps) for i in range(cfg.accum)]
    samples = batches(firsts, clips, micro, cfg.frames, model.cfg, cfg.seed, device)
    bar = tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, desc=stage, disable=rank > 0)
    for step in bar:
        lr = learning_rate(step, cfg.steps, cfg.lr, cfg.warmup, cfg.decay)
        for i in range(cfg.accum):
            batch = next(samples)
            sync_gradients(net, i == cfg.accum - 1)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                loss, error, t = loss_fn(net, cfg, batch)
            (loss / cfg.accum).backward()
            level = (t[..., None] > torch.arange(4, device=device) / 4) & (t[..., None] <= torch.arange(1, 5, device=device) / 4)
            sums += torch.cat([loss[None] / cfg.accum, (error[..., None] * level).sum((0, 1)), level.sum((0, 1))]).detach()
        norm = clip_gradients(model.parameters(), cfg.clip)
        for opt in optimizers:
            for group in opt.param_groups:
                group['lr'] = lr
            opt.step()
            opt.zero_grad(set_to_none=True)
        update_ema(ema, model, cfg.ema, step)
        if (step + 1) % cfg.log_every == 0 or step + 1 == cfg.steps:
            if world > 1:
                dist.all_reduce(sums)
            n = min((step % cfg.log_every) + 1, step + 1 - start)
            ms, levels = (time.time() - began) * 1e3 / n, (sums[1:5] / sums[5:].clamp(min=1)).tolist()
            line = dict(step=step + 1, loss=sums[0].item() / n / world, levels=levels, norm=norm, lr=lr, ms=ms,
                        frames_s=cfg.batch * cfg.frames / ms * 1e3, batch=cfg.batch)
            if rank == 0:
                tqdm.write(f'{stage} {step + 1:6d} | loss {line["loss"]:.4f} | by t ' + ' '.join(f'{x:.3f}' for x in levels) +
                           f' | norm {norm:6.3f} | lr {lr:.1e} | {ms:6.0f} ms | {line["frames_s"]:6.0f} frames/s')
                log.write(json.dumps(line) + '\n')
            sums, began = torch.zeros(9, device=device), time.time()
        if (step + 1) % cfg.eval_every == 0 and step + 1 < cfg.steps:
            pause = time.time()
            score(step + 1)
            began += time.time() - pause                                      # an evaluation is no step's time
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps:
            save_resume(f'{path}.resume.safetensors', model, ema, optimizers, step + 1, config)

    # -------------------------------------------------------------------------
    # same in every stage: evaluate, save the EMA, gate
    state, metrics = score(cfg.steps)
    if rank == 0:
        save_model(f'{path}.safetensors', state, model.cfg, stage=stage, step=cfg.steps, seed=cfg.seed, metrics=metrics,
                   frames=cfg.frames, context=getattr(cfg, 'context', 0.0), data=held_out.manifest, command=' '.join(sys.argv))
        print(f'{path}.safetensors, {path}.png')
        print(gate(stage, cfg.preset, metrics))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == '__main__':
    command_line(lambda cfg: main(cfg, cfg.method if cfg.teacher == 'causal' else 'ode-bidirectional'), Config, __doc__)
