"""
Stage 3: the few-step causal model learns from its own walks, by asymmetric distribution matching (DMD) with self-rollout.

In:  clips (only their first frames, poses and captions are used) and three networks:
Out: out/dmd.safetensors, the best by score, and out/dmd.last.safetensors. Walk with either in 4, 2 or 1 steps.

    network      starts from                      trained?    causal?    learning rate
    generator    out/ode.safetensors (stage 2)    yes         yes        --lr
    real score   --score (stage 0, trained on)    no          no         -
    fake score   the same                         yes         no         --critic_lr

    python distill_dmd.py                                                                 # laptop
    torchrun --nproc_per_node=1 distill_dmd.py --batch 64                                 # one GPU
    torchrun --nproc_per_node=8 distill_dmd.py --batch 64                                 # eight

Different from minWM: 1) both scores are told the true time; 2) masters in float32; 3) the data's frame 0 is given, without
gradient or loss; 4) the fake score learns from the generator's own walk, not from walks anew; 5) gradients are averaged by hand.
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
from data import Clips, frechet, get_batch, make, motion, noise_for, psnr, sharpness, write_strip
from data import Config as DataConfig
from model import (DiT, add_noise, attention_path, chunk_ids, clip_gradients, command_line, gate, learning_rate, load_model,
                   load_resume, load_tensors, pick_device, rollout, sample_clip, save_model, save_resume, schedule, shard,
                   shift_time, teacher_forced, update_ema, v_to_x0, walk_clip, whole, without)


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
    critic: int = 4               # updates of the fake score, upon the same walk, for one of the generator
    # optimizer
    lr: float = 1e-4
    critic_lr: float = 1e-3
    warmup: int = 10              # steps
    decay: float = 0.5            # last fraction of the steps, over which both lr fall to 0
    clip: float = 1.0             # gradient norm, of each network
    ema: float = 0.97
    ema_start: int = 0            # generator updates before the average begins
    # objective
    student_steps: int = 4        # steps of a rollout's schedule
    guidance: float = 1.0         # of the real score (1: none)
    over: str = 'camera'          # what guidance drops: camera | text
    p_first: float = 1.0          # how often the data's frame 0 is given; else it is dreamt too
    context: float = 0.2          # noise level of a walk's own history
    before: int = 24              # up to so many frames are walked before those that the scores see
    rollout: str = 'self'         # self | teacher: upon the true history, for comparison
    # run
    seed: int = 0
    device: str = 'auto'          # auto | cpu | cuda
    dtype: str = 'auto'           # compute: auto (on a CPU float32) | float32 | bfloat16
    shard: str = 'ddp'            # several processes: ddp | fsdp, which splits the weights of all three networks
    offload: bool = False         # fsdp: the frozen real score waits in the processor's memory
    checkpoint: bool = False      # keep one activation a block and compute the others again
    log_every: int = 10           # steps between log lines
    save_every: int = 50          # steps between resume checkpoints
    eval_clips: int = 64          # held-out clips of the evaluation, all at once
    eval_every: int = 20          # steps between evaluations, which choose the best

# -----------------------------------------------------------------------------
# the lesson: distribution matching on self-rollouts (DMD: Yin et al. 2024, eq. 7; Self Forcing, algorithm 1)

def there_and_back(n, length):
    """Frame indices (length,) that walk a clip of n frames to its end, back to its start, and on: a longer path."""
    i = torch.arange(length) % max(1, 2 * n - 2)
    return torch.minimum(i, 2 * n - 2 - i)


def walk(model, cfg, batch, index):
    """A rollout of the generator along the batch's cameras: its last cfg.frames frames (B, F, C, H, W), how many of them
    are given, and the batch as those frames see it. All chunks stop at one random step, whose call carries the gradient
    if it is enabled. Up to cfg.before frames are walked first, so that the generator meets histories as imperfect as those
    of a long walk. index: (seed, update, sample) for each clip; what the clips share depends on (seed, update), so all
    processes agree."""
    rng, m, n = np.random.default_rng([8, *index[0][:2]]), model.cfg, cfg.frames
    exit_step, given = int(rng.integers(cfg.student_steps)), m.first * int(rng.random() < cfg.p_first)
    before = m.chunk * int(rng.integers(cfg.before // m.chunk + 1))
    noise, times = noise_for(index, batch.x0.shape[2:], batch.x0.device), schedule(cfg.student_steps, m.shift)
    path, grad = there_and_back(batch.x0.shape[1], before + n), torch.is_grad_enabled()
    c2w, K = batch.camera.c2w[:, path], batch.camera.K[:, path]
    kept = [0] * m.sink + [*range(before + m.sink, before + n)]             # the window at the walk's end
    jump = jumps(batch.camera.c2w)
    step = steps(c2w[:, kept], jump=m.sink & ((before > 0) | jump))
    seen = replace(batch, x0=batch.x0[:, path[kept]], eps=batch.eps[:, :n], camera=Camera(relative(c2w[:, kept]), K[:, kept], step=step))
    if cfg.rollout == 'self':
        sizes, frames = torch.bincount(chunk_ids(before + n, m.chunk, m.first)).tolist(), []
        cameras = (Camera(a, b) for a, b in zip(c2w.split(sizes, 1), K.split(sizes, 1)))
        chunks = rollout(model, cameras, batch.text, times, noise, batch.x0[:, :given] if given else None, window=n,
                         renoise=True, exit_step=exit_step, context=cfg.context, jump=jump)
        for i in range(len(sizes)):
            with torch.set_grad_enabled(grad and sum(sizes[:i]) >= before):
                frames.append(next(chunks))
        return torch.cat(frames, 1)[:, kept], 0 if before and not m.sink else given, seen
    x = noise(n)                                                              # all chunks at once, upon the true history
    for i in range(exit_step + 1):
        t = times[i].expand(x.shape[:2]).to(x.device)
        with torch.set_grad_enabled(grad and i == exit_step):
            x0 = v_to_x0(x, teacher_forced(model, m, seen, x, t), t)
        x = add_noise(x0, noise(n), torch.full_like(t, times[i + 1].item()))
    return torch.cat([seen.x0[:, :given], x0[:, given:]], 1), given, seen


def noised(x, batch, shift, given):
    """x at one random time for each clip, and its times (B, F); given frames stay clean, at t = 0."""
    t = shift_time(batch.u[:, :1], shift).clamp(.02, .98).expand(x.shape[:2]).clone()
    t[:, :given] = 0
    return add_noise(x, batch.eps[:, :x.shape[1]], t), t


def dmd_gradient(x, x_t, t, batch, real, fake, guidance, given=0, over='camera'):
    """(x0_fake - x0_real) / mean |x - x0_real|, the mean over the frames of a clip that are not given: up to a positive
    factor the gradient in x of KL(rollouts || data). Guidance, over a dropped camera or prompt, is the real score's alone."""
    v = real(x_t, t, batch.text, batch.camera)
    if guidance != 1:
        null = real(x_t, t, *without(over, batch.text, batch.camera))
        v = null + guidance * (v - null)
    real_x0, fake_x0 = v_to_x0(x_t, v, t), v_to_x0(x_t, fake(x_t, t, batch.text, batch.camera), t)
    return (fake_x0 - real_x0) / (x - real_x0)[:, given:].abs().mean((1, 2, 3, 4), keepdim=True)


