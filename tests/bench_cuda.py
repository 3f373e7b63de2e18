"""
Wan2.1's 1.3 B network on one GPU, random weights, 20 latents of 480 x 832 in chunks of 4: memory and time of a teacher-forced
training step, of a stage-3 update and of a streamed chunk, beside what is computed (as tests/h100.py does).

    python tests/bench_cuda.py               # or stream, forced, dmd
"""
import dataclasses
import itertools
import sys
import time

import torch

from h100 import CHUNK, GIB, F, H, W
import distill_dmd
import train_ar
from camera import Camera
from data import Batch
from model import PRESETS, DiT, flops, forced_flops, rollout, schedule

L, D, PEAK, DEVICE = H * W // 256, PRESETS['wan-1.3b'].dim, 989e12, torch.device('cuda')


def network(layers, dtype=torch.float32):
    torch.set_default_dtype(dtype)
    with DEVICE:
        model = DiT(dataclasses.replace(PRESETS['wan-1.3b'], num_layers=layers, first=CHUNK, camera='prope'))
    torch.set_default_dtype(torch.float32)
    model.checkpoint = True
    return model


def clip():
    with DEVICE:
        pose, K = torch.eye(4).expand(1, F, 4, 4), torch.tensor([.5, .87, .5, .5]).expand(1, F, 4)
        x = torch.randn(2, 1, F, 16, H // 8, W // 8)
        return Batch(x[0], Camera(pose, K), torch.randn(1, 512, 4096), x[1], torch.rand(1, 2 * F + 4), ('',))


def measure(name, computed, state, step, params, times=3):
    """Prints a row: seconds of the fastest of some steps, arithmetic a second, memory at its peak beside what is computed."""
    torch.cuda.reset_peak_memory_stats()
    took = []
    for _ in range(times):
        torch.cuda.synchronize()
        start = time.time()
        step()
        torch.cuda.synchronize()
        took.append(time.time() - start)
    s = min(took)
    print(f'| {name} | {params / 1e9:.2f} | {s:.2f} | {computed / 1e12:.0f} | {computed / s / PEAK:.0%} | '
          f'{torch.cuda.max_memory_allocated() / GIB:.1f} | {state / GIB:.1f} | {took[0]:.1f} |', flush=True)
    return took


def forced():
    model, batch, cfg = network(30), clip(), train_ar.Config()
    P, opt = sum(p.numel() for p in model.parameters()), torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step():
        with torch.autocast('cuda', torch.bfloat16):
            loss = train_ar.loss_fn(model, cfg, batch)[0]
        loss.backward()
        opt.step()
        opt.zero_grad(set_to_none=True)
    measure('teacher-forced step', 4 * forced_flops(model.cfg, F, L), 16 * P + 16 * F * L * D * 30, step, P)


def dmd(layers=18):
    nets = {k: network(layers) for k in ('generator', 'real', 'fake')}
    nets['real'].requires_grad_(False)
    c, P = nets['fake'].cfg, sum(p.numel() for p in nets['fake'].parameters())
    cfg, batch = distill_dmd.Config(frames=F, before=0, p_first=0.), clip()
    opts = {k: torch.optim.AdamW(nets[k].parameters(), lr=1e-6, betas=(0., .999), fused=True) for k in ('generator', 'fake')}
    updates = itertools.count()

    def learn(name, loss_of, *given):
        with torch.autocast('cuda', torch.bfloat16):
            loss, *more = loss_of(nets, cfg, batch, *given)
        loss.backward()
        opts[name].step()
        opts[name].zero_grad(set_to_none=True)
        return more

    def step():
        _, walked = learn('generator', distill_dmd.generator_loss, [(0, next(updates), 0)])
        learn('fake', distill_dmd.critic_loss, walked)
    full, call = flops(c, F, L, F), sum(flops(c, CHUNK, L, CHUNK * (i + 1)) for i in range(F // CHUNK))
    measure(f'stage 3, one update of each, {layers} layers', 3.5 * call + 3 * call + 3 * full + 4 * full,
            36 * P + (8 + 8) * F * L * D * layers, step, P)


@torch.inference_mode()
def stream(steps=4):
    model, batch = network(30, torch.bfloat16), clip()
    P, text = sum(p.numel() for p in model.parameters()), batch.text
    camera = Camera(batch.camera.c2w[:, :CHUNK], batch.camera.K[:, :CHUNK])
    chunks = rollout(model, iter(lambda: camera, None), text, schedule(steps, 5.), lambda n: torch.randn(1, n, 16, H // 8, W // 8, device=DEVICE),
                     window=F, renoise=True)
    cache = 8 * 30 * F * L * D
    took = measure(f'a streamed chunk of {CHUNK} latents, {steps} steps, bf16', (steps + 1) * flops(model.cfg, CHUNK, L, F),
                   2 * P + cache, lambda: next(chunks), P, times=12)
    took = sorted(took[6:])                                                   # the window is full
    print(f'\nFull window: {took[len(took) // 2]:.2f} s a chunk, {4 * CHUNK / took[len(took) // 2]:.1f} pictures a second.')


if __name__ == '__main__':
    print(torch.cuda.get_device_name(), torch.__version__)
    print('| | parameters, B | s | TFLOP | of 989 TFLOP/s | peak GiB | computed GiB | first, s |\n|---|---|---|---|---|---|---|---|')
    for part in sys.argv[1:] or ('stream', 'forced', 'dmd'):
        globals()[part]()
        torch.cuda.empty_cache()
