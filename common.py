"""
Utilities that all stages share, and that a first reading may skip: command line, devices, optimizers,
several processes, checkpoints, logs, gates. They define no network and no loss.
"""
import argparse
import contextlib
import functools
import json
import math
import os
import pathlib
import re
import sys
import tempfile
import textwrap
import time
import zlib
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from camera import BadInput
from model import PRESETS, ModelConfig

# -----------------------------------------------------------------------------
# the command line of every script

AT_LEAST_1 = ('batch accum log_every save_every eval_every eval_clips sample_steps paths pairs pair_batch '
              'critic student_steps teacher_steps').split()
AT_MOST_1000 = 'guidance fps sample_steps student_steps teacher_steps'.split()
SHARES = 'p_first drop_text drop_camera drift context context_noise decay ema beta1 beta2'.split()
POSITIVE = 'lr critic_lr clip'.split()     # where they are floats: stream.py's --clip is the number of a clip


def limits(name, kind, cfg):
    """The least and the most that a number on the command line can mean."""
    least, most = 0, 1e30
    if kind is int:
        most = 2 ** 32 if name == 'seed' else 10 ** 7
    if name in AT_LEAST_1:
        least = 1
    if name == 'frames' and hasattr(cfg, 'batch'):
        least = 2
    if name in AT_MOST_1000 or name == 'steps' and not hasattr(cfg, 'lr'):     # a sampler's steps
        most = 1000
    if name in SHARES:
        most = 1
    if name in POSITIVE and kind is float:
        least = 1e-30
    return least, most


def check_limits(cfg):
    """Raise BadInput if a number on the command line cannot be meant. Defaults may be beyond a limit."""
    if getattr(cfg, 'over', 'text') not in ('camera', 'text'):
        raise BadInput(f'--over {cfg.over}: choose camera or text')
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        has_limits = f.type in (int, float) and f.name != 'pose_scale'     # its -1 has a meaning
        if value == f.default or not has_limits:
            continue
        least, most = limits(f.name, f.type, cfg)
        if not value >= least:                                             # nan too
            raise BadInput(f'--{f.name} {value}: at least {least}')
        if value > most:
            raise BadInput(f'--{f.name} {value}: at most {most}')


NO_MEMORY = 'allocate memory|out of memory|terminated abruptly'   # the last of a process that was killed


def true_or_false(text):
    """The type of boolean flags: 'True' or 'False'."""
    return ('False', 'True').index(text) == 1


def command_line(main, Config, doc):
    """main(Config) with a flag for each field; @file reads flags from a file. Bad input is one sentence and
    exit code 1."""
    parser = argparse.ArgumentParser(description=doc, fromfile_prefix_chars='@',
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Config):
        kind = true_or_false if f.type is bool else f.type
        parser.add_argument(f'--{f.name}', type=kind, default=f.default, help=f'(default: {f.default})')
    try:
        cfg = Config(**vars(parser.parse_args()))
        sys.stdout.reconfigure(errors='backslashreplace')      # names of files may be no text
        check_limits(cfg)
        main(cfg)
    except (BadInput, UnicodeError, OSError, OverflowError, MemoryError, RuntimeError) as e:
        memory = isinstance(e, MemoryError) or re.search(NO_MEMORY, str(e))
        if isinstance(e, RuntimeError) and not memory:         # a fault of ours
            raise
        if dist.is_initialized():                              # else gloo's threads may abort the exit
            dist.destroy_process_group()
        sys.exit(f'error: {"out of memory: ask for less at once" if memory else e}')

# -----------------------------------------------------------------------------
# one process of a run

def cpu_cores():
    """How many processor cores this process may use."""
    if hasattr(os, 'sched_getaffinity'):                       # Linux: containers and taskset allow fewer
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


LONGEST_WAIT = timedelta(hours=2)      # for other processes: the first renders clips and evaluates alone


