"""
The video diffusion transformer of Wan2.1, made causal and steerable, and its rollout.

One network, `DiT`, plays every role of the recipe. What it is depends only on what it is called with:

    bidirectional    no mask                    stage 0 and the score networks of stage 3
    causal           causal_mask                each chunk of frames sees itself and all earlier ones
    teacher-forced   teacher_forcing_mask       stages 1 and 2: all chunks of a clip in one pass
    cached           a KVCache                  `rollout`, chunk by chunk; the history of stage 2's teacher

With encoder_blocks it is split (Separable Causal Diffusion, papers/scd.py): the first blocks, the encoder,
run once a chunk over what came before it; the others, the decoder, at every step, and see their chunk alone.

Conventions, used in every file:
- Letters: B batch, F latent frames, C channels, H W latent height and width, L tokens a frame, S = F L
  tokens, D width, N heads, Dh head dim; K only for camera intrinsics. Video latents are (B, F, C, H, W).
- Time t is in [0, 1], 0 clean, 1 noise, one per frame (B, F): x_t = (1 - t) x0 + t eps. The network
  predicts v = eps - x0, so x0 = x_t - t v. A frame with t = 0 is given. Wan's timestep is 1000 t.
- A chunk is the frames denoised together. A clip is the chunks (1, c, c, ...), or (c, c, ...) as in minWM.
- A mask is a (frames x frames) bool matrix, rows query, columns key, always passed, never guessed; None means
  that every frame sees all.
- Cameras: see camera.py. The network sees each pose twice: relative to frame 0 of its sequence, and as the
  move from the frame before.

Different from Wan2.1: times are per frame; camera terms (zero at the start of training) are added to the
tokens and to the time embedding; the rotary product is in float32 (its angles in float64). Names, shapes and
mathematics of the weights are Wan's, so its checkpoints load as they are.
"""
import copy
import functools
import math
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask
from torch.utils.checkpoint import checkpoint

from camera import BadInput, Camera, invert, moves, plucker, relative

try:
    from flash_attn import flash_attn_func
except Exception:                                  # not there, or built for another torch or CUDA
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
    first_chunk: int = 1          # frames in the first chunk: 1, or `chunk` as in minWM
    shift: float = 4.0            # time schedule: more noise for more tokens a frame
    sink: bool = False            # a walk's first frame stays in the window (StreamingLLM, LongLive)
    eviction: str = 'chunks'      # how old frames leave a walk's window: chunks | frames, as minWM (see Walk)
    encoder_blocks: int = 0       # split network: so many blocks run once a chunk, the rest at every step

    @property
    def cached_blocks(self):
        """So many of the blocks, the first ones, have keys and values in a KVCache."""
        return self.encoder_blocks or self.num_layers

    def build(self):
        """A new network of this config. The configs of other networks are in backbones/."""
        return DiT(self)


WAN = dict(text_dim=4096, text_len=512, chunk=4, shift=5.0)
PRESETS = {                       # parameters without the camera: 0.1 M (tests), 3.4 M, 3.7 M, 1.42 B, 14.3 B
    'tiny': ModelConfig(dim=48, ffn_dim=96, num_heads=1, num_layers=2),
    'nano': ModelConfig(),
    'small': ModelConfig(ffn_dim=640),
    'wan-1.3b': ModelConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, **WAN),
    'wan-14b': ModelConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, **WAN),
}

# -----------------------------------------------------------------------------
# time: flow matching helpers (Lipman et al. 2022; Wan's schedule)

def shift_time(u, shift):
    """Uniform u in [0, 1] -> t = s u / (1 + (s - 1) u) (SD3, eq. 23). Shift 1 leaves u as it is."""
    return shift * u / (1 + (shift - 1) * u)


def schedule(steps, shift):
    """The steps + 1 times of a sampler, 1 down to 0, float32: uniform, then shifted. Wan has shift 5."""
    uniform = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift_time(uniform, shift).float()


def add_noise(x0, eps, t):
    """x_t (B, F, C, H, W) for times t (B, F)."""
    t = t[..., None, None, None]
    return (1 - t) * x0 + t * eps


def v_to_x0(x_t, v, t):
    """The clean video that velocity v points to: x0 = x_t - t v."""
    return x_t - t[..., None, None, None] * v

# -----------------------------------------------------------------------------
# masks: (query frames x key frames), True where attention is allowed

