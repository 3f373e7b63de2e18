"""Split networks (Separable Causal Diffusion): the rollout with its cache against uncached passes; what sees what."""
import math
import shutil

import imageio.v3 as iio
import pytest
import torch

from camera import Camera, moves, relative
from common import load_model, load_tensors
from conftest import FLAGS, SMALL, dmd_args, run
from data import Batch, Draws
from distill_ode import ode_states
from model import (ModelConfig, causal_mask, chunk_ids, encoder_inputs, rebuilt, rollout, schedule, shifted,
                   teacher_forced)
from test_cache import scene
from test_model import grid, tiny_model
from test_stages import losses

TIMES = schedule(3, 2.0)


def split_model(**options):
    return tiny_model(num_layers=4, encoder_blocks=2, **options)


def walk(model, frames, first=None, context=0.0, over='camera', guidance=1.0, window=64, jump=None):
    """A rollout of `frames` frames: (video, camera, text, [(x, t, v) of each call of the decoder], times of the frames
    that the encoder was told)."""
    c2w, K, text, noise = scene(frames, 4, 4)
    given = first.shape[1] if first is not None else model.cfg.first_chunk
    sizes = torch.bincount(chunk_ids(frames, model.cfg.chunk, given)).tolist()
    calls = []
    hook = model.register_forward_hook(lambda m, args, v: calls.append((*args[:2], v)))
    cameras = map(Camera, c2w.split(sizes, 1), K.split(sizes, 1))
    video = list(rollout(model, cameras, text, TIMES, noise, first, guidance, window, context=context, over=over,
                         jump=jump))
    hook.remove()
    return torch.cat(video, 1), Camera(c2w, K), text, calls, sizes


@torch.no_grad()
def uncached(model, video, camera, text, sizes, calls):
    """The velocities of these calls by one encoder pass over the whole video, then the decoder a chunk at a time."""
    ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    camera = Camera(relative(camera.c2w), camera.K)
    context = model.encode_clip(text, encoder_inputs(model.cfg, video, torch.zeros(video.shape[:2]), camera))
    starts = torch.tensor([0, *sizes]).cumsum(0)
    out = []
    for i, (x, t, _) in enumerate(calls):
        chunk = len(sizes) - len(calls) // 3 + i // 3
        here = slice(starts[chunk], starts[chunk + 1])
        assert x.shape[1] == int((ids == chunk).sum())
        out.append(model(x, t, text, camera.frames(here), context=context[:, here]))
    return out


@pytest.mark.parametrize('chunk, first, given, frames', [
    (1, 1, 1, 5), (1, 1, 0, 4), (1, 1, 3, 6), (4, 1, 1, 9), (4, 1, 0, 9), (4, 4, 4, 12), (4, 4, 0, 8), (2, 1, 5, 9)])
@pytest.mark.parametrize('camera', ['plucker', 'prope', 'plucker+prope'])
def test_a_walk_equals_one_uncached_pass(chunk, first, given, frames, camera):
    model = split_model(chunk=chunk, first_chunk=first, camera=camera)
    start = torch.randn(2, given, 16, 4, 4) if given else None
    video, cam, text, calls, sizes = walk(model, frames, start)
    assert video.shape[1] == frames and len(calls) == 3 * (len(sizes) - bool(given))
    for (_, _, got), want in zip(calls, uncached(model, video, cam, text, sizes, calls)):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_what_the_encoder_reads_in_the_place_of_each_frame():
    x, t = torch.arange(1., 6).view(1, 5, 1, 1, 1), torch.tensor([[.1, .2, .3, .4, .5]])
    past, told = shifted(ModelConfig(chunk=2), x, t)
    assert past.flatten().tolist() == [1, 0, 1, 2, 3]
    torch.testing.assert_close(told, torch.tensor([[.1, 1, .1, .2, .3]]))
    inputs = encoder_inputs(ModelConfig(chunk=2), x, t, Camera(torch.eye(4).expand(1, 5, 4, 4), torch.ones(1, 5, 4)))
    assert inputs['past'].flatten().tolist() == [1, 0, 1, 2, 3, 0] and inputs['pos'] == [0, 1, 2, 3, 4, 0]
    assert inputs['t_past'][0, -1] == 1 and inputs['camera'].c2w.shape[1] == 6
    assert torch.equal(inputs['mask'], grid('x..... xxx... xxx... xxxxx. xxxxx. .....x'))


