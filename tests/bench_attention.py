"""Teacher-forcing attention, forward and backward: the dense mask against the loop over block rows, in one run.

    python tests/bench_attention.py
"""
import os
import statistics
import sys
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from model import block_row_attention, chunk_ids, teacher_forcing_mask
from test_model import dense_attention

torch.manual_seed(0)
print(f'{torch.get_num_threads()} threads; forward + backward, milliseconds, median of 15')
for name, B, frames, L, N, Dh in (('16 frames of 64 tokens', 1, 16, 64, 4, 64), ('nano: 9 frames of 16', 16, 9, 16, 3, 64)):
    for dtype in (torch.float32, torch.bfloat16):
        mask = teacher_forcing_mask(chunk_ids(frames, 1))
        q, k, v = (torch.randn(B, 2 * frames * L, N, Dh, dtype=dtype, requires_grad=True) for _ in range(3))
        dout, times = torch.randn_like(q), {dense_attention: [], block_row_attention: []}
        for i in range(18):
            for f in times:                                   # turn about, so that both see the same machine
                start = time.perf_counter()
                f(q, k, v, mask).backward(dout)
                times[f].append((time.perf_counter() - start) * 1e3)
        dense, rows = (statistics.median(t[3:]) for t in times.values())
        gap = (dense_attention(q, k, v, mask) - block_row_attention(q, k, v, mask)).abs().max()
        print(f'{name}, {str(dtype)[6:]:8s}: dense {dense:6.1f}, block rows {rows:6.1f}, ratio {dense / rows:.2f}, '
              f'largest difference {gap:.1e}')
