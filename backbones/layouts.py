"""
Checkpoints of other repositories, read and written; and what a checkpoint is and what it takes.

    python -m backbones.layouts checkpoints/ar.safetensors                  # what is it, what does it take?
    python -m backbones.layouts checkpoints/ar.safetensors --out out/wan    # the same weights in Wan's layout
    python -m backbones.layouts Wan2.1-T2V-1.3B --out out/wan.safetensors   # Wan's weights in our layout
    python -m backbones.layouts wan-1.3b --height 480 --width 832           # a preset: computed, no weights

`common.load_model` reads our own files and asks this module for any other. Four layouts are known, and told
apart by what is in them. Their tensors have the same shapes and meanings; names and containers differ:

    ours                    one .safetensors, whose header holds the ModelConfig
    Wan2.1, ComfyUI         .safetensors: a file, or a folder of one or of shards
    diffusers               the same, under the names of its class WanTransformer3DModel; or a whole
                            repository, whose weights are in transformer/
    minWM, Self-Forcing,    a .pt, which may hold the weights twice (the EMA is taken) and may wrap the names
    Causal-Forcing

Networks of HunyuanVideo-1.5 (also HY-WorldPlay's and minWM's) come in the first three of these containers:
backbones/hunyuan_layouts.py.

A config.json beside the weights says what no tensor tells: num_heads, text_len, and the number of latents
that are denoised together (chunk, or Self-Forcing's num_frame_per_block).

A .pt is a pickle. It goes through torch's restricted unpickler (weights_only), which makes tensors, numbers
and containers of them and refuses any other class or function. The arithmetic and the memory that the command
prints are computed, not measured.
"""
import argparse
import functools
import glob
import json
import os
import re
import sys
import textwrap
import warnings
import zipfile
from dataclasses import asdict, replace

import torch

from camera import BadInput
from backbones.hunyuan import PRESETS as HUNYUAN_PRESETS
from backbones.hunyuan_layouts import hunyuan_config, hunyuan_flops, hunyuan_names, is_hunyuan
from common import (config_from_header, find_preset, load_model, open_tensors, save_model, save_tensors,
                    write_json)
from model import PRESETS, ModelConfig

# -----------------------------------------------------------------------------
# which files

PLACES = (                            # where a folder may have its weights; the first that has any counts
    ('*.safetensors',),
    ('transformer*/*.safetensors', 'transformer*/*.bin'),          # a repository of diffusers'
    ('*.pt', '*.pth', '*.bin', '*.ckpt', '*.gguf', '*/*.safetensors', '*/*.pt'),
)
SHARD = r'-\d{5}-of-\d{5}'


def read_json(path):
    """The dict in a JSON file."""
    try:
        with open(path) as f:
            return dict(json.load(f))
    except (OSError, ValueError, TypeError) as error:
        raise BadInput(f'{path}: not readable as JSON ({error}): get it again') from None


def listed_files(index):
    """The shards that an index names."""
    where = read_json(index).get('weight_map', {})                 # {name of a tensor: name of its file}
    folder = os.path.dirname(index)
    return sorted({os.path.join(folder, os.path.basename(name)) for name in where.values()})


def find_checkpoints(folder, patterns):
    """{name: its files} of the checkpoints in a folder. Shards make one; a .resume.safetensors is none, but
    lies beside one."""
    found = {}
    for pattern in patterns:
        for name in sorted(glob.glob(f'{pattern}.index.json', root_dir=folder)):
            found[name] = listed_files(os.path.join(folder, name))
        listed = sum(found.values(), [])
        for name in sorted(glob.glob(pattern, root_dir=folder)):
            file = os.path.join(folder, name)
            if file not in listed and '.resume.' not in name:
                found.setdefault(re.sub(SHARD, '', name), []).append(file)
    return {name: files for name, files in found.items() if files}


