"""
Worlds, codecs, captions, clips on disk, batches.

    python data.py --world lowpoly                  # 500 plans, about a minute on 2 cores
    python data.py --world lowpoly --plans 1        # one plan to live in; the held-out clips are new paths through it
    python data.py --world doom                     # a real game: pip install vizdoom
    python data.py --world folder --videos DIR --pose_scale 1      # your own: name.mp4 (or a folder of frames) + name.txt or .json
    ... --wan Wan2.1-T2V-1.3B-Diffusers --height 480 --width 832 --frames 81     # as Wan's own latents and prompt embeddings

writes data/<world>/: a manifest.json, train and val shards (safetensors, read by memory map) and a contact sheet.
A shard holds, for n clips of F latent frames (one is one picture; with --wan every fourth is):

    latents (n, F, 16, H / 8, W / 8) float16      what the network sees        c2w (n, F, 4, 4) float32, any world frame
    K       (n, 4) float32                        normalised fx, fy, cx, cy    plan, palette (n,) int64 (lowpoly)
    frames  (n, F, H, W, 3) uint8                 val shards only: the truth   header: {"captions": [...]}
    text    (n, tokens, text_dim) bfloat16        --wan only                   frames of --wan: (n, 4 F - 3, H, W, 3)

World frame: OpenCV axes as in camera.py, the floor at y = 0, the camera 1 m above it.
"""
import functools
import html
import json
import math
import multiprocessing
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, is_dataclass, replace

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader
from tqdm import tqdm

from camera import BadInput, Camera, crop_intrinsics, intrinsics, invert, jumps, make_pose, minwm_poses, move, rays, relative, steps
from model import command_line, embed_text, save_tensors


@dataclass
class Config:
    world: str = 'lowpoly'        # lowpoly | doom | folder
    out: str = ''                 # folder; empty: data/<world>
    plans: int = 500              # lowpoly: 1, or many; with many the val clips are of plans never trained on
    clips: int = 1600             # training clips
    val_clips: int = 64           # held-out clips
    frames: int = 17              # frames per clip; training takes random windows of it
    door: bool = False            # lowpoly: a plan's walks all begin at one place, so that with a sink it can be learnt by heart
    height: int = 64
    width: int = 64
    map: str = 'my_way_home'      # doom: a map that ships with ViZDoom
    videos: str = ''              # folder: where the videos and their poses are, or minWM's input JSON
    stride: int = 1               # folder: every so many-th frame
    pose_scale: float = 0.0       # folder: metres in a unit of the poses; -1: unknown, make a mean step 0.15 m in each video
    seed: int = 0
    wan: str = ''                 # folder with Wan2.1's vae, text_encoder and tokenizer, as diffusers keeps them; empty: no weights

# -----------------------------------------------------------------------------
# world "lowpoly": an exact ray caster. A world is a plan (geometry) and a palette (colours), each from a seed

FOV = 90.0                        # degrees, horizontal
ARENA, WALL = 5.0, 2.5            # half the side of the square arena and the height of its walls, metres
COLOURS = {'red': (.80, .22, .20), 'orange': (.90, .55, .12), 'yellow': (.93, .82, .28), 'green': (.25, .62, .32),
           'teal': (.13, .55, .55), 'blue': (.18, .38, .75), 'purple': (.45, .28, .65), 'pink': (.88, .45, .62),
           'white': (.88, .88, .86), 'grey': (.48, .49, .51), 'brown': (.42, .30, .24), 'mint': (.52, .76, .60)}
SKIES = {'day': (.50, .70, .92), 'dusk': (.93, .62, .48), 'overcast': (.72, .75, .78), 'night': (.12, .14, .28)}


def make_plan(seed):
    """Geometry: boxes (6, 2, 3) as (low, high) corners and balls (5, 4) as (centre, radius), metres, float64 numpy."""
    r, tries = np.random.default_rng([1, seed]), 0
    boxes, balls, spots = [], [], []
    while len(spots) < 11:
        if (tries := tries + 1) % 10_000 == 0:                # some seeds leave no room: start over
            boxes, balls, spots = [], [], []
        box = len(boxes) < 6
        size = r.uniform(.25, .9, 2) if box else np.full(2, r.uniform(.3, .6))
        at = r.uniform(-ARENA + 1, ARENA - 1, 2)
        if any(np.abs(at - p).max() < size.max() + s + .7 for p, s in spots):
            continue                                          # keep paths of 0.7 m between things
        spots.append((at, size.max()))
        (x, z), (a, b) = at, size
        (boxes if box else balls).append([[x - a, -r.uniform(.5, 2.2), z - b], [x + a, 0, z + b]] if box else [x, -a, z, a])
    return np.array(boxes), np.array(balls)


def make_palette(seed):
    """(caption, colours (8, 3) float32: sky, floor, 2 for walls, boxes, balls). The caption names them in that order."""
    r = np.random.default_rng([2, seed])
    sky, names = r.choice(list(SKIES)), r.permutation(list(COLOURS))[:7]
    caption = '{} sky {} floor {} and {} walls {} and {} boxes {} and {} balls'.format(sky, *names)
    return caption, torch.tensor([SKIES[sky]] + [COLOURS[n] for n in names])


