"""
Checkpoints of HunyuanVideo-1.5's network as others keep them; backbones/layouts.py asks.

    HunyuanVideo-1.5, HY-WorldPlay, minWM   one .safetensors, under the names of backbones/hunyuan.py
    diffusers                               other names, the refiner's q, k and v apart, and the last layer's
                                            scale before its shift (HunyuanVideo15Transformer3DModel)

What a file has beyond the base model says what it is: with img_attn_prope_proj it sees cameras by PRoPE
(minWM, HY-WorldPlay), with action_in HY-WorldPlay's actions too.
"""
import re

import torch

from camera import BadInput
from backbones.hunyuan import HunyuanConfig

RENAMED = [                           # (what is in a name of diffusers', what it is here)
    (r'^x_embedder\.', 'img_in.'),
    (r'^image_embedder\.norm_in', 'vision_in.proj.0'),
    (r'^image_embedder\.linear_1', 'vision_in.proj.1'),
    (r'^image_embedder\.linear_2', 'vision_in.proj.3'),
    (r'^image_embedder\.norm_out', 'vision_in.proj.4'),
    (r'^context_embedder_2\.norm', 'byt5_in.layernorm'),
    (r'^context_embedder_2\.linear_', 'byt5_in.fc'),
    (r'^context_embedder\.time_text_embed\.timestep_embedder\.linear_1', 'txt_in.t_embedder.mlp.0'),
    (r'^context_embedder\.time_text_embed\.timestep_embedder\.linear_2', 'txt_in.t_embedder.mlp.2'),
    (r'^context_embedder\.time_text_embed\.text_embedder\.', 'txt_in.c_embedder.'),
    (r'^context_embedder\.proj_in', 'txt_in.input_embedder'),
    (r'^context_embedder\.token_refiner\.refiner_blocks', 'txt_in.individual_token_refiner.blocks'),
    (r'(refiner.*)\.attn\.to_out\.0', r'\1.self_attn_proj'),
    (r'(refiner.*)\.attn\.to_', r'\1.self_attn_'),
    (r'(refiner.*)\.ff\.net\.0\.proj', r'\1.mlp.fc1'),
    (r'(refiner.*)\.ff\.net\.2', r'\1.mlp.fc2'),
    (r'(refiner.*)\.norm_out\.linear', r'\1.adaLN_modulation.1'),
    (r'^time_embed\.timestep_embedder\.linear_1', 'time_in.mlp.0'),
    (r'^time_embed\.timestep_embedder\.linear_2', 'time_in.mlp.2'),
    (r'^cond_type_embed\.', 'cond_type_embedding.'),
    (r'^transformer_blocks', 'double_blocks'),
    (r'\.norm1\.linear', '.img_mod.linear'),
    (r'\.norm1_context\.linear', '.txt_mod.linear'),
    (r'\.attn\.norm_added_(q|k)', r'.txt_attn_\1_norm'),
    (r'\.attn\.norm_(q|k)', r'.img_attn_\1_norm'),
    (r'\.attn\.to_out\.0', '.img_attn_proj'),
    (r'\.attn\.to_add_out', '.txt_attn_proj'),
    (r'\.attn\.to_(q|k|v)', r'.img_attn_\1'),
    (r'\.attn\.add_(q|k|v)_proj', r'.txt_attn_\1'),
    (r'\.ff\.net\.0\.proj', '.img_mlp.fc1'),
    (r'\.ff\.net\.2', '.img_mlp.fc2'),
    (r'\.ff_context\.net\.0\.proj', '.txt_mlp.fc1'),
    (r'\.ff_context\.net\.2', '.txt_mlp.fc2'),
    (r'^norm_out\.linear', 'final_layer.adaLN_modulation.1'),
    (r'^proj_out\.', 'final_layer.linear.'),
]


def hunyuan_names(tensors):
    """{name: function that reads a tensor} of either layout -> the same of HunyuanVideo-1.5's own."""
    if 'x_embedder.proj.weight' not in tensors:
        return tensors
    found = {}
    for name, read in tensors.items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        found[name] = read
    swapped = r'final_layer\.adaLN_modulation\.1\..*'
    found |= {name: swap_halves(read) for name, read in found.items() if re.fullmatch(swapped, name)}
    for name in [name for name in found if '.self_attn_q.' in name]:
        parts = [name.replace('attn_q', f'attn_{part}') for part in 'qkv']
        if all(part in found for part in parts):
            found[name.replace('attn_q', 'attn_qkv')] = join([found.pop(part) for part in parts])
    return found


