"""
HunyuanVideo-1.5's network, an MMDiT: a second backbone. The recipe does not care which network it is given.

    python finetune_camera.py --camera none --preset hy-nano --steps 300      # and so on, not split
    python -m backbones.layouts hy1.5-8b --height 480 --width 832             # what it takes

In Wan's network frames attend to each other and then to the prompt. Here the prompt is a second stream of
tokens with weights of its own, and each block has one attention over [words | frames]:

    a whole clip (no mask, no cache)    every token sees every token
    causal                              words see words, frames see words and what the mask of frames allows

So in a walk the words' keys and values never change, and are computed once. Words have time 0, as in minWM
and HY-WorldPlay. The weights have HunyuanVideo-1.5's names and shapes; the code is written from a
description, and tests/test_hunyuan.py compares it with diffusers'.

The prompt is one tensor (B, text_len, text_dim): image_len rows of the picture's features (SigLIP), glyph_len
rows of letters to be drawn (byT5), and words (Qwen2.5-VL), with zeros behind. A row of zeros is no token.

Cameras: Plücker maps as in model.py; PRoPE, with an output projection and cache slots of its own;
HY-WorldPlay's actions (backbones/worldplay.py); or several: --camera prope+action.

Different from HunyuanVideo-1.5 and minWM: frame 0 may be given, and its time is then 0, as everywhere here;
theirs is noisy as the others, and its picture is always given. A given frame is also the picture to begin
with among the 65 input channels (32 noisy, 32 given, 1 mask). So stage 1 wants --context_noise 0: else no
history has one. In a window that rolls in whole chunks the words move along, as a sink does, so that frames
never get further from them than in training.
"""
import copy
import functools
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from backbones.hunyuan_words import (GlyphProjection, ImageProjection, Mlp, NumberEmbedding, TextRefiner,
                                     attend)
from backbones.worldplay import action_labels
from camera import BadInput
from model import (CameraEmbedding, DiT, KVCache, ModelConfig, RMSNorm, axis_turns, mask_rows, project,
                   rotate)


@dataclass
class HunyuanConfig(ModelConfig):
    text_len: int = 16            # rows of the prompt, of all three kinds
    image_len: int = 0            # the first rows: features of frame 0
    image_dim: int = 1152
    glyph_len: int = 0            # the next ones: letters
    glyph_dim: int = 1472
    refiner_blocks: int = 2

    def build(self):
        return MMDiT(self)


PRESETS = {                       # parameters without the camera: 0.4 M (tests), 3.9 M, 8.33 B
    'hy-tiny': HunyuanConfig(dim=64, ffn_dim=128, num_heads=2, num_layers=2),
    'hy-nano': HunyuanConfig(dim=160, ffn_dim=480, num_heads=5, num_layers=4, refiner_blocks=1),
    'hy1.5-8b': HunyuanConfig(dim=2048, ffn_dim=8192, num_heads=16, num_layers=54, patch=1,
                              in_dim=32, out_dim=32, text_dim=3584, text_len=1985, image_len=729,
                              glyph_len=256, chunk=4, shift=5.0),
}

# -----------------------------------------------------------------------------
# places

