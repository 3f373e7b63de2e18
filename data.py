"""
Worlds, codecs, captions, clips on disk, batches.

    python data.py --world lowpoly                  # 500 plans, about a minute on 2 cores
    python data.py --world lowpoly --plans 1        # one plan to live in; held out are new paths through it
    python data.py --world doom                     # a real game: pip install vizdoom
    python data.py --world folder --videos DIR --pose_scale 1      # your own: name.mp4 + name.txt or .json
    ... --wan Wan2.1-T2V-1.3B-Diffusers --height 480 --width 832 --frames 81     # as Wan's own latents

writes data/<world>/: manifest.json, train and val shards (safetensors, read by memory map), a contact sheet.
A shard holds, for n clips of F latent frames (a frame is a picture; with --wan all but the first are four):

    latents (n, F, 16, H / 8, W / 8) float16      what the network sees (HunyuanVideo: 32, H / 16, W / 16)
    c2w     (n, F, 4, 4) float32                  the pose of each latent, in any world frame
    K       (n, 4) float32                        normalised fx, fy, cx, cy
    frames  (n, F, H, W, 3) uint8                 val shards only: the truth; with --wan (n, 4 F - 3, H, W, 3)
    text    (n, tokens, text_dim) bfloat16        --wan only: the captions, embedded
    null_text (tokens, text_dim) bfloat16         --wan only: the empty prompt, embedded
    plan, palette (n,) int64                      lowpoly only: the seeds of its geometry and its colours
    header: {"captions": [...]}

Your own data: DIR holds name.mp4 (or a folder `name` of pictures) beside name.txt or name.json, with a pose
for every frame, and name.caption if you like; worlds/folder.py says what a file of poses looks like. Or write
a world: a function (cfg, split, indices) -> (dict of frames, c2w and K, captions) of the clips `indices` of a
split, 0 to train on and 1 held out. lowpoly_clips is one, others are in worlds/.

World frame: OpenCV axes as in camera.py, the floor at y = 0, the camera 1 m above it.
"""
import copy
import functools
import json
import math
import multiprocessing
import os
import pkgutil
import tempfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, is_dataclass, replace

import imageio.v3 as iio
import numpy as np
import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from torch.nn import functional
from torch.utils.data import DataLoader
from tqdm import tqdm

from camera import (BadInput, Camera, intrinsics, moves, random_path, rays, relative,
                    starts_elsewhere)
from common import command_line, cpu_cores, permissions, save_tensors, write_json, written_whole


@dataclass
class Config:
    world: str = 'lowpoly'        # lowpoly | doom | folder
    out: str = ''                 # folder; empty: data/<world>
    plans: int = 500              # lowpoly: 1, or many; with many the val clips are of plans never trained on
    clips: int = 1600             # training clips
    val_clips: int = 128          # held-out clips; stage 3 chooses by one half and reports the other
    frames: int = 17              # frames per clip; training takes random windows of it
    door: bool = False            # lowpoly: all paths of a plan begin at one place; use with --sink
    height: int = 64
    width: int = 64
    map: str = 'my_way_home'      # doom: a map that ships with ViZDoom
    videos: str = ''              # folder: where the videos and their poses are, or minWM's input JSON
    stride: int = 1               # folder: keep every n-th frame
    pose_scale: float = 0.0       # folder: metres in a unit of the poses; -1: unknown, a mean move is 0.15 m
    seed: int = 0
    wan: str = ''                 # folder of Wan2.1's or HunyuanVideo-1.5's networks (diffusers'), or nothing

# -----------------------------------------------------------------------------
# world "lowpoly": an exact ray caster. A world is a plan (geometry) and a palette (colours), each from a seed

FOV = 90.0                        # degrees, horizontal
ARENA = 5.0                       # half the side of the square arena, metres
WALL = 2.5                        # the height of its walls, metres
COLOURS = {
    'red': (.80, .22, .20), 'orange': (.90, .55, .12), 'yellow': (.93, .82, .28),
    'green': (.25, .62, .32), 'teal': (.13, .55, .55), 'blue': (.18, .38, .75),
    'purple': (.45, .28, .65), 'pink': (.88, .45, .62), 'white': (.88, .88, .86),
    'grey': (.48, .49, .51), 'brown': (.42, .30, .24), 'mint': (.52, .76, .60),
}
SKIES = {
    'day': (.50, .70, .92), 'dusk': (.93, .62, .48),
    'overcast': (.72, .75, .78), 'night': (.12, .14, .28),
}