class Lowpoly:
    """A batch of worlds as tensors on a device; `render` casts rays into all of them at once."""

    def __init__(self, plans, palettes, device='cpu'):
        geometry = [make_plan(p) for p in plans]
        self.boxes, self.balls = (torch.tensor(np.stack(x), dtype=torch.float32, device=device) for x in zip(*geometry))
        self.colours = torch.stack([make_palette(p)[1] for p in palettes]).to(device)

    def shade(self, o, d):
        """Colour (B, R, 3), distance (B, R) and surface (B, R), a number that jumps at edges, of the rays o + s d,
        d of unit length, (B, R, 3) each. Each object is one pass that keeps the nearest hit so far."""
        o, d = (x.movedim(-1, 0).contiguous() for x in (o, d))      # (3, B, R): one coordinate of all rays lies together
        d = torch.where(d.abs() < 1e-6, 1e-6, d)
        inv = 1 / d
        # the floor, a checkerboard of 1 m
        s = -o[1] * inv[1]
        check = ((o[0] + s * d[0]).floor() + (o[2] + s * d[2]).floor()) % 2
        best, which, tone = torch.where(s > 0, s, 1e4), torch.ones_like(s), .85 + .15 * check
        # the arena's four walls, seen from inside, each in a tone of its own; above them the sky
        x, z = ((torch.sign(d[i]) * ARENA - o[i]) * inv[i] for i in (0, 2))
        s, along_z = torch.minimum(x, z), z < x
        closer = s < best
        best, which = torch.where(closer, s, best), torch.where(closer, 2. + along_z, which)
        tone = torch.where(closer, torch.where(torch.where(along_z, d[2], d[0]) > 0, 1., .75) - .1 * along_z, tone)
        sky = closer & (o[1] + s * d[1] < -WALL)
        best, which, tone = best.masked_fill(sky, 1e4), which.masked_fill(sky, 0), tone.masked_fill(sky, 1)
        for i in range(self.boxes.shape[1]):                 # slab method
            low, high = ((self.boxes[:, i, j].T[..., None] - o) * inv for j in (0, 1))
            x, y, z = torch.minimum(low, high)
            near = torch.maximum(torch.maximum(x, y), z)
            hit = (near < torch.maximum(low, high).amin(0)) & (near > 0) & (near < best)
            best, which = torch.where(hit, near, best), which.masked_fill(hit, 4 + i % 2)
            tone = torch.where(hit, torch.where(near == y, 1., torch.where(near == x, .80, .62)), tone)
        sun, colours = d.new_tensor([.4, -.8, -.45])[:, None, None], self.colours.movedim(-1, 0)     # (3, 1, 1), (3, B, 8)
        for i in range(self.balls.shape[1]):
            oc, radius = o - self.balls[:, i, :3].T[..., None], self.balls[:, i, 3:]       # from its centre
            b = (oc * d).sum(0)
            q = b * b - (oc * oc).sum(0) + radius ** 2
            s = -b - q.clamp(min=0).sqrt()
            hit = (q > 0) & (s > 0) & (s < best)
            best, which = torch.where(hit, s, best), which.masked_fill(hit, 6 + i % 2)
            tone = torch.where(hit, .75 + .25 * (sun * (oc + s * d)).sum(0) / radius, tone)
        colour = torch.gather(colours, 2, which.long().expand_as(d)) * tone
        up = -d[1]                                            # the sky pales towards the horizon; fog is of its colour
        haze = colours[..., :1] * (1 - .25 * up.clamp(0, 1)) + .12 * (1 - 3 * up.clamp(0, 1)).clamp(0, 1)
        return torch.lerp(haze, colour, torch.exp(-best / 30)).clamp(0, 1).movedim(0, -1).contiguous(), best, which + tone / 2

    def render(self, c2w, K, H=64, W=64, edges=.25):
        """Pictures (B, V, H, W, 3) float in [0, 1] and distances (B, V, H, W) of V views c2w (B, V, 4, 4) of each world.
        The share `edges` of the pixels, where the surface changes most, is sampled four times (anti-aliasing)."""
        if c2w.shape[1] > 256:                                # in parts: long walks fill the memory
            return tuple(torch.cat(x, 1) for x in zip(*(self.render(*part, H, W, edges) for part in zip(c2w.split(256, 1), K.split(256, 1)))))
        B, V = c2w.shape[:2]
        o, d = rays(c2w, K, H, W)                             # (B, V, 3), (B, V, H, W, 3)
        flat = lambda x: x.reshape(B, -1, x.shape[-1])
        origins = o[:, :, None, None].expand_as(d)
        colour, depth, surface = self.shade(flat(origins), flat(d))
        if edges:
            surface = surface.view(B * V, 1, H, W)
            jump = (F.max_pool2d(surface, 3, 1, 1) + F.max_pool2d(-surface, 3, 1, 1)).view(B, -1)
            index = jump.topk(int(edges * jump.shape[1]), 1)[1][..., None].expand(-1, -1, 3)
            z = torch.einsum('bvi,bvhwi->bvhw', c2w[..., :3, 2], d)[..., None]     # how a unit ray changes over a pixel
            step = [z * (c2w[..., :3, i] / (n * K[..., i, None]))[:, :, None, None] for i, n in ((0, W), (1, H))]
            centre, origin, dx, dy = (flat(x).gather(1, index) for x in (d, origins, *step))
            colour = colour.scatter(1, index, sum(self.shade(origin, F.normalize(centre + a * dx + b * dy, dim=-1))[0]
                                                  for a in (-.25, .25) for b in (-.25, .25)) / 4)
        return colour.view(B, V, H, W, 3), depth.view(B, V, H, W)


def free(plan, x, z, margin=.35):
    """May one stand at (x, z), metres? The plan's walls, boxes and balls keep a distance of `margin`."""
    (boxes, balls), p = plan, np.array([x, z])
    return (np.abs(p).max() < ARENA - margin
            and not ((boxes[:, 0, ::2] - margin < p) & (p < boxes[:, 1, ::2] + margin)).all(1).any()
            and (np.linalg.norm(balls[:, :3:2] - p, axis=1) > balls[:, 3] + margin).all())


def walk(plan, frames, rng, door=None):
    """A random keyboard walk around things: c2w (frames, 4, 4) float32. Keys are held for 3 to 8 frames at a speed drawn per
    clip (0.04 to 0.25 m, 1.5 to 10 degrees a frame); a blocked step becomes a turn. It begins anywhere, or where the
    generator `door` says: at the wall z = -ARENA, looking in."""
    metres, degrees, ahead = rng.uniform(.04, .25), rng.uniform(1.5, 10), [False]
    while not all(ahead):                                     # start where there is a view: 1.5 m free ahead
        x, z, yaw = (door.uniform(-4, 4), .6 - ARENA, 0.) if door else (*rng.uniform(-ARENA, ARENA, 2), rng.uniform(-180, 180))
        ahead = [free(plan, x + a * math.sin(math.radians(yaw)), z + a * math.cos(math.radians(yaw))) for a in (0, .5, 1, 1.5)]
    state = (x, -1.0, z), yaw, 0. if door else float(rng.choice([0, 0, 0, -8, 8]))
    states, hold = [state], 0
    while len(states) < frames:
        if hold == 0:
            keys = rng.choice(['w', 'wl', 'wj', 'l', 'j', 'a', 'd', 's', 'wi', 'wk', 'sl', 'dj'],
                              p=[.25, .15, .15, .09, .09, .06, .06, .05, .025, .025, .025, .025])
            hold = rng.integers(3, 9)
        (x, _, z), _, _ = move(*state, keys, metres, degrees)
        if not free(plan, x, z):
            keys, hold = rng.choice(['l', 'j']), rng.integers(3, 9)
        state, hold = move(*state, keys, metres, degrees), hold - 1
        states.append(state)
    return make_pose(*(torch.tensor(x, dtype=torch.float64) for x in zip(*states))).float()


