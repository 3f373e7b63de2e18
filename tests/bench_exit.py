"""
Self Forcing carries gradient through one random denoising step of each chunk. Against all of them: memory, time, result
of the same stage 3, from the same start.

    python tests/bench_exit.py out data/lowpoly-500             # folder with ode and camera.safetensors; folder of clips
"""
import resource
import subprocess
import sys
import time

import torch

from conftest import ROOT  # noqa: F401  (finds the scripts)
import distill_dmd
from camera import Camera, relative
from data import noise_for
from model import KVCache, load_tensors, schedule


def walk_through_all(model, cfg, batch, index):
    """distill_dmd.walk with every step of every chunk taken and differentiated; the cache still carries none."""
    noise, times = noise_for(index, batch.x0.shape[2:], batch.x0.device), schedule(cfg.student_steps, model.cfg.shift)
    B, n, _, H, W = batch.x0.shape
    camera, out = Camera(relative(batch.camera.c2w), batch.camera.K), []
    cache = KVCache(model.cfg, B, n, H * W // model.cfg.patch ** 2, batch.x0.device)
    for f in range(n):
        here = Camera(camera.c2w[:, f:f + 1], camera.K[:, f:f + 1], step=camera.step[:, f:f + 1])
        at = lambda t: torch.full((B, 1), t, device=batch.x0.device)
        x = noise(1) if f else batch.x0[:, :1]
        for t, t_next in zip(times[:-1].tolist(), times[1:].tolist()) if f else ():
            x = x - t * model(x, at(t), batch.text, here, cache=cache)
            x = (1 - t_next) * x + t_next * noise(1) if t_next else x
        with torch.no_grad():
            model(x.detach(), at(0.), batch.text, here, cache=cache)
        cache.end += 1
        out.append(x)
    return torch.cat(out, 1), 1, batch


if __name__ == '__main__':
    if sys.argv[1] in ('one', 'all'):                                         # one variant, in a process of its own
        which, start, data = sys.argv[1:]
        if which == 'all':
            distill_dmd.walk = walk_through_all
        began = time.time()
        distill_dmd.main(distill_dmd.Config(init=f'{start}/ode.safetensors', score=f'{start}/camera.safetensors', data=data, before=0, context=0.0, steps=40, lr=1e-4,
                                            out=f'{start}/exit-{which}'), 'dmd')
        m = load_tensors(f'{start}/exit-{which}/dmd.last.safetensors')[1]['metrics']
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == 'darwin' else 2 ** 10)
        print(f'ROW| {which} | {peak:.0f} | {time.time() - began:.0f} | ' + ' | '.join(
            f'{m[k]:.{d}f}' for k, d in (('psnr@1', 2), ('psnr@7', 2), ('gap@7', 2), ('sharpness', 2), ('motion', 2), ('fd', 3))) + ' |')
    else:
        print('| gradient through | peak MB | s | psnr@1 | psnr@7 | gap@7 | sharpness | motion | fd |\n' + '|---' * 9 + '|')
        for which in ('one', 'all'):
            text = subprocess.run([sys.executable, __file__, which, *sys.argv[1:]], check=True, capture_output=True, text=True).stdout
            print(text.split('ROW')[1].strip(), flush=True)
