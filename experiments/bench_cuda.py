"""
Does one GPU reach what experiments/h100.py computes? Wan2.1's 1.3 B network with random weights, 20 latents
of 480 x 832 in chunks of 4: a streamed chunk, a teacher-forced training step, an update of stage 3.

    python -m experiments.bench_cuda             # or some of: stream split forced dmd

split: streamed chunks of networks of experiments/split_arithmetic.py, dense and split, in 4, 2 and 1 steps.
Prints a row for each: seconds of the fastest of some steps, arithmetic a second, and memory at its peak
beside what is computed. Needs 80 GB of GPU memory; some minutes.
"""
import itertools
import sys
import time
from dataclasses import replace

import torch

import distill_dmd
import train_ar
from backbones.layouts import flops, forced_flops
from camera import Camera
from data import Batch, Draws
from experiments.h100 import CHUNK, FRAMES, GIB, HEIGHT, TOKENS, WIDTH
from experiments.split_arithmetic import DECODER, ENCODER, STEPS, work
from model import PRESETS, DiT, rollout, schedule
from papers.scd import concatenate

PEAK = 989e12                         # floating-point operations a second of an H100 in bfloat16
LAYERS = PRESETS['wan-1.3b'].num_layers
DIM = PRESETS['wan-1.3b'].dim
DEVICE = torch.device('cuda')


def network(layers, dtype=torch.float32, encoder_blocks=0, camera='prope'):
    """The network with so many of its layers, random weights, activation checkpointing on."""
    cfg = replace(PRESETS['wan-1.3b'], num_layers=layers, first_chunk=CHUNK, camera=camera,
                  encoder_blocks=encoder_blocks)
    torch.set_default_dtype(dtype)
    with DEVICE:
        model = DiT(cfg)
    torch.set_default_dtype(torch.float32)
    model.checkpoint = True
    return model


def size(model):
    return sum(p.numel() for p in model.parameters())


