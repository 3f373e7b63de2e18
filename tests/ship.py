"""
Copy trained checkpoints into checkpoints/ as bfloat16, with their headers, for the fresh clone; and, of a folder of clips whose
world cannot be rendered there, 8 held-out ones to start walks from, into assets/.

    python tests/ship.py out/camera.safetensors out/ar.safetensors out/ode.safetensors out/dmd.safetensors
    python tests/ship.py data/doom
"""
import json
import os
import sys

import torch

from conftest import ROOT
from data import load_manifest
from model import load_tensors, save_tensors


def ship_checkpoint(path):
    tensors, header = load_tensors(path)
    out = os.path.join(ROOT, 'checkpoints', os.path.basename(path))
    save_tensors(out, {k: v.to(torch.bfloat16) for k, v in tensors.items()}, header)
    size = os.path.getsize(out) / 1e6
    assert size <= 8, f'{out}: {size:.1f} MB, at most 8 are wanted'
    print(f'{out}: {size:.1f} MB, stage {header["stage"]}, step {header["step"]}, seed {header["seed"]}, {header["command"]}')


def ship_clips(folder, clips=8, frames=9):
    manifest, out = load_manifest(folder), os.path.join(ROOT, 'assets', os.path.basename(folder.rstrip('/')))
    name = next(s['file'] for s in manifest['shards'] if s['file'].startswith('val'))
    tensors, header = load_tensors(f'{folder}/{name}')
    save_tensors(f'{out}/{name}', {k: v[:clips] if k == 'K' else v[:clips, :frames] for k, v in tensors.items()},
                 {'captions': header['captions'][:clips]})
    manifest['shards'] = [{'file': name, 'clips': clips}]
    with open(f'{out}/manifest.json', 'w') as f:
        json.dump(manifest, f, indent=1)
    print(f'{out}: {clips} clips of {frames} frames')


if __name__ == '__main__':
    for path in sys.argv[1:]:
        (ship_clips if os.path.isdir(path) else ship_checkpoint)(path)
