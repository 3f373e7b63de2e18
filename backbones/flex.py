"""
Attention under a frame mask by torch's flex_attention, which skips forbidden blocks: training on a GPU.
"""
import functools

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from model import mask_rows


@functools.lru_cache(maxsize=16)
def flex_mask(rows, Lq, Lk, device):
    """A mask's rows in flex_attention's own form."""
    mask = torch.tensor(rows, device=device)

    def allowed(batch, head, query, key):
        return mask[query // Lq, key // Lk]
    return create_block_mask(allowed, None, None, mask.shape[0] * Lq, mask.shape[1] * Lk, device)


def flex_joint_mask(valid, rows, L):
    """The same for frames of L tokens that see words, of which there are `valid` (B, T), and frames."""
    B, T = valid.shape
    mask = torch.tensor(rows, device=valid.device)

    def allowed(batch, head, query, key):
        word = valid[batch, key.clamp(max=T - 1)]
        frame = mask[query // L, (key - T).clamp(min=0) // L]
        return torch.where(key < T, word, frame)
    queries, frames = mask.shape
    size = queries * L, T + frames * L
    compiled = valid.is_cuda                       # else it makes a matrix of all pairs
    return create_block_mask(allowed, B, None, *size, valid.device, _compile=compiled)


@functools.cache
def flex_kernel(device_type):
    return torch.compile(flex_attention, dynamic=False) if device_type == 'cuda' else flex_attention


def flex_frame_attention(q, k, v, mask):
    """dense_attention by flex_attention, which skips forbidden blocks on a GPU; mask may be a `flex_mask`."""
    if not isinstance(mask, BlockMask):
        rows = mask_rows(mask)
        Lq = q.shape[1] // len(rows)
        Lk = k.shape[1] // len(rows[0])
        mask = flex_mask(rows, Lq, Lk, q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return flex_kernel(q.device.type)(q, k, v, block_mask=mask).transpose(1, 2)