def lowpoly_clips(cfg, split, indices):
    """Render clips: dict of tensors as a shard holds them, and captions. Clip i depends on (seed, split, i) only."""
    plans, palettes, paths = [], [], []
    for i in indices:
        r = np.random.default_rng([cfg.seed, split, i])
        plans.append(int(r.integers(cfg.plans)) + 10 ** 6 * split * (cfg.plans > 1) + 10 ** 7 * cfg.seed)
        palettes.append(int(r.integers(4 if cfg.plans == 1 else 10 ** 6)) + 10 ** 7 * cfg.seed)
        paths.append(walk(make_plan(plans[-1]), cfg.frames, r, np.random.default_rng(plans[-1]) if cfg.door else None))
        if cfg.door and split == 0 and i % 2:                 # every other training clip jumps from there to anywhere
            paths[-1][1:] = walk(make_plan(plans[-1]), cfg.frames, r)[1:]
    c2w, K = torch.stack(paths), intrinsics(FOV, cfg.width / cfg.height).expand(len(indices), cfg.frames, 4)
    device, n = ('cuda', len(indices)) if torch.cuda.is_available() else ('cpu', 1)       # one at a time fits a CPU's cache
    frames = torch.cat([(Lowpoly(plans[i:i + n], palettes[i:i + n], device).render(c2w[i:i + n].to(device), K[i:i + n].to(device), cfg.height,
                         cfg.width)[0] * 255).round().byte().cpu() for i in range(0, len(indices), n)])
    return dict(frames=frames, c2w=c2w, K=K[:, 0], plan=torch.tensor(plans), palette=torch.tensor(palettes)), [make_palette(p)[0] for p in palettes]

# -----------------------------------------------------------------------------
# world "doom": frames and exact poses of a real game, by ViZDoom (its wheel carries the Freedoom assets)

UNITS = 64                        # map units in a metre, by our convention
DOOM_K = torch.tensor([.5, .8, .5, .5])   # 90 degrees wide, 4:3, and the engine stretches upwards by 1.2 (measured on walls)


def doom_clips(cfg, split, indices):
    """The same dict from the game: HUD and weapon off, a random keyboard policy, 1 to 3 tics a frame."""
    try:
        import vizdoom as vzd
    except ImportError:
        raise BadInput('--world doom needs ViZDoom: pip install vizdoom') from None
    scenario = os.path.join(vzd.scenarios_path, cfg.map + '.cfg')
    if not os.path.exists(scenario):
        maps = sorted(f[:-4] for f in os.listdir(vzd.scenarios_path) if f.endswith('.cfg'))
        raise BadInput(f'--map {cfg.map}: not a map that ships with ViZDoom: {", ".join(maps)}')
    game = vzd.DoomGame()
    game.load_config(scenario)
    game.set_doom_config_path(os.path.join(tempfile.gettempdir(), '_vizdoom.ini'))
    game.set_window_visible(False)
    game.set_screen_format(vzd.ScreenFormat.RGB24)
    game.set_screen_resolution(vzd.ScreenResolution.RES_320X240)
    for off in ('hud', 'weapon', 'crosshair', 'decals', 'particles', 'effects_sprites', 'messages', 'corpses'):
        getattr(game, f'set_render_{off}')(False)
    game.set_available_buttons([getattr(vzd.Button, b) for b in ('MOVE_FORWARD', 'MOVE_BACKWARD', 'MOVE_LEFT', 'MOVE_RIGHT', 'TURN_LEFT_RIGHT_DELTA')])
    game.set_available_game_variables([getattr(vzd.GameVariable, v) for v in ('POSITION_X', 'POSITION_Y', 'POSITION_Z', 'ANGLE')])
    game.set_episode_timeout(0)
    game.init()
    out = []
    for i in indices:
        r = np.random.default_rng([cfg.seed, 3 + split, i])
        frames = []
        while len(frames) < cfg.frames:                       # an episode may end early: the vest is found
            if not frames or game.is_episode_finished():
                game.set_seed(int(r.integers(2 ** 31)))
                game.new_episode()
                game.make_action([0] * 4 + [float(r.uniform(-180, 180))], 1)
                tics, degrees, hold, frames, poses = int(r.integers(1, 4)), r.uniform(1.5, 10), 0, [], []
            x, y, z, angle = game.get_state().game_variables
            picture = torch.from_numpy(game.get_state().screen_buffer.copy()).permute(2, 0, 1)[None].float()
            frames.append(F.interpolate(picture, (cfg.height, cfg.width), mode='area')[0].permute(1, 2, 0))
            poses.append(([-y / UNITS, -z / UNITS, x / UNITS], -angle, 0.))   # theirs: x east, y north, angles to the left
            if hold == 0:
                keys = r.choice(['w', 'wl', 'wj', 'l', 'j', 'a', 'd', 's'], p=[.3, .17, .17, .1, .1, .05, .05, .06])
                hold = r.integers(3, 9)
            hold -= 1
            game.make_action([float(k in keys) for k in 'wsad'] + [degrees * (('l' in keys) - ('j' in keys)) / tics], tics)
        out.append((torch.stack(frames).round().byte(), make_pose(*(torch.tensor(v, dtype=torch.float64) for v in zip(*poses))).float()))
    game.close()
    frames, c2w = (torch.stack(x) for x in zip(*out))
    return dict(frames=frames, c2w=c2w, K=DOOM_K.repeat(len(out), 1)), [f'doom {cfg.map}'] * len(out)

