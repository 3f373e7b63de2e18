"""The pose measure is itself measured: the truth, known errors, noise. And the other scores against closed forms."""
import math

import pytest
import torch

from camera import make_pose, pose_error
from data import Config, Lowpoly, lowpoly_clips
from distill_dmd import frechet
from experiments.score import locate, visible_mask

N, F = 6, 5


@pytest.fixture(scope='module')
def scene():
    d, _ = lowpoly_clips(Config(frames=F), 1, range(N))
    world = Lowpoly(d['plan'].tolist(), d['palette'].tolist())
    truth = pose_error(*found(d, d['frames'].float() / 255))
    lost = (truth[0] > 2) | (truth[1] > .15)
    return world, d, truth, lost


def found(d, pictures):
    """(The poses found in pictures (N, F, H, W, 3), the true ones)."""
    poses = []
    for i in range(N):
        lowpoly = Lowpoly([int(d['plan'][i])], [int(d['palette'][i])])
        poses.append(locate(lowpoly, pictures[i], torch.arange(F), d['c2w'][i, 0], d['K'][i]))
    return torch.stack(poses), d['c2w']


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
    rot, trans = pose_error(*found(d, render(world, d, turned)))
    assert abs(median(rot, lost) - 10) < 1 and median(trans, lost) < .1
    moved = d['c2w'].clone()
    moved[:, :, 0, 3] += .5
    rot, trans = pose_error(*found(d, render(world, d, moved)))
    assert abs(median(trans, lost) - .5) < .05 and median(rot, lost) < 1.5


def test_what_was_made_up_does_not_pull(scene):
    """A quarter of the picture is of another world."""
    world, d, _, lost = scene
    pictures = d['frames'].float() / 255
    pictures[:, :, :, 48:] = pictures.roll(1, 0)[:, :, :, 48:]
    rot, trans = pose_error(*found(d, pictures))
    assert median(rot, lost) < 1 and median(trans, lost) < .05


def test_noise_does_not_look_good(scene):
    world, d, _, lost = scene
    noise = torch.rand(N, F, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    rot, trans = pose_error(*found(d, noise))
    assert median(rot, lost) > 15 and median(trans, lost) > .3


def test_visible_mask_is_frame_0s_view(scene):
    world, d, _, _ = scene
    K = d['K'][:, None].expand(-1, 2, -1)
    still = d['c2w'][:, :1].expand(-1, 2, -1, -1)

    def share(degrees):
        """How much of frame 1 frame 0 saw, when the camera has turned by so much."""
        c2w = still.clone()
        c2w[:, 1] = c2w[:, 1] @ make_pose(torch.zeros(3), torch.tensor(degrees), torch.tensor(0.))
        _, depth = world.render(c2w, K, edges=0)
        return visible_mask(depth, c2w, d['K'])[:, 1].float().mean()

    assert share(0.) > .98
    assert share(100.) < .01                                  # beyond the view of 90
    assert abs(share(45.) - .5) < .06


def test_frechet_distance_is_zero_on_itself_and_grows():
    g = torch.Generator().manual_seed(0)
    a = torch.rand(200, 16, 16, 3, generator=g)
    assert abs(frechet(a, a)) < 1e-6
    assert math.isnan(frechet(a, a * torch.nan))              # and no crash
    shifted = frechet(a, a + .1)                              # features: 3 x 16 means move by 0.1, the rest stays
    assert shifted == pytest.approx(48 * .01, rel=1e-3)
    assert frechet(a, torch.rand(200, 16, 16, 3, generator=g)) < shifted