def weight_files(path):
    """The files of the checkpoint at `path`: a file, an index of shards, or a folder that holds one."""
    if path.endswith('.index.json'):
        return listed_files(path)
    if not os.path.isdir(path):
        if re.search(SHARD, path):
            raise BadInput(f'{path}: one of several shards: name the folder that holds them all')
        return [path]
    if os.path.exists(f'{path}/manifest.json'):
        raise BadInput(f'{path}: a folder of clips, not of weights: name a checkpoint')
    found = {}
    for patterns in PLACES:
        found = found or find_checkpoints(path, patterns)
    if not found:
        raise BadInput(f'{path}: no .safetensors in this folder: name a checkpoint or a folder of Wan2.1\'s')
    if len(found) > 1:
        names = sorted(found)
        more = f' and {len(names) - 4} more' if len(names) > 4 else ''
        raise BadInput(f'{path}: holds several checkpoints, {", ".join(names[:4])}{more}: name one of them')
    return found.popitem()[1]

# -----------------------------------------------------------------------------
# what is in a file

BEGINNINGS = {                        # what is not read, by its first bytes
    b'version https://git-lfs': 'a Git LFS pointer, not the weights: fetch them (git lfs pull in its folder)',
    b'GGUF': 'GGUF, quantised weights for other programs: take the .safetensors they were made from',
    b'<': 'a web page, not the weights: download them again, with a login if it needs one',
    b'PK': 'a pickle of torch.save, not safetensors: if it is meant to be one, rename it to .pt',
    b'\x80': 'a pickle, not safetensors: if it is meant to be one, rename it to .pt',
    b'': 'neither safetensors nor a file of torch.save; it may be truncated: make or download it again',
}
STRANGE = {                           # what is not read, by the names of its tensors
    r'lora|lokr|loha|\.diff(_b)?(\s|$)':
        'a LoRA, which only changes another model: merge it into that one (in diffusers: load_lora_weights, '
        'fuse_lora, save_pretrained) and name the result',
    r'scale_weight|weight_scale|scaled_fp8|comfy_quant|absmax|qweight':
        'quantised weights: take the same model in bfloat16, float16 or float32',
}
PARTS = 'generator_ema', 'generator', 'ema', 'model', 'state_dict', 'module'    # of a .pt: the first there is


def open_file(file):
    """({name: function that reads that tensor}, header) of one file."""
    try:
        with open(file, 'rb') as f:
            start = f.read(64)
    except FileNotFoundError:
        raise BadInput(f'{file}: no such file; train it first or name another checkpoint') from None
    if start[8:9] == b'{':
        return open_tensors(file)
    if start.startswith((b'PK', b'\x80')) and not file.endswith('.safetensors'):
        return open_pickle(file)
    what = next(what for beginning, what in BEGINNINGS.items() if start.startswith(beginning))
    raise BadInput(f'{file}: {what}')


def open_pickle(file):
    """The same of a pickle: torch refuses what is not tensors, numbers and containers. A training config in
    it is the header."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')                        # torch's, about unusual pickles
            state = torch.load(file, 'cpu', mmap=zipfile.is_zipfile(file), weights_only=True)
    except Exception as error:                                     # damaged pickles raise anything
        raise BadInput(f'{file}: {why_refused(file, error)}') from None
    if not isinstance(state, dict):
        raise BadInput(f'{file}: holds a {type(state).__name__}, not a dict of tensors: save a state_dict')
    config = state.get('config')
    header = {'config': config} if isinstance(config, dict) else {}
    for _ in PARTS:                                                # one may be in another
        found = [part for part in PARTS if isinstance(state.get(part), dict)]
        state = state[found[0]] if found else state
    names = [name for name, value in state.items() if torch.is_tensor(value) and isinstance(name, str)]
    return {name: functools.partial(state.get, name) for name in names}, header


def why_refused(file, error):
    """torch's error about a pickle, in a sentence."""
    code = re.search(r'GLOBAL (\S+)', str(error))                  # a class or function that it names
    if code:
        return (f'a pickle with code in it, {code[1]}, which is never loaded. If you trust the file, save '
                f'its tensors alone: torch.save(torch.load("{os.path.basename(file)}", weights_only=False)'
                '["generator"], "weights.pt"); its key may be "model", or it is a model: its state_dict()')
    text = str(error).split('WeightsUnpickler error:')[-1].strip() or type(error).__name__
    return f'not a readable checkpoint ({textwrap.shorten(text, 100)}); it may be truncated: get it again'

