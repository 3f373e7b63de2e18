"""Your own videos: poses of every format, crops with the right intrinsics; what is skipped is named and counted."""
import json
import math
import subprocess

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from imageio_ffmpeg import get_ffmpeg_exe

import worlds.folder
from camera import BadInput, crop_intrinsics, invert, keys_to_poses, make_pose, relative
from common import gate
from conftest import run
from data import Clips, Config, decode, psnr
from worlds.folder import (check, choose_videos, every_frame, find_videos, folder_clips, list_pictures, load_frames,
                           scan)
from worlds.poses import Poses, doubts, match_frames, minwm_keys, minwm_poses, normalise, read_poses

KEYS, N = 'w*8,wl*8', 17
C2W = keys_to_poses(KEYS)


def realestate(path, c2w=C2W, K=(.6, .8, .5, .5), rate=8, title='https://example.com/video\n'):
    """Write poses as RealEstate10K has them, `rate` a second."""
    rows = []
    for i, pose in enumerate(c2w):
        w2c = invert(pose)[:3].double().flatten().tolist()
        rows.append(' '.join(map(str, [10 ** 6 * i // rate, *K, 0, 0, *w2c])))
    path.write_text(title + '\n'.join(rows) + '\n')


def gradient(n, h, w):
    """Frames whose colour says which frame and which place it is."""
    y, x = np.mgrid[:h, :w]
    frames = [np.stack([255 * x / w, 255 * y / h, np.full((h, w), 12. * i)], -1) for i in range(n)]
    return np.stack(frames).astype(np.uint8)


def write_mp4(path, frames, fps=8):
    iio.imwrite(path, frames, plugin='FFMPEG', fps=fps, codec='libx264', macro_block_size=2,
                output_params=['-crf', '5'])


def shown(path, indices):
    """The numbers that `gradient` has painted on the frames of a video."""
    return (load_frames(str(path), indices)[..., 2].mean((1, 2)) / 12).round().astype(int).tolist()


def encode(path, frames, *options):
    """A video by ffmpeg itself, 8 frames a second."""
    n, h, w, _ = frames.shape
    raw = ['-f', 'rawvideo', '-pix_fmt', 'rgb24', '-s', f'{w}x{h}', '-r', '8', '-i', '-']
    subprocess.run([get_ffmpeg_exe(), '-v', 'error', *raw, *options, str(path)], input=frames.tobytes(), check=True)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp('videos')
    frames = gradient(N, 64, 96)
    write_mp4(d / 'a.mp4', frames)
    realestate(d / 'a.txt')
    (d / 'b').mkdir()
    for i, x in enumerate(frames):
        iio.imwrite(d / 'b' / f'{i:03d}.png', x)
    K = [[960, 0, 960], [0, 810, 540], [0, 0, 1]]                             # of 1920 x 1080 pixels
    (d / 'b.json').write_text(json.dumps({str(i): {'extrinsic': p.tolist(), 'K': K} for i, p in enumerate(C2W)}))
    (d / 'b.caption').write_text('a grey room')
    return d

# -----------------------------------------------------------------------------
# poses

def transforms(path, c2w=C2W, **camera):
    """Write poses as nerfstudio and Blender do: in OpenGL's axes, out of order."""
    frames = [{'file_path': f'images/{i}.png', 'transform_matrix': (pose * torch.tensor([1., -1, -1, 1])).tolist()}
              for i, pose in enumerate(c2w)]
    path.write_text(json.dumps({**camera, 'frames': frames[::-1]}))


def test_all_formats_say_the_same(folder, tmp_path):
    normal = torch.tensor((.6, .8, .5, .5))
    (tmp_path / 'list.json').write_text(json.dumps(C2W.tolist()))
    (tmp_path / 'short.json').write_text(json.dumps(C2W[:, :3].tolist()))
    (tmp_path / 'kitti.txt').write_text('\n'.join(' '.join(map(str, p[:3].flatten().tolist())) for p in C2W))
    realestate(tmp_path / 'untitled.txt', title='')
    realestate(tmp_path / 'blank.txt', title='\ufeff\n\nhttps://example.com/video\n\n')
    text = (tmp_path / 'blank.txt').read_text(encoding='utf-8')
    (tmp_path / 'blank.txt').write_text(text.replace('\n', '\r\n \r\n') + '\n\n', encoding='utf-8')
    realestate(tmp_path / 'pixels.txt', K=(57.6, 51.2, 48, 32))
    transforms(tmp_path / 'fl.json', fl_x=57.6, fl_y=51.2, cx=48, cy=32, w=96, h=64, camera_angle_x=.1)
    transforms(tmp_path / 'angle.json', camera_angle_x=2 * math.atan(.5 / .6))
    for path, K in ((folder / 'a.txt', normal), (folder / 'b.json', torch.tensor((.5, .75, .5, .5))),
                    (tmp_path / 'list.json', None), (tmp_path / 'short.json', None), (tmp_path / 'kitti.txt', None),
                    (tmp_path / 'untitled.txt', normal), (tmp_path / 'blank.txt', normal),
                    (tmp_path / 'pixels.txt', normal), (tmp_path / 'fl.json', normal)):
        poses = read_poses(str(path))
        c2w, got = poses.c2w.float(), normalise(poses)
        torch.testing.assert_close(c2w, C2W, rtol=0, atol=1e-5, msg=str(path))
        assert got is None if K is None else torch.allclose(got, K.expand(N, 4), atol=1e-6), path
    poses = read_poses(str(tmp_path / 'angle.json'))                          # square pixels of a 96 x 64 video
    torch.testing.assert_close(normalise(poses, 96, 64)[0], torch.tensor((.6, .9, .5, .5)))
    torch.testing.assert_close(poses.c2w.float(), C2W)


def test_load_poses_refuses(tmp_path):
    eye = torch.eye(4)
    mirror = torch.diag(torch.tensor([-1., 1, 1, 1])).tolist()
    transposed = (eye + torch.tensor([[0.] * 4] * 3 + [[1., 2, 3, 0]])).tolist()
    row = '0 .6 .8 .5 .5 0 0 1 0 0 0 0 1 0 0 0 0 1 0'
    for name, text, why in (('a.json', '[1, 2]', 'shape'), ('e.txt', 'title', 'shape'), ('f.txt', '', 'shape'),
                            ('b.json', '{"0": {}}', 'nor minWM'), ('c.txt', 'title\nx ' + '0 ' * 18, 'RealEstate10K'),
                            ('d.json', json.dumps([eye.tolist(), mirror]), 'pose 1 is not a rotation'),
                            ('g.json', json.dumps([transposed]), 'pose 0 .* last row of 0 0 0 1'),
                            ('h.txt', row[2:] + '\n' + row, 'line 1: 18 numbers'),
                            ('i.txt', row + '\n' + row + '\n1 0 0 0 0 1 0 0 0 0 1 0', 'line 3: 12 numbers'),
                            ('j.txt', row.replace('.6', '0'), 'fx and fy above 0'),
                            ('k.json', '{"frames": [{"file_path": "a", "transform_matrix": []}]}', 'camera_angle_x'),
                            ('l.json', '{"camera_angle_x": 0, "frames": []}', 'transforms.json'),
                            ('m.json', '[[[1, 0, 0, 0], [0, 1]]]', 'not a list'),
                            ('n.json', '[[[1e999]]]', 'shape'), ('none.json', None, 'No such file')):
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(BadInput, match=f'{name}.*{why}'):
            read_poses(str(tmp_path / name))
    (tmp_path / 'u.txt').write_bytes(('title\n' + row).encode('utf-16'))
    with pytest.raises(BadInput, match='u.txt.*utf-8'):
        read_poses(str(tmp_path / 'u.txt'))


def test_frames_and_poses_of_other_rates_are_matched_by_their_times():
    """Of a walk with 30 poses a second, a video shows 15, 25 or changing frames a second."""
    times = torch.arange(40) / 30.
    seconds = lambda t: Poses(make_pose(torch.stack([t, 0 * t, t ** 2], -1), 400 * t, 5 * t), times=t)
    poses = seconds(times.double())
    poses.times += 1000                                                       # RealEstate10K's begin anywhere
    K = torch.full((40, 4), .5)
    changing = torch.cat([torch.arange(10) / 30, (10 + 2 * torch.arange(10)) / 30]).double()
    for when in (torch.arange(20) / 15., torch.arange(33) / 25., torch.arange(60) / 50., changing):
        c2w, lens, notes = match_frames('a.mp4', poses, K, when.double())
        torch.testing.assert_close(c2w, seconds(when.double()).c2w, rtol=0, atol=5e-4)
        assert len(lens) == len(when) and f'{len(when)} frames, but 40 poses: matched by the times' in notes[0]
    by_number = torch.arange(39) / 30. + .001 * torch.arange(39).cos()         # the same rate, one frame less
    c2w, _, notes = match_frames('a.mp4', poses, K, by_number.double())
    assert c2w.equal(poses.c2w[:39]) and not notes
    assert not match_frames('a.mp4', poses, K, by_number[:20].double())[2]      # a video that was cut short
    unknown = torch.full((36,), torch.nan, dtype=torch.float64)                # a folder of pictures
    c2w, _, notes = match_frames('a', poses, K, unknown)
    assert c2w.equal(poses.c2w[:36]) and 'the first 36 are used' in notes[0]
    for rate, seconds in (10., '3.90'), (60., '0.65'):                        # a pose a frame, at a wrong rate
        c2w, _, notes = match_frames('a.mp4', poses, K, torch.arange(40) / rate)
        assert c2w.equal(poses.c2w) and f'the poses last 1.30 s and the frames {seconds} s' in notes[0]
    with pytest.raises(BadInput, match='a.mp4: 60 frames, but 40 poses'):      # the poses end before the video
        match_frames('a.mp4', poses, K, torch.arange(60) / 30.)


def test_intrinsics_of_another_picture():
    """K in pixels is of the video, or of a larger one that was resized; pixels that are not square are told."""
    pose = torch.eye(4, dtype=torch.float64)[None]
    def K_of(fx, fy, cx, cy, W, H):
        return normalise(Poses(pose, torch.tensor([[fx, fy, cx, cy]], dtype=torch.float64)), W, H)[0].tolist()
    assert K_of(970, 970, 960, 540, 1280, 720) == pytest.approx([970 / 1920, 970 / 1080, .5, .5])
    assert K_of(970, 970, 960, 540, 832, 480) == pytest.approx([970 / 1920, 970 / 1080, .5, .5])
    assert K_of(48, 48, 30, 16, 48, 32) == pytest.approx([1, 1.5, .625, .5])
    assert K_of(500, 500, 318, 250, 640, 480) == pytest.approx([500 / 640, 500 / 480, 318 / 640, 250 / 480])
    poses = Poses(pose, torch.tensor([[.5, .5 * 16 / 9, .5, .5]]), torch.ones(1, 2))
    for W, H, odd in ((1920, 1080, False), (1280, 720, False), (854, 480, False), (48, 32, True), (64, 64, True)):
        notes = doubts(poses, normalise(poses, W, H), W, H)
        assert bool(notes) == odd and all('pixels would not be square' in note for note in notes), (W, H)
    shuffled = Poses(pose.expand(3, 4, 4), times=torch.tensor([0, .2, .1]))
    assert 'the times in the first column go back' in doubts(shuffled, None, 64, 64)[0]
    assert 'far off the middle' in doubts(poses, torch.tensor([[.5, .5, .1, .5]]), 64, 64)[0]


def test_a_camera_that_moves_backward_is_asked_for_its_axes(tmp_path):
    turned = C2W * torch.tensor([1., -1, -1, 1])
    (tmp_path / 'opengl.json').write_text(json.dumps(turned.tolist()))
    (tmp_path / 'inverse.json').write_text(json.dumps(invert(C2W).tolist()))
    (tmp_path / 'good.json').write_text(json.dumps(C2W.tolist()))
    (tmp_path / 'still.json').write_text(json.dumps([torch.eye(4).tolist()] * 4))
    for name, odd in (('opengl', True), ('inverse', True), ('good', False), ('still', False)):
        notes = doubts(read_poses(str(tmp_path / f'{name}.json')), None, 96, 64)
        assert bool(notes) == odd and all("OpenGL's (y up, z backward)" in note for note in notes), name
    realestate(tmp_path / 'back.txt', turned)                                 # says what its axes are
    assert not doubts(read_poses(str(tmp_path / 'back.txt')), torch.tensor([[.5, .5, .5, .5]]), 64, 64)

# -----------------------------------------------------------------------------
# frames

def test_every_frame_of_a_video_once(tmp_path):
    """At a rate that changes, and in any container, whatever the case of its end."""
    frames = gradient(20, 32, 48) * np.array([0, 0, 1], np.uint8)
    slower = "settb=1/32,setpts='if(lt(N,10),N,10+4*(N-10))'"                   # 32 frames a second, then 8
    encode(tmp_path / 'rate.mp4', frames, '-vf', slower, *every_frame(), '-enc_time_base', '1/32', '-crf', '5',
           '-video_track_timescale', '9600000')
    for name, codec in (('a.mov', 'libx264'), ('a.MP4', 'libx264'), ('a.avi', 'mjpeg'), ('a.mkv', 'mpeg4'),
                        ('a.webm', 'libvpx')):
        encode(tmp_path / name, frames, '-c:v', codec, '-b:v', '2M')
    encode(tmp_path / 'a.gif', frames, '-filter_complex', 'split[a][b];[a]palettegen[c];[b][c]paletteuse')
    size, when = scan(str(tmp_path / 'rate.mp4'))
    assert size == (48, 32)
    torch.testing.assert_close(when[[0, 9, 10, 11, 19]], torch.tensor([0, 9, 10, 14, 46]).double() / 32)
    for name in ('rate.mp4', 'a.mov', 'a.MP4', 'a.avi', 'a.mkv', 'a.webm', 'a.gif'):
        assert len(scan(str(tmp_path / name))[1]) == 20, name
        assert shown(tmp_path / name, range(20)) == list(range(20)), name
        assert shown(tmp_path / name, [7, 3, 7]) == [7, 3, 7], name


def test_pictures_in_the_order_of_their_numbers_and_16_bits_deep(tmp_path):
    for i in range(1, 13):
        iio.imwrite(tmp_path / f'frame_{i}.png', np.full((4, 4), 257 * i, np.uint16))
    (tmp_path / '._frame_1.png').write_bytes(b'left by a Mac')
    assert load_frames(str(tmp_path), range(12))[:, 0, 0].tolist() == [[i] * 3 for i in range(1, 13)]
    names = ['b10.jpg', 'B2.PNG', 'a1x10.png', 'a1x9.png', '3.png', '10.png', 'x.txt']
    for name in names:
        (tmp_path / 'x').mkdir(exist_ok=True)
        (tmp_path / 'x' / name).touch()
    assert [path.split('/')[-1] for path in list_pictures(str(tmp_path / 'x'))] == [
        '3.png', '10.png', 'a1x9.png', 'a1x10.png', 'B2.PNG', 'b10.jpg']


def test_frames_windows_and_crops(folder):
    """Of 96 x 64 the middle 64 x 64 is kept: the camera's focal length is then 1.5 times as wide, its centre stays."""
    assert [len(scan(str(folder / name))[1]) for name in ('a.mp4', 'b')] == [N, N]
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
    entries = [{'caption': 'a hall', 'pose_str': 'w-2, Right-2.0,'}, {'caption': 'gone', 'pose_str': 's-4'}]
    (tmp_path / 'input.json').write_text(json.dumps(entries))
    (tmp_path / 'videos/000000_w2right20').mkdir(parents=True)
    iio.imwrite(tmp_path / 'videos/000000_w2right20/gen.mp4', gradient(17, 32, 32), fps=16, codec='libx264')
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
                 'nan.txt: pose', 'none.mp4: no poses beside it', 'line.txt, line 4: 3 numbers',
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
    assert 'nowhere: no such folder' in wrong
    for text in ('{', '[{"caption": "a"}]', '[1]'):
        (tmp_path / 'input.json').write_text(text)
        with pytest.raises(BadInput, match='input.json: not a list of'):
            find_videos.cache_clear()
            find_videos(str(tmp_path / 'input.json'), 5)


def test_odd_sizes(tmp_path):
    """Pictures of any size do, the clips' own must be a multiple of 16; the intrinsics know of the crop, to a pixel.
    And a world may begin 5,000 km from its origin, as map coordinates do."""
    (tmp_path / 'a').mkdir()
    for i, x in enumerate(gradient(5, 33, 47)):
        iio.imwrite(tmp_path / 'a' / f'{i}.png', x[..., 0] if i == 2 else x)      # a grey one among them
    far = C2W[:5].double()
    far[:, :3, 3] += 5e6
    realestate(tmp_path / 'a.txt', far)
    find_videos.cache_clear()
    cfg = Config(world='folder', videos=str(tmp_path), frames=5, pose_scale=1.0, height=32, width=32)
    clips, _ = folder_clips(cfg, 0, [0])
    assert clips['frames'].shape == (1, 5, 32, 32, 3)
    torch.testing.assert_close(clips['c2w'][0], C2W[:5], rtol=0, atol=1e-5)
    K = crop_intrinsics(torch.tensor([.6, .8, .5, .5]), 7 / 47, 0, 33 / 47, 1)
    torch.testing.assert_close(clips['K'][0], K, rtol=0, atol=1e-6)
    wrong = run('data.py', '--world', 'folder', '--videos', tmp_path, '--pose_scale', 1, '--height', 40,
                '--out', tmp_path / 'x', ok=False)
    assert 'height and width multiples of 16' in wrong


def test_damaged_files_are_one_line_that_begins_with_their_name(tmp_path):
    write_mp4(tmp_path / 'whole.mp4', gradient(N, 64, 96))
    data = (tmp_path / 'whole.mp4').read_bytes()
    encode(tmp_path / 'start.mp4', gradient(N, 64, 96), '-movflags', 'faststart')
    (tmp_path / 'start.mp4').write_bytes((tmp_path / 'start.mp4').read_bytes()[:-300])                # lacks a frame
    (tmp_path / 'half.mp4').write_bytes(data[:len(data) // 2])
    (tmp_path / 'empty.mp4').write_bytes(b'')
    (tmp_path / 'text.mp4').write_text('<html>404</html>')
    subprocess.run([get_ffmpeg_exe(), '-v', 'error', '-f', 'lavfi', '-i', 'sine=duration=1', '-y',
                    str(tmp_path / 'sound.mp4')], check=True)
    for name in ('cut', 'none'):
        (tmp_path / name).mkdir()
    for i in range(6):
        iio.imwrite(tmp_path / 'cut' / f'{i}.png', gradient(1, 64, 96)[0])
    (tmp_path / 'cut' / '5.png').write_bytes((tmp_path / 'cut' / '0.png').read_bytes()[:150])
    names = ['cut', 'empty.mp4', 'half.mp4', 'none', 'sound.mp4', 'start.mp4', 'text.mp4']
    for name in [*names, 'whole.mp4']:
        realestate(tmp_path / f'{name.removesuffix(".mp4")}.txt')
    find_videos.cache_clear()
    good, bad = find_videos(str(tmp_path), 5)
    assert [video.path for video in good] == [str(tmp_path / 'whole.mp4')]
    assert len(bad) == len(names)
    for name, line in zip(names, bad):
        why = {'cut': '5.png: damaged, or not a picture', 'none': ': no frames'}.get(name, ': damaged, or not a video')
        assert line.startswith(str(tmp_path / name)) and why in line and '\n' not in line and len(line) < 300, line


def test_a_shard_decodes_a_video_once(folder, tmp_path, monkeypatch):
    """1,600 clips of a long video must not take an hour: its frames are read once for all clips of a shard."""
    for i in range(12):
        (tmp_path / f'{i}.mp4').symlink_to(folder / 'a.mp4')
        (tmp_path / f'{i}.txt').symlink_to(folder / 'a.txt')
    read, opened = worlds.folder.read_frames, []
    monkeypatch.setattr('worlds.folder.read_frames', lambda path, *a: opened.append(path) or read(path, *a))
    find_videos.cache_clear()
    cfg = Config(world='folder', videos=str(tmp_path), frames=3, clips=200, pose_scale=1.0, height=16, width=16)
    for shard in range(4):
        clips, _ = folder_clips(cfg, 0, range(50 * shard, 50 * shard + 50))
        assert len(clips['frames']) == 50
    assert len(opened) <= 10 + 3 and len(set(opened)) == 10                   # two of the twelve are held out
    opened.clear()
    folder_clips(cfg, 1, range(4))
    assert len(opened) == len(set(opened)) == 2


def test_check_says_what_is_odd(folder, tmp_path, capsys):
    """What a user should know, but what does not keep a video out, is printed; what does is named."""
    def say(**more):
        find_videos.cache_clear()
        check(Config(world='folder', videos=str(tmp_path), frames=5, pose_scale=1.0, **more))
        return capsys.readouterr().out

    for name in 'ab':
        (tmp_path / f'{name}.mp4').symlink_to(folder / 'a.mp4')
        realestate(tmp_path / f'{name}.txt', K=(.6, .9, .5, .5))
    assert say() == f'{tmp_path}: 2 videos, 0 skipped\n'
    (tmp_path / 'b.caption').write_bytes('un café'.encode('latin-1'))
    said = say()
    assert '1 videos, 1 skipped' in said and 'b.caption: not UTF-8 at byte 6' in said
    assert f'{tmp_path / "a.mp4"} is the only video: the held-out clips are of it as well' in said
    (tmp_path / 'b.caption').write_text('\ufeffun café', encoding='utf-8')
    assert '2 videos, 0 skipped' in say() and find_videos(str(tmp_path), 5)[0][1].caption == 'un café'
    realestate((tmp_path / 'c.txt'), K=(.6, .6, .5, .5))
    (tmp_path / 'c.MOV').symlink_to(folder / 'a.mp4')
    assert f'warning: {tmp_path / "c.MOV"}: fx W / (fy H) is 1.50' in say()
    (tmp_path / 'd.mp4').symlink_to(folder / 'a.mp4')
    (tmp_path / 'd.json').write_text(json.dumps(C2W.tolist()))
    assert f'{tmp_path / "d.mp4"}: its poses come without intrinsics: a view 90 degrees wide is assumed' in say()
    with pytest.raises(BadInput, match='33 frames of a clip of --frames 5 --stride 8'):
        say(stride=8)
    assert 'a.mp4: 17 frames, 33 are wanted: use fewer --frames or a smaller --stride' in capsys.readouterr().out
    for wrong in ({'stride': 0}, {'stride': -1}):
        with pytest.raises(BadInput, match='at least 1'):
            say(**wrong)
    for scale in (0, -2, math.nan, math.inf):
        with pytest.raises(BadInput, match='what a unit of the poses is'):
            check(Config(world='folder', videos=str(tmp_path), pose_scale=scale))
    for videos in ('', str(tmp_path / 'a.mp4'), str(tmp_path / 'no.json')):
        with pytest.raises(BadInput, match='no such folder'):
            check(Config(world='folder', videos=videos, pose_scale=1.0))


def test_minwm_strings_as_people_write_them():
    assert minwm_keys('a.mp4', 'w-2, Right-2.0, ,dn*1,ui,') == ['w', 'w', 'l', 'l', 'o', 'ui']
    for text in ('w-', 'q-2', 'w--2', 'forward-3', 'w-2;s-2'):
        with pytest.raises(BadInput, match='^a.mp4: its pose_str: keys: group'):
            minwm_keys('a.mp4', text)


def test_gates_hold_for_the_clips_that_they_were_measured_on():
    lowpoly = vars(Config())
    assert gate('ar', 'nano', {'val_loss': 9.}, lowpoly).startswith('gate: FAIL')
    for recipe in (lowpoly | {'world': 'folder'}, lowpoly | {'plans': 1}, lowpoly | {'height': 128}):
        assert gate('ar', 'nano', {'val_loss': 9.}, recipe).startswith('gate: none for these clips')
