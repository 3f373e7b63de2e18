"""
The prompt of HunyuanVideo-1.5's network (backbones/hunyuan.py): attention over words and frames, and the
modules that make tokens of words, letters and a picture's features.
"""
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask

from model import attention, plain_attention, sinusoid

# -----------------------------------------------------------------------------
# attention of frames and words

def joint_bias(valid, frames, n_keys):
    """What is added to scores whose keys are [words | n_keys tokens of frames]: 0, or -inf to forbid;
    (B, 1, queries or 1, keys), or None if nothing is forbidden. valid (B, T): which words there are. frames:
    the bias of the frames, (queries, n_keys), or None."""
    if frames is None and valid.all():
        return None
    words = torch.where(valid, 0., -torch.inf)[:, None, None]         # (B, 1, 1, T)
    if frames is None:
        return functional.pad(words, (0, n_keys))
    words = words.expand(-1, -1, len(frames), -1)
    return torch.cat([words, frames.expand(len(valid), 1, -1, -1)], -1)


def attend(q, k, v, bias):
    """softmax(q k^T / sqrt Dh + bias) v for (B, S, N, Dh)."""
    if bias is None:
        return attention(q, k, v)
    if isinstance(bias, BlockMask):
        from backbones.flex import flex_frame_attention
        return flex_frame_attention(q, k, v, bias)
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

    def forward(self, x, c, bias):
        """Words x (B, T, D), conditioned on c (B, D)."""
        gate1, gate2 = self.adaLN_modulation(c)[:, None].chunk(2, -1)
        q, k, v = self.self_attn_qkv(self.norm1(x)).unflatten(-1, (3, self.N, -1)).unbind(2)
        x = x + gate1 * self.self_attn_proj(attend(q, k, v, bias).flatten(-2))
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
        bias = joint_bias(valid, None, 0)
        for block in self.individual_token_refiner['blocks']:
            x = block(x, c, bias)
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
