"""
Reason once a frame, render at every step: Separable Causal Diffusion (SCD, arXiv 2602.10095, CVPR 2026).

Claim. In a causal video model the early blocks say nearly the same at every denoising step, and the deep ones
hardly look at other frames. So split it: an encoder of the first blocks runs once a frame, over the frames
before it; a decoder of the rest renders the frame in all its steps, and sees that frame alone:

    c_i = E(x_<i, camera_<=i)        once, with a KV cache
    v   = D(x_t, t, c_i)             at every step, without

    python -m papers.scd                           # the two observations, on checkpoints/ar.safetensors
    python -m papers.scd dense 4+2 5+1 3+3         # trains each kind (SEEDS=3) and prints a table
    python -m papers.scd "4+2 concat" "4+2 noise"  # and others: see KINDS
    python -m papers.scd guide out/scd/4+2-0/ar.safetensors     # guidance of the decoder alone

The first takes minutes and draws assets/papers/scd.png. The next two need out/camera.safetensors and
data/lowpoly-500 (bash run.sh), take 10 to 20 minutes a run on one core and leave out/scd/; what is there is
not trained again. The split itself is in model.py (encoder_blocks).

What shows at this size (six blocks; tables in NUMBERS.md and LOG.md, 2026-12-01): early features stay the
same as the paper puts it, but most of that is a mean that all tokens share. That deep blocks hardly look back
does not show. Split networks predict better than the whole one, the better the more blocks encode. The fewer
decode, the less sharp DMD leaves them, which guidance of its real score makes up for. Adding the context is
better than concatenating it, .3 dB at frame 7; noise on it changes nothing (one seed).

What is ours: the context is added to the decoder's input (x + W c), where the paper concatenates tokens; the
encoder reads slightly noised frames and is told so; chunks of several frames. Unknown: how the paper
normalised the features of its Figure 2.
"""
import collections
import itertools
import json
import os
import sys
from unittest import mock

import torch

import train_ar
from common import load_model, write_json
from data import find_codec, noise_for
from experiments.score import Config as ScoreConfig
from experiments.score import score
from experiments.table import COLUMNS, mean_and_spread, summary
from model import CameraEmbedding, rollout_clip, schedule
from stream import held_out

# -----------------------------------------------------------------------------
# the two observations

STEPS = 48
FRAME = 7                             # whose denoising is watched