def pick_device(device='auto', dtype='auto', local_rank=0):
    """(device, compute dtype). auto: cuda, else cpu; bfloat16 where the hardware multiplies it natively."""
    devices = ['cpu', 'cuda'] if torch.cuda.is_available() else ['cpu']
    device = devices[-1] if device == 'auto' else device
    if device == 'mps':
        raise BadInput('--device mps: it has no float64, which poses and times need: use cpu')
    if device not in devices or dtype not in ('auto', 'float32', 'bfloat16'):
        raise BadInput(f'--device {device} --dtype {dtype}: choose auto, cpu, or cuda where there is one; '
                       'auto, float32 or bfloat16')
    if device == 'cuda':
        torch.cuda.set_device(local_rank)
    if dtype == 'auto':
        checks = '_is_avx512_bf16_supported', '_is_amx_tile_supported'
        native = device == 'cuda' or any(getattr(torch.cpu, check, bool)() for check in checks)
        dtype = 'bfloat16' if native else 'float32'
    return torch.device(device), getattr(torch, dtype)


@dataclass
class Run:
    """One process of a training run."""
    rank: int
    world: int                    # how many processes there are
    device: torch.device
    dtype: torch.dtype            # of the arithmetic; weights are float32
    micro: int                    # samples of a micro-batch

    def say(self, text):
        """Print, once for all processes."""
        if self.rank == 0:
            print(text)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def barrier(self):
        """Wait for the other processes."""
        if self.world > 1:
            dist.barrier()

    def end(self):
        self.barrier()
        if self.world > 1:
            dist.destroy_process_group()


def setup(cfg):
    """The Run of this process, alone or as torchrun started it. Makes the folder cfg.out and seeds torch."""
    env = os.environ
    rank, world = int(env.get('RANK', 0)), int(env.get('WORLD_SIZE', 1))
    device, dtype = pick_device(cfg.device, cfg.dtype, int(env.get('LOCAL_RANK', 0)))
    if world > 1:
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo', timeout=LONGEST_WAIT)
    micro = cfg.batch // (world * cfg.accum)
    if micro * world * cfg.accum != cfg.batch:
        raise BadInput(f'--batch {cfg.batch} does not divide by {world} processes x --accum {cfg.accum}')
    check_folder(cfg.out)
    torch.manual_seed(cfg.seed)
    return Run(rank, world, device, dtype, micro)


def describe(stage, model, cfg, run, clips):
    """Say what is about to be trained."""
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    tokens = clips.read(0)[0][0, 0].numel() // model.cfg.patch ** 2
    run.say(f'{stage}: {millions:.2f} M parameters, {tokens} tokens a frame, effective batch {cfg.batch} = '
            f'{run.world} x {cfg.accum} x {run.micro}, {run.device}, {run.dtype}, {len(clips)} clips')

# -----------------------------------------------------------------------------
# optimizers

NEWTON_SCHULZ = (8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)


