"""The pose measure is itself measured: the truth, known errors, noise. And the other scores against closed forms."""
import math

import pytest
import torch

from camera import make_pose, pose_error
from data import Config, Lowpoly, frechet, lowpoly_clips
from stream import locate, seen_mask

N, F = 6, 5


@pytest.fixture(scope='module')
def scene():
    d, _ = lowpoly_clips(Config(frames=F), 1, range(N))
    world = Lowpoly(d['plan'].tolist(), d['palette'].tolist())
    truth = pose_error(*found(world, d, d['frames'].float() / 255))
    lost = (truth[0] > 2) | (truth[1] > .15)
    return world, d, truth, lost


def found(world, d, pictures):
    worlds = [Lowpoly([plan], [palette]) for plan, palette in zip(d['plan'].tolist(), d['palette'].tolist())]
    return torch.stack([locate(*x) for x in zip(worlds, pictures, [torch.arange(F)] * N, d['c2w'][:, 0], d['K'])]), d['c2w']


def median(x, lost):
    return x[~lost].median().item()


def render(world, d, c2w):
    return world.render(c2w, d['K'][:, None].expand(-1, F, -1))[0]


def test_the_truth_is_found(scene):
    _, _, (rot, trans), lost = scene
    assert lost.float().mean() < .3
    assert median(rot, torch.zeros_like(lost)) < 1 and median(trans, torch.zeros_like(lost)) < .05


def test_a_turned_and_a_moved_path_give_their_error_back(scene):
    world, d, _, lost = scene
    turned = d['c2w'] @ make_pose(torch.zeros(3), torch.tensor(10.), torch.tensor(0.))
    rot, trans = pose_error(*found(world, d, render(world, d, turned)))
    assert abs(median(rot, lost) - 10) < 1 and median(trans, lost) < .1
    moved = d['c2w'].clone()
    moved[:, :, 0, 3] += .5
    rot, trans = pose_error(*found(world, d, render(world, d, moved)))
    assert abs(median(trans, lost) - .5) < .05 and median(rot, lost) < 1.5


def test_what_was_made_up_does_not_pull(scene):
    """A quarter of the picture is of another world."""
    world, d, _, lost = scene
    pictures = d['frames'].float() / 255
    pictures[:, :, :, 48:] = pictures.roll(1, 0)[:, :, :, 48:]
    rot, trans = pose_error(*found(world, d, pictures))
    assert median(rot, lost) < 1 and median(trans, lost) < .05


def test_noise_does_not_look_good(scene):
    world, d, _, lost = scene
    rot, trans = pose_error(*found(world, d, torch.rand(N, F, 64, 64, 3, generator=torch.Generator().manual_seed(0))))
    assert median(rot, lost) > 15 and median(trans, lost) > .3


def test_seen_mask_is_frame_0s_view(scene):
    world, d, _, _ = scene
    K = d['K'][:, None].expand(-1, 2, -1)
    still = d['c2w'][:, :1].expand(-1, 2, -1, -1)
    assert seen_mask(world.render(still, K, edges=0)[1], still, d['K'])[:, 1].float().mean() > .98
    turn = still.clone()
    turn[:, 1] = turn[:, 1] @ make_pose(torch.zeros(3), torch.tensor(100.), torch.tensor(0.))       # beyond the view of 90
    assert seen_mask(world.render(turn, K, edges=0)[1], turn, d['K'])[:, 1].float().mean() < .01
    half = still.clone()
    half[:, 1] = half[:, 1] @ make_pose(torch.zeros(3), torch.tensor(45.), torch.tensor(0.))
    assert abs(seen_mask(world.render(half, K, edges=0)[1], half, d['K'])[:, 1].float().mean() - .5) < .06


def test_frechet_distance_is_zero_on_itself_and_grows():
    g = torch.Generator().manual_seed(0)
    a = torch.rand(200, 16, 16, 3, generator=g)
    assert abs(frechet(a, a)) < 1e-6
    assert math.isnan(frechet(a, a * torch.nan))              # and no crash
    shifted = frechet(a, a + .1)                              # features: 3 x 16 means move by 0.1, the rest stays
    assert shifted == pytest.approx(48 * .01, rel=1e-3)
    assert frechet(a, torch.rand(200, 16, 16, 3, generator=g)) < shifted
