"""
Walk through a trained world, score it, time it.

    python stream.py --live True                                                 # with the keyboard, in the browser
    python stream.py --keys "w*8,wl*8"                                           # out/walk.mp4, keys drawn on it
    python stream.py --ckpt out/ar.safetensors --steps 16 --first picture.png    # another checkpoint; from any picture
    python stream.py --ckpt out/ar.safetensors --first prompt --prompt "day sky green floor red and blue walls"
    python stream.py --ckpt out/ar.safetensors --score out/score.json            # 64 held-out paths against the truth
    python stream.py --score out/long.json --frames 1000 --paths 8               # drift; --first prompt: text to world
    python stream.py --ckpt out/ar.safetensors --bench out/bench.json            # frames a second, latency, memory

    w s  forward, back        j l  look left, right        a key is 0.25 m or 10 degrees; "wl*8" holds w and l
    a d  left, right          i k  look up, down           for 8 frames; "*4" stands still for 4
"""
import collections
import contextlib
import glob
import json
import logging
import math
import os
import pathlib
import resource
import signal
import sys
import tempfile
import threading
import time
import webbrowser
from dataclasses import dataclass, replace

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch.utils.benchmark import Timer

from camera import (KEYS, BadInput, Camera, invert, keys_to_poses, make_pose, minwm_poses, move, parse_keys, pose_error, poses_to_keys, rays, relative)
from data import (ARENA, Clips, Lowpoly, find_codec, frechet, free, load_manifest, load_poses, lowpoly_clips, make_plan, motion, noise_for,
                  psnr, sharpness, write_strip)
from data import Config as DataConfig
from model import command_line, flops, load_model, pick_device, rollout, schedule, walk_clip


@dataclass
class Config:
    ckpt: str = 'checkpoints/dmd.safetensors'
    # the walk
    keys: str = 'w*4,wl*4,w*4,j*4'
    poses: str = ''               # instead of keys: JSON, a list of 4x4 c2w or minWM's {"0": {"extrinsic": c2w}, ...}
    first: str = 'world'          # frame 0: world (held-out clip --clip), prompt (dreamt), or a picture file
    clip: int = 0
    prompt: str = ''              # empty: the clip's own caption
    out: str = 'out/walk.mp4'     # .mp4 or .gif
    truth: bool = False           # lowpoly: the exact render beside the dream
    fps: int = 0                  # 0: 8 to a file, 25 live
    # sampling
    steps: int = 0                # steps a chunk; 0: 8 of Euler, or 4 for a distilled model
    guidance: float = 1.0         # 1: none
    over: str = 'camera'          # what guidance drops: camera | text
    window: int = 0               # frames the cache holds; 0: as trained
    context: float = -1.0         # noise level of the walk's own history; -1: as distilled
    seed: int = 0
    # instead of a walk to a file
    live: bool = False            # in the browser
    host: str = '127.0.0.1'
    port: int = 8000              # 0: any that is free
    browser: bool = True          # open the page
    score: str = ''               # file for the scores
    frames: int = 0               # frames of a scored path (0: as trained), or of the timing (0: 2,100)
    paths: int = 64               # scored paths
    bench: str = ''               # file for the timings
    data: str = ''                # folder with the held-out clips (lowpoly's are rendered anew, doom's are data/doom)
    device: str = 'auto'
    dtype: str = 'float32'        # float32 | bfloat16

# -----------------------------------------------------------------------------
# the world that a checkpoint was trained on

def load(path, device, data=''):
    """(DiT, header, codec) of a checkpoint that says what world it knows; one from elsewhere is shown that of the folder `data`."""
    model, header = load_model(path, device)
    if 'data' not in header:
        if not data:
            raise BadInput(f'{path}: it does not say what clips it was trained on: name a folder of clips like them, --data')
        header['data'] = load_manifest(data)
    return model, header, find_codec(header['data']['recipe'].get('wan', ''), str(device))


def held_out(cfg, header, indices, frames=1):
    """Held-out clips as data.py makes them, as many of them as there are: (dict of tensors with leading dim n, captions). Of
    lowpoly's only the first `frames` frames are rendered: the same paths, however long they go on."""
    recipe = header['data']['recipe']
    if recipe['world'] == 'lowpoly' and 'wan' not in recipe:
        return lowpoly_clips(DataConfig(**recipe | {'frames': frames}), 1, indices)
    if not cfg.data and recipe['world'] != 'doom':
        raise BadInput(f'{cfg.ckpt} was trained on clips of yours: name their folder, --data')
    clips = Clips(folder := cfg.data or ('data/doom' if os.path.exists('data/doom') else 'assets/doom'), 'val')
    keys = ('frames', 'c2w', 'K')
    indices = sorted({i % len(clips) for i in indices})
    rows = [clips.read(i, keys) for i in indices]
    if rows[0][0].shape[1:3] != (recipe['height'], recipe['width']):
        raise BadInput(f'{cfg.ckpt} is of {recipe["height"]} x {recipe["width"]} pixels, the clips in {folder} are not: name others, --data')
    return {k: torch.stack(x) for k, x in zip(keys, zip(*rows))}, [clips.captions[i] for i in indices]