def generator_loss(nets, cfg, batch, index):
    """(loss, mean size of the gradient, the walk)."""
    # 1) rollout: the generator walks upon its own frames
    x, given, batch = walk(nets['generator'], cfg, batch, index)
    with torch.no_grad():
        # 2) noise: one time for each clip
        x_t, t = noised(x, batch, nets['generator'].cfg.shift, given)
        # 3) two scores, at that very time: of the data, and of the generator's own walks
        # 4) gradient: towards the data's, away from its own
        grad = dmd_gradient(x, x_t, t, batch, nets['real'], nets['fake'], cfg.guidance, given, cfg.over)
    loss = .5 * (x - (x - grad).detach())[:, given:].square().mean()
    return loss, grad[:, given:].abs().mean(), (x.detach(), given, batch)


def critic_loss(nets, cfg, batch, walked):
    """5) critic: the fake score follows the generator, by flow matching on its walk, with the batch's own noise and time."""
    x, given, seen = walked
    x_t, t = noised(x, batch, nets['fake'].cfg.shift, given)
    v = nets['fake'](x_t, t, seen.text, seen.camera)
    return (v - (batch.eps[:, :x.shape[1]] - x))[:, given:].square().mean(),

# -----------------------------------------------------------------------------
# evaluate: walk held-out paths in a few steps. The gate before: has the real score anything to teach?

