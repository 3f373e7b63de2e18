"""Camera conventions: signs worked by hand, round trips, errors against closed forms."""
import math

import pytest
import torch

from camera import (KEYS, METRES, BadInput, Camera, crop_intrinsics, intrinsics, invert, keys_to_poses, make_pose,
                    moves, parse_keys, plucker, pose_error, rays, relative, starts_elsewhere)
from worlds.poses import poses_to_keys


def random_poses(*shape):
    g = torch.Generator().manual_seed(0)
    rand = lambda *s: torch.rand(*shape, *s, generator=g, dtype=torch.float64)
    return make_pose(rand(3) * 4 - 2, rand() * 360 - 180, rand() * 60 - 30)


def test_the_docstrings_worked_example():
    pose = keys_to_poses('l*9,w*4')[-1]
    torch.testing.assert_close(pose[:3, 3], torch.tensor([1., 0., 0.]), rtol=0, atol=1e-6)
    torch.testing.assert_close(pose[:3, :3] @ torch.tensor([0., 0., 1.]), torch.tensor([1., 0., 0.]), rtol=0, atol=1e-6)


@pytest.mark.parametrize('key, position, forward', [
    ('w', (0, 0, .25), (0, 0, 1)), ('s', (0, 0, -.25), (0, 0, 1)), ('d', (.25, 0, 0), (0, 0, 1)),
    ('a', (-.25, 0, 0), (0, 0, 1)), ('u', (0, -.25, 0), (0, 0, 1)), ('o', (0, .25, 0), (0, 0, 1)),
    ('dn', (0, .25, 0), (0, 0, 1)), ('l', (0, 0, 0), (math.sin(math.pi / 18), 0, math.cos(math.pi / 18))),
    ('j', (0, 0, 0), (-math.sin(math.pi / 18), 0, math.cos(math.pi / 18))),
    ('i', (0, 0, 0), (0, -math.sin(math.pi / 18), math.cos(math.pi / 18))),
    ('k', (0, 0, 0), (0, math.sin(math.pi / 18), math.cos(math.pi / 18)))])
def test_every_key_by_hand(key, position, forward):
    pose = keys_to_poses(key)[1]
    torch.testing.assert_close(pose[:3, 3], torch.tensor(position, dtype=torch.float32), rtol=0, atol=1e-6)
    torch.testing.assert_close(pose[:3, 2], torch.tensor(forward, dtype=torch.float32), rtol=0, atol=1e-6)


def test_yaw_is_about_the_worlds_up_and_pitch_is_clamped():
    poses = keys_to_poses('i*9,l*9')
    assert math.degrees(math.asin(-poses[-1, 1, 2])) == pytest.approx(30, abs=1e-4)
    torch.testing.assert_close(poses[-1, :3, 0], torch.tensor([0., 0., -1.]), rtol=0, atol=1e-6)   # right stays level
    torch.testing.assert_close(keys_to_poses('i*3,w*4')[-1, :3, 3], torch.tensor([0., 0., 1.]), rtol=0, atol=1e-6)