def make_plan(seed):
    """Geometry: boxes (6, 2, 3) as (low, high) corners and balls (5, 4) as (centre, radius), metres, float64
    numpy."""
    r = np.random.default_rng([1, seed])
    boxes, balls, spots = [], [], []                          # spots: (centre, half the width) of both
    tries = 0
    while len(spots) < 11:
        tries += 1
        if tries % 10_000 == 0:                               # some seeds leave no room: start again
            boxes, balls, spots = [], [], []
        is_box = len(boxes) < 6
        size = r.uniform(.25, .9, 2) if is_box else np.full(2, r.uniform(.3, .6))     # half the widths
        spot = r.uniform(-ARENA + 1, ARENA - 1, 2)
        if any(np.abs(spot - other).max() < size.max() + reach + .7 for other, reach in spots):
            continue                                          # keep paths of 0.7 m between things
        spots.append((spot, size.max()))
        x, z = spot
        a, b = size
        if is_box:
            boxes.append([[x - a, -r.uniform(.5, 2.2), z - b], [x + a, 0, z + b]])
        else:
            balls.append([x, -a, z, a])
    return np.array(boxes), np.array(balls)


def make_palette(seed):
    """(caption, colours (8, 3) in [0, 1]: sky, floor, 2 of walls, 2 of boxes, 2 of balls). The caption names
    them in that order."""
    r = np.random.default_rng([2, seed])
    sky = r.choice(list(SKIES))
    names = r.permutation(list(COLOURS))[:7]
    caption = '{} sky {} floor {} and {} walls {} and {} boxes {} and {} balls'.format(sky, *names)
    return caption, torch.tensor([SKIES[sky]] + [COLOURS[name] for name in names])


# What the rays o + s d of B worlds meet. o, d and inv = 1 / d are (3, B, R): one coordinate of all rays lies
# together in memory. seen = (distance, surface, tone), each (B, R), is of the nearest thing so far: a surface
# is the number of a colour in the palette, and its tone darkens it.

def cover(seen, hit, *thing):
    """`seen`, covered where `hit` by another thing: its (distance, surface, tone)."""
    return [torch.where(hit, new, old) for new, old in zip(thing, seen)]


def add_walls(seen, o, d, inv):
    """The arena's four walls, from inside, each in its own tone; above them the sky."""
    x, z = (torch.sign(d[::2]) * ARENA - o[::2]) * inv[::2]
    s = torch.minimum(x, z)
    along_z = z < x
    tone = torch.where(along_z, torch.where(d[2] > 0, .9, .65), torch.where(d[0] > 0, 1., .75))
    hit = s < seen[0]
    seen = cover(seen, hit, s, torch.where(along_z, 3., 2.), tone)
    return cover(seen, hit & (o[1] + s * d[1] < -WALL), 1e4, 0., 1.)


def add_box(seen, o, inv, corners, surface):
    """A box with corners (2, 3, B, 1), by the slab method. Its top is lightest."""
    low, high = (corners - o) * inv
    enter = torch.minimum(low, high)                          # where the ray enters the slab of each axis
    s = enter.amax(0)
    hit = (s < torch.maximum(low, high).amin(0)) & (s > 0) & (s < seen[0])
    tone = torch.where(s == enter[1], 1., torch.where(s == enter[0], .80, .62))
    return cover(seen, hit, s, surface, tone)


def add_ball(seen, o, d, centre, radius, surface):
    """A ball in the sun: centre (3, B, 1), radius (B, 1)."""
    o = o - centre
    b = (o * d).sum(0)
    q = b * b - (o * o).sum(0) + radius ** 2
    s = -b - q.clamp(min=0).sqrt()
    hit = (q > 0) & (s > 0) & (s < seen[0])
    sun = d.new_tensor([.4, -.8, -.45])[:, None, None]
    tone = .75 + .25 * (sun * (o + s * d)).sum(0) / radius
    return cover(seen, hit, s, surface, tone)