def orthogonalise(X):
    """Bring all singular values of wide matrices X (n, rows, columns) to about 1, in the dtype of X.

    Three Newton-Schulz steps, each the best polynomial for what the one before leaves of [.01, 1] (Polar
    Express, Amsel et al. 2025). They start from X divided by the 4-norm of its singular values.
    """
    A = X @ X.mT
    size = A.float().norm(dim=(1, 2), keepdim=True).clamp(min=1e-14)     # the 4-norm, squared
    size = size * (1 + 4 * torch.finfo(A.dtype).eps)                     # rounding must not lead beyond 1
    X = (X / size.sqrt()).to(A.dtype)
    A = (A / size).to(A.dtype)
    for i, (a, b, c) in enumerate(NEWTON_SCHULZ):
        A = X @ X.mT if i > 0 else A
        B = torch.baddbmm(A, A, A, beta=b, alpha=c)
        X = torch.baddbmm(X, B, X, beta=a)
    return X


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) with steps of AdamW's size (Moonlight), so that one learning rate fits both.
    Unlike torch.optim.Muon it computes in any dtype, and all matrices of a shape at once."""

    def __init__(self, params, lr, weight_decay, dtype):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, dtype=dtype))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group['params']:
                if p.grad is not None:
                    by_shape.setdefault(tuple(sorted(p.shape)), []).append(p)
            for params in by_shape.values():
                self.update(params, group)

    def update(self, params, group):
        """The same step for matrices of one shape, some of them transposed."""
        for p in params:
            self.state[p] = self.state[p] or {'momentum_buffer': torch.zeros_like(p)}
        momentum = [self.state[p]['momentum_buffer'] for p in params]
        grads = [p.grad for p in params]
        torch._foreach_lerp_(momentum, grads, .05)
        ahead = torch._foreach_lerp(grads, momentum, .95)                # Nesterov
        wide = torch.stack([as_wide(x) for x in ahead]).to(group['dtype'])
        for p, step in zip(params, orthogonalise(wide)):
            p.mul_(1 - group['lr'] * group['weight_decay'])
            as_wide(p).add_(step, alpha=-group['lr'] * .2 * max(p.shape) ** .5)


def as_wide(x):
    """A matrix, transposed if it has more rows than columns."""
    return x.mT if x.shape[0] > x.shape[1] else x


def make_optimizers(model, lr, muon, betas, dtype, weight_decay=0.01):
    """AdamW for all parameters or, with muon, Muon for the matrices of the blocks and AdamW for the rest."""
    hidden, rest = [], []
    for name, p in model.named_parameters():
        chosen = hidden if muon and 'blocks.' in name and p.ndim == 2 else rest
        chosen.append(p)
    if any(hasattr(p, 'full_tensor') for p in hidden):
        raise BadInput('--shard fsdp: Muon needs whole matrices: add --muon False')
    optimizers = [torch.optim.AdamW(rest, lr=lr, betas=betas, weight_decay=weight_decay, fused=True)]
    if muon:
        optimizers.append(Muon(hidden, lr, weight_decay, dtype))
    return optimizers


def clip_gradients(params, limit):
    """Scale the gradients to a norm of at most `limit`, and return what it was. Raises BadInput, before any
    weight changes, if it is no number."""
    norm = whole(torch.nn.utils.clip_grad_norm_(params, limit)).item()
    if not math.isfinite(norm):
        raise BadInput(f'the gradient of this step is {norm}: nothing of it is kept; try a smaller --lr, '
                       'or --dtype float32')
    return norm


def take_step(optimizers, lr):
    """One step of each, at this learning rate; the gradients are dropped."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group['lr'] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def learning_rate(step, steps, lr, warmup, decay):
    """Linear warm-up over `warmup` steps, constant, then linear decay to 0 over the last fraction `decay`."""
    return lr * min(1, (step + 1) / max(1, warmup), (steps - step) / (decay * steps + 1e-9))


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema <- decay ema + (1 - decay) model, with a shorter memory in the first steps."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.values()), list(model.state_dict().values()), 1 - decay)

# -----------------------------------------------------------------------------
# several processes

def shard(model, how, offload=False, compiled=False):
    """The model as this process trains it. Alone: as it is. ddp: gradients are averaged. fsdp: weights,
    gradients and optimizer state are split (with offload they wait in the processor's memory). compiled: by
    torch.compile."""
    if how not in ('ddp', 'fsdp'):
        raise BadInput(f'--shard {how}: choose ddp or fsdp')
    if compiled:
        for block in model.blocks:
            block.compile()
    if not dist.is_initialized():
        return model
    if how == 'fsdp':
        from backbones.fsdp import split_over_processes
        return split_over_processes(model, offload)
    net = DistributedDataParallel(model)
    net.cfg = model.cfg
    return net


def sync_gradients(net, on):
    """Average the gradients of the next backward pass over the processes? Only for the last micro-batch."""
    if hasattr(net, 'set_requires_gradient_sync'):
        net.set_requires_gradient_sync(on)
    net.require_backward_grad_sync = on


def whole(x):
    """A tensor that FSDP has split, put together again (all processes call this); any other as it is."""
    return x.full_tensor() if hasattr(x, 'full_tensor') else x


def split_like(x, y):
    """The whole tensor x, split as y is."""
    return distribute_tensor(x, y.device_mesh, y.placements) if hasattr(y, 'full_tensor') else x

# -----------------------------------------------------------------------------
# files: checkpoints are safetensors only; all are written whole or not at all