def test_poses_are_rigid_and_relative_undoes_a_move():
    c2w = random_poses(3, 5)
    eye = torch.eye(4, dtype=torch.float64).expand(3, 5, 4, 4)
    torch.testing.assert_close(c2w @ invert(c2w), eye, rtol=0, atol=1e-12)
    assert torch.allclose(torch.linalg.det(c2w[..., :3, :3]), torch.ones(3, 5, dtype=torch.float64))
    rel = relative(c2w)
    torch.testing.assert_close(rel[:, 0], eye[:, 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(c2w[:, :1] @ rel, c2w, rtol=0, atol=1e-12)
    torch.testing.assert_close(relative(random_poses(1)[0] @ c2w), rel, rtol=0, atol=1e-12)            # any world frame


def test_keys_round_trip():
    text = 'w*3,wl*2,*1,dj*4,i*1,o*2,sk*1'
    keys = parse_keys(text)
    assert len(keys) == 14 and keys[3] == 'wl' and keys[5] == ''
    assert [set(k) for k in poses_to_keys(keys_to_poses(text))] == [set(k) for k in keys]
    assert parse_keys('dn*3,u*2,s*4,d*5,k*5')[:3] == ['o'] * 3                                     # minWM's own
    for k in KEYS:
        assert poses_to_keys(keys_to_poses(k)) == [k]


@pytest.mark.parametrize('text, same', [
    ('w-8, right-11', 'w*8,l*11'), ('up-2,down-3, left-1', 'i*2,k*3,j'), ('wright-2,upleft-1', 'wl*2,ij'),
    ('w*2,', 'w*2'), ('w-2, right-2, ', 'w*2,l*2'), ('w-2.0,a-3.7,s*4.', 'w*2,a*3,s*4'), ('w - 2 , d -1', 'w*2,d'),
])
def test_strings_of_minwm_mean_what_they_mean_there(text, same):
    assert parse_keys(text) == parse_keys(same)


@pytest.mark.parametrize('text', ['', ',', 'w*', 'q*3', 'w*3,,l*2', 'w-8,,', 'w3', 'w*-1', 'w--1', 'w*2 l*3', 'W*2',
                                  'wp-2', 'w*.5', 'w*1e3', 'w*10000000', 'w*' + '9' * 5000])
def test_malformed_keys_name_the_group(text):
    with pytest.raises(BadInput, match='group'):
        parse_keys(text)


def test_pose_error_gives_back_what_was_done():
    a = random_poses(20)
    zero = torch.zeros(20, 3, dtype=torch.float64)
    turned = a @ make_pose(zero, torch.full((20,), 10., dtype=torch.float64), zero[:, 0])
    moved = a.clone()
    moved[:, 0, 3] += .5
    rot, trans = pose_error(a, turned)
    assert torch.allclose(rot, torch.full_like(rot, 10)) and trans.max() == 0
    rot, trans = pose_error(a, moved)
    assert rot.max() == 0 and torch.allclose(trans, torch.full_like(trans, .5))
    tiny = a @ make_pose(zero, torch.full((20,), 1e-5, dtype=torch.float64), zero[:, 0])
    assert torch.allclose(pose_error(a, tiny)[0], torch.full((20,), 1e-5, dtype=torch.float64), rtol=1e-3)


def test_rays_project_back_and_intrinsics_survive_crops():
    K = intrinsics(90, 4 / 3)
    torch.testing.assert_close(K, torch.tensor([.5, 2 / 3, .5, .5]))
    c2w = random_poses(2, 3).float()
    o, d = rays(c2w, K.expand(2, 3, 4), 6, 8)
    assert torch.allclose(d.norm(dim=-1), torch.ones(2, 3, 6, 8), atol=1e-6)
    p = torch.einsum('bfij,bfhwj->bfhwi', invert(c2w)[..., :3, :3], d * 3)
    x, y = (p[..., 0] / p[..., 2] * K[0] + K[2]) * 8, (p[..., 1] / p[..., 2] * K[1] + K[3]) * 6
    torch.testing.assert_close(x, (torch.arange(8) + .5).expand_as(x), rtol=0, atol=1e-4)
    torch.testing.assert_close(y, (torch.arange(6) + .5)[:, None].expand_as(y), rtol=0, atol=1e-4)
    crop = crop_intrinsics(K, .25, .5, .5, .5)                                      # right columns 2:6, rows 3:
    torch.testing.assert_close(rays(c2w, crop.expand(2, 3, 4), 3, 4)[1], d[..., 3:, 2:6, :], rtol=0, atol=1e-6)


def test_pluecker_moment_is_the_same_from_any_point_of_the_ray():
    c2w, K = random_poses(2, 3).float(), intrinsics(90, 1).expand(2, 3, 4)
    m = plucker(c2w, K, 4, 4)
    o, d = rays(c2w, K, 4, 4)
    torch.testing.assert_close(m[:, :, :3].movedim(2, -1), d)
    point = o[:, :, None, None] + 7 * d
    torch.testing.assert_close(m[:, :, 3:].movedim(2, -1), torch.linalg.cross(point, d), rtol=0, atol=1e-5)
    identity = plucker(torch.eye(4).expand(1, 1, 4, 4), K[:1, :1], 4, 4)
    assert (identity[:, :, 3:] == 0).all()


def test_moves_compose_to_the_path():
    path = keys_to_poses('w*2,wl*3,di*2')[None]
    move = moves(path)
    assert torch.equal(move[0, 0], torch.eye(4)) and move[0, 1, 2, 3] == METRES
    at = path[:, 0]
    for i in range(1, path.shape[1]):
        at = at @ move[:, i]
        assert torch.allclose(at, path[:, i], atol=1e-6)
    assert torch.allclose(moves(path[:, 3:], path[:, 2:3]), move[:, 3:], atol=1e-6)   # a slice, given what was before
    twice, no_yes = path.expand(2, -1, -1, -1), torch.tensor([False, True])
    for first, before in (0, None), (3, twice[:, 2:3]):       # the first move of clip 1 leads elsewhere
        both, i = moves(twice[:, first:], before, no_yes), 0 if first else 1
        assert torch.equal(both[0], moves(path[:, first:], before if before is None else before[:1])[0])
        assert torch.equal(both[1, i], torch.eye(4)) and torch.equal(both[1, i + 1:], both[0, i + 1:])
    far = path.clone()
    far[:, 1:, :3, 3] += 5
    assert starts_elsewhere(torch.cat([path, far, path[:, :1].expand_as(path)])).tolist() == [False, True, False]


def test_a_cameras_frames_keep_their_moves_and_join_again():
    path, K = keys_to_poses('w*2,wl*3,di*2').expand(2, -1, -1, -1), intrinsics(90, 1).expand(2, 8, 4)
    camera = Camera(path, K, torch.tensor([True, False]))
    assert torch.equal(camera.move, moves(path))
    part = camera.frames(slice(3, None))
    assert torch.equal(part.c2w, path[:, 3:]) and torch.equal(part.K, K[:, 3:]) and part.on is camera.on
    assert torch.equal(part.move, camera.move[:, 3:]) and not torch.equal(part.move, moves(path[:, 3:]))
    joined = Camera.cat([camera.frames([0, 1, 2]), part])
    assert torch.equal(joined.c2w, path) and torch.equal(joined.move, camera.move) and joined.on is camera.on
    batch = Camera.cat([camera, Camera(path, K)], 0)
    assert batch.on.tolist() == [True, False, True, True] and len(batch.c2w) == len(batch.move) == len(batch.K) == 4


def test_of_two_frames_nobody_can_say_whether_they_jump():
    far = torch.eye(4).repeat(1, 3, 1, 1)
    far[:, 1:, 0, 3] = 9
    assert starts_elsewhere(far).all()
    assert not starts_elsewhere(far[:, :2]).any() and not starts_elsewhere(far[:, :1]).any()
