"""
World "folder": your own videos with a pose for every frame.

    python data.py --world folder --videos DIR --pose_scale 1

DIR holds for each video

    name.mp4       or .mov, .webm, .mkv, .avi, .gif, ...: every frame in it, once, whatever its rate;
                   or a folder `name` of pictures (png, jpg), in the order of the numbers in their names
    name.txt       its poses: RealEstate10K's or KITTI's lines
    or name.json   a list of matrices, minWM's pose JSON, or a transforms.json; all are in worlds/poses.py
    name.caption   if you like, what it shows, in UTF-8

Where a pose file has no intrinsics, a view of 90 degrees is assumed. --pose_scale is how many metres a unit
of the poses is. Instead of a folder, --videos may name minWM's input JSON, a list of {"caption": ...,
"pose_str": "w-8, right-11"}, which stands beside videos/000000_w8right11/gen.mp4. A unit of its strings is a
latent, so pose i is frame 4 i's.

A video that does not fit is skipped, and `make` prints why. Every tenth video is held out, and the last one.
"""
import functools
import json
import math
import os
import re
import subprocess
from dataclasses import dataclass

import numpy as np
import torch
from imageio_ffmpeg import get_ffmpeg_exe
from PIL import Image
from torch.nn import functional
from tqdm import tqdm

from camera import BadInput, crop_intrinsics, intrinsics, relative
from common import to_rgb
from worlds.poses import (Poses, doubts, match_frames, minwm_keys, minwm_poses, natural, normalise,
                          read_poses)

FOV = 90.0                        # degrees, horizontal: assumed where a pose file has no intrinsics
MINWM_K = torch.tensor([.505051, .897868, .5, .5])
MEAN_MOVE = .15                   # metres from frame to frame, where nobody knows the scale
PICTURES = '.png', '.jpg', '.jpeg'
VIDEOS = '.mp4 .m4v .mov .webm .mkv .avi .gif .mpg .mpeg .ts .mts .m2ts .wmv .flv .ogv .3gp'.split()

# -----------------------------------------------------------------------------
# frames

@functools.cache
def every_frame():
    """ffmpeg's option that keeps every frame once, and its name: versions before 5.1 have another."""
    options = subprocess.run([get_ffmpeg_exe(), '-h', 'long'], capture_output=True).stdout
    return ['-fps_mode' if b'-fps_mode' in options else '-vsync', 'passthrough']


def ffmpeg(path, *output):
    """The command that decodes a video, with options of the output."""
    return [get_ffmpeg_exe(), '-nostdin', '-hide_banner', '-nostats', '-loglevel', 'repeat+level+info',
            '-i', f'file:{path}', '-map', '0:V:0', *every_frame(), *output, '-']


def list_pictures(folder):
    """The paths of the pictures in a folder, in the order of the numbers in their names."""
    names = [name for name in os.listdir(folder)
             if name.lower().endswith(PICTURES) and not name.startswith('.')]
    return [os.path.join(folder, name) for name in sorted(names, key=natural)]


def read_picture(path):
    """A picture (H, W, 3) uint8; 16 bits of grey are scaled to 8."""
    try:
        with Image.open(path) as image:
            return np.asarray(to_rgb(image))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise BadInput(f'{path}: damaged, or not a picture ({e})') from None


def scan(path):
    """((width, height), when each frame is shown (n,), seconds from the first; nan in a folder of pictures).
    Decodes all of a video or folder, so that what is damaged is found now."""
    if os.path.isdir(path):
        shapes = [read_picture(picture).shape for picture in list_pictures(path)]
        sizes = [(w, h) for h, w, _ in shapes]
        times = [math.nan] * len(sizes)
    else:
        tell = 'showinfo,select=eq(n\\,0)'                    # of every frame, and hand on the first
        done = subprocess.run(ffmpeg(path, '-vf', tell, '-f', 'null'), capture_output=True)
        said = done.stderr.decode(errors='replace')
        errors = re.findall(r'\[(?:error|fatal|panic)\] (.*)', said)
        if errors or done.returncode:
            raise BadInput(f'{path}: damaged, or not a video: {" ".join(errors[:1])}')
        sizes = [(int(w), int(h)) for w, h in re.findall(r'\bs:(\d+)x(\d+) i:', said)]
        times = re.findall(r'\bn: *\d+ pts: *\S+ pts_time:(\S+)', said)
        times = [float(time.replace('NOPTS', 'nan')) for time in times]
    if len(set(sizes)) > 1:
        raise BadInput(f'{path}: its pictures are of different sizes')
    if not (sizes and times):
        raise BadInput(f'{path}: no frames in it')
    when = torch.tensor(times, dtype=torch.float64)
    return sizes[0], when - when[0]