# -----------------------------------------------------------------------------
# reading

WRAPPERS = r'_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.'       # which training puts in

CHANNELS = 16                         # of the latents of clips (data.py)

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
]


FIRST = r'patch_embedding\.weight|img_in\.proj\.weight|x_embedder\.proj\.weight'     # one is in each network


def wan_name(name):
    """A parameter's name in any of the layouts -> its name in Wan2.1, which is ours."""
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def unwrap(path, tensors):
    """The network's tensors by their own names: without what stands before all of them, such as minWM's
    model. and ComfyUI's model.diffusion_model., and without what such a prefix does not stand before."""
    tensors = {re.sub(WRAPPERS, '', name): read for name, read in tensors.items()}
    found = [re.fullmatch(rf'(.*\.|)({FIRST})', name) for name in tensors]
    prefixes = [match[1] for match in found if match] or ['']
    if len(prefixes) > 1:
        raise BadInput(f'{path}: holds several networks, {", ".join(prefixes)}: save one of them alone; of a '
                       '.resume.safetensors, name the .safetensors beside it')
    prefix = prefixes[0]
    return {name.removeprefix(prefix): read for name, read in tensors.items() if name.startswith(prefix)}


def open_weights(path):
    """({parameter of the network: function that reads that tensor}, header) of a checkpoint in any layout.

    The files are mapped into memory, so a tensor takes none before it is read. The header is that of our own
    files; a config.json is its 'config'. Raises BadInput that names the file and says what it is, if it is no
    checkpoint, and what to do.
    """
    tensors = {}
    header = {}
    files = weight_files(path)
    for file in files:
        more, meta = open_file(file)
        tensors |= more
        header |= meta
    for pattern, what in STRANGE.items():
        if re.search(pattern, ' '.join(tensors)):
            raise BadInput(f'{path}: {what}')
    beside = os.path.join(os.path.dirname(files[0]), 'config.json')
    if os.path.exists(beside):
        header['config'] = header.get('config', {}) | read_json(beside)
    tensors = unwrap(path, tensors)
    if not tensors.keys().isdisjoint(('img_in.proj.weight', 'x_embedder.proj.weight')):
        return hunyuan_names(tensors), header
    return {wan_name(name): read for name, read in tensors.items()}, header


def find_config(path, tensors, header, chunks=None):
    """The ModelConfig of opened weights: from our header, else from their shapes and a config.json.
    chunks: see find_chunk."""
    ours = config_from_header(header)
    if ours is not None:
        return ours
    config = header.get('config', {})
    if 'camera_freqs' in header.get('model', {}):
        raise BadInput(f'{path}: its settings are damaged, or of another version of this code: get that, '
                       'or make it again')
    if 'img_in.proj.weight' in tensors:
        return hunyuan_config(path, tensors, config, find_chunk(path, tensors, config, chunks))
    try:
        dim, in_dim, _, patch, _ = tensors['patch_embedding.weight']().shape
        ffn_dim, _ = tensors['blocks.0.ffn.0.weight']().shape
        _, freq_dim = tensors['time_embedding.0.weight']().shape
        _, text_dim = tensors['text_embedding.0.weight']().shape
        out, _ = tensors['head.head.weight']().shape
        blocks = {int(name.split('.')[1]) for name in tensors if name.startswith('blocks.')}
    except (KeyError, ValueError) as error:
        raise BadInput(f'{path}: holds no network of ours or of Wan\'s ({error}): is it another kind of '
                       'file?') from None
    out_dim = out // patch ** 2
    if in_dim != CHANNELS or out_dim != CHANNELS:
        raise BadInput(f'{path}: it takes {in_dim} channels and gives {out_dim}, the latents of clips have '
                       f'{CHANNELS}: Wan2.2 TI2V (48) and image-to-video (36) do not fit, name a '
                       'text-to-video model of Wan2.1')
    chunk, first_chunk = find_chunk(path, tensors, config, chunks)
    return ModelConfig(
        dim=dim,
        ffn_dim=ffn_dim,
        num_heads=count_heads(path, dim, config),
        num_layers=1 + max(blocks),
        in_dim=in_dim,
        out_dim=out_dim,
        freq_dim=freq_dim,
        text_dim=text_dim,
        text_len=config.get('text_len', 512),
        eps=config.get('eps', 1e-6),
        patch=patch,
        camera='prope' if has_prope(tensors) else 'none',
        chunk=chunk,
        first_chunk=first_chunk,
        shift=5.0,
        eviction='frames',
    )


