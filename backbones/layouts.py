"""
Checkpoints of other repositories, read and written; and what a checkpoint is and what it takes.

    python -m backbones.layouts checkpoints/ar.safetensors                  # what is it, what does it take?
    python -m backbones.layouts checkpoints/ar.safetensors --out out/wan    # the same weights in Wan's layout
    python -m backbones.layouts Wan2.1-T2V-1.3B --out out/wan.safetensors   # Wan's weights in our layout
    python -m backbones.layouts wan-1.3b --height 480 --width 832           # a preset: computed, no weights

`common.load_model` reads our own files and asks this module for any other. Four layouts are known, and told
apart by what is in them. Their tensors have the same shapes and meanings; names and containers differ:

    ours                    one .safetensors, whose header holds the ModelConfig
    Wan2.1                  a folder: config.json and .safetensors, one file or many with an index
    diffusers               the same, under the names of its class WanTransformer3DModel
    minWM, Self-Forcing,    a .pt, which may hold the weights twice (the EMA is taken) and may wrap the names;
    Causal-Forcing          a config.json beside it is read

Only tensors are ever loaded: a pickle with code in it is refused. The arithmetic and the memory that the
command prints are computed, not measured.
"""
import argparse
import functools
import glob
import json
import os
import pickle
import re
import sys
from dataclasses import asdict

import torch

from camera import BadInput
from common import config_from_header, load_model, open_tensors, save_model, save_tensors, write_json
from model import PRESETS, DiT, ModelConfig

# -----------------------------------------------------------------------------
# reading

RENAMED = [                           # (pattern, replacement), applied in this order: any name becomes Wan's
    # diffusers' WanTransformer3DModel
    (r'condition_embedder\.text_embedder\.linear_1', 'text_embedding.0'),
    (r'condition_embedder\.text_embedder\.linear_2', 'text_embedding.2'),
    (r'condition_embedder\.time_embedder\.linear_1', 'time_embedding.0'),
    (r'condition_embedder\.time_embedder\.linear_2', 'time_embedding.2'),
    (r'condition_embedder\.time_proj', 'time_projection.1'),
    (r'\.attn1\.', '.self_attn.'),
    (r'\.attn2\.', '.cross_attn.'),
    (r'\.to_(q|k|v)\.', r'.\1.'),
    (r'\.to_out\.0\.', '.o.'),
    (r'\.norm2\.', '.norm3.'),
    (r'\.ffn\.net\.0\.proj\.', '.ffn.0.'),
    (r'\.ffn\.net\.2\.', '.ffn.2.'),
    (r'^proj_out\.', 'head.head.'),
    (r'^scale_shift_table$', 'head.modulation'),
    (r'\.scale_shift_table$', '.modulation'),
    # what training wraps around a model
    (r'_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.', ''),
    (r'^(module\.)?(model\.)?', ''),
]


def wan_name(name):
    """A parameter's name in any of the layouts -> its name in Wan2.1, which is ours."""
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def weight_files(path):
    """The files that hold the weights of a checkpoint: the path itself, or the .safetensors of a folder."""
    if not os.path.isdir(path):
        return [path]
    files = sorted(glob.glob(f'{path}/*.safetensors'))
    for index in glob.glob(f'{path}/*.safetensors.index.json'):
        with open(index) as f:
            where = json.load(f)['weight_map']                     # {name of a tensor: name of its file}
        files = sorted({f'{path}/{os.path.basename(name)}' for name in where.values()})
    if not files:
        raise BadInput(f'{path}: no .safetensors in this folder: name a checkpoint or a folder of Wan2.1\'s')
    return files


def read_config(path):
    """{'config': config.json} of a folder, or of the folder that a .pt lies in; {} if there is none."""
    folder = path if os.path.isdir(path) else os.path.dirname(path) or '.'
    if path.endswith('.safetensors') or not os.path.exists(f'{folder}/config.json'):
        return {}
    with open(f'{folder}/config.json') as f:
        return {'config': json.load(f)}


def open_pickle(file):
    """{name: function that reads that tensor} of a .pt. torch refuses to load code."""
    state = torch.load(file, 'cpu', mmap=True, weights_only=True)
    for part in ('generator_ema', 'generator', 'model'):
        if part in state:
            state = state[part]
            break
    names = [name for name, value in state.items() if torch.is_tensor(value)]
    return {name: functools.partial(state.get, name) for name in names}


