"""
The prompt of HunyuanVideo-1.5's network (backbones/hunyuan.py): attention over words and frames, and the
modules that make tokens of words, letters and a picture's features.
"""
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask

from model import attention, block_rows, plain_attention, sinusoid

# -----------------------------------------------------------------------------
# attention whose keys are [words | tokens of frames]

def attend(q, k, v, valid=None, rows=None):
    """softmax(q k^T / sqrt Dh) v for (B, S, N, Dh). valid (B, T): which of the words there are; None: all.
    rows: mask_rows of the frames, or a flex_joint_mask; None: every query sees every frame."""
    if isinstance(rows, BlockMask):
        from backbones.flex import flex_frame_attention
        return flex_frame_attention(q, k, v, rows)
    if rows is None:
        return biased_attention(q, k, v, words_bias(valid, k.shape[1]))
    L = q.shape[1] // len(rows)                                       # tokens a frame
    T = k.shape[1] - L * len(rows[0])
    blocks = block_rows(rows, L, L, q.dtype, q.device)
    k_frames, v_frames = (x[:, T:].unflatten(1, (-1, L)) for x in (k, v))
    out = []
    for part, (_, seen, bias) in zip(q.split([n * L for n, _, _ in blocks], 1), blocks):
        keys = torch.cat([k[:, :T], k_frames[:, seen].flatten(1, 2)], 1)
        values = torch.cat([v[:, :T], v_frames[:, seen].flatten(1, 2)], 1)
        all_bias = words_bias(valid, keys.shape[1])
        if bias is not None:                       # of these frames (queries, keys)
            here = functional.pad(bias, (T, 0))
            all_bias = here if all_bias is None else all_bias + here
        out.append(biased_attention(part, keys, values, all_bias))
    return torch.cat(out, 1)


def words_bias(valid, n_keys):
    """What is added to scores, (B, 1, 1, n_keys) or None: -inf where a key is a word that is not there."""
    if valid is None:
        return None
    bias = torch.where(valid, 0., -torch.inf)[:, None, None]          # (B, 1, 1, T)
    return functional.pad(bias, (0, n_keys - valid.shape[1]))


def biased_attention(q, k, v, bias):
    """softmax(q k^T / sqrt Dh + bias) v for (B, S, N, Dh)."""
    if bias is None:
        return attention(q, k, v)
    slow = not q.is_cuda and torch.is_grad_enabled()                  # sdpa's backward, see model.py
    kernel = plain_attention if slow else functional.scaled_dot_product_attention
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        return kernel(q, k, v, bias.to(q)).transpose(1, 2)

# -----------------------------------------------------------------------------
# modules, under HunyuanVideo-1.5's parameter names

class Mlp(nn.Module):
    def __init__(self, D, width, act):
        super().__init__()
        self.fc1 = nn.Linear(D, width)
        self.act = act
        self.fc2 = nn.Linear(width, D)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class NumberEmbedding(nn.Module):
    """Times, or actions, of any shape (...) -> (..., D)."""

    def __init__(self, cfg):
        super().__init__()
        self.freq_dim = cfg.freq_dim
        self.mlp = nn.Sequential(nn.Linear(cfg.freq_dim, cfg.dim), nn.SiLU(), nn.Linear(cfg.dim, cfg.dim))

    def forward(self, t):
        return self.mlp(sinusoid(t, self.freq_dim).to(self.mlp[0].weight.dtype))


class RefinerBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        D = cfg.dim
        self.N = cfg.num_heads
        self.norm1 = nn.LayerNorm(D, 1e-6)
        self.self_attn_qkv = nn.Linear(D, 3 * D)
        self.self_attn_proj = nn.Linear(D, D)
        self.norm2 = nn.LayerNorm(D, 1e-6)
        self.mlp = Mlp(D, 4 * D, nn.SiLU())
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))

    def forward(self, x, c, valid):
        """Words x (B, T, D), conditioned on c (B, D)."""
        gate1, gate2 = self.adaLN_modulation(c)[:, None].chunk(2, -1)
        q, k, v = self.self_attn_qkv(self.norm1(x)).unflatten(-1, (3, self.N, -1)).unbind(2)
        x = x + gate1 * self.self_attn_proj(attend(q, k, v, valid).flatten(-2))
        return x + gate2 * self.mlp(self.norm2(x))


class TextRefiner(nn.Module):
    """Lets words see each other once more: in the language model they saw only those before them."""

    def __init__(self, cfg):
        super().__init__()
        D = cfg.dim
        self.input_embedder = nn.Linear(cfg.text_dim, D)
        self.t_embedder = NumberEmbedding(cfg)
        self.c_embedder = nn.ModuleDict({'linear_1': nn.Linear(cfg.text_dim, D), 'linear_2': nn.Linear(D, D)})
        blocks = nn.ModuleList(RefinerBlock(cfg) for _ in range(cfg.refiner_blocks))
        self.individual_token_refiner = nn.ModuleDict({'blocks': blocks})

    def forward(self, text, valid, t):
        """(B, T, text_dim), of which `valid` (B, T) are words, at time t (1 or B, 1) -> (B, T, D)."""
        share = valid.to(text) / valid.sum(1, keepdim=True)
        mean = (share[:, :, None] * text).sum(1)                      # (B, text_dim)
        c = self.c_embedder['linear_2'](functional.silu(self.c_embedder['linear_1'](mean)))
        c = c + self.t_embedder(t)[:, 0]
        x = self.input_embedder(text)
        for block in self.individual_token_refiner['blocks']:
            x = block(x, c, valid)
        return x


class GlyphProjection(nn.Module):
    def __init__(self, cfg, width=2048):
        super().__init__()
        self.layernorm = nn.LayerNorm(cfg.glyph_dim)
        self.fc1 = nn.Linear(cfg.glyph_dim, width)
        self.fc2 = nn.Linear(width, width)
        self.fc3 = nn.Linear(width, cfg.dim)

    def forward(self, x):
        x = functional.gelu(self.fc1(self.layernorm(x)))
        return self.fc3(functional.gelu(self.fc2(x)))


class ImageProjection(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        n = cfg.image_dim
        self.proj = nn.Sequential(
            nn.LayerNorm(n),
            nn.Linear(n, n),
            nn.GELU(),
            nn.Linear(n, cfg.dim),
            nn.LayerNorm(cfg.dim),
        )

    def forward(self, x):
        return self.proj(x)
