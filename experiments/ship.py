"""
How do trained files get into the repository? Checkpoints are copied into checkpoints/ as bfloat16, with their
headers. Of a folder of clips whose world a fresh clone cannot render, 8 held-out clips are copied into
assets/, to start rollouts from.

    python -m experiments.ship out/camera.safetensors out/ar.safetensors out/ode.safetensors
    python -m experiments.ship data/doom

Prints a line for each: its size and what it is. Seconds.
"""
import os
import sys

import torch

from common import load_tensors, save_tensors, write_json
from data import load_manifest

MOST = 8                              # MB of a checkpoint


def ship_checkpoint(path):
    tensors, header = load_tensors(path)
    out = os.path.join('checkpoints', os.path.basename(path))
    half = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_tensors(out, half, header)
    size = os.path.getsize(out) / 1e6
    if size > MOST:
        sys.exit(f'error: {out}: {size:.1f} MB, at most {MOST} are wanted')
    print(f'{out}: {size:.1f} MB, stage {header["stage"]}, step {header["step"]}, seed {header["seed"]}, '
          f'{header["command"]}')


def ship_clips(folder, clips=8, frames=9):
    manifest = load_manifest(folder)
    out = os.path.join('assets', os.path.basename(folder.rstrip('/')))
    shards = [shard['file'] for shard in manifest['shards']]
    name = next(file for file in shards if file.startswith('val'))
    tensors, header = load_tensors(f'{folder}/{name}')
    part = {key: tensor[:clips] for key, tensor in tensors.items()}
    for key in ('frames', 'latents', 'c2w'):                       # the others are of the whole clip
        part[key] = part[key][:, :frames]
    save_tensors(f'{out}/{name}', part, {'captions': header['captions'][:clips]})
    manifest['shards'] = [{'file': name, 'clips': clips}]
    write_json(f'{out}/manifest.json', manifest)
    print(f'{out}: {clips} clips of {frames} frames')


if __name__ == '__main__':
    for path in sys.argv[1:]:
        if os.path.isdir(path):
            ship_clips(path)
        else:
            ship_checkpoint(path)
