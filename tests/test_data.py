"""Worlds, codec, captions and batches against what can be worked out by hand."""
import dataclasses
import json
import os
import types
import zlib
from types import SimpleNamespace as Namespace

import numpy as np
import pytest
import torch

from camera import BadInput, intrinsics, keys_to_poses, make_pose, random_path, starts_elsewhere
from common import Run
from data import (ARENA, CHANNELS, FOV, WORLDS, Clips, Config, Draws, Lowpoly, batches, decode, embed_text, encode,
                  find_world, free, get_batch, lapped_dct, lowpoly_clips, make, make_palette, make_plan, noise_for,
                  open_clips, psnr, to_device)
from model import ModelConfig

CFG = ModelConfig(text_dim=8, text_len=4)
CPU = torch.device('cpu')


def test_floor_and_walls_are_where_geometry_puts_them():
    world = Lowpoly([3], [4])
    world.boxes, world.balls = world.boxes[:0], world.balls[:0]
    o = torch.tensor([[[1., -1., 2.]]]).expand(1, 4, 3)
    d = torch.nn.functional.normalize(torch.tensor([[[0., 1, 0], [0, 3, 4], [1, 0, 0], [0, -1, 0]]]), dim=-1)
    colour, distance, _ = world.shade(o, d)
    torch.testing.assert_close(distance[0, :3], torch.tensor([1, 1 / .6, ARENA - 1]))
    assert distance[0, 3] > 1e3 and (colour >= 0).all() and (colour <= 1).all()


def test_boxes_and_balls_against_a_naive_march():
    world, plan = Lowpoly([5], [0]), make_plan(5)
    rng = np.random.default_rng(0)
    o = np.array([0., -1., 0.])
    for _ in range(200):
        d = rng.standard_normal(3) * [1, .4, 1]
        d /= np.linalg.norm(d)
        _, got, _ = world.shade(torch.tensor(o)[None, None].float(), torch.tensor(d)[None, None].float())
        s = np.arange(0, 20, .002)[:, None]
        p = o + s * d
        inside = ((p[:, None] > plan[0][:, 0]) & (p[:, None] < plan[0][:, 1])).all(-1).any(1)
        inside |= (np.linalg.norm(p[:, None] - plan[1][:, :3], axis=-1) < plan[1][:, 3]).any(1)
        inside |= (p[:, 1] > 0) | ((np.abs(p[:, [0, 2]]).max(1) > ARENA) & (p[:, 1] > -2.5))
        if inside[0]:
            continue
        above = (np.abs(p[:, [0, 2]]).max(1) > ARENA) & (p[:, 1] <= -2.5)
        if above.any() and (not inside.any() or above.argmax() < inside.argmax()):
            assert got.item() > 1e3
        else:
            assert abs(got.item() - s[inside.argmax(), 0]) < .02


def test_turning_left_moves_the_picture_right():
    world, K = Lowpoly([7], [1]), intrinsics(FOV, 1)[None, None]

    def look(yaw):
        c2w = make_pose(torch.tensor([0., -1., 0.]), torch.tensor(yaw), torch.tensor(0.))
        return world.render(c2w[None, None], K)[0][0, 0]

    straight, left = look(0.), look(-4.)
    error = [(left.roll(-s, 1) - straight).square()[:, 8:-8].mean().item() for s in (-3, 0, 3)]
    assert error[2] < .5 * error[1] < .5 * error[0]


def test_random_paths_stay_out_of_things_and_seldom_stand():
    still = 0
    for i in range(30):
        boxes, balls = make_plan(i)
        path = random_path(lambda x, z: free((boxes, balls), x, z), ARENA, 17, np.random.default_rng(i))
        c2w = path.double().numpy()
        p = c2w[:, [0, 2], 3]
        assert np.abs(p).max() < ARENA
        assert not ((p[:, None] > boxes[:, 0, ::2]) & (p[:, None] < boxes[:, 1, ::2])).all(-1).any()
        assert (np.linalg.norm(p[:, None] - balls[:, [0, 2]], axis=-1) > balls[:, 3]).all()
        assert np.allclose(c2w[:, 1, 3], -1)
        still += (np.abs(np.diff(c2w, axis=0)).max((1, 2)) < 1e-6).sum()
    assert still < 30 * 16 * .02


