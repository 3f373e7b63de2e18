"""
Walk through a trained world: along given keys to a video file, or live, with the keyboard, in the browser.

    python stream.py --live True                                      # in the browser
    python stream.py --keys "w*8,wl*8"                                # out/walk.mp4, the keys drawn on it
    python stream.py --ckpt out/ar.safetensors --first picture.png    # another checkpoint; from any picture
    python stream.py --ckpt out/ar.safetensors --steps 16 --first prompt --prompt "dusk sky red floor"

    w s  forward, back     j l  look left, right     a key is 0.25 m or 10 degrees; "wl*8" holds w and l
    a d  left, right       i k  look up, down        for 8 frames; "*4" stands still for 4

File and page give `rollout` (model.py) an iterator of cameras and take the pictures as they come. Live, it
waits for keys. Scores and timings: python -m experiments.score, python -m experiments.bench.
"""
import collections
import functools
import glob
import io
import json
import logging
import math
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import webbrowser
from dataclasses import dataclass, replace

import imageio.v3 as iio
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps

from camera import KEYS, BadInput, Camera, apply_keys, keys_to_poses, make_pose, parse_keys, relative
from common import (check_folder, check_limits, command_line, cpu_cores, load_model, pick_device, to_rgb,
                    written_whole)
from data import Config as DataConfig
from data import Clips, Lowpoly, find_codec, free, load_manifest, lowpoly_clips, make_plan, noise_for
from model import rollout, rollout_clip, schedule


@dataclass
class Config:
    ckpt: str = 'checkpoints/dmd.safetensors'
    # the walk
    keys: str = 'w*4,wl*4,w*4,j*4'
    poses: str = ''               # instead of keys: JSON, a list of c2w or minWM's {"0": {"extrinsic": c2w}}
    first: str = 'world'          # frame 0: world (that of held-out clip --clip), prompt, or a picture file
    clip: int = 0
    prompt: str = ''              # empty: the clip's own caption
    out: str = 'out/walk.mp4'     # .mp4 or .gif
    truth: bool = False           # lowpoly: the exact render beside the generated picture
    fps: int = 0                  # 0: 8 to a file, 25 live
    # sampling
    steps: int = 0                # steps a chunk; 0: 8 of Euler, or 4 for a distilled model
    guidance: float = 1.0         # 1: none
    over: str = 'camera'          # what guidance drops: camera | text
    window: int = 0               # frames the cache holds; 0: as trained
    context: float = -1.0         # noise level of the generated history; -1: as distilled
    chunk: int = 0                # latents denoised together, of a checkpoint from elsewhere; 0: as it says
    first_chunk: int = 0          # those of its first chunk; 0: as it says, or as many
    seed: int = 0
    # live, instead of to a file
    live: bool = False            # in the browser
    host: str = '127.0.0.1'       # the address; then, after commas, other names that lead to it (of a proxy)
    port: int = 8000              # 0: any that is free
    browser: bool = True          # open the page
    data: str = ''                # folder of the held-out clips; not needed for lowpoly and doom
    device: str = 'auto'
    dtype: str = 'float32'        # float32 | bfloat16

# -----------------------------------------------------------------------------
# a checkpoint, and the world that it was trained on

DISTILLED = ('ode', 'ode-bidirectional', 'cd', 'dmd')     # stages whose models need few steps


def load(path, device, data='', chunks=(0, 0)):
    """(DiT, header, codec) of a checkpoint. Its header says what clips it was trained on, and how many
    latents it denoises together. If it does not, as in a file from elsewhere, the clips are taken to be like
    those in the folder `data`, and `chunks` is (chunk, first_chunk)."""
    model, header = load_model(path, device, chunks=chunks)
    trained = model.cfg.chunk, model.cfg.first_chunk
    for flag, asked, n in zip(('chunk', 'first_chunk'), chunks, trained):
        if asked not in (0, n):
            raise BadInput(f'--{flag} {asked}: {path} was trained with {n}: leave the flag out')
    if not describes_clips(header.get('data')):
        if not data:
            raise BadInput(f'{path}: it does not say what clips it was trained on: '
                           'name a folder of clips like them, --data')
        header['data'] = load_manifest(data)
        if not describes_clips(header['data']):
            raise BadInput(f'--data {data}: no folder of clips: its manifest does not say how large they are')
    return model, header, find_codec(header['data']['recipe'].get('wan', ''), str(device))