def open_weights(path):
    """({Wan's parameter name: function that reads that tensor}, header) of a checkpoint in any layout.

    The files are mapped into memory, so a tensor takes none before it is read. The header is that of our own
    files; a config.json is its 'config'. Raises BadInput that names the file which is missing, truncated or a
    pickle with code in it.
    """
    file = path                                                    # the one at work: what an error is about
    tensors = {}
    try:
        files = weight_files(path)
        header = read_config(path)
        for file in files:
            if file.endswith(('.pt', '.pth', '.bin')):
                tensors |= open_pickle(file)
            else:
                more, meta = open_tensors(file)
                tensors |= more
                header |= meta
    except BadInput:
        raise
    except FileNotFoundError:
        raise BadInput(f'{file}: no such file; train it first or name another checkpoint') from None
    except (pickle.UnpicklingError, OSError, EOFError, RuntimeError, ValueError, KeyError, TypeError,
            AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f'{file}: not a readable checkpoint ({reason}); it may be truncated or a pickle with '
                       'code in it, which is never loaded: make it again') from None
    return {wan_name(name): read for name, read in tensors.items()}, header


def find_config(path, tensors, header):
    """The ModelConfig of opened weights: from our header, else from their shapes. No shape tells the number
    of heads: it is config.json's, or else heads are 128 wide, as Wan's are."""
    ours = config_from_header(header)
    if ours is not None:
        return ours
    config = header.get('config', {})
    names = ('patch_embedding.weight', 'blocks.0.ffn.0.weight', 'time_embedding.0.weight',
             'text_embedding.0.weight', 'head.head.weight')
    try:
        shape = {name: tensors[name]().shape for name in names}
    except KeyError as error:
        raise BadInput(f'{path}: its header holds no model config of ours and it has no {error}: '
                       'is it another kind of file?') from None
    dim, in_dim, _, patch, _ = shape['patch_embedding.weight']
    blocks = {int(name.split('.')[1]) for name in tensors if name.startswith('blocks.')}
    has_prope = any('prope_o' in name for name in tensors)
    heads = config.get('num_attention_heads', dim // 128)          # diffusers' word
    heads = config.get('num_heads', heads)                         # Wan's word
    return ModelConfig(
        dim=dim,
        ffn_dim=shape['blocks.0.ffn.0.weight'][0],
        num_heads=heads,
        num_layers=1 + max(blocks),
        in_dim=in_dim,
        out_dim=shape['head.head.weight'][0] // patch ** 2,
        freq_dim=shape['time_embedding.0.weight'][1],
        text_dim=shape['text_embedding.0.weight'][1],
        text_len=config.get('text_len', 512),
        eps=config.get('eps', 1e-6),
        patch=patch,
        camera='prope' if has_prope else 'none',
        chunk=4,
        first_chunk=4,
        shift=5.0,
        eviction='frames',
    )

# -----------------------------------------------------------------------------
# writing

def save_wan(folder, model):
    """Write a model in Wan2.1's own layout: config.json and diffusion_pytorch_model.safetensors. The header
    of the weights holds our whole config, since Wan's has no words for camera, chunk and sink."""
    cfg = asdict(model.cfg)
    names = ('text_len', 'in_dim', 'dim', 'ffn_dim', 'freq_dim', 'out_dim',
             'num_heads', 'num_layers', 'eps')
    config = {'_class_name': 'WanModel', 'model_type': 't2v'}
    config |= {name: cfg[name] for name in names}
    save_tensors(f'{folder}/diffusion_pytorch_model.safetensors', model.state_dict(), {'model': cfg})
    write_json(f'{folder}/config.json', config)

# -----------------------------------------------------------------------------
# arithmetic, computed

def flops(cfg, frames, L, keys):
    """Floating-point operations of one forward pass of `frames` frames of L tokens that attend to `keys`
    frames each. A multiplication with its addition counts two; only matrix products are counted."""
    D = cfg.dim
    S = frames * L
    attentions = 2 if 'prope' in cfg.camera else 1                 # PRoPE attends a second time
    # one block, for the S tokens and the text_len words of the prompt
    linear = S * ((5 + attentions) * D * D + 2 * D * cfg.ffn_dim)  # q k v o, prope_o; q o for the prompt; ffn
    prompt = cfg.text_len * 2 * D * D                              # keys and values
    scores = 2 * S * (keys * L * attentions + cfg.text_len) * D    # q k^T, and the sum of the values
    block = linear + prompt + scores
    if 'prope' in cfg.camera:
        block += 4 * 4 * S * D                                     # a 4 x 4 matrix on q, k, v and the output
    # before and behind the blocks
    pixels = cfg.in_dim + cfg.out_dim
    if 'plucker' in cfg.camera:
        pixels += 12 * (1 + 2 * cfg.camera_freqs)
    ends = S * D * cfg.patch ** 2 * pixels
    ends += frames * D * (cfg.freq_dim + 7 * D)                    # times
    ends += cfg.text_len * D * (cfg.text_dim + D)                  # prompt
    return 2 * (cfg.num_layers * block + ends)


def forced_flops(cfg, F, L):
    """The same for `teacher_forced`: F noisy frames conditioned on h frames of history, in one pass. Of the
    history, the last block computes only keys and values."""
    D = cfg.dim
    h = F - cfg.chunk
    pairs = h * (h + cfg.chunk) + F * (F + cfg.chunk)              # twice the pairs of frames that attend
    keys = pairs / 2 / (h + F)
    linear = 4 * D * D + 2 * D * cfg.ffn_dim
    scores = ((h + cfg.chunk) * L + 2 * cfg.text_len) * D
    left_out = h * L * (linear + scores)
    return flops(cfg, h + F, L, keys) - 2 * left_out

# -----------------------------------------------------------------------------
# the command

def preset_name(cfg):
    """Which preset has these sizes?"""
    for name, preset in PRESETS.items():
        if (preset.dim, preset.ffn_dim, preset.num_layers) == (cfg.dim, cfg.ffn_dim, cfg.num_layers):
            return name
    return 'of its own'


def print_cost(cfg, parameters, args):
    """Arithmetic and memory of training on clips and of streaming, at the sizes of the command line."""
    L = args.height * args.width // 64 // cfg.patch ** 2
    attentions = 2 if 'prope' in cfg.camera else 1
    chunk = flops(cfg, cfg.chunk, L, .75 * args.window)            # the window is between half full and full
    full = flops(cfg, args.frames, L, args.frames)
    forced = forced_flops(cfg, args.frames, L)
    cache = 4 * cfg.num_layers * attentions * args.window * L * cfg.dim
    tokens = 8 * args.frames * L * cfg.dim * cfg.num_layers        # in float32, each with its gradient
    print(f'{args.height} x {args.width} pixels, {L} tokens a frame, clips of {args.frames} frames, '
          f'a window of {args.window}, batch 1, computed:')
    work = {
        'bidirectional step': 3 * full,                            # the backward pass costs two forward ones
        'teacher-forced step': 3 * forced,
        f'a streamed chunk in {args.steps} steps': (args.steps + 1) * chunk,
    }
    memory = {
        'weights, gradient, Adam, EMA: fp32': 20 * parameters,
        'tokens kept, a checkpoint a block': tokens,
        'streaming, bf16: weights': 2 * parameters,
        'streaming, bf16: cache': cache,
    }
    for name, n in work.items():
        print(f'  {name:32s} {n / 1e12:12.4g} TFLOP')
    for name, n in memory.items():
        print(f'  {name:32s} {n / 2 ** 30:12.4g} GiB')


def main(args):
    """Describe a checkpoint or preset: size, memory and arithmetic, all computed, none measured. --out writes
    it in another layout."""
    if args.ckpt in PRESETS:
        with torch.device('cpu' if args.out else 'meta'):          # meta: shapes without memory
            model = DiT(PRESETS[args.ckpt])
        header = {'stage': 'none', 'step': 0}
        stored = ''
    else:
        model, header = load_model(args.ckpt)
        tensors, _ = open_weights(args.ckpt)
        read_first = next(iter(tensors.values()))
        stored = f', stored as {read_first().dtype}'
    cfg = model.cfg
    parameters = sum(p.numel() for p in model.parameters())
    print(f'{args.ckpt}: preset {preset_name(cfg)}, {parameters / 1e6:.2f} M parameters, '
          f'stage {header["stage"]}, step {header["step"]}, camera {cfg.camera}{stored}')
    print(cfg)
    print_cost(cfg, parameters, args)
    if args.out.endswith('.safetensors'):
        meta = {k: v for k, v in header.items() if k not in ('model', 'config')}
        save_model(args.out, model.state_dict(), cfg, **meta)
    elif args.out:
        save_wan(args.out, model)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument('ckpt')
    parser.add_argument('--out', default='',
                        help='write it again: name.safetensors is our layout, a folder is Wan\'s')
    for flag, default in (('height', 64), ('width', 64), ('frames', 9), ('window', 9), ('steps', 4)):
        parser.add_argument(f'--{flag}', type=int, default=default, help=f'(default: {default})')
    try:
        main(parser.parse_args())
    except (BadInput, OSError) as error:
        sys.exit(f'error: {error}')