def vigour(walk, truth):
    """Sharpness and motion of generated frames relative to the truth's, both (n, F, H, W, 3)."""
    return {'sharpness': (sharpness(walk[:, 1:]).mean() / sharpness(truth[:, 1:]).mean()).item(), 'motion': (motion(walk).mean() / motion(truth).mean()).item()}


def numbers(walk, truth):
    """Of walks (n, F, H, W, 3) against the truth as the codec shows it. score (the less, the better) chooses the checkpoint:
    the Fréchet distance, whose features are mostly colours, and what it hardly sees, blur and standing still."""
    p, last, v = psnr(walk, truth).mean(0).tolist(), min(7, truth.shape[1] - 1), vigour(walk, truth)
    fd = frechet(walk[:, 1:].flatten(0, 1), truth[:, 1:].flatten(0, 1))
    return {'psnr@1': p[1], f'psnr@{last}': p[last], **v, 'fd': fd, 'score': fd + .1 * sum(abs(1 - x) for x in v.values())}


@torch.inference_mode()
def evaluate(model, cfg, clips, device, strip=None, bidirectional=False, before=0):
    """The numbers of held-out walks: of the student in a few steps, or of the real score, whole clips in 16."""
    n = min(cfg.eval_clips, len(clips))
    batch = get_batch(clips, 0, n, cfg.frames, model.cfg, cfg.seed, device, whole=before > 0)
    path = there_and_back(batch.x0.shape[1], before + cfg.frames)
    decode, c2w, K = clips.codec(device).decode, batch.camera.c2w[:, path], batch.camera.K[:, path]
    truth = decode(batch.x0[:, path])
    if bidirectional:
        return numbers(decode(sample_clip(model, batch.eps, batch.text, batch.camera, schedule(16, model.cfg.shift), batch.x0[:, :1])), truth)

    def generate(c2w):
        noise = noise_for([(cfg.seed, i) for i in range(n)], batch.x0.shape[2:], device)
        return decode(walk_clip(model, c2w, K[:, :c2w.shape[1]], batch.text, schedule(cfg.student_steps, model.cfg.shift), noise, batch.x0[:, :1],
                                window=cfg.frames, renoise=True, context=cfg.context))
    last, near = min(7, truth.shape[1] - 1), cfg.frames if cfg.frames > 7 else c2w.shape[1]
    walk, wrong = generate(c2w), generate(c2w.roll(-1, 0)[:, :near])              # near: in whole chunks, as far as it is scored
    metrics = numbers(walk, truth)
    metrics |= {f'gap@{last}': metrics[f'psnr@{last}'] - psnr(wrong, truth[:, :wrong.shape[1]]).mean(0)[last].item(),
                f'psnr@{truth.shape[1] - 1}': psnr(walk, truth).mean(0)[-1].item()}
    if strip:
        write_strip(strip, truth[:6], walk[:6], most=cfg.frames)
    return metrics

# -----------------------------------------------------------------------------
# the three networks: from --init and --score; where a default is not there, from checkpoints/

def start_nets(cfg, device, say):
    def find(path, role):
        for p in (path, os.path.join('checkpoints', os.path.basename(path)))[:1 + (path in (Config.init, Config.score))]:
            if os.path.exists(p):
                model, header = load_model(p, device)
                say(f'{role} from {p}: {header["stage"]}, {header["step"]} steps')
                return model
        raise BadInput(f'{path}: no such file: the {role} needs it, run the stage before first')
    nets = {'generator': find(cfg.init, 'generator'), 'real': find(cfg.score, 'real score'), 'fake': find(cfg.score, 'fake score')}
    nets['real'].requires_grad_(False)
    chunk_ids(cfg.frames, nets['generator'].cfg.chunk, nets['generator'].cfg.first)                 # raises if it does not divide
    if cfg.rollout not in ('self', 'teacher'):
        raise BadInput(f'--rollout {cfg.rollout}: choose self or teacher')
    return nets