def to_rgb(picture):
    """A PIL picture of any mode as RGB; 16 bits of grey are scaled to 8."""
    if picture.mode.startswith('I'):
        grey = (np.asarray(picture) / 257).round().clip(0, 255)
        picture = Image.fromarray(grey.astype(np.uint8))
    return picture.convert('RGB')


def check_folder(folder):
    """Make a folder, and complain before the work if nothing can be written into it."""
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        raise BadInput(f'--out: cannot write into the folder "{folder}" ({e.strerror}): name '
                       'another') from None


@contextlib.contextmanager
def written_whole(path, end=''):
    """A temporary name, with this end, to write to. Then it takes the place of `path`; if anything fails, the
    old file stays."""
    tmp = f'{path}.tmp{os.getpid()}{end}'
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        yield tmp
        os.replace(tmp, path)
    except (SafetensorError, OSError) as e:
        why, _, _ = str(e).partition('\n')                     # ffmpeg says much more
        raise BadInput(f'{path}: cannot be written ({why}): make room, or name another place, and run it '
                       'again') from None
    finally:
        pathlib.Path(tmp).unlink(missing_ok=True)


def save_tensors(path, tensors, meta):
    """Write tensors and a JSON header, whole or not at all."""
    with written_whole(path) as tmp:
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp, {'meta': json.dumps(meta)})
        os.chmod(tmp, permissions(0o666))


def permissions(most):
    """What the user's umask leaves of these permissions, for files that libraries make private."""
    mask = os.umask(0)
    os.umask(mask)
    return most & ~mask


def write_json(path, value):
    with written_whole(path) as tmp, open(tmp, 'w') as f:
        json.dump(value, f, indent=1)


def open_tensors(path):
    """({name: function that reads that tensor}, header) of a safetensors file, by memory map."""
    try:
        f = safe_open(path, 'pt')
        header = json.loads((f.metadata() or {}).get('meta', '{}'))
        ours = isinstance(header, dict) and isinstance(header.get('model', {}), dict)
        tensors = {name: functools.partial(f.get_tensor, name) for name in f.keys()}
        return tensors, header if ours else {}
    except FileNotFoundError:
        raise BadInput(f'{path}: no such file; train it first or name another checkpoint') from None
    except (SafetensorError, OSError, ValueError) as e:
        raise BadInput(f'{path}: not a readable safetensors checkpoint ({e}); it may be truncated, or a '
                       'pickle: make it again') from None


def load_tensors(path):
    """(tensors, header) of a file of save_tensors. Raises BadInput if it is missing or not readable."""
    tensors, header = open_tensors(path)
    return {name: read() for name, read in tensors.items()}, header


def find_checkpoint(path, default):
    """`path` if it exists. A default that has not been trained yet falls back to the shipped file of that
    name in checkpoints/. None if there is neither."""
    if os.path.exists(path):
        return path
    shipped = f'checkpoints/{os.path.basename(path)}'
    return shipped if path == default and os.path.exists(shipped) else None


def new_model(cfg, default, run, **settings):
    """A model of --preset to train from scratch. Raises BadInput if --init names another file than the
    default: as that is not there, it may be a slip."""
    if cfg.init not in (default, 'none'):
        raise BadInput(f'--init {cfg.init}: no such file; none, in its place, starts from scratch')
    preset = find_preset(cfg.preset)
    run.say('start from scratch')
    return replace(preset, **settings).build().to(run.device)


def find_preset(name):
    """The config of a preset, of this network or of HunyuanVideo's (hy...)."""
    presets = PRESETS
    if name.startswith('hy'):
        from backbones.hunyuan import PRESETS as presets
    if name not in presets:
        raise BadInput(f'--preset {name}: choose one of {", ".join(presets)}')
    return presets[name]


def save_model(path, state, cfg, **meta):
    """Weights under their network's names, header {model: config, **meta}."""
    save_tensors(path, state, {'model': asdict(cfg), **meta})