def read_ppm(pipe):
    """The next picture (H, W, 3) uint8 of a stream of PPM files."""
    pipe.readline()                                           # P6
    width, height = map(int, pipe.readline().split())
    pipe.readline()                                           # 255
    return np.frombuffer(pipe.read(height * width * 3), np.uint8).reshape(height, width, 3)


def read_frames(path, numbers):
    """Yield the pictures (H, W, 3) uint8 of a video or folder that have these numbers, which rise. A video is
    decoded from its start: frames are counted, not sought."""
    if os.path.isdir(path):
        pictures = list_pictures(path)
        yield from (read_picture(pictures[i]) for i in numbers)
        return
    first, last = numbers[0], numbers[-1]
    part = f'select=between(n\\,{first}\\,{last})'
    command = ffmpeg(path, '-vf', part, '-frames:v', str(last - first + 1),
                     '-f', 'image2pipe', '-c:v', 'ppm', '-pix_fmt', 'rgb24')
    wanted = set(numbers)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        for i in range(first, last + 1):
            picture = read_ppm(process.stdout)
            if i in wanted:
                yield picture


def load_frames(path, indices, change=np.asarray):
    """The pictures (H, W, 3) uint8 at `indices` of a video or folder, each as `change` makes it, stacked."""
    numbers, places = np.unique(indices, return_inverse=True)
    try:
        pictures = [change(picture) for picture in read_frames(path, numbers.tolist())]
    except (OSError, ValueError) as e:
        raise BadInput(f'{path}: could be read before, but not any more ({e}): was it changed?') from None
    return np.stack(pictures)[places.reshape(np.shape(indices))]

# -----------------------------------------------------------------------------
# videos

@dataclass
class Video:
    path: str
    c2w: torch.Tensor             # (F, 4, 4) float64, in its own unit
    K: torch.Tensor               # (F, 4) normalised
    size: tuple                   # width, height
    caption: str
    notes: list                   # what is odd about it


def read_sidecars(path, ends):
    """(Poses, caption) of the files {end: path} that stand beside a video."""
    if '.txt' not in ends and '.json' not in ends:
        raise BadInput(f'{path}: no poses beside it, a .txt or .json of the same name')
    poses = read_poses(ends.get('.txt') or ends['.json'])
    caption = ''
    if '.caption' in ends:
        try:
            with open(ends['.caption'], encoding='utf-8-sig') as f:
                caption = f.read().strip()
        except UnicodeDecodeError as e:
            raise BadInput(f'{ends[".caption"]}: not UTF-8 at byte {e.start}: save it as UTF-8') from None
    return poses, caption


def read_keys(path, keys, caption):
    """(Poses, caption) of minWM's video of these keys: a pose for every 4 frames."""
    c2w = minwm_poses(minwm_keys(path, keys)).double().repeat_interleave(4, 0)
    ones = torch.ones(len(c2w), 2)
    return Poses(c2w, MINWM_K.expand(len(c2w), 4), ones), caption