class Lowpoly:
    """A batch of B worlds as tensors on a device; `render` casts rays into all of them at once."""

    def __init__(self, plans, palettes, device='cpu'):
        geometry = [np.stack(x, -1) for x in zip(*map(make_plan, plans))]
        colours = [make_palette(seed)[1].T for seed in palettes]
        # (6, 2, 3, B, 1) and (5, 4, B, 1)
        self.boxes, self.balls = (torch.tensor(x[..., None]).to(device, torch.float32) for x in geometry)
        self.colours = torch.stack(colours, 1).to(device)     # (3, B, 8)

    def shade(self, o, d):
        """Colour (B, R, 3) in [0, 1], distance (B, R) in metres and surface (B, R), a number that jumps at
        edges, of the rays o + s d, d of unit length, (B, R, 3) each."""
        o, d = (x.movedim(-1, 0).contiguous() for x in (o, d))                # (3, B, R)
        d = torch.where(d.abs() < 1e-6, 1e-6, d)
        inv = 1 / d
        # the floor, a checkerboard of 1 m
        s = -o[1] * inv[1]
        check = (o[::2] + s * d[::2]).floor().sum(0) % 2
        seen = torch.where(s > 0, s, 1e4), torch.ones_like(s), .85 + .15 * check
        seen = add_walls(seen, o, d, inv)
        for i, box in enumerate(self.boxes):
            seen = add_box(seen, o, inv, box, 4. + i % 2)
        for i, ball in enumerate(self.balls):
            seen = add_ball(seen, o, d, ball[:3], ball[3], 6. + i % 2)
        distance, surface, tone = seen
        colour = torch.gather(self.colours, 2, surface.long().expand_as(d)) * tone
        # the sky pales towards the horizon, and fog of its colour hides what is far
        up = (-d[1]).clamp(0, 1)
        haze = self.colours[..., :1] * (1 - .25 * up) + .12 * (1 - 3 * up).clamp(0, 1)
        colour = torch.lerp(haze, colour, torch.exp(-distance / 30)).clamp(0, 1)
        return colour.movedim(0, -1).contiguous(), distance, surface + tone / 2

    def render(self, c2w, K, H=64, W=64, edges=.25):
        """Pictures (B, V, H, W, 3) in [0, 1] and distances (B, V, H, W) in metres of V views c2w (B, V, 4, 4)
        of each world. The share `edges` of the pixels, where the surface changes most, is sampled four times
        (anti-aliasing)."""
        if c2w.shape[1] > 256:                                # in parts: a long path would fill the memory
            parts = [self.render(*part, H, W, edges)
                     for part in zip(c2w.split(256, 1), K.split(256, 1))]
            return tuple(torch.cat(x, 1) for x in zip(*parts))
        B, V = c2w.shape[:2]
        origin, direction = rays(c2w, K, H, W)                # (B, V, 3), (B, V, H, W, 3)
        origin = origin[:, :, None, None].expand_as(direction).reshape(B, -1, 3)
        colour, distance, surface = self.shade(origin, direction.reshape(B, -1, 3))
        if edges:
            # the n pixels of a world whose surface differs most from that of a neighbour
            surface = surface.view(B * V, 1, H, W)
            change = functional.max_pool2d(surface, 3, 1, 1) + functional.max_pool2d(-surface, 3, 1, 1)
            change = change.view(B, -1)
            index = change.topk(int(edges * change.shape[1]), 1).indices[..., None].expand(-1, -1, 3)
            # how a unit ray changes from one pixel to the next: dx to the right, dy down
            z = torch.einsum('bvi,bvhwi->bvhw', c2w[..., :3, 2], direction)[..., None]
            pixel = c2w[..., :3, :2] / (K[..., None, :2] * K.new_tensor([W, H]))
            dx, dy = (z * axis[:, :, None, None] for axis in pixel.unbind(-1))
            # of the n pixels alone: (B, n, 3)
            o, d, dx, dy = (x.reshape(B, -1, 3).gather(1, index) for x in (origin, direction, dx, dy))
            total = 0
            for a in (-.25, .25):
                for b in (-.25, .25):
                    total += self.shade(o, functional.normalize(d + a * dx + b * dy, dim=-1))[0]
            colour = colour.scatter(1, index, total / 4)
        return colour.view_as(direction), distance.view(B, V, H, W)


def free(plan, x, z, margin=.35):
    """May one stand at (x, z), metres? The plan's walls, boxes and balls keep a distance of `margin`."""
    boxes, balls = plan
    p = np.array([x, z])
    in_box = (boxes[:, 0, ::2] - margin < p) & (p < boxes[:, 1, ::2] + margin)
    off_balls = np.linalg.norm(balls[:, :3:2] - p, axis=1) > balls[:, 3] + margin
    return np.abs(p).max() < ARENA - margin and not in_box.all(1).any() and off_balls.all()


def lowpoly_clips(cfg, split, indices):
    """Render clips: dict of tensors as a shard holds them, and captions. Clip i depends on (seed, split, i)
    alone."""
    rows = []
    offset = 10 ** 7 * cfg.seed
    for i in indices:
        r = np.random.default_rng([cfg.seed, split, i])
        plan = offset + r.integers(cfg.plans)
        if cfg.plans > 1:
            plan += 10 ** 6 * split                           # held-out clips are of other plans
        palette = offset + r.integers(4 if cfg.plans == 1 else 10 ** 6)
        geometry = make_plan(plan)
        door = np.random.default_rng(plan) if cfg.door else None
        may_stand = functools.partial(free, geometry)
        path = random_path(may_stand, ARENA, cfg.frames, r, door)
        if cfg.door and split == 0 and i % 2:                 # half of the clips jump from there to anywhere
            path[1:] = random_path(may_stand, ARENA, cfg.frames, r)[1:]
        rows.append((plan, palette, path))
    plans, palettes, paths = zip(*rows)

    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    c2w = torch.stack(paths)                                  # (n, F, 4, 4)
    K = intrinsics(FOV, cfg.width / cfg.height).expand(len(c2w), cfg.frames, 4)
    frames = []
    size = 1 if device == 'cpu' else len(c2w)                 # one at a time fits a CPU's cache
    for a in range(0, len(c2w), size):
        part = slice(a, a + size)
        world = Lowpoly(plans[part], palettes[part], device)
        pictures, _ = world.render(c2w[part].to(device), K[part].to(device), cfg.height, cfg.width)
        frames.append((pictures * 255).round().byte().cpu())
    tensors = dict(frames=torch.cat(frames), c2w=c2w, K=K[:, 0],
                   plan=torch.tensor(plans), palette=torch.tensor(palettes))
    return tensors, [make_palette(seed)[0] for seed in palettes]