# -----------------------------------------------------------------------------
# world "folder": your own videos. name.mp4, or a folder `name` of pictures, beside name.txt or name.json with a pose a frame

def load_poses(path):
    """(c2w (F, 4, 4), K (F, 4) normalised or None) of a pose file: RealEstate10K .txt (a title, then lines of: time, fx fy cx cy,
    0 0, 3 x 4 world-to-camera); or JSON, a list of c2w or minWM's {"0": {"extrinsic": c2w, "K": 3 x 3 in pixels}, ...}.
    Raises BadInput that names the file and the line or pose."""
    K = None
    try:
        with open(path) as f:
            text = f.read()
        if path.endswith('.txt'):
            rows = [(i, line.split()) for i, line in enumerate(text.splitlines(), 1)][1:]
            for i, row in rows:
                if len(row) != 19:
                    raise BadInput(f'{path}, line {i}: {len(row)} numbers, RealEstate10K has 19: time, fx fy cx cy, 0 0, 3 x 4 pose')
            table = torch.tensor([[float(x) for x in row] for _, row in rows], dtype=torch.float64).view(-1, 19)
            bottom = torch.tensor([0., 0, 0, 1], dtype=torch.float64).expand(len(table), 1, 4)
            c2w, K = torch.cat([table[:, 7:].view(-1, 3, 4), bottom], 1), table[:, 1:5].float()
        else:
            poses = json.loads(text)
            if isinstance(poses, dict):
                poses = [poses[k] for k in sorted(poses, key=int)]
                if all(p.get('K') for p in poses):
                    M = torch.tensor([p['K'] for p in poses], dtype=torch.float32)        # the picture is twice the principal point
                    size = 2 * M[:, :2, 2]
                    K = torch.cat([M[:, [0, 1], [0, 1]] / size, M[:, :2, 2] / size], 1)
                poses = [p['extrinsic'] for p in poses]
            c2w = torch.tensor(poses, dtype=torch.float64)
    except (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError) as e:
        if isinstance(e, BadInput):
            raise
        raise BadInput(f'{path}: not a list of 4x4 matrices, nor minWM pose JSON, nor RealEstate10K ({e})') from None
    if c2w.ndim != 3 or c2w.shape[1:] != (4, 4) or not len(c2w):
        raise BadInput(f'{path}: shape {tuple(c2w.shape)}, wanted (frames, 4, 4)')
    R = c2w[:, :3, :3]
    bad = ~((R @ R.mT - torch.eye(3)).abs().amax((1, 2)) < 1e-3) | ~(torch.linalg.det(R) > 0) | ~c2w.isfinite().all(2).all(1)
    if bad.any():
        raise BadInput(f'{path}: pose {int(bad.nonzero()[0])} is not a rotation and a translation')
    return (invert(c2w) if path.endswith('.txt') else c2w).float(), K


def load_frames(path, indices=None):
    """Pictures (n, H, W, 3) uint8 of a video or of a folder of pictures, in the order of their names; or how many there are."""
    if os.path.isdir(path):
        names = sorted(os.path.join(path, f) for f in os.listdir(path) if f.lower().endswith(('.png', '.jpg', '.jpeg')))
        if indices is None and len({Image.open(name).size for name in names}) > 1:
            raise BadInput(f'{path}: its pictures are of different sizes')
        return len(names) if indices is None else np.stack([iio.imread(names[i], mode='RGB') for i in indices])
    if indices is None:
        return sum(1 for _ in iio.imiter(path))
    wanted = set(indices)
    frames = {i: x for i, x in zip(range(max(indices) + 1), iio.imiter(path)) if i in wanted}
    return np.stack([frames[i] for i in indices])


def list_videos(folder):
    """(path of the video, function that reads its (c2w, K), caption) of all in a folder; or of minWM's input JSON, a list of
    {"caption", "pose_str": "w-8, right-11"}, a unit a latent, beside videos/000000_w8right11/gen.mp4: its pose i is frame 4 i's."""
    if folder.endswith('.json'):
        try:
            with open(folder) as f:
                entries = [(entry['pose_str'].lower(), str(entry.get('caption', ''))) for entry in json.load(f)]
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise BadInput(f'{folder}: not a list of {{"caption": ..., "pose_str": "w-8, right-11"}} ({e!r})') from None
        for i, (keys, caption) in enumerate(entries):
            keys = keys.replace(' ', '').replace('-', '*')
            slug = ''.join(c for c in keys if c.isalnum())
            for word, key in (('up', 'i'), ('down', 'k'), ('right', 'l'), ('left', 'j')):
                keys = keys.replace(word, key)
            read = lambda keys=keys: (minwm_poses(keys).repeat_interleave(4, 0), torch.tensor([.505051, .897868, .5, .5]).expand(10 ** 4, 4))
            yield f'{os.path.dirname(folder)}/videos/{i:06d}_{slug}/gen.mp4', read, caption
        return
    for name in sorted({os.path.splitext(f)[0] for f in os.listdir(folder)}) if os.path.isdir(folder) else ():
        caption, path = f'{folder}/{name}.caption', f'{folder}/{name}.mp4' if os.path.exists(f'{folder}/{name}.mp4') else f'{folder}/{name}'
        poses = f'{folder}/{name}.txt' if os.path.exists(f'{folder}/{name}.txt') else f'{folder}/{name}.json'
        yield path, functools.partial(load_poses, poses), open(caption).read().strip() if os.path.exists(caption) else ''


@functools.lru_cache(maxsize=1)
def find_videos(folder, span):
    """([(path, c2w, K or None, caption)] of the videos with a pose for each of at least `span` frames, [why not the others])."""
    good, bad = [], []
    for path, read, caption in list_videos(folder):
        try:
            if not os.path.exists(path):
                raise BadInput(f'{path}: no such video, nor a folder of pictures')
            (c2w, K), n = read(), load_frames(path)
            if n > len(c2w):
                raise BadInput(f'{path}: {n} frames, but {len(c2w)} poses')
            if n < span:
                raise BadInput(f'{path}: {n} frames, {span} are wanted')
            good.append((path, c2w[:n], K, caption))
        except (BadInput, OSError, ValueError) as e:
            bad.append(str(e))
    return good, bad