def test_a_walk_noises_its_own_frames_and_says_so(monkeypatch):
    """The given frame enters as it is, at t = 0; generated ones at the level of the context."""
    model, told = split_model(chunk=2), []
    encode = model.encode

    def record(past, t, *args, **options):
        told.append((past, t))
        return encode(past, t, *args, **options)

    monkeypatch.setattr(model, 'encode', record)
    start = torch.randn(2, 1, 16, 4, 4)
    video, *_ = walk(model, 7, start, context=.3)
    assert len(told) == 3 and torch.equal(told[0][0], torch.cat([start, 0 * start, start], 1))
    torch.testing.assert_close(told[0][1], torch.tensor([[0., 1, 0], [0, 1, 0]]))
    for (past, t), frames in zip(told[1:], (video[:, 1:3], video[:, 3:5])):
        torch.testing.assert_close(t, torch.full((2, 2), .3))
        noise = (past - .7 * frames) / .3
        assert abs(noise.std() - 1) < .1 and abs((noise * frames).mean()) < .15 * frames.std()


def test_guidance_drops_the_condition_in_both_parts():
    """Each branch is a walk's call on its own: the encoder and the decoder without camera, or without text."""
    model = split_model(camera='plucker+prope')
    start = torch.randn(2, 1, 16, 4, 4)
    for over in ('camera', 'text'):
        video, camera, text, calls, sizes = walk(model, 5, start, over=over, guidance=1.5)
        branches = []
        for off in (False, True):
            cam = Camera(relative(camera.c2w), camera.K, torch.full((2,), not (off and over == 'camera')))
            words = text * (not (off and over == 'text'))
            context = model.encode_clip(words, encoder_inputs(model.cfg, video, torch.zeros(2, 5), cam))
            branches.append((cam, words, context))
        for i, (x, t, v) in enumerate(calls):
            here = slice(1 + i // 3, 2 + i // 3)
            assert torch.equal(x[:2], x[2:])
            for part, (cam, words, context) in zip(v.split(2), branches):
                want = model(x[:2], t[:2], words, cam.frames(here), context=context[:, here])
                torch.testing.assert_close(part, want, rtol=0, atol=1e-5)
        i = 1                                                  # Euler along null + 1.5 (cond - null)
        (x, t, v), (x_next, t_next, _) = calls[i:i + 2]
        step = v[2:] + 1.5 * (v[:2] - v[2:])
        torch.testing.assert_close(x_next[:2], x[:2] + (t_next[0, 0] - t[0, 0]) * step, rtol=0, atol=1e-5)


@pytest.mark.parametrize('chunk, window, frames', [(1, 6, 16), (4, 9, 25), (2, 7, 17)])
def test_a_window_is_encoded_again_from_its_newest_half(chunk, window, frames):
    """Without a sink the origin moves: each chunk equals an uncached pass over the frames of its window."""
    model = split_model(chunk=chunk)
    video, camera, text, calls, sizes = walk(model, frames, torch.randn(2, 1, 16, 4, 4), window=window)
    half = 1 + (max(0, (window + 1) // 2 - 1)) // chunk * chunk
    start, done, restarts = 0, 1, 0                            # the window's first frame; frames so far
    for i in range(len(sizes) - 1):
        if done - start + chunk > window:
            start, restarts = done - half, restarts + 1
        seen = slice(start, done + chunk)
        c = Camera(relative(camera.c2w[:, seen]), camera.K[:, seen])
        inputs = encoder_inputs(model.cfg, video[:, seen], torch.zeros(2, done + chunk - start), c)
        context = model.encode_clip(text, inputs)
        for x, t, v in calls[3 * i:3 * i + 3]:
            want = model(x, t, text, c.frames(slice(-chunk, None)), context=context[:, -chunk:])
            torch.testing.assert_close(v, want, rtol=0, atol=1e-5)
        done += chunk
    assert done == frames and restarts >= 3


@pytest.mark.parametrize('camera, sink', [('prope', False), ('plucker', True), ('plucker+prope', True)])
@pytest.mark.parametrize('chunk, window, frames', [(1, 6, 16), (2, 9, 23)])
def test_a_rolling_window_equals_one_pass_under_a_sliding_mask(chunk, window, frames, camera, sink):
    """Places leave in whole chunks, oldest first. With a sink that of frame 0 stays, right before the oldest: the
    uncached pass has a copy of it for every chunk. One walk's second frame is elsewhere: that move is none."""
    model, jump = split_model(chunk=chunk, camera=camera, sink=sink), torch.tensor([True, False])
    video, cam, text, calls, sizes = walk(model, frames, torch.randn(2, 1, 16, 4, 4), window=window, jump=jump)
    own = chunk_ids(frames, chunk)
    kept = int(sink)
    c = Camera(relative(cam.c2w), cam.K, move=moves(cam.c2w, jump=jump if sink else None))
    gone, kept_now = [], 1                                     # of each chunk; places in the window
    for _ in sizes:
        excess = max(0, kept_now + chunk - window) if gone else 0
        leaving = excess and excess + (window - kept) % chunk
        gone.append(leaving + (gone[-1] if gone else 0))
        kept_now += (chunk if len(gone) > 1 else 0) - leaving
    assert gone[-1] >= 3
    copies = kept * len(sizes)
    rows = [*range(kept)] * len(sizes) + [*range(frames)]
    pos = [g + i for g in gone for i in range(kept)] + [*range(frames)]
    mask = torch.zeros(len(rows), len(rows), dtype=torch.bool)
    mask[copies:, copies:] = causal_mask(own)
    for i, g in enumerate(gone):
        mine, places = slice(i * kept, i * kept + kept), copies + (own == i).nonzero().flatten()
        mask[mine, mine] = causal_mask(own[:kept])
        mask[places, mine] = own[:kept] <= i
        mask[places, copies:copies + kept + g] = False
    past, t_past = shifted(model.cfg, video, torch.zeros(2, frames))
    every = Camera(c.c2w[:, rows], c.K[:, rows], move=c.move[:, rows])
    context = model.encode(past[:, rows], t_past[:, rows], text, every, mask, pos)[:, copies:]
    for i, (x, t, v) in enumerate(calls):
        here = slice(1 + i // 3 * chunk, 1 + (i // 3 + 1) * chunk)
        want = model(x, t, text, c.frames(here), context=context[:, here])
        torch.testing.assert_close(v, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize('chunk, first', [(1, 1), (4, 1), (4, 4)])
def test_what_each_chunk_sees(chunk, first):
    """Its own noisy frames, all earlier clean ones and their times, the cameras up to its own: nothing else."""
    model, F = split_model(chunk=chunk, first_chunk=first), 2 * chunk + first
    own = chunk_ids(F, chunk, first)
    c2w, K, text, noise = scene(F, 4, 4)
    t, level = torch.rand(2, F), torch.rand(2, F)
    batch = Batch(noise(F), Camera(relative(c2w), K), text, noise(F), Draws(torch.rand(2, 2 * F + 4)), ())
    inputs = [x.requires_grad_() for x in (batch.x0, level, batch.eps, t, batch.camera.c2w)]
    v = teacher_forced(model, model.cfg, batch, batch.eps, t, level)
    for frame in range(F):
        grads = torch.autograd.grad(v[:, frame].square().sum(), inputs, retain_graph=True)
        moved = [g.abs().flatten(2).sum(2)[0] > 0 if g.ndim > 2 else g[0] != 0 for g in grads]
        history, told, noisy, time, poses = moved
        before, mine = own < own[frame], own == own[frame]
        assert torch.equal(history, before) and torch.equal(told, before)
        assert torch.equal(noisy, mine) and torch.equal(time, mine)
        assert torch.equal(poses, before | mine)


def test_pairs_are_the_plain_ode():
    """Encoding once and then only rendering is Euler on the teacher-forced velocity, guided too."""
    model, F = split_model(camera='plucker+prope', chunk=2), 5
    c2w, K, text, noise = scene(F, 4, 4)
    level = torch.rand(2, F)[:, chunk_ids(F, 2)]
    batch = Batch(noise(F), Camera(relative(c2w), K), text, noise(F), Draws(torch.rand(2, 2 * F + 4)), ())
    for guidance in (1.0, 1.7):
        got = ode_states(model, batch, level, TIMES, TIMES[1:2], guidance)
        x, states = batch.eps, []
        for t, t_next in zip(TIMES[:-1], TIMES[1:]):
            v = teacher_forced(model, model.cfg, batch, x, t.expand(2, F), level)
            blind = Batch(**{**vars(batch), 'camera': Camera(batch.camera.c2w, K, torch.zeros(2))})
            null = teacher_forced(model, model.cfg, blind, x, t.expand(2, F), level)
            states.append(x)
            x = x + (t_next - t) * (null + guidance * (v - null))
        torch.testing.assert_close(got, torch.stack([states[1], x], 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize('camera, window', [('plucker+prope', 64), ('prope', 3), ('plucker', 3)])
def test_gradient_of_a_self_rollout(camera, window):
    """Both parts and the camera learn from a chunk that stops at its exit; nothing reaches an earlier chunk. Blocks
    that compute again in the backward pass find the cache as it was, although its places have been written since."""
    model = split_model(camera=camera).train()
    c2w, K, text, noise = scene(6, 4, 4)
    cameras = [Camera(c2w[:, i:i + 1], K[:, i:i + 1]) for i in range(6)]
    once = None
    for again in (False, True):
        model.checkpoint = again
        g = torch.Generator().manual_seed(0)
        draw = lambda n: torch.randn(2, n, 16, 4, 4, generator=g)
        chunks = list(rollout(model, cameras, text, TIMES, draw, torch.ones(2, 1, 16, 4, 4), exit_step=1,
                              window=window))
        assert not chunks[0].requires_grad and all(x.requires_grad for x in chunks[1:])
        loss = sum(x.square().mean() for x in chunks[1:])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        assert all(g.abs().sum() > 0 for g in grads)
        once = once or grads
        torch.testing.assert_close(grads, once)
    for a, b in ((2, 1), (3, 1)):                              # the graph of a chunk has no node of an earlier one
        nodes = [set(graph(chunks[i].grad_fn)) for i in (a, b)]
        shared = {n for n in nodes[0] & nodes[1] if not hasattr(n, 'variable')}
        assert not shared, shared


def graph(node):
    """All nodes behind one of autograd's."""
    seen, todo = set(), [node]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [n for n, _ in node.next_functions]
    return seen


def test_split_takes_the_same_weights():
    """The first blocks encode, the others decode; the context enters as it is. A dense model stays what it was."""
    dense = tiny_model(num_layers=3, camera='plucker+prope', eviction='frames')
    model = rebuilt(dense, encoder_blocks=2, eviction='chunks')
    assert model.cfg.encoder_blocks == 2 and model.cfg.eviction == 'chunks' and dense.cfg.encoder_blocks == 0
    more = set(model.state_dict()) - set(dense.state_dict())
    assert more == {'context_embedding.weight', 'context_embedding.bias'}
    assert all(torch.equal(model.state_dict()[name], x) for name, x in dense.state_dict().items())
    assert torch.equal(model.context_embedding.weight, torch.eye(48)) and not model.context_embedding.bias.any()

# ----------------------------------------------------------------------------------------------- as a user runs them

@pytest.fixture(scope='module')
def split_chain(data, chain, tmp_path_factory):
    """Stages 1 to 3 with one block of two as the encoder, from the whole model of stage 0, which stays the score."""
    out = tmp_path_factory.mktemp('split')
    shutil.copy(f'{chain}/camera.safetensors', out)
    run('train_ar.py', '--encoder_blocks', 1, '--init', f'{out}/camera.safetensors', '--data', data, '--out', out,
        '--steps', 4, *SMALL)
    few = ['--data', data, '--out', out, '--steps', 4, *FLAGS, '--init', f'{out}/ar.safetensors', '--teacher_steps', 8,
           '--pairs', 6, '--guidance', 1.3]
    run('distill_ode.py', *few)
    run('distill_ode.py', '--method', 'cd', *few)
    run('distill_dmd.py', *dmd_args(data, out), '--out', out)
    return out


def test_all_stages_train_it_and_it_walks(split_chain):
    for stage in ('ar', 'ode', 'cd', 'dmd'):
        model, header = load_model(f'{split_chain}/{stage}.safetensors')
        assert model.cfg.encoder_blocks == 1 and all(math.isfinite(x) for x in header['metrics'].values())
        assert len(losses(split_chain, stage)) == 4
    before, after = (load_model(f'{split_chain}/{stage}.safetensors')[0].state_dict() for stage in ('ar', 'dmd'))
    assert all(not torch.equal(x, after[name]) for name, x in before.items() if name.endswith('weight'))
    for name, args in (('ar', ['--guidance', 1.5, '--over', 'text']), ('dmd', ['--window', 3])):
        run('stream.py', '--ckpt', f'{split_chain}/{name}.safetensors', '--keys', 'w*3,wl*6', '--out',
            split_chain / 'walk.gif', *args)
        assert len(iio.imread(split_chain / 'walk.gif')) == 10
    words = run('backbones.layouts', split_chain / 'dmd.safetensors')
    assert 'encoder_blocks=1' in words and 'a streamed chunk in 4 steps' in words


def processes_equal_one(chain, data, tmp_path, *more):
    """Stages 1 and 3 on one process, on two, and on two that share the weights; `more` flags of stage 1."""
    args = [*more, '--data', data, '--init', f'{chain}/camera.safetensors', '--steps', 10, *SMALL, '--dtype', 'float32']
    run('train_ar.py', *args, '--out', tmp_path / 'one')
    run('train_ar.py', *args, '--out', tmp_path / 'two', torchrun=2)
    run('train_ar.py', *args, '--out', tmp_path / 'fsdp', '--shard', 'fsdp', '--muon', False, torchrun=2)
    one, two, fsdp = (losses(tmp_path / d) for d in ('one', 'two', 'fsdp'))
    assert len(one) == 10 and max(abs(a - b) for a, b in zip(one, two)) < 1e-4 and abs(one[0] - fsdp[0]) < 1e-5
    args = [*dmd_args(data, chain), '--dtype', 'float32']
    run('distill_dmd.py', *args, '--out', tmp_path / 'one')
    run('distill_dmd.py', *args, '--out', tmp_path / 'two', torchrun=2)
    run('distill_dmd.py', *args, '--out', tmp_path / 'fsdp', '--shard', 'fsdp', '--checkpoint', True, torchrun=2)
    a, b, c = (load_tensors(f'{tmp_path}/{d}/dmd.resume.safetensors')[0] for d in ('one', 'two', 'fsdp'))
    for k in a:
        assert (a[k] - b[k]).abs().max() < 1e-4 and (a[k] - c[k]).abs().max() < 1e-4, k


def test_two_processes_equal_one(split_chain, data, tmp_path):
    processes_equal_one(split_chain, data, tmp_path, '--encoder_blocks', 1)


def test_an_encoder_of_all_blocks_is_refused(split_chain, data, tmp_path):
    args = ['--init', f'{split_chain}/camera.safetensors', '--data', data, '--out', tmp_path, *SMALL]
    assert '--encoder_blocks 2: the model has 2 blocks' in run('train_ar.py', '--encoder_blocks', 2, *args, ok=False)