def load_picture(path, height, width):
    """Any picture file -> (1, height, width, 3) uint8, centre-cropped to the aspect and resized."""
    try:
        picture = ImageOps.exif_transpose(Image.open(path)).convert('RGB')
    except (OSError, Image.DecompressionBombError) as e:
        raise BadInput(f'--first {path}: not a readable picture ({e}); say world, prompt, or name a picture') from None
    return torch.from_numpy(np.array(ImageOps.fit(picture, (width, height), Image.LANCZOS)))[None]

# -----------------------------------------------------------------------------
# walking

DISTILLED = 'ode', 'ode-bidirectional', 'cd', 'dmd'


def sampler(cfg, header, shift):
    """How `rollout` samples this checkpoint: Euler steps, or, after distillation, a few jumps with fresh noise between."""
    return dict(times=schedule(cfg.steps, shift), first_times=schedule(max(4, cfg.steps), shift), guidance=cfg.guidance, over=cfg.over,
                renoise=header['stage'] in DISTILLED or header['stage'] == 'wan' and cfg.steps <= 4, window=cfg.window or header['frames'],
                context=cfg.context if cfg.context >= 0 else header.get('context', 0.0))


@torch.inference_mode()
def walk(model, cfg, header, codec, c2w, K, captions, first, noise):
    """Pictures (B, F', H, W, 3) in [0, 1] along c2w (B, F, 4, 4), for walk and score; bench times the same rollout."""
    text, K = codec.embed(captions, model.cfg).to(c2w.device), K[:, None].expand(-1, c2w.shape[1], -1)
    z = walk_clip(model, c2w, K, text, noise=noise, first=first, **sampler(cfg, header, model.cfg.shift))
    return torch.cat([codec.decode(x) for x in z.split(1)])


