"""
How fast is a checkpoint? Random keys, as fast as it goes, one path: frames a second, latency, memory.

    python -m experiments.bench --ckpt out/ar.safetensors --out out/bench.json

Prints the numbers and writes them as JSON. Latency is from the moment a key is received to the frame's bytes.
floor_ratio says how many times longer a frame takes than its matrix products alone would. The first 20 chunks
are left out.
"""
import os
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.benchmark import Timer

from backbones.layouts import chunk_flops
from camera import BadInput, Camera, apply_keys, make_pose
from common import check_folder, command_line, write_json
from data import noise_for
from model import rollout
from stream import held_out, prepare, sampler, to_uint8

WARM = 20                             # chunks that are not counted


@dataclass
class Config:
    ckpt: str = 'checkpoints/dmd.safetensors'
    out: str = 'out/bench.json'
    clip: int = 0                 # held-out clip to start from
    frames: int = 0               # 0: 2,100
    # sampling, as in stream.py
    steps: int = 0                # steps a chunk; 0: 8 of Euler, or 4 for a distilled model
    guidance: float = 1.0         # 1: none
    over: str = 'camera'          # what guidance drops: camera | text
    window: int = 0               # frames the cache holds; 0: as trained
    context: float = -1.0         # noise level of the generated history; -1: as distilled
    seed: int = 0
    data: str = ''                # folder of the held-out clips; not needed for lowpoly and doom
    device: str = 'auto'
    dtype: str = 'float32'        # float32 | bfloat16


def random_cameras(cfg, m, K, device, received):
    """A Camera for each chunk, moved by random keys, for ever. Appends the time of the keys to `received`."""
    rng = np.random.default_rng(cfg.seed)
    state = (0., 0., 0.), 0., 0.                                   # position, yaw, pitch
    n = m.first_chunk
    while True:
        received.append(time.perf_counter())
        poses = []
        for _ in range(n):
            state = apply_keys(*state, rng.choice(['w', 'l', 'j', 'wl', 'wj']))
            position, yaw, pitch = (torch.tensor(x, dtype=torch.float32) for x in state)
            poses.append(make_pose(position, yaw, pitch))
        c2w = torch.stack(poses)[None]                             # (1, n, 4, 4)
        yield Camera(c2w.to(device), K[:, None].expand(-1, n, -1).to(device))
        n = m.chunk


def floor_seconds(flop, device, dtype):
    """How long so many operations take at the speed of one large matrix product."""
    a = torch.randn(1024, 1024, device=device, dtype=dtype)
    product = Timer('a @ a', globals={'a': a}, num_threads=torch.get_num_threads())
    seconds = min(product.timeit(1).mean for _ in range(10))
    return flop / (2 * 1024 ** 3) * seconds


def peak_megabytes(device):
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated() / 2 ** 20
    try:
        import resource                                            # not on Windows
    except ImportError:
        return float('nan')
    unit = 2 ** 20 if sys.platform == 'darwin' else 2 ** 10        # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


@torch.inference_mode()
def bench(model, cfg, header, codec, device):
    """The timings of one checkpoint, as a dict."""
    recipe, m = header['data']['recipe'], model.cfg
    H, W = recipe['height'], recipe['width']
    frames = max(cfg.frames or 2100, 50 * m.chunk)
    began = time.perf_counter()
    world, captions = held_out(cfg, header, [cfg.clip])
    text = codec.embed(captions, m).to(device)
    noise = noise_for([cfg.seed], (m.in_dim, H // codec.across, W // codec.across), device)
    first = None
    if m.first_chunk == 1:
        first = codec.encode(world['frames'][:, :1]).to(device)
    options = sampler(cfg, header, m.shift)
    decode = codec.stream()

    received, done, decoder = [], [], []                           # seconds, for each chunk
    cameras = random_cameras(cfg, m, world['K'], device, received)
    for z in rollout(model, cameras, text, noise=noise, first_frame=first, **options):
        start = time.perf_counter()
        to_uint8(decode(z)).tobytes()
        done.append(time.perf_counter())
        decoder.append(done[-1] - start)
        if len(done) * m.chunk >= frames:
            break

    latency = (np.array(done) - np.array(received[:len(done)])) * 1e3          # milliseconds
    per_frame = np.diff(done)[WARM:].mean() / m.chunk
    per_frame_decoder = np.mean(decoder[WARM:]) / m.chunk

    def latency_near(frame):
        chunk = frame // m.chunk
        return float(np.median(latency[max(1, chunk - 40):chunk + 40]))

    tokens = H * W // codec.across ** 2 // m.patch ** 2
    flop = chunk_flops(m, cfg.steps, tokens, .75 * options['window']) / m.chunk
    if cfg.guidance != 1:                                          # two branches
        flop *= 2
    dtype = next(model.parameters()).dtype
    return dict(
        fps=1 / per_frame,
        fps_denoiser=1 / (per_frame - per_frame_decoder),
        latency_ms_p50=float(np.percentile(latency[WARM:], 50)),
        latency_ms_p95=float(np.percentile(latency[WARM:], 95)),
        latency_growth=latency_near(len(done) * m.chunk - 100) / latency_near(100),
        first_frame_s=float(done[1] - began),
        peak_mb=peak_megabytes(device),
        floor_ratio=per_frame / floor_seconds(flop, device, dtype),
        device=f'{device}, {torch.get_num_threads()} threads',
        dtype=str(dtype),
        height=H,
        width=W,
        steps=cfg.steps,
        chunk=m.chunk,
    )


def main(cfg):
    if cfg.frames == 1:
        raise BadInput('--frames 1: at least 2, or 0 for the usual')
    model, header, codec, device = prepare(cfg)
    check_folder(os.path.dirname(cfg.out) or '.')                  # complain before the work
    timings = bench(model, cfg, header, codec, device)
    write_json(cfg.out, timings)
    for name, value in timings.items():
        print(f'{name:20s}', f'{value:.4g}' if isinstance(value, float) else value)


if __name__ == '__main__':
    command_line(main, Config, __doc__)