def list_minwm(path):
    """What list_videos yields, for minWM's input JSON."""
    try:
        with open(path, encoding='utf-8-sig') as f:
            entries = [(entry['pose_str'].lower(), str(entry.get('caption') or '')) for entry in json.load(f)]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise BadInput(f'{path}: not a list of {{"caption": ..., "pose_str": "w-8, right-11"}} '
                       f'({e!r})') from None
    for i, (keys, caption) in enumerate(entries):
        slug = ''.join(letter for letter in keys if letter.isalnum())
        video = os.path.join(os.path.dirname(path), 'videos', f'{i:06d}_{slug}', 'gen.mp4')
        yield video, functools.partial(read_keys, video, keys, caption)


def list_videos(folder):
    """Yield (path of the video, function that reads its (Poses, caption)) of all videos in a folder, or in
    minWM's input JSON."""
    if folder.endswith('.json'):
        yield from list_minwm(folder)
        return
    videos = {}                                               # {name: {end: path}}
    for file in sorted(os.listdir(folder)):
        path = os.path.join(folder, file)
        name, end = (file, '') if os.path.isdir(path) else os.path.splitext(file)
        if not file.startswith('.'):
            videos.setdefault(name, {})[end.lower()] = path
    for name, ends in videos.items():
        path = next((ends[end] for end in (*VIDEOS, '') if end in ends), None)
        if path or '.txt' in ends or '.json' in ends:
            path = path or os.path.join(folder, name)
            yield path, functools.partial(read_sidecars, path, ends)


def open_video(path, read, span):
    """A Video with a pose for each of at least `span` frames. Raises BadInput if it is not one."""
    if not os.path.exists(path):
        raise BadInput(f'{path}: no such video ({", ".join(VIDEOS)}), nor a folder of pictures')
    poses, caption = read()
    size, when = scan(path)
    K = normalise(poses, *size)
    c2w, K, notes = match_frames(path, poses, K, when)
    if len(c2w) < span:
        raise BadInput(f'{path}: {len(c2w)} frames, {span} are wanted: '
                       'use fewer --frames or a smaller --stride')
    notes += doubts(poses, K, *size)
    if K is None:
        K = intrinsics(FOV, size[0] / size[1]).expand(len(c2w), 4)
        notes.append(f'its poses come without intrinsics: a view {FOV:g} degrees wide is assumed')
    return Video(path, c2w, K, size, caption, notes)


@functools.lru_cache(maxsize=1)
def find_videos(folder, span):
    """([the videos with a pose for each of at least `span` frames], [why not the others])."""
    good, bad = [], []
    for path, read in tqdm(list(list_videos(folder)), 'videos', leave=False):
        try:
            good.append(open_video(path, read, span))
        except BadInput as e:
            bad.append(str(e))
        except (OSError, ValueError, RuntimeError) as e:
            bad.append(f'{path}: {e}')
    return good, bad

# -----------------------------------------------------------------------------
# clips

def video_span(cfg):
    """How many frames of a video a clip needs."""
    return (cfg.frames - 1) * cfg.stride + 1


def check(cfg):
    """Print which videos are found and which are skipped. Raise BadInput if no clips can be made of them."""
    if cfg.pose_scale != -1 and not 0 < cfg.pose_scale < 1e6:
        raise BadInput('--world folder: say what a unit of the poses is: --pose_scale METRES, '
                       'or -1 where nobody knows')
    if cfg.stride < 1:
        raise BadInput(f'--stride {cfg.stride}: at least 1')
    minwm = cfg.videos.endswith('.json')
    if not (os.path.isfile(cfg.videos) if minwm else os.path.isdir(cfg.videos)):
        raise BadInput(f'--videos {cfg.videos}: no such folder; name one that holds videos and their poses, '
                       'or the input JSON of minWM')
    if minwm and not cfg.wan and cfg.stride % 4:
        raise BadInput(f'--stride {cfg.stride}: the poses of minWM belong to every fourth frame: '
                       'use --stride 4, or --wan')
    span = video_span(cfg)
    good, bad = find_videos(cfg.videos, span)
    print(f'{cfg.videos}: {len(good)} videos, {len(bad)} skipped', *bad, sep='\n  ')
    for video in good:
        for note in video.notes:
            print(f'warning: {video.path}: {note}')
    if len(good) == 1:
        print(f'warning: {good[0].path} is the only video: the held-out clips are of it as well, '
              'so that scores say nothing about other videos')
    if not good:
        raise BadInput(f'--videos {cfg.videos}: no video with a pose for every frame and the {span} '
                       f'frames of a clip of --frames {cfg.frames} --stride {cfg.stride}: '
                       'what is wrong with each stands above, worlds/folder.py says what belongs there')


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