def folder_clips(cfg, split, indices):
    """The same dict from videos with poses: random windows, cropped to the aspect and resized. Every tenth video is held out."""
    span, clips, captions = (cfg.frames - 1) * cfg.stride + 1, [], []
    videos, _ = find_videos(cfg.videos, span)
    mine = [v for i, v in enumerate(videos) if (i % 10 == 9 or i == len(videos) - 1) == bool(split)] if len(videos) > 1 else videos
    for i in indices:
        r = np.random.default_rng([cfg.seed, 5 + split, i])
        path, c2w, K, caption = mine[int(r.integers(len(mine)))]
        start = int(r.integers(len(c2w) - span + 1))
        window = (start - start % 4 if cfg.videos.endswith('.json') else start) + cfg.stride * np.arange(cfg.frames)
        picture = torch.from_numpy(load_frames(path, window.tolist())).movedim(-1, 1).float()
        H, W = picture.shape[2:]
        h, w = min(H, W * cfg.height / cfg.width) / H, min(W, H * cfg.width / cfg.height) / W       # the crop, as fractions
        y, x, rows, cols = round((1 - h) / 2 * H), round((1 - w) / 2 * W), round(h * H), round(w * W)
        picture = F.interpolate(picture[:, :, y:y + rows, x:x + cols], (cfg.height, cfg.width), mode='bilinear', antialias=True)
        K = intrinsics(FOV, W / H) if K is None else K[window[0]]
        scale = cfg.pose_scale if cfg.pose_scale > 0 else .15 / max(1e-6, c2w[::cfg.stride, :3, 3].diff(dim=0).norm(dim=1).mean().item())
        c2w = relative(c2w[None, window])[0]
        c2w[:, :3, 3] *= scale
        clips.append((picture.round().clamp(0, 255).byte().movedim(1, -1), c2w, crop_intrinsics(K, x / W, y / H, cols / W, rows / H)))
        captions.append(caption)
    frames, c2w, K = (torch.stack(v) for v in zip(*clips))
    return dict(frames=frames, c2w=c2w, K=K), captions

# -----------------------------------------------------------------------------
# codec "dct": a picture as 16 channels at 1/8 resolution, the shape of Wan's latents, without weights

ORDER = [(0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2), (0, 3), (1, 2), (2, 1), (3, 0)]   # 10 lowest luma coefficients
YCC = torch.tensor([[.299, .587, .114], [-.168736, -.331264, .5], [.5, -.418688, -.081312]])
# standard deviation of each channel on lowpoly, before scaling; the luma's mean is -0.26
DCT_STD = torch.tensor([1.36, .172, .246, .103, .092, .068, .048, .042, .053, .072, .765, .122, .152, .806, .129, .156])
DCT_MEAN = torch.tensor([-.26] + [0.] * 15)
GAMMA = 0.5                       # z = (c - mean) / (k std^gamma), k such that the RMS is 1: 1 whitens, 0 leaves energies
SCALE = DCT_STD ** GAMMA * (DCT_STD ** (2 - 2 * GAMMA)).mean().sqrt()
CHANNELS = [(0, u, v) for u, v in ORDER] + [(k, u, v) for k in (1, 2) for u, v in ORDER[:3]]   # (plane, row, column)