def make_header(cfg, stage, step, metrics, clips):
    """What a checkpoint says of itself, beside its config."""
    return dict(stage=stage, step=step, seed=cfg.seed, metrics=metrics, frames=cfg.frames,
                context=getattr(cfg, 'context', 0.0), data=clips.manifest, command=' '.join(sys.argv))


def config_from_header(header):
    """The ModelConfig that save_model has stored; None if there is none that this code could have stored."""
    saved = dict(header.get('model', {}))
    if 'first' in saved:                                       # the name of first_chunk in older files
        saved['first_chunk'] = saved.pop('first')
    kind = ModelConfig
    if 'glyph_len' in saved:
        from backbones.hunyuan import HunyuanConfig as kind
    if not saved or saved.keys() - {f.name for f in fields(kind)}:
        return None
    cfg = kind(**saved)
    return cfg if possible(cfg) else None


def possible(cfg):
    """Can a network have these settings? A file may have been changed by hand."""
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        least = 0 if f.default == 0 or f.name == 'camera_freqs' else 1e-12
        if type(value) is not f.type or f.type in (int, float) and not least <= value <= 2 ** 16:
            return False
    rotates = cfg.dim % (2 * cfg.num_heads) == 0               # pairs of channels
    evicts = cfg.eviction == 'chunks' or cfg.eviction == 'frames' and not cfg.encoder_blocks
    return rotates and evicts and cfg.encoder_blocks < cfg.num_layers <= 1000


def load_model(path, device='cpu', dtype=torch.float32, chunks=None):
    """(DiT, header) of a checkpoint; each tensor goes from the file straight to device and dtype, so that no
    second copy is held. chunks: (chunk, first_chunk) of a walk, for files from elsewhere. Raises BadInput
    that says what the file is instead, or which tensors do not fit."""
    cfg = None
    with contextlib.suppress(BadInput):                        # backbones/ knows better what is wrong
        tensors, header = open_tensors(path)
        cfg = config_from_header(header)
    if cfg is None:                                            # of Wan, minWM, ...
        from backbones.layouts import find_config, open_weights
        tensors, header = open_weights(path)
        cfg = find_config(path, tensors, header, chunks)
    with torch.device('meta'):
        model = cfg.build()
    state = {name: read().to(device, dtype, copy=True) for name, read in tensors.items()}
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as e:
        problems = str(e).splitlines()[1:4]                    # missing, left over, one of another shape
        text = ' '.join(textwrap.shorten(line, 105) for line in problems)
        raise BadInput(f'{path}: its tensors do not fit its config: {text} '
                       'Make the checkpoint again') from None
    usual = {'stage': 'wan', 'step': 0, 'frames': 21, 'context': 0.0, 'metrics': {}}
    header = usual | header
    wrong = [name for name, value in usual.items() if type(header[name]) is not type(value)]
    if wrong:
        raise BadInput(f'{path}: its header is damaged ({", ".join(wrong)}): make the checkpoint again')
    return model.requires_grad_(), header


def fixed_settings(cfg, clips):
    """What a resumed run must share with the run before: its settings, what is in the checkpoints that it
    starts from, and the recipe of its clips. Where they lie does not matter."""
    free = ('device', 'accum', 'shard', 'offload', 'checkpoint', 'compile', 'log_every', 'save_every',
            'eval_every', 'out', 'data')
    settings = {name: value for name, value in asdict(cfg).items() if name not in free}
    for name in settings.keys() & {'init', 'score'}:
        path = find_checkpoint(settings[name], getattr(type(cfg), name))
        settings[name] = None if path is None else checksum(path)
    return settings | {'clips': clips.manifest['recipe']}


def checksum(path):
    """The CRC-32 of a file, or of all files of a folder, by name."""
    folder = pathlib.Path(path)
    crc = 0
    for file in sorted(folder.rglob('*')) if folder.is_dir() else [folder]:
        if file.is_file():
            with open(file, 'rb') as f:
                while block := f.read(2 ** 24):
                    crc = zlib.crc32(block, crc)
    return crc


def named_weights(model, ema):
    """The tensors of a model and of its average, by the names that a resume file has for them."""
    weights = {f'model.{name}': x for name, x in model.state_dict().items()}
    return weights | {f'ema.{name}': x for name, x in ema.items()}