def has_prope(tensors):
    """Does it have minWM's second attention, which sees the cameras?"""
    return any('prope_o' in name or 'prope_proj' in name for name in tensors)


def count_heads(path, dim, config):
    """num_heads, which no shape tells: of the config, else of the model of Wan's that is as wide."""
    known = {preset.dim: preset.num_heads for preset in PRESETS.values() if preset.text_dim == 4096}
    heads = config.get('num_attention_heads', known.get(dim))      # diffusers' word
    heads = config.get('num_heads', heads)                         # Wan's word
    if not isinstance(heads, int) or heads < 1 or dim % heads:
        raise BadInput(f'{path}: no tensor tells how many heads share its width of {dim}, and its config '
                       f'says {heads}: write {{"num_heads": N}} into a config.json beside it')
    return heads


CHUNKS = (                            # in the names of a file and its folder -> latents denoised together
    ('frame.?wise', 1),               # Causal-Forcing has models of both kinds
    ('chunk.?wise|self.?forcing', 3),
    ('minwm|action2v', 4),
)


def find_chunk(path, tensors, config, asked=None):
    """(chunk, first_chunk) of a checkpoint from elsewhere: as `asked`, else as its config, its cameras or its
    name tell, else 4 with a note.

    asked: how a walk was asked to divide, 0 for as the file says; None if nothing walks yet. A .pt that does
    not say is then an error. A .safetensors is more likely Wan's own, which has no chunks.
    """
    wanted, wanted_first = asked or (0, 0)
    file = weight_files(path)[0]
    names = '/'.join(os.path.abspath(file).split(os.sep)[-2:])
    told = [chunk for pattern, chunk in CHUNKS if re.search(pattern, names, re.IGNORECASE)]
    if has_prope(tensors):                                         # minWM's
        told = [4]
    chunk = wanted or config.get('chunk') or config.get('num_frame_per_block') or (told or [0])[0]
    if not chunk:
        silent = f'{file}: does not say how many latents it denoises together'
        pickled = not file.endswith('.safetensors')
        if asked and pickled:
            raise BadInput(f'{silent}: --chunk 3 for Self-Forcing and chunk-wise Causal-Forcing, 1 for '
                           'frame-wise, 4 for minWM; or {"chunk": 3} in a config.json beside it')
        if asked or pickled:
            print(f'{silent}: 4 are assumed; {{"chunk": 3}} in a config.json beside it would make them 3')
        chunk = 4
    alone = 1 if config.get('independent_first_frame') else 0      # Self-Forcing's word
    first_chunk = wanted_first or config.get('first_chunk') or alone or chunk
    if not all(isinstance(n, int) and n > 0 for n in (chunk, first_chunk)):
        raise BadInput(f'{path}: chunks of {chunk} latents after a first one of {first_chunk}: '
                       'at least 1 each')
    return chunk, first_chunk

# -----------------------------------------------------------------------------
# writing

def save_wan(folder, model):
    """Write a model in Wan2.1's own layout: config.json and diffusion_pytorch_model.safetensors. The header
    of the weights holds our whole config, since Wan's has no words for camera, chunk and sink.
    Each of the two files is written whole or not at all, the weights first."""
    cfg = asdict(model.cfg)
    names = ('text_len', 'in_dim', 'dim', 'ffn_dim', 'freq_dim', 'out_dim',
             'num_heads', 'num_layers', 'eps')
    config = {'_class_name': 'WanModel', 'model_type': 't2v'}
    config |= {name: cfg[name] for name in names}
    save_tensors(f'{folder}/diffusion_pytorch_model.safetensors', model.state_dict(), {'model': cfg})
    write_json(f'{folder}/config.json', config)

# -----------------------------------------------------------------------------
# arithmetic, computed