def test_caption_names_what_is_seen_and_changes_it():
    a, b = make_palette(1), make_palette(2)
    assert a[0] != b[0] and not torch.equal(a[1], b[1]) and len(a[0].split()) <= 16
    e = embed_text(['red floor', 'red walls', '', 'RED floor'], 4, 8)
    assert torch.equal(e[0], e[3]) and torch.equal(e[0, 0], e[1, 0]) and not torch.equal(e[0, 1], e[1, 1])
    assert (e[2] == 0).all() and (e[0, 2:] == 0).all()
    word = np.random.default_rng(zlib.crc32(b'red')).standard_normal(8, dtype=np.float32)
    torch.testing.assert_close(e[0, 0, :4], torch.from_numpy(word[:4]) + 1)             # place 0: cos 0 = 1
    angle = torch.tensor([1 / 100 ** (i / 4) for i in range(4)])                        # place 1: cosines, then sines
    floor = torch.from_numpy(np.random.default_rng(zlib.crc32(b'floor')).standard_normal(8, dtype=np.float32))
    torch.testing.assert_close(e[0, 1], floor + torch.cat([angle.cos(), angle.sin()]))
    assert torch.equal(embed_text(['a b c d e f'], 4, 8), embed_text(['a b c d'], 4, 8))


def test_codec():
    m = lapped_dct(64)
    torch.testing.assert_close(m @ m.T, torch.eye(64), rtol=0, atol=1e-6)
    frames = lowpoly_clips(Config(frames=3), 0, range(4))[0]['frames']
    z = encode(frames)
    assert z.shape == (4, 3, 16, 8, 8) and .5 < z.square().mean() < 2
    assert torch.allclose(encode(frames.float() / 255), z)
    ceiling = psnr(decode(z), frames.float() / 255).mean()
    assert ceiling > 28
    torch.testing.assert_close(encode(decode(.1 * z)), .1 * z, rtol=0, atol=1e-4)       # unclipped: exact
    assert encode(torch.zeros(48, 64, 3)).shape == (16, 6, 8)


def test_channels_are_the_low_frequencies_of_luma_and_chroma():
    """Channel 0 is the mean of the luma; then come 1 across, 1 down, 2 down, ...; the last six are of the chroma."""
    grey = encode(torch.full((16, 16, 3), .75)) - encode(torch.full((16, 16, 3), .5))
    assert (grey[0] > .1).all() and (grey[1:].abs() < 1e-5).all()
    red = torch.zeros(16, 16, 3)
    red[..., 0] = 1
    z = encode(red) - encode(torch.zeros(16, 16, 3))
    assert [c for c in range(16) if z[c].abs().max() > 1e-4] == [0, 10, 13]
    across = encode(torch.linspace(.2, .8, 16)[None, :, None].expand(16, 16, 3)) - encode(torch.full((16, 16, 3), .5))
    down = encode(torch.linspace(.2, .8, 16)[:, None, None].expand(16, 16, 3)) - encode(torch.full((16, 16, 3), .5))
    assert across[1].abs().max() > .05 and across[2].abs().max() < 1e-5
    torch.testing.assert_close(down[2].T * (across[1, 0, 0] / down[2, 0, 0]), across[1], rtol=0, atol=1e-5)
    assert len(set(CHANNELS)) == 16 and max(CHANNELS) < 3 * 8 * 8


def test_psnr_by_hand():
    a = torch.zeros(2, 4, 4, 3)
    assert psnr(a, a + .1).tolist() == pytest.approx([20, 20], abs=1e-3)
    assert psnr(a - 5, a)[0] == 100


def test_batches_are_slices_of_one_stream(data):
    clips = Clips(data)
    whole = get_batch(clips, 8, 4, 3, CFG, seed=1)
    parts = [get_batch(clips, 8 + i, 1, 3, CFG, seed=1) for i in range(4)]
    for name in ('x0', 'text', 'eps'):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(p, name) for p in parts]))
    assert torch.equal(whole.draws.u, torch.cat([p.draws.u for p in parts]))
    assert torch.equal(whole.camera.c2w, torch.cat([p.camera.c2w for p in parts]))
    torch.testing.assert_close(whole.camera.c2w[:, 0], torch.eye(4).expand(4, 4, 4), rtol=0, atol=1e-6)
    other = get_batch(clips, 8, 4, 3, CFG, seed=2)
    assert not torch.equal(whole.eps, other.eps)
    with pytest.raises(BadInput, match='frames'):
        get_batch(clips, 0, 1, 99, CFG)
    with pytest.raises(BadInput, match='frames'):
        next(batches(0, clips, Namespace(steps=1, batch=1, accum=1, frames=99, seed=0), CFG, Run(0, 1, CPU, None, 1)))
    cfg = Namespace(steps=3, batch=4, accum=1, frames=3, seed=1)          # two processes of two samples, from step 2
    for rank in (0, 1):
        (batch,) = batches(2, clips, cfg, CFG, Run(rank, 2, CPU, None, 2))
        assert torch.equal(batch.eps, whole.eps[2 * rank:2 * rank + 2])
    cfg = Namespace(steps=3, batch=4, accum=4, frames=3, seed=1)          # one of four micro-batches
    for i, batch in enumerate(batches(2, clips, cfg, CFG, Run(0, 1, CPU, None, 1))):
        assert torch.equal(batch.eps, whole.eps[i:i + 1])
    assert i == 3
    assert get_batch(clips, 0, 2, 2, CFG, whole=True).x0.shape[1] == 5


