"""The chunk-by-chunk rollout with its KV cache against one uncached teacher-forced forward of its own output."""
import gc
import re

import pytest
import torch

from camera import BadInput, Camera, intrinsics, keys_to_poses, moves, relative
from model import (KVCache, ModelConfig, attention, chunk_ids, rollout, rollout_clip, rotary_table, schedule,
                   teacher_forcing_mask)
from test_model import tiny_model


def scene(frames, H, W):
    """Two paths c2w (2, frames, 4, 4), K, text, and a function that draws noise."""
    g = torch.Generator().manual_seed(1)
    c2w = torch.stack([keys_to_poses(keys)[:frames] for keys in ('w*2,wl*3,di*2,j*30', 'j*2,s*3,al*40')])
    K = intrinsics(90, W / H).expand(2, frames, 4)
    text = torch.randn(2, 4, 8, generator=g)
    return c2w, K, text, lambda n: torch.randn(2, n, 16, H, W, generator=g)


def roll_out(model, frames, H, W, first_frame=None, window=64, guidance=1.0, calls=None, off=None, **kw):
    """Roll out `frames` frames, camera and text on but for `off`; record every network call in `calls` as (x, t,
    cache.end, v)."""
    c2w, K, text, noise = scene(frames, H, W)
    sizes = torch.bincount(chunk_ids(frames, model.cfg.chunk, model.cfg.first_chunk)).tolist()
    on = torch.full((2,), off != 'camera')
    cameras = (Camera(a, b, on) for a, b in zip(c2w.split(sizes, 1), K.split(sizes, 1)))
    text = text * (off != 'text')
    def record(m, args, kw_, v):                               # a chunk that goes along with the next is a call too
        (x, t), end = args[:2], kw_['cache'].end
        new = int((t[0] == t[0, 0]).sum()) % len(t[0])
        for part in ([slice(new)] if new else []) + [slice(new, None)]:
            calls.append((x[:, part], t[:, part], end + (part.start or 0), v if part.stop is None else None))
    if calls is not None:
        hook = model.register_forward_hook(record, with_kwargs=True)
    out = list(rollout(model, cameras, text, schedule(3, 2.0), noise, first_frame, guidance, window, **kw))
    if calls is not None:
        hook.remove()
    return torch.cat(out, 1), Camera(c2w, K), text


def teacher_forced(model, x0, x_t, t, camera, text):
    F = x0.shape[1]
    ids = chunk_ids(F, model.cfg.chunk, model.cfg.first_chunk)
    with torch.no_grad():
        return model(torch.cat([x0, x_t], 1), torch.cat([0 * t, t], 1), text, Camera.cat([camera, camera]),
                     mask=teacher_forcing_mask(ids), pos=[*range(F)] * 2)[:, F:]


@pytest.mark.parametrize('chunk, first, frames, H, W', [(1, 1, 5, 4, 4), (4, 1, 9, 2, 6), (4, 4, 8, 4, 2),
                                                        (1, 1, 3, 16, 32)])
@pytest.mark.parametrize('given, camera', [(True, 'plucker'), (False, 'plucker'), (True, 'prope'),
                                           (False, 'plucker+prope')])
def test_cached_rollout_equals_one_teacher_forced_forward(chunk, first, frames, H, W, given, camera):
    """With PRoPE too, whose keys have separate slots in the cache."""
    model, calls = tiny_model(chunk=chunk, first_chunk=first, camera=camera), []
    start = torch.randn(2, first, 16, H, W) if given else None
    x0, camera, text = roll_out(model, frames, H, W, start, calls=calls)
    assert x0.shape[1] == frames and (not given or torch.equal(x0[:, :first], start))
    camera = Camera(relative(camera.c2w), camera.K)
    denoising = [c for c in calls if c[1].max() > 0]
    for step, t in enumerate(schedule(3, 2.0)[:-1]):
        x_t, v, times = x0.clone(), torch.zeros_like(x0), torch.zeros(2, frames)
        here = [c for c in denoising if c[1].max() == t]
        assert len(here) == len(torch.unique(chunk_ids(frames, chunk, first))) - given
        for x, tt, end, out in here:
            n = x.shape[1]
            x_t[:, end:end + n], v[:, end:end + n], times[:, end:end + n] = x, out, tt
        want = teacher_forced(model, x0, x_t, times, camera, text)
        rows = slice(first if given else 0, None)
        torch.testing.assert_close(v[:, rows], want[:, rows], rtol=0, atol=1e-5)


