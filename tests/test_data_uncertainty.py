"""Clips with wrong poses: the distance by loops, the tool on a folder, the experiment's parts by hand."""
import json
import os
from unittest import mock

import numpy as np
import torch

import papers.data_uncertainty as doubt
from camera import keys_to_poses
from common import find_preset, load_tensors, save_model, save_tensors
from conftest import SMALL, run
from data import Clips, Config, make
from experiments import wrong_poses


def test_change_features_are_cosines_of_the_change_and_the_gradient():
    """Against loops in numpy; and a picture that moves to the right has a negative one across, none down."""
    z = np.random.default_rng(0).standard_normal((2, 3, 4, 8, 8))
    got = doubt.change_features(torch.tensor(z)).view(2, 2, 2, 4, 2, 2)          # clip, move, axis, channel, quarter
    for i, f, axis, c, a, b in np.ndindex(2, 2, 2, 4, 2, 2):
        here = np.s_[4 * a:4 * a + 4, 4 * b:4 * b + 4]
        change = (z[i, f + 1, c] - z[i, f, c])[here]
        slope = np.gradient((z[i, f + 1, c] + z[i, f, c]) / 2, axis=axis)[here]
        want = (change * slope).sum() / np.sqrt((change ** 2).sum() * (slope ** 2).sum())
        assert abs(got[i, f, axis, c, a, b].item() - want) < 1e-9
    ramp = torch.arange(8.).expand(1, 1, 1, 8, 8)
    down, across = doubt.change_features(torch.cat([ramp, ramp - .5], 1)).view(2, 4)
    assert (across < -.999).all() and not down.any()


def test_mahalanobis_distance_against_loops():
    rng = np.random.default_rng(0)
    x, kind = rng.standard_normal((60, 5)) @ rng.standard_normal((5, 5)), rng.integers(0, 3, 60)
    kind[kind == 1] = 3                                                          # a kind without members
    mean = {k: x[kind == k].mean(0) for k in set(kind.tolist())}
    rest = np.array([row - mean[k] for row, k in zip(x, kind.tolist())])
    covariance = sum(np.outer(r, r) for r in rest) / 60
    covariance += .1 * np.trace(covariance) / 5 * np.eye(5)
    want = [r @ np.linalg.solve(covariance, r) for r in rest]
    np.testing.assert_allclose(doubt.mahalanobis(torch.tensor(x), torch.tensor(kind)).numpy(), want, rtol=1e-6)


def test_moves_of_one_key_are_one_kind():
    """And a vector says metres and turns by their signs: l turns right, i looks up, d steps right."""
    c2w = torch.stack([keys_to_poses(f'{key}*20') for key in 'w s a d j l i'.split()])
    vectors = doubt.move_vectors(c2w).view(7, 20, 5)
    w, s, a, d, j, l, i = vectors[:, 0]
    assert w[2] > 0 > s[2] and d[0] > 0 > a[0] and l[3] > 0 > j[3] and i[4] < 0
    for part in (vectors[..., :3], vectors[..., 3:]):
        assert abs(part.square().sum(-1).mean() - 1) < 1e-9
    kinds = doubt.kinds_of_move(c2w[:6].repeat_interleave(10, 0), most=32).view(6, -1)
    members = [set(row.tolist()) for row in kinds]
    assert sum(map(len, members)) == len(set.union(*members)) <= 32
    speeds = np.random.default_rng(0).uniform(.1, 9, (40, 2))
    c2w = torch.stack([keys_to_poses('w*5,wl*5,j*5,d*5', *speed) for speed in speeds])
    vectors, kind = doubt.move_vectors(c2w), doubt.kinds_of_move(c2w, most=5)
    nearest = torch.cdist(vectors, doubt.means(vectors, kind, 5)).argmin(1)
    assert (nearest == kind).double().mean() > .99


def waves(paths, seed=0):
    """Clips (n, F, 4, 8, 8) of smooth patterns that pass by as their paths turn."""
    rng = np.random.default_rng(seed)
    frequency, phase = rng.uniform(.3, .7, (2, len(paths), 1, 4, 1, 1)) * [[[[[[1]]]]], [[[[[9]]]]]]
    yaw = torch.atan2(paths[..., 0, 2], paths[..., 2, 2]).double()[..., None, None, None]
    x = torch.arange(8.).double() + 3 * yaw
    return torch.sin(x * torch.tensor(frequency) + torch.tensor(phase)).expand(-1, -1, -1, 8, -1)


def test_wrong_poses_are_suspicious():
    """The relative distance ranks the clips with a wrong path first. It is the mean over the moves of a clip."""
    c2w = torch.stack([keys_to_poses(f'{"jl"[i % 2]}*8') for i in range(60)])
    latents, poses = waves(c2w), c2w.clone()
    poses[[7, 20, 33]] = c2w[[8, 21, 34]]
    score, plain = doubt.suspicion(latents, poses)
    assert score.shape == plain.shape == (60,)
    assert set(score.topk(3).indices.tolist()) == {7, 20, 33}
    features = doubt.change_features(latents)
    to_any_kind = doubt.mahalanobis(features, torch.zeros(480, dtype=torch.long))
    torch.testing.assert_close(plain - score, to_any_kind.view(60, 8).mean(1))


