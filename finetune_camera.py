"""
Stage 0: a bidirectional video diffusion transformer learns to follow a camera.

In:  clips with poses (data/lowpoly, made if missing) and a base model (out/base.safetensors).
Out: out/camera.safetensors. With --camera none it trains that base model itself, a text-and-image-to-video model
     without cameras that stands in for Wan2.1: out/base.safetensors.

    python finetune_camera.py --camera none && python finetune_camera.py --sink True      # laptop
    torchrun --nproc_per_node=1 finetune_camera.py --preset small --batch 64              # one GPU
    torchrun --nproc_per_node=8 finetune_camera.py --preset small --batch 256             # eight

Different from minWM: 1) the pose enters as Plücker maps added to the input and as each frame's move added to its time
embedding, not as PRoPE; 2) with probability p_first frame 0 is given clean, so one model does image-to-world and
text-to-world; 3) text and camera are dropped at random, so both can be guided; 4) no weight over t; 5) Muon and an EMA;
6) gradient accumulation is real.
"""
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, replace

import torch
import torch.distributed as dist
from tqdm import tqdm

from camera import BadInput, Camera
from data import Clips, batches, get_batch, make, psnr, write_strip
from data import Config as DataConfig
from model import (PRESETS, DiT, add_noise, attention_path, bell_weight, clip_gradients, command_line, gate, learning_rate,
                   load_model, load_resume, make_optimizers, pick_device, sample_clip, save_model, save_resume, schedule, shard,
                   shift_time, sync_gradients, update_ema, whole)


@dataclass
class Config:
    # what
    preset: str = 'nano'          # model size, when there is no checkpoint to start from
    init: str = 'out/base.safetensors'
    camera: str = 'plucker'       # plucker | none: train the base model
    sink: bool = False            # learn to keep a walk's first frame in the window (clips longer than --frames)
    data: str = 'data/lowpoly'    # folder of clips
    out: str = 'out'              # folder for checkpoints, log and strip
    # lengths
    frames: int = 9               # frames of a training clip
    steps: int = 1200
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
    p_first: float = 0.5          # how often frame 0 is given (0: minWM's text-to-video)
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
    eval_every: int = 1200        # steps between evaluations; one is at the end anyway
    sample_steps: int = 16        # Euler steps of the evaluation

# -----------------------------------------------------------------------------
# the lesson: conditional flow matching with a camera (Lipman et al. 2022, eq. 23; one time per clip)

def loss_fn(model, cfg, batch):
    """Mean squared error of the velocity: (scalar, per-frame losses (B, F), their times (B, F))."""
    B, F = batch.x0.shape[:2]
    u, (u_first, u_text, u_camera) = batch.u[:, :1], batch.u[:, F:F + 3].unbind(1)
    # 1) one noise level for all frames of a clip, denser where it is noisy
    t = shift_time(u, model.cfg.shift).expand(B, F).clone()
    # 2) in some clips frame 0 is given: its time is 0, it stays clean, and it carries no loss
    given = torch.zeros(B, F, dtype=torch.bool, device=t.device)
    given[:, 0] = u_first < cfg.p_first
    t[given] = 0
    x_t = add_noise(batch.x0, batch.eps, t)
    # 3) in some the prompt or the camera is dropped, so that a null branch exists for guidance
    text = batch.text * (u_text >= cfg.drop_text).float()[:, None, None]
    camera = replace(batch.camera, on=u_camera >= cfg.drop_camera) if cfg.camera != 'none' else None
    # 4) the network predicts the velocity eps - x0
    v = model(x_t, t, text, camera)
    error = (v - (batch.eps - batch.x0)).square().mean((2, 3, 4)) * (bell_weight(t) if cfg.bell else 1)
    return (error * ~given).sum(1).div((~given).sum(1)).mean(), error, t.masked_fill(given, -1)

# -----------------------------------------------------------------------------
# evaluate: held-out clips, frame 0 given

@torch.inference_mode()
def evaluate(model, cfg, clips, device, strip=None):
    """Validation loss and, with a camera, PSNR to the true frames on the right path and on another clip's path."""
    n = min(cfg.eval_clips, len(clips))
    batch = get_batch(clips, 0, n, cfg.frames, model.cfg, cfg.seed, device)
    metrics = {'val_loss': loss_fn(model, cfg, batch)[0].item()}

    def generate(camera):
        return decode(sample_clip(model, batch.eps, batch.text, camera, schedule(cfg.sample_steps, model.cfg.shift), batch.x0[:, :1]))
    truth, decode = clips.truth(n, cfg.frames).to(device), clips.codec(device).decode
    last = min(7, truth.shape[1] - 1)
    walk = generate(batch.camera if cfg.camera != 'none' else None)
    if cfg.camera != 'none':
        wrong = generate(Camera(batch.camera.c2w.roll(-1, 0), batch.camera.K))
        right, wrong = psnr(walk, truth).mean(0).tolist(), psnr(wrong, truth).mean(0).tolist()
        metrics |= {'psnr@1': right[1], f'psnr@{last}': right[last], f'gap@{last}': right[last] - wrong[last]}
    if strip:
        write_strip(strip, truth[:6], walk[:6])
    return metrics

# -----------------------------------------------------------------------------
# the model: from --init; where the default is not there, from checkpoints/, else from scratch

def start_model(cfg, device, say):
    for path in (cfg.init, os.path.join('checkpoints', os.path.basename(cfg.init)))[:1 + (cfg.init == Config.init)]:
        if cfg.camera != 'none' and os.path.exists(path):
            model, header = load_model(path, device, camera=cfg.camera)
            model.cfg.sink |= cfg.sink
            say(f'start from {path}: {header["stage"]}, {header["step"]} steps, camera {model.cfg.camera}')
            return model
    if cfg.camera != 'none' and cfg.init not in (Config.init, 'none'):
        raise BadInput(f'--init {cfg.init}: no such file; none, in its place, starts from scratch')
    if cfg.preset not in PRESETS:
        raise BadInput(f'--preset {cfg.preset}: choose one of {", ".join(PRESETS)}')
    say('start from scratch' + f': there is no {cfg.init}' * (cfg.camera != 'none'))
    return DiT(replace(PRESETS[cfg.preset], camera=cfg.camera, sink=cfg.sink)).to(device)

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
    command_line(lambda cfg: main(cfg, 'base' if cfg.camera == 'none' else 'camera'), Config, __doc__)
