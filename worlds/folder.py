"""
World "folder": your own videos with a pose for every frame.

    python data.py --world folder --videos DIR --pose_scale 1

DIR holds for each video

    name.mp4       or a folder `name` of pictures (png, jpg), the frames in the order of their names
    name.txt       its poses as RealEstate10K has them: a title, then a line for each frame: time, fx fy cx cy
                   (normalised), 0 0, and the 3 x 4 world-to-camera matrix, row by row
    or name.json   a list of 4 x 4 camera-to-world matrices (a view of 90 degrees is assumed), or minWM's
                   {"0": {"extrinsic": 4 x 4 camera-to-world, "K": 3 x 3 in pixels}, "1": ...}
    name.caption   if you like, what it shows

Axes are OpenCV's, as in camera.py; --pose_scale is how many metres a unit of the poses is. Instead of a
folder, --videos may name minWM's input JSON, a list of {"caption": ..., "pose_str": "w-8, right-11"}, which
stands beside videos/000000_w8right11/gen.mp4. A unit of its strings is a latent, so pose i is frame 4 i's.

A video that does not fit is skipped, and `make` prints why. Every tenth video is held out, and the last one.
"""
import functools
import json
import os

import imageio.v3 as iio
import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from camera import (DEGREES, METRES, BadInput, crop_intrinsics, intrinsics, invert, make_pose, parse_keys,
                    relative)

FOV = 90.0                        # degrees, horizontal: assumed where a pose file has no intrinsics
MINWM_K = torch.tensor([.505051, .897868, .5, .5])
MEAN_MOVE = .15                   # metres from frame to frame, where nobody knows the scale
PICTURES = '.png', '.jpg', '.jpeg'

# -----------------------------------------------------------------------------
# poses

def parse_realestate(path, text):
    """(w2c (F, 4, 4) float64, K (F, 4)) of a RealEstate10K file."""
    rows = [line.split() for line in text.splitlines()[1:]]
    for i, row in enumerate(rows, 2):
        if len(row) != 19:
            raise BadInput(f'{path}, line {i}: {len(row)} numbers, RealEstate10K has 19: '
                           'time, fx fy cx cy, 0 0, 3 x 4 pose')
    numbers = [float(x) for row in rows for x in row]
    table = torch.tensor(numbers, dtype=torch.float64).view(-1, 19)
    top = table[:, 7:].view(-1, 3, 4)
    bottom = torch.tensor([0., 0, 0, 1], dtype=torch.float64).expand(len(table), 1, 4)
    return torch.cat([top, bottom], 1), table[:, 1:5].float()


def parse_json(text):
    """(c2w (F, 4, 4) float64, K (F, 4) or None) of a list of matrices or of minWM's pose JSON."""
    poses = json.loads(text)
    K = None
    if isinstance(poses, dict):
        entries = [poses[key] for key in sorted(poses, key=int)]
        poses = [entry['extrinsic'] for entry in entries]
        if all(entry.get('K') for entry in entries):
            pixels = torch.tensor([entry['K'] for entry in entries], dtype=torch.float32)
            centre = pixels[:, :2, 2]
            size = 2 * centre                                 # the picture is twice the principal point
            focal = pixels[:, [0, 1], [0, 1]]
            K = torch.cat([focal / size, centre / size], 1)
    return torch.tensor(poses, dtype=torch.float64), K


def check_poses(path, poses):
    """Raise BadInput unless poses are (F, 4, 4) rotations and translations."""
    if poses.ndim != 3 or poses.shape[1:] != (4, 4) or not len(poses):
        raise BadInput(f'{path}: shape {tuple(poses.shape)}, wanted (frames, 4, 4)')
    R = poses[:, :3, :3]
    orthogonal = (R @ R.mT - torch.eye(3)).abs().amax((1, 2)) < 1e-3
    right_handed = torch.linalg.det(R) > 0
    finite = poses.isfinite().all(2).all(1)
    bad = ~(orthogonal & right_handed & finite)
    if bad.any():
        raise BadInput(f'{path}: pose {int(bad.nonzero()[0])} is not a rotation and a translation')


def load_poses(path):
    """(c2w (F, 4, 4), K (F, 4) normalised or None) of a pose file, .txt or .json. Raises BadInput that names
    the file and the line or pose."""
    realestate = path.endswith('.txt')
    try:
        with open(path) as f:
            text = f.read()
        poses, K = parse_realestate(path, text) if realestate else parse_json(text)
    except BadInput:
        raise
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as e:
        raise BadInput(f'{path}: not a list of 4x4 matrices, nor minWM pose JSON, '
                       f'nor RealEstate10K ({e})') from None
    check_poses(path, poses)
    c2w = invert(poses) if realestate else poses
    return c2w.float(), K


