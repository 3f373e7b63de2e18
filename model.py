"""
The video diffusion transformer of Wan2.1 made causal, steerable and small enough to read, and its rollout.

Conventions, used in every file:
- Letters: B batch, F latent frames, C channels, H W latent height and width, L tokens per frame, D width, N heads,
  Dh head dim; K only for camera intrinsics. Video latents are always (B, F, C, H, W).
- Time t is in [0, 1], 0 clean, 1 noise, one per frame (B, F): x_t = (1 - t) x0 + t eps, the network predicts
  v = eps - x0, so x0 = x_t - t v. A frame with t = 0 is given. Wan's timestep is 1000 t; only `sinusoid` knows it.
- A chunk is the frames denoised together. A clip is the chunks (1, c, c, ...), or (c, c, ...) as in minWM.
- A mask is a (frames x frames) bool matrix, rows query, columns key, passed explicitly; nothing is guessed.
- Cameras: see camera.py. Poses reach the network twice: relative to frame 0 of its sequence and to the frame before.

Different from Wan2.1: times are per frame; camera terms (zero at the start) are added to the input and to the time
embedding; the rotary product is in float32 (its angles in float64); a cache holds the prompt's keys and values too.
Names, shapes and mathematics of the weights are Wan's, so its checkpoints load as they are.
"""
import argparse
import copy
import functools
import glob
import json
import math
import os
import pickle
import re
import sys
import zlib
from dataclasses import asdict, dataclass, fields, replace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import distribute_tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from camera import BadInput, Camera, invert, plucker, relative, steps, true_or_false

try:
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None


@dataclass
class ModelConfig:
    dim: int = 192
    ffn_dim: int = 512
    num_heads: int = 3
    num_layers: int = 6
    in_dim: int = 16
    out_dim: int = 16
    freq_dim: int = 256
    text_dim: int = 64
    text_len: int = 16
    eps: float = 1e-6
    patch: int = 2                # Wan's patch_size (1, 2, 2)
    camera: str = 'plucker'       # how the pose enters: plucker | prope | plucker+prope | none
    camera_freqs: int = 3         # octaves of the Plücker maps' Fourier features
    chunk: int = 1                # frames denoised together
    first: int = 1                # frames in the first chunk: 1, or `chunk` as in minWM
    shift: float = 4.0            # time schedule: more noise for more tokens a frame
    sink: bool = False            # a walk's first frame stays in the window (StreamingLLM, LongLive)


PRESETS = {                       # parameters: 0.1 M (for tests), 3.4 M, 3.7 M, 1.42 B, 14.3 B without the camera
    'tiny': ModelConfig(dim=48, ffn_dim=96, num_heads=1, num_layers=2),
    'nano': ModelConfig(),
    'small': ModelConfig(dim=192, ffn_dim=640, num_heads=3, num_layers=6),
    'wan-1.3b': ModelConfig(1536, 8960, 12, 30, text_dim=4096, text_len=512, chunk=4, shift=5.0),
    'wan-14b': ModelConfig(5120, 13824, 40, 40, text_dim=4096, text_len=512, chunk=4, shift=5.0),
}

# -----------------------------------------------------------------------------
# time: flow matching helpers (Lipman et al. 2022; Wan's schedule)

def shift_time(u, shift):
    """Uniform u in [0, 1] -> t = s u / (1 + (s - 1) u) (SD3, eq. 23). Shift 1 leaves u as it is."""
    return shift * u / (1 + (shift - 1) * u)


def schedule(steps, shift):
    """The steps + 1 times of a sampler, 1 down to 0, float32: uniform, then shifted. schedule(4, 5) is Wan's list."""
    return shift_time(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).float()


def add_noise(x0, eps, t):
    """x_t (B, F, C, H, W) for times t (B, F)."""
    t = t[..., None, None, None]
    return (1 - t) * x0 + t * eps


def bell_weight(t):
    """minWM's weight of the loss at times t (its "bsmntw"): a bell about 1/2, 0 at t = 1, of mean 1 over shift 5's times."""
    bell = lambda t: torch.exp(-2 * (t - .5) ** 2) - math.exp(-.5)
    return bell(t) / bell(schedule(1000, 5.0)[:-1]).mean().item()


def v_to_x0(x_t, v, t):
    """The clean video that velocity v points to: x0 = x_t - t v."""
    return x_t - t[..., None, None, None] * v

# -----------------------------------------------------------------------------
# masks: (query frames x key frames), True where attention is allowed