def swap_halves(read):
    """[scale | shift] as [shift | scale]."""
    return lambda: torch.cat(read().chunk(2)[::-1])


def join(parts):
    return lambda: torch.cat([read() for read in parts])


def hunyuan_config(path, tensors, config, chunk):
    """The HunyuanConfig of opened weights, from their shapes. chunk: (chunk, first_chunk)."""
    def shape(name):
        return tensors[name]().shape

    try:
        dim, channels, _, patch, _ = shape('img_in.proj.weight')
        head_dim = shape('double_blocks.0.img_attn_q_norm.weight')[0]
        ffn_dim = shape('double_blocks.0.img_mlp.fc1.weight')[0]
        out, _ = shape('final_layer.linear.weight')
        _, text_dim = shape('txt_in.input_embedder.weight')
        _, freq_dim = shape('time_in.mlp.0.weight')
        image_dim = shape('vision_in.proj.0.weight')[0]
        glyph_dim = shape('byt5_in.layernorm.weight')[0]
        blocks, refiner_blocks = (
            1 + max(int(re.match(pattern, name)[1]) for name in tensors if re.match(pattern, name))
            for pattern in (r'double_blocks\.(\d+)\.', r'txt_in\.individual_token_refiner\.blocks\.(\d+)\.'))
    except (KeyError, ValueError) as error:
        raise BadInput(f'{path}: no network of HunyuanVideo-1.5, or not all of it ({error}): name another, '
                       'or get it again') from None
    if channels % 2 == 0:
        raise BadInput(f'{path}: it takes {channels} channels, no noisy latent, given one and mask: name a '
                       'text-or-image-to-video model of HunyuanVideo-1.5')
    cameras = [kind for kind, name in (('prope', 'img_attn_prope_proj'), ('action', 'action_in'))
               if any(name in tensor for tensor in tensors)]
    image_len, glyph_len = config.get('image_len', 729), config.get('glyph_len', 256)
    return HunyuanConfig(
        dim=dim,
        ffn_dim=ffn_dim,
        num_heads=dim // head_dim,
        num_layers=blocks,
        in_dim=channels // 2,
        out_dim=out // patch ** 2,
        freq_dim=freq_dim,
        text_dim=text_dim,
        text_len=config.get('text_len', image_len + glyph_len + 1000),
        image_len=image_len,
        image_dim=image_dim,
        glyph_len=glyph_len,
        glyph_dim=glyph_dim,
        refiner_blocks=refiner_blocks,
        patch=patch,
        camera='+'.join(cameras) or 'none',
        chunk=chunk[0],
        first_chunk=chunk[1],
        shift=5.0,
        eviction='frames',
    )

# -----------------------------------------------------------------------------
# arithmetic, computed

def is_hunyuan(cfg):
    return isinstance(cfg, HunyuanConfig)


def hunyuan_flops(cfg, frames, L, keys, words=True):
    """Floating-point operations of one forward pass of `frames` frames of L tokens that attend to `keys`
    frames each and to all words; see layouts.flops. words: computed too, not in the cache."""
    D = cfg.dim
    S = frames * L
    T = cfg.text_len
    attentions = 2 if 'prope' in cfg.camera else 1
    layers = 2 * D * cfg.ffn_dim + 4 * D * D                       # q k v o, MLP
    block = S * (layers + (attentions - 1) * D * D) + frames * 6 * D * D
    block += 2 * S * (keys * L + T) * D * attentions
    if attentions == 2:
        block += 4 * 4 * S * D                                     # a 4 x 4 matrix on q, k, v and the output
    ends = S * D * cfg.patch ** 2 * (2 * cfg.in_dim + 1 + cfg.out_dim)
    ends += frames * D * (cfg.freq_dim + 3 * D)                    # times
    if words:
        seen = T + S * (keys == frames)                            # on a whole clip words see frames
        block += T * layers + 6 * D * D + 2 * T * seen * D
        ends += T * D * cfg.text_dim + cfg.refiner_blocks * T * (12 * D * D + 2 * T * D)
    return 2 * (cfg.num_layers * block + ends)