def optimizer_places(optimizers):
    """{its name in a resume file: (dict, key, parameter)} of all that the optimizers remember."""
    keys = {torch.optim.AdamW: ('step', 'exp_avg', 'exp_avg_sq'), Muon: ('momentum_buffer',)}
    places = {}
    for i, optimizer in enumerate(optimizers):
        params = [p for group in optimizer.param_groups for p in group['params']]
        for number, p in enumerate(params):
            for key in keys[type(optimizer)]:
                places[f'opt{i}.{number}.{key}'] = optimizer.state[p], key, p
    return places


def save_resume(path, model, ema, optimizers, step, settings):
    """All that an exact continuation needs, in one file: raw weights, EMA, optimizer state, step, settings
    (fixed_settings). All processes call it, the first writes; it may be resumed by another number of them."""
    tensors = named_weights(model, ema)
    for i, optimizer in enumerate(optimizers):
        for number, state in optimizer.state_dict()['state'].items():
            tensors |= {f'opt{i}.{number}.{name}': x for name, x in state.items()}
    tensors = {name: whole(x) for name, x in tensors.items()}
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_tensors(path, tensors, {'step': step, 'config': settings})


def load_resume(path, model, ema, optimizers, settings, run):
    """Restore in place what save_resume wrote; returns the step to go on from, 0 if there is no such file.
    Raises BadInput if it was made with other settings."""
    if not os.path.exists(path):
        return 0
    damaged = BadInput(f'{path}: damaged, or not what a run leaves to go on from: delete it to start over')
    try:
        tensors, meta = load_tensors(path)
        old, step = dict(meta['config']), int(meta['step'])
    except (BadInput, LookupError, TypeError, ValueError):
        raise damaged from None
    said = {'init': 'another --init', 'score': 'another --score', 'clips': 'other clips'}
    changed = [said.get(name, f'{name} {old.get(name)}, not {value}')
               for name, value in settings.items() if old.get(name) != value]
    weights = named_weights(model, ema)
    for name, x in weights.items():
        if name not in tensors or tensors[name].shape != x.shape:
            changed.append(f'another {name}')
    if changed:
        raise BadInput(f'{path} was made with {", ".join(changed)}: run that again to go on, or delete it to '
                       'start over')
    places = optimizer_places(optimizers)
    for name, (_, key, p) in places.items():
        if name not in tensors or tensors[name].shape != (() if key == 'step' else p.shape):
            raise damaged
    for name, x in weights.items():
        x.copy_(split_like(tensors[name].to(x.device), x))
    for name, (state, key, p) in places.items():
        x = tensors[name].to(p.device)
        state[key] = split_like(x, p) if x.ndim else x         # a number: Adam's steps
    run.say(f'go on from {path}, step {step}')
    return step

# -----------------------------------------------------------------------------
# logs

class Log:
    """A line on the screen and a JSON line in `path`. A resumed run drops the lines of the steps that it runs
    again, and those of the evaluation at step `again`."""

    def __init__(self, path, run, start, again=None):
        self.run = run
        path = path if run.rank == 0 else os.devnull
        lines = []
        if start and os.path.exists(path):
            lines = pathlib.Path(path).read_text(errors='replace').splitlines()
        kept = []
        for line in lines:
            try:
                entry = json.loads(line)
                step, evaluation = int(entry['step']), 'lr' not in entry
            except Exception:                          # cut off when the run was killed, or rubbish
                continue
            if step <= start and not (evaluation and step == again):
                kept.append(line + '\n')
        self.file = open(path, 'w', buffering=1)                       # a line at a time
        self.file.writelines(kept)

    def write(self, text, **entry):
        if self.run.rank == 0:
            tqdm.write(text)
        self.file.write(json.dumps(entry) + '\n')