def chunk_ids(frames, chunk, first_chunk=1):
    """Which chunk each frame belongs to: chunk_ids(7, 3) = [0, 1, 1, 1, 2, 2, 2]."""
    if frames < first_chunk or (frames - first_chunk) % chunk:
        raise BadInput(f'{frames} frames do not divide into a first chunk of {first_chunk} and chunks of '
                       f'{chunk}: use {first_chunk} + n * {chunk} frames')
    after_first = torch.arange(frames) - first_chunk               # negative in the first chunk
    return (1 + after_first // chunk).clamp(min=0)


def causal_mask(ids):
    """Each frame sees its own chunk, in both directions, and all earlier ones."""
    return ids[:, None] >= ids[None, :]


def teacher_forcing_mask(ids):
    """For the sequence [clean | noisy]: clean sees clean up to its own chunk; noisy sees earlier clean chunks
    and its own noisy chunk. So every chunk learns to denoise conditioned on true history, in one pass (Causal
    Forcing, section 3.1).

          c0 c1 c2 n0 n1 n2
      c0   x  .  .  .  .  .
      c1   x  x  .  .  .  .
      c2   x  x  x  .  .  .
      n0   .  .  .  x  .  .
      n1   x  .  .  .  x  .
      n2   x  x  .  .  .  x
    """
    query, key = ids[:, None], ids[None, :]
    nothing = torch.zeros(len(ids), len(ids), dtype=torch.bool)
    clean = torch.cat([query >= key, nothing], 1)
    noisy = torch.cat([query > key, query == key], 1)
    return torch.cat([clean, noisy])

# -----------------------------------------------------------------------------
# attention. First what it computes, then the same faster

def plain_attention(q, k, v, bias=None):
    """softmax(q k^T / sqrt Dh + bias) v for heads first, (B, N, S, Dh); bias (queries, keys) is 0 or -inf."""
    scores = (q * q.shape[-1] ** -0.5) @ k.mT                      # (B, N, queries, keys)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(-1) @ v


def dense_attention(q, k, v, mask):
    """The reference: attention of (B, S, N, Dh) under a frame mask, which is expanded to all tokens."""
    Lq = q.shape[1] // mask.shape[0]                               # tokens a frame
    Lk = k.shape[1] // mask.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))               # (B, N, S, Dh)
    bias = token_bias(mask, Lq, Lk).to(q)
    return plain_attention(q, k, v, bias).transpose(1, 2)


def token_bias(mask, Lq, Lk):
    """What a frame mask adds to the scores of its tokens, (frames Lq, frames Lk): 0, or -inf to forbid."""
    bias = torch.where(mask, 0, -torch.inf)
    return bias.repeat_interleave(Lq, 0).repeat_interleave(Lk, 1)


def mask_rows(mask):
    """A frame mask as a tuple of tuples, which can be the key of a cache."""
    return mask if isinstance(mask, tuple) else tuple(map(tuple, mask.tolist()))


@functools.lru_cache(maxsize=64)
def block_rows(rows, Lq, Lk, dtype, device):
    """A mask's rows as a list of (number of query frames, key frames, bias).

    Equal rows go together, and different ones up to 64 tokens, since small products are slow. The keys are
    those that any of its queries sees; bias hides them from the others, and is None if nothing is to hide.
    """
    blocks = []
    start = 0
    while start < len(rows):
        end = start + 1
        while end < len(rows) and (rows[end] == rows[end - 1] or (end + 1 - start) * Lq <= 64):
            end += 1
        part = torch.tensor(rows[start:end])
        keys = part.any(0).nonzero().flatten()
        bias = token_bias(part[:, keys], Lq, Lk).to(device, dtype)
        blocks.append((end - start, keys.tolist(), bias if bias.any() else None))
        start = end
    return blocks


def masked_attention(q, k, v, mask):
    """dense_attention for a CPU: a loop over blocks of queries, each with the keys that it may see."""
    rows = mask_rows(mask)
    Lq = q.shape[1] // len(rows)                                   # tokens a frame
    Lk = k.shape[1] // len(rows[0])
    blocks = block_rows(rows, Lq, Lk, q.dtype, q.device)
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))  # (B, N, S, Dh)
    # with gradient plain products: sdpa's backward is several times as slow in bfloat16 on a CPU
    attend = plain_attention if torch.is_grad_enabled() else functional.scaled_dot_product_attention
    k, v = k.split(Lk, 2), v.split(Lk, 2)                          # by frame: slices would cost more backward
    queries = q.split([n * Lq for n, _, _ in blocks], 2)
    out = []
    with torch.autocast(q.device.type, enabled=False):
        for part, (_, frames, bias) in zip(queries, blocks):
            keys = torch.cat([k[i] for i in frames], 2)
            values = torch.cat([v[i] for i in frames], 2)
            out.append(attend(part, keys, values, bias))
    return torch.cat(out, 2).transpose(1, 2)                       # (B, S, N, Dh)


def attention(q, k, v, mask=None):
    """softmax(q k^T / sqrt Dh) v for (B, S, N, Dh), by the fastest kernel for this mask, device and dtype.

    mask: (query frames, key frames) bool, or its `mask_rows` or `flex_mask`; None: every token sees all.
    """
    grad = torch.is_grad_enabled()
    if isinstance(mask, BlockMask) or mask is not None and not all(map(all, mask_rows(mask))):
        if q.is_cuda and grad:                     # each new mask is compiled, and a rollout's all differ
            from backbones.flex import flex_frame_attention
            return flex_frame_attention(q, k, v, mask)
        return masked_attention(q, k, v, mask)
    if flash_attn_func and q.is_cuda and q.dtype != torch.float32:
        return flash_attn_func(q, k, v)
    if not q.is_cuda and q.dtype == torch.bfloat16 and grad:
        return masked_attention(q, k, v, ((True,),))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def kernel_mask(mask, n, L, device):
    """The last n rows of a frame mask, in the form that `attention` looks up (blocks may be compiled)."""
    if mask is None:
        return None
    rows = mask_rows(mask)[-n:]
    if device.type == 'cuda' and torch.is_grad_enabled():
        from backbones.flex import flex_mask
        return flex_mask(rows, L, L, device)
    return rows


class KVCache:
    """Keys and values of a growing window of frames, preallocated.

    `end` frames are final. A forward pass writes the keys and values of its own frames behind them; the next
    denoising step overwrites the same places. With gradient enabled the cache is only read: to fill it, run
    the network under torch.no_grad().

    Attention does not care in which order it reads keys, so none is ever moved: `places` says where each
    frame lies, oldest first, and then where new ones will.
    """

    def __init__(self, cfg, B, frames, L, device, dtype=torch.float32):
        device_type = torch.device(device).type
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
        self.layers = cfg.cached_blocks
        # PRoPE's attention must not share the slots of the first one
        slots = 2 * self.layers if 'prope' in cfg.camera else self.layers
        shape = 2, slots, B, frames, L, cfg.num_heads, cfg.dim // cfg.num_heads
        self.kv = torch.zeros(shape, device=device, dtype=dtype)      # keys, values
        self.places = list(range(frames))
        self.end = 0                               # frames that are final
        self.gone = 0                              # frames that `roll` has dropped
        self.sink = None                           # the sink's keys at the positions that it began with
        self.text = [None] * cfg.num_layers        # the prompt's keys and values, filled at first use

    def prepare(self, n, mask):
        """Before a pass over n new frames: free places for them, so that all frames then lie side by side.
        Returns the pass's mask with its columns in the order in which they do."""
        there = self.end + n
        if there > len(self.places):
            raise BadInput(f'a window of {len(self.places)} frames is too small: use at least {there}')
        if torch.is_grad_enabled():
            return mask
        if max(self.places[:there]) >= there:      # copy, oldest first
            self.kv = self.kv[:, :, :, self.places]
            self.places = list(range(len(self.places)))
        order = sorted(range(there), key=self.places.__getitem__)
        return None if mask is None else mask[:, order]

    def update(self, slot, k, v):
        """Write k, v (B, n L, N, Dh) of this pass into the next places; return all that is there."""
        L = self.kv.shape[4]                       # tokens a frame
        kv = self.kv[:, slot]                      # (2, B, frames, L, N, Dh)
        new = torch.stack([k, v]).unflatten(2, (-1, L))
        there = self.end + new.shape[2]
        if torch.is_grad_enabled():                # self-rollout: gradient must not reach the past
            kv = torch.cat([kv[:, :, self.places[:self.end]], new], 2)
        else:
            for i, place in enumerate(self.places[self.end:there]):
                kv[:, :, place] = new[:, :, i]
        return kv[:, :, :there].flatten(2, 3).unbind(0)

    def roll(self, n, sink=0):
        """Drop the n oldest frames behind the first `sink` ones. The rest keep their positions, as rotary
        attention sees only differences."""
        free = self.places[sink:sink + n]
        self.places = self.places[:sink] + self.places[sink + n:] + free
        self.end -= n
        self.gone += n

    def move_sink(self, n):
        """Rotate the keys of the first n frames to sit just before the oldest frame that remains."""
        keys = self.kv[0, :self.layers, :, :n]     # a sink stays where it is; PRoPE's keys are not rotated
        if self.sink is None:                      # always from there, so that rounding does not add up
            self.sink = keys.clone()
        keys.copy_(rotate(self.sink, self.turn(self.gone, keys.shape[-1], keys.device)))

    def turn(self, frames, Dh, device):
        """How a key is rotated that moves on by so many frames."""
        return rotary_table((frames,), 1, 1, Dh, device)