@torch.inference_mode()
def observe(path, clips=16):
    """Three (blocks, steps): the cosine of each block's features to those of its first step; the same without
    what all tokens have in common; and the share of its attention that falls on the frames before."""
    model, header = load_model(path)
    model.eval()
    blocks = model.cfg.num_layers
    features = [collections.deque(maxlen=STEPS) for _ in range(blocks)]
    shares = collections.deque(maxlen=STEPS * blocks)
    for block, kept in zip(model.blocks, features):
        block.register_forward_hook(lambda _, args, x, kept=kept: kept.append(x[:, -1]))       # (B, L, D)

    def attend(q, k, v, mask=None):
        """Attention that notes, for the queries of the newest frame, how much of it is on older ones."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))              # (B, N, S, Dh)
        weights = (q @ k.mT / q.shape[-1] ** .5)
        if mask is not None:
            L = q.shape[2] // len(mask)
            allowed = torch.tensor(mask).repeat_interleave(L, 0).repeat_interleave(L, 1)
            weights = weights.masked_fill(~allowed, -torch.inf)
        weights = weights.softmax(-1)
        L = features[0][-1].shape[1] if features[0] else k.shape[2]
        if k.shape[2] > model.cfg.text_len:                           # no prompt
            shares.append(weights[:, :, -L:, :-L].sum(-1).mean())
        return (weights @ v).transpose(1, 2)

    world, captions = held_out(ScoreConfig(), header, range(clips), FRAME + 1)
    codec = find_codec()
    c2w, K = world['c2w'], world['K'][:, None].expand(-1, FRAME + 1, -1)
    first = codec.encode(world['frames'][:, :1])
    noise = noise_for(range(clips), first.shape[2:], 'cpu')
    times = schedule(STEPS, model.cfg.shift)
    with mock.patch('model.attention', attend):
        rollout_clip(model, c2w, K, codec.embed(captions, model.cfg), times, noise, first,
                     window=header['frames'], context=header['context'])

    def to_first(centre):
        rows = [[centre(x) for x in kept] for kept in features]
        return torch.tensor([[torch.cosine_similarity(x, row[0], -1).mean() for x in row] for row in rows])

    share = torch.tensor(shares).view(STEPS, blocks).T
    return to_first(lambda x: x), to_first(lambda x: x - x.mean((0, 1))), share


def draw(cosine, centred, share, times, path):
    """Both observations as one picture."""
    try:
        from matplotlib import pyplot
    except ImportError:
        return print('no picture: pip install matplotlib')
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout='constrained')
    colours = pyplot.cm.viridis(torch.linspace(0, .9, len(cosine)))
    for i, colour in enumerate(colours):
        left.plot(times, centred[i], color=colour, label=f'block {i + 1}')
        left.plot(times, cosine[i], color=colour, linestyle=':')
    left.invert_xaxis()
    left.set(xlabel='time t (1 noise, 0 clean)', ylabel='cosine to the first step', ylim=(0, 1.02))
    left.set_title('what a block says at each step (dotted: with the mean of all tokens)', fontsize=9)
    left.legend(fontsize=7)
    right.bar(range(1, len(share) + 1), share.mean(1), color=colours)
    right.set(xlabel='block', ylabel='share of attention on frames before', ylim=(0, 1))
    right.set_title('how much it looks back', fontsize=9)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    figure.savefig(path, dpi=110)
    return None


def probe():
    path = 'checkpoints/ar.safetensors'
    cosine, centred, share = observe(path)
    print(f'{path}, frame {FRAME}, {STEPS} Euler steps, 16 paths\n')
    model, _ = load_model(path)
    times = schedule(STEPS, model.cfg.shift)[:-1]
    print('| block | cosine to the first step at t .5 | last step | centred, at t .5 | last step '
          '| attention on frames before |\n' + '|---' * 6 + '|')
    middle = int((times - .5).abs().argmin())
    for i, looks in enumerate(share):
        cells = [line[i, step] for line in (cosine, centred) for step in (middle, -1)]
        print(f'| {i + 1} | ' + ' | '.join(f'{x:.2f}' for x in [*cells, looks.mean()]) + ' |')
    draw(cosine, centred, share, times, 'assets/papers/scd.png')

# -----------------------------------------------------------------------------
# other ways to split: each changes a model in place

def concatenate(model):
    """The paper's decoder: [context; frame], twice the tokens with the same places, times and cameras, of
    which the frame's half is kept."""
    last, first = model.cfg.num_layers - 1, model.cfg.encoder_blocks
    run_blocks, context = model.run_blocks, []

    def run_without(blocks, x, t, text, camera, mask, pos, cache, n, added=None):
        context[:] = [added]                                          # nothing is added
        return run_blocks(blocks, x, t, text, camera, mask, pos, cache, n)

    def twice(block, args):
        x, e0, text, table, prope, rows, cache, layer, n = args
        F = e0.shape[1]
        if layer == first:
            x = torch.cat([context[0].to(x), x], 1)                   # (B, 2 F, L, D)
        e0 = torch.cat([e0, e0], 1)
        table = torch.cat([table, table])
        prope = None if prope is None else torch.cat([prope, prope], 1)
        if rows:
            rows = tuple(row + row for row in rows) * (1 if layer == last else 2)
        return x, e0, text, table, prope, rows, cache, layer, F if layer == last else 2 * F

    model.run_blocks = run_without
    model.context_embedding.register_forward_hook(lambda _, normed, embedded: normed[0])
    for block in model.blocks[first:]:
        block.register_forward_pre_hook(twice)


def noise_context(model, size=.05):
    """Noise on the context in training, as the paper has it."""
    def add(norm, args, normed):
        return normed + size * torch.randn_like(normed) if torch.is_grad_enabled() else normed
    model.context_norm.register_forward_hook(add)


def begin_with_both_ends(model):
    """The decoder starts as copies of the first blocks and the last one, as the paper's."""
    first = model.cfg.encoder_blocks
    for i, block in enumerate(model.blocks[first:-1]):
        block.load_state_dict(model.blocks[i].state_dict())


KINDS = {                             # name: (blocks of the encoder, what is changed, what only at the start)
    'dense': (0, None, None),
    '5+1': (5, None, None),
    '4+2': (4, None, None),
    '3+3': (3, None, None),
    '5+1 concat': (5, concatenate, None),
    '4+2 concat': (4, concatenate, None),
    '3+3 concat': (3, concatenate, None),
    '4+2 noise': (4, noise_context, None),
    '4+2 ends': (4, None, begin_with_both_ends),
}