@pytest.mark.parametrize('chunk, window, frames', [(1, 6, 16), (4, 9, 21), (2, 7, 17)])
def test_after_a_window_is_encoded_again_nothing_is_stale(chunk, window, frames):
    """Each denoising call equals a teacher-forced forward of the window it saw, its first frame the origin."""
    model, calls = tiny_model(chunk=chunk), []
    x0, camera, text = roll_out(model, frames, 4, 4, torch.randn(2, 1, 16, 4, 4), window, calls=calls)
    assert torch.isfinite(x0).all()
    encoded = [i for i, c in enumerate(calls) if c[1].max() == 0 and c[2] == 0 and i > 0]
    assert len(encoded) >= 2 and max(c[2] + c[0].shape[1] for c in calls) <= window
    done = 0
    for i, (x, t, end, v) in enumerate(calls):
        if t.max() == 0:
            done += chunk if i in encoded else x.shape[1]
            continue
        seen, n = slice(done - end, done + x.shape[1]), x.shape[1]                 # the window, in the whole rollout
        c = Camera(relative(camera.c2w[:, seen]), camera.K[:, seen])
        clean, times = x0[:, seen], torch.cat([torch.zeros(2, end), t], 1)
        ids = torch.cat([torch.arange(1), 1 + torch.arange(end - 1) // chunk, torch.full((n,), 10 ** 6)])
        F = end + n
        with torch.no_grad():
            want = model(torch.cat([clean, clean[:, :end], x], 1), torch.cat([0 * times, times], 1), text,
                         Camera.cat([c, c]), mask=teacher_forcing_mask(ids), pos=[*range(F)] * 2)[:, -n:]
        torch.testing.assert_close(v, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize('camera, sink', [('prope', False), ('plucker', True), ('plucker+prope', True)])
@pytest.mark.parametrize('chunk, window, frames', [(1, 4, 11), (2, 7, 17)])
def test_a_rolling_cache_equals_one_forward_under_a_sliding_mask(chunk, window, frames, camera, sink):
    """Where nothing in the cache knows an origin that moves, whole chunks are evicted, oldest first, and the others
    stay as they are. A sink stays, right before the oldest of them: the forward pass has a copy of it for every place
    that it takes. The second chunk of one of two rollouts begins elsewhere: only that one move is none.
    A chunk's clean pass goes along with the next one's first step, when room for that one has been made."""
    model, calls, jump = tiny_model(chunk=chunk, camera=camera, sink=sink), [], torch.tensor([True, False])
    x0, camera, text = roll_out(model, frames, 4, 4, torch.randn(2, 1, 16, 4, 4), window, calls=calls, jump=jump)
    ids = chunk_ids(frames, chunk)
    ends = [int((ids <= i).sum()) for i in range(int(ids.max()) + 2)]                # one past a chunk's last frame
    ends[-1] = frames + chunk                                                        # of a chunk that never comes
    fits = lambda a, b: b - max(a, sink) + sink <= window
    oldest = [next(a for a in [0] + ends if fits(a, b)) for b in ends]               # in the cache, but for the sink
    copies = frames * sink
    mask = torch.zeros(copies + 2 * frames, copies + 2 * frames, dtype=torch.bool)
    mask[:copies, :copies], mask[copies:, copies:] = torch.eye(copies), teacher_forcing_mask(ids)
    for q in range(2 * frames):
        a = oldest[int(ids[q % frames]) + (q < frames)]
        mask[copies + q, copies:copies + max(a, sink)] = False
        if sink:
            mask[copies + q, max(a - 1, 0)] = True
    rows, pos = [0] * copies + [*range(frames)] * 2, [*range(copies)] + [*range(frames)] * 2
    move = moves(camera.c2w, jump=jump if sink else None)
    camera = Camera(relative(camera.c2w)[:, rows], camera.K[:, rows], move=move[:, rows])
    noisy = [c for c in calls if c[1].max() > 0]
    assert max(c[2] + c[0].shape[1] for c in calls) <= window
    for step in range(3):
        x_t, v, times = x0.clone(), torch.zeros_like(x0), torch.zeros(2, frames)
        for i, (x, t, _, out) in enumerate(noisy[step::3]):
            seen = slice(ends[i], ends[i] + chunk)
            x_t[:, seen], v[:, seen], times[:, seen] = x, out, t
        all_x = torch.cat([x0[:, rows[:-frames]], x_t], 1)
        all_times = torch.cat([torch.zeros(2, copies + frames), times], 1)
        with torch.no_grad():
            want = model(all_x, all_times, text, camera, mask, pos)
        torch.testing.assert_close(v[:, 1:], want[:, 1 - frames:], rtol=0, atol=1e-5)


class PlainCache:
    """The keys and values of every frame of a walk, in lists that only grow, each rotated to its place in the walk. A
    chunk sees itself, the sink, and as many frames before it as the window has room for beside these two."""

    def __init__(self, model, window, L):
        self.sink, self.window, self.L = model.cfg.sink, window, L
        self.frames = [[] for _ in range(2 * model.cfg.num_layers)]             # PRoPE's behind the rotary ones
        self.text = [None] * model.cfg.num_layers

    def prepare(self, n, mask):
        return mask

    def update(self, slot, k, v):
        frames = self.frames[slot]
        frames[self.start:] = zip(k.split(self.L, 1), v.split(self.L, 1))       # each call of a chunk overwrites
        oldest = len(frames) - (self.window - self.sink)
        k, v = zip(*(frame for i, frame in enumerate(frames) if i < self.sink or i >= oldest))
        return torch.cat(k, 1), torch.cat(v, 1)


@torch.no_grad()
def plain_walk(model, frames, first_frame=None, window=64, guidance=1.0, off=None, context=0.0):
    """minWM's loop, one call for each step, one more for the keys of the finished chunk, and a second cache for
    guidance. The noise is that of `roll_out`."""
    c2w, K, text, noise = scene(frames, 4, 4)
    sizes = torch.bincount(chunk_ids(frames, model.cfg.chunk, model.cfg.first_chunk)).tolist()
    caches = [PlainCache(model, window, 4) for _ in range(2)]
    x0, start = [], 0
    for n in sizes:
        here = slice(start, start + n)

        def call(x, t):
            v = []
            for cache, here_off in zip(caches, (None, off)):
                cache.start = start
                camera = Camera(relative(c2w)[:, here], K[:, here], torch.full((2,), here_off != 'camera'))
                v.append(model(x, torch.full((2, n), t), text * (here_off != 'text'), camera, cache=cache,
                               pos=range(start, start + n)))
            return v[1] + guidance * (v[0] - v[1])

        given = first_frame is not None and start == 0
        x = first_frame if given else noise(n)
        times = [] if given else schedule(3, 2.0).tolist()
        for t, t_next in zip(times, times[1:]):
            x = x + (t_next - t) * call(x, t)
        x0.append(x)
        level = 0. if given else context
        call((1 - level) * x + (level * noise(n) if level else 0), level)
        start += n
    return torch.cat(x0, 1)


@pytest.mark.parametrize('sink', [False, True])
@pytest.mark.parametrize('chunk, first, before, frames', [
    (1, 1, 1, 7), (1, 1, 3, 9), (2, 2, 0, 8), (2, 2, 1, 10), (2, 2, 2, 10), (2, 1, 3, 11), (4, 4, 1, 16), (4, 1, 6, 21),
    (4, 4, 8, 20)])
def test_minwms_walk_equals_its_plain_loop(chunk, first, before, frames, sink):
    """Its window counts the chunk at work: a chunk sees `before` frames and the sink before it, while it is denoised
    and while its keys are written. Frames leave one by one, and none is rotated again, the sink neither."""
    model = tiny_model(chunk=chunk, first_chunk=first, camera='prope', sink=sink, eviction='frames')
    window = sink + before + chunk
    start = torch.randn(2, first, 16, 4, 4, generator=torch.Generator().manual_seed(2))
    for options in (dict(), dict(first_frame=start, context=.2)):
        x0, _, _ = roll_out(model, frames, 4, 4, window=window, **options)
        torch.testing.assert_close(x0, plain_walk(model, frames, window=window, **options), rtol=0, atol=1e-5)


@pytest.mark.parametrize('over', ['camera', 'text'])
def test_minwms_walk_with_guidance_equals_its_plain_loop(over):
    model = tiny_model(chunk=2, first_chunk=2, camera='prope', sink=True, eviction='frames')
    x0, _, _ = roll_out(model, 12, 4, 4, window=6, guidance=1.5, over=over)
    torch.testing.assert_close(x0, plain_walk(model, 12, window=6, guidance=1.5, off=over), rtol=0, atol=1e-5)


@pytest.mark.parametrize('camera', ['none', 'prope', 'plucker+prope'])
@pytest.mark.parametrize('sink', [False, True])
@pytest.mark.parametrize('chunk, first, window, frames', [(1, 1, 4, 11), (2, 2, 5, 12), (2, 1, 6, 13), (4, 4, 7, 16)])
def test_minwms_walk_equals_one_forward_under_its_sliding_mask(chunk, first, window, frames, sink, camera):
    """In every call, and with one position for every frame of the walk."""
    if camera == 'plucker+prope' and not sink:
        pytest.skip('is encoded again')
    model = tiny_model(chunk=chunk, first_chunk=first, camera=camera, sink=sink, eviction='frames')
    calls, jump = [], torch.tensor([True, False])
    x0, camera, text = roll_out(model, frames, 4, 4, torch.randn(2, first, 16, 4, 4), window, calls=calls, jump=jump)
    ids, key = chunk_ids(frames, chunk, first), torch.arange(frames)
    end = torch.bincount(ids).cumsum(0)[ids][:, None]                                # of each frame's chunk
    inside = (key < sink) | (key >= end - (window - sink))
    mask = teacher_forcing_mask(ids) & inside.repeat(2, 2)
    camera = Camera(relative(camera.c2w), camera.K, move=moves(camera.c2w, jump=jump if sink else None))
    noisy = [c for c in calls if c[1].max() > 0]
    for step in range(3):
        x, t, _, v = zip(*noisy[step::3])
        x_t, times = torch.cat([x0[:, :first], *x], 1), torch.cat([torch.zeros(2, first), *t], 1)
        with torch.no_grad():
            want = model(torch.cat([x0, x_t], 1), torch.cat([0 * times, times], 1), text, Camera.cat([camera] * 2),
                         mask, [*range(frames)] * 2)
        torch.testing.assert_close(torch.cat(v, 1), want[:, frames + first:], rtol=0, atol=1e-5)


def test_training_walks_as_minwm_does():
    """With gradient a chunk is cached by a separate call: nothing else changes."""
    model, options = tiny_model(chunk=2, first_chunk=2, camera='prope', sink=True, eviction='frames'), dict(window=6)
    for step in range(2):
        options |= dict(renoise=True, exit_step=step)
        with torch.no_grad():
            want, _, _ = roll_out(model, 12, 4, 4, **options)
        x0, _, _ = roll_out(model, 12, 4, 4, **options)
        assert x0.requires_grad and not want.requires_grad
        torch.testing.assert_close(x0, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize('eviction, window, needs', [
    ('chunks', 4, 'use at least 5 (2 for the next chunk, 1 for the sink, 2 for the newest chunk)'),
    ('frames', 2, 'use at least 3 (2 for the next chunk, 1 for the sink)'),
    ('frames', 1, 'use at least 2 (2 for the next chunk)')])
def test_a_window_without_room_for_the_sink_is_refused(eviction, window, needs):
    model = tiny_model(chunk=2, first_chunk=2, camera='prope', sink=True, eviction=eviction)
    with pytest.raises(BadInput, match=f'a window of {window} frames is too small: {re.escape(needs)}'):
        roll_out(model, 6, 4, 4, window=window)


@pytest.mark.parametrize('eviction, window', [('chunks', 5), ('chunks', 6), ('frames', 3), ('frames', 4)])
def test_a_sink_in_a_first_chunk_of_two_is_never_lost(eviction, window, monkeypatch):
    """Values of the first layer know of one frame alone, so they say which one it is."""
    model, values = tiny_model(chunk=2, first_chunk=2, camera='prope', sink=True, eviction=eviction), []
    update = KVCache.update

    def record(cache, slot, k, v):
        k, v = update(cache, slot, k, v)
        values.extend([v.clone()] * (slot == 0))
        return k, v
    monkeypatch.setattr(KVCache, 'update', record)
    roll_out(model, 12, 4, 4, torch.randn(2, 2, 16, 4, 4), window)
    assert len(values) == 15 and all(torch.equal(v[:, :4], values[0][:, :4]) for v in values)
    assert max(v.shape[1] for v in values[1::3]) <= 4 * window


def test_a_walk_that_rolls_keeps_few_rotary_angles():
    """Complex numbers that are left behind it, all over the process."""
    def held():
        gc.collect()
        all_complex = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.dtype == torch.complex64]
        return {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() // 8 for x in all_complex}
    before, model, L = held(), tiny_model(camera='prope', num_layers=1), 32
    rotary_table.cache_clear()
    roll_out(model, 33, 8, 16, torch.randn(2, 1, 16, 8, 16), window=3)
    new = held()
    assert 0 < sum(n for place, n in new.items() if place not in before) < 20 * L * 12     # 12 angles a token


def test_a_long_walk_never_leaves_the_window():
    model = tiny_model()
    x0, _, _ = roll_out(model, 37, 2, 2, torch.randn(2, 1, 16, 2, 2), window=5)
    assert x0.shape[1] == 37 and torch.isfinite(x0).all()
    torch.testing.assert_close(x0[:, :5], roll_out(model, 37, 2, 2, x0[:, :1], window=40)[0][:, :5], rtol=0, atol=1e-5)


@pytest.mark.parametrize('camera', ['plucker', 'prope'])
def test_a_window_of_one_chunk_gives_that_chunk_and_no_second(camera):
    model, first = tiny_model(camera=camera), torch.randn(2, 1, 16, 4, 4)
    assert roll_out(model, 1, 4, 4, first, window=1)[0].equal(first)
    with pytest.raises(BadInput, match='a window of 1 frames is too small: use at least 2'):
        roll_out(model, 2, 4, 4, first, window=1)


def test_a_sink_within_a_longer_first_chunk(monkeypatch):
    """It is counted once, and each frame's move is from the frame before, whatever has left the window. Where frame 1
    is elsewhere, its move alone is none."""
    model, seen = tiny_model(sink=True), []
    embed = model.embed_camera
    monkeypatch.setattr(model, 'embed_camera', lambda camera, H, W: seen.append(camera.move) or embed(camera, H, W))
    c2w, K = keys_to_poses('w*2,wl*3,a*2,j*3')[None], intrinsics(90., 1.).expand(1, 11, 4)
    noise = lambda n: torch.randn(1, n, 16, 4, 4)
    for jump in (None, torch.tensor([False]), torch.tensor([True])):
        seen.clear()
        x0 = rollout_clip(model, c2w, K, torch.randn(1, 4, 8), schedule(2, 5.0), noise, noise(3), window=4, jump=jump)
        assert x0.shape[1] == 11 and x0.isfinite().all()
        torch.testing.assert_close(torch.cat(seen, 1), moves(c2w, jump=jump), rtol=0, atol=1e-6)
    model, text = tiny_model(sink=True, chunk=4), torch.randn(1, 4, 8)
    x0 = rollout_clip(model, c2w[:, :5], K[:, :5], text, schedule(2, 5.0), noise, noise(1), window=5)
    assert x0.shape[1] == 5


@pytest.mark.parametrize('grad', [False, True])
@pytest.mark.parametrize('chunk, given', [(1, 3), (2, 5), (4, 5)])
def test_a_given_history_of_several_chunks_is_causal(chunk, given, grad):
    """As that of --drift: the frames that are given see no later ones, as in training."""
    model, calls, frames = tiny_model(chunk=chunk), [], given + 2 * chunk
    c2w, K, text, noise = scene(frames, 4, 4)
    history = torch.randn(2, given, 16, 4, 4)
    model.register_forward_hook(lambda m, args, kw, v: calls.append((args[0], args[1], v)), with_kwargs=True)
    with torch.set_grad_enabled(grad):
        x0 = rollout_clip(model, c2w, K, text, schedule(3, 2.0), noise, history, exit_step=0 if grad else None).detach()
    assert torch.equal(x0[:, :given], history)
    x, t, v = calls[1 if grad else 0]                          # the first denoising call; with gradient apart from the
    x_t, times = x0.clone(), torch.zeros(2, frames)            # call that caches the history
    x_t[:, given:given + chunk], times[:, given:given + chunk] = x[:, -chunk:], t[:, -chunk:]
    want = teacher_forced(model, x0, x_t, times, Camera(relative(c2w), K), text)[:, given:given + chunk]
    torch.testing.assert_close(v.detach(), want, rtol=0, atol=1e-5)


def test_generated_history_is_noised_and_says_so():
    model, calls = tiny_model(), []
    x0, _, _ = roll_out(model, 9, 4, 4, torch.randn(2, 1, 16, 4, 4), window=5, calls=calls, context=.25)
    clean = [(x, t, end) for x, t, end, _ in calls if t.max() in (0, .25)]
    assert clean[0][1].max() == 0 and torch.equal(clean[0][0], x0[:, :1])            # the given frame is what it is
    assert len(clean) == 9 and all((t == .25).all() for _, t, _ in clean[1:])
    eps = torch.cat([(x[:, -1:] - .75 * x0[:, i + 1:i + 2]) / .25 for i, (x, _, _) in enumerate(clean[1:])], 1)
    assert abs(eps.mean()) < .06 and abs(eps.std() - 1) < .06


@pytest.mark.parametrize('over', ['camera', 'text'])
def test_guidance_is_the_standard_combination(over):
    model, calls = tiny_model(), []
    first = torch.randn(2, 1, 16, 4, 4)
    one, null = roll_out(model, 2, 4, 4, first)[0], roll_out(model, 2, 4, 4, first, guidance=0.0, over=over)[0]
    three = roll_out(model, 2, 4, 4, first, guidance=3.0, calls=calls, over=over)[0]
    x, t, _, v = calls[1]                                     # the first denoising call, both branches in one batch
    assert x.shape[0] == 4 and torch.equal(x[:2], x[2:])
    torch.testing.assert_close(calls[2][0][:2], x[:2] + (schedule(3, 2.0)[1] - 1) * (v[2:] + 3 * (v[:2] - v[2:])))
    assert not torch.allclose(one, null, atol=1e-3) and not torch.allclose(one, three, atol=1e-3)
    torch.testing.assert_close(null, roll_out(model, 2, 4, 4, first, off=over)[0], rtol=0, atol=1e-5)


def test_cameras_are_asked_for_only_when_due():
    model, asked = tiny_model(), []

    def cameras():
        for i in range(4):
            asked.append(i)
            yield Camera(torch.eye(4).expand(1, 1, 4, 4), intrinsics(90, 1).expand(1, 1, 4))
    chunks = rollout(model, cameras(), torch.zeros(1, 4, 8), schedule(2, 2.0), lambda n: torch.zeros(1, n, 16, 2, 2))
    for i in range(4):
        next(chunks)
        assert asked == list(range(i + 1)) and torch.is_grad_enabled()


@torch.no_grad()
def test_ten_thousand_frames_in_a_ring_equal_a_list():
    """Nothing in the cache is moved: after 10,000 frames, some cached on their own, each pass still reads what a plain
    list of frames holds, under the same mask."""
    cfg, window, g = ModelConfig(dim=8, num_heads=1, num_layers=1), 7, torch.Generator().manual_seed(0)
    cache, frames, moved = KVCache(cfg, 1, window, 2, 'cpu'), [], 0
    storage = cache.kv.data_ptr()
    new = lambda n: torch.randn(1, 2 * n, 1, 8, generator=g)
    for i in range(10_000):
        excess = len(frames) + 2 - window
        if excess > 0:
            cache.roll(excess, sink=1)
            del frames[1:1 + excess]
        for alone in [True, False] if i % 97 == 0 else [False]:           # the newest frame, then it with the next
            n = 1 if alone else 2
            mask = torch.ones(n, len(frames) + n, dtype=torch.bool)
            mask[0, len(frames) + 1:] = False                             # it does not see the next
            k, v, q = new(n), new(n), new(n)
            permuted = cache.prepare(n, mask)
            moved += storage != cache.kv.data_ptr()
            storage = cache.kv.data_ptr()
            got = attention(q, *cache.update(0, k, v), permuted)
            keys, values = (torch.cat([*(f[j] for f in frames), x], 1) for j, x in enumerate((k, v)))
            torch.testing.assert_close(got, attention(q, keys, values, mask), rtol=0, atol=1e-6)
        frames.append((k[:, :2], v[:, :2]))
        cache.end += 1
    assert cache.end + cache.gone == 10_000 and moved <= 10_000 // 97 + 1