def tensors_of(folder, split, key):
    clips = Clips(folder, split)
    return [clips.read(i, [key])[0] for i in range(len(clips))], clips.captions


def test_clips_without_some(data, tmp_path):
    """The chosen clips in their order with their poses, over shards; held-out ones and null_text as they were."""
    source = str(tmp_path / 'source')
    os.makedirs(source)
    manifest = Clips(data).manifest
    for shard in manifest['shards']:
        name = shard['file']
        tensors, header = load_tensors(f'{data}/{name}')
        tensors |= {'text': torch.randn(shard['clips'], 4, 8), 'null_text': torch.arange(5.)}
        save_tensors(f'{source}/{name}', tensors, header)
    with open(f'{source}/manifest.json', 'w') as f:
        json.dump(manifest, f)
    before = {name: os.stat(f'{source}/{name}').st_mtime_ns for name in os.listdir(source)}
    order = [i % 11 for i in range(3, 70)]                                       # more than a shard
    poses = torch.randn(12, 5, 4, 4)
    doubt.write_clips(source, order, poses, str(tmp_path / 'new'))
    for key in ('latents', 'K', 'plan', 'text'):
        old, captions = tensors_of(source, 'train', key)
        new, some = tensors_of(tmp_path / 'new', 'train', key)
        assert len(new) == len(order) and all(torch.equal(x, old[i]) for x, i in zip(new, order))
        assert some == [captions[i] for i in order]
    new, _ = tensors_of(tmp_path / 'new', 'train', 'c2w')
    assert all(torch.equal(x, poses[i]) for x, i in zip(new, order))
    for key in ('latents', 'frames', 'c2w'):
        assert all(map(torch.equal, tensors_of(source, 'val', key)[0], tensors_of(tmp_path / 'new', 'val', key)[0]))
    clips = Clips(tmp_path / 'new')
    assert clips.manifest['recipe'] == manifest['recipe'] | {'clips': 67}
    assert all(torch.equal(f.get_tensor('null_text'), torch.arange(5.)) for f, _ in clips.rows)
    assert before == {name: os.stat(f'{source}/{name}').st_mtime_ns for name in os.listdir(source)}
    assert sorted(os.listdir(tmp_path)) == ['new', 'source']


def test_the_tool(data, tmp_path):
    """It lists the most suspicious clips, and a stage trains on the rest."""
    tool = 'papers.data_uncertainty'
    text = run(tool, data, '--worst', 3, '--drop', .25, '--out', tmp_path / 'clean', cwd=tmp_path)
    listed = [int(line.split()[2]) for line in text.splitlines() if '  clip ' in line]
    score, _ = doubt.suspicion(*doubt.read_clips(Clips(data)))
    assert listed == score.argsort(descending=True)[:3].tolist() and '9 of the 12' in text
    assert os.path.exists(tmp_path / 'out/data_uncertainty/worst.png')
    _, captions = tensors_of(data, 'train', 'K')
    assert tensors_of(tmp_path / 'clean', 'train', 'K')[1] == [x for i, x in enumerate(captions) if i not in listed]
    run('finetune_camera.py', '--camera', 'none', '--preset', 'tiny', '--steps', 1, *SMALL,
        '--data', tmp_path / 'clean', '--out', tmp_path / 'out')
    for args, word in ((['nothing'], 'no clips'), ([data, '--drop', .1], 'together'),
                       ([data, '--drop', 1, '--out', 'x'], 'share'),
                       ([data, '--drop', .1, '--out', tmp_path / 'clean'], 'already')):
        assert word in run(tool, *args, ok=False, cwd=tmp_path)


def test_clips_that_hold_no_numbers_are_refused(data):
    class Broken(Clips):
        def read(self, i, keys=None):
            latents, c2w = super().read(i, keys)
            if i < 4:
                return latents, c2w
            return (latents[:1], c2w) if self.broken == 'short' else (latents, c2w * float('nan'))

    for broken in ('short', 'nan'):
        clips = Broken(data)
        clips.broken = broken
        with np.testing.assert_raises_regex(ValueError, 'clip 4 '):
            doubt.read_clips(clips)


def test_spoilt_poses():
    """A twentieth with another clip's path, a twentieth mirrored: x and yaw change sign."""
    c2w = torch.stack([keys_to_poses(f'wd*{i % 5 + 1},jk*{8 - i % 5}', .01 * i) for i in range(200)])
    poses, wrong = wrong_poses.spoil(c2w, 3)
    assert [(wrong == kind).sum() for kind in (0, 1, 2)] == [180, 10, 10]
    assert torch.equal(poses[wrong == 0], c2w[wrong == 0])
    for i in (wrong == 1).nonzero().flatten().tolist():
        assert [j for j in range(200) if torch.equal(poses[i], c2w[j])] != [i]
        assert wrong[[j for j in range(200) if torch.equal(poses[i], c2w[j])]].max() == 1
    old, new = (doubt.move_vectors(x[wrong == 2]) for x in (c2w, poses))
    torch.testing.assert_close(new, old * torch.tensor([-1, 1, 1, -1, 1]).double())
    assert not torch.equal(wrong_poses.spoil(c2w, 4)[1], wrong)