def train(name, seed, out):
    """Stage 1 of run.sh with this kind of network."""
    encoder_blocks, change, at_start = KINDS[name]
    start, evaluate = train_ar.start_model, train_ar.evaluate

    def start_changed(cfg, run):
        model = start(cfg, run)
        for act in filter(None, (at_start, change)):
            act(model)
        return model

    def evaluate_changed(model, *args):
        if change:
            change(model)
        return evaluate(model, *args)

    cfg = train_ar.Config(init='out/camera.safetensors', data='data/lowpoly-500', out=out, seed=seed,
                          encoder_blocks=encoder_blocks)
    with mock.patch('train_ar.start_model', start_changed), mock.patch('train_ar.evaluate', evaluate_changed):
        train_ar.main(cfg)


def measure(name, out):
    """{steps: summary of the score} of a trained model; kept in a file beside it."""
    path = f'{out}/score.json'
    if not os.path.exists(path):
        _, change, _ = KINDS[name]
        model, header = load_model(f'{out}/ar.safetensors')
        model.eval()
        if change:
            change(model)
        rows = {}
        for steps in (48, 8, 4, 2, 1):
            cfg = ScoreConfig(ckpt=f'{out}/ar.safetensors', steps=steps)
            scores = score(model, cfg, header, find_codec(), torch.device('cpu'), find_poses=False)
            rows[steps] = {key: float(value) for key, value in summary(scores).items()}
        write_json(path, rows)
    with open(path) as f:
        return json.load(f)


def main(names, seeds):
    """Train what is missing of these kinds, and print how good they are."""
    runs = collections.defaultdict(list)          # {(name, steps): [summary of each seed]}
    for seed in range(seeds):
        for name in names:
            out = f'out/scd/{name.replace(" ", "-")}-{seed}'
            if not os.path.exists(f'{out}/ar.safetensors'):
                train(name, seed, out)
            for steps, row in measure(name, out).items():
                runs[name, steps].append(row)
    columns = ['kind', 'steps', 'seeds', *COLUMNS]
    print('\n| ' + ' | '.join(columns) + ' |\n' + '|---' * len(columns) + '|')
    for (name, steps), rows in runs.items():
        cells = [mean_and_spread(rows, key) for key in COLUMNS]
        print('| ' + ' | '.join([name, steps, str(len(rows)), *cells]) + ' |')

# -----------------------------------------------------------------------------
# guidance: must the null branch have an encoder of its own?

def guide_the_decoder_alone(model):
    """From now on both branches of guidance share the context of the conditioned one, as in the paper."""
    encode = model.encode

    def encode_conditioned(past, t, text, camera, *rest, **options):
        def first_half_twice(x):
            return None if x is None else torch.cat([x[:len(x) // 2]] * 2)
        shared = CameraEmbedding(*map(first_half_twice, vars(camera).values()))
        return encode(past, t, first_half_twice(text), shared, *rest, **options)
    model.encode = encode_conditioned


def guide(path):
    """A table of camera guidance, with an encoder for both branches or for the conditioned one alone."""
    columns = ['null branch', 'steps', 'guidance', *COLUMNS]
    print('| ' + ' | '.join(columns) + ' |\n' + '|---' * len(columns) + '|')
    for steps, scale, alone in itertools.product((4, 1), (1.15, 1.5, 2.), (False, True)):
        model, header = load_model(path)
        model.eval()
        if alone:
            guide_the_decoder_alone(model)
        cfg = ScoreConfig(ckpt=path, steps=steps, guidance=scale)
        row = summary(score(model, cfg, header, find_codec(), torch.device('cpu'), find_poses=False))
        cells = ['decoder' if alone else 'both', f'{steps}', f'{scale}']
        cells += [f'{row[key]:.{digits}f}' for key, digits in COLUMNS.items()]
        print('| ' + ' | '.join(cells) + ' |', flush=True)


if __name__ == '__main__':
    if len(sys.argv) == 1:
        probe()
    elif sys.argv[1] == 'guide':
        guide(sys.argv[2])
    else:
        main(sys.argv[1:], int(os.environ.get('SEEDS', 3)))