class Meter:
    """Means since the last log line: of the loss, and of the error of single frames in each quarter of t."""

    def __init__(self, run):
        self.run = run
        self.restart()

    def restart(self):
        self.sums = torch.zeros(3, 5, device=self.run.device)  # loss; error, count of frames by quarter of t
        self.steps = 0
        self.seconds = 0

    def add(self, loss, error, t):
        quarter = (4 * t).ceil().clamp(min=0).long().flatten() # 1 to 4; a given frame, at t <= 0, is in none
        self.sums[0, 0] += loss.detach()
        self.sums[1] += torch.bincount(quarter, error.detach().flatten(), minlength=5)
        self.sums[2] += torch.bincount(quarter, minlength=5)

    def end_step(self, began):
        self.steps += 1
        self.seconds += time.time() - began

    def write(self, log, cfg, stage, step, norm, lr):
        """A line in the log, over all processes; then begin again."""
        if self.run.world > 1:
            dist.all_reduce(self.sums)
        loss = self.sums[0, 0].item() / self.steps / self.run.world
        levels = (self.sums[1, 1:] / self.sums[2, 1:].clamp(min=1)).tolist()
        ms = self.seconds * 1e3 / self.steps
        self.restart()
        speed = cfg.batch * cfg.frames / ms * 1e3              # frames a second
        by_t = ' '.join(f'{x:.3f}' for x in levels)
        log.write(f'{stage} {step:6d} | loss {loss:.4f} | by t {by_t} | norm {norm:6.3f} | lr {lr:.1e} | '
                  f'{ms:6.0f} ms | {speed:6.0f} frames/s', step=step, loss=loss, levels=levels, norm=norm,
                  lr=lr, ms=ms, frames_s=speed, batch=cfg.batch)


def score(evaluate, cfg, stage, run, model, ema, clips, log, step):
    """(EMA weights, how well they do on held-out clips); a line in the log and a strip of pictures."""
    state = {name: whole(x) for name, x in ema.items()}
    metrics = {}
    if run.rank == 0:
        average = model.cfg.build().to(run.device)
        average.load_state_dict(state)
        metrics = evaluate(average, cfg, clips, run.device, f'{cfg.out}/{stage}.png')
        text = ', '.join(f'{name} {value:.3f}' for name, value in metrics.items())
        log.write(f'{stage} {step:6d} | {text}', step=step, **metrics)
    return state, metrics


def save_stage(cfg, stage, run, state, model_cfg, metrics, clips):
    """Write the checkpoint of a stage, and say whether it is healthy."""
    if run.rank == 0:
        header = make_header(cfg, stage, cfg.steps, metrics, clips)
        save_model(f'{cfg.out}/{stage}.safetensors', state, model_cfg, **header)
        print(f'{cfg.out}/{stage}.safetensors, {cfg.out}/{stage}.png')
        print(gate(stage, cfg.preset, metrics, clips.manifest['recipe']))

# -----------------------------------------------------------------------------
# gates: is this stage healthy?

def gate(stage, preset, metrics, recipe=None):
    """Compare metrics with the thresholds of expected/<preset>.json, which hold for the clips that it names.
    recipe: the clips' own, if they may be others. Returns the line to print."""
    path = pathlib.Path(__file__).parent / f'expected/{preset}.json'
    if not path.exists():
        return f'gate: none for preset {preset} (expected/{preset}.json is missing)'
    expected = json.loads(path.read_text())
    for name, value in expected['clips'].items():
        if recipe and recipe.get(name) != value:
            return (f'gate: none for these clips: expected/{preset}.json holds for {name} {value}, '
                    f'not {recipe.get(name)}')
    thresholds = expected.get(stage, {}).get('thresholds', {})
    parts, advice = [], ''
    for name, (sign, limit) in thresholds.items():
        if name not in metrics:                                # clips too short for frame 7
            continue
        parts.append(f'{name} {metrics[name]:.3g} {sign} {limit:g}')
        ok = metrics[name] >= limit if sign == '>=' else metrics[name] <= limit
        if not ok:
            advice += f'\n  {name}: {expected["hints"][name.split(",")[0]]}'
    if not parts:
        return f'gate: none for {stage} in expected/{preset}.json'
    return f'gate: {"FAIL" if advice else "PASS"} {", ".join(parts)}{advice}'