def describes_clips(manifest):
    """Does it say of which world and size clips are?"""
    match manifest:
        case {'recipe': {'world': str(), 'height': int(), 'width': int()}}:
            return True
    return False


def usual_steps(header):
    """Steps a chunk where the user names none."""
    return 4 if header['stage'] in DISTILLED else 8


def prepare(cfg):
    """(DiT, header, codec, device) as cfg asks for them, for inference. Fills in cfg.steps if it is 0."""
    device, dtype = pick_device(cfg.device, cfg.dtype)
    chunks = getattr(cfg, 'chunk', 0), getattr(cfg, 'first_chunk', 0)         # experiments have no such flags
    model, header, codec = load(cfg.ckpt, device, cfg.data, chunks)
    if header['stage'] == 'wan' and cfg.steps == 0:
        print('8 Euler steps a chunk; if it is distilled, say --steps 4')
    cfg.steps = cfg.steps or usual_steps(header)
    return model.to(dtype).eval(), header, codec, device


def held_out(cfg, header, indices, frames=1):
    """Held-out clips as data.py makes them: (dict of tensors with n rows, n captions).

    Lowpoly's are rendered here, only the first `frames` frames of each (a longer path begins in the same
    way). Others are read from a folder. If that has fewer clips than are asked for, each comes once.
    """
    recipe = header['data']['recipe']
    if recipe['world'] == 'lowpoly' and 'wan' not in recipe:
        try:
            clips = DataConfig(**recipe | {'frames': frames})
            check_limits(clips)
        except (TypeError, BadInput) as e:
            raise BadInput(f'{cfg.ckpt}: made by another version of this code ({e})') from None
        return lowpoly_clips(clips, 1, indices)
    folder = cfg.data
    if not folder:
        if recipe['world'] != 'doom':
            raise BadInput(f'{cfg.ckpt} was trained on clips of yours: name their folder, --data')
        folder = 'data/doom' if os.path.exists('data/doom') else 'assets/doom'
    clips = Clips(folder, 'val')
    indices = sorted({i % len(clips) for i in indices})
    world = {}
    for key in ('frames', 'c2w', 'K'):
        world[key] = torch.stack([clips.read(i, [key])[0] for i in indices])
    world |= {key: world[key].float() for key in ('c2w', 'K')}
    H, W = recipe['height'], recipe['width']
    if world['frames'].shape[2:4] != (H, W):
        raise BadInput(f'{cfg.ckpt} is of {H} x {W} pixels, the clips in {folder} are not: '
                       'name others, --data')
    return world, [clips.captions[i] for i in indices]


def load_picture(path, height, width):
    """Any picture file -> (1, height, width, 3) uint8, centre-cropped to the aspect and resized."""
    try:
        picture = to_rgb(ImageOps.exif_transpose(Image.open(path)))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise BadInput(f'--first {path}: not a readable picture ({e}); '
                       'say world, prompt, or name a picture') from None
    picture = ImageOps.fit(picture, (width, height), Image.LANCZOS)
    return torch.from_numpy(np.array(picture))[None]


def first_latents(first, world, codec, recipe, device):
    """Latents (1, 1, C, H / 8, W / 8) of a walk's first frame; None where it is generated from the prompt."""
    if first == 'prompt':
        return None
    if first == 'world':
        picture = world['frames'][:, 0]
    else:
        picture = load_picture(first, recipe['height'], recipe['width'])
    return codec.encode(picture[:, None]).to(device)

# -----------------------------------------------------------------------------
# generating

def sampler(cfg, header, shift):
    """The options of `rollout` for this checkpoint: Euler steps or, after distillation, a few steps with
    fresh noise between them."""
    stage = header['stage']
    few_steps = stage in DISTILLED or (stage == 'wan' and cfg.steps <= 4)
    return dict(
        times=schedule(cfg.steps, shift),
        first_times=schedule(max(4, cfg.steps), shift),
        guidance=cfg.guidance,
        over=cfg.over,
        renoise=few_steps,
        window=cfg.window or header['frames'],
        context=cfg.context if cfg.context >= 0 else header.get('context', 0.0),
    )


def check_numbers(z, path):
    """Raise BadInput if the latents that a checkpoint generates are not finite."""
    if not z.isfinite().all():
        raise BadInput(f'{path}: what it generates is no numbers: did its training go wrong? Else try '
                       'less --guidance, or --dtype float32')