def flops(cfg, frames, L, keys, words=True):
    """Floating-point operations of one forward pass of `frames` frames of L tokens that attend to `keys`
    frames each. A multiplication with its addition counts two; only matrix products are counted.
    words=False: HunyuanVideo's words are in the cache already."""
    if is_hunyuan(cfg):
        return hunyuan_flops(cfg, frames, L, keys, words)
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
    if cfg.encoder_blocks:
        return split_flops(cfg, F, L, (F + cfg.chunk) / 2, steps=1)
    D = cfg.dim
    h = F - cfg.chunk
    pairs = h * (h + cfg.chunk) + F * (F + cfg.chunk)              # twice the pairs of frames that attend
    keys = pairs / 2 / (h + F)
    prope = 'prope' in cfg.camera
    matrices = prope + (2 if is_hunyuan(cfg) else 4)               # q and o, of both of Wan's attentions
    linear = matrices * D * D + 2 * D * cfg.ffn_dim + prope * 2 * 4 * D
    words = 2 * cfg.text_len * (1 + (prope and is_hunyuan(cfg)))
    scores = ((1 + prope) * (h + cfg.chunk) * L + words) * D
    left_out = h * L * (linear + scores)
    return flops(cfg, h + F, L, keys) - 2 * left_out


def split_flops(cfg, frames, L, keys, steps):
    """The same for a split network: its encoder, which attends to `keys` frames each, then so many steps of
    its decoder, which sees its own chunk."""
    E = cfg.encoder_blocks
    encoder = flops(replace(cfg, num_layers=E), frames, L, keys)
    encoder += 2 * frames * L * cfg.dim ** 2                       # the context's own matrix
    encoder -= 2 * frames * L * cfg.dim * cfg.patch ** 2 * cfg.out_dim        # it has no head
    return encoder + steps * flops(replace(cfg, num_layers=cfg.num_layers - E), frames, L, cfg.chunk)


def chunk_flops(cfg, steps, L, keys):
    """The same for a streamed chunk. A dense network runs once more than its steps, for the cache."""
    if cfg.encoder_blocks:
        return split_flops(cfg, cfg.chunk, L, keys, steps)
    return (steps + 1) * flops(cfg, cfg.chunk, L, keys, words=False)

# -----------------------------------------------------------------------------
# the command

def preset_name(cfg):
    """Which preset has these sizes?"""
    for name, preset in (PRESETS | HUNYUAN_PRESETS).items():
        if (preset.dim, preset.ffn_dim, preset.num_layers) == (cfg.dim, cfg.ffn_dim, cfg.num_layers):
            return name
    return 'of its own'


def print_cost(cfg, parameters, args):
    """Arithmetic and memory of training on clips and of streaming, at the sizes of the command line."""
    across = 16 if cfg.in_dim == 32 else 8                         # pixels: HunyuanVideo-1.5's latents, Wan's
    L = args.height * args.width // across ** 2 // cfg.patch ** 2
    attentions = 2 if 'prope' in cfg.camera else 1
    chunk = chunk_flops(cfg, args.steps, L, .75 * args.window)     # the window is between half full and full
    full = flops(cfg, args.frames, L, args.frames)
    forced = forced_flops(cfg, args.frames, L)
    cache = 4 * cfg.cached_blocks * attentions * args.window * L * cfg.dim
    tokens = 8 * args.frames * L * cfg.dim * cfg.num_layers        # in float32, each with its gradient
    print(f'{args.height} x {args.width} pixels, {L} tokens a frame, clips of {args.frames} frames, '
          f'a window of {args.window}, batch 1, computed:')
    work = {
        'bidirectional step': 3 * full,                            # the backward pass costs two forward ones
        'teacher-forced step': 3 * forced,
        f'a streamed chunk in {args.steps} steps': chunk,
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
    if args.ckpt in PRESETS | HUNYUAN_PRESETS:
        with torch.device('cpu' if args.out else 'meta'):          # meta: shapes without memory
            model = find_preset(args.ckpt).build()
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
    elif args.out and is_hunyuan(cfg):
        raise BadInput(f'--out {args.out}: HunyuanVideo\'s network is written as one name.safetensors')
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