def minwm_poses(keys, metres=0.08, degrees=3.0):
    """Key string of n keys -> c2w (n + 1, 4, 4) as minWM walks: it turns and moves in the camera's own axes,
    and its pitch is not clamped."""
    pose = torch.eye(4, dtype=torch.float64)
    poses = []
    for held in [''] + parse_keys(keys):
        amount = [(plus in held) - (minus in held) for plus, minus in ('da', 'ou', 'ws', 'lj', 'ik')]
        shift = metres * pose.new_tensor(amount[:3])                  # right, down, forward
        yaw, pitch = degrees * pose.new_tensor(amount[3:])
        turn = make_pose(pose.new_zeros(3), yaw, pitch)
        turn[:3, 3] = turn[:3, :3] @ shift
        pose = pose @ turn
        poses.append(pose)
    return torch.stack(poses).float()


def poses_to_keys(c2w, metres=METRES, degrees=DEGREES):
    """Poses (F, 4, 4) -> F - 1 keys, those whose motion is over half a unit. Undoes keys_to_poses exactly."""
    R, t = c2w[:, :3, :3].double(), c2w[:, :3, 3].double()
    yaw = torch.atan2(R[:, 0, 2], R[:, 2, 2])
    pitch = torch.asin(-R[:, 1, 2])
    turn = (torch.rad2deg(yaw).diff() + 180) % 360 - 180              # degrees, by the short way round
    tilt = torch.rad2deg(pitch).diff()
    dx, dy, dz = t.diff(dim=0).unbind(-1)
    sin = yaw[1:].sin()
    cos = yaw[1:].cos()

    keys = [''] * len(dx)
    axes = {
        'ws': (dx * sin + dz * cos) / metres,
        'da': (dx * cos - dz * sin) / metres,
        'lj': turn / degrees,
        'ik': tilt / degrees,
        'ou': dy / metres,
    }
    for (plus, minus), motion in axes.items():
        for i, units in enumerate(motion.tolist()):
            if abs(units) > 0.5:
                keys[i] += plus if units > 0 else minus
    return keys

# -----------------------------------------------------------------------------
# videos

def list_pictures(folder):
    """The paths of the pictures in a folder, in the order of their names."""
    return sorted(os.path.join(folder, name) for name in os.listdir(folder)
                  if name.lower().endswith(PICTURES))


def count_frames(path):
    """How many frames a video, or a folder of pictures of one size, has."""
    if not os.path.isdir(path):
        return sum(1 for _ in iio.imiter(path))
    pictures = list_pictures(path)
    if len({Image.open(picture).size for picture in pictures}) > 1:
        raise BadInput(f'{path}: its pictures are of different sizes')
    return len(pictures)


def load_frames(path, indices):
    """Pictures (n, H, W, 3) uint8 of a video or of a folder of pictures, at `indices`."""
    if os.path.isdir(path):
        pictures = list_pictures(path)
        return np.stack([iio.imread(pictures[i], mode='RGB') for i in indices])
    wanted = set(indices)
    frames = {}
    for i, frame in zip(range(max(indices) + 1), iio.imiter(path)):
        if i in wanted:
            frames[i] = frame
    return np.stack([frames[i] for i in indices])


def minwm_camera(keys):
    """(c2w (F, 4, 4), K (F, 4)) of minWM's video of these keys: a pose for every 4 frames."""
    c2w = minwm_poses(keys).repeat_interleave(4, 0)
    return c2w, MINWM_K.expand(len(c2w), 4)


def list_minwm(path):
    """What list_videos yields, for minWM's input JSON."""
    try:
        with open(path) as f:
            entries = [(entry['pose_str'].lower(), str(entry.get('caption', ''))) for entry in json.load(f)]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise BadInput(f'{path}: not a list of {{"caption": ..., "pose_str": "w-8, right-11"}} '
                       f'({e!r})') from None
    for i, (keys, caption) in enumerate(entries):
        keys = keys.replace(' ', '').replace('-', '*')
        slug = ''.join(letter for letter in keys if letter.isalnum())
        for word, key in (('up', 'i'), ('down', 'k'), ('right', 'l'), ('left', 'j')):
            keys = keys.replace(word, key)
        video = f'{os.path.dirname(path)}/videos/{i:06d}_{slug}/gen.mp4'
        yield video, functools.partial(minwm_camera, keys), caption


def list_videos(folder):
    """Yield (path of the video, function that reads its (c2w, K), caption) of all videos in a folder, or in
    minWM's input JSON."""
    if folder.endswith('.json'):
        yield from list_minwm(folder)
        return
    files = os.listdir(folder) if os.path.isdir(folder) else []
    for name in sorted({os.path.splitext(file)[0] for file in files}):
        path = f'{folder}/{name}'
        video = path + '.mp4' if os.path.exists(path + '.mp4') else path
        poses = path + '.txt' if os.path.exists(path + '.txt') else path + '.json'
        caption = ''
        if os.path.exists(path + '.caption'):
            with open(path + '.caption') as f:
                caption = f.read().strip()
        yield video, functools.partial(load_poses, poses), caption