def test_draws_are_slices_of_u_by_name_and_move_with_it():
    """What a step draws is laid out as [times | first frame | prompt | camera | noise | times of the history]."""
    u = torch.arange(2 * 10.).view(2, 10)                      # 3 frames
    draws = Draws(u)
    assert draws.t[0].tolist() == [0, 1, 2] and draws.t_history[1].tolist() == [17, 18, 19]
    assert draws.first.tolist() == draws.restart.tolist() == [3, 13]
    assert (draws.drop_text[0], draws.drop_camera[0], draws.noise_seed[0]) == (4, 5, 6)
    u[:, 3] = -1                                               # slices, not copies
    assert (draws.first == -1).all()
    moved = to_device(draws, 'meta')
    assert moved.u.is_meta and moved.t_history.is_meta and moved.first.shape == (2,)


def test_noise_of_a_sample_depends_on_its_seed_alone():
    both, one = noise_for([(1, 2), 3], (2, 4), 'cpu'), noise_for([3], (2, 4), 'cpu')
    a, b = both(2), both(1)
    assert a.shape == (2, 2, 2, 4) and torch.equal(torch.cat([a, b], 1)[1:], torch.cat([one(1), one(2)], 1))


def test_a_long_walk_is_rendered_in_parts_and_shows_the_same():
    world, c2w, K = Lowpoly([3], [4]), keys_to_poses('wl*259')[None], intrinsics(90, 1).expand(1, 260, 4)
    whole = world.render(c2w, K, 8, 8, edges=0)
    for i in (0, 255, 256, 259):
        for a, b in zip(whole, world.render(c2w[:, i:i + 1], K[:, :1], 8, 8, edges=0)):
            assert a.shape[1] == 260 and torch.equal(a[:, i:i + 1], b)


def test_with_a_sink_frame_0_of_half_the_samples_is_from_elsewhere_in_the_clip(data):
    clips = Clips(data)
    plain, sink = (get_batch(clips, 0, 32, 3, dataclasses.replace(CFG, sink=on), seed=1) for on in (False, True))
    assert torch.equal(plain.x0[:, 1:], sink.x0[:, 1:])
    assert torch.equal(plain.eps, sink.eps) and torch.equal(plain.draws.u, sink.draws.u)
    still = [(batch.camera.move[:, 1] == torch.eye(4)).all((1, 2)) for batch in (plain, sink)]
    jumped = still[1] & ~still[0]
    assert 6 < jumped.sum() < 26 and torch.equal(plain.x0[~jumped], sink.x0[~jumped])
    for b in range(32):                                        # the frame and its pose belong together
        move = [batch.camera.c2w[b, 1].inverse() @ batch.camera.c2w[b, 2] for batch in (sink, plain)]
        torch.testing.assert_close(*move, rtol=0, atol=1e-5)
    val = Clips(data, 'val')
    assert torch.equal(get_batch(val, 0, 4, 3, dataclasses.replace(CFG, sink=True)).x0, get_batch(val, 0, 4, 3, CFG).x0)
    with pytest.raises(BadInput, match='Plücker'):
        get_batch(clips, 0, 1, 3, dataclasses.replace(CFG, sink=True, camera='prope'))


def test_clips_depend_on_seed_split_and_index_alone_and_held_out_plans_are_new():
    cfg = Config(frames=2)
    one, two = lowpoly_clips(cfg, 0, [5])[0], lowpoly_clips(cfg, 0, [4, 5])[0]
    assert torch.equal(one['frames'][0], two['frames'][1])
    plans = lambda cfg, split: {lowpoly_clips(cfg, split, [i])[0]['plan'].item() for i in range(20)}
    assert not plans(cfg, 0) & plans(cfg, 1)
    single = Config(frames=2, plans=1)
    assert plans(single, 0) == plans(single, 1) and len(plans(single, 0)) == 1