def test_ways_to_use_suspicious_clips():
    score, rng = torch.arange(100.).roll(30), np.random.default_rng(0)
    worst = score.numpy() >= 90
    use = {way: wrong_poses.how_often(way, score, rng) for way in wrong_poses.WAYS}
    assert all(use['clean'] == 1) and all(use['untouched'] == 1) and all((use['filtered'] == 0) == worst)
    assert (use['random'] == 0).sum() == 10 and (use['random'] == 0)[worst].sum() < 6
    np.testing.assert_allclose(use['weighted'], np.minimum(1, (99 - score.numpy()) / 20))


def test_a_filtered_run_sees_the_other_clips_in_their_places(tmp_path, monkeypatch):
    """What was left out is replaced by clips that are used; the clean way has the true poses."""
    folder = make(Config(out=str(tmp_path / 'data'), plans=5, clips=40, val_clips=1, frames=5, height=16, width=16))
    monkeypatch.setattr(wrong_poses, 'DATA', folder)
    monkeypatch.setattr(wrong_poses, 'OUT', str(tmp_path / 'out'))
    monkeypatch.setattr(wrong_poses, 'WRONG', .5)
    latents, c2w = doubt.read_clips(Clips(folder))
    poses, wrong = wrong_poses.spoil(c2w, 0)
    monkeypatch.setattr(wrong_poses, 'suspicion', lambda *_: (wrong + torch.arange(40) / 100, None))
    seen = []
    with mock.patch('finetune_camera.main', lambda cfg: seen.append(tensors_of(cfg.data, 'train', 'c2w')[0])):
        for way in ('clean', 'untouched', 'filtered'):
            wrong_poses.train(way, 0, latents, c2w)
    clean, untouched, filtered = map(torch.stack, seen)
    assert torch.equal(clean, c2w) and torch.equal(untouched, poses)
    assert torch.equal(filtered[wrong == 0], c2w[wrong == 0])
    assert all(any(torch.equal(x, y) for y in c2w[wrong == 0]) for x in filtered[wrong > 0])


def test_losses_with_and_without_camera(tmp_path, monkeypatch):
    """The same noise and time: no excess while the camera's weights are zero; then that of a clip is its own."""
    folder = make(Config(out=str(tmp_path / 'data'), plans=5, clips=3, val_clips=1, frames=11, height=16, width=16))
    monkeypatch.setattr(wrong_poses, 'DATA', folder)
    torch.manual_seed(0)
    model = find_preset('tiny').build()
    for p in model.head.parameters():
        torch.nn.init.normal_(p, std=.1)
    save_model(tmp_path / 'a.safetensors', model.state_dict(), model.cfg)
    _, c2w = doubt.read_clips(Clips(folder))
    loss, excess = wrong_poses.losses(tmp_path / 'a.safetensors', c2w)
    assert loss.shape == (3,) and not excess.any()
    clips = Clips(folder)
    x0 = clips.read(2)[0][None, :9].float()
    eps = torch.from_numpy(np.random.default_rng([0, 10, 2]).standard_normal((1, 9, 16, 2, 2), dtype=np.float32))
    t = torch.full((1, 9), .5 * model.cfg.shift / (.5 + .5 * model.cfg.shift))
    t[:, 0] = 0
    x_t = x0 + t[..., None, None, None] * (eps - x0)
    with torch.no_grad():
        v = model(x_t, t, clips.codec().embed(clips.captions[2:], model.cfg), None)
    torch.testing.assert_close(loss[2], (v - eps + x0)[:, 1:].square().mean())
    for name, p in model.named_parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=.5)
    save_model(tmp_path / 'a.safetensors', model.state_dict(), model.cfg)
    _, excess = wrong_poses.losses(tmp_path / 'a.safetensors', c2w)
    poses = c2w.clone()
    poses[1] = c2w[2]
    _, other = wrong_poses.losses(tmp_path / 'a.safetensors', poses)
    assert excess.abs().min() > 1e-4 and ((other - excess).abs() > 1e-4).tolist() == [False, True, False]


def test_how_a_score_is_judged():
    """Ten clips, of which the worst goes, by hand."""
    score = torch.tensor([5., 1, 2, 9, 8, 0, 3, 4, 6, 7])
    wrong = torch.tensor([0, 0, 0, 0, 2, 0, 1, 0, 0, 0])
    hard = {'fast': torch.arange(10) < 5, 'bare': torch.arange(10) < 3}
    row = wrong_poses.judge(score, wrong, hard)
    assert list(row.values()) == [3 / 8, 7 / 8, 0, 1 / 8, 1 / 4, 0]