def lapped_dct(n):
    """The orthogonal (n, n) matrix of an 8-point DCT with a pre-filter across block edges, float32, which makes it a lapped
    transform (Malvar's type-II LOT in the form of Tran, Liang and Tu 2003): basis functions 16 wide that fade out, so no block
    edges, and the picture's border needs no special case."""
    def cosines(n, half):                                     # DCT-II (rows k) or, with half, DCT-IV
        k, i = torch.arange(n, dtype=torch.float64)[:, None] + half, torch.arange(n, dtype=torch.float64) + .5
        m = (2 / n) ** .5 * torch.cos(math.pi * k * i / n)
        return m if half else torch.cat([m[:1] / 2 ** .5, m[1:]])
    I = torch.eye(4, dtype=torch.float64)
    J = I.flip(0)
    butterfly = torch.cat([torch.cat([I, J], 1), torch.cat([J, -I], 1)])
    edge = butterfly @ torch.block_diag(I, J @ cosines(4, 0).T @ cosines(4, .5) @ J) @ butterfly / 2
    pre = torch.block_diag(I, *[edge] * (n // 8 - 1), I)
    return (torch.block_diag(*[cosines(8, 0)] * (n // 8)) @ pre).float()


def encode(frames):
    """Pictures (..., H, W, 3), uint8 or float in [0, 1] -> latents (..., 16, H / 8, W / 8) of about unit RMS."""
    x = frames.float() / 255 if frames.dtype == torch.uint8 else frames
    H, W = x.shape[-3:-1]
    rows, cols = lapped_dct(H).to(x.device), lapped_dct(W).to(x.device)
    y = torch.einsum('uh,...hwc,kc,vw->...kuv', rows, x - .5, YCC.to(x.device), cols)
    y = y.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8))       # (..., 3, H / 8, u, W / 8, v)
    z = torch.stack([y[..., k, :, u, :, v] for k, u, v in CHANNELS], -3)
    return (z - DCT_MEAN.to(z.device)[:, None, None]) / SCALE.to(z.device)[:, None, None]


def decode(z):
    """Latents (..., 16, h, w) -> pictures (..., 8 h, 8 w, 3), float32 in [0, 1]."""
    z = z.float() * SCALE.to(z.device)[:, None, None] + DCT_MEAN.to(z.device)[:, None, None]
    h, w = z.shape[-2:]
    y = z.new_zeros(*z.shape[:-3], 3, h, 8, w, 8)
    for c, (k, u, v) in enumerate(CHANNELS):
        y[..., k, :, u, :, v] = z[..., c, :, :]
    rows, cols = lapped_dct(8 * h).to(z.device), lapped_dct(8 * w).to(z.device)
    x = torch.einsum('uh,...kuv,ck,vw->...hwc', rows, y.flatten(-4, -3).flatten(-2), YCC.inverse().to(z.device), cols)
    return (x + .5).clamp(0, 1)


class Dct:
    """The embedded codec, and captions embedded without weights: what `find_codec` gives for most clips."""
    stride, encode, decode = 1, staticmethod(encode), staticmethod(decode)
    stream = lambda self: decode                              # a function that decodes a video chunk by chunk

    def embed(self, captions, cfg):
        return embed_text(captions, cfg.text_len, cfg.text_dim)

# -----------------------------------------------------------------------------
# codec "wan": Wan2.1's own autoencoder and text encoder, through diffusers and transformers

class Wan:
    """The same of Wan2.1. The first latent is one picture, every further one is four: latent i shows picture 4 i last, and
    the pose of that picture is its pose. The autoencoder computes in float32, the text encoder in bfloat16."""
    stride = 4

    def __init__(self, folder, device='cpu'):
        try:
            from diffusers import AutoencoderKLWan
        except ImportError:
            raise BadInput('Wan\'s autoencoder needs packages: pip install -r requirements-wan.txt') from None
        if not os.path.exists(f'{folder}/vae/config.json'):
            raise BadInput(f'--wan {folder}: no vae/config.json there: name a folder such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers')
        self.folder, self.device = folder, device
        self.vae = AutoencoderKLWan.from_pretrained(f'{folder}/vae', low_cpu_mem_usage=False).float().to(device).eval().requires_grad_(False)
        shape = lambda x: torch.tensor(x, device=device).view(-1, 1, 1, 1)
        self.mean, self.std = shape(self.vae.config.latents_mean), shape(self.vae.config.latents_std)
        self.slots = sum(type(m).__name__ == 'WanCausalConv3d' for m in self.vae.decoder.modules())

    @torch.no_grad()
    def encode(self, frames):
        """Pictures (B, 4 F - 3, H, W, 3), uint8 or float in [0, 1] -> latents (B, F, 16, H / 8, W / 8), one clip at a time."""
        x = frames.float() / 255 if frames.dtype == torch.uint8 else frames
        z = [self.vae.encode(v.to(self.device).movedim(-1, 0)[None] * 2 - 1).latent_dist.mode() for v in x]          # (1, 16, F, h, w)
        return ((torch.cat(z) - self.mean) / self.std).movedim(2, 1)

    def decode(self, z):
        """Latents (B, F, 16, h, w) of whole videos -> pictures (B, 4 F - 3, 8 h, 8 w, 3), float32 in [0, 1]."""
        return torch.cat([self.stream()(v[None]) for v in z])

    def stream(self):
        """A function that decodes one video chunk by chunk: (B, n, 16, h, w) -> (B, 4 n, 8 h, 8 w, 3), 4 n - 3 the first time. Each
        causal convolution keeps its last two inputs between the calls."""
        cache, begun = [None] * self.slots, []

        @torch.no_grad()
        def decode(z):
            z, out = self.vae.post_quant_conv(z.to(self.device).movedim(1, 2).float() * self.std + self.mean), []
            for i in range(z.shape[2]):
                out.append(self.vae.decoder(z[:, :, i:i + 1], feat_cache=cache, feat_idx=[0], first_chunk=not begun))
                begun.append(True)
            return (torch.cat(out, 2).clamp(-1, 1).movedim(1, -1) + 1) / 2
        return decode

    @functools.cached_property
    def text_encoder(self):
        from transformers import AutoTokenizer, UMT5EncoderModel
        return AutoTokenizer.from_pretrained(f'{self.folder}/tokenizer'), UMT5EncoderModel.from_pretrained(
            f'{self.folder}/text_encoder', dtype=torch.bfloat16).to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def embed(self, captions, cfg=None):
        """(B, tokens of the longest caption or cfg.text_len, text_dim) of UMT5, 0 behind each caption's end."""
        tokenizer, encoder = self.text_encoder
        captions = [' '.join(html.unescape(html.unescape(c)).split()) for c in captions]
        told = tokenizer(captions, padding='longest', truncation=True, max_length=512, return_tensors='pt').to(self.device)
        out = encoder(told.input_ids, told.attention_mask).last_hidden_state * told.attention_mask[..., None]
        return out if cfg is None else pad_text(out, cfg)


def pad_text(text, cfg):
    """Embedded captions (..., tokens, text_dim) -> (..., text_len, text_dim) float32."""
    if text.shape[-1] != cfg.text_dim:
        raise BadInput(f'captions of {text.shape[-1]} numbers a word, where the model reads {cfg.text_dim}: make its clips with its own text encoder')
    return F.pad(text[..., :cfg.text_len, :].float(), (0, 0, 0, max(0, cfg.text_len - text.shape[-2])))


@functools.lru_cache(maxsize=2)
def find_codec(folder='', device='cpu'):
    """The codec of clips whose recipe has this `wan`."""
    return Wan(folder, device) if folder else Dct()

# -----------------------------------------------------------------------------
# clips on disk

WORLDS = {'lowpoly': lowpoly_clips, 'doom': doom_clips, 'folder': folder_clips}


def make(cfg):
    """Render a world's clips into cfg.out, all or nothing. Returns the folder."""
    out = (cfg.out or f'data/{cfg.world}').rstrip('/')
    if cfg.world not in WORLDS:
        raise BadInput(f'--world {cfg.world}: choose one of {", ".join(WORLDS)}')
    if min(cfg.plans, cfg.clips, cfg.val_clips, cfg.frames) < 1 or cfg.height % 16 or cfg.width % 16:
        raise BadInput('plans, clips, val_clips and frames must be at least 1, height and width multiples of 16')
    if cfg.world == 'folder':
        if not cfg.pose_scale:
            raise BadInput('--world folder: say what a unit of the poses is: --pose_scale METRES, or -1 where nobody knows')
        if cfg.videos.endswith('.json') and not cfg.wan and cfg.stride % 4:
            raise BadInput(f'--stride {cfg.stride}: the poses of minWM belong to every fourth frame: use --stride 4, or --wan')
        good, bad = find_videos(cfg.videos, (cfg.frames - 1) * cfg.stride + 1)
        print(f'{cfg.videos}: {len(good)} videos, {len(bad)} skipped', *bad, sep='\n  ')
        if not good:
            raise BadInput(f'--videos {cfg.videos}: no video with a pose for every frame; see data.py on what belongs there')
    if cfg.wan and (cfg.frames - 1) % 4:
        raise BadInput(f'--frames {cfg.frames}: Wan\'s latents hold 1, 5, 9, 13 ... pictures')
    recipe = {k: v for k, v in asdict(cfg).items() if k != 'out' and (v or k not in ('wan', 'door'))
              and (cfg.world == 'folder' or k not in ('videos', 'stride', 'pose_scale'))}
    if os.path.exists(f'{out}/manifest.json'):
        old = load_manifest(out)['recipe']
        if changed := ', '.join(f'{k} {old.get(k)}, not {recipe.get(k)}' for k in recipe | old if old.get(k) != recipe.get(k)):
            raise BadInput(f'{out} was made with {changed}: give another --out, or delete it')
        print(f'{out} is there already')
        return out
    try:
        os.makedirs(os.path.dirname(out) or '.', exist_ok=True)
        tmp = tempfile.TemporaryDirectory(prefix=os.path.basename(out) + '.tmp', dir=os.path.dirname(out) or '.', ignore_cleanup_errors=True)
    except OSError as e:
        raise BadInput(f'{out}: cannot be written ({e.strerror}): give another --out') from None
    each = 8 if cfg.wan else 50
    jobs = [(cfg, tmp.name, split, name, i, list(range(i, min(n, i + each)))) for split, name, n in
            ((0, 'train', cfg.clips), (1, 'val', cfg.val_clips)) for i in range(0, n, each)]
    context = multiprocessing.get_context('spawn' if torch.cuda.is_initialized() else None)
    with tmp, ProcessPoolExecutor(mp_context=context) as pool:      # Wan's networks are large: one process
        shards, sheets = zip(*tqdm((map if cfg.wan else pool.map)(_make_shard, jobs), total=len(jobs), desc=out, unit='shard'))
        iio.imwrite(f'{tmp.name}/sheet.png', sheets[0])
        with open(f'{tmp.name}/manifest.json', 'w') as f:
            json.dump({'recipe': recipe, 'codec': 'wan' if cfg.wan else 'dct', 'gamma': GAMMA, 'shards': shards}, f, indent=1)
        os.chmod(tmp.name, 0o755)
        os.replace(tmp.name, out)
    print(f'{cfg.clips} + {cfg.val_clips} clips of {cfg.frames} frames in {out}; look at {out}/sheet.png')
    return out


def _make_shard(job):
    cfg, folder, split, name, first, indices = job
    if not cfg.wan:
        torch.set_num_threads(1)
    codec = find_codec(cfg.wan, 'cuda' if torch.cuda.is_available() else 'cpu')
    tensors, captions = WORLDS[cfg.world](cfg, split, indices)
    tensors['c2w'] = tensors['c2w'][:, ::codec.stride]
    z = tensors['latents'] = torch.cat([codec.encode(frames[None]).half().cpu() for frames in tensors['frames']])      # clip by clip: memory
    if cfg.wan:
        tensors['text'] = codec.embed(captions).bfloat16().cpu()
    rows = torch.stack([tensors['frames'][:8], (codec.decode(z[:8]).cpu() * 255).byte()])[:, :, ::2 * codec.stride]
    sheet = rearrange(rows, 'v b f h w c -> (b v h) (f w) c').numpy()
    if split == 0:
        del tensors['frames']
    save_tensors(f'{folder}/{name}_{first:06d}.safetensors', tensors, {'captions': captions})
    return {'file': f'{name}_{first:06d}.safetensors', 'clips': len(indices)}, sheet


def load_manifest(folder):
    try:
        with open(f'{folder}/manifest.json') as f:
            return json.load(f)
    except (OSError, ValueError) as e:
        raise BadInput(f'{folder}/manifest.json: no clips there ({e}): run python data.py --out {folder}') from None


class Clips:
    """The clips of one split of a folder, read by memory map, one at a time; `keys` are the tensors of a clip."""
    def __init__(self, folder, split='train', keys=('latents', 'c2w', 'K')):
        self.manifest, self.split, self.rows, self.captions, self.files = load_manifest(folder), split, [], [], []
        for shard in (s for s in self.manifest['shards'] if s['file'].startswith(split)):
            path = os.path.join(folder, os.path.basename(shard['file']))
            try:
                f = safe_open(path, 'pt')
                captions = json.loads(f.metadata()['meta'])['captions']
                n = f.get_slice('latents').get_shape()[0]
                assert n == shard['clips'] == len(captions), f'{n} clips, the manifest says {shard["clips"]}'
            except (SafetensorError, AssertionError, OSError, TypeError, KeyError, ValueError) as e:
                raise BadInput(f'{path}: missing or corrupt shard ({e}): delete {folder} and make it again') from None
            self.rows += [(len(self.files), i) for i in range(n)]
            self.captions += captions
            self.files.append(f)
        if not self.rows:
            raise BadInput(f'{folder}: no {split} clips: delete it and make it again')
        self.embedded = 'text' in self.files[0].keys()
        self.keys = (*keys, 'text') if self.embedded else keys

    __len__ = lambda self: len(self.rows)

    def read(self, i, keys=None):
        f, row = self.rows[i]
        return [self.files[f].get_slice(k)[row] for k in keys or self.keys]

    def codec(self, device='cpu'):
        return find_codec(self.manifest['recipe'].get('wan', ''), str(device))

    def truth(self, n, frames):
        """The pictures of the first `frames` latents of the first n held-out clips, (n, pictures, H, W, 3) in [0, 1]."""
        pictures = 1 + (frames - 1) * (Wan if 'wan' in self.manifest['recipe'] else Dct).stride
        return torch.stack([self.read(i, ['frames'])[0][:pictures] for i in range(n)]).float() / 255


@dataclass
class Batch:
    x0: torch.Tensor              # (B, F, 16, H, W) clean latents
    camera: Camera                # poses relative to frame 0
    text: torch.Tensor            # (B, text_len, text_dim)
    eps: torch.Tensor             # (B, F, 16, H, W) the noise of this step
    u: torch.Tensor               # (B, 2 F + 4) uniform numbers: times, dropouts, times of the history
    captions: tuple
    more: tuple = ()              # further tensors of the clips, if Clips was told their keys


def get_batch(clips, first, count, frames, cfg, seed=0, device='cpu', whole=False):
    """Samples first .. first + count of an endless stream. Sample j (clip, window, noise, dropout) depends on (seed,
    split, j) alone: ranks and micro-batches take slices of it, so a resumed or a parallel run sees the same. whole: all
    frames of the clips. cfg.sink: half of the training windows begin with another frame of their clip, or, if clips have a door, all with that."""
    if cfg.sink and (cfg.first > 1 or 'plucker' not in cfg.camera):
        raise BadInput('--sink keeps one frame, whose pose is the origin: it needs a first chunk of one frame and Plücker maps')
    rows, train, door = [], clips.split == 'train', cfg.sink and clips.manifest['recipe'].get('door')
    for j in range(first, first + count):
        r = np.random.default_rng([seed, 10 + train, j])
        i = int(r.integers(len(clips))) if train else j % len(clips)                        # held out: in order
        z, c2w, K, *more = clips.read(i)
        frames = max(frames, len(z)) if whole else frames
        if len(z) < frames:
            raise BadInput(f'the clips have {len(z)} frames, {frames} are asked for: use fewer --frames or longer clips')
        a = int(r.integers(len(z) - frames + 1)) if train else 0
        text = pad_text(more.pop(), cfg) if clips.embedded else embed_text([clips.captions[i]], cfg.text_len, cfg.text_dim)[0]
        eps, u = r.standard_normal((frames, *z.shape[1:]), dtype=np.float32), r.random(2 * frames + 4, dtype=np.float32)
        window, jump = [*range(a, a + frames)], (a > 0 or bool(jumps(c2w[None]))) if door else cfg.sink and train and len(z) > frames and r.random() < .5
        window[0] = 0 if door else int(r.integers(len(z))) if jump else a    # the door, or any frame of the clip
        rows.append((z[window].float(), c2w[window], K.expand(frames, 4), text, torch.from_numpy(eps), torch.from_numpy(u),
                     torch.tensor(jump), *more, clips.captions[i]))
    *rows, captions = zip(*rows)
    z, c2w, K, text, eps, u, jump, *more = map(torch.stack, rows)
    return to_device(Batch(z, Camera(relative(c2w), K, step=steps(c2w, jump=jump)), text, eps, u, captions, tuple(more)), device)


def to_device(x, device):
    """x with the tensors in it, in its fields or items, moved."""
    if is_dataclass(x):
        return replace(x, **{f.name: to_device(getattr(x, f.name), device) for f in fields(x)})
    return tuple(to_device(y, device) for y in x) if isinstance(x, tuple) else x.to(device) if torch.is_tensor(x) else x


def batches(firsts, clips, count, frames, cfg, seed, device):
    """get_batch(clips, first, count, ...) for each of `firsts`; for a GPU, which would wait, processes make them ahead."""
    sample = functools.partial(get_batch, clips, count=count, frames=frames, cfg=cfg, seed=seed)
    sample(0, count=1)                                        # bad input is told here, not by a process with its traceback
    for batch in DataLoader(firsts, batch_size=None, collate_fn=sample, num_workers=4 * (device.type == 'cuda')):
        yield to_device(batch, device)


def noise_for(seeds, shape, device):
    """The function n -> noise (B, n, *shape) that `rollout` asks for: sample b's numbers depend on seeds[b] alone."""
    rngs = [np.random.default_rng([9, *np.atleast_1d(s)]) for s in seeds]
    return lambda n: torch.from_numpy(np.stack([r.standard_normal((n, *shape), dtype=np.float32) for r in rngs])).to(device)

# -----------------------------------------------------------------------------
# pictures

def psnr(a, b):
    """Peak signal-to-noise ratio in dB of pictures in [0, 1], (..., H, W, 3) -> (...); a float tensor."""
    return -10 * (a.clamp(0, 1) - b.clamp(0, 1)).square().mean((-3, -2, -1)).clamp(min=1e-10).log10()


def sharpness(x):
    """Gradient energy of the luma of pictures (..., H, W, 3) -> (...)."""
    y = x.mean(-1)
    return y.diff(dim=-1).square().mean((-2, -1)) + y.diff(dim=-2).square().mean((-2, -1))


def motion(x):
    """Energy of the frame differences of videos (..., F, H, W, 3) -> (..., F - 1)."""
    return x.diff(dim=-4).square().mean((-3, -2, -1))


def frechet(a, b):
    """Fréchet distance of two sets of pictures (n, H, W, 3), between Gaussians fitted to 80 features of each: 4 x 4
    means of the colours, of the luma's gradient energy and of its square root."""
    def features(x):
        x = x.movedim(-1, 1).double()
        luma = x.mean(1, keepdim=True)
        energy = F.pad(luma.diff(dim=-1), (0, 1)).square() + F.pad(luma.diff(dim=-2), (0, 0, 0, 1)).square()
        return F.adaptive_avg_pool2d(torch.cat([x, energy * 10, energy.sqrt()], 1), 4).flatten(1)
    (x, cx), (y, cy) = ((f, torch.cov(f.T)) for f in (torch.cat([features(p) for p in x.split(500)]) for x in (a, b)))
    if not (cx @ cy).isfinite().all():
        return math.nan                                                       # the eigenvalues of NaN crash some LAPACKs
    root = torch.linalg.eigvals(cx @ cy).real.clamp(min=0).sqrt().sum()       # tr (cx cy)^1/2
    return ((x.mean(0) - y.mean(0)).square().sum() + cx.trace() + cy.trace() - 2 * root).item()


def write_strip(path, *videos, scale=2, most=17):
    """PNG with the rows videos[0][b], videos[1][b], ... for each b; each video (B, F, H, W, 3) in [0, 1]. Of more than
    `most` frames, as many at equal distances."""
    shown = torch.linspace(0, videos[0].shape[1] - 1, min(videos[0].shape[1], most)).round().long()
    picture = rearrange(torch.stack([v[:, shown] for v in videos]), 'v b f h w c -> (b v h) (f w) c').clamp(0, 1).mul(255).round().byte().cpu()
    tmp = f'{path}.tmp{os.getpid()}.png'
    iio.imwrite(tmp, picture.repeat_interleave(scale, 0).repeat_interleave(scale, 1).numpy())
    os.replace(tmp, path)


if __name__ == '__main__':
    command_line(make, Config, __doc__)
