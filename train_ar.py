"""
Stage 1: the bidirectional camera model becomes a causal one, by teacher forcing.

In:  clips with poses (data/lowpoly, made if missing) and the camera model (out/camera.safetensors).
Out: out/ar.safetensors, which walks: python stream.py --ckpt out/ar.safetensors --keys "w*8,wl*8"

    python train_ar.py                                                                    # laptop
    torchrun --nproc_per_node=1 train_ar.py --preset small --batch 64                     # one GPU
    torchrun --nproc_per_node=8 train_ar.py --preset small --batch 256                    # eight

Different from minWM: 1) the mask is by frames and read row by row on a CPU, by flex_attention on a GPU; 2) the first
chunk is one frame, so the model starts from a picture; 3) text and camera are dropped at random; 4) no weight over t;
5) the history is slightly noised, and with --drift the model's own; 6) Muon and an EMA; 7) gradient accumulation is real.
"""
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from camera import BadInput, Camera, jumps, relative, steps
from data import Clips, batches, get_batch, make, noise_for, psnr, write_strip
from data import Config as DataConfig
from model import (PRESETS, DiT, add_noise, attention_path, bell_weight, chunk_ids, clip_gradients, command_line, gate,
                   learning_rate, load_model, load_resume, make_optimizers, pick_device, save_model, save_resume, schedule, shard,
                   shift_time, sync_gradients, teacher_forced, update_ema, walk_clip, whole)


@dataclass
class Config:
    # what
    preset: str = 'nano'          # model size, when there is no checkpoint to start from
    init: str = 'out/camera.safetensors'
    chunk: int = 0                # frames denoised together, after a first one alone; 0: as the model is
    sink: bool = False            # learn to keep a walk's first frame in the window (clips longer than --frames)
    data: str = 'data/lowpoly'    # folder of clips
    out: str = 'out'              # folder for checkpoints, log and strip
    # lengths
    frames: int = 9               # frames of a training clip
    steps: int = 1900
    batch: int = 8                # effective batch: over all processes and micro-batches
    accum: int = 1                # micro-batches a step, on each process
    # optimizer
    lr: float = 8e-3
    warmup: int = 50              # steps
    decay: float = 0.5            # last fraction of the steps, over which lr falls to 0
    muon: bool = True             # Muon for the blocks' matrices; False: AdamW alone
    beta1: float = 0.9            # AdamW's memory of the gradient, and of its square
    beta2: float = 0.99
    clip: float = 1.0             # gradient norm
    ema: float = 0.995
    # objective
    context_noise: float = 0.3    # the history is noised up to this time (0: clean, as in the paper)
    context: float = 0.1          # noise level of a walk's own history
    drift: float = 0.0            # share of the steps whose history the model has dreamt itself
    bell: bool = False            # weigh the loss over t as minWM does
    drop_text: float = 0.1
    drop_camera: float = 0.1
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
    eval_every: int = 1900        # steps between evaluations; one is at the end anyway
    sample_steps: int = 8         # Euler steps of the evaluation

# -----------------------------------------------------------------------------
# the lesson: teacher forcing over [history | noisy] (Causal Forcing, section 3.1; one time per chunk)

def loss_fn(model, cfg, batch, dreamt=None):
    """Mean squared error of the velocity: (scalar, per-frame losses (B, F), their times (B, F)). dreamt: the history, if not the clip's frames."""
    B, F = batch.x0.shape[:2]
    u_text, u_camera = batch.u[:, F + 1:F + 3].unbind(1)
    # 1) one noise level per chunk, all independent: every chunk meets every level, whatever came before
    ids = chunk_ids(F, model.cfg.chunk, model.cfg.first)
    t = shift_time(batch.u[:, ids], model.cfg.shift)
    x_t = add_noise(batch.x0, batch.eps, t)
    # 2) the prompt or the camera is dropped in some clips
    text = batch.text * (u_text >= cfg.drop_text).float()[:, None, None]
    camera = replace(batch.camera, on=u_camera >= cfg.drop_camera)
    # 3) the history is a little noisy, and says so by its time: a walk's own frames are not perfect either
    t_history = cfg.context_noise * batch.u[:, F + 4:][:, ids]
    history = add_noise(batch.x0 if dreamt is None else dreamt, batch.eps, t_history)
    # 4) the history and the noisy video in one sequence: same positions, same cameras.
    #    The mask (model.py draws it) lets noisy chunk i see history chunks < i and itself
    v = teacher_forced(model, model.cfg, replace(batch, x0=history, text=text, camera=camera), x_t, t, t_history)
    # 5) the loss is on all noisy frames, frame 0 included: from the prompt alone it must be dreamt
    error = (v - (batch.eps - batch.x0)).square().mean((2, 3, 4)) * (bell_weight(t) if cfg.bell else 1)
    return error.mean(), error, t

# -----------------------------------------------------------------------------
# the lesson, 2: upon its own walks (scheduled sampling: Bengio et al. 2015), so that it learns to come back