def chunk_ids(frames, chunk, first=1):
    """Which chunk each frame belongs to: chunk_ids(7, 3) = [0, 1, 1, 1, 2, 2, 2]. Raises if it does not divide."""
    if frames < first or (frames - first) % chunk:
        raise BadInput(f'{frames} frames do not divide into a first chunk of {first} and chunks of {chunk}: use {first} + n * {chunk} frames')
    return torch.tensor([0] * first + [1 + i // chunk for i in range(frames - first)])


def causal_mask(ids):
    """Each frame sees its own chunk, in both directions, and all earlier ones."""
    return ids[:, None] >= ids[None, :]


def teacher_forcing_mask(ids):
    """For the sequence [clean | noisy]: clean sees clean up to its own chunk; noisy sees earlier clean chunks and
    its own noisy chunk. So every chunk learns to denoise given true history, all in one pass (Causal Forcing, 3.1).

          c0 c1 c2 n0 n1 n2
      c0   x  .  .  .  .  .
      c1   x  x  .  .  .  .
      c2   x  x  x  .  .  .
      n0   .  .  .  x  .  .
      n1   x  .  .  .  x  .
      n2   x  x  .  .  .  x
    """
    q, k = ids[:, None], ids[None, :]
    return torch.cat([torch.cat([q >= k, torch.zeros_like(q == k)], 1), torch.cat([q > k, q == k], 1)])

# -----------------------------------------------------------------------------
# captions, embedded without weights

@functools.lru_cache(maxsize=4096)
def _embed(caption, text_len, text_dim):
    out, angle = torch.zeros(text_len, text_dim), torch.arange(text_len)[:, None] / 100 ** (torch.arange(text_dim // 2) / (text_dim // 2))
    for i, (word, place) in enumerate(zip(caption.lower().split(), torch.cat([angle.cos(), angle.sin()], -1))):
        vector = np.random.default_rng(zlib.crc32(word.encode())).standard_normal(text_dim, dtype=np.float32)
        out[i] = torch.from_numpy(vector) + place
    return out


def embed_text(captions, text_len, text_dim):
    """Captions -> (B, text_len, text_dim): a fixed Gaussian vector per word (seeded by its CRC-32) plus a sinusoid of
    its place in the sentence. Zeros behind the last word; the empty caption is all zeros, the null prompt."""
    return torch.stack([_embed(caption, text_len, text_dim) for caption in captions])

# -----------------------------------------------------------------------------
# attention

def mask_rows(mask):
    """A frame mask as a tuple of tuples, which can be looked up; `DiT.forward` asks once, not in every layer."""
    return mask if isinstance(mask, tuple) else tuple(map(tuple, mask.tolist()))


@functools.lru_cache(maxsize=64)
def _block_rows(mask, Lq, Lk, dtype, device):
    """A mask (tuple of tuples) as a list of ((first, last + 1) query frames, [(first, last + 1) key frames, ...], bias). Equal rows
    go together, and others up to 64 tokens, since small products are slow; bias (queries, keys) is then -inf at those of their
    keys that a query must not see, else None."""
    rows, a = [], 0
    while a < len(mask):
        b = a + 1
        while b < len(mask) and (mask[b] == mask[b - 1] or (b + 1 - a) * Lq <= 64):
            b += 1
        part = torch.tensor(mask[a:b])
        seen = part.any(0)
        edges = F.pad(seen, (1, 1)).int().diff().nonzero().flatten().tolist()
        bias = torch.where(part[:, seen], 0, -torch.inf).to(device, dtype).repeat_interleave(Lq, 0).repeat_interleave(Lk, 1)
        rows.append(((a, b), list(zip(edges[::2], edges[1::2])), bias if bias.any() else None))
        a = b
    return rows


def _gather(x, frames, L):
    return torch.cat([x[:, :, a * L:b * L] for a, b in frames], 2) if len(frames) > 1 else x[:, :, frames[0][0] * L:frames[0][1] * L]


class BlockRowAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt Dh) v for (B, N, S, Dh) under a frame mask, by a loop over its rows: on a CPU that is the work of the
    allowed blocks only. The backward pass is written out because autograd's own would touch all of k and v once per row."""
    @staticmethod
    def forward(ctx, q, k, v, rows, Lq, Lk):
        out, probs, q = torch.empty_like(q), [], q * q.shape[-1] ** -0.5
        for (a, b), frames, bias in rows:
            scores = q[:, :, a * Lq:b * Lq] @ _gather(k, frames, Lk).mT
            probs.append((scores if bias is None else scores.add_(bias)).softmax(-1))
            torch.matmul(probs[-1], _gather(v, frames, Lk), out=out[:, :, a * Lq:b * Lq])
        ctx.save_for_backward(q, k, v, out, *probs)
        ctx.rows, ctx.Lq, ctx.Lk = rows, Lq, Lk
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout):
        (q, k, v, out, *probs), Lk = ctx.saved_tensors, ctx.Lk
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        delta = (dout * out).sum(-1, keepdim=True)             # sum_j p_ij dp_ij, the softmax's correction
        for ((a, b), frames, _), p in zip(ctx.rows, probs):
            i = slice(a * ctx.Lq, b * ctx.Lq)
            ds = (dout[:, :, i] @ _gather(v, frames, Lk).mT).sub_(delta[:, :, i]).mul_(p)
            torch.matmul(ds, _gather(k, frames, Lk), out=dq[:, :, i])
            dk_row, dv_row = ds.mT @ q[:, :, i], p.mT @ dout[:, :, i]
            sizes = [(y - x) * Lk for x, y in frames]
            for (x, y), dk_part, dv_part in zip(frames, dk_row.split(sizes, 2), dv_row.split(sizes, 2)):
                dk[:, :, x * Lk:y * Lk] += dk_part
                dv[:, :, x * Lk:y * Lk] += dv_part
        return dq.mul_(q.shape[-1] ** -0.5), dk, dv, None, None, None


def block_row_attention(q, k, v, mask):
    """Attention (B, S, N, Dh) under a frame mask (or its `mask_rows`), by BlockRowAttention."""
    mask = mask_rows(mask)
    Lq, Lk = q.shape[1] // len(mask), k.shape[1] // len(mask[0])
    rows, (q, k, v) = _block_rows(mask, Lq, Lk, q.dtype, q.device), (x.transpose(1, 2) for x in (q, k, v))
    if torch.is_grad_enabled():
        with torch.autocast(q.device.type, enabled=False):
            return BlockRowAttention.apply(q.contiguous(), k.contiguous(), v.contiguous(), rows, Lq, Lk).transpose(1, 2)
    return torch.cat([F.scaled_dot_product_attention(q[:, :, a * Lq:b * Lq], _gather(k, frames, Lk), _gather(v, frames, Lk), bias)
                      for (a, b), frames, bias in rows], 2).transpose(1, 2)


@functools.lru_cache(maxsize=16)
def flex_mask(mask, Lq, Lk, device):
    """A frame mask (a tuple of tuples, so that it can be cached) in flex_attention's own form."""
    m = torch.tensor(mask, device=device)
    return create_block_mask(lambda b, h, i, j: m[i // Lq, j // Lk], None, None, m.shape[0] * Lq, m.shape[1] * Lk, device)


_flex = functools.cache(lambda kind: torch.compile(flex_attention, dynamic=False) if kind == 'cuda' else flex_attention)


def flex_frame_attention(q, k, v, mask):
    """The same by flex_attention, which skips the masked blocks on a GPU; mask may be a `flex_mask`."""
    if not isinstance(mask, BlockMask):
        mask = mask_rows(mask)
        mask = flex_mask(mask, q.shape[1] // len(mask), k.shape[1] // len(mask[0]), q.device)
    return _flex(q.device.type)(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask).transpose(1, 2)


def attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt Dh) v for (B, S, N, Dh); mask (Fq, Fk) bool over frames (or its `mask_rows` or `flex_mask`) or None for all."""
    if isinstance(mask, BlockMask) or mask is not None and not all(map(all, mask_rows(mask))):
        # flex compiles anew for every mask, and a walk's are all different
        return (flex_frame_attention if q.is_cuda and torch.is_grad_enabled() else block_row_attention)(q, k, v, mask)
    if flash_attn_func and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        return flash_attn_func(q, k, v)
    if q.device.type == 'cpu' and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
        return block_row_attention(q, k, v, ((True,),))                      # sdpa's backward takes 3 to 5 times as long
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def attention_path(device, dtype):
    """Which kernels `attention` uses, for the line that scripts print at start."""
    cuda, half = torch.device(device).type == 'cuda', dtype in (torch.float16, torch.bfloat16)
    return ('flash-attn' if cuda and flash_attn_func and half else 'sdpa') + ', masked: ' + ('flex_attention' if cuda else 'block rows')


class KVCache:
    """Keys and values of a growing window of frames, preallocated. `end` frames are final; a forward pass with the
    cache writes its frames behind them, and repeating it (the next denoising step) overwrites the same place.

    k, v: per layer (B, frames * L, N, Dh), and as many again for the second attention of PRoPE, which must not share them.
    text: per layer the prompt's keys and values, filled at first use. gone: frames that `roll` has dropped; sink: frame 0's old keys.
    Where gradient is enabled it is only read: to fill it, run the network under torch.no_grad()."""
    def __init__(self, cfg, B, frames, L, device, dtype=torch.float32):
        kind = torch.device(device).type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
        shape = cfg.num_layers * (1 + ('prope' in cfg.camera)), B, frames * L, cfg.num_heads, cfg.dim // cfg.num_heads
        self.k, self.v = torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype)
        self.frames, self.L, self.end, self.gone = frames, L, 0, 0
        self.text, self.sink = [None] * cfg.num_layers, None

    def update(self, layer, k, v):
        """Write this pass's k, v (B, n L, N, Dh) behind the final frames; return all keys and values so far."""
        a = self.end * self.L
        b = a + k.shape[1]
        if b > self.frames * self.L:
            raise BadInput(f'a window of {self.frames} frames is too small: use at least {b // self.L}')
        if torch.is_grad_enabled():                            # self-rollout: gradient must not reach the past
            return torch.cat([self.k[layer, :, :a], k], 1), torch.cat([self.v[layer, :, :a], v], 1)
        self.k[layer, :, a:b], self.v[layer, :, a:b] = k, v
        return self.k[layer, :, :b], self.v[layer, :, :b]

    def roll(self, n, sink=False):
        """Drop the oldest n frames. The others keep their positions (only differences matter); a sink, frame 0, stays and moves on."""
        a, b, layers = sink * self.L, (sink + n) * self.L, len(self.text)
        self.k, self.v = (torch.cat([x[:, :, :a], x[:, :, b:], x[:, :, a:b]], 2) for x in (self.k, self.v))
        self.end, self.gone = self.end - n, self.gone + n      # new tensors: checkpointed blocks may still read the old ones
        if sink:                                               # from where it stood at first: rounding does not add up
            self.sink = self.k[:layers, :, :a].clone() if self.sink is None else self.sink
            self.k[:layers, :, :a] = rotate(self.sink, rotary_table((self.gone,), 1, 1, self.k.shape[-1], self.k.device))

# -----------------------------------------------------------------------------
# the transformer, under Wan2.1's parameter names

def sinusoid(t, dim):
    """Times (B, F) in [0, 1] -> (B, F, dim): [cos | sin] of 1000 t, angles in float64."""
    angle = 1000 * t.double()[..., None] * 10000 ** (-torch.arange(dim // 2, device=t.device).double() / (dim // 2))
    return torch.cat([angle.cos(), angle.sin()], -1).float()


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)                                  # a table made while streaming may serve training
def rotary_table(pos, h, w, Dh, device):
    """Unit complex numbers (len(pos) h w, 1, Dh / 2), complex64, for frames at positions `pos` of an h x w grid.

    Dh / 2 is shared by frame, row and column as in Wan, each axis with its own spectrum of base 10000."""
    spectrum = lambda n: 10000 ** (-torch.arange(0, n, 2, dtype=torch.float64) / n)
    n = 2 * (Dh // 6)
    f = torch.tensor(pos, dtype=torch.float64)[:, None] * spectrum(Dh - 2 * n)
    y, x = (torch.arange(s, dtype=torch.float64)[:, None] * spectrum(n) for s in (h, w))
    angle = torch.cat([f[:, None, None].expand(-1, h, w, -1), y[None, :, None].expand(len(pos), -1, w, -1), x[None, None].expand(len(pos), h, -1, -1)], -1)
    return torch.polar(torch.ones_like(angle), angle).flatten(0, 2)[:, None].to(device, torch.complex64)


def rotate(x, table):
    """Rotate the pairs (x[2j], x[2j+1]) of (B, S, N, Dh) by a rotary table."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


def project(x, M):
    """Each frame's matrix M (B, F, 4, 4) on the groups of 4 channels of its tokens, x (B, S, N, Dh)."""
    with torch.autocast(x.device.type, enabled=False):
        return (x.float().reshape(len(x), M.shape[1], -1, 4) @ M.mT).view(x.shape).to(x.dtype)


class RMSNormFunction(torch.autograd.Function):
    """Normalised in float32, cast back, then scaled, as in Wan; the backward pass by hand touches the tensors less often than autograd's."""
    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square() / x.shape[-1] + eps)
        y = (x * scale).to(x.dtype)
        ctx.save_for_backward(y, scale, weight)
        return y * weight.to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        y, scale, weight = ctx.saved_tensors
        w, gy = weight.to(g.dtype), g * y
        dx = torch.addcmul(g * w, y, (gy @ w / len(w))[..., None], value=-1).mul_(scale.to(g.dtype))
        return dx, gy.sum((0, 1)).to(weight.dtype), None


class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        return RMSNormFunction.apply(x, self.weight, self.eps) if torch.is_grad_enabled() or x.dtype != torch.float32 else super().forward(x)


class Attention(nn.Module):
    def __init__(self, cfg, prope=False):
        super().__init__()
        D = cfg.dim
        self.N, self.layers = cfg.num_heads, cfg.num_layers
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(D, cfg.eps), RMSNorm(D, cfg.eps)   # over all heads together
        if prope:
            self.prope_o = nn.Linear(D, D)

    def heads(self, x):
        return x.unflatten(-1, (self.N, -1))                                 # (B, S, N, Dh)

    def keys_values(self, x):
        return self.heads(self.norm_k(self.k(x))), self.heads(self.v(x))

    def self_attention(self, x, table, lens, mask, cache, layer, ask):
        if torch.is_autocast_enabled(x.device.type):                          # once for q, k and v
            x = x.to(torch.get_autocast_dtype(x.device.type))
        q, (k, v) = self.heads(self.norm_q(self.q(x[:, -ask:] if ask else x))), self.keys_values(x)   # (B, S, N, Dh); q of `ask`

        def attend(q, k, v, layer):
            if cache is not None:
                k, v = cache.update(layer, k, v)                              # (B, all so far, N, Dh)
            return attention(q, k, v, mask)
        y = self.o(attend(rotate(q, table[-q.shape[1]:]).to(v.dtype), rotate(k, table).to(v.dtype), v, layer).flatten(-2))
        if not lens:
            return y
        P, inverse = lens                                                     # PRoPE: q^T P_q P_k^-1 k, and values alike
        P = P[:, -(P.shape[1] * q.shape[1] // x.shape[1]):]
        z = attend(project(q, P.mT).to(v.dtype), project(k, inverse).to(v.dtype), project(v, inverse), layer + self.layers)
        z = self.prope_o(project(z, P).flatten(-2))
        return y + (z.unflatten(1, (P.shape[1], -1)) * P[..., 3:, 3:]).flatten(1, 2).to(y.dtype)       # 0: camera dropped

    def cross_attention(self, x, text, cache, layer):
        keep = cache is not None and not torch.is_grad_enabled()
        kv = keep and cache.text[layer] or self.keys_values(text)
        if keep:
            cache.text[layer] = kv
        q = self.heads(self.norm_q(self.q(x)))
        return self.o(attention(q.to(kv[1].dtype), kv[0].to(kv[1].dtype), kv[1]).flatten(-2))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        D = cfg.dim
        self.norm1, self.norm2 = (nn.LayerNorm(D, cfg.eps, elementwise_affine=False) for _ in range(2))
        self.norm3 = nn.LayerNorm(D, cfg.eps)
        self.self_attn, self.cross_attn = Attention(cfg, 'prope' in cfg.camera), Attention(cfg)
        self.ffn = nn.Sequential(nn.Linear(D, cfg.ffn_dim), nn.GELU('tanh'), nn.Linear(cfg.ffn_dim, D))
        self.modulation = nn.Parameter(torch.randn(1, 6, D) / D ** 0.5)

    def forward(self, x, e0, text, table, lens, mask, cache, layer, last=None):
        B, S, D = x.shape                                                     # last: how many frames, the last, are asked for
        L = S // e0.shape[1]
        frames = lambda y: y.view(B, -1, L, D)                                # (B, S, D) -> (B, F, L, D)
        m = (self.modulation + e0).unsqueeze(3).unbind(2)                     # 6 x (B, F, 1, D)
        y = torch.addcmul(m[0], frames(self.norm1(x)), 1 + m[1]).view(B, S, D)
        y = self.self_attn.self_attention(y, table, lens, mask, cache, layer, last and last * L)
        x = frames(x)
        if last:
            x, m, S = x[:, -last:], [part[:, -last:] for part in m], last * L
        x = torch.addcmul(x, frames(y).to(x.dtype), m[2]).view(B, S, D)
        x = x + self.cross_attn.cross_attention(self.norm3(x), text, cache, layer)
        y = self.ffn(torch.addcmul(m[3], frames(self.norm2(x)), 1 + m[4]).view(B, S, D))
        return torch.addcmul(frames(x), frames(y).to(x.dtype), m[5]).view(B, S, D)


class Head(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.norm = nn.LayerNorm(cfg.dim, cfg.eps, elementwise_affine=False)
        self.head = nn.Linear(cfg.dim, cfg.patch ** 2 * cfg.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, cfg.dim) / cfg.dim ** 0.5)

    def forward(self, x, e):                                                  # (B, F, L, D), (B, F, D)
        shift, scale = (self.modulation + e[:, :, None]).unsqueeze(3).unbind(2)
        return self.head(self.norm(x) * (1 + scale) + shift)


class DiT(nn.Module):
    """The network v(x_t, t, text, camera). One class is bidirectional, causal, teacher-forced or cached: that is up
    to the mask, the positions and the cache it is called with."""
    def __init__(self, cfg):
        super().__init__()
        self.cfg, D = cfg, cfg.dim
        self.patch_embedding = nn.Conv3d(cfg.in_dim, D, (1, cfg.patch, cfg.patch), (1, cfg.patch, cfg.patch))
        self.text_embedding = nn.Sequential(nn.Linear(cfg.text_dim, D), nn.GELU('tanh'), nn.Linear(D, D))
        self.time_embedding = nn.Sequential(nn.Linear(cfg.freq_dim, D), nn.SiLU(), nn.Linear(D, D))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.num_layers))
        self.head = Head(cfg)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        zero = [self.head.head, self.time_projection[1], *(b.self_attn.prope_o for b in self.blocks if 'prope' in cfg.camera)]
        if not {*cfg.camera.split('+')} < {'none', 'plucker', 'prope'}:
            raise BadInput(f'--camera {cfg.camera}: choose plucker, prope, plucker+prope or none')
        if 'plucker' in cfg.camera:                     # no bias: a dropped camera is exactly a zero map
            self.camera_embedding = nn.Linear(12 * (1 + 2 * cfg.camera_freqs) * cfg.patch ** 2, D, bias=False)
            self.camera_motion = nn.Linear(12, D, bias=False)
            zero += [self.camera_embedding, self.camera_motion]
        for layer in zero:
            nn.init.zeros_(layer.weight)
        self.checkpoint = False

    def embed_camera(self, camera, H, W):
        """What the network is told of a Camera, float32, for latents of H x W: Plücker, added to the tokens (B, S, D) and to
        the time embedding (B, F, D); PRoPE, a projection P and its inverse (B, F, 4, 4). The same at every denoising step,
        so `rollout` makes it once a chunk."""
        p, device, told = self.cfg.patch, camera.c2w.device, ()
        on = 1.0 if camera.on is None else camera.on.view(-1, 1, 1).float()
        with torch.autocast(device.type, enabled=False):
            if 'plucker' in self.cfg.camera:
                rays = torch.cat([plucker(c2w, camera.K, H, W) for c2w in (camera.c2w, camera.step)], 2)   # (B, F, 12, H, W)
                waves = [math.pi * 2 ** k * rays for k in range(self.cfg.camera_freqs)]
                rays = torch.cat([rays, *(w.sin() for w in waves), *(w.cos() for w in waves)], 2)
                rays = on * rearrange(rays, 'b f c (h p) (w q) -> b (f h w) (c p q)', p=p, q=p)
                # the move since the last frame, scaled to about 1, modulates every block
                move = 10 * (camera.step - torch.eye(4, device=device))[..., :3, :].flatten(2)
                told = F.linear(rays, self.camera_embedding.weight.float()), F.linear(move * on, self.camera_motion.weight.float())
            if 'prope' in self.cfg.camera:              # focal lengths without the principal point, as minWM
                focal = F.pad(camera.K[..., :2], (0, 2), value=1.0).float()
                told += (on if isinstance(on, float) else on[..., None]) * focal[..., None] * invert(camera.c2w), camera.c2w / focal[..., None, :]
        return told

    def forward(self, x, t, text, camera=None, mask=None, pos=None, cache=None, last=None):
        """Velocity v (B, F, C, H, W), float32, of x (B, F, C, H, W) at times t (B, F).

        text (B, text_len, text_dim) zero-padded and, as in Wan, not masked; camera: Camera of the F frames, or what
        embed_camera made of it, or None; mask (F, keys) bool or None for all; pos: F positions, by default from cache.end;
        last: give only the velocities of that many frames, the last"""
        B, n, C, H, W = x.shape
        p, h, w = self.cfg.patch, H // self.cfg.patch, W // self.cfg.patch
        dtype = self.patch_embedding.weight.dtype
        start = cache.gone + cache.end if cache is not None else 0
        pos = tuple(range(start, start + n)) if pos is None else tuple(pos)
        mask = mask if mask is None else mask_rows(mask)
        table = rotary_table(pos, h, w, self.cfg.dim // self.cfg.num_heads, x.device)

        patches = rearrange(x.to(dtype), 'b f c (h p) (w q) -> b (f h w) (c p q)', p=p, q=p)
        x = F.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)   # (B, S, D)
        with torch.autocast(x.device.type, enabled=False):                   # the residual stream and times stay fp32
            x = x.to(dtype)
            e = self.time_embedding(sinusoid(t, self.cfg.freq_dim).to(dtype))         # (B, F, D)
            told = self.embed_camera(camera, H, W) if isinstance(camera, Camera) else camera or ()
            if told and 'plucker' in self.cfg.camera:
                x, e = x + told[0].to(dtype), e + told[1].to(dtype)
            e0 = self.time_projection(e).unflatten(-1, (6, -1))                       # (B, F, 6, D)
        if cache is None or cache.text[0] is None or torch.is_grad_enabled():
            text = self.text_embedding(text.to(dtype))                       # (B, text_len, D)
        again = self.checkpoint and torch.is_grad_enabled()
        cache = copy.copy(cache) if again else cache                         # as it is now, for when the blocks compute again
        for i, block in enumerate(self.blocks):
            ask = last if i + 1 == len(self.blocks) else None                # the last block leaves out what only others would see
            seen = mask and mask[-(ask or 0):]
            if seen and x.is_cuda and torch.is_grad_enabled() and not all(map(all, seen)):
                seen = flex_mask(seen, h * w, h * w, x.device)               # here, not in the blocks, which may be compiled
            args = x, e0, text, table, told[-2:] if 'prope' in self.cfg.camera else (), seen, cache, i, ask
            x = checkpoint(block, *args, use_reentrant=False) if again else block(*args)     # (B, S, D)
        with torch.autocast(x.device.type, enabled=False):
            x = self.head(x.view(B, last or n, h * w, -1), e[:, -(last or 0):]).float()      # (B, F, L, p p C), channel fastest
        return rearrange(x, 'b f (h w) (p q c) -> b f c (h p) (w q)', h=h, w=w, p=p, q=p)

# -----------------------------------------------------------------------------
# sampling a whole clip at once, with the bidirectional model

@torch.no_grad()
def sample_clip(model, noise, text, camera, times, first=None):
    """Euler along the probability-flow ODE from noise (B, F, C, H, W); `first` (B, 1, C, H, W), if given, is frame 0."""
    x, free = noise.clone(), torch.ones(noise.shape[:2], device=noise.device)
    if first is not None:
        x[:, :1], free[:, :1] = first, 0
    for now, then in zip(times[:-1].tolist(), times[1:].tolist()):
        x = x + (then - now) * free[..., None, None, None] * model(x, free * now, text, camera)
    return x


def without(over, text, camera):
    """(text, Camera) of guidance's null branch: the same frames without 'camera', or with an empty prompt ('text')."""
    if over not in ('camera', 'text'):
        raise BadInput(f'--over {over}: choose camera or text')
    off = torch.zeros(len(text), dtype=torch.bool, device=text.device)
    return (text, replace(camera, on=off)) if over == 'camera' else (torch.zeros_like(text), camera)


def teacher_forced(net, cfg, batch, x_t, t, t_history=None):
    """v (B, F, C, H, W) of x_t at times t (B, F), each chunk upon the batch's frames before it, at times t_history (None: clean),
    in one pass over [history | noisy]: same positions, same cameras. The last chunk is nobody's history and stays out."""
    F, camera, ids = x_t.shape[1], batch.camera, chunk_ids(x_t.shape[1], cfg.chunk, cfg.first)
    h = int((ids < ids[-1]).sum())
    t_history = torch.zeros_like(t) if t_history is None else t_history
    past, seen = Camera(camera.c2w[:, :h], camera.K[:, :h], camera.on, camera.step[:, :h]), [*range(h), *range(F, 2 * F)]
    return net(torch.cat([batch.x0[:, :h], x_t], 1), torch.cat([t_history[:, :h], t], 1), batch.text, Camera.cat([past, camera]),
               mask=teacher_forcing_mask(ids)[seen][:, seen], pos=[*range(h), *range(F)], last=F)

# -----------------------------------------------------------------------------
# walking: the only chunk-by-chunk loop

def rollout(model, cameras, text, times, noise, first=None, guidance=1.0, window=64, renoise=False, exit_step=None,
            first_times=None, context=0.0, over='camera', jump=None):
    """Generate a video chunk by chunk with a KV cache: yields clean chunks (B, n, C, H, W) for ever.

    cameras    iterator of Camera, one per chunk (its frame count is the chunk's); poses in any world frame. It is
               asked for a chunk's camera only when that chunk is due, so live keys may arrive late
    text       (B, text_len, text_dim)
    times      falling times of the sampler, 1 .. 0; first_times: those of a first chunk that is dreamt (Causal Forcing++
               gives it 4 steps even where the others have 1)
    noise      function n -> (B, n, C, H, W) that draws noise for n frames
    first      latents (B, n, C, H, W) of the first chunk, given at t = 0; else it is generated
    guidance   s in v = v_null + s (v_cond - v_null); the null branch, without camera or prompt (`over`), shares the batch
    window     frames that the cache holds. When it is full the oldest chunks are dropped, if no pose depends on them: with
               cfg.sink, whose first frame stays and is the origin, and without Plücker maps. Else the newest half is kept, its
               first frame becomes the origin, and its clean latents are encoded anew in one pass: what training saw, nothing stale
    context    noise level at which generated frames enter the cache, as stage 1 trains for: it hides their faults
    renoise    False: Euler steps along the probability-flow ODE. True, for few-step models: predict x0, add fresh noise
               of the next time (the sampler of consistency models; an Euler step would keep the old noise)
    exit_step  training (Self Forcing, algorithm 1): every chunk stops at this step and its x0 is the chunk. If gradient
               is enabled, that one call carries it; the cache is written from the detached x0, so none reaches the past
    jump       (B,) bool, with cfg.sink: walks whose second chunk begins elsewhere than where their first frame is

    A chunk costs len(times) - 1 calls: the clean pass that writes it to the cache goes along with the next one's first."""
    B, twice = len(text), lambda x: torch.cat([x, x]) if guidance != 1 else x
    if guidance != 1:
        text = torch.cat([text, text * (over == 'camera')])
    history, before, cache, origin, late, m = [], None, None, None, None, model.cfg    # history: (latents, Camera) of the window's chunks

    def place(camera, before):                              # as the network sees it, from here and now
        apart = (torch.ones(B, dtype=torch.bool) if before is None else jump if len(history) == 1 else None) if m.sink else None
        camera = Camera(relative(camera.c2w, origin), camera.K, camera.on, steps(camera.c2w, before, apart))
        return Camera.cat([camera, without(over, text[:B], camera)[1]], 0) if guidance != 1 else camera

    times_of = lambda x, t: torch.full((len(text), x.shape[1]), t, device=x.device)
    final = lambda x, level: (x if level == 0 else (1 - level) * x + level * noise(x.shape[1]), times_of(x, level))     # for the cache

    def call(x, t, camera, grad=False, mask=None):
        nonlocal late
        if grad and late:                                   # the past carries none, so it goes first and alone
            (y, ty, told), late = late, None
            call(y, ty, told)
            cache.end += y.shape[1]
        n, new = x.shape[1], 0
        if late:                                            # the chunk before goes along, its keys and values are final
            (y, ty, told), late = late, None
            new = y.shape[1]
            x, t, camera = torch.cat([y, x], 1), torch.cat([ty, t], 1), tuple(torch.cat(c, 1) for c in zip(told, camera))
            mask = torch.ones(new + n, cache.end + new + n, dtype=torch.bool)
            mask[:new, -n:] = False
        with torch.set_grad_enabled(grad):
            v = model(twice(x), t, text, camera, mask, cache=cache, last=n if new else None)
        cache.end += new
        return v[B:] + guidance * (v[:B] - v[B:]) if guidance != 1 else v

    for camera in cameras:
        n = camera.K.shape[1]
        x = noise(n) if first is None or history else first
        if cache is None:
            L = x.shape[-1] * x.shape[-2] // m.patch ** 2
            cache = KVCache(m, len(text), window, L, x.device, model.patch_embedding.weight.dtype)
            origin = camera.c2w[:, 0]
        placed = place(camera, before)
        with torch.no_grad():
            told = model.embed_camera(placed, *x.shape[-2:])
        if first is None or history:
            plan = times if history or first_times is None else first_times
            for i, (t, t_next) in enumerate(zip(plan[:-1].tolist(), plan[1:].tolist())):
                last = i == (len(plan) - 2 if exit_step is None else exit_step)
                grad = last and exit_step is not None and torch.is_grad_enabled()
                v = call(x, times_of(x, t), placed if grad else told, grad)
                if renoise or last and exit_step is not None:
                    x = x - t * v
                    if last:
                        break
                    x = (1 - t_next) * x + t_next * noise(n)
                else:
                    x = x + (t_next - t) * v
        yield x
        x, before, level = x.detach(), camera.c2w[:, -1:], context if first is None or history else 0.0
        history.append((x, camera))
        rolls = m.sink or 'plucker' not in m.camera         # nothing in the cache knows an origin that moves
        keep = n + (m.sink and len(history) > 1) if rolls else m.first + max(0, (window + 1) // 2 - m.first) // m.chunk * m.chunk
        if keep + m.chunk > window:
            for _ in cameras:                               # too small only if another chunk is asked for
                raise BadInput(f'a window of {window} frames is too small: use at least {keep + m.chunk}')
        elif rolls or cache.end + n + m.chunk <= window:
            late = *final(x, level), told
            while cache.end + n + m.chunk > window:
                cache.roll(history.pop(m.sink)[0].shape[1], m.sink)
        else:                                               # no room for another chunk: the newest half, from a new origin
            seen, camera = torch.cat([y for y, _ in history], 1)[:, -keep:], Camera.cat([c for _, c in history])
            camera = Camera(camera.c2w[:, -keep:], camera.K[:, -keep:], camera.on)
            if torch.is_grad_enabled():                     # checkpointed blocks may still read the old one
                cache.k, cache.v = cache.k.clone(), cache.v.clone()
            history, cache.end, origin = [(seen, camera)], 0, camera.c2w[:, 0]
            call(*final(seen, context), place(camera, None), mask=causal_mask(chunk_ids(keep, m.chunk, m.first)))
            cache.end = keep


def walk_clip(model, c2w, K, text, times, noise, first=None, **options):
    """A walk along c2w (B, F, 4, 4), K (B, F, 4), by `rollout` with its options: (B, F, C, H, W). first (B, n, C, H, W) is given,
    if it is no shorter than the model's first chunk."""
    first = first if first is not None and first.shape[1] >= model.cfg.first else None
    sizes = torch.bincount(chunk_ids(c2w.shape[1], model.cfg.chunk, model.cfg.first if first is None else first.shape[1])).tolist()
    cameras = map(Camera, c2w.split(sizes, 1), K.split(sizes, 1))
    return torch.cat(list(rollout(model, cameras, text, times, noise, first, **options)), 1)

# -----------------------------------------------------------------------------
# training helpers: device, optimizer, learning rate, EMA

def pick_device(device='auto', dtype='auto', local_rank=0):
    """(device, compute dtype). auto: cuda, else cpu; bfloat16 where the hardware multiplies it natively."""
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if device not in ('cpu', 'cuda') or dtype not in ('auto', 'float32', 'bfloat16') or device == 'cuda' and not torch.cuda.is_available():
        raise BadInput(f'--device {device} --dtype {dtype}: choose auto, cpu, or cuda where there is one; auto, float32 or bfloat16')
    if device == 'cuda':
        torch.cuda.set_device(local_rank)
    if dtype == 'auto':
        native = any(getattr(torch.cpu, f, lambda: False)() for f in ('_is_avx512_bf16_supported', '_is_amx_tile_supported'))
        dtype = 'bfloat16' if native or device == 'cuda' else 'float32'
    return torch.device(device), getattr(torch, dtype)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024), its step scaled to AdamW's RMS (Moonlight) so that one learning rate serves both. As
    torch.optim.Muon, but in any dtype (torch's is always in bfloat16), and in three Newton-Schulz steps for its five: each
    the best on what the one before leaves of [.01, 1] (Polar Express, Amsel et al. 2025), from the 4-norm of all singular values."""
    STEPS = (8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)
    def __init__(self, params, lr, weight_decay, dtype):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, dtype=dtype))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}                                         # all matrices of a shape at once: small products are slow
            for p in (p for p in group['params'] if p.grad is not None):
                alike.setdefault(tuple(sorted(p.shape)), []).append(p)
                self.state[p] = self.state[p] or {'momentum_buffer': torch.zeros_like(p)}
            for params in alike.values():
                grads, momentum = [p.grad for p in params], [self.state[p]['momentum_buffer'] for p in params]
                torch._foreach_lerp_(momentum, grads, .05)
                X = torch.stack([g.mT if g.shape[0] > g.shape[1] else g for g in torch._foreach_lerp(grads, momentum, .95)]).to(group['dtype'])
                A = X @ X.mT                                   # its norm, a little large: rounding must not lead beyond 1
                size = A.float().norm(dim=(1, 2), keepdim=True).clamp(min=1e-14) * (1 + 4 * torch.finfo(A.dtype).eps)
                X = (X / size.sqrt()).to(A.dtype)              # a gradient below 1e-7 fades, before its 4th power is lost to float32
                for i, (a, b, c) in enumerate(self.STEPS):     # singular values to about 1
                    A = X @ X.mT if i else (A / size).to(A.dtype)
                    X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
                for p, x in zip(params, X):
                    p.mul_(1 - group['lr'] * group['weight_decay'])
                    p.add_(x.mT if p.shape[0] > p.shape[1] else x, alpha=-group['lr'] * .2 * max(p.shape) ** .5)


def make_optimizers(model, lr, muon, betas, dtype, weight_decay=0.01):
    """AdamW for all parameters or, with muon, Muon, computing in dtype, for the 2-D weights inside the blocks and AdamW for the rest."""
    hidden = [p for n, p in model.named_parameters() if muon and n.startswith('blocks') and p.ndim == 2]
    rest = [p for n, p in model.named_parameters() if not (muon and n.startswith('blocks') and p.ndim == 2)]
    if any(hasattr(p, 'full_tensor') for p in hidden):
        raise BadInput('--shard fsdp: Muon needs whole matrices: add --muon False')
    opts = [torch.optim.AdamW(rest, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)]
    return opts + ([Muon(hidden, lr, weight_decay, dtype)] if muon else [])


def shard(model, how, offload=False, compiled=False):
    """The model as this process trains it: as it is when alone; under DDP; or (fsdp) with weights, gradients and optimizer state
    split over all processes, block by block (FSDP2); with offload they wait in the processor's memory. compiled: by torch.compile."""
    if how not in ('ddp', 'fsdp'):
        raise BadInput(f'--shard {how}: choose ddp or fsdp')
    for block in model.blocks if compiled else ():
        block.compile()
    if not dist.is_initialized():
        return model
    if how == 'ddp':
        net = DistributedDataParallel(model)
        net.cfg = model.cfg
        return net
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
    policy = {'offload_policy': CPUOffloadPolicy(pin_memory=torch.cuda.is_available())} if offload else {}
    for block in model.blocks:
        fully_shard(block, **policy)
    return fully_shard(model, **policy)


def sync_gradients(net, on):
    """Average the gradients of the next backward pass over the processes, or (all but the last micro-batch) not yet."""
    if hasattr(net, 'set_requires_gradient_sync'):
        net.set_requires_gradient_sync(on)
    net.require_backward_grad_sync = on


def whole(x):
    """A tensor that FSDP has split, put together again (all processes call this); any other as it is."""
    return x.full_tensor() if hasattr(x, 'full_tensor') else x


def split_like(x, y):
    """The whole tensor x, split as y is."""
    return distribute_tensor(x, y.device_mesh, y.placements) if hasattr(y, 'full_tensor') else x


def clip_gradients(params, limit):
    """Scale the gradients to a norm of at most `limit`, and return what it was. Raises BadInput, before any weight changes, if it is no number."""
    norm = whole(torch.nn.utils.clip_grad_norm_(params, limit)).item()
    if math.isfinite(norm):
        return norm
    raise BadInput(f'the gradient of this step is {norm}: nothing of it is kept; try a smaller --lr, or --dtype float32')


def learning_rate(step, steps, lr, warmup, decay):
    """Linear warm-up over `warmup` steps, constant, then linear decay to 0 over the last fraction `decay`."""
    return lr * min(1, (step + 1) / max(1, warmup), (steps - step) / (decay * steps + 1e-9))


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema <- decay ema + (1 - decay) model, with a shorter memory in the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.values()), [p.detach() for p in model.state_dict().values()], 1 - decay)

# -----------------------------------------------------------------------------
# checkpoints: safetensors only, written whole or not at all

def save_tensors(path, tensors, meta):
    """Write tensors and a JSON header to a temporary name, then rename: a crash leaves the old file."""
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    tmp = f'{path}.tmp{os.getpid()}'
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp, {'meta': json.dumps(meta)})
    os.replace(tmp, path)


def load_tensors(path):
    """(tensors, header) of a file of save_tensors. Raises BadInput when it is missing, truncated or not safetensors."""
    try:
        with safe_open(path, 'pt') as f:
            return {k: f.get_tensor(k) for k in f.keys()}, json.loads((f.metadata() or {}).get('meta', '{}'))
    except FileNotFoundError:
        raise BadInput(f'{path}: no such file; train it first or name another checkpoint') from None
    except (SafetensorError, OSError, ValueError) as e:
        raise BadInput(f'{path}: not a readable safetensors checkpoint ({e}); it may be truncated, or a pickle: make it again') from None


def save_model(path, state, cfg, **meta):
    """Weights under Wan's names, header {model: config, **meta}."""
    save_tensors(path, state, {'model': asdict(cfg), **meta})


RENAMED = [(r'condition_embedder\.text_embedder\.linear_1', 'text_embedding.0'), (r'condition_embedder\.text_embedder\.linear_2', 'text_embedding.2'),
           (r'condition_embedder\.time_embedder\.linear_1', 'time_embedding.0'), (r'condition_embedder\.time_embedder\.linear_2', 'time_embedding.2'),
           (r'condition_embedder\.time_proj', 'time_projection.1'), (r'\.attn1\.', '.self_attn.'), (r'\.attn2\.', '.cross_attn.'),
           (r'\.to_(q|k|v)\.', r'.\1.'), (r'\.to_out\.0\.', '.o.'), (r'\.norm2\.', '.norm3.'), (r'\.ffn\.net\.0\.proj\.', '.ffn.0.'),
           (r'\.ffn\.net\.2\.', '.ffn.2.'), (r'^proj_out\.', 'head.head.'), (r'^scale_shift_table$', 'head.modulation'),
           (r'\.scale_shift_table$', '.modulation'),                             # up to here: diffusers' WanTransformer3DModel
           (r'_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.', ''), (r'^(module\.)?(model\.)?', '')]


def open_weights(path):
    """({Wan's parameter name: a function that reads that tensor}, header) of any of these, told apart by their content:
    our checkpoints; Wan2.1's folder or diffusers' (config.json and safetensors, one or many); a .pt of minWM, Self-Forcing or
    Causal-Forcing, the EMA if it has one. Only tensors are read, by memory map; a pickle with code in it is refused."""
    header, tensors, file, files = {}, {}, path, [path]
    try:
        folder = path if os.path.isdir(path) else os.path.dirname(path) or '.'
        if os.path.isdir(path):
            files = sorted(glob.glob(f'{path}/*.safetensors'))
            for index in glob.glob(f'{path}/*.safetensors.index.json'):
                with open(index) as f:
                    files = sorted({f'{path}/{os.path.basename(x)}' for x in json.load(f)['weight_map'].values()})
            if not files:
                raise BadInput(f'{path}: no .safetensors in this folder: name a checkpoint or a folder of Wan2.1\'s')
        if not path.endswith('.safetensors') and os.path.exists(f'{folder}/config.json'):
            with open(f'{folder}/config.json') as f:
                header['config'] = json.load(f)
        for file in files:
            if file.endswith(('.pt', '.pth', '.bin')):
                state = torch.load(file, 'cpu', mmap=True, weights_only=True)
                state = next((state[k] for k in ('generator_ema', 'generator', 'model') if k in state), state)
                tensors |= {k: functools.partial(state.get, k) for k in state}
            else:
                f = safe_open(file, 'pt')
                header |= json.loads((f.metadata() or {}).get('meta', '{}'))
                tensors |= {k: functools.partial(f.get_tensor, k) for k in f.keys()}
    except FileNotFoundError:
        raise BadInput(f'{file}: no such file; train it first or name another checkpoint') from None
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, EOFError, TypeError, AttributeError, pickle.UnpicklingError) as e:
        raise BadInput(f'{file}: not a readable checkpoint ({str(e).splitlines()[0]}); it may be truncated or a pickle with code '
                       'in it, which is never loaded: make it again') from None
    return {functools.reduce(lambda k, rule: re.sub(*rule, k), RENAMED, k): read for k, read in tensors.items()}, header


def find_config(path, tensors, header):
    """The ModelConfig of opened weights: from our header, else from shapes; heads from config.json, else 128 wide as Wan's."""
    if 'dim' in header.get('model', {}) and set(header['model']) <= {f.name for f in fields(ModelConfig)}:
        return ModelConfig(**header['model'])
    try:
        shape, config = {k: tensors[k]().shape for k in ('patch_embedding.weight', 'blocks.0.ffn.0.weight', 'time_embedding.0.weight',
                                                         'text_embedding.0.weight', 'head.head.weight')}, header.get('config', {})
    except KeyError as e:
        raise BadInput(f'{path}: its header holds no model config of ours and it has no {e}: is it another kind of file?') from None
    dim, in_dim, _, patch, _ = shape['patch_embedding.weight']
    return ModelConfig(dim, len(tensors['blocks.0.ffn.0.bias']()), config.get('num_heads', config.get('num_attention_heads', dim // 128)),
        1 + max(int(k.split('.')[1]) for k in tensors if k.startswith('blocks.')), in_dim, len(tensors['head.head.bias']()) // patch ** 2,
        shape['time_embedding.0.weight'][1], shape['text_embedding.0.weight'][1], config.get('text_len', 512), config.get('eps', 1e-6), patch,
        'prope' if any('prope_o' in k for k in tensors) else 'none', chunk=4, first=4, shift=5.0)


def load_model(path, device='cpu', camera=None, dtype=torch.float32):
    """(DiT, header) of any checkpoint of `open_weights`; each tensor goes from the file straight to device and dtype, so no
    second copy is held. camera='plucker' or 'prope' may be added to a checkpoint without: it starts at zero. Raises BadInput
    that names every tensor that is missing, left over or of another shape."""
    tensors, header = open_weights(path)
    cfg = find_config(path, tensors, header)
    fresh = camera is not None and cfg.camera == 'none'
    cfg.camera = camera if fresh else cfg.camera
    with torch.device('meta'):
        model = DiT(cfg)
    want, state = {k: v.shape for k, v in model.state_dict().items()}, {}
    new = {k for k in want if fresh and (k.startswith('camera_') or '.prope_o.' in k) and k not in tensors}
    wrong = [f'{k} is missing' for k in want if k not in tensors and k not in new] + [f'{k} is not of the model' for k in tensors if k not in want]
    for k in want.keys() & tensors.keys():
        value = tensors[k]()
        if value.shape != want[k]:
            wrong.append(f'{k} is {tuple(value.shape)}, not {tuple(want[k])}')
        else:
            state[k] = value.to(device, dtype, copy=True)
    if wrong:
        raise BadInput(f'{path}: {len(wrong)} tensors do not fit its config: {"; ".join(sorted(wrong))}: make the checkpoint again')
    model.load_state_dict(state | {k: torch.zeros(want[k], device=device, dtype=dtype) for k in new}, assign=True)
    return model.requires_grad_(), {'stage': 'wan', 'step': 0, 'frames': 21} | header


def save_wan(folder, model):
    """Write a model in Wan2.1's own layout, config.json and diffusion_pytorch_model.safetensors, whole or not at all."""
    c = model.cfg
    config = {'_class_name': 'WanModel', 'model_type': 't2v', **{k: getattr(c, k) for k in (
        'text_len', 'in_dim', 'dim', 'ffn_dim', 'freq_dim', 'out_dim', 'num_heads', 'num_layers', 'eps')}}
    save_tensors(f'{folder}/diffusion_pytorch_model.safetensors', model.state_dict(), {'model': asdict(c)})
    with open(f'{folder}/config.json.tmp', 'w') as f:
        json.dump(config, f, indent=1)
    os.replace(f'{folder}/config.json.tmp', f'{folder}/config.json')


def save_resume(path, model, ema, optimizers, step, config):
    """All that an exact continuation needs: raw weights, EMA, optimizer state, step, config; one file, whole tensors. All
    processes call it, the first writes; it may be resumed by another number of them."""
    tensors = {f'model.{k}': v for k, v in model.state_dict().items()} | {f'ema.{k}': v for k, v in ema.items()}
    for i, opt in enumerate(optimizers):
        for p, state in opt.state_dict()['state'].items():
            tensors |= {f'opt{i}.{p}.{k}': v for k, v in state.items()}
    tensors = {k: whole(v) for k, v in tensors.items()}
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_tensors(path, tensors, {'step': step, 'config': config})


def load_resume(path, model, ema, optimizers, config, say=print):
    """Undo save_resume in place and say so; the step to go on from, 0 if there is no such file. Raises BadInput if it is of another config."""
    if not os.path.exists(path):
        return 0
    tensors, meta = load_tensors(path)
    changed = [f'{k} {meta["config"].get(k)}, not {v}' for k, v in config.items() if meta['config'].get(k) != v]
    changed += [f'another {k}' for k, v in model.state_dict().items() if f'model.{k}' not in tensors or tensors[f'model.{k}'].shape != v.shape]
    if changed:
        raise BadInput(f'{path} was made with {", ".join(changed)}: run that again to go on, or delete it to start over')
    part = lambda prefix: {k[len(prefix):]: v for k, v in tensors.items() if k.startswith(prefix)}
    for name, state in (('model.', model.state_dict()), ('ema.', ema)):
        for k, v in part(name).items():
            state[k].copy_(split_like(v.to(state[k].device), state[k]))
    for i, opt in enumerate(optimizers):
        state, params = {}, [p for group in opt.param_groups for p in group['params']]
        for k, v in part(f'opt{i}.').items():
            p, k = k.split('.')
            state.setdefault(int(p), {})[k] = split_like(v.to(params[int(p)].device), params[int(p)]) if v.ndim else v
        opt.load_state_dict({'state': state, 'param_groups': opt.state_dict()['param_groups']})
    say(f'go on from {path}, step {meta["step"]}')
    return meta['step']

# -----------------------------------------------------------------------------
# the command line of every script

def command_line(main, Config, doc):
    """main(Config) with a flag for each field; @file reads flags from a file. Bad input is one sentence and exit code 1."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, fromfile_prefix_chars='@')
    for f in fields(Config):
        parser.add_argument(f'--{f.name}', type=true_or_false if f.type is bool else f.type, default=f.default, help=f'(default: {f.default})')
    cfg = Config(**vars(parser.parse_args()))
    least = dict(batch=1, accum=1, log_every=1, save_every=1, eval_every=1, eval_clips=1, paths=1, steps=0, seed=0, clip=0, fps=0)
    try:
        for k, v in least.items() | {('frames', 2 if hasattr(cfg, 'batch') else 0)}:
            if getattr(cfg, k, v) < v:
                raise BadInput(f'--{k} {getattr(cfg, k)}: at least {v}')
        main(cfg)
    except (BadInput, OSError, OverflowError) as e:
        sys.exit(f'error: {e}')

# -----------------------------------------------------------------------------
# gates: is this stage healthy?

HINTS = {'val_loss': 'look at the loss curve: rising or spiky means --lr too high, still falling means too few --steps',
         'psnr@1': 'the next frame is off: too few --steps, or --init is not the stage before this one',
         'psnr@7': 'the walk drifts: look at the strip; too few --steps, or --init is not the stage before this one',
         'gap@7': 'the camera is not followed: look at the strip; too few --steps, or poses of a wrong sign or scale',
         'fd': 'the walks do not look like the data: a weak stage-0 model, or a critic that lags: raise --critic or --critic_lr',
         'sharpness': 'blur or noise: in stage 2 too few --pairs or --steps, in stage 3 see fd; above 1 the sampler is wrong',
         'motion': 'frozen below .5, runaway above 1.5: in stage 3 lower --lr or raise --critic; look at the log, when it began'}


def gate(stage, preset, metrics):
    """Compare metrics with the thresholds of expected/<preset>.json; returns the line to print."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'expected', f'{preset}.json')
    if not os.path.exists(path):
        return f'gate: none for preset {preset} (expected/{preset}.json is missing)'
    with open(path) as f:
        limits = {k: v for k, v in json.load(f).get(stage, {}).get('thresholds', {}).items() if k in metrics}   # short clips: no frame 7
    if not limits:
        return f'gate: none for {stage} in expected/{preset}.json'
    ok = {k: metrics[k] >= v if sign == '>=' else metrics[k] <= v for k, (sign, v) in limits.items()}
    line = ', '.join(f'{k} {metrics[k]:.3g} {sign} {v:g}' for k, (sign, v) in limits.items())
    advice = ''.join(f'\n  {k}: {HINTS.get(k.split(",")[0], HINTS["sharpness"])}' for k in ok if not ok[k])
    return f'gate: {"PASS" if all(ok.values()) else "FAIL"} {line}{advice}'

# -----------------------------------------------------------------------------
# python model.py CKPT: what is this, and what does it take?

def flops(cfg, frames, L, keys):
    """Floating-point operations of one forward pass of `frames` frames of L tokens that attend to `keys` frames each."""
    D, S, layers, second = cfg.dim, frames * L, cfg.num_layers, 'prope' in cfg.camera
    maps = 12 * (1 + 2 * cfg.camera_freqs) * cfg.patch ** 2 * ('plucker' in cfg.camera)
    block = S * ((6 + second) * D * D + 2 * D * cfg.ffn_dim) + cfg.text_len * 2 * D * D + 2 * S * (keys * L * (1 + second) + cfg.text_len) * D
    block += second * 4 * 4 * S * D
    ends = S * D * (cfg.patch ** 2 * (cfg.in_dim + cfg.out_dim) + maps) + frames * D * (cfg.freq_dim + 7 * D) + cfg.text_len * D * (cfg.text_dim + D)
    return 2 * (layers * block + ends)


def forced_flops(cfg, F, L):
    """The same of `teacher_forced`: h frames of history, only keys and values in the last block, and F noisy ones upon them."""
    h, D = F - cfg.chunk, cfg.dim
    unasked = h * L * (4 * D * D + 2 * D * cfg.ffn_dim + ((h + cfg.chunk) * L + 2 * cfg.text_len) * D)
    return flops(cfg, h + F, L, (h * (h + cfg.chunk) + F * (F + cfg.chunk)) / 2 / (h + F)) - 2 * unasked


def main(a):
    """What a checkpoint (or a preset) is and what it takes: memory and arithmetic, computed. --out writes it in another layout."""
    with torch.device('cpu' if a.out else 'meta'):
        model, header = DiT(PRESETS[a.ckpt]) if a.ckpt in PRESETS else None, {'stage': 'none', 'step': 0}
    if model is None:
        model, header = load_model(a.ckpt)
    c, P = model.cfg, sum(p.numel() for p in model.parameters())
    L = a.height * a.width // 64 // c.patch ** 2
    preset = next((k for k, v in PRESETS.items() if (v.dim, v.ffn_dim, v.num_layers) == (c.dim, c.ffn_dim, c.num_layers)), 'of its own')
    stored = '' if a.ckpt in PRESETS else f', stored as {next(iter(open_weights(a.ckpt)[0].values()))().dtype}'
    print(f'{a.ckpt}: preset {preset}, {P / 1e6:.2f} M parameters, stage {header["stage"]}, step {header["step"]}, camera {c.camera}{stored}\n{c}')
    cache = 4 * c.num_layers * (1 + ('prope' in c.camera)) * a.window * L * c.dim
    chunk, full, forced = flops(c, c.chunk, L, .75 * a.window), flops(c, a.frames, L, a.frames), forced_flops(c, a.frames, L)
    print(f'{a.height} x {a.width} pixels, {L} tokens a frame, clips of {a.frames} frames, a window of {a.window}, batch 1, computed:')
    for name, n in (('bidirectional step', 3 * full), ('teacher-forced step', 3 * forced), (f'a streamed chunk in {a.steps} steps', (a.steps + 1) * chunk)):
        print(f'  {name:32s} {n / 1e12:12.4g} TFLOP')
    for name, n in (('weights, gradient, Adam, EMA: fp32', 20 * P), ('tokens kept, a checkpoint a block', 8 * a.frames * L * c.dim * c.num_layers),
                    ('streaming, bf16: weights', 2 * P), ('streaming, bf16: cache', cache)):
        print(f'  {name:32s} {n / 2 ** 30:12.4g} GiB')
    if a.out.endswith('.safetensors'):
        save_model(a.out, model.state_dict(), c, **{k: v for k, v in header.items() if k not in ('model', 'config')})
    elif a.out:
        save_wan(a.out, model)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument('ckpt')
    parser.add_argument('--out', default='', help='write it again: name.safetensors is our layout, a folder is Wan\'s')
    for flag, default in (('height', 64), ('width', 64), ('frames', 9), ('window', 9), ('steps', 4)):
        parser.add_argument(f'--{flag}', type=int, default=default, help=f'(default: {default})')
    try:
        main(parser.parse_args())
    except (BadInput, OSError) as e:
        sys.exit(f'error: {e}')