def test_paths_from_a_door_begin_there_and_with_a_sink_every_window_does(tmp_path):
    cfg = Config(plans=1, clips=4, val_clips=4, frames=9, door=True, height=16, width=16, out=f'{tmp_path}/door')
    make(cfg)
    with pytest.raises(BadInput, match='door True, not None'):
        make(dataclasses.replace(cfg, door=False))
    train, val = Clips(cfg.out), Clips(cfg.out, 'val')
    first = train.read(0)[1][0]
    assert first[2, 3] == .6 - ARENA and torch.equal(first[:3, :3], torch.eye(3))       # at the wall, looking in
    for clips, jumps in (train, [False, True] * 2), (val, [False] * 4):
        for i, jump in enumerate(jumps):
            c2w = clips.read(i)[1]
            far = (c2w[1:] - c2w[:-1])[:, :3, 3].norm(dim=1) > 1
            assert torch.equal(c2w[0], first) and far.tolist() == [jump] + [False] * 7
            assert starts_elsewhere(c2w[None]).tolist() == [jump]
    batch = get_batch(train, 0, 32, 3, dataclasses.replace(CFG, sink=True))
    z = torch.stack([train.read(i)[0][0].float() for i in range(4)])
    assert (batch.x0[:, :1] == z).flatten(2).all(2).any(1).all()
    elsewhere = (batch.camera.c2w[:, 1, :3, 3] - batch.camera.c2w[:, 0, :3, 3]).norm(dim=1) > 1
    still = (batch.camera.move[:, 1] == torch.eye(4)).all((1, 2))
    assert elsewhere.any() and 20 < still.sum()
    assert still[elsewhere].all()                                                       # such a first move says nothing


def test_make_is_all_or_nothing(data, tmp_path):
    recipe = json.load(open(f'{data}/manifest.json'))['recipe']
    stamp = os.stat(f'{data}/manifest.json').st_mtime_ns
    assert make(Config(**recipe, out=data)) == data                                     # there already
    with pytest.raises(BadInput, match='clips 12, not 13'):
        make(Config(**recipe | {'clips': 13}, out=data))
    assert os.stat(f'{data}/manifest.json').st_mtime_ns == stamp
    with pytest.raises(BadInput, match='choose one of'):
        make(Config(world='mars', out=str(tmp_path / 'x')))
    (tmp_path / 'file').write_text('')
    with pytest.raises(BadInput, match='cannot be written'):
        make(Config(out=str(tmp_path / 'file' / 'x')))
    with pytest.raises(BadInput, match='multiples of 16'):
        make(Config(height=24, out=str(tmp_path / 'x')))
    assert os.listdir(tmp_path) == ['file']


def test_open_clips_makes_only_the_default_once_and_waits_for_it(data, tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr('data.make', lambda cfg: events.append(f'make {cfg.world}'))
    monkeypatch.chdir(tmp_path)
    for rank in (1, 0):
        run = types.SimpleNamespace(rank=rank, world=2, barrier=lambda: events.append('wait'))
        train, val = open_clips(types.SimpleNamespace(data=data), run)
        assert (train.split, val.split, len(train), len(val)) == ('train', 'val', 12, 4) and events == ['wait']
        events.clear()
        for name, made in (('data/lowpoly', ['make lowpoly', 'wait']), ('data/lowpolly', ['wait'])):
            with pytest.raises(BadInput, match=f'{name}: no clips there'):  # since this make makes nothing
                open_clips(types.SimpleNamespace(data=name), run)
            assert events == (made[-1:] if rank else made)
            events.clear()


def test_worlds_are_found_by_name():
    for name in WORLDS:
        assert find_world(name).__name__ == f'{name}_clips'


def test_doom_frames_and_poses():
    pytest.importorskip('vizdoom', reason='ViZDoom is an optional extra: pip install vizdoom')
    from worlds.doom import doom_clips
    d, captions = doom_clips(Config(world='doom', frames=9, height=48, width=64), 0, [0, 1, 2])
    assert d['frames'].shape == (3, 9, 48, 64, 3) and d['frames'].float().std() > 10
    assert captions == ['doom my_way_home'] * 3
    again = doom_clips(Config(world='doom', frames=9, height=48, width=64), 0, [1])[0]
    assert torch.equal(again['frames'][0], d['frames'][1]) and torch.equal(again['c2w'][0], d['c2w'][1])
    move = d['c2w'][:, :, :3, 3].diff(dim=1).norm(dim=-1)
    assert move.max() < 1 and (move > .01).float().mean() > .3
    with pytest.raises(BadInput, match='not a map'):
        doom_clips(Config(world='doom', map='nowhere'), 0, [0])


def test_every_seed_has_a_plan():
    """In plan 1560 the first things leave no room for the last one; it hung."""
    boxes, balls = make_plan(1560)
    assert boxes.shape == (6, 2, 3) and balls.shape == (5, 4)
    spots = np.concatenate([boxes[:, :, [0, 2]].mean(1), balls[:, [0, 2]]])
    assert (np.abs(spots[:, None] - spots[None]).max(-1) + 9 * np.eye(11)).min() > .7