class Drift:
    """loss_fn; in a share cfg.drift of the steps the history is what the model has walked on its own, and the target is still
    the clip. 16 batches of walks take turns, each half a window further; a walk ends with its clip, or by chance. A resumed
    run begins them anew."""
    def __init__(self, cfg, clips):
        self.walks, self.rng = {}, np.random.default_rng([11, cfg.seed])
        if cfg.drift:                                         # whole clips go along in batch.more
            clips.keys = *clips.keys[:3], 'latents', 'c2w', *clips.keys[3:]

    def __call__(self, net, cfg, batch):
        if self.rng.random() >= cfg.drift:
            return loss_fn(net, cfg, batch)
        model, m, n, turn = getattr(net, 'module', net), net.cfg, cfg.frames, int(self.rng.integers(16))
        # 1) the walks of this turn; those at their end begin again, with true frames
        half = m.first + ((n + 1) // 2 - m.first) // m.chunk * m.chunk
        clip, c2w = batch.more
        new = clip.float(), c2w, batch.camera.K, batch.text, clip[:, :half].float(), torch.zeros(len(clip), dtype=torch.long, device=clip.device)
        old = self.walks.get(turn, new)
        over = (old[-1] + n > clip.shape[1]) | (batch.u[:, n] < .05)
        clip, c2w, K, text, seen, age = (torch.where(over.view(-1, *[1] * (a.ndim - 1)), a, b) for a, b in zip(new, old))
        # 2) their window: frame 0 if there is a sink, the half that is dreamt, and as many frames on
        frames, row, jump = age[:, None] + torch.arange(n, device=age.device), torch.arange(len(age))[:, None], m.sink & ((age > 0) | jumps(c2w))
        frames[jump, 0] = 0
        path = c2w[row, frames]
        camera = Camera(relative(path), K, step=steps(path, jump=jump))
        # 3) walk on
        noise = noise_for([int(x * 2 ** 24) for x in batch.u[:, n + 3].tolist()], clip.shape[2:], clip.device)
        if hasattr(model, 'unshard'):                         # rollout embeds cameras outside of a forward pass
            model.unshard()
        with torch.no_grad():
            dreamt = walk_clip(model, path, K, text, schedule(4, m.shift), noise, seen, window=n, context=cfg.context)
        kept = [0] * m.sink + [*range(m.sink - half, 0)]
        self.walks[turn] = clip, c2w, K, text, dreamt[:, kept], age + n - half
        # 4) from there, the clip is still the target
        return loss_fn(net, cfg, replace(batch, x0=clip[row, frames], camera=camera, text=text), dreamt)

# -----------------------------------------------------------------------------
# evaluate: walk held-out paths from their first frame, each chunk upon what was generated before

@torch.inference_mode()
def evaluate(model, cfg, clips, device, strip=None):
    """Validation loss, PSNR to the true frames on the right path and on another clip's path."""
    n = min(cfg.eval_clips, len(clips))
    batch = get_batch(clips, 0, n, cfg.frames, model.cfg, cfg.seed, device)
    metrics = {'val_loss': loss_fn(model, cfg, batch)[0].item()}

    def generate(c2w):
        return decode(walk_clip(model, c2w, batch.camera.K, batch.text, schedule(cfg.sample_steps, model.cfg.shift),
                                noise_for(range(n), batch.x0.shape[2:], device), batch.x0[:, :1], window=cfg.frames, context=cfg.context))
    truth, decode = clips.truth(n, cfg.frames).to(device), clips.codec(device).decode
    last = min(7, truth.shape[1] - 1)
    walk, wrong = generate(batch.camera.c2w), generate(batch.camera.c2w.roll(-1, 0))
    right, wrong = psnr(walk, truth).mean(0).tolist(), psnr(wrong, truth).mean(0).tolist()
    metrics |= {'psnr@1': right[1], f'psnr@{last}': right[last], f'gap@{last}': right[last] - wrong[last]}
    if strip:
        write_strip(strip, truth[:6], walk[:6])
    return metrics

# -----------------------------------------------------------------------------
# the model: from --init; where the default is not there, from checkpoints/, else from scratch

def start_model(cfg, device, say):
    for path in (cfg.init, os.path.join('checkpoints', os.path.basename(cfg.init)))[:1 + (cfg.init == Config.init)]:
        if os.path.exists(path):
            model, header = load_model(path, device)
            say(f'start from {path}: {header["stage"]}, {header["step"]} steps')
            break
    else:
        if cfg.init not in (Config.init, 'none'):
            raise BadInput(f'--init {cfg.init}: no such file; none, in its place, starts from scratch')
        if cfg.preset not in PRESETS:
            raise BadInput(f'--preset {cfg.preset}: choose one of {", ".join(PRESETS)}')
        say(f'start from scratch: there is no {cfg.init}')
        model = DiT(replace(PRESETS[cfg.preset])).to(device)
    if cfg.chunk:
        model.cfg.chunk, model.cfg.first = cfg.chunk, 1
    chunk_ids(cfg.frames, model.cfg.chunk, model.cfg.first)                  # raises if it does not divide
    model.cfg.sink |= cfg.sink
    return model

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
    loss_fn = Drift(cfg, clips)

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
    command_line(lambda cfg: main(cfg, 'ar'), Config, __doc__)
