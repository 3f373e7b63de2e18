"""The chunk-by-chunk rollout with its KV cache against one uncached teacher-forced forward of its own output."""
import pytest
import torch

from camera import BadInput, Camera, intrinsics, keys_to_poses, moves, relative
from model import chunk_ids, rollout, rollout_clip, schedule, teacher_forcing_mask
from test_model import tiny_model


def roll_out(model, frames, H, W, first_frame=None, window=64, guidance=1.0, calls=None, off=None, **kw):
    """Roll out `frames` frames, camera and text on but for `off`; record every network call in `calls` as (x, t,
    cache.end, v)."""
    g = torch.Generator().manual_seed(1)
    c2w = keys_to_poses('w*2,wl*3,di*2,j*30')[:frames].expand(2, -1, 4, 4)
    K = intrinsics(90, W / H).expand(2, frames, 4)
    sizes = torch.bincount(chunk_ids(frames, model.cfg.chunk, model.cfg.first_chunk)).tolist()
    on = torch.full((2,), off != 'camera')
    cameras = (Camera(a, b, on) for a, b in zip(c2w.split(sizes, 1), K.split(sizes, 1)))
    text = torch.randn(2, 4, 8, generator=g) * (off != 'text')
    noise = lambda n: torch.randn(2, n, 16, H, W, generator=g)
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
    """It is counted once, and each frame's move is from the frame before, whatever has left the window."""
    model, seen = tiny_model(sink=True), []
    embed = model.embed_camera
    monkeypatch.setattr(model, 'embed_camera', lambda camera, H, W: seen.append(camera.move) or embed(camera, H, W))
    c2w, K = keys_to_poses('w*2,wl*3,a*2,j*3')[None], intrinsics(90., 1.).expand(1, 11, 4)
    noise = lambda n: torch.randn(1, n, 16, 4, 4)
    x0 = rollout_clip(model, c2w, K, torch.randn(1, 4, 8), schedule(2, 5.0), noise, noise(3), window=4)
    assert x0.shape[1] == 11 and x0.isfinite().all()
    torch.testing.assert_close(torch.cat(seen, 1)[:, 3:], moves(c2w)[:, 3:], rtol=0, atol=1e-6)
    model, text = tiny_model(sink=True, chunk=4), torch.randn(1, 4, 8)
    x0 = rollout_clip(model, c2w[:, :5], K[:, :5], text, schedule(2, 5.0), noise, noise(1), window=5)
    assert x0.shape[1] == 5


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