@functools.lru_cache(maxsize=1)
def find_videos(folder, span):
    """([(path, c2w, K or None, caption)] of the videos with a pose for each of at least `span` frames, [why
    not the others])."""
    good, bad = [], []
    for path, read, caption in list_videos(folder):
        try:
            if not os.path.exists(path):
                raise BadInput(f'{path}: no such video, nor a folder of pictures')
            c2w, K = read()
            n = count_frames(path)
            if n > len(c2w):
                raise BadInput(f'{path}: {n} frames, but {len(c2w)} poses')
            if n < span:
                raise BadInput(f'{path}: {n} frames, {span} are wanted')
            good.append((path, c2w[:n], K, caption))
        except (BadInput, OSError, ValueError) as e:
            bad.append(str(e))
    return good, bad

# -----------------------------------------------------------------------------
# clips

def video_span(cfg):
    """How many frames of a video a clip needs."""
    return (cfg.frames - 1) * cfg.stride + 1


def check(cfg):
    """Print which videos are found and which are skipped. Raise BadInput if no clips can be made of them."""
    if not cfg.pose_scale:
        raise BadInput('--world folder: say what a unit of the poses is: --pose_scale METRES, '
                       'or -1 where nobody knows')
    if cfg.videos.endswith('.json') and not cfg.wan and cfg.stride % 4:
        raise BadInput(f'--stride {cfg.stride}: the poses of minWM belong to every fourth frame: '
                       'use --stride 4, or --wan')
    good, bad = find_videos(cfg.videos, video_span(cfg))
    print(f'{cfg.videos}: {len(good)} videos, {len(bad)} skipped', *bad, sep='\n  ')
    if not good:
        raise BadInput(f'--videos {cfg.videos}: no video with a pose for every frame; '
                       'see worlds/folder.py on what belongs there')


def choose_videos(videos, split):
    """Those to train on (split 0), or to hold out (1): every tenth, and the last. A single video is both."""
    if len(videos) == 1:
        return videos
    chosen = []
    for i, video in enumerate(videos):
        held_out = i % 10 == 9 or i == len(videos) - 1
        if held_out == (split == 1):
            chosen.append(video)
    return chosen


def crop_box(H, W, cfg):
    """(x, y, width, height) in pixels of the middle of an H x W picture, in the aspect of the clips."""
    height = min(H, W * cfg.height / cfg.width) / H           # as fractions of the picture
    width = min(W, H * cfg.width / cfg.height) / W
    x = round((1 - width) / 2 * W)
    y = round((1 - height) / 2 * H)
    return x, y, round(width * W), round(height * H)


def metres_in_a_unit(c2w, cfg):
    """How many metres a unit of a video's poses is."""
    if cfg.pose_scale > 0:
        return cfg.pose_scale
    mean_move = c2w[::cfg.stride, :3, 3].diff(dim=0).norm(dim=1).mean().item()
    return MEAN_MOVE / max(1e-6, mean_move)


def cut_clip(cfg, video, r):
    """A random window of a video, cropped to the aspect of the clips and resized: (frames (F, H, W, 3) uint8,
    c2w (F, 4, 4) in metres from its first frame, K (4,))."""
    path, c2w, K, _ = video
    start = int(r.integers(len(c2w) - video_span(cfg) + 1))
    if cfg.videos.endswith('.json'):
        start -= start % 4                                    # minWM's poses belong to every fourth frame
    window = start + cfg.stride * np.arange(cfg.frames)

    frames = torch.from_numpy(load_frames(path, window.tolist()))
    frames = frames.movedim(-1, 1).float()                    # (F, 3, H, W)
    H, W = frames.shape[2:]
    x, y, width, height = crop_box(H, W, cfg)
    frames = frames[:, :, y:y + height, x:x + width]
    frames = functional.interpolate(frames, (cfg.height, cfg.width), mode='bilinear', antialias=True)
    K = intrinsics(FOV, W / H) if K is None else K[window[0]]
    K = crop_intrinsics(K, x / W, y / H, width / W, height / H)

    poses = relative(c2w[None, window])[0]
    poses[:, :3, 3] *= metres_in_a_unit(c2w, cfg)
    return frames.round().clamp(0, 255).byte().movedim(1, -1), poses, K


def folder_clips(cfg, split, indices):
    """Cut clips out of the videos: dict of tensors as a shard of data.py holds them, and captions. Clip i
    depends on (seed, split, i) alone."""
    videos, _ = find_videos(cfg.videos, video_span(cfg))
    videos = choose_videos(videos, split)
    clips, captions = [], []
    for i in indices:
        r = np.random.default_rng([cfg.seed, 5 + split, i])
        video = videos[int(r.integers(len(videos)))]
        clips.append(cut_clip(cfg, video, r))
        captions.append(video[-1])
    frames, c2w, K = (torch.stack(column) for column in zip(*clips))
    return dict(frames=frames, c2w=c2w, K=K), captions