# -----------------------------------------------------------------------------
# the transformer, under Wan2.1's parameter names

def sinusoid(t, dim):
    """Times (B, F) in [0, 1] -> (B, F, dim): [cos | sin] of 1000 t, angles in float64."""
    n = dim // 2
    frequencies = 10000 ** (-torch.arange(n, device=t.device).double() / n)
    angle = 1000 * t.double()[..., None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], -1).float()


@functools.lru_cache(maxsize=256)
def axis_turns(positions, n, base=10000):
    """How each of n pairs of channels turns at each position of an axis: unit complex numbers
    (len(positions), n), complex64."""
    spectrum = base ** (-torch.arange(n, dtype=torch.float64) / n)
    angle = torch.tensor(positions, dtype=torch.float64)[:, None] * spectrum
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


@functools.lru_cache(maxsize=8)                    # for the steps of a chunk: no frame of a walk comes again
@torch.inference_mode(False)                       # a table made while streaming may serve training
def rotary_table(pos, h, w, Dh, device):
    """Unit complex numbers (F h w, 1, Dh / 2), complex64, for F = len(pos) frames of h x w tokens.

    As in Wan, the Dh / 2 rotations are shared by three axes: Dh // 6 for the row, as many for the column, the
    rest for the frame.
    """
    F = len(pos)
    n_space = Dh // 6
    n_frame = Dh // 2 - 2 * n_space
    frame = axis_turns(pos, n_frame)[:, None, None]                                     # (F, 1, 1, n_frame)
    row = axis_turns(range(h), n_space)[:, None]                                        # (h, 1, n_space)
    column = axis_turns(range(w), n_space)                                              # (w, n_space)
    axes = [turns.expand(F, h, w, -1) for turns in (frame, row, column)]
    return torch.cat(axes, -1).view(F * h * w, 1, Dh // 2).to(device)


def rotate(x, table):
    """Rotate the pairs (x[2j], x[2j+1]) of (B, S, N, Dh) by a rotary table."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)


def project(x, M):
    """Each frame's matrix M (B, F, 4, 4) on the groups of 4 channels of its tokens, x (B, S, N, Dh)."""
    with torch.autocast(x.device.type, enabled=False):
        groups = x.float().reshape(*M.shape[:2], -1, 4)
        return (groups @ M.mT).view(x.shape).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """Normalised in float32, cast back, then scaled, as in Wan."""

    def forward(self, x):
        if x.dtype == torch.float32 and not torch.is_grad_enabled():
            return super().forward(x)              # the same; this below is faster with its backward
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(norm.square() / x.shape[-1] + self.eps)
        return (x * scale).to(x.dtype) * self.weight.to(x.dtype)


class Attention(nn.Module):
    """Self- or cross-attention of Wan; with PRoPE the self-attention has a second one beside the first."""

    def __init__(self, cfg, prope=False):
        super().__init__()
        D = cfg.dim
        self.N = cfg.num_heads
        self.cached = cfg.cached_blocks
        self.q = nn.Linear(D, D)
        self.k = nn.Linear(D, D)
        self.v = nn.Linear(D, D)
        self.o = nn.Linear(D, D)
        self.norm_q = RMSNorm(D, cfg.eps)          # over all heads together
        self.norm_k = RMSNorm(D, cfg.eps)
        if prope:
            self.prope_o = nn.Linear(D, D)

    def heads(self, x):
        return x.unflatten(-1, (self.N, -1))       # (B, S, N, Dh)

    def keys_values(self, x):
        return self.heads(self.norm_k(self.k(x))), self.heads(self.v(x))

    def self_attention(self, x, table, prope, mask, cache, layer, n_query):
        """x (B, S, D) -> (B, n_query, D): only the last n_query tokens are queries.
        prope (B, F, 2, 4, 4): each frame's projection and its inverse, or None."""
        if torch.is_autocast_enabled(x.device.type):                  # cast once for q, k and v
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if layer >= self.cached:                   # a split network's decoder sees its own chunk alone
            cache = None
        S = x.shape[1]
        q = self.heads(self.norm_q(self.q(x[:, S - n_query:])))       # (B, n_query, N, Dh)
        k, v = self.keys_values(x)                                    # (B, S, N, Dh) each

        # rotary attention, as in Wan
        q_rot = rotate(q, table[S - n_query:]).to(v.dtype)
        k_rot = rotate(k, table).to(v.dtype)
        y = self.o(cached_attention(q_rot, k_rot, v, mask, cache, layer).flatten(-2))
        if prope is None:
            return y

        # PRoPE: a second attention, q^T P_q P_k^-1 k and the values alike. Its keys are not the rotary ones,
        # so it has separate slots in the cache: layer + self.cached
        P, P_inv = prope.unbind(2)                                    # (B, F, 4, 4) each
        F_query = P.shape[1] * n_query // S
        P_query = P[:, -F_query:]
        q_cam = project(q, P_query.mT).to(v.dtype)
        k_cam = project(k, P_inv).to(v.dtype)
        v_cam = project(v, P_inv)
        z = cached_attention(q_cam, k_cam, v_cam, mask, cache, layer + self.cached)
        z = self.prope_o(project(z, P_query).flatten(-2))             # (B, n_query, D)
        camera_on = P_query[..., 3:, 3:]                              # (B, F_query, 1, 1): 0 if dropped
        z = z.unflatten(1, (F_query, -1)) * camera_on
        return y + z.flatten(1, 2).to(y.dtype)

    def cross_attention(self, x, text, cache, layer):
        """x (B, S, D) attends to the prompt, text (B, text_len, D). A cache keeps the keys and values of the
        prompt of its first call: to change the prompt, begin a new cache."""
        keep = cache is not None and not torch.is_grad_enabled()
        if keep and cache.text[layer] is None:
            cache.text[layer] = self.keys_values(text)
        k, v = cache.text[layer] if keep else self.keys_values(text)
        q = self.heads(self.norm_q(self.q(x)))
        return self.o(attention(q.to(v.dtype), k.to(v.dtype), v).flatten(-2))


def cached_attention(q, k, v, mask, cache, slot):
    """attention(); with a cache, over all keys and values so far, those of this call included."""
    if cache is not None:
        k, v = cache.update(slot, k, v)            # (B, all so far, N, Dh)
    return attention(q, k, v, mask)


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        D = cfg.dim
        self.norm1 = nn.LayerNorm(D, cfg.eps, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(D, cfg.eps, elementwise_affine=False)
        self.norm3 = nn.LayerNorm(D, cfg.eps)
        self.self_attn = Attention(cfg, 'prope' in cfg.camera)
        self.cross_attn = Attention(cfg)
        self.ffn = nn.Sequential(nn.Linear(D, cfg.ffn_dim), nn.GELU('tanh'), nn.Linear(cfg.ffn_dim, D))
        self.modulation = nn.Parameter(torch.randn(1, 6, D) / D ** 0.5)

    def forward(self, x, e0, text, table, prope, mask, cache, layer, last):
        """Tokens x (B, F, L, D), modulation by time e0 (B, F, 6, D) -> (B, last, L, D): only the last frames
        are computed to the end, the others give their keys and values."""
        F, L = x.shape[1:3]
        modulation = (self.modulation + e0).unsqueeze(3)              # (B, F, 6, 1, D)
        shift, scale = modulation[:, :, :2].unbind(2)                 # (B, F, 1, D) each
        y = torch.addcmul(shift, self.norm1(x), 1 + scale).flatten(1, 2)                # (B, S, D)
        y = self.self_attn.self_attention(y, table, prope, mask, cache, layer, last * L)

        x = x[:, F - last:]                                           # (B, last, L, D)
        gate1, shift, scale, gate2 = modulation[:, F - last:, 2:].unbind(2)
        x = torch.addcmul(x, y.view(x.shape).to(x.dtype), gate1)
        y = self.norm3(x).flatten(1, 2)
        x = x + self.cross_attn.cross_attention(y, text, cache, layer).view(x.shape)
        y = self.ffn(torch.addcmul(shift, self.norm2(x), 1 + scale))
        return torch.addcmul(x, y.to(x.dtype), gate2)


class Head(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.norm = nn.LayerNorm(cfg.dim, cfg.eps, elementwise_affine=False)
        self.head = nn.Linear(cfg.dim, cfg.patch ** 2 * cfg.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, cfg.dim) / cfg.dim ** 0.5)

    def forward(self, x, e):
        """Tokens x (B, F, L, D) and time embedding e (B, F, D) -> (B, F, L, patch patch out_dim)."""
        shift, scale = (self.modulation + e[:, :, None]).unsqueeze(3).unbind(2)
        return self.head(self.norm(x) * (1 + scale) + shift)


@dataclass
class CameraEmbedding:
    """What the network sees of a Camera, float32; None where the config does not use it. It is the same at
    every denoising step, so `rollout` makes it once a chunk."""
    tokens: torch.Tensor | None = None       # (B, F, L, D) Plücker maps, added to the tokens
    time: torch.Tensor | None = None         # (B, F, D) each frame's move, added to the time embedding
    prope: torch.Tensor | None = None        # (B, F, 2, 4, 4) PRoPE's P, which is 0 if dropped, and P^-1

    def followed_by(self, other):
        """The two joined along their frames."""
        pairs = zip(vars(self).values(), vars(other).values())
        return CameraEmbedding(*(None if a is None else torch.cat([a, b], 1) for a, b in pairs))


class DiT(nn.Module):
    """The network v(x_t, t, text, camera). One class is bidirectional, causal, teacher-forced or cached: that
    is up to the mask, the positions and the cache it is called with."""
    cache_type = KVCache

    def __init__(self, cfg):
        super().__init__()
        if not set(cfg.camera.split('+')) < {'none', 'plucker', 'prope'}:
            raise BadInput(f'--camera {cfg.camera}: choose plucker, prope, plucker+prope or none')
        self.cfg = cfg
        self.checkpoint = False                    # keep one activation a block, compute the others again
        D, patch = cfg.dim, (1, cfg.patch, cfg.patch)
        self.patch_embedding = nn.Conv3d(cfg.in_dim, D, patch, patch)
        self.text_embedding = nn.Sequential(nn.Linear(cfg.text_dim, D), nn.GELU('tanh'), nn.Linear(D, D))
        self.time_embedding = nn.Sequential(nn.Linear(cfg.freq_dim, D), nn.SiLU(), nn.Linear(D, D))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(D, 6 * D))
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.num_layers))
        self.head = Head(cfg)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

        # zero at the start: the output, the modulation by time, and all that the camera adds
        zero = [self.head.head, self.time_projection[1]]
        if 'prope' in cfg.camera:
            zero += [block.self_attn.prope_o for block in self.blocks]
        if 'plucker' in cfg.camera:                # no bias: a dropped camera is exactly a zero map
            channels = 12 * (1 + 2 * cfg.camera_freqs)
            self.camera_embedding = nn.Linear(channels * cfg.patch ** 2, D, bias=False)
            self.camera_motion = nn.Linear(12, D, bias=False)
            zero += [self.camera_embedding, self.camera_motion]
        for layer in zero:
            nn.init.zeros_(layer.weight)
        if cfg.encoder_blocks:                     # the context enters as it is
            self.context_norm = nn.LayerNorm(D, cfg.eps, elementwise_affine=False)
            self.context_embedding = nn.Linear(D, D)
            nn.init.eye_(self.context_embedding.weight)
            nn.init.zeros_(self.context_embedding.bias)

    def embed_camera(self, camera, H, W):
        """The CameraEmbedding of a Camera, or of None, for latents of H x W."""
        out = CameraEmbedding()
        if camera is None:
            return out
        on = camera.K.new_ones(1) if camera.on is None else camera.on.float()
        on = on.view(-1, 1, 1, 1)                  # 0 drops a sample's camera
        with torch.autocast(camera.K.device.type, enabled=False):
            if 'plucker' in self.cfg.camera:
                out.tokens, out.time = self.embed_plucker(camera, on, H, W)
            if 'prope' in self.cfg.camera:         # focal lengths without the principal point, as minWM
                focal = functional.pad(camera.K[..., :2], (0, 2), value=1.0).float()    # (B, F, 4)
                P = on * focal[..., None] * invert(camera.c2w)
                P_inv = camera.c2w / focal[..., None, :]
                out.prope = torch.stack([P, P_inv], 2)
        return out

    def embed_plucker(self, camera, on, H, W):
        """Each cell's ray, seen from frame 0 and from the frame before, for the tokens (B, F, L, D); and each
        frame's move for the time embedding (B, F, D), which modulates every block."""
        p, freqs = self.cfg.patch, self.cfg.camera_freqs
        rays = torch.cat([plucker(pose, camera.K, H, W) for pose in (camera.c2w, camera.move)], 2)
        waves = torch.cat([math.pi * 2 ** k * rays for k in range(freqs)], 2)         # (B, F, 12 freqs, H, W)
        maps = torch.cat([rays, waves.sin(), waves.cos()], 2)
        maps = on * rearrange(maps, 'b f c (h p) (w q) -> b f (h w) (c p q)', p=p, q=p)
        move = 10 * (camera.move - torch.eye(4, device=rays.device))  # of about the size of 1
        move = move[..., :3, :].flatten(2) * on[..., 0]               # (B, F, 12)
        tokens = functional.linear(maps, self.camera_embedding.weight.float())
        return tokens, functional.linear(move, self.camera_motion.weight.float())

    def forward(self, x, t, text, camera=None, mask=None, pos=None, cache=None, last=None, context=None):
        """Velocity v (B, F, C, H, W), float32, of x (B, F, C, H, W) at times t (B, F).

        text    (B, text_len, text_dim), zero-padded and, as in Wan, not masked
        camera  Camera of the F frames, or its CameraEmbedding, or None
        mask    (F, keys) bool; None: every frame sees all
        pos     F positions; by default they continue those in the cache
        last    how many frames to return, the last ones; None: all
        context split networks: what `encode` made for these frames, or `encoder_inputs`, to make it first
        """
        F, _, H, W = x.shape[1:]
        p, first = self.cfg.patch, self.cfg.encoder_blocks
        last = F if last is None else last
        if not isinstance(camera, CameraEmbedding):
            camera = self.embed_camera(camera, H, W)
        if isinstance(context, dict):
            context = self.encode_clip(text, context)
        if first and mask is not None:
            mask = mask & mask.mT                                     # of a causal mask: the own chunk
        blocks = range(first, self.cfg.num_layers)
        x, e = self.run_blocks(blocks, x, t, text, camera, mask, pos, cache, last, context)
        with torch.autocast(x.device.type, enabled=False):            # tokens to velocities
            x = self.head(x, e[:, F - last:]).float()                 # (B, last, L, p p C)
        return rearrange(x, 'b f (h w) (p q c) -> b f c (h p) (w q)', h=H // p, w=W // p, p=p, q=p)

    def encode(self, past, t_past, text, camera, mask=None, pos=None, cache=None):
        """Context (B, F, L, D) of F frames that are still to be generated: a split network's first blocks.
        They read the cameras of these frames and, in the place of each, an earlier one (see `shifted`)."""
        F, _, H, W = past.shape[1:]
        if not isinstance(camera, CameraEmbedding):
            camera = self.embed_camera(camera, H, W)
        blocks = range(self.cfg.encoder_blocks)
        context, _ = self.run_blocks(blocks, past, t_past, text, camera, mask, pos, cache, F)
        return self.context_embedding(self.context_norm(context))

    def encode_clip(self, text, inputs):
        """The context of all F frames of a clip, from its `encoder_inputs`."""
        context, f = self.encode(text=text, **inputs), self.cfg.first_chunk
        return torch.cat([context[:, -f:], context[:, f:-f]], 1)

    def run_blocks(self, blocks, x, t, text, camera, mask, pos, cache, last, context=None):
        """(tokens (B, last, L, D) behind these blocks, time embedding (B, F, D)) of frames (B, F, C, H, W).
        The last block computes only the frames that are asked for."""
        F, _, H, W = x.shape[1:]
        p, dtype = self.cfg.patch, self.patch_embedding.weight.dtype
        h, w = H // p, W // p
        if pos is None:
            start = 0 if cache is None else cache.gone + cache.end
            pos = range(start, start + F)

        # 1) patches, times and text to width D
        patches = rearrange(x.to(dtype), 'b f c (h p) (w q) -> b f (h w) (c p q)', p=p, q=p)
        x = functional.linear(patches, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(dtype)                                           # (B, F, L, D), dtype of the weights
            e = self.time_embedding(sinusoid(t, self.cfg.freq_dim).to(dtype))         # (B, F, D)
            if camera.tokens is not None:
                x = x + camera.tokens.to(dtype)
                e = e + camera.time.to(dtype)
            if context is not None:
                x = x + context.to(dtype)
            e0 = self.time_projection(e).unflatten(-1, (6, -1))       # (B, F, 6, D)
        text = self.text_embedding(text.to(dtype))                    # (B, text_len, D)

        # 2) the blocks
        table = rotary_table(tuple(pos), h, w, self.cfg.dim // self.cfg.num_heads, x.device)
        if cache is not None and blocks[0] == 0:   # a decoder has none
            mask = cache.prepare(F, mask)
        again = self.checkpoint and torch.is_grad_enabled()
        if again and cache is not None:            # the blocks compute again later, on the cache as it is now
            cache = copy.copy(cache)
            cache.kv = cache.kv.clone()
        for layer in blocks:
            n = last if layer == blocks[-1] else F
            rows = kernel_mask(mask, n, h * w, x.device)
            args = x, e0, text, table, camera.prope, rows, cache, layer, n
            block = self.blocks[layer]
            x = checkpoint(block, *args, use_reentrant=False) if again else block(*args)
        return x, e


def rebuilt(model, **settings):
    """The same weights in a network of other settings; what those add is as at the start of training."""
    new = replace(model.cfg, **settings).build().to(next(model.parameters()))
    new.load_state_dict(model.state_dict(), strict=False)
    return new

# -----------------------------------------------------------------------------
# sampling a whole clip at once, with the bidirectional model

@torch.no_grad()
def sample_clip(model, noise, text, camera, times, first_frame=None):
    """Euler steps of the probability-flow ODE from noise (B, F, C, H, W).
    first_frame (B, 1, C, H, W) is given, if any."""
    x = noise.clone()
    free = noise.new_ones(noise.shape[:2])                            # 0: this frame is given
    if first_frame is not None:
        x[:, :1] = first_frame
        free[:, :1] = 0
    times = times.tolist()
    for t, t_next in zip(times, times[1:]):
        v = model(x, free * t, text, camera)
        x = x + (t_next - t) * free[..., None, None, None] * v
    return x


def empty_prompt(text, null_text):
    """What text (B, text_len, text_dim) is when it is dropped: null_text (1 or B, text_len, text_dim), as Wan
    embeds the empty prompt, or zeros if that is None."""
    return torch.zeros_like(text) if null_text is None else null_text.expand_as(text)


def null_condition(over, text, camera, null_text=None):
    """(text, Camera) of guidance's null branch: without 'camera', or with an empty prompt ('text')."""
    if over not in ('camera', 'text'):
        raise BadInput(f'--over {over}: choose camera or text')
    if over == 'text':
        return empty_prompt(text, null_text), camera
    return text, replace(camera, on=torch.zeros_like(text[:, 0, 0], dtype=torch.bool))

# -----------------------------------------------------------------------------
# teacher forcing: all chunks of a clip in one pass, each conditioned on true frames

def teacher_forced(net, cfg, batch, x_t, t, t_history=None):
    """Velocity (B, F, C, H, W) of x_t at times t (B, F), each chunk conditioned on the frames before it.

    One pass over [history | noisy], with the same positions and cameras twice. The history is batch.x0,
    clean, or already noised to t_history. The last chunk is nobody's history and is left out of it.
    In a split network the encoder alone sees the history.
    """
    F = x_t.shape[1]
    ids = chunk_ids(F, cfg.chunk, cfg.first_chunk)
    h = int((ids < ids[-1]).sum())                                    # frames of history
    if t_history is None:
        t_history = torch.zeros_like(t)
    if cfg.encoder_blocks:
        inputs = encoder_inputs(cfg, batch.x0, t_history, batch.camera)
        return net(x_t, t, batch.text, batch.camera, causal_mask(ids), context=inputs)
    both = [*range(h), *range(F, 2 * F)]                              # the last history chunk is left out
    return net(
        torch.cat([batch.x0[:, :h], x_t], 1),                         # (B, h + F, C, H, W)
        torch.cat([t_history[:, :h], t], 1),                          # (B, h + F)
        batch.text,
        Camera.cat([batch.camera.frames(slice(h)), batch.camera]),
        mask=teacher_forcing_mask(ids)[both][:, both],
        pos=[*range(h), *range(F)],
        last=F,                                                       # velocities of the noisy half only
    )


def shifted(cfg, x, t):
    """What a split network's encoder reads in the places of frames x (B, F, C, H, W) at times t (B, F): the
    first chunk as it is, and behind it each frame a chunk later, so that it says nothing of its own place.
    Where nothing is known: zeros, at t = 1. (The first chunk is read a second time in the places of the next:
    without that frame 1 loses 1.1 dB, LOG.md, 2026-12-01.)"""
    n, f = cfg.chunk, cfg.first_chunk
    later = functional.pad(x, (0, 0, 0, 0, 0, 0, n, -n))[:, f:]
    t_later = functional.pad(t, (n, -n), value=1.0)[:, f:]
    return torch.cat([x[:, :f], later], 1), torch.cat([t[:, :f], t_later], 1)


def encoder_inputs(cfg, x, t, camera):
    """Arguments of `encode` for a whole clip x, as history at times t: the places of its frames, and those of
    the first chunk once more, unknown, since this one too must be generated."""
    F, f = x.shape[1], cfg.first_chunk
    past, t_past = shifted(cfg, x, t)
    places = [*range(F), *range(f)]
    causal = causal_mask(chunk_ids(F, cfg.chunk, f))
    return dict(
        past=functional.pad(past, (0, 0, 0, 0, 0, 0, 0, f)),
        t_past=functional.pad(t_past, (0, f), value=1.0),
        camera=camera.frames(places),
        mask=torch.block_diag(causal, torch.ones(f, f)).bool(),
        pos=places,
    )

# -----------------------------------------------------------------------------
# rollout: the only chunk-by-chunk loop

class Walk:
    """What `rollout` carries from chunk to chunk: the KV cache, its frames, the origin of all poses.

    How the oldest frames leave a full window (cfg.eviction):

    chunks    before the newest chunk is cached, in whole chunks; a sink moves up, right before the rest
    frames    after that, when the next chunk begins, one by one; a sink keeps its position. As minWM

    Which frames the chunks (3 4) and (5 6) see before them, with a sink, in a window of 6:

                         chunks    frames
    (3 4) is denoised    0 1 2     0 1 2
    (3 4) is cached      0         0 1 2
    (5 6) is denoised    0 3 4     0 2 3 4
    """

    def __init__(self, model, text, noise, window, guidance, over, jump, null_text):
        self.model, self.cfg = model, model.cfg
        self.noise, self.window = noise, window
        self.guidance, self.over, self.jump = guidance, over, jump
        self.B = len(text)
        if guidance != 1:                          # the null branch is the second half of the batch
            null = empty_prompt(text, null_text) if over == 'text' else text
            text = torch.cat([text, null])
        self.text = text
        # can old frames simply be evicted? Not if cached keys hold poses relative to an origin that moves
        self.rolls = self.cfg.sink or 'plucker' not in self.cfg.camera
        self.by_frames = self.cfg.eviction == 'frames'
        self.sink = int(self.cfg.sink)             # frames that are never evicted
        self.cache = None
        self.history = []                          # (latents, Camera) of the window's chunks, for `rebase`
        self.pending = None                        # the newest chunk, not cached yet: latents, times, camera
        self.origin = None                         # (B, 4, 4): the pose that the network sees as the identity
        self.frames_done = 0
        self.last_pose = None                      # (B, 1, 4, 4): of the newest frame
        self.must_stay = {}                        # what the window holds beside a chunk: {name: frames}
        self.leaving = 0                           # frames, behind the sink, that the next chunk does not see
        self.context = None                        # split networks: what the encoder has made for this chunk

    def begin(self, x, camera):
        """The first chunk: its latents give the size of the cache, its first pose the origin."""
        L = x[0, 0, 0].numel() // self.cfg.patch ** 2
        dtype = self.model.patch_embedding.weight.dtype
        frames = self.window
        if self.by_frames:                         # a call holds one chunk's window and the next chunk
            frames += self.cfg.chunk
        self.cache = self.model.cache_type(self.cfg, len(self.text), frames, L, x.device, dtype)
        self.origin = camera.c2w[:, 0]

    def place(self, camera, before):
        """A chunk's camera as the network sees it: poses from the origin, moves from the frame `before`."""
        jump = None
        if self.cfg.sink and self.frames_done < 2:                    # frame 1 is in this chunk
            jump = self.jump
        pose = relative(camera.c2w, self.origin)
        placed = Camera(pose, camera.K, camera.on, moves(camera.c2w, before, jump))
        if self.guidance != 1:
            _, null = null_condition(self.over, self.text[:self.B], placed)
            placed = Camera.cat([placed, null], 0)
        return placed

    def times(self, x, t):
        return torch.full((len(self.text), x.shape[1]), t, device=x.device)

    def noised(self, x, level):
        """The frames as they enter the cache, and their times."""
        if level > 0:
            x = (1 - level) * x + level * self.noise(x.shape[1])
        return x, self.times(x, level)

    def call(self, x, t, camera, mask=None, last=None, grad=False):
        """One network call on top of the cache, with guidance."""
        if self.guidance != 1:
            x = torch.cat([x, x])
        with torch.set_grad_enabled(grad):
            v = self.model(x, t, self.text, camera, mask, cache=self.cache, last=last, context=self.context)
        if self.guidance == 1:
            return v
        cond, null = v[:self.B], v[self.B:]
        return null + self.guidance * (cond - null)

    def commit(self):
        """Write the pending chunk into the cache, by a call that does nothing else."""
        x, t, camera = self.pending
        self.pending = None
        self.call(x, t, camera, self.mask(x.shape[1]))
        self.cache.end += x.shape[1]
        self.evict()

    def mask(self, new, n=0):
        """What `new` frames on their way into the cache, and a chunk of n frames behind them, may see."""
        end = self.cache.end
        mask = torch.ones(new + n, end + new + n, dtype=torch.bool)
        if end + self.cache.gone == 0:             # the first frames: several chunks, if they are given
            mask[:new, :new] = causal_mask(chunk_ids(new, self.cfg.chunk, self.cfg.first_chunk))
        mask[:new, end + new:] = False             # the past does not see what follows it
        mask[new:, self.sink:self.sink + self.leaving] = False        # the chunk does not see what leaves
        return mask

    def evict(self):
        """Drop the frames that are to leave the window, if any."""
        if self.leaving:
            self.cache.roll(self.leaving, self.sink)
            if self.sink and not self.by_frames:
                self.cache.move_sink(self.sink)
        self.leaving = 0

    def velocity(self, x, t, camera, grad=False):
        """v of the chunk x at time t. The same call commits a pending chunk: one call less per chunk."""
        if self.pending and grad:                  # but not together: the cache carries no gradient
            self.commit()
        if not self.pending:
            return self.call(x, self.times(x, t), camera, grad=grad)
        past, t_past, camera_past = self.pending
        self.pending = None
        new, n = past.shape[1], x.shape[1]
        v = self.call(
            torch.cat([past, x], 1),
            torch.cat([t_past, self.times(x, t)], 1),
            camera_past.followed_by(camera),
            self.mask(new, n),
            last=n,
        )
        self.cache.end += new
        self.evict()
        return v

    def make_room(self, n):
        """Before a chunk of n frames: the oldest frames leave a full window. An error, if n frames do not fit
        beside those that must stay."""
        least = n + sum(self.must_stay.values())
        if least > self.window:
            parts = {'the next chunk': n} | self.must_stay
            why = ', '.join(f'{frames} for {name}' for name, frames in parts.items() if frames)
            raise BadInput(f'a window of {self.window} frames is too small: use at least {least} ({why})')
        if self.pending is None:
            return
        newest = self.pending[0].shape[1]
        excess = self.cache.end + newest + n - self.window            # frames
        if excess > 0:
            self.leaving = excess
            if not self.by_frames:                 # now, and only whole chunks stay
                self.leaving += (self.window - self.sink) % self.cfg.chunk
                self.evict()

    def remember(self, x, camera, embedded, level, context):
        """Put a finished chunk into the window: the next chunk's first call will cache it at noise `level`.
        Or restart a full window that does not roll, at noise `context`."""
        cfg, n = self.cfg, x.shape[1]
        self.frames_done += n
        self.last_pose = camera.c2w[:, -1:]
        if not self.rolls:
            self.history.append((x, camera))
            half = max(0, (self.window + 1) // 2 - cfg.first_chunk)
            keep = cfg.first_chunk + half // cfg.chunk * cfg.chunk    # whole chunks
            self.must_stay = {'the newest half': keep}
        elif self.by_frames:
            self.must_stay = {'the sink': self.sink}
        else:                                      # the first chunk includes the sink
            self.must_stay = {'the sink': min(self.sink, self.cache.end), 'the newest chunk': n}
        if self.rolls or self.cache.end + n + cfg.chunk <= self.window:
            self.pending = *self.noised(x, level), embedded
        elif keep + cfg.chunk <= self.window:      # else an error if another chunk is asked for
            self.rebase(keep, context)

    def rebase(self, keep, context):
        """Restart the window: encode its newest `keep` frames again in one pass, the first as the origin, all
        at noise level `context`. Training saw such sequences, and nothing in the cache is stale."""
        chunks, cameras = zip(*self.history)
        x = torch.cat(chunks, 1)[:, -keep:]
        camera = Camera.cat(cameras).frames(slice(-keep, None))
        self.history = [(x, camera)]
        self.origin = camera.c2w[:, 0]
        self.cache.end = 0
        self.encode_again(*self.noised(x, context), self.place(camera, None))

    def encode_again(self, x, t, camera):
        """Fill an empty window with these frames."""
        self.call(x, t, camera, self.mask(x.shape[1]))
        self.cache.end = x.shape[1]


class SplitWalk(Walk):
    """The walk of a split network. The encoder reads the newest chunk, once, in the place of the next, which
    also writes its keys and values; the decoder needs no cache."""

    def encode(self, n, past, t, camera, placed):
        """The context of the last n frames. placed: their Camera in training, for a second pass that carries
        gradient and only reads the cache."""
        if self.guidance != 1:
            past = torch.cat([past, past])
        with torch.no_grad():
            mask = self.mask(past.shape[1])
            context = self.model.encode(past, t, self.text, camera, mask, cache=self.cache)
        self.cache.end += past.shape[1] - n
        if placed:
            past, t = past[:, -n:], t[:, -n:]
            context = self.model.encode(past, t, self.text, placed, self.mask(n), cache=self.cache)
        self.context = context[:, -n:]

    def read(self, x, camera, placed=None):
        """Before the chunk x is generated. placed: in training, its Camera, which learns too."""
        n = x.shape[1]
        if self.pending is None:                   # the first chunk: nothing is known
            self.encode(n, torch.zeros_like(x), self.times(x, 1), camera, placed)
            return
        past, t, camera_past = self.pending
        self.pending = None
        if self.cache.end + self.cache.gone == 0:  # the places before are not encoded yet
            x, t = torch.cat([past, x], 1), torch.cat([t, self.times(x, 0)], 1)
            past, t = shifted(self.cfg, x, t)
            camera = camera_past.followed_by(camera)
        else:
            self.cache.end += n
        self.encode(n, past, t, camera, placed)

    @torch.no_grad()
    def encode_again(self, x, t, camera):
        self.pending = x, t, self.model.embed_camera(camera, *x.shape[-2:])


def rollout(model, cameras, text, times, noise, first_frame=None, guidance=1.0, window=64, renoise=False,
            exit_step=None, first_times=None, context=0.0, over='camera', jump=None, null_text=None):
    """Generate a video chunk by chunk with a KV cache: yield clean chunks (B, n, C, H, W) for each camera.
    A chunk costs len(times) - 1 calls: the first call of the next chunk also writes it to the cache. (With
    gradient, or when the window restarts, it is a separate call.) In a split network these are the decoder's;
    the encoder is called once a chunk, and writes the one before.

    cameras      iterator of Camera, one per chunk, poses in any world frame; asked only when a chunk is due
    text         (B, text_len, text_dim)
    times        falling times of the sampler, 1 .. 0; first_times: those of a first chunk that is generated
    noise        function n -> (B, n, C, H, W) that draws noise for n frames
    first_frame  latents (B, n, C, H, W) of the first chunk, given at t = 0; None: it is generated
    guidance     s in v = v_null + s (v_cond - v_null); the null branch drops the camera or the text (`over`)
    window       frames that a chunk sees, itself included. When it is full, the oldest are evicted (see Walk)
                 if the origin of the poses stays (a sink, or no Plücker maps), else the newest half is
                 encoded again: rebase
    context      noise level at which generated frames enter the cache, as in training: it hides their faults
    renoise      False: Euler steps. True, for few-step models: predict x0, add fresh noise of the next time
    exit_step    training (Self Forcing, algorithm 1): every chunk stops at this step and its x0 is the chunk.
                 That call carries gradient, if enabled; the cache is written from the detached x0
    jump         (B,) bool, with a sink: walks whose second frame is elsewhere than their first one
    null_text    the empty prompt, see empty_prompt
    """
    kind = SplitWalk if model.cfg.encoder_blocks else Walk
    walk = kind(model, text, noise, window, guidance, over, jump, null_text)
    for camera in cameras:
        n = camera.K.shape[1]
        walk.make_room(n)
        opening = walk.cache is None
        given = opening and first_frame is not None
        x = first_frame if given else noise(n)
        if opening:
            walk.begin(x, camera)
        placed = walk.place(camera, walk.last_pose)
        with torch.no_grad():
            embedded = model.embed_camera(placed, *x.shape[-2:])

        # the calls with gradient embed the camera again, so that these weights learn too
        training = exit_step is not None and torch.is_grad_enabled() and not given
        if model.cfg.encoder_blocks and not given:
            walk.read(x, embedded, placed if training else None)

        # denoise, unless the chunk is given
        plan = first_times if opening and first_times is not None else times
        calls = len(plan) - 1 if exit_step is None else exit_step + 1
        for i in range(0 if given else calls):
            t, t_next = plan[i:i + 2].tolist()
            last = i == calls - 1
            grad = last and training
            v = walk.velocity(x, t, placed if grad else embedded, grad)
            if not renoise and not (last and exit_step is not None):  # Euler
                x = x + (t_next - t) * v
                continue
            x = x - t * v                                             # predict x0
            if not last:                                              # add fresh noise
                x = (1 - t_next) * x + t_next * noise(x.shape[1])
        yield x
        walk.remember(x.detach(), camera, embedded, 0.0 if given else context, context)


def rollout_clip(model, c2w, K, text, times, noise, first_frame=None, **options):
    """A rollout along c2w (B, F, 4, 4), K (B, F, 4) as one video (B, F, C, H, W); options as `rollout`.
    first_frame (B, n, C, H, W) is given, unless it is shorter than the model's first chunk."""
    first_chunk = model.cfg.first_chunk
    if first_frame is not None:
        given = first_frame.shape[1]
        first_frame = first_frame if given >= first_chunk else None
        first_chunk = max(first_chunk, given)
    ids = chunk_ids(c2w.shape[1], model.cfg.chunk, first_chunk)
    sizes = torch.bincount(ids).tolist()                              # frames of each chunk
    cameras = map(Camera, c2w.split(sizes, 1), K.split(sizes, 1))
    chunks = list(rollout(model, cameras, text, times, noise, first_frame, **options))
    return torch.cat(chunks, 1)