def random_batch():
    """One clip of noise, seen by a camera that stands still."""
    with DEVICE:
        latents = torch.randn(2, 1, FRAMES, 16, HEIGHT // 8, WIDTH // 8)
        pose = torch.eye(4).expand(1, FRAMES, 4, 4)
        K = torch.tensor([.5, .87, .5, .5]).expand(1, FRAMES, 4)
        text = torch.randn(1, 512, 4096)
        draws = Draws(torch.rand(1, 2 * FRAMES + 4))
    return Batch(latents[0], Camera(pose, K), text, latents[1], draws, ('',))


def measure(name, computed, state, step, parameters, times=3):
    """Run step() some times and print a row; return all the seconds. computed: floating-point operations of
    a step; state: bytes that it needs."""
    torch.cuda.reset_peak_memory_stats()
    took = []
    for _ in range(times):
        torch.cuda.synchronize()
        start = time.time()
        step()
        torch.cuda.synchronize()
        took.append(time.time() - start)
    best = min(took)
    peak = torch.cuda.max_memory_allocated()
    print(f'| {name} | {parameters / 1e9:.2f} | {best:.2f} | {computed / 1e12:.0f} | '
          f'{computed / best / PEAK:.0%} | {peak / GIB:.1f} | {state / GIB:.1f} | {took[0]:.1f} |',
          flush=True)
    return took


def learn(loss, optimizer):
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def forced():
    """A training step of stage 1, AdamW."""
    model = network(LAYERS)
    parameters = size(model)
    batch = random_batch()
    cfg = train_ar.Config()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step():
        with torch.autocast('cuda', torch.bfloat16):
            loss, *_ = train_ar.loss_fn(model, cfg, batch)
        learn(loss, optimizer)

    computed = 4 * forced_flops(model.cfg, FRAMES, TOKENS)
    state = 16 * parameters + 16 * FRAMES * TOKENS * DIM * LAYERS
    measure('teacher-forced step', computed, state, step, parameters)


def dmd(layers=18):
    """One update of the generator and one of the fake score; three networks of all layers would not fit."""
    nets = {name: network(layers) for name in ('generator', 'real', 'fake')}
    nets['real'].requires_grad_(False)
    net_cfg = nets['fake'].cfg
    parameters = size(nets['fake'])
    cfg = distill_dmd.Config(frames=FRAMES, before=0, p_first=0.)
    batch = random_batch()
    optimizers = {}
    for name in ('generator', 'fake'):
        optimizers[name] = torch.optim.AdamW(nets[name].parameters(), lr=1e-6, betas=(0., .999), fused=True)
    updates = itertools.count()

    def step():
        index = [(0, next(updates), 0)]
        with torch.autocast('cuda', torch.bfloat16):
            loss, _, rolled_out = distill_dmd.generator_loss(nets, cfg, batch, index)
        learn(loss, optimizers['generator'])
        with torch.autocast('cuda', torch.bfloat16):
            loss = distill_dmd.critic_loss(nets, cfg, batch, rolled_out)
        learn(loss, optimizers['fake'])

    full = flops(net_cfg, FRAMES, TOKENS, FRAMES)
    calls = sum(flops(net_cfg, CHUNK, TOKENS, end) for end in range(CHUNK, FRAMES + 1, CHUNK))
    computed = 3.5 * calls + 3 * calls + 3 * full + 4 * full
    state = 36 * parameters + (8 + 8) * FRAMES * TOKENS * DIM * layers
    measure(f'stage 3, one update of each, {layers} layers', computed, state, step, parameters)


@torch.inference_mode()
def stream_chunks(model, name, computed, steps, times=12):
    """Chunks of a rollout in bfloat16, until its window is full and beyond. computed: operations a chunk."""
    parameters = size(model)
    batch = random_batch()
    camera = batch.camera.frames(slice(0, CHUNK))

    def noise(n):
        return torch.randn(1, n, 16, HEIGHT // 8, WIDTH // 8, device=DEVICE)

    cameras = itertools.repeat(camera)
    chunks = rollout(model, cameras, batch.text, schedule(steps, 5.), noise, window=FRAMES, renoise=True)
    layers = model.cfg.cached_blocks
    attentions = 2 if 'prope' in model.cfg.camera else 1
    cache = 4 * attentions * layers * FRAMES * TOKENS * DIM        # keys and values
    state = 2 * parameters + cache
    name = f'{name}, a streamed chunk of {CHUNK} latents, {steps} steps, bf16'
    took = measure(name, computed, state, lambda: next(chunks), parameters, times=times)
    full = sorted(took[6:])                                        # the window is full
    median = full[len(full) // 2]
    print(f'\nFull window: {median:.2f} s a chunk, {4 * CHUNK / median:.1f} pictures a second.\n')


def stream():
    model = network(LAYERS, torch.bfloat16)
    stream_chunks(model, 'dense', work('prope', 'dense', 4), 4)


def split():
    """Dense and split networks, with PRoPE and with Plücker maps."""
    for camera in ('prope', 'plucker'):
        for kind in ('dense', 'concatenated', 'added'):
            if kind == 'dense':
                model = network(LAYERS, torch.bfloat16, camera=camera)
            else:
                model = network(ENCODER + DECODER, torch.bfloat16, ENCODER, camera)
            if kind == 'concatenated':
                concatenate(model)
            for steps in STEPS:
                computed = work(camera, kind, steps)
                stream_chunks(model, f'{camera}, {kind}', computed, steps, times=10)


PARTS = {'stream': stream, 'split': split, 'forced': forced, 'dmd': dmd}

if __name__ == '__main__':
    print(torch.cuda.get_device_name(), torch.__version__)
    print('| | parameters, B | s | TFLOP | of 989 TFLOP/s | peak GiB | computed GiB | first, s |')
    print('|---|---|---|---|---|---|---|---|')
    for part in sys.argv[1:] or PARTS:
        PARTS[part]()
        torch.cuda.empty_cache()