@torch.inference_mode()
def generate(model, cfg, header, codec, c2w, K, captions, first, noise):
    """Pictures (B, F', H, W, 3) in [0, 1] along the paths c2w (B, F, 4, 4) with intrinsics K (B, 4). F' is F,
    or 4 F - 3 with Wan's codec. first: latents of frame 0, or None. noise: made by data.noise_for."""
    text = codec.embed(captions, model.cfg, first).to(c2w.device)
    null_text = codec.embed([''] * len(captions), model.cfg, first).to(text) if cfg.over == 'text' else None
    K = K[:, None].expand(-1, c2w.shape[1], -1)           # (B, F, 4)
    z = rollout_clip(model, c2w, K, text, noise=noise, first_frame=first,
                     null_text=null_text, **sampler(cfg, header, model.cfg.shift))
    check_numbers(z, cfg.ckpt)
    return torch.cat([codec.decode(video) for video in z.split(1)])   # one by one: memory


def to_uint8(pictures):
    """Pictures in [0, 1], a tensor on any device -> uint8 numpy array."""
    return (pictures * 255).round().byte().cpu().numpy()


def exact_views(lowpoly, c2w, K, H, W):
    """What poses c2w (1, F, 4, 4) really show in a Lowpoly of one world: pictures (F, H, W, 3) uint8."""
    K = K[:, None].expand(-1, c2w.shape[1], -1)
    pictures, _ = lowpoly.render(c2w, K, H, W)
    return to_uint8(pictures[0])

# -----------------------------------------------------------------------------
# to a file

