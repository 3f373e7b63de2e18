"""
Stage 1: the bidirectional camera model becomes a causal one, by teacher forcing.

In:  clips with poses (data/lowpoly, made if missing) and the camera model (out/camera.safetensors).
Out: out/ar.safetensors, which walks: python stream.py --ckpt out/ar.safetensors --keys "w*8,wl*8"

    python train_ar.py --encoder_blocks 4                                                 # laptop
    torchrun --nproc_per_node=1 train_ar.py --preset small --batch 64                     # one GPU
    torchrun --nproc_per_node=8 train_ar.py --preset small --batch 256                    # eight

Different from minWM: 1) the mask is by frames, read row by row on a CPU and by flex_attention on a GPU; 2)
the first chunk is one frame, so the model starts from a picture; 3) text and camera are dropped at random;
4) no weight over t; 5) the history is slightly noised, and with --drift it is the model's own; 6) Muon and an
EMA; 7) gradient accumulation is real; 8) --encoder_blocks: so many blocks run once a chunk (run.sh: 4 of 6).
"""
import time
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from camera import BadInput
from common import (Log, Meter, clip_gradients, command_line, describe, find_checkpoint, fixed_settings,
                    learning_rate, load_model, load_resume, make_optimizers, new_model, save_resume,
                    save_stage, score, setup, shard, sync_gradients, take_step, update_ema)
from data import Clips, batches, get_batch, noise_for, open_clips, path_metrics, write_strip
from model import (add_noise, chunk_ids, empty_prompt, rebuilt, rollout_clip, schedule, shift_time,
                   teacher_forced)


@dataclass
class Config:
    # what
    preset: str = 'nano'          # model size, when there is no checkpoint to start from
    init: str = 'out/camera.safetensors'
    chunk: int = 0                # frames denoised together, after a first one alone; 0: as the model is
    encoder_blocks: int = 0       # so many blocks run once a chunk, the rest at each step; 0: as the model is
    sink: bool = False            # learn to keep a walk's first frame (clips longer than --frames)
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
    context: float = 0.1          # noise level of a rollout's own history
    drift: float = 0.0            # share of the steps whose history the model has generated itself
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
    eval_every: int = 1900        # steps between evaluations; one is at the end anyway
    sample_steps: int = 8         # Euler steps of the evaluation

# -----------------------------------------------------------------------------
# the lesson: teacher forcing over [history | noisy] (Causal Forcing, section 3.1; one time per chunk)

def loss_fn(model, cfg, batch, history=None):
    """Mean squared error of the velocity: (scalar, per-frame losses (B, F), their times (B, F)).
    history (B, F, C, H, W): the frames that come before, if they are not the clip's own."""
    F = batch.x0.shape[1]
    draws = batch.draws
    # 1) one noise level per chunk, all independent: every chunk meets every level, whatever came before
    ids = chunk_ids(F, model.cfg.chunk, model.cfg.first_chunk)
    t = shift_time(draws.t[:, ids], model.cfg.shift)                       # (B, F)
    x_t = add_noise(batch.x0, batch.eps, t)
    # 2) the prompt or the camera is dropped in some clips
    keep_text = draws.drop_text >= cfg.drop_text
    text = torch.where(keep_text[:, None, None], batch.text, empty_prompt(batch.text, batch.null_text))
    camera = replace(batch.camera, on=draws.drop_camera >= cfg.drop_camera)
    # 3) the history is a little noisy and its times say so, since at inference the history has errors too.
    #    (The same eps is no leak: no chunk sees its own history)
    t_history = cfg.context_noise * draws.t_history[:, ids]
    history = batch.x0 if history is None else history
    past = replace(batch, x0=add_noise(history, batch.eps, t_history), text=text, camera=camera)
    # 4) the history and the noisy video, in one sequence if not split: same positions, same cameras.
    #    The mask (a diagram is in model.py) lets noisy chunk i see history chunks < i and itself
    v = teacher_forced(model, model.cfg, past, x_t, t, t_history)
    # 5) the loss is on all noisy frames, frame 0 included: it must be generated from the prompt alone
    error = (v - (batch.eps - batch.x0)).square().mean((2, 3, 4))          # (B, F)
    return error.mean(), error, t

# -----------------------------------------------------------------------------
# evaluate: rollouts along held-out paths, from their first frame

@torch.inference_mode()
def evaluate(model, cfg, clips, device, strip=None):
    """Validation loss, PSNR to the true frames on the right path and on another clip's."""
    n = min(cfg.eval_clips, len(clips))
    batch = get_batch(clips, 0, n, cfg.frames, model.cfg, cfg.seed, device)
    loss, _, _ = loss_fn(model, cfg, batch)
    metrics = {'val_loss': loss.item()}
    truth = clips.truth(n, cfg.frames).to(device)                          # (n, F, H, W, 3)
    decode = clips.codec(device).decode
    times = schedule(cfg.sample_steps, model.cfg.shift)

    def generate(c2w):
        noise = noise_for(range(n), batch.x0.shape[2:], device)
        return decode(rollout_clip(model, c2w, batch.camera.K, batch.text, times, noise, batch.x0[:, :1],
                                   window=cfg.frames, context=cfg.context))

    video = generate(batch.camera.c2w)
    wrong = generate(batch.camera.c2w.roll(-1, 0))
    metrics |= path_metrics(video, wrong, truth)
    if strip:
        write_strip(strip, truth[:6], video[:6])
    return metrics


# -----------------------------------------------------------------------------
# the model: from --init; where the default is not there, from checkpoints/, else from scratch

def start_model(cfg, run):
    path = find_checkpoint(cfg.init, Config.init)
    if path:
        model, header = load_model(path, run.device)
        run.say(f'start from {path}: {header["stage"]}, {header["step"]} steps')
    else:
        model = new_model(cfg, Config.init, run)
    if cfg.encoder_blocks:                     # a split network: the first blocks become its encoder
        if cfg.encoder_blocks >= model.cfg.num_layers:
            raise BadInput(f'--encoder_blocks {cfg.encoder_blocks}: the model has {model.cfg.num_layers} '
                           'blocks: leave some to the decoder')
        model = rebuilt(model, encoder_blocks=cfg.encoder_blocks, eviction='chunks')
    if cfg.chunk:
        model.cfg.chunk = cfg.chunk
        model.cfg.first_chunk = 1
    chunk_ids(cfg.frames, model.cfg.chunk, model.cfg.first_chunk)          # raises if it does not divide
    if cfg.sink:
        model.cfg.sink, model.cfg.eviction = True, 'chunks'                # as it is trained here
    return model


def main(cfg):
    run = setup(cfg)
    clips, held_out = open_clips(cfg, run)
    model = start_model(cfg, run)
    model.checkpoint = cfg.checkpoint
    net = shard(model, cfg.shard, compiled=cfg.compile)
    ema = {name: x.clone() for name, x in model.state_dict().items()}
    objective = loss_fn
    if cfg.drift:
        from papers.drift import Drift
        objective = Drift(cfg, loss_fn)
        clips = Clips(cfg.data, keys=objective.keys)
    train(cfg, 'ar', run, net, ema, objective, clips, held_out)

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