@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)                       # a table made while streaming may serve training
def rotary_table(pos, h, w, Dh, device):
    """Unit complex numbers (F h w, 1, Dh / 2) for F = len(pos) frames of h x w tokens: of each head an eighth
    turns with the frame, 3.5 eighths with the row and as many with the column; base 256."""
    n_frame = Dh // 16
    n_space = Dh * 7 // 32
    frame = axis_turns(pos, n_frame, 256)[:, None, None]              # (F, 1, 1, n_frame)
    row = axis_turns(range(h), n_space, 256)[:, None]                 # (h, 1, n_space)
    column = axis_turns(range(w), n_space, 256)                       # (w, n_space)
    axes = [turns.expand(len(pos), h, w, -1) for turns in (frame, row, column)]
    return torch.cat(axes, -1).view(-1, 1, Dh // 2).to(device)


class HunyuanCache(KVCache):
    """A KVCache whose `text` holds the words' keys and values of each block, and `valid` which there are."""

    def __init__(self, cfg, *size, **options):
        super().__init__(cfg, *size, **options)
        self.valid = None
        self.words_move = cfg.eviction == 'chunks'

    def turn(self, frames, Dh, device):
        return rotary_table((frames,), 1, 1, Dh, device)

    def place_words(self, k):
        """The words' keys (B, T, N, Dh), where the window now begins. In minWM's walks, which lose frame by
        frame, they stay where they were."""
        if not self.gone or not self.words_move:
            return k
        return rotate(k, self.turn(self.gone, k.shape[-1], k.device))

    def forget_words(self):
        """Another prompt from here on: the next call computes the words' keys and values of its text."""
        self.text = [None] * len(self.text)

# -----------------------------------------------------------------------------
# the transformer, under HunyuanVideo-1.5's parameter names

class Modulation(nn.Module):
    """Embedded times (B, F, D) -> n vectors (B, F, 1, D) each."""

    def __init__(self, D, n):
        super().__init__()
        self.n = n
        self.linear = nn.Linear(D, n * D)

    def forward(self, e):
        return self.linear(functional.silu(e)).unsqueeze(2).chunk(self.n, -1)


def modulated(x, shift, scale):
    """LayerNorm without weights, scaled and shifted, for tokens (B, F, L, D)."""
    return torch.addcmul(shift, functional.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


@dataclass
class Sight:
    """Who sees whom in a pass."""
    valid: torch.Tensor | None    # (B, T) which words there are; None: all
    rows: object                  # the frames' mask, as `attend` takes it; None: each sees all
    words_see_frames: bool


class DoubleBlock(nn.Module):
    """Frames (img) and words (txt) have weights of their own and meet in the attention."""

    def __init__(self, cfg):
        super().__init__()
        D, Dh = cfg.dim, cfg.dim // cfg.num_heads
        self.N, self.layers = cfg.num_heads, cfg.num_layers
        for stream in ('img', 'txt'):
            parts = {'mod': Modulation(D, 6), 'mlp': Mlp(D, cfg.ffn_dim, nn.GELU('tanh'))}
            parts |= {f'attn_{name}': nn.Linear(D, D) for name in ('q', 'k', 'v', 'proj')}
            parts |= {f'attn_{name}_norm': RMSNorm(Dh, cfg.eps) for name in ('q', 'k')}
            for name, part in parts.items():
                self.add_module(f'{stream}_{name}', part)
        if 'prope' in cfg.camera:
            self.img_attn_prope_proj = nn.Linear(D, D)

    def part(self, stream, name):
        return getattr(self, f'{stream}_{name}')

    def qkv(self, stream, x, shift, scale, last):
        """Queries (B, last L, N, Dh) of the last frames, keys and values (B, S, N, Dh) of all, for tokens x
        (B, F, L, D). They are not rotated yet."""
        x = modulated(x, shift, scale)
        if torch.is_autocast_enabled(x.device.type):                  # cast once for q, k and v
            x = x.to(torch.get_autocast_dtype(x.device.type))
        inputs = {'q': x[:, x.shape[1] - last:], 'k': x, 'v': x}
        q, k, v = (self.part(stream, f'attn_{name}')(tokens.flatten(1, 2)).unflatten(-1, (self.N, -1))
                   for name, tokens in inputs.items())
        q = self.part(stream, 'attn_q_norm')(q)
        k = self.part(stream, 'attn_k_norm')(k)
        return q, k, v

    def finish(self, stream, x, y, gate1, shift, scale, gate2):
        """Add what the attention has found, y (B, S, D), and the MLP, to tokens x (B, F, L, D)."""
        x = torch.addcmul(x, y.view(x.shape).to(x.dtype), gate1)
        y = self.part(stream, 'mlp')(modulated(x, shift, scale))
        return torch.addcmul(x, y.to(x.dtype), gate2)

    def forward(self, x, words, e, e_words, table, prope, sight, cache, layer, last):
        """Frames x (B, F, L, D) at times e (B, F, D) and words (B, 1, T, D) at e_words (1, 1, D) -> the last
        frames and the words. words is None if the cache has their keys and values."""
        F, L = x.shape[1:3]
        shift, scale, *frames_rest = self.img_mod(e)
        q, k, v = self.qkv('img', x, shift, scale, last)
        if words is None:
            k_words, v_words = cache.text[layer]
        else:
            shift, scale, *words_rest = self.txt_mod(e_words)
            q_words, k_words, v_words = self.qkv('txt', words, shift, scale, 1)
            if cache is not None and not torch.is_grad_enabled():
                cache.text[layer] = k_words, v_words

        # one attention, over words, which stand where the window begins, and all frames so far
        q_rot = rotate(q, table[(F - last) * L:]).to(v.dtype)
        k_rot = rotate(k, table).to(v.dtype)
        k_placed = k_words if cache is None else cache.place_words(k_words)
        keys, values = with_words(k_placed, v_words, k_rot, v, cache, layer)
        y = self.img_attn_proj(attend(q_rot, keys, values, sight.valid, sight.rows).flatten(-2))
        if prope is not None:
            z = self.prope_attention(q, k, v, k_words, v_words, prope, sight, cache, layer + self.layers)
            y = y + z.to(y.dtype)
        x = self.finish('img', x[:, F - last:], y, *(part[:, F - last:] for part in frames_rest))
        if words is None:
            return x, None

        if not sight.words_see_frames:
            keys, values = k_words, v_words
        y = self.txt_attn_proj(attend(q_words, keys, values, sight.valid).flatten(-2))
        return x, self.finish('txt', words, y, *words_rest)

    def prope_attention(self, q, k, v, k_words, v_words, prope, sight, cache, slot):
        """PRoPE, as in model.py: q^T P_q P_k^-1 k and the values alike; the words take part as they are. Its
        keys are not the rotary ones, so it has separate slots in the cache."""
        P, P_inv = prope.unbind(2)                                    # (B, F, 4, 4) each
        F_query = P.shape[1] * q.shape[1] // k.shape[1]
        P_query = P[:, -F_query:]
        q_cam = project(q, P_query.mT).to(v.dtype)
        k_cam = project(k, P_inv).to(v.dtype)
        v_cam = project(v, P_inv)
        keys, values = with_words(k_words, v_words, k_cam, v_cam, cache, slot)
        z = project(attend(q_cam, keys, values, sight.valid, sight.rows), P_query)
        z = self.img_attn_prope_proj(z.flatten(-2)).unflatten(1, (F_query, -1))
        camera_on = P_query[..., 3:, 3:]                              # (B, F_query, 1, 1): 0 if dropped
        return (z * camera_on).flatten(1, 2)


def with_words(k_words, v_words, k, v, cache, slot):
    """Keys and values of [words | frames]; with a cache, of all frames so far."""
    if cache is not None:
        k, v = cache.update(slot, k, v)
    return torch.cat([k_words.to(k), k], 1), torch.cat([v_words.to(v), v], 1)


class MMDiT(DiT):
    """v(x_t, t, text, camera) as a DiT, which see: the same calls, masks, caches and cameras."""
    cache_type = HunyuanCache

    def __init__(self, cfg):
        nn.Module.__init__(self)
        if not set(cfg.camera.split('+')) <= {'none', 'plucker', 'prope', 'action'}:
            raise BadInput(f'--camera {cfg.camera}: choose plucker, prope, action, some joined by +, or none')
        if cfg.encoder_blocks:
            raise BadInput('--encoder_blocks: this network is not split: leave it out')
        if cfg.dim // cfg.num_heads % 32:
            raise BadInput(f'{cfg.num_heads} heads share a width of {cfg.dim}: use a multiple of 32 for each')
        self.cfg = cfg
        self.checkpoint = False                    # keep one activation a block, compute the others again
        D, patch = cfg.dim, (1, cfg.patch, cfg.patch)
        self.img_in = nn.ModuleDict({'proj': nn.Conv3d(2 * cfg.in_dim + 1, D, patch, patch)})
        self.txt_in = TextRefiner(cfg)
        if cfg.glyph_len:
            self.byt5_in = GlyphProjection(cfg)
        if cfg.image_len:
            self.vision_in = ImageProjection(cfg)
        self.cond_type_embedding = nn.Embedding(3, D)                 # words, letters, image
        self.time_in = NumberEmbedding(cfg)
        self.double_blocks = nn.ModuleList(DoubleBlock(cfg) for _ in range(cfg.num_layers))
        modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))
        output = nn.Linear(D, cfg.patch ** 2 * cfg.out_dim)
        self.final_layer = nn.ModuleDict({'adaLN_modulation': modulation, 'linear': output})
        if 'plucker' in cfg.camera:
            channels = 12 * (1 + 2 * cfg.camera_freqs)
            self.camera_embedding = nn.Linear(channels * cfg.patch ** 2, D, bias=False)
            self.camera_motion = nn.Linear(12, D, bias=False)
        if 'action' in cfg.camera:
            self.action_in = NumberEmbedding(cfg)
        self.reset()

    @torch.no_grad()
    def reset(self):
        """Weights as at the start of training. Zero: the output, all modulation, what a condition adds."""
        zero = ('mod.linear', 'adaLN_modulation.1', 'final_layer.linear', 'prope_proj', 'camera_',
                'action_in.mlp.2')
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    module.bias.zero_()
                if any(part in name for part in zero):
                    module.weight.zero_()
        self.cond_type_embedding.weight.zero_()
        self.patch_embedding.weight[:, self.cfg.in_dim:] = 0

    @property
    def blocks(self):
        return self.double_blocks

    @property
    def patch_embedding(self):
        return self.img_in['proj']

    def embed_camera(self, camera, H, W):
        out = super().embed_camera(camera, H, W)
        if camera is not None and 'action' in self.cfg.camera:
            actions = self.action_in(action_labels(camera.move) / 1000).float()           # (B, F, D)
            if camera.on is not None:
                actions = actions * camera.on[:, None, None]
            out.time = actions if out.time is None else out.time + actions
        return out

    def embed_words(self, text, t):
        """The prompt (B, text_len, text_dim) at time t (1 or B, 1) -> tokens (B, 1, T, D), and which of these
        there are, (B, T)."""
        i, g = self.cfg.image_len, self.cfg.image_len + self.cfg.glyph_len
        text = text.to(self.patch_embedding.weight.dtype)
        valid = text.ne(0).any(-1)
        valid[:, g] = True                         # the empty prompt is one word
        kinds = self.cond_type_embedding.weight
        parts = [self.txt_in(text[:, g:], valid[:, g:], t) + kinds[0]]
        if g > i:
            parts.insert(0, self.byt5_in(text[:, i:g, :self.cfg.glyph_dim]) + kinds[1])
        if i:
            parts.insert(0, self.vision_in(text[:, :i, :self.cfg.image_dim]) + kinds[2])
        return torch.cat(parts, 1).unsqueeze(1), valid

    def words_for(self, text, t, mask, cache):
        """embed_words for a pass; None in place of the tokens if the cache has their keys and values."""
        keep = cache is not None and not torch.is_grad_enabled()
        if keep and cache.text[0] is not None:
            return None, cache.valid
        words, valid = self.embed_words(text, t)
        if len(words) == 1 and (mask is None or cache is not None):   # in training flex wants one length
            words = words[:, :, valid[0]]
            valid = valid[:, valid[0]]
        if keep:
            cache.valid = valid
        return words.to(self.patch_embedding.weight.dtype), valid

    def frames_see(self, valid, mask, cache, L):
        """A mask of frames as `attend` takes it."""
        if mask is None or mask.all():
            return None
        if valid.is_cuda and cache is None:        # training, and the passes beside it
            from backbones.flex import flex_joint_mask
            return flex_joint_mask(valid, mask_rows(mask), L)
        return mask_rows(mask)

    def forward(self, x, t, text, camera=None, mask=None, pos=None, cache=None, last=None, context=None):
        """Velocity v (B, F, C, H, W), float32, of x (B, F, C, H, W) at times t (B, F); arguments as DiT's."""
        F, _, H, W = x.shape[1:]
        p, dtype = self.cfg.patch, self.patch_embedding.weight.dtype
        h, w = H // p, W // p
        last = F if last is None else last
        if pos is None:
            start = 0 if cache is None else cache.gone + cache.end
            pos = range(start, start + F)
        if not isinstance(camera, CameraEmbedding):
            camera = self.embed_camera(camera, H, W)

        # 1) frames, times and words to width D
        patches = rearrange(self.frames_in(x, t, pos), 'b f c (h p) (w q) -> b f (h w) (c p q)', p=p, q=p)
        weight = self.patch_embedding.weight.flatten(1)
        x = functional.linear(patches.to(dtype), weight, self.patch_embedding.bias)
        t_words = self.words_time(t)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(dtype)                                           # (B, F, L, D)
            e = self.time_in(t)                                       # (B, F, D)
            e_words = self.time_in(t_words)                           # (1 or B, 1, D)
            if camera.tokens is not None:
                x = x + camera.tokens.to(dtype)
            if camera.time is not None:
                e = e + camera.time.to(dtype)
        words, valid = self.words_for(text, t_words, mask, cache)

        # 2) the blocks
        table = rotary_table(tuple(pos), h, w, self.cfg.dim // self.cfg.num_heads, x.device)
        whole_clip = mask is None and cache is None
        if cache is not None:
            mask = cache.prepare(F, mask)
        there = None if valid.all() else valid
        sight = Sight(there, self.frames_see(valid, mask, cache, h * w), whole_clip)
        again = self.checkpoint and torch.is_grad_enabled()
        if again and cache is not None:            # the blocks compute again later, on the cache as it is now
            cache = copy.copy(cache)
            cache.kv = cache.kv.clone()
        for layer, block in enumerate(self.blocks):
            n = F
            if layer == len(self.blocks) - 1 and last < F:            # only the last frames are asked for
                n = last
                rows = None if mask is None else mask[-last:]
                sight = replace(sight, rows=self.frames_see(valid, rows, cache, h * w))
            args = x, words, e, e_words, table, camera.prope, sight, cache, layer, n
            x, words = checkpoint(block, *args, use_reentrant=False) if again else block(*args)

        # 3) tokens to velocities
        with torch.autocast(x.device.type, enabled=False):
            shift, scale = self.final_layer['adaLN_modulation'](e[:, F - last:])[:, :, None].chunk(2, -1)
            x = self.final_layer['linear'](modulated(x, shift, scale)).float()
        if words is not None and torch.is_grad_enabled():
            x = x + 0 * words.sum()                # nobody sees the last words, but DDP wants all gradients
        return rearrange(x, 'b f (h w) (p q c) -> b f c (h p) (w q)', h=h, w=w, p=p, q=p)

    def frames_in(self, x, t, pos):
        """The input channels of frames x (B, F, C, H, W): noisy, the given picture, and whether there is one:
        in frame 0, if its time is 0."""
        given = torch.tensor([place == 0 for place in pos], device=x.device) & (t == 0)         # (B, F)
        given = given[:, :, None, None, None].to(x)
        return torch.cat([x, given * x, given.expand(-1, -1, 1, *x.shape[3:])], 2)

    def words_time(self, t):
        """The time of the words, (1, 1): always 0, as minWM and HY-WorldPlay have it. (In HunyuanVideo-1.5
        itself it is the clip's.)"""
        return t.new_zeros(1, 1)
