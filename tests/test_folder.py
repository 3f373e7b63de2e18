"""Your own videos: poses of three formats, crops with the right intrinsics; what is skipped is named and counted."""
import json

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from camera import BadInput, crop_intrinsics, invert, keys_to_poses, relative
from conftest import run
from data import Clips, Config, decode, psnr
from worlds.folder import (choose_videos, count_frames, find_videos, folder_clips, load_frames, load_poses,
                           minwm_poses)

KEYS, N = 'w*8,wl*8', 17
C2W = keys_to_poses(KEYS)


def realestate(path, c2w=C2W, K=(.6, .8, .5, .5)):
    rows = ['https://example.com/video']
    for i, pose in enumerate(c2w):
        w2c = invert(pose)[:3].double().flatten().tolist()
        rows.append(' '.join(map(str, [1000 * i, *K, 0, 0, *w2c])))
    path.write_text('\n'.join(rows) + '\n')


def gradient(n, h, w):
    """Frames whose colour says which frame and which place it is."""
    y, x = np.mgrid[:h, :w]
    frames = [np.stack([255 * x / w, 255 * y / h, np.full((h, w), 12. * i)], -1) for i in range(n)]
    return np.stack(frames).astype(np.uint8)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp('videos')
    frames = gradient(N, 64, 96)
    iio.imwrite(d / 'a.mp4', frames, fps=8, codec='libx264', macro_block_size=2, output_params=['-crf', '5'])
    realestate(d / 'a.txt')
    (d / 'b').mkdir()
    for i, x in enumerate(frames):
        iio.imwrite(d / 'b' / f'{i:03d}.png', x)
    K = [[960, 0, 960], [0, 810, 540], [0, 0, 1]]                             # of 1920 x 1080 pixels
    (d / 'b.json').write_text(json.dumps({str(i): {'extrinsic': p.tolist(), 'K': K} for i, p in enumerate(C2W)}))
    (d / 'b.caption').write_text('a grey room')
    return d


def test_three_formats_say_the_same(folder, tmp_path):
    (tmp_path / 'list.json').write_text(json.dumps(C2W.tolist()))
    for path, K in ((folder / 'a.txt', (.6, .8, .5, .5)), (folder / 'b.json', (.5, .75, .5, .5)),
                    (tmp_path / 'list.json', None)):
        c2w, got = load_poses(str(path))
        torch.testing.assert_close(c2w, C2W, rtol=0, atol=1e-5)
        assert got is None if K is None else torch.allclose(got, torch.tensor(K).expand(N, 4), atol=1e-6)


def test_frames_windows_and_crops(folder):
    """Of 96 x 64 the middle 64 x 64 is kept: the camera's focal length is then 1.5 times as wide, its centre stays."""
    assert count_frames(str(folder / 'a.mp4')) == count_frames(str(folder / 'b')) == N
    for name in ('a.mp4', 'b'):                                # the frames that are asked for, in that order
        blue = load_frames(str(folder / name), [5, 2, 5])[..., 2].mean((1, 2))
        assert np.abs(blue - [60, 24, 60]).max() < 4
    cfg = Config(world='folder', videos=str(folder), frames=5, stride=2, pose_scale=2.0, height=32, width=32)
    clips, captions = folder_clips(cfg, 0, range(6))
    K = crop_intrinsics(torch.tensor([.6, .8, .5, .5]), 1 / 6, 0, 2 / 3, 1)
    torch.testing.assert_close(clips['K'], K.expand(6, 4), rtol=0, atol=1e-6)
    assert clips['frames'].shape == (6, 5, 32, 32, 3) and captions == [''] * 6
    for frames, c2w in zip(clips['frames'].float(), clips['c2w']):
        first = round(frames[0, ..., 2].mean().item() / 12)
        shown = [round(x / 12) for x in frames[..., 2].mean((1, 2)).tolist()]
        assert shown == list(range(first, first + 10, 2))
        want = relative(C2W[None, first:first + 10:2])[0]
        want[:, :3, 3] *= 2
        torch.testing.assert_close(c2w, want, rtol=0, atol=1e-5)
        left, right = frames[0, :, 0, 0].mean(), frames[0, :, -1, 0].mean()
        assert abs(left - 255 * 16.5 / 96) < 4 and abs(right - 255 * 78.5 / 96) < 4
    held_out, captions = folder_clips(cfg, 1, range(2))
    assert captions == ['a grey room'] * 2 and held_out['K'][0, 0] == pytest.approx(.75)
    unknown = Config(**vars(cfg) | dict(pose_scale=-1.0, frames=17, stride=1))
    path = folder_clips(unknown, 0, [0])[0]['c2w'][0, :, :3, 3]
    assert path.diff(dim=0).norm(dim=1).mean() == pytest.approx(.15, abs=1e-4)


def test_every_tenth_video_and_the_last_is_held_out():
    assert choose_videos(list(range(23)), 1) == [9, 19, 22] and choose_videos(['a', 'b'], 1) == ['b']
    assert choose_videos(list(range(23)), 0) == [i for i in range(23) if i not in (9, 19, 22)]
    assert choose_videos(['a'], 0) == choose_videos(['a'], 1) == ['a']