def draw(picture, keys, scale):
    """A picture (H, W, 3) uint8, enlarged, with the keyboard on it; the keys that are held light up."""
    image = Image.fromarray(picture).resize((picture.shape[1] * scale, picture.shape[0] * scale), Image.BICUBIC)
    pen = ImageDraw.Draw(image, 'RGBA')
    size = image.height // 14
    for left, rows in ((size // 2, (' w ', 'asd')), (image.width - 7 * size // 2, (' i ', 'jkl'))):
        for r, row in enumerate(rows):
            for c, key in enumerate(row.strip().center(3)):
                if key == ' ':
                    continue
                x, y = left + c * size, image.height - (5 - 2 * r) * size // 2
                held = key in keys
                pen.rounded_rectangle((x, y, x + size - 3, y + size - 3), size // 5, (255, 255, 255, 230) if held else (0, 0, 0, 90))
                pen.text((x + size / 2 - 1, y + size / 2 - 1), key.upper(), (0, 0, 0, 255) if held else (255, 255, 255, 160),
                         anchor='mm', font_size=int(size * .6))
    return np.array(image)


def write_video(path, pictures, fps):
    """.mp4 or .gif from (H, W, 3) uint8 pictures, a list or a generator, written under a temporary name, then renamed."""
    end = os.path.splitext(path)[1]
    if end not in ('.mp4', '.gif'):
        raise BadInput(f'--out {path}: end it in .mp4 or .gif')
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    tmp = f'{path}.tmp{os.getpid()}{end}'
    mp4 = dict(is_batch=True, fps=fps, codec='libx264', macro_block_size=2, output_params=['-crf', '18'])
    iio.imwrite(tmp, pictures, **(dict(duration=1000 / fps, loop=0) if end == '.gif' else mp4))
    os.replace(tmp, path)


def walk_to_file(model, cfg, header, codec, device):
    recipe = header['data']['recipe']
    H, W = recipe['height'], recipe['width']
    world, captions = held_out(cfg, header, [cfg.clip])
    their_keys = header['stage'] == 'wan' and model.cfg.camera == 'prope'     # minWM's checkpoints know minWM's steps
    path = relative((load_poses(cfg.poses)[0] if cfg.poses else (minwm_poses if their_keys else keys_to_poses)(cfg.keys))[None])
    keys = [''] + (poses_to_keys(path[0]) if cfg.poses else parse_keys(cfg.keys))
    tail = (len(keys) - model.cfg.first) % model.cfg.chunk                    # a last, partial chunk is left out
    path, keys = path[:, :len(keys) - tail], keys[:len(keys) - tail]
    if model.cfg.first > 1 and cfg.first != 'prompt':
        raise BadInput(f'{cfg.ckpt} makes its first {model.cfg.first} latents together, from the prompt: use --first prompt')
    first = None
    if cfg.first != 'prompt':
        picture = world['frames'][:, 0] if cfg.first == 'world' else load_picture(cfg.first, H, W)
        first = codec.encode(picture[:, None]).to(device)
    noise = noise_for([cfg.seed], (model.cfg.in_dim, H // 8, W // 8), device)
    frames = walk(model, cfg, header, codec, path.to(device), world['K'].to(device), [cfg.prompt or captions[0]], first, noise)[0]
    keys = keys[:1] + [k for k in keys[1:] for _ in range(codec.stride)]
    scale = max(1, 384 // H)
    pictures = [draw(x, k, scale) for x, k in zip((frames * 255).round().byte().cpu().numpy(), keys)]
    if cfg.truth:
        if recipe['world'] != 'lowpoly' or codec.stride > 1 or cfg.first != 'world':
            raise BadInput('--truth True: only lowpoly, started from its own frame, can be rendered exactly')
        c2w = world['c2w'][:, :1] @ path
        exact = Lowpoly(world['plan'].tolist(), world['palette'].tolist()).render(
            c2w, world['K'][:, None].expand(-1, c2w.shape[1], -1), H * scale // 2, W * scale // 2)[0][0]
        exact = (exact * 255).round().byte().repeat_interleave(2, 1).repeat_interleave(2, 2).numpy()
        pictures = [np.concatenate(p, 1) for p in zip(exact, pictures)]
    write_video(cfg.out, pictures, cfg.fps)
    print(f'{cfg.out}: {len(pictures)} frames, {cfg.steps} steps a frame')

# -----------------------------------------------------------------------------
# scoring: where was this picture taken? Only for lowpoly, whose every view can be rendered

def locate(world, pictures, frame, start, K, metres=.25, degrees=10.):
    """Poses (M, 4, 4) at which the pictures (M, H, W, 3) of one lowpoly world were taken, by looking alone.

    frame (M,): which frame of a walk from `start` (4, 4) each picture is; K (4,). A bank of small views of the world, on a
    grid of 0.25 m x 10 degrees (yaw and pitch) over all that a walk can reach by that frame (frame + 2 key units), is
    searched; the four best views, after two steps the best of them, are refined by damped Gauss-Newton on (x, z, yaw,
    pitch) against small renders. Both times a pixel of squared error r costs r / (r + limit) (Geman and McClure 1985): what
    a dream made up, because nobody had looked there, is wrong however the camera stood, and must not pull. The commanded
    path is never looked at.
    """
    M, reach, N, limit = len(pictures), int(frame.max()) + 2, 4, .03
    robust = lambda r: (r / (r + limit)).sum(-1)
    small = lambda n: F.interpolate(pictures.movedim(-1, 1), (n, n), mode='area').movedim(1, -1)
    # the places, and one panorama of 6 degrees a cell from each, from which the views of all directions are read
    grid = torch.arange(-reach, reach + 1) * metres
    places = torch.stack(torch.meshgrid(grid, grid, indexing='ij'), -1).flatten(0, 1)               # (P, 2)
    o = start[:3, 3] + F.pad(places, (0, 1))[:, [0, 2, 1]]                                           # (P, 3)
    inside = (places.norm(dim=1) <= reach * metres + 1e-3) & (o[:, ::2].abs() < ARENA).all(1)
    places, o, yaw0 = places[inside], o[inside], torch.rad2deg(torch.atan2(start[0, 2], start[2, 2]))
    down, round_ = torch.meshgrid(torch.arange(-69., 70, 6), torch.arange(-177., 180, 6), indexing='ij')
    d = make_pose(torch.zeros(*down.shape, 3), yaw0 + round_, -down)[..., :3, 2].flatten(0, 1)       # (24 x 60, 3)
    panorama = world.shade(o[None].repeat_interleave(len(d), 1), d.repeat(len(o), 1)[None])[0].view(len(o), *down.shape, 3)
    n = min(reach, int(180 / degrees))
    turn, pitch = (x.flatten() for x in torch.meshgrid(torch.arange(-n, n + 1) * degrees, torch.arange(-3, 4) * degrees, indexing='ij'))
    v = torch.einsum('tij,hwj->thwi', make_pose(torch.zeros(len(turn), 3), turn, pitch)[:, :3, :3], rays(torch.eye(4), K, 8, 8)[1])
    i = ((torch.rad2deg(torch.asin(v[..., 1])) + 72) / 6).long().clamp(0, len(down) - 1)             # (T, 8, 8)
    j = ((torch.rad2deg(torch.atan2(v[..., 0], v[..., 2])) + 180) / 6).long() % down.shape[1]
    bank = panorama[:, i, j].flatten(0, 1).flatten(1, 2)                                             # (P T, 8 8, 3)
    far = torch.maximum(places.norm(dim=1)[:, None] / metres, turn.abs() / degrees).flatten() > frame[:, None] + 2.01
    q = small(8).flatten(1, 2)
    cost = torch.cdist(q.flatten(1), bank.flatten(1)).masked_fill(far, torch.inf)                    # (M, P T)
    best = cost.topk(min(2000, cost.shape[1]), 1, largest=False)[1]                                  # worth the robust cost
    cost = robust((bank[best] - q[:, None]).square_().sum(-1)).masked_fill(far.gather(1, best), torch.inf)
    best = best.gather(1, cost.topk(N, 1, largest=False)[1]).flatten()
    p, t = best // len(turn), best % len(turn)
    state = torch.stack([o[p][:, 0], o[p][:, 2], yaw0 + turn[t], pitch[t]], -1).double()             # (M N, 4)
    # refine them together; pictures are compared at 32 x 32, slightly blurred
    blur = lambda x: F.avg_pool2d(x.movedim(-1, 1), 3, 1, 1).movedim(1, -1).flatten(1, 2).double()   # (.., 32 32, 3)

    def look(s):
        at = torch.stack([s[:, 0], start[1, 3].double().expand(len(s)), s[:, 1]], -1)
        c2w = make_pose(at, s[:, 2], s[:, 3]).float()
        return blur(world.render(c2w[None], K.expand(1, len(s), 4), 32, 32, edges=.2)[0][0]), c2w
    target, (view, c2w) = blur(small(32)).repeat_interleave(N, 0), look(state)
    error, damp = (view - target).square().sum(-1), torch.full((M * N,), 1e-2, dtype=torch.float64)
    unit = torch.tensor([.04, .04, 1., 1.], dtype=torch.float64)                                     # steps of the Jacobian
    for step in range(7):
        if step == 2:
            best = robust(error).view(M, N).argmin(1) + N * torch.arange(M)
            state, view, c2w, error, damp, target = (x[best] for x in (state, view, c2w, error, damp, target))
        J = (look(torch.cat([state + unit * e for e in torch.eye(4).double()]))[0].unflatten(0, (4, -1)) - view).movedim(0, -1)
        weighted = ((1 + error / limit) ** -2)[..., None, None] * J                                    # d robust / d error
        A = torch.einsum('mpci,mpcj->mij', weighted, J)
        g = torch.einsum('mpci,mpc->mi', weighted, target - view)
        A = A + damp[:, None, None] * torch.diag_embed(A.diagonal(dim1=-2, dim2=-1) + 1e-6)
        new = state + unit * torch.linalg.solve(A, g).clamp(-10, 10)
        new_view, new_c2w = look(new)
        new_error = (new_view - target).square().sum(-1)
        better = robust(new_error) < robust(error)
        for old, fresh in ((state, new), (view, new_view), (c2w, new_c2w), (error, new_error)):
            old[better] = fresh[better]
        damp = torch.where(better, damp / 3, damp * 4)
    return c2w


def seen_mask(depth, c2w, K):
    """Which pixels of each frame show what frame 0 saw: (B, F, H, W) bool from distances, poses and K (B, 4)."""
    H, W = depth.shape[2:]
    o, d = rays(c2w, K[:, None].expand(-1, depth.shape[1], -1), H, W)
    point = o[:, :, None, None] + depth[..., None] * d
    w2c = invert(c2w[:, 0])
    p = torch.einsum('bij,bfhwj->bfhwi', w2c[:, :3, :3], point) + w2c[:, None, None, None, :3, 3]
    k = K[:, None, None, None]
    uv = p[..., :2] / p[..., 2:].clamp(min=1e-6) * k[..., :2] + k[..., 2:]
    inside = (p[..., 2] > 1e-6) & (uv > 0).all(-1) & (uv < 1).all(-1)
    nearest = F.grid_sample(depth[:, :1], (uv * 2 - 1).flatten(1, 2), 'nearest', align_corners=False)
    return inside & (p.norm(dim=-1) < 1.05 * nearest.view(depth.shape) + .1)


def score(model, cfg, header, codec, device, find_poses=True):
    """Walk held-out paths and compare with the truth: the numbers of one checkpoint, as a dict. Lists are by frame."""
    recipe = header['data']['recipe']
    world, captions = held_out(cfg, header, range(min(cfg.paths, recipe['val_clips'])), max(recipe['frames'], cfg.frames))
    n, length = len(captions), min(cfg.frames or header['frames'], world['c2w'].shape[1])
    truth, c2w, K = world['frames'][:, :1 + (length - 1) * codec.stride].float() / 255, world['c2w'][:, :length], world['K']
    each = lambda f, *x: torch.cat([f(*path) for path in zip(*(y.split(1) for y in x))])                 # one path at a time: memory
    z = each(codec.encode, truth)
    ceiling, first = each(codec.decode, z).cpu(), None if cfg.first == 'prompt' or model.cfg.first > 1 else z[:, :1].to(device)

    def generate(poses):
        noise = noise_for([cfg.seed * 1000 + i for i in range(n)], z.shape[2:], device)
        return walk(model, cfg, header, codec, relative(poses).to(device), K.to(device), captions, first, noise).cpu()
    dream, wrong = generate(c2w), generate(c2w.roll(-1, 0))
    p = each(psnr, dream, truth)
    ratio = lambda f: (each(f, dream).mean(0) / each(f, ceiling).mean(0)).tolist()
    known = lambda x: [None if math.isnan(v) else v for v in x.tolist()]
    out = dict(psnr=p.mean(0).tolist(), psnr_se=(p.std(0) / n ** .5).tolist(), psnr_ceiling=each(psnr, ceiling, truth).mean(0).tolist(),
               psnr_copy=each(psnr, ceiling[:, :1].expand_as(truth), truth).mean(0).tolist(),
               psnr_wrong_path=each(psnr, wrong, truth).mean(0).tolist(), sharpness=ratio(sharpness), motion=[None] + ratio(motion),
               drift_db_per_frame=np.polyfit(range(1, p.shape[1]), p.mean(0)[1:].double(), 1)[0].item(),
               fd=frechet(dream[:, 1:].flatten(0, 1), truth[:, 1:].flatten(0, 1)),
               fd_ceiling=frechet(ceiling[:, 1:].flatten(0, 1), truth[:, 1:].flatten(0, 1)),
               fd_features='4x4 means of RGB, luma gradient energy and its root')
    if first is None:                                                         # another world: only its kind can be compared
        out = {k: v for k, v in out.items() if not k.startswith(('psnr', 'drift'))}
    elif recipe['world'] == 'lowpoly' and codec.stride == 1:
        worlds, size = [*zip(world['plan'].tolist(), world['palette'].tolist())], truth.shape[2:4]
        seen = torch.cat([seen_mask(Lowpoly([plan], [palette]).render(c, k[:, None].expand(-1, length, -1), *size, edges=0)[1], c, k)
                          for (plan, palette), c, k in zip(worlds, c2w.split(1), K.split(1))])
        error = each(lambda a, b: (a.clamp(0, 1) - b).square().mean(-1), dream, truth)
        for name, mask in (('psnr_seen', seen), ('psnr_unseen', ~seen)):
            share = mask.float().mean((2, 3))
            db = -10 * ((error * mask).mean((2, 3)) / share).clamp(min=1e-10).log10()
            out[name] = known(db.masked_fill(share < .05, torch.nan).nanmean(0))
    if recipe['world'] == 'lowpoly' and codec.stride == 1 and find_poses and first is not None and length <= 17:   # further, the search is too wide
        views, found = (truth[:, 1:], dream[:, 1:], ceiling[:16, 1:]), []
        for i, (plan, palette) in enumerate(worlds):                                # all that one world shows at once
            pictures = torch.cat([v[i] for v in views if i < len(v)])
            found.append(locate(Lowpoly([plan], [palette]), pictures, torch.arange(len(pictures)) % (length - 1) + 1, c2w[i, 0], K[i]).split(length - 1))
        (rot, trans), dreamt, coded = (pose_error(torch.stack([f[j] for f in found[:len(v)]]), c2w[:len(v), 1:]) for j, v in enumerate(views))
        lost = (rot > 2) | (trans > .15)                     # the true frame itself cannot be located: a bare wall
        median = lambda x, without: [None] + known(x.masked_fill(without[:len(x)], torch.nan).nanmedian(0)[0])
        new = lost | (seen[:, 1:].float().mean((2, 3)) < .5)                                     # mostly what frame 0 did not see
        for name, e, without in (('', dreamt, lost), ('_seen', dreamt, new), ('_ceiling', coded, lost)):
            out |= {f'rot_err_deg{name}': median(e[0], without), f'trans_err_m{name}': median(e[1], without)}
        out |= dict(n_dropped=int(lost.sum()), n_views=lost.numel())
    if cfg.score:
        write_strip(os.path.splitext(cfg.score)[0] + '.png', truth[:6], dream[:6])
    return out | dict(n_paths=n, steps=cfg.steps, guidance=cfg.guidance, over=cfg.over, world=recipe['world'], plans=recipe['plans'],
                      ckpt=cfg.ckpt, seed=cfg.seed)

# -----------------------------------------------------------------------------
# live: a browser steers. One thread dreams; the server's threads hear the keys and send the newest picture

class Held:
    """Time-stamped edges of keys -> the seconds for which each key moves the next frame. The frame looks one period
    ahead, so that the first frame after a key already shows a whole frame's motion."""
    def __init__(self):
        self.since, self.owed, self.stamp = {}, {}, None

    def edge(self, key, down, now, stamp=None):
        """A key went down or up. stamp: the page's own clock, given back with the first frame that shows it."""
        if down:
            self.since.setdefault(key, now)
        elif key in self.since:
            self.owed[key] = self.owed.get(key, 0) + max(0, now - self.since.pop(key))
        self.stamp = stamp if self.stamp is None else self.stamp

    def take(self, now, period):
        """({key: seconds}, stamp) for what is made now and shown for `period` seconds."""
        for key, since in self.since.items():
            self.owed[key] = self.owed.get(key, 0) + max(0, now + period - since)
            self.since[key] = now + period
        taken, self.owed, self.stamp = (self.owed, self.stamp), {}, None
        return taken


class Live:
    """One walk, steered from one tab: the newest. `dream` runs in the main thread, `tab` in the server's."""
    METRES, DEGREES, LONGEST = 2.0, 75.0, .125      # a second; no frame moves further than in training: 0.25 m, 10 degrees

    def __init__(self, cfg, device, dtype):
        self.cfg, self.device, self.dtype = cfg, device, dtype
        name = lambda path: os.path.basename(path).removesuffix('.safetensors')
        found = [cfg.ckpt] + sorted(glob.glob(os.path.join(os.path.dirname(cfg.ckpt), '*.safetensors')))
        self.ckpts = {name(p): p for p in found if '.resume.' not in p}
        self.change = threading.Condition()         # guards all that follows
        self.held, self.owner = Held(), None
        self.paused, self.truth, self.tape = False, False, collections.deque(maxlen=180 * cfg.fps)
        self.wish = dict(ckpt=name(cfg.ckpt), steps=cfg.steps, prompt=cfg.prompt, clip=cfg.clip, start=cfg.first)
        self.newest, self.count = b'', 0

    def publish(self, pictures=b'', **header):
        with self.change:
            self.newest, self.count = json.dumps(header).encode() + b'\n' + pictures, self.count + 1
            self.change.notify_all()

    def cameras(self, m, K, plan, path):
        """Waits until a chunk is due, then moves the camera by what the keys did meanwhile. With nobody there, paused, or
        no key held the world stands still and costs nothing. Ends when the page wishes for something else."""
        due, n = 0., m.first
        while True:
            with self.change:
                while path and not self.wish:
                    still = self.owner is None or self.paused or not (self.held.since or self.held.owed)
                    rest = due - time.perf_counter()
                    if not still and rest <= 0:
                        break
                    self.change.wait(1 if still else rest)
                if path and self.wish:
                    return
                now = time.perf_counter()
                seconds, stamp = self.held.take(now, n * self.stride / self.cfg.fps) if path else ({}, None)
            due = max(due, now) + n * self.stride / self.cfg.fps
            for _ in range(n):
                for key, s in seconds.items():
                    s = min(s / n, self.LONGEST * self.stride)
                    new = move(*self.state, key, self.METRES * s, self.DEGREES * s)
                    if plan is None or free(plan, new[0][0], new[0][2]):                # walls stop a walker
                        self.metres, self.state = self.metres + math.dist(new[0], self.state[0]), new
                path.append((make_pose(*(torch.tensor(x, dtype=torch.float32) for x in self.state)), ''.join(seconds), stamp))
            yield Camera(torch.stack([p for p, *_ in path[-n:]])[None].to(self.device), K[:, None].expand(-1, n, -1).to(self.device))
            n = m.chunk

    @torch.inference_mode()
    def dream(self):
        """Walk after walk. Each lasts until the page wishes for something else, and goes on from the picture that is there, or from another start."""
        asked, model, z, kind = {}, None, None, None
        while True:
            with self.change:
                wish, self.wish = self.wish, {}
            if 'ckpt' in wish:
                try:
                    new = load(path := self.ckpts[wish['ckpt']], self.device, self.cfg.data)
                    held_out(replace(self.cfg, ckpt=path), new[1], [0])                    # are there clips to start from?
                    model, header, codec = new
                except (BadInput, OSError) as e:
                    if model is None:
                        raise
                    self.publish(error=str(e))
                    del wish['ckpt']
                model, m, recipe = model.to(self.dtype).eval(), model.cfg, header['data']['recipe']
                H, W, lowpoly = recipe['height'], recipe['width'], recipe['world'] == 'lowpoly' and codec.stride == 1
                self.stride = codec.stride
            asked |= wish
            if kind != (kind := (recipe['world'], H, W, codec.stride, m.first)):       # a walk does not go on in another kind of world
                z = None
                self.tape.clear()
            if z is None or 'start' in wish:
                world, captions = held_out(self.cfg, header, [asked['clip']])
                picture = world['frames'][:, 0] if asked['start'] in ('world', 'prompt') else load_picture(asked['start'], H, W)
                z = None if asked['start'] == 'prompt' or m.first > 1 else codec.encode(picture[:, None]).to(self.device)
                c2w = world['c2w'][0, 0].tolist()
                yaw, pitch = math.atan2(c2w[0][2], c2w[2][2]), -math.asin(c2w[1][2])
                self.state = [row[3] for row in c2w[:3]], math.degrees(yaw), math.degrees(pitch)
                self.metres, frame, plan = 0., 0, make_plan(int(world['plan'])) if lowpoly else None
                exact = Lowpoly(world['plan'].tolist(), world['palette'].tolist()) if lowpoly else None
            cfg = replace(self.cfg, steps=asked['steps'] or (4 if header['stage'] in DISTILLED else 8))
            path, text, decode = [], codec.embed([asked['prompt'] or captions[0]], m).to(self.device), codec.stream()
            noise = noise_for([(cfg.seed, frame)], (m.in_dim, H // 8, W // 8), self.device)
            for z in rollout(model, self.cameras(m, world['K'], plan, path), text, noise=noise, first=z, **sampler(cfg, header, m.shift)):
                pictures = (decode(z)[0] * 255).round().byte().cpu().numpy()
                new, frame = [p for p in path[-z.shape[1]:] for _ in range(codec.stride)][-len(pictures):], frame + len(pictures)
                self.tape.extend((p, keys) for p, (_, keys, _) in zip(pictures, new))
                if self.truth and lowpoly:
                    c2w = torch.stack([p for p, *_ in new])[None]
                    truth = exact.render(c2w, world['K'][:, None].expand(-1, len(new), -1), H, W)[0][0]
                    pictures = np.concatenate([pictures, (truth * 255).round().byte().numpy()], 2)
                self.publish(pictures.tobytes(), n=len(pictures), h=H, w=pictures.shape[2], frame=frame - 1, stamp=new[0][2],
                             metres=self.metres, steps=cfg.steps, ckpt=asked['ckpt'], clip=asked['clip'], prompt=asked['prompt'] or captions[0])
                del path[:-1]
            # Wan's latents stand for four pictures, but a walk's first for one
            z = z[:, -m.first:] if codec.stride == 1 else codec.encode(torch.from_numpy(pictures[None, -1:])) if m.first == 1 else None

    def hear(self, message):
        """What the page says. Anything that is not of these forms raises ValueError."""
        with self.change:
            match message:
                case {'key': str(key), 'down': bool(down), 't': int() | float() as t} if key in KEYS and len(key) == 1:
                    self.held.edge(key, down, time.perf_counter(), t)
                case {'pause': bool(on)}:
                    self.paused = on
                case {'truth': bool(on)}:
                    self.truth = on
                case {'steps': 1 | 2 | 4 | 8 as steps}:
                    self.wish['steps'] = steps
                case {'ckpt': str(name)} if name in self.ckpts:
                    self.wish['ckpt'] = name
                case {'prompt': str(prompt)} if len(prompt.encode()) < 2000:
                    self.wish['prompt'] = prompt
                case {'start': 'world' | 'prompt' as start, 'clip': int(clip)} if 0 <= clip < 2 ** 31:
                    start = self.cfg.first if (start, clip) == ('world', self.cfg.clip) else start         # r: where it began
                    self.wish |= {'start': start, 'clip': clip} | ({'prompt': self.cfg.prompt} if start == 'world' else {})
                case _:
                    raise ValueError(f'not understood: {message}')
            self.change.notify_all()

    def tab(self, ws):
        """One tab from open to close. It takes the walk over from the tab before."""
        from websockets.exceptions import ConnectionClosed

        def send():
            sent = 0
            with contextlib.suppress(ConnectionClosed):
                while True:
                    with self.change:               # a slow tab is held up in send, and then gets the newest picture only
                        self.change.wait_for(lambda: self.owner is not ws or self.count > sent)
                        if self.owner is not ws:
                            return ws.close(4000, 'the walk goes on in another tab')
                        sent, newest = self.count, self.newest
                    ws.send(newest)

        def save():
            with contextlib.suppress(ConnectionClosed):
                ws.send(b'{"mp4":true}\n' + self.film())
        with self.change:
            self.owner, self.held, self.paused, self.truth = ws, Held(), False, False
            self.change.notify_all()
        sender = threading.Thread(target=send, daemon=True)
        try:
            ws.send(json.dumps(dict(ckpts=list(self.ckpts), fps=self.cfg.fps, keys=KEYS[:-2])))                  # the worlds are flat: no u, o
            sender.start()
            for text in ws:
                message = json.loads(text)
                if message == {'save': True}:
                    threading.Thread(target=save, daemon=True).start()                           # keys are heard meanwhile
                else:
                    self.hear(message)
        except (ValueError, TypeError, RecursionError) as e:
            ws.close(1003, str(e)[:100])
        except ConnectionClosed:
            pass
        finally:
            with self.change:
                if self.owner is ws:
                    self.owner, self.held = None, Held()
                self.change.notify_all()

    def film(self):
        """The last three minutes of the walk as mp4 bytes, with the keys drawn."""
        with self.change:
            tape = list(self.tape)
        with tempfile.TemporaryDirectory() as folder:
            write_video(f'{folder}/walk.mp4', (draw(p, keys, max(1, 384 // len(p))) for p, keys in tape), self.cfg.fps)
            return pathlib.Path(folder, 'walk.mp4').read_bytes()


def live(cfg, device, dtype):
    """Serve the page and the walk at http://127.0.0.1:8000 until Ctrl-C. Nothing in a request names a file; only pages that
    this server gave out may steer (Origin), and only under its own name (Host: no DNS rebinding)."""
    try:
        from websockets.sync.server import serve
    except ImportError:
        raise BadInput('--live needs a web server: pip install websockets') from None
    if device.type == 'cpu' and 'OMP_NUM_THREADS' not in os.environ:          # threads that wait for each other, and the browser
        torch.set_num_threads(max(1, os.cpu_count() // 2))                    # on the same cores, would stutter
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))                      # Ctrl-C: at once, whatever the threads are at
    walk = Live(cfg, device, dtype)
    page = (pathlib.Path(__file__).parent / 'assets/stream.html').read_text()

    def answer(ws, request):
        host, origin = request.headers.get('Host', ''), request.headers.get('Origin')
        if local and host.split(':')[0] not in ('127.0.0.1', 'localhost') or origin not in (None, f'http://{host}'):
            return ws.respond(403, 'this walk is steered from its own page only')
        if request.path == '/walk' and origin:
            return None                                                       # a WebSocket: go on to `tab`
        response = ws.respond(*((200, page) if request.path == '/' else (404, 'nothing here; the page is at /')))
        del response.headers['Content-Type']
        response.headers['Content-Type'] = 'text/html; charset=utf-8'
        return response
    quiet, local = logging.getLogger('stream'), cfg.host in ('127.0.0.1', 'localhost')
    quiet.setLevel(logging.CRITICAL)
    if not local:
        print(f'warning: whoever can reach {cfg.host} can steer this walk')
    with serve(walk.tab, cfg.host, cfg.port, process_request=answer, compression=None, max_size=2048, logger=quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f'http://{cfg.host}:{server.socket.getsockname()[1]}/'
        print(f'{url}  (Ctrl-C ends the walk)', flush=True)
        if cfg.browser and (sys.platform != 'linux' or 'DISPLAY' in os.environ or 'WAYLAND_DISPLAY' in os.environ):
            webbrowser.open(url)
        walk.dream()

# -----------------------------------------------------------------------------
# timing

@torch.inference_mode()
def bench(model, cfg, header, codec, device):
    """Random keys, unpaced, one path; the first 20 frames are left out. Latency: key received to frame bytes."""
    recipe, m = header['data']['recipe'], model.cfg
    H, W, frames = recipe['height'], recipe['width'], max(cfg.frames or 2100, 50 * m.chunk)
    rng, stamps, decoder, done = np.random.default_rng(cfg.seed), [], [], []
    began = time.perf_counter()
    world, captions = held_out(cfg, header, [cfg.clip])
    text, decode = codec.embed(captions, m).to(device), codec.stream()

    def cameras():
        state = (0., 0., 0.), 0., 0.
        while True:
            n = m.first if not stamps else m.chunk
            stamps.append(time.perf_counter())                                # the key is received
            states = [state := move(*state, rng.choice(['w', 'l', 'j', 'wl', 'wj'])) for _ in range(n)]
            pose = make_pose(*(torch.tensor(x, dtype=torch.float32) for x in zip(*states)))
            yield Camera(pose[None].to(device), world['K'][:, None].expand(-1, n, -1).to(device))
    noise = noise_for([cfg.seed], (m.in_dim, H // 8, W // 8), device)
    how = sampler(cfg, header, m.shift)
    for z in rollout(model, cameras(), text, noise=noise, first=None if m.first > 1 else codec.encode(world['frames'][:, :1]).to(device), **how):
        start = time.perf_counter()
        (decode(z) * 255).round().byte().cpu().numpy().tobytes()
        done.append(time.perf_counter())
        decoder.append(done[-1] - start)
        if len(done) * m.chunk >= frames:
            break
    stamps, done, decoder = np.array(stamps[:len(done)]), np.array(done), np.array(decoder)
    latency, warm = (done - stamps) * 1e3, 20
    per_frame = np.diff(done)[warm:].mean() / m.chunk
    near = lambda i: float(np.median(latency[max(1, i // m.chunk - 40):i // m.chunk + 40]))
    # the floor: the arithmetic of one frame at the matrix product's own speed, or its weights at memory speed
    calls = (cfg.steps + 1 / m.chunk) * (1 + (cfg.guidance != 1))
    work = calls / m.chunk * flops(m, m.chunk, H * W // 64 // m.patch ** 2, .75 * how['window'])
    a = torch.randn(1024, 1024, device=device, dtype=next(model.parameters()).dtype)
    product = Timer('a @ a', globals={'a': a}, num_threads=torch.get_num_threads())
    floor = work / (2 * 1024 ** 3) * min(product.timeit(1).mean for _ in range(10))
    peak = torch.cuda.max_memory_allocated() / 2 ** 20 if device.type == 'cuda' else \
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == 'darwin' else 2 ** 10)
    return dict(fps=1 / per_frame, fps_denoiser=1 / (per_frame - decoder[warm:].mean() / m.chunk),
                latency_ms_p50=float(np.percentile(latency[warm:], 50)), latency_ms_p95=float(np.percentile(latency[warm:], 95)),
                latency_growth=near(len(done) * m.chunk - 100) / near(100), first_frame_s=float(done[1] - began), peak_mb=peak,
                floor_ratio=per_frame / floor, device=f'{device}, {torch.get_num_threads()} threads',
                dtype=str(a.dtype), height=H, width=W, steps=cfg.steps, chunk=m.chunk)


def main(cfg):
    parse_keys(cfg.keys)                                                      # complain before the work
    device, dtype = pick_device(cfg.device, cfg.dtype)
    if cfg.frames == 1:
        raise BadInput('--frames 1: at least 2, or 0 for the usual')
    cfg.fps = cfg.fps or (25 if cfg.live else 8)
    if cfg.live:
        return live(cfg, device, dtype)
    model, header, codec = load(cfg.ckpt, device, cfg.data)
    model = model.to(dtype).eval()
    cfg.steps = cfg.steps or (4 if header['stage'] in DISTILLED else 8)
    for name, work in (('score', score), ('bench', bench)):
        if path := getattr(cfg, name):
            os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
            result = work(model, cfg, header, codec, device)
            with open(f'{path}.tmp', 'w') as f:
                json.dump(result, f, indent=1)
            os.replace(f'{path}.tmp', path)
            for k, v in result.items():
                print(f'{k:20s}', ' '.join('     -' if x is None else f'{x:6.2f}' for x in v) if isinstance(v, list) else
                      f'{v:.4g}' if isinstance(v, float) else v)
    if not (cfg.score or cfg.bench):
        walk_to_file(model, cfg, header, codec, device)


if __name__ == '__main__':
    command_line(main, Config, __doc__)