def step_on(loss_of, net, opt, cfg, world):
    """One optimizer step on loss_of(i), summed over micro-batches and averaged over processes; (losses, gradient norm)."""
    out = []
    for i in range(cfg.accum):
        loss, *more = loss_of(i)
        (loss / cfg.accum).backward()
        out.append([loss.detach(), *more])
    params = [p for p in net.parameters() if p.grad is not None]
    if world > 1 and cfg.shard == 'ddp':                                      # whose hooks would not see a rollout's many calls
        for p in params:
            dist.all_reduce(p.grad.div_(world))
    norm = clip_gradients(params, cfg.clip)
    opt.step()
    opt.zero_grad(set_to_none=True)
    return out, norm

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

    # -------------------------------------------------------------------------
    # networks, optimizers, resume
    if cfg.dtype == 'auto' and device.type == 'cpu':
        dtype = torch.float32                  # a walk's calls are small: autocast's casts take longer than bfloat16 saves
    nets = start_nets(cfg, device, say)
    nets['generator'].checkpoint = nets['fake'].checkpoint = cfg.checkpoint
    path, best = f'{cfg.out}/{stage}', float('inf')
    if rank == 0 and not os.path.exists(f'{path}.resume.safetensors'):          # is there anything to teach?
        real, student = (evaluate(nets[k], cfg, held_out, device, bidirectional=k == 'real') for k in ('real', 'generator'))
        ok = real['fd'] < student['fd'] and abs(1 - real['sharpness']) < abs(1 - student['sharpness'])
        say(f'gate before: {"PASS" if ok else "FAIL"} real score, 16 steps: fd {real["fd"]:.3f}, sharpness '
            f'{real["sharpness"]:.2f}; student: fd {student["fd"]:.3f}, sharpness {student["sharpness"]:.2f}'
            + '\n  DMD pulls the student towards the real score: train the stage-0 model longer' * (not ok))
    for name, net in nets.items() if world > 1 and cfg.shard != 'ddp' else ():
        shard(net, cfg.shard, cfg.offload and name == 'real')
    model, both = nets['generator'], torch.nn.ModuleDict({k: nets[k] for k in ('generator', 'fake')})
    optimizers = [torch.optim.AdamW(nets[k].parameters(), lr=lr, betas=(0., .999), weight_decay=.01, fused=True)
                  for k, lr in (('generator', cfg.lr), ('fake', cfg.critic_lr))]
    config = {k: v for k, v in asdict(cfg).items() if k not in ('device', 'accum', 'shard', 'offload', 'checkpoint', 'log_every', 'save_every')}
    ema = {k: v.clone() for k, v in model.state_dict().items()}
    start = load_resume(f'{path}.resume.safetensors', both, ema, optimizers, config, say)
    if rank == 0 and start and os.path.exists(f'{path}.safetensors'):
        header = load_tensors(f'{path}.safetensors')[1]
        best = header['metrics']['score'] if header['step'] <= start else best
    tokens = held_out.read(0)[0][0, 0].numel() // model.cfg.patch ** 2
    say(f'{stage}: 3 x {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {tokens} tokens a frame, '
        f'effective batch {cfg.batch} = {world} x {cfg.accum} x {micro}, {device}, {dtype}, '
        f'{attention_path(device, dtype)}, {len(clips)} clips')
    if rank == 0:
        lines = open(f'{path}.jsonl').read().split('\n')[:-1] if start and os.path.exists(f'{path}.jsonl') else []
        log = open(f'{path}.jsonl', 'w', buffering=1)                        # a line at a time
        log.writelines(line + '\n' for line in lines if json.loads(line)['step'] <= start)

    def run(update, name, loss_fn, walked=None):
        """Update number `update` of the run, on its own clips and noise, or its own noise and what was walked."""
        def loss_of(i):
            first = (rank * cfg.accum + i) * micro
            batch = get_batch(clips, update * cfg.batch + first, micro, cfg.frames, replace(model.cfg, sink=False), cfg.seed, device, whole=cfg.before > 0)
            index = [(cfg.seed, update, j) for j in range(first, first + micro)]
            if hasattr(model, 'unshard'):
                model.unshard()                                               # rollout embeds cameras outside of a forward pass
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                return loss_fn(nets, cfg, batch, walked[i] if walked else index)
        return step_on(loss_of, nets[name], optimizers[name == 'fake'], cfg, world)

    # -------------------------------------------------------------------------
    # loop
    sums, began = [], time.time()
    bar = tqdm(range(start, cfg.steps), initial=start, total=cfg.steps, desc=stage, disable=rank > 0)
    for step in bar:
        for opt, lr in zip(optimizers, (cfg.lr, cfg.critic_lr)):
            for group in opt.param_groups:
                group['lr'] = learning_rate(step, cfg.steps, lr, cfg.warmup, cfg.decay)
        n = step * (1 + cfg.critic)
        out, norm = run(n, 'generator', generator_loss)
        update_ema(ema, model, cfg.ema if step >= cfg.ema_start else 0, step)
        walked = [walk for *_, walk in out]
        critic = [run(n + 1 + i, 'fake', critic_loss, walked) for i in range(cfg.critic)]
        dream, truth = (clips.codec(device).decode(torch.cat(x)) for x in zip(*((x, seen.x0) for x, _, seen in walked)))
        sums.append([sum(o[0] for o in out).item() / cfg.accum, sum(o[1] for o in out).item() / cfg.accum, norm,
                     np.mean([o[0].item() for c, _ in critic for o in c]), np.mean([g for _, g in critic]),
                     *vigour(dream, truth).values()])
        if (step + 1) % cfg.log_every == 0 or step + 1 == cfg.steps:
            names, mean = ('loss', 'gap', 'norm', 'critic', 'critic_norm', 'sharpness', 'motion'), torch.tensor(np.mean(sums, 0), device=device)
            if world > 1:
                dist.all_reduce(mean.div_(world))
            line = dict(step=step + 1, **dict(zip(names, mean.tolist())), lr=optimizers[0].param_groups[0]['lr'],
                        ms=(time.time() - began) * 1e3 / len(sums), batch=cfg.batch)
            if rank == 0:
                tqdm.write(f'{stage} {step + 1:6d} | loss {line["loss"]:.4f} gap {line["gap"]:.3f} norm {line["norm"]:6.3f} | '
                           f'critic {line["critic"]:.4f} norm {line["critic_norm"]:6.3f} | sharpness {line["sharpness"]:.2f} '
                           f'motion {line["motion"]:.2f} | lr {line["lr"]:.1e} | {line["ms"]:6.0f} ms')
                log.write(json.dumps(line) + '\n')
            sums, began = [], time.time()
        last = step + 1 == cfg.steps
        state = {k: whole(v) for k, v in ema.items()} if (step + 1) % cfg.eval_every == 0 or last else None
        if rank == 0 and state:
            student = DiT(model.cfg).to(device)
            student.load_state_dict(state)
            metrics = evaluate(student, cfg, held_out, device, f'{path}.png', before=cfg.before // model.cfg.chunk * model.cfg.chunk)
            tqdm.write(f'{stage} {step + 1:6d} | ' + ', '.join(f'{k} {v:.3f}' for k, v in metrics.items()))
            log.write(json.dumps(dict(step=step + 1, **metrics)) + '\n')
            for name in [path] * (metrics['score'] < best) + [f'{path}.last'] * last:
                save_model(f'{name}.safetensors', state, model.cfg, stage=stage, step=step + 1, seed=cfg.seed, metrics=metrics,
                           frames=cfg.frames, context=cfg.context, data=held_out.manifest, command=' '.join(sys.argv))
            best = min(best, metrics['score'])
        if (step + 1) % cfg.save_every == 0 or last:
            save_resume(f'{path}.resume.safetensors', both, ema, optimizers, step + 1, config)

    # -------------------------------------------------------------------------
    # gate
    if rank == 0:
        header = load_tensors(f'{path}.safetensors')[1]
        print(f'{path}.safetensors, step {header["step"]}:', ', '.join(f'{k} {v:.3f}' for k, v in header['metrics'].items()))
        print(gate(stage, cfg.preset, header['metrics']))
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == '__main__':
    command_line(lambda cfg: main(cfg, 'dmd'), Config, __doc__)