# -----------------------------------------------------------------------------
# codec "dct": a picture as 16 channels at 1/8 resolution, the shape of Wan's latents, without weights

# the coefficients that are kept, of 3 planes x 8 rows x 8 columns: (plane, row, column) as octal digits
CHANNELS = [int(digits, 8) for digits in
            '000 001 010 020 011 002 003 012 021 030 100 101 110 200 201 210'.split()]
YCC = torch.tensor([[.299, .587, .114],
                    [-.168736, -.331264, .5],
                    [.5, -.418688, -.081312]])
# mean and standard deviation of each channel on lowpoly, before scaling
DCT_MEAN = torch.zeros(16, 1, 1)
DCT_MEAN[0] = -.26
DCT_STD = torch.tensor([1.36, .172, .246, .103, .092, .068, .048, .042, .053, .072,
                        .765, .122, .152, .806, .129, .156])
# z = (c - mean) / (k std^gamma) with k such that the RMS is 1: gamma 1 whitens, 0 leaves the energies
GAMMA = 0.5
SCALE = DCT_STD ** GAMMA * (DCT_STD ** (2 - 2 * GAMMA)).mean().sqrt()


def lapped_dct(n):
    """The orthogonal (n, n) matrix, float32, of an 8-point DCT with a pre-filter across block edges. Together
    they are a lapped transform (Malvar's type-II LOT in the form of Tran, Liang and Tu 2003): basis functions
    16 wide that fade out, so no block edges, and the picture's border needs no special case."""
    def cosines(n, half):                                     # rows of a DCT-II (half = 0) or DCT-IV (.5)
        i = torch.arange(n, dtype=torch.float64)
        m = (2 / n) ** .5 * torch.cos(math.pi * (i[:, None] + half) * (i + .5) / n)
        if half == 0:
            m[0] /= 2 ** .5
        return m

    I = torch.eye(4, dtype=torch.float64)
    J = I.flip(0)
    butterfly = torch.block_diag(I, -I) + torch.eye(8).flip(0)              # [[I, J], [J, -I]]
    rotation = torch.block_diag(I, J @ cosines(4, 0).T @ cosines(4, .5) @ J)
    edge = butterfly @ rotation @ butterfly / 2               # (8, 8), between the middles of two blocks
    before = torch.block_diag(I, *[edge] * (n // 8 - 1), I)
    return (torch.block_diag(*[cosines(8, 0)] * (n // 8)) @ before).float()


def encode(frames):
    """Pictures (..., H, W, 3), uint8 or float in [0, 1] -> latents (..., 16, H / 8, W / 8), RMS about 1."""
    x = frames.float() / 255 if frames.dtype == torch.uint8 else frames
    rows, cols = (lapped_dct(n).to(x) for n in x.shape[-3:-1])
    y = torch.einsum('uh,...hwc,kc,vw->...kuv', rows, x - .5, YCC.to(x), cols)
    z = rearrange(y, '... k (h u) (w v) -> ... (k u v) h w', u=8, v=8)[..., CHANNELS, :, :]
    return (z - DCT_MEAN.to(z)) / SCALE.to(z)[:, None, None]


def decode(z):
    """Latents (..., 16, h, w) -> pictures (..., 8 h, 8 w, 3), float32 in [0, 1]."""
    z = z.float()
    z = z * SCALE.to(z)[:, None, None] + DCT_MEAN.to(z)
    y = z.new_zeros(*z.shape[:-3], 3 * 8 * 8, *z.shape[-2:])
    y[..., CHANNELS, :, :] = z
    y = rearrange(y, '... (k u v) h w -> ... k (h u) (w v)', u=8, v=8)
    rows, cols = (lapped_dct(n).to(y) for n in y.shape[-2:])
    x = torch.einsum('uh,...kuv,ck,vw->...hwc', rows, y, YCC.inverse().to(z), cols)
    return (x + .5).clamp(0, 1)


@functools.lru_cache(maxsize=4096)
def embed_caption(caption, text_len, text_dim):
    """One caption -> (text_len, text_dim), see embed_text."""
    half = text_dim // 2
    angle = torch.arange(text_len)[:, None] / 100 ** (torch.arange(half) / half)
    out = torch.cat([angle.cos(), angle.sin()], -1)           # (text_len, text_dim)
    words = caption.lower().split()[:text_len]
    for i, word in enumerate(words):
        r = np.random.default_rng(zlib.crc32(word.encode(errors='surrogatepass')))
        out[i] += torch.from_numpy(r.standard_normal(text_dim, dtype=np.float32))
    out[len(words):] = 0
    return out


def embed_text(captions, text_len, text_dim):
    """Captions -> (B, text_len, text_dim): a fixed Gaussian vector per word (seeded by its CRC-32) plus a
    sinusoid of its place in the sentence. Zeros behind the last word; the empty caption, all zeros, is the
    null prompt."""
    return torch.stack([embed_caption(caption, text_len, text_dim) for caption in captions])


class Dct:
    """The codec of most clips: pictures and captions as latents and embeddings, without weights."""
    stride = 1                                                # pictures in a latent
    across = 8                                                # pixels in a latent's cell
    encode = staticmethod(encode)
    decode = staticmethod(decode)

    def stream(self):
        """A function that decodes a video chunk by chunk."""
        return decode

    def embed(self, captions, cfg, first=None):
        return embed_text(captions, cfg.text_len, cfg.text_dim)


@functools.lru_cache(maxsize=2)
def find_codec(folder='', device='cpu'):
    """The codec of clips whose recipe has this `wan`."""
    if not folder:
        return Dct()
    from worlds.wan import open_codec
    return open_codec(folder, device)

# -----------------------------------------------------------------------------
# making clips

WORLDS = 'lowpoly', 'doom', 'folder'


def find_world(name):
    """The function (cfg, split, indices) -> (dict of tensors, captions) of a world."""
    if name == 'lowpoly':
        return lowpoly_clips
    return pkgutil.resolve_name(f'worlds.{name}:{name}_clips')            # imported when it is asked for


def check(cfg):
    """Raise BadInput if such clips cannot be made."""
    if cfg.world not in WORLDS:
        raise BadInput(f'--world {cfg.world}: choose one of {", ".join(WORLDS)}')
    if (min(cfg.plans, cfg.clips, cfg.val_clips, cfg.frames, cfg.height, cfg.width) < 1
            or cfg.height % 16 or cfg.width % 16):
        raise BadInput('plans, clips, val_clips and frames must be at least 1, '
                       'height and width multiples of 16')
    if cfg.world == 'folder':
        from worlds import folder
        folder.check(cfg)
    if cfg.wan and cfg.frames % 4 != 1:
        raise BadInput(f'--frames {cfg.frames}: Wan\'s latents hold 1, 5, 9, 13 ... pictures')


def make_recipe(cfg):
    """The fields of cfg that matter to the clips, for the manifest: door and wan only where they are used."""
    recipe = {name: value for name, value in asdict(cfg).items() if value or name not in ('door', 'wan')}
    del recipe['out']
    if cfg.world != 'folder':
        del recipe['videos'], recipe['stride'], recipe['pose_scale']
    return recipe


def make(cfg):
    """Render a world's clips into the folder cfg.out, all or nothing. Returns the folder."""
    check(cfg)
    out = os.path.normpath(cfg.out or f'data/{cfg.world}')
    recipe = make_recipe(cfg)
    if os.path.exists(f'{out}/manifest.json'):
        old = load_manifest(out)['recipe']
        changed = [f'{name} {old.get(name)}, not {recipe.get(name)}'
                   for name in recipe | old if old.get(name) != recipe.get(name)]
        if changed:
            raise BadInput(f'{out} was made with {", ".join(changed)}: give another --out, or delete it')
        print(f'{out} is there already')
        return out
    if os.path.isfile(out) or os.path.isdir(out) and os.listdir(out):
        raise BadInput(f'{out} is there, and no folder of clips: give another --out')
    parent = os.path.dirname(out) or '.'
    try:
        os.makedirs(parent, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=os.path.basename(out) + '.tmp', dir=parent,
                                             ignore_cleanup_errors=True)
    except OSError as e:
        raise BadInput(f'{out}: cannot be written ({e.strerror}): give another --out') from None
    with folder as path:
        render(cfg, recipe, path)
        os.chmod(path, permissions(0o777))
        os.replace(path, out)
    print(f'{cfg.clips} + {cfg.val_clips} clips of {cfg.frames} frames in {out}; look at {out}/sheet.png')
    return out


def render(cfg, recipe, folder):
    """Fill an empty folder: shards, a contact sheet, the manifest."""
    size = 8 if cfg.wan else 50                               # clips in a shard
    jobs = []
    for split, n in enumerate((cfg.clips, cfg.val_clips)):
        jobs += [(cfg, folder, split, range(n)[a:a + size]) for a in range(0, n, size)]
    method = 'spawn' if torch.cuda.is_initialized() else None  # a fork of a process with CUDA cannot use it
    with ProcessPoolExecutor(cpu_cores(), multiprocessing.get_context(method)) as pool:
        run = map if cfg.wan else pool.map                    # Wan's networks are large: one process
        shards = list(tqdm(run(make_shard, jobs), total=len(jobs), desc=cfg.world, unit='shard'))
    write_json(f'{folder}/manifest.json', {
        'recipe': recipe, 'codec': 'wan' if cfg.wan else 'dct', 'gamma': GAMMA, 'shards': shards})


def make_shard(job):
    """Render, encode and write the clips of a shard. Returns its entry in the manifest."""
    cfg, folder, split, indices = job
    if not cfg.wan:
        torch.set_num_threads(1)                              # there is a process for every core
    codec = find_codec(cfg.wan, 'cuda' if torch.cuda.is_available() else 'cpu')
    tensors, captions = find_world(cfg.world)(cfg, split, indices)
    frames = tensors['frames']
    # clip by clip, for the memory's sake
    latents = torch.cat([codec.encode(clip[None]).half().cpu() for clip in frames])
    tensors['latents'] = latents
    tensors['c2w'] = tensors['c2w'][:, ::codec.stride]
    if cfg.wan:
        tensors['text'] = codec.embed(captions, first=latents[:, :1]).bfloat16().cpu()
        tensors['null_text'] = codec.embed([''])[0].bfloat16().cpu()
    if split == 0:
        del tensors['frames']
    file = f'{("train", "val")[split]}_{indices[0]:06d}.safetensors'
    save_tensors(f'{folder}/{file}', tensors, {'captions': captions})

    if split == 0 and indices[0] == 0:                        # a contact sheet: pictures, decoded below them
        some = list(range(0, len(frames), max(1, len(frames) // 8)))[:8]             # neighbours may be alike
        decoded = (codec.decode(latents[some]).cpu() * 255).byte()
        rows = torch.stack([frames[some], decoded])[:, :, ::2 * codec.stride]
        iio.imwrite(f'{folder}/sheet.png', rearrange(rows, 'v b f h w c -> (b v h) (f w) c').numpy())
    return {'file': file, 'clips': len(indices)}

# -----------------------------------------------------------------------------
# clips on disk

def load_manifest(folder):
    """What a folder of clips says of itself."""
    try:
        with open(f'{folder}/manifest.json') as f:
            manifest = json.load(f)
        dict(manifest['recipe'])                              # an error if it is none
        for shard in manifest['shards']:
            os.path.basename(shard['file'])
        return manifest
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise BadInput(f'{folder}: no clips there ({e}): name another folder, or make them, '
                       f'as by python data.py --out {folder}') from None


class Clips:
    """The clips of one split of a folder, read by memory map, one at a time; `keys` are a clip's tensors."""

    def __init__(self, folder, split='train', keys=('latents', 'c2w', 'K')):
        self.manifest = load_manifest(folder)
        self.wan = self.manifest['recipe'].get('wan', '')     # the folder of the codec's weights
        self.split = split
        self.rows, self.captions = [], []                     # of each clip: (its file, its row in the file)
        self.size = None                                      # (H / 8, W / 8), one for all
        for shard in self.manifest['shards']:
            if shard['file'].startswith(split):
                self.open(folder, shard)
        if not self.rows:
            raise BadInput(f'{folder}: no {split} clips: delete it and make it again')
        self.embedded = 'text' in self.rows[0][0].keys()
        self.keys = (*keys, 'text') if self.embedded else keys

    def open(self, folder, shard):
        """Add the clips of a shard, an entry of the manifest."""
        path = f'{folder}/{os.path.basename(shard["file"])}'
        try:
            f = safe_open(path, 'pt')
            captions = json.loads(f.metadata()['meta'])['captions']
            n, F, C, h, w = f.get_slice('latents').get_shape()
            across = 8 if C == 16 else 16                             # pixels; 16 are HunyuanVideo-1.5's
            want = {'latents': [n, F, 2 * across, h, w], 'c2w': [n, F, 4, 4], 'K': [n, 4]}
            if self.split == 'val':
                pictures = 4 * F - 3 if self.wan else F
                want['frames'] = [n, pictures, across * h, across * w, 3]
            shapes = {key: f.get_slice(key).get_shape() for key in want}
            if shapes != want or across * h % 16 or across * w % 16:
                raise ValueError(f'shapes {shapes}')
            self.size = self.size or (h, w)
            if self.size != (h, w):
                raise ValueError(f'latents of {h} x {w}, elsewhere of {self.size[0]} x {self.size[1]}')
            if not n == shard['clips'] == len(captions):
                raise ValueError(f'{n} clips, the manifest says {shard["clips"]}')
        except (SafetensorError, OSError, TypeError, KeyError, ValueError) as e:
            raise BadInput(f'{path}: missing or corrupt shard ({e}): '
                           f'delete {folder} and make it again') from None
        self.rows += [(f, i) for i in range(n)]
        self.captions += captions

    def __len__(self):
        return len(self.rows)

    def part(self, start, end):
        """The same, of the clips start .. end alone."""
        part = copy.copy(self)
        part.rows, part.captions = self.rows[start:end], self.captions[start:end]
        return part

    def read(self, i, keys=None):
        """A list of the tensors of clip i."""
        f, row = self.rows[i]
        return [f.get_slice(key)[row] for key in keys or self.keys]

    def null_text(self, text, cfg):
        """The empty prompt in place of text (B, text_len, text_dim), 1 or B of it; None where it is zeros."""
        f, _ = self.rows[0]
        if 'null_text' not in f.keys():
            return None
        from worlds.wan import without_words
        return without_words(text, f.get_tensor('null_text'), cfg)

    def codec(self, device='cpu'):
        return find_codec(self.wan, str(device))

    def truth(self, n, frames):
        """The pictures of the first `frames` latents of the first n held-out clips: (n, pictures, H, W, 3) in
        [0, 1]."""
        pictures = 1 + (frames - 1) * (4 if self.wan else 1)  # Wan's latents are four pictures, but the first
        clips = [self.read(i, ['frames'])[0][:pictures] for i in range(n)]
        return torch.stack(clips).float() / 255


def open_clips(cfg, run):
    """(training clips, held-out clips) of the folder cfg.data. Rank 0 makes the default one if it is missing;
    another name may be a slip."""
    default = f'data/{Config.world}'
    if run.rank == 0 and cfg.data == default and not os.path.exists(f'{default}/manifest.json'):
        make(Config())
    run.barrier()
    return Clips(cfg.data), Clips(cfg.data, 'val')

# -----------------------------------------------------------------------------
# batches

@dataclass
class Draws:
    """The uniform random numbers of a step, u (B, 2 F + 4) in [0, 1), by what the losses make of them:

    t           (B, F) the time of each frame, still to be shifted; frames of a chunk read one column
    first       (B,)   stage 0: is frame 0 given?
    restart     (B,)   stage 1 with drift, the same number: does the rollout begin again?
    drop_text   (B,)   is the prompt dropped?
    drop_camera (B,)   is the camera dropped?
    noise_seed  (B,)   stage 1 with drift: the noise of the rollout
    t_history   (B, F) the time of each frame of the history, in shares of --context_noise
    """
    u: torch.Tensor

    def __post_init__(self):
        F = (self.u.shape[1] - 4) // 2
        self.t = self.u[:, :F]
        self.first, self.drop_text, self.drop_camera, self.noise_seed = self.u[:, F:F + 4].unbind(1)
        self.restart = self.first
        self.t_history = self.u[:, F + 4:]

    def __reduce__(self):                                     # u alone is sent from process to process
        return Draws, (self.u,)


@dataclass
class Batch:
    x0: torch.Tensor              # (B, F, 16, H, W) clean latents (stage 2's pairs: the noised history)
    camera: Camera                # poses relative to frame 0
    text: torch.Tensor            # (B, text_len, text_dim)
    eps: torch.Tensor             # (B, F, 16, H, W) the noise of this step
    draws: Draws                  # its random numbers
    captions: tuple
    more: tuple = ()              # further tensors of the clips, if Clips was given their keys
    null_text: torch.Tensor | None = None     # (1 or B, text_len, text_dim) the empty prompt, if not zeros


def draw_sample(clips, j, frames, cfg, seed, whole):
    """(tensors, caption) of sample j: a window of a clip, and the random numbers that its loss will use."""
    train = clips.split == 'train'
    r = np.random.default_rng([seed, 11 if train else 10, j])
    i = r.integers(len(clips)) if train else j % len(clips)                   # held-out clips come in order
    latents, c2w, K, *more = clips.read(i)
    if not all(x.isfinite().all() for x in (latents, c2w, K)):
        raise BadInput(f'the {clips.split} clips hold what is no number, in clip {i}: make them again')
    length = len(latents)
    if whole:
        frames = max(frames, length)
    if length < frames:
        raise BadInput(f'the clips have {length} frames, {frames} are asked for: '
                       f'use --frames {length} or fewer, or make longer clips')
    start = r.integers(length - frames + 1) if train else 0
    if clips.embedded:
        from worlds.wan import pad_text
        text = pad_text(more.pop(), cfg)
    else:
        text = embed_caption(clips.captions[i], cfg.text_len, cfg.text_dim)
    eps = r.standard_normal((frames, *latents.shape[1:]), dtype=np.float32)
    u = r.random(2 * frames + 4, dtype=np.float32)

    # with a sink, frame 0 of a window may come from elsewhere in the clip: from its door, or from anywhere
    window = start + np.arange(frames)
    jump = False                                              # True where it does not lead to frame 1
    if cfg.sink and clips.manifest['recipe'].get('door'):
        window[0] = 0
        jump = start > 0 or bool(starts_elsewhere(c2w[None]))
    elif cfg.sink and train and length > frames and r.random() < .5:
        window[0] = r.integers(length)
        jump = True
    if clips.embedded and window[0] > 0:                      # these rows describe the clip's first picture
        text[:getattr(cfg, 'image_len', 0)] = 0
    tensors = (latents[window].float(), c2w[window].float(), K.float().expand(frames, 4), text,
               torch.from_numpy(eps), torch.from_numpy(u), torch.tensor(jump), *more)
    return tensors, clips.captions[i]


def get_batch(clips, start, count, frames, cfg, seed=0, device='cpu', whole=False):
    """Samples start .. start + count of an endless stream. Sample j (clip, window, noise, dropout) depends on
    (seed, split, j) alone: ranks and micro-batches take slices of it, so a resumed or a parallel run sees the
    same. whole: all frames of the clips. cfg.sink: half of the training windows begin with another frame of
    their clip, or, if the clips have a door, all with that."""
    if cfg.sink and (cfg.first_chunk > 1 or 'plucker' not in cfg.camera):
        raise BadInput('--sink keeps one frame, whose pose is the origin: '
                       'it needs a first chunk of one frame and Plücker maps')
    samples = [draw_sample(clips, j, frames, cfg, seed, whole) for j in range(start, start + count)]
    tensors, captions = zip(*samples)
    x0, c2w, K, text, eps, u, jump, *more = (torch.stack(column) for column in zip(*tensors))
    camera = Camera(relative(c2w), K, move=moves(c2w, jump=jump))
    batch = Batch(x0, camera, text, eps, Draws(u), captions, tuple(more), clips.null_text(text, cfg))
    return to_device(batch, device)


def to_device(x, device):
    """x with the tensors in it, in its fields or items, moved."""
    if torch.is_tensor(x):
        return x.to(device)
    if isinstance(x, tuple):
        return tuple(to_device(item, device) for item in x)
    if is_dataclass(x):
        return replace(x, **{f.name: to_device(getattr(x, f.name), device) for f in fields(x)})
    return x


def batches(start, clips, cfg, model_cfg, run):
    """From step `start` on, the micro-batches of this process: its slices of every batch. For a GPU, which
    would wait, other processes make them ahead."""
    slices = [(run.rank * cfg.accum + i) * run.micro for i in range(cfg.accum)]
    starts = [step * cfg.batch + offset for step in range(start, cfg.steps) for offset in slices]
    sample = functools.partial(get_batch, clips, count=run.micro, frames=cfg.frames, cfg=model_cfg,
                               seed=cfg.seed)
    sample(0, count=1)                                        # bad input is reported here, not by a process
    workers = 4 if run.device.type == 'cuda' else 0
    for batch in DataLoader(starts, batch_size=None, collate_fn=sample, num_workers=workers):
        yield to_device(batch, run.device)


def noise_for(seeds, shape, device, stream=9):
    """The function n -> noise (B, n, *shape) that `rollout` asks for. Sample b's numbers depend on seeds[b]
    alone. Evaluations and walks draw from stream 9, training from 13."""
    generators = [np.random.default_rng([stream, *np.atleast_1d(seed)]) for seed in seeds]

    def noise(n):
        draws = [r.standard_normal((n, *shape), dtype=np.float32) for r in generators]
        return torch.from_numpy(np.stack(draws)).to(device)
    return noise

# -----------------------------------------------------------------------------
# pictures

def psnr(a, b):
    """Peak signal-to-noise ratio in dB of pictures in [0, 1], (..., H, W, 3) -> (...); a float tensor."""
    error = (a.clamp(0, 1) - b.clamp(0, 1)).square().mean((-3, -2, -1))
    return -10 * error.clamp(min=1e-10).log10()


def write_strip(path, *videos, scale=2, most=17):
    """PNG with the rows videos[0][b], videos[1][b], ... for each b; each video (B, F, H, W, 3) in [0, 1].
    Of more than `most` frames, as many at equal distances."""
    F = videos[0].shape[1]
    shown = torch.linspace(0, F - 1, min(F, most)).round().long()
    rows = torch.stack([video[:, shown] for video in videos])
    picture = rearrange(rows, 'v b f h w c -> (b v h) (f w) c').clamp(0, 1).mul(255).round().byte().cpu()
    picture = picture.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    with written_whole(path, '.png') as tmp:
        iio.imwrite(tmp, picture.numpy())


def path_metrics(video, wrong, truth, suffix=''):
    """psnr@1, psnr@7 and gap@7 of videos (n, F, H, W, 3), by name: PSNR to the truth at frames 1 and 7 (or
    the last), and how much of it is lost along another clip's path, which is what control is worth."""
    last = min(7, truth.shape[1] - 1)
    right = psnr(video, truth).mean(0).tolist()
    lost = psnr(wrong, truth).mean(0).tolist()
    metrics = {f'psnr@1{suffix}': right[1], f'psnr@{last}{suffix}': right[last]}
    if len(video) > 1:                                        # a single clip has no other's path
        metrics[f'gap@{last}{suffix}'] = right[last] - lost[last]
    return metrics


if __name__ == '__main__':
    command_line(make, Config, __doc__)
