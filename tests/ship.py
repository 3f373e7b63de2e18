"""
Copy trained checkpoints into checkpoints/ as bfloat16, with their headers, for the fresh clone.

    python tests/ship.py out/camera.safetensors out/ar.safetensors out/ode.safetensors out/dmd.safetensors
"""
import os
import sys

import torch

from conftest import ROOT
from model import load_tensors, save_tensors

if __name__ == '__main__':
    for path in sys.argv[1:]:
        tensors, header = load_tensors(path)
        out = os.path.join(ROOT, 'checkpoints', os.path.basename(path))
        save_tensors(out, {k: v.to(torch.bfloat16) for k, v in tensors.items()}, header)
        size = os.path.getsize(out) / 1e6
        assert size <= 8, f'{out}: {size:.1f} MB, at most 8 are wanted'
        print(f'{out}: {size:.1f} MB, stage {header["stage"]}, step {header["step"]}, seed {header["seed"]}, {header["command"]}')