def choose_window(cfg, videos, split, i):
    """(the number of a video, the numbers of the frames in it (F,)) of clip i. Training clips come in the
    order of their videos, so that a shard decodes few of them. Held-out clips take turns, because scores
    compare a clip with the next one's path."""
    r = np.random.default_rng([cfg.seed, 5 + split, i])
    number = i % len(videos) if split == 1 else i * len(videos) // cfg.clips
    start = int(r.integers(len(videos[number].c2w) - video_span(cfg) + 1))
    if cfg.videos.endswith('.json'):
        start -= start % 4                                    # minWM's poses belong to every fourth frame
    return number, start + cfg.stride * np.arange(cfg.frames)


def crop_box(H, W, cfg):
    """(x, y, width, height) in pixels of the middle of an H x W picture, in the aspect of the clips."""
    height = min(H, W * cfg.height / cfg.width) / H           # as fractions of the picture
    width = min(W, H * cfg.width / cfg.height) / W
    x = round((1 - width) / 2 * W)
    y = round((1 - height) / 2 * H)
    return x, y, round(width * W), round(height * H)


def crop_picture(picture, cfg):
    """A picture (H, W, 3) uint8, cropped to the aspect of the clips and resized."""
    H, W, _ = picture.shape
    x, y, width, height = crop_box(H, W, cfg)
    middle = torch.tensor(picture[y:y + height, x:x + width]).movedim(-1, 0)
    size = cfg.height, cfg.width
    small = functional.interpolate(middle[None].float(), size, mode='bilinear', antialias=True)
    return small[0].round().clamp(0, 255).byte().movedim(0, -1).numpy()


def metres_in_a_unit(c2w, cfg):
    """How many metres a unit of a video's poses is."""
    if cfg.pose_scale > 0:
        return cfg.pose_scale
    mean_move = c2w[::cfg.stride, :3, 3].diff(dim=0).norm(dim=1).mean().item()
    return MEAN_MOVE / max(1e-6, mean_move)


def cut_cameras(cfg, video, window):
    """(c2w (F, 4, 4) in metres from the first, K (4,) of the cropped picture) of some frames of a video."""
    W, H = video.size
    x, y, width, height = crop_box(H, W, cfg)
    K = crop_intrinsics(video.K[window[0]], x / W, y / H, width / W, height / H)
    c2w = relative(video.c2w[None, window])[0]
    c2w[:, :3, 3] *= metres_in_a_unit(video.c2w, cfg)
    return c2w.float(), K


def folder_clips(cfg, split, indices):
    """Cut clips out of the videos: dict of tensors as a shard of data.py holds them, and captions. Clip i
    depends on (seed, split, i) and the number of clips alone."""
    videos, _ = find_videos(cfg.videos, video_span(cfg))
    videos = choose_videos(videos, split)
    chosen = [choose_window(cfg, videos, split, i) for i in indices]
    crop = functools.partial(crop_picture, cfg=cfg)
    frames = {}
    for number in {number for number, _ in chosen}:           # a video is decoded once for all of its clips
        places = [place for place, (other, _) in enumerate(chosen) if other == number]
        windows = [chosen[place][1] for place in places]
        frames |= zip(places, load_frames(videos[number].path, windows, crop))

    frames = [torch.from_numpy(frames[place]) for place in range(len(chosen))]
    c2w, K = zip(*[cut_cameras(cfg, videos[number], window) for number, window in chosen])
    tensors = dict(frames=torch.stack(frames), c2w=torch.stack(c2w), K=torch.stack(K))
    return tensors, [videos[number].caption for number, _ in chosen]
