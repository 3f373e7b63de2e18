"""
Stage 0: a bidirectional video diffusion transformer learns to follow a camera.

In:  clips with poses (data/lowpoly, made if missing) and a base model (out/base.safetensors).
Out: out/camera.safetensors. With --camera none it trains that base model itself, a text-and-image-to-video
     model without cameras that stands in for Wan2.1: out/base.safetensors.

    python finetune_camera.py --camera none && python finetune_camera.py --sink True      # laptop
    torchrun --nproc_per_node=1 finetune_camera.py --preset small --batch 64              # one GPU
    torchrun --nproc_per_node=8 finetune_camera.py --preset small --batch 256             # eight

Different from minWM: 1) the pose enters as Plücker maps added to the input and as each frame's move added to
its time embedding, not as PRoPE; 2) with probability p_first frame 0 is given clean, so one model does
image-to-world and text-to-world; 3) text and camera are dropped at random, so both can be guided; 4) no
weight over t; 5) Muon and an EMA; 6) gradient accumulation is real.
"""
import time
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from camera import BadInput, Camera
from common import (Log, Meter, clip_gradients, command_line, describe, find_checkpoint, fixed_settings,
                    learning_rate, load_model, load_resume, make_optimizers, new_model, save_resume,
                    save_stage, score, setup, shard, sync_gradients, take_step, update_ema)
from data import batches, get_batch, open_clips, path_metrics, write_strip
from model import add_noise, empty_prompt, rebuilt, sample_clip, schedule, shift_time


@dataclass
class Config:
    # what
    preset: str = 'nano'          # model size, when there is no checkpoint to start from
    init: str = 'out/base.safetensors'
    camera: str = 'plucker'       # plucker | prope | plucker+prope | none: train the base model
    sink: bool = False            # learn to keep a walk's first frame (clips longer than --frames)
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
    drop_text: float = 0.1
    drop_camera: float = 0.1
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
    eval_every: int = 1200        # steps between evaluations; one is at the end anyway
    sample_steps: int = 16        # Euler steps of the evaluation

# -----------------------------------------------------------------------------
# the lesson: conditional flow matching with a camera (Lipman et al. 2022, eq. 23; one time per clip)

def loss_fn(model, cfg, batch):
    """Mean squared error of the velocity: (scalar, per-frame losses (B, F), their times (B, F))."""
    B, F = batch.x0.shape[:2]
    draws = batch.draws
    # 1) one noise level for all frames of a clip; high noise is drawn more often
    t = shift_time(draws.t[:, :1], model.cfg.shift).expand(B, F).clone()
    # 2) in some clips frame 0 is given: its time is 0, it stays clean, and it carries no loss
    given = torch.zeros(B, F, dtype=torch.bool, device=t.device)
    given[:, 0] = draws.first < cfg.p_first
    t[given] = 0
    x_t = add_noise(batch.x0, batch.eps, t)
    # 3) in some the prompt or the camera is dropped, so that a null branch exists for guidance
    keep_text = draws.drop_text >= cfg.drop_text
    text = torch.where(keep_text[:, None, None], batch.text, empty_prompt(batch.text, batch.null_text))
    camera = None
    if cfg.camera != 'none':
        camera = replace(batch.camera, on=draws.drop_camera >= cfg.drop_camera)
    # 4) the network predicts the velocity eps - x0
    v = model(x_t, t, text, camera)
    error = (v - (batch.eps - batch.x0)).square().mean((2, 3, 4))          # (B, F)
    loss = (error * ~given).sum(1) / (~given).sum(1)                       # (B,)
    return loss.mean(), error, t.masked_fill(given, -1)                    # -1: the log leaves them out

# -----------------------------------------------------------------------------
# evaluate: held-out clips, frame 0 given

@torch.inference_mode()
def evaluate(model, cfg, clips, device, strip=None):
    """Validation loss and, with a camera, PSNR to the true frames on the right path and on another clip's."""
    n = min(cfg.eval_clips, len(clips))
    batch = get_batch(clips, 0, n, cfg.frames, model.cfg, cfg.seed, device)
    loss, _, _ = loss_fn(model, cfg, batch)
    metrics = {'val_loss': loss.item()}
    truth = clips.truth(n, cfg.frames).to(device)                          # (n, F, H, W, 3)
    decode = clips.codec(device).decode
    times = schedule(cfg.sample_steps, model.cfg.shift)

    def generate(camera):
        return decode(sample_clip(model, batch.eps, batch.text, camera, times, batch.x0[:, :1]))

    video = generate(None if cfg.camera == 'none' else batch.camera)
    if cfg.camera != 'none':
        wrong = generate(Camera(batch.camera.c2w.roll(-1, 0), batch.camera.K))
        metrics |= path_metrics(video, wrong, truth)
    if strip:
        write_strip(strip, truth[:6], video[:6])
    return metrics


# -----------------------------------------------------------------------------
# the model: from --init; where the default is not there, from checkpoints/, else from scratch

def start_model(cfg, run):
    path = None if cfg.camera == 'none' else find_checkpoint(cfg.init, Config.init)
    if path:
        model, header = load_model(path, run.device)
        learned = model.cfg.camera
        run.say(f'start from {path}: {header["stage"]}, {header["step"]} steps, camera {learned}')
        if learned == 'none':
            model = rebuilt(model, camera=cfg.camera)                      # its weights are zero
        elif cfg.camera not in (Config.camera, learned):                   # the default: as it is
            if not set(cfg.camera.split('+')) < set(learned.split('+')):
                raise BadInput(f'--camera {cfg.camera}: {path} has learned {learned} already: name a base '
                               'model, --init')
            model = rebuilt(model, camera=cfg.camera)
            run.say(f'of its cameras only {cfg.camera} is kept')
        if cfg.sink:
            model.cfg.sink, model.cfg.eviction = True, 'chunks'            # as it is trained here
        return model
    if cfg.camera == 'none' and cfg.init not in (Config.init, 'none'):
        raise BadInput('--camera none trains from scratch: leave out --init')
    return new_model(cfg, Config.init, run, camera=cfg.camera, sink=cfg.sink)


def main(cfg):
    stage = 'base' if cfg.camera == 'none' else 'camera'
    run = setup(cfg)
    clips, held_out = open_clips(cfg, run)
    model = start_model(cfg, run)
    model.checkpoint = cfg.checkpoint
    net = shard(model, cfg.shard, compiled=cfg.compile)
    ema = {name: x.clone() for name, x in model.state_dict().items()}
    train(cfg, stage, run, net, ema, loss_fn, clips, held_out)

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