def draw_key(pen, x, y, size, key, held):
    """One key of the keyboard, `size` pixels wide, bright if it is among those held."""
    box = (0, 0, 0, 90)                                   # red, green, blue, opacity
    letter = (255, 255, 255, 160)
    if key in held:
        box = (255, 255, 255, 230)
        letter = (0, 0, 0, 255)
    centre = (x + size / 2 - 1, y + size / 2 - 1)
    pen.rounded_rectangle((x, y, x + size - 3, y + size - 3), size // 5, box)
    pen.text(centre, key.upper(), letter, anchor='mm', font_size=int(size * .6))


def draw(picture, held):
    """A picture (H, W, 3) uint8, enlarged to about 384 rows, and the keyboard; the keys in `held` are lit."""
    scale = max(1, 384 // len(picture))
    H, W = picture.shape[0] * scale, picture.shape[1] * scale
    image = Image.fromarray(picture).resize((W, H), Image.BICUBIC)
    pen = ImageDraw.Draw(image, 'RGBA')
    size = H // 14
    for left, upper, lower in ((size // 2, 'w', 'asd'), (W - 7 * size // 2, 'i', 'jkl')):
        draw_key(pen, left + size, H - 5 * size // 2, size, upper, held)
        for column, key in enumerate(lower):
            draw_key(pen, left + column * size, H - 3 * size // 2, size, key, held)
    return np.array(image)


@functools.lru_cache
def video_codec():
    """The codec for mp4 that ffmpeg has here, and its options. Not every build has libx264."""
    try:
        from imageio_ffmpeg import get_ffmpeg_exe
        for codec, options in ('libx264', ['-crf', '18']), ('mpeg4', ['-q:v', '2']):
            command = f'-v error -f rawvideo -pix_fmt rgb24 -s 64x64 -i - -vcodec {codec} -f null -'.split()
            trial = subprocess.run([get_ffmpeg_exe(), *command], input=bytes(12288), capture_output=True)
            if trial.returncode == 0:
                return codec, options
        why = trial.stderr.decode().strip().rpartition('\n')[2]
    except (ImportError, RuntimeError, OSError) as e:
        why = e
    raise BadInput(f'no mp4 without a working ffmpeg ({why}): pip install "imageio[ffmpeg]", or write a .gif')


def video_options(path, fps):
    """What imageio is told for a video of this name."""
    extension = os.path.splitext(path)[1].lower()
    if extension == '.gif':
        return dict(duration=1000 / fps, loop=0)
    if extension != '.mp4':
        raise BadInput(f'--out {path}: end it in .mp4 or .gif')
    codec, quality = video_codec()
    return dict(is_batch=True, fps=fps, codec=codec, macro_block_size=2, output_params=quality)


def write_video(path, pictures, fps):
    """Write pictures (H, W, 3) uint8, a list or a generator, as .mp4 or .gif. Failing leaves the old."""
    options = video_options(path, fps)
    extension = os.path.splitext(path)[1].lower()
    with written_whole(path, extension) as tmp:
        if extension == '.gif':                           # whole: Pillow has more to say on a full disk
            film = iio.imwrite('<bytes>', pictures, extension=extension, **options)
            pathlib.Path(tmp).write_bytes(film)
        else:
            iio.imwrite(tmp, pictures, **options)
        next(iio.imiter(tmp))                             # on a full disk ffmpeg breaks off without a word


def read_path(cfg, header, model_cfg):
    """The path that --poses or --keys describe, in whole chunks: c2w (1, F, 4, 4) relative to its start, and
    the keys held in each of the F frames."""
    if cfg.poses:
        from worlds.poses import doubts, poses_to_keys, read_poses
        poses = read_poses(cfg.poses)
        c2w = poses.c2w.float()
        for note in doubts(poses, None, 1, 1):
            print(f'warning: {cfg.poses}: {note}')
        keys = poses_to_keys(relative(c2w[None])[0])
    else:
        keys = parse_keys(cfg.keys)
        c2w = keys_to_poses(keys)
        if header['stage'] == 'wan' and model_cfg.camera.startswith('prope'):       # they know minWM's steps
            from worlds.poses import minwm_poses
            c2w = minwm_poses(cfg.keys)
    c2w = relative(c2w[None])
    keys = [''] + keys                                    # frame 0 is the start
    rest = (len(keys) - model_cfg.first_chunk) % model_cfg.chunk
    whole = len(keys) - rest
    if rest:
        left_out = ','.join(key or '-' for key in keys[whole:])
        print(f'{whole} of {len(keys)} frames: the last {rest} do not fill a chunk of {model_cfg.chunk} and '
              f'are left out (keys {left_out})')
    return c2w[:, :whole], keys[:whole]


def walk_to_file(cfg):
    """Write the video of a walk along --poses or --keys."""
    model, header, codec, device = prepare(cfg)
    recipe = header['data']['recipe']
    H, W = recipe['height'], recipe['width']
    world, captions = held_out(cfg, header, [cfg.clip])
    c2w, keys = read_path(cfg, header, model.cfg)
    if model.cfg.first_chunk > 1 and cfg.first != 'prompt':
        raise BadInput(f'{cfg.ckpt} makes its first {model.cfg.first_chunk} latents together, '
                       'from the prompt: use --first prompt')
    if cfg.truth and (recipe['world'] != 'lowpoly' or codec.stride > 1 or cfg.first != 'world'):
        raise BadInput('--truth True: only lowpoly, started from its own frame, can be rendered exactly')
    first = first_latents(cfg.first, world, codec, recipe, device)
    prompt = cfg.prompt or captions[0]
    noise = noise_for([cfg.seed], (model.cfg.in_dim, H // codec.across, W // codec.across), device)
    K = world['K'].to(device)
    video = generate(model, cfg, header, codec, c2w.to(device), K, [prompt], first, noise)[0]

    keys = keys[:1] + [held for held in keys[1:] for _ in range(codec.stride)]   # of each picture
    pictures = [draw(picture, held) for picture, held in zip(to_uint8(video), keys)]
    if cfg.truth:
        lowpoly = Lowpoly(world['plan'].tolist(), world['palette'].tolist())
        c2w = world['c2w'][:, :1] @ c2w
        h, w, _ = pictures[0].shape
        exact = exact_views(lowpoly, c2w, world['K'], h // 2, w // 2)
        exact = exact.repeat(2, 1).repeat(2, 2)           # (F, h, w, 3)
        pictures = [np.concatenate(pair, 1) for pair in zip(exact, pictures)]
    write_video(cfg.out, pictures, cfg.fps)
    print(f'{cfg.out}: {len(pictures)} frames, {cfg.steps} steps a frame')

# -----------------------------------------------------------------------------
# live: a browser steers. The main thread generates; the server's threads hear keys and send pictures

class Held:
    """Time-stamped edges of keys -> the seconds for which each key moves the next frame. The frame looks one
    period ahead, so that the first frame after a key already shows a whole frame's motion."""

    def __init__(self):
        self.since = {}               # key: when it went down, or up to when its motion is paid out
        self.owed = {}                # key: seconds that the next frame must still move
        self.stamp = None

    def edge(self, key, down, now, stamp=None):
        """A key went down or up. stamp: the page's own clock, sent back with the first frame it moves."""
        if down:
            self.since.setdefault(key, now)
        elif key in self.since:
            self.owed[key] = self.owed.get(key, 0) + max(0, now - self.since.pop(key))
        if self.stamp is None:
            self.stamp = stamp

    def take(self, now, period):
        """({key: seconds}, stamp) for what is made now and shown for `period` seconds."""
        for key, since in self.since.items():
            self.owed[key] = self.owed.get(key, 0) + max(0, now + period - since)
            self.since[key] = now + period
        taken = self.owed, self.stamp
        self.owed = {}
        self.stamp = None
        return taken


class Walker:
    """Where the live camera is. Keys move it at these speeds, walls stop it."""
    METRES, DEGREES = 2.0, 75.0       # a second
    LONGEST = .125                    # seconds of motion in a frame: 0.25 m or 10 degrees, as in training

    def __init__(self, c2w, plan):
        """c2w: 4 x 4 lists. plan: of make_plan, or None where there are no walls."""
        yaw = math.atan2(c2w[0][2], c2w[2][2])
        pitch = -math.asin(c2w[1][2])
        self.state = [row[3] for row in c2w[:3]], math.degrees(yaw), math.degrees(pitch)
        self.plan = plan
        self.metres = 0.              # walked so far

    def step(self, seconds):
        """One frame; seconds: {key: for how long it moves}. Returns the new pose, c2w (4, 4)."""
        for key, s in seconds.items():
            new = apply_keys(*self.state, key, self.METRES * s, self.DEGREES * s)
            x, _, z = new[0]
            if self.plan is None or free(self.plan, x, z):
                self.metres += math.dist(new[0], self.state[0])
                self.state = new
        return make_pose(*(torch.tensor(x, dtype=torch.float32) for x in self.state))


# one frame of a live path: its pose (4, 4), the keys that moved it, the page's clock at the first of them
Step = collections.namedtuple('Step', 'c2w keys stamp')


def short_name(path):
    """'out/dmd.safetensors' -> 'dmd': how the page names a checkpoint."""
    return os.path.basename(path).removesuffix('.safetensors')


def to_jpeg(picture):
    """A picture (H, W, 3) uint8 -> the bytes of a JPEG, a twentieth to a quarter as many."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, 'jpeg', quality=95, subsampling=0)
    return file.getvalue()


def message(pictures=b'', **header):
    """What is sent to the page: a line of JSON, then bytes."""
    return json.dumps(header).encode() + b'\n' + pictures


def is_number(x, below):
    """Whether x is a number in [0, below): neither NaN nor True, which is a 1 in Python."""
    return type(x) in (int, float) and 0 <= x < below


class Live:
    """One walk, steered from the newest tab. `run` is the main thread; the server runs `tab` in threads."""
    MOST_UNDER_WAY = 2                # messages that the page has not shown yet: more would be a lag

    def __init__(self, cfg, device, dtype):
        self.cfg = cfg
        self.device = device
        self.dtype = dtype
        beside = glob.glob(os.path.join(os.path.dirname(cfg.ckpt), '*.safetensors'))
        paths = [cfg.ckpt] + sorted(beside)
        self.ckpts = {short_name(path): path for path in paths if '.resume.' not in path}
        self.model = self.kind = None
        self.asked = {}               # what the page has wished for so far

        self.change = threading.Condition()               # guards all that follows
        self.tape = collections.deque(maxlen=180 * cfg.fps)  # (JPEG, keys) of the last 3 minutes
        self.held = Held()
        self.newest_tab = None        # the last that asked to open: threads may start in another order
        self.owner = None             # the tab that steers
        self.under_way = 0            # messages with pictures that the owner has not shown yet
        self.paused = self.truth = False
        self.wish = dict(ckpt=short_name(cfg.ckpt), steps=cfg.steps,
                         prompt=cfg.prompt, clip=cfg.clip, start=cfg.first)
        self.newest = b''             # message to the tab, the count-th
        self.count = 0

    # the main thread

    @torch.inference_mode()
    def run(self):
        """Walk after walk. Each lasts until the page wishes for something else. The next continues from the
        newest picture, unless the page wants another start or the new model's world is of another kind."""
        while True:
            with self.change:
                wish, self.wish = self.wish, {}
            if 'ckpt' in wish:
                self.change_model(wish.pop('ckpt'))
            self.asked |= wish
            recipe = self.header['data']['recipe']
            H, W = recipe['height'], recipe['width']
            kind = recipe['world'], H, W, self.codec.stride, self.model.cfg.first_chunk
            if self.kind != kind:
                self.kind = kind
                self.latents = None
                self.tape.clear()
            if self.latents is None or 'start' in wish:
                self.begin(recipe)
            self.walk(H, W)

    def change_model(self, name):
        """Load the checkpoint of this name. If it is bad the page hears why, and the model before stays."""
        path = self.ckpts[name]
        try:
            chunks = self.cfg.chunk, self.cfg.first_chunk
            model, header, codec = load(path, self.device, self.cfg.data, chunks)
            held_out(replace(self.cfg, ckpt=path), header, [0])  # are there clips to start from?
        except (BadInput, OSError) as e:
            if self.model is None:
                raise
            self.tell(str(e))
            return
        self.model = model.to(self.dtype).eval()
        self.header = header
        self.codec = codec
        self.asked['ckpt'] = name

    def begin(self, recipe):
        """Go to the start that is asked for: a held-out clip's first frame, a picture, or a prompt."""
        world, captions = held_out(self.cfg, self.header, [self.asked['clip']])
        first = 'prompt' if self.model.cfg.first_chunk > 1 else self.asked['start']
        self.latents = first_latents(first, world, self.codec, recipe, self.device)
        plan = self.exact = None
        if recipe['world'] == 'lowpoly' and self.codec.stride == 1:
            plan = make_plan(int(world['plan']))
            self.exact = Lowpoly(world['plan'].tolist(), world['palette'].tolist())
        self.walker = Walker(world['c2w'][0, 0].tolist(), plan)
        self.K = world['K']
        self.caption = captions[0]
        self.frame = 0                # pictures so far

    def walk(self, H, W):
        """One rollout, from self.latents on. Publishes its pictures and leaves the newest latents."""
        m = self.model.cfg
        codec = self.codec
        cfg = replace(self.cfg, steps=self.asked['steps'] or usual_steps(self.header))
        prompt = self.asked['prompt'] or self.caption
        text = codec.embed([prompt], m, self.latents).to(self.device)
        null_text = codec.embed([''], m, self.latents).to(text) if cfg.over == 'text' else None
        size = m.in_dim, H // codec.across, W // codec.across
        noise = noise_for([(cfg.seed, self.frame)], size, self.device)
        decode = codec.stream()
        path = []                     # the newest Steps; `cameras` adds to it
        chunks = rollout(self.model, self.cameras(path), text, noise=noise, first_frame=self.latents,
                         null_text=null_text, **sampler(cfg, self.header, m.shift))
        for z in chunks:
            check_numbers(z, self.ckpts[self.asked['ckpt']])
            pictures = to_uint8(decode(z)[0])             # (n, H, W, 3)
            shown = [step for step in path[-z.shape[1]:] for _ in range(codec.stride)]
            shown = shown[-len(pictures):]                # the Step of each picture
            del path[:-1]
            self.frame += len(pictures)
            frames = [(to_jpeg(picture), step.keys) for picture, step in zip(pictures, shown)]
            with self.change:
                self.tape.extend(frames)
            if self.truth and self.exact is not None:
                c2w = torch.stack([step.c2w for step in shown])[None]
                exact = exact_views(self.exact, c2w, self.K, H, W)
                pictures = np.concatenate([pictures, exact], 2)
            self.publish(
                pictures.tobytes(), n=len(pictures), h=H, w=pictures.shape[2], frame=self.frame - 1,
                stamp=shown[0].stamp, metres=self.walker.metres, steps=cfg.steps,
                ckpt=self.asked['ckpt'], clip=self.asked['clip'], prompt=prompt)
        # what the next walk continues from
        if codec.stride == 1:
            self.latents = z[:, -m.first_chunk:]
        elif m.first_chunk == 1:      # a latent of Wan's is four pictures, but a walk's first is one
            self.latents = codec.encode(torch.from_numpy(pictures[None, -1:]))
        else:
            self.latents = None

    def cameras(self, path):
        """A Camera for each chunk, when it is due and keys have moved it. The first is the start, at once.
        Ends when the page wishes for something else. The Step of each frame is appended to path."""
        m = self.model.cfg
        stride = self.codec.stride
        seconds = {}
        stamp = None
        n = m.first_chunk
        due = 0.
        while True:
            period = n * stride / self.cfg.fps
            if path:
                heard = self.wait_for_keys(due, period)
                if heard is None:
                    return
                seconds, stamp = heard
            due = max(due, time.perf_counter()) + period
            each = {key: min(s / n, Walker.LONGEST * stride) for key, s in seconds.items()}
            for _ in range(n):
                path.append(Step(self.walker.step(each), ''.join(seconds), stamp))
            c2w = torch.stack([step.c2w for step in path[-n:]])[None]  # (1, n, 4, 4)
            K = self.K[:, None].expand(-1, n, -1)
            yield Camera(c2w.to(self.device), K.to(self.device))
            n = m.chunk

    def wait_for_keys(self, due, period):
        """Wait until a chunk is due, then take the keys for it. None if the page wishes for something else.
        With no tab, a paused one, or no key held the world stands still and costs nothing."""
        with self.change:
            while not self.wish:
                still = self.owner is None or self.paused or not (self.held.since or self.held.owed)
                rest = due - time.perf_counter()
                if not still and rest <= 0:
                    return self.held.take(time.perf_counter(), period)
                self.change.wait(1 if still else rest)
        return None

    def publish(self, pictures, **header):
        """Lay pictures out for `send`."""
        with self.change:
            self.newest = message(pictures, **header)
            self.count += 1
            self.change.notify_all()

    def tell(self, error):
        """Tell the tab that steers what went wrong. However slow it is, nothing waits for it."""
        with self.change:
            owner = self.owner
        if owner:
            in_background(lambda ws: ws.send(message(error=error)), owner)

    # the server's threads

    def tab(self, ws):
        """One tab from open to close. It takes the walk over from the tab before."""
        from websockets.exceptions import ConnectionClosed
        with self.change:
            if ws is self.newest_tab:
                self.owner = ws
                self.held = Held()
                self.under_way = 0
                self.paused = self.truth = False
                self.change.notify_all()
        try:
            # KEYS without u and o: the worlds are flat
            ws.send(json.dumps(dict(ckpts=list(self.ckpts), fps=self.cfg.fps, keys=KEYS[:-2])))
            in_background(self.send, ws)
            for text in ws:
                self.hear(ws, json.loads(text))
        except (ValueError, TypeError, RecursionError):
            ws.close(1003, 'not understood')
        except ConnectionClosed:
            pass
        finally:
            with self.change:
                if self.owner is ws:
                    self.owner = None
                    self.held = Held()
                self.change.notify_all()

    def hear(self, ws, message):
        """What the page says. Anything that is not of these forms raises ValueError."""
        with self.change:
            if self.owner is not ws:
                return                                    # an older tab, until it is closed
            match message:
                case {'key': str(key), 'down': bool(down), 't': t} if key in [*KEYS] and is_number(t, 1e15):
                    self.held.edge(key, down, time.perf_counter(), t)
                case {'seen': True} if self.under_way:
                    self.under_way -= 1
                case {'pause': bool(on)}:
                    self.paused = on
                case {'truth': bool(on)}:
                    self.truth = on
                case {'save': True}:
                    in_background(self.save, ws)          # keys are heard meanwhile
                case {'steps': 1 | 2 | 4 | 8 as steps} if type(steps) is int:
                    self.wish['steps'] = steps
                case {'ckpt': str(name)} if name in self.ckpts:
                    self.wish['ckpt'] = name
                case {'prompt': str(prompt)} if len(prompt.encode()) < 2000:
                    self.wish['prompt'] = prompt
                case {'start': 'world' | 'prompt' as start, 'clip': int(clip)} if is_number(clip, 2 ** 31):
                    if start == 'world' and clip == self.cfg.clip:
                        start = self.cfg.first            # restart: where it all began
                    if start == 'world':
                        self.wish['prompt'] = self.cfg.prompt
                    self.wish |= {'start': start, 'clip': clip}
                case _:
                    raise ValueError(f'not understood: {message}')
            self.change.notify_all()

    def send(self, ws):
        """Send the newest picture, again and again. A slow page misses some, but what it shows is new."""
        sent = 0
        while True:
            with self.change:
                self.change.wait_for(lambda: self.owner is not ws or
                                     self.count > sent and self.under_way < self.MOST_UNDER_WAY)
                if self.owner is not ws:
                    break
                sent = self.count
                self.under_way += 1
                newest = self.newest
            ws.send(newest)
        ws.close(4000, 'the walk goes on in another tab')     # which takes a hung tab ten seconds

    def save(self, ws):
        """Send the last three minutes of the walk, as an mp4 with the keys drawn on it."""
        with self.change:
            tape = list(self.tape)
        pictures = (draw(np.array(Image.open(io.BytesIO(jpeg))), keys) for jpeg, keys in tape)
        try:
            with tempfile.TemporaryDirectory() as folder:
                write_video(f'{folder}/walk.mp4', pictures, self.cfg.fps)
                film = pathlib.Path(folder, 'walk.mp4').read_bytes()
        except (BadInput, OSError) as e:
            return ws.send(message(error=f'not saved: {e}'))
        ws.send(message(film, mp4=True))


def in_background(work, ws):
    """Run work(ws) in a thread, which may end with the connection."""
    from websockets.exceptions import ConnectionClosed

    def thread():
        try:
            work(ws)
        except ConnectionClosed:
            pass

    threading.Thread(target=thread, daemon=True).start()

# -----------------------------------------------------------------------------
# live: the server

LOOPBACK = '127.0.0.1', '::1', 'localhost'
EVERYWHERE = '', '0.0.0.0'            # --host: at every address of this machine


def refusal(headers, address, names):
    """Why a request with these headers is refused; '' if it is not. Only pages that this server gave out may
    steer: a foreign name for this machine is DNS rebinding. address: where it is served. names: others that
    lead here, by way of a proxy."""
    host = headers.get('Host', '').lower()
    name = re.sub(r':\d+$', '', host).strip('[]')
    known = name in (address, *names, *LOOPBACK, socket.gethostname().lower())
    numeric = address in EVERYWHERE and re.fullmatch(r'[\d.]+', name)         # no name, so no foreign one
    if not known and not numeric:
        return f'this walk is not at {name!a}: if that leads here, start it with --host {address},NAME'
    origin = headers.get('Origin')
    pages = [scheme + place for scheme in ('http://', 'https://') for place in (host, *names)]
    if origin is not None and origin.lower() not in pages:
        return f'{origin!a} is not a page of this walk: if it is, start it with --host {address},NAME'
    return ''


def live(cfg):
    """Serve the page and the walk at http://127.0.0.1:8000 until Ctrl-C."""
    try:
        from websockets.sync.server import ServerConnection, serve
    except ImportError:
        ServerConnection = None
    if not hasattr(ServerConnection, 'respond'):        # since version 13
        raise BadInput('--live needs websockets 13 or newer: pip install --upgrade websockets')
    device, dtype = pick_device(cfg.device, cfg.dtype)
    if device.type == 'cpu' and 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(max(1, cpu_cores() // 2))   # more would stutter beside the browser
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))  # Ctrl-C: at once, whatever the threads do
    walk = Live(cfg, device, dtype)
    page = (pathlib.Path(__file__).parent / 'assets/stream.html').read_text()
    address, *names = cfg.host.lower().replace(' ', '').split(',')
    if address not in LOOPBACK:
        print(f'warning: whoever can reach {address or "this machine"} can steer this walk')

    def answer(ws, request):
        """The page, or None for its WebSocket, which goes on to `tab`. Nothing in a request names a file; a
        proxy may put a path of its own before ours."""
        why = refusal(request.headers, address, names)
        if why:
            print(why, flush=True)
            return ws.respond(403, why)
        path = request.path.split('?')[0]
        if path.endswith('/walk') and 'Origin' in request.headers:
            walk.newest_tab = ws
            return None
        response = ws.respond(200, page)
        del response.headers['Content-Type']
        response.headers['Content-Type'] = 'text/html; charset=utf-8'
        response.headers['X-Frame-Options'] = 'DENY'      # no page of another site around this one
        return response

    quiet = logging.getLogger('stream')
    quiet.setLevel(logging.CRITICAL)
    try:
        server = serve(walk.tab, address, cfg.port, process_request=answer, compression=None, max_size=2048,
                       logger=quiet)
    except (OSError, OverflowError) as e:
        raise BadInput(f'--host {address} --port {cfg.port}: {e}: name others; '
                       '--port 0 is any that is free') from None
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        shown = 'localhost' if address in EVERYWHERE else address
        url = f'http://{shown}:{server.socket.getsockname()[1]}/'
        print(f'{url}  (Ctrl-C ends the walk)', flush=True)
        screen = sys.platform != 'linux' or 'DISPLAY' in os.environ or 'WAYLAND_DISPLAY' in os.environ
        if cfg.browser and screen:
            webbrowser.open(url)
        walk.run()


def main(cfg):
    parse_keys(cfg.keys)                                  # complain before the work
    cfg.fps = cfg.fps or (25 if cfg.live else 8)
    if cfg.live:
        live(cfg)
    else:
        video_options(cfg.out, cfg.fps)                   # complain before the work
        check_folder(os.path.dirname(cfg.out) or '.')
        walk_to_file(cfg)


if __name__ == '__main__':
    command_line(main, Config, __doc__)