def test_minwm_input_json(tmp_path):
    """A unit of its strings is a latent, so pose i is that of frame 4 i."""
    entries = [{'caption': 'a hall', 'pose_str': 'w-2, right-2'}, {'caption': 'gone', 'pose_str': 's-4'}]
    (tmp_path / 'input.json').write_text(json.dumps(entries))
    (tmp_path / 'videos/000000_w2right2').mkdir(parents=True)
    iio.imwrite(tmp_path / 'videos/000000_w2right2/gen.mp4', gradient(17, 32, 32), fps=16, codec='libx264')
    find_videos.cache_clear()
    cfg = Config(world='folder', videos=str(tmp_path / 'input.json'), frames=5, stride=4, pose_scale=1.0, height=32,
                 width=32)
    clips, captions = folder_clips(cfg, 0, [0])
    torch.testing.assert_close(clips['c2w'][0], minwm_poses('w*2,l*2'), rtol=0, atol=1e-6)
    assert captions == ['a hall'] and len(find_videos(cfg.videos, 17)[1]) == 1
    wrong = run('data.py', '--world', 'folder', '--videos', tmp_path / 'input.json', '--pose_scale', 1,
                '--out', tmp_path / 'x', ok=False)
    assert 'use --stride 4' in wrong


def test_what_does_not_fit_is_skipped_and_named(folder, tmp_path):
    frames = gradient(6, 16, 16)
    for name in ('short', 'few', 'bad', 'nan', 'none', 'line'):
        iio.imwrite(tmp_path / f'{name}.mp4', frames[:3] if name == 'short' else frames, fps=8, codec='libx264')
        realestate(tmp_path / f'{name}.txt', C2W[:4] if name == 'few' else C2W)
    (tmp_path / 'none.txt').unlink()
    text = (tmp_path / 'line.txt').read_text().splitlines()
    (tmp_path / 'line.txt').write_text('\n'.join(text[:3] + ['1 2 3'] + text[4:]))
    (tmp_path / 'bad.txt').unlink()
    (tmp_path / 'bad.json').write_text(json.dumps((C2W * 2).tolist()))
    nan = C2W.clone()
    nan[2, 0, 3] = torch.nan
    realestate(tmp_path / 'nan.txt', nan)
    (tmp_path / 'mixed').mkdir()
    for i in range(6):
        iio.imwrite(tmp_path / 'mixed' / f'{i}.png', gradient(1, 16, 16 + 16 * (i == 3))[0])
    realestate(tmp_path / 'mixed.txt', C2W)
    find_videos.cache_clear()
    good, bad = find_videos(str(tmp_path), 5)
    assert not good and len(bad) == 7
    for part in ('short.mp4: 3 frames, 5 are wanted', 'few.mp4: 6 frames, but 4 poses', 'bad.json: pose 0 is not',
                 'nan.txt: pose', 'none.json: not a list', 'line.txt, line 4: 3 numbers',
                 'mixed: its pictures are of different sizes'):
        assert any(part in b for b in bad), (part, bad)


def test_from_a_folder_to_a_training_step(folder, tmp_path):
    find_videos.cache_clear()
    world = 'data.py', '--world', 'folder'
    said = run(*world, '--videos', folder, '--pose_scale', 1, '--out', f'{tmp_path}/clips/', '--clips', 8,
               '--val_clips', 2, '--frames', 5, '--height', 32, '--width', 32)
    assert '2 videos, 0 skipped' in said
    clips = Clips(str(tmp_path / 'clips'), 'val', ('latents', 'frames'))
    z, frames = clips.read(0)
    assert psnr(decode(z.float()), frames.float() / 255).min() > 25
    said = run('finetune_camera.py', '--camera', 'none', '--steps', 1, '--frames', 5, '--batch', 2,
               '--data', tmp_path / 'clips', '--out', tmp_path / 'out')
    assert 'base.safetensors' in said
    wrong = run(*world, '--videos', folder, '--out', tmp_path / 'more', ok=False)
    assert 'what a unit of the poses is' in wrong
    wrong = run(*world, '--videos', tmp_path / 'nowhere', '--pose_scale', 1, '--out', tmp_path / 'more', ok=False)
    assert 'no video with a pose for every frame' in wrong
    for text in ('{', '[{"caption": "a"}]', '[1]'):
        (tmp_path / 'input.json').write_text(text)
        with pytest.raises(BadInput, match='input.json: not a list of'):
            find_videos.cache_clear()
            find_videos(str(tmp_path / 'input.json'), 5)


def test_load_poses_refuses(tmp_path):
    mirror = torch.diag(torch.tensor([-1., 1, 1, 1])).tolist()
    for name, text, why in (('a.json', '[1, 2]', 'shape'), ('e.txt', 'title', 'shape'),
                            ('b.json', '{"0": {}}', 'nor minWM'), ('c.txt', 'title\nx ' + '0 ' * 18, 'RealEstate10K'),
                            ('d.json', json.dumps([torch.eye(4).tolist(), mirror]), 'pose 1 is not a rotation')):
        (tmp_path / name).write_text(text)
        with pytest.raises(BadInput, match=why):
            load_poses(str(tmp_path / name))


def test_odd_sizes(tmp_path):
    """Pictures of any size do, the clips' own must be a multiple of 16; the intrinsics know of the crop, to a pixel."""
    (tmp_path / 'a').mkdir()
    for i, x in enumerate(gradient(5, 33, 47)):
        iio.imwrite(tmp_path / 'a' / f'{i}.png', x[..., 0] if i == 2 else x)      # a grey one among them
    realestate(tmp_path / 'a.txt', C2W[:5])
    find_videos.cache_clear()
    cfg = Config(world='folder', videos=str(tmp_path), frames=5, pose_scale=1.0, height=32, width=32)
    clips, _ = folder_clips(cfg, 0, [0])
    assert clips['frames'].shape == (1, 5, 32, 32, 3)
    K = crop_intrinsics(torch.tensor([.6, .8, .5, .5]), 7 / 47, 0, 33 / 47, 1)
    torch.testing.assert_close(clips['K'][0], K, rtol=0, atol=1e-6)
    wrong = run('data.py', '--world', 'folder', '--videos', tmp_path, '--pose_scale', 1, '--height', 40,
                '--out', tmp_path / 'x', ok=False)
    assert 'height and width multiples of 16' in wrong
