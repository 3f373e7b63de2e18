"""
How good are a checkpoint's videos? Follow held-out paths and compare the pictures with the truth.

    python -m experiments.score --ckpt out/ar.safetensors --out out/score.json   # 64 paths of trained length
    python -m experiments.score --out out/long.json --frames 1000 --paths 8      # does it drift?
    python -m experiments.score --out out/text.json --first prompt               # text to world

Prints the numbers and writes them as JSON (lists are by frame), with a PNG of six paths beside it, the truth
above what was generated. In lowpoly, whose every view can be rendered, the poses from which the generated
pictures were taken are found too, from the pictures alone: how far is the camera from where it was sent?
"""
import math
import os
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from camera import BadInput, invert, make_pose, pose_error, rays, relative
from common import check_folder, command_line, write_json
from data import ARENA, Lowpoly, noise_for, psnr, write_strip
from distill_dmd import frechet, motion, sharpness
from stream import generate, held_out, prepare


@dataclass
class Config:
    ckpt: str = 'checkpoints/dmd.safetensors'
    out: str = 'out/score.json'   # and out/score.png
    first: str = 'world'          # frame 0: world (that of the held-out clip), or prompt
    frames: int = 0               # of a path; 0: as trained
    paths: int = 64
    # sampling, as in stream.py
    steps: int = 0                # steps a chunk; 0: 8 of Euler, or 4 for a distilled model
    guidance: float = 1.0         # 1: none
    over: str = 'camera'          # what guidance drops: camera | text
    window: int = 0               # frames the cache holds; 0: as trained
    context: float = -1.0         # noise level of the generated history; -1: as distilled
    seed: int = 0
    data: str = ''                # folder of the held-out clips; not needed for lowpoly and doom
    device: str = 'auto'
    dtype: str = 'float32'        # float32 | bfloat16

# -----------------------------------------------------------------------------
# where was this picture taken?

GUESSES = 4                       # views of the bank that are refined, for each picture
CANDIDATES = 2000                 # views of the bank that are worth the robust cost
LIMIT = .03                       # squared error of a pixel from which on it matters less and less
CELL = 6.                         # degrees between the rays of a panorama
BANK_SIZE = 8                     # pixels a side of a view in the bank
FINE_SIZE = 32                    # and in the refinement
UNIT = [.04, .04, 1., 1.]         # steps of the Jacobian: x and z in metres, yaw and pitch in degrees


def locate(world, pictures, frame, start, K, metres=.25, degrees=10.):
    """Poses (M, 4, 4) at which the pictures (M, H, W, 3) of one Lowpoly world were taken, by looking alone.

    frame (M,) says which frame of a path from `start` (4, 4) each picture is; K (4,). First a bank of small
    views of the world is searched, on a grid of 0.25 m x 10 degrees (yaw and pitch) over all that a path can
    reach by that frame (frame + 2 key units). Then the four best views are refined by damped Gauss-Newton on
    (x, z, yaw, pitch) against small renders. Both use the `robust` cost: what the model made up, because
    nobody had looked there, is wrong wherever the camera stood, and must not pull. The path along which the
    camera was sent is never used.
    """
    reach = int(frame.max()) + 2                          # key units
    offsets, places = reachable_places(start, reach, metres)       # (P, 2), (P, 3)
    turn, pitch = reachable_turns(reach, degrees)         # (T,) each
    yaw = torch.rad2deg(torch.atan2(start[0, 2], start[2, 2]))
    bank = bank_of_views(world, places, yaw, turn, pitch, K)       # (P T, 64, 3)

    keys_to_walk = offsets.norm(dim=1)[:, None] / metres  # (P, 1)
    keys_to_turn = turn.abs() / degrees                   # (T,)
    needed = torch.maximum(keys_to_walk, keys_to_turn).flatten()   # (P T,)
    too_far = needed > frame[:, None] + 2.01              # (M, P T)
    thumbnails = shrink(pictures, BANK_SIZE).flatten(1, 2)
    best = best_views(bank, thumbnails, too_far)          # (4 M,)

    x, _, z = places[best // len(turn)].unbind(1)
    direction = best % len(turn)
    guess = torch.stack([x, z, yaw + turn[direction], pitch[direction]], -1)
    return refine(world, shrink(pictures, FINE_SIZE), guess, start[1, 3], K)


def robust(error):
    """The cost of a picture from the squared errors r of its pixels (..., pixels): the sum of
    r / (r + LIMIT), to which no pixel adds more than 1 (Geman and McClure 1985)."""
    return (error / (error + LIMIT)).sum(-1)


def shrink(pictures, size):
    """Pictures (M, H, W, 3) -> (M, size, size, 3)."""
    pictures = pictures.movedim(-1, 1)
    pictures = functional.interpolate(pictures, (size, size), mode='area')
    return pictures.movedim(1, -1)


def reachable_places(start, reach, metres):
    """Points of a grid around the start, in the arena and at most `reach` cells of `metres` away: as (x, z)
    from the start (P, 2), and in the world (P, 3)."""
    line = torch.arange(-reach, reach + 1) * metres
    x, z = torch.meshgrid(line, line, indexing='ij')
    offsets = torch.stack([x, z], -1).flatten(0, 1)       # (all, 2)
    places = start[:3, 3] + functional.pad(offsets, (0, 1))[:, [0, 2, 1]]      # (x, 0, z) from the start
    near = offsets.norm(dim=1) <= reach * metres + 1e-3
    in_arena = (places[:, ::2].abs() < ARENA).all(1)
    inside = near & in_arena
    return offsets[inside], places[inside]


def reachable_turns(reach, degrees):
    """All pairs of a turn, by at most `reach` keys, and a pitch, by at most 3: (T,) each, in degrees."""
    n = min(reach, int(180 / degrees))
    turn = torch.arange(-n, n + 1) * degrees
    pitch = torch.arange(-3, 4) * degrees
    turn, pitch = torch.meshgrid(turn, pitch, indexing='ij')
    return turn.flatten(), pitch.flatten()


def panoramas(world, places, yaw):
    """What is seen all around each place, a ray every 6 degrees: (P, 24, 60, 3). Row 0 looks up by 69
    degrees; the middle columns look along yaw."""
    down = torch.arange(-69., 70, CELL)
    around = torch.arange(-177., 180, CELL)
    down, around = torch.meshgrid(down, around, indexing='ij')
    pose = make_pose(torch.zeros(*down.shape, 3), yaw + around, -down)
    forward = pose[..., :3, 2].flatten(0, 1)              # (1440, 3)
    origin = places[None].repeat_interleave(len(forward), 1)
    direction = forward.repeat(len(places), 1)[None]      # (1, P 1440, 3)
    colour, _, _ = world.shade(origin, direction)
    return colour[0].view(len(places), *down.shape, 3)


def bank_of_views(world, places, yaw, turn, pitch, K):
    """The views (P T, 64, 3) from each place in each direction (yaw + turn, pitch). They are read from one
    panorama a place: that needs far fewer rays."""
    panorama = panoramas(world, places, yaw)
    _, rows, columns, _ = panorama.shape
    turned = make_pose(torch.zeros(len(turn), 3), turn, pitch)[:, :3, :3]
    _, ray = rays(torch.eye(4), K, BANK_SIZE, BANK_SIZE)  # (8, 8, 3)
    ray = torch.einsum('tij,hwj->thwi', turned, ray)      # (T, 8, 8, 3)
    x, y, z = ray.unbind(-1)
    down = torch.rad2deg(torch.asin(y))
    around = torch.rad2deg(torch.atan2(x, z))
    row = ((down + 72) / CELL).long().clamp(0, rows - 1)
    column = ((around + 180) / CELL).long() % columns
    views = panorama[:, row, column]                      # (P, T, 8, 8, 3)
    return views.flatten(0, 1).flatten(1, 2)


def best_views(bank, pictures, too_far):
    """For each of the pictures (M, 64, 3) the four views of the bank (V, 64, 3) that are most like it, as
    indices (4 M,). too_far (M, V): views from where the path cannot lead."""
    cost = torch.cdist(pictures.flatten(1), bank.flatten(1))
    cost = cost.masked_fill(too_far, torch.inf)           # (M, V)
    count = min(CANDIDATES, cost.shape[1])
    _, candidates = cost.topk(count, 1, largest=False)    # (M, count)
    difference = bank[candidates] - pictures[:, None]
    cost = robust(difference.square_().sum(-1))
    cost = cost.masked_fill(too_far.gather(1, candidates), torch.inf)
    _, best = cost.topk(GUESSES, 1, largest=False)        # (M, 4)
    return candidates.gather(1, best).flatten()


def blur(pictures):
    """Pictures (n, H, W, 3) -> their pixels (n, H W, 3), float64, each the mean of 3 x 3."""
    pictures = functional.avg_pool2d(pictures.movedim(-1, 1), 3, 1, 1)
    return pictures.movedim(1, -1).flatten(1, 2).double()


def look(world, state, height, K):
    """What is seen from states (n, 4) of (x, z, yaw, pitch): blurred views (n, 1024, 3); and c2w."""
    x, z, yaw, pitch = state.unbind(1)
    y = height.double().expand(len(state))
    c2w = make_pose(torch.stack([x, y, z], -1), yaw, pitch).float()
    K = K.expand(1, len(state), 4)
    views, _ = world.render(c2w[None], K, FINE_SIZE, FINE_SIZE, edges=.2)
    return blur(views[0]), c2w


def refine(world, pictures, guess, height, K):
    """Poses (M, 4, 4) of the pictures (M, 32, 32, 3), from four guesses of (x, z, yaw, pitch) for each,
    (4 M, 4). Seven steps of all guesses at once; after two only the best guess of each picture remains."""
    M = len(pictures)
    unit = torch.tensor(UNIT, dtype=torch.float64)
    state = guess.double()
    target = blur(pictures).repeat_interleave(GUESSES, 0)          # (4 M, 1024, 3)
    view, c2w = look(world, state, height, K)
    error = (view - target).square().sum(-1)              # (4 M, 1024)
    damping = torch.full((len(state),), 1e-2, dtype=torch.float64)
    for step in range(7):
        if step == 2:
            best = robust(error).view(M, GUESSES).argmin(1)
            best = best + GUESSES * torch.arange(M)
            state = state[best]
            view = view[best]
            c2w = c2w[best]
            error = error[best]
            damping = damping[best]
            target = target[best]
        nudged = [state + unit * axis for axis in torch.eye(4).double()]
        nudged_view, _ = look(world, torch.cat(nudged), height, K)
        J = nudged_view.unflatten(0, (4, -1)) - view      # (4, n, 1024, 3)
        new = state + unit * gauss_newton_step(J.movedim(0, -1), target - view, error, damping)
        new_view, new_c2w = look(world, new, height, K)
        new_error = (new_view - target).square().sum(-1)
        better = robust(new_error) < robust(error)
        state[better] = new[better]
        view[better] = new_view[better]
        c2w[better] = new_c2w[better]
        error[better] = new_error[better]
        damping = torch.where(better, damping / 3, damping * 4)
    return c2w


def gauss_newton_step(J, residual, error, damping):
    """Steps (n, 4), in UNITs, that lower the robust cost; damped as by Levenberg and Marquardt.
    J (n, pixels, 3, 4) is the Jacobian of the view, residual (n, pixels, 3) the picture minus the view, and
    error (n, pixels) its square."""
    weight = (1 + error / LIMIT) ** -2                    # the slope of the robust cost, times LIMIT
    weighted = weight[..., None, None] * J
    A = torch.einsum('mpci,mpcj->mij', weighted, J)
    g = torch.einsum('mpci,mpc->mi', weighted, residual)
    diagonal = A.diagonal(dim1=-2, dim2=-1) + 1e-6
    A = A + damping[:, None, None] * torch.diag_embed(diagonal)
    return torch.linalg.solve(A, g).clamp(-10, 10)

# -----------------------------------------------------------------------------
# what did frame 0 show?

def visible_mask(depth, c2w, K):
    """Which pixels of each frame show what frame 0 saw: (B, F, H, W) bool, from distances (B, F, H, W) in
    metres, poses c2w (B, F, 4, 4) and intrinsics K (B, 4)."""
    F, H, W = depth.shape[1:]
    origin, direction = rays(c2w, K[:, None].expand(-1, F, -1), H, W)
    point = origin[:, :, None, None] + depth[..., None] * direction            # (B, F, H, W, 3), in the world
    w2c = invert(c2w[:, 0])
    point = torch.einsum('bij,bfhwj->bfhwi', w2c[:, :3, :3], point)
    point = point + w2c[:, None, None, None, :3, 3]       # seen from frame 0
    z = point[..., 2:]
    focal, centre = K[:, None, None, None].split(2, -1)
    uv = point[..., :2] / z.clamp(min=1e-6) * focal + centre       # in frame 0's picture, [0, 1]
    in_front = z[..., 0] > 1e-6
    in_picture = (uv > 0).all(-1) & (uv < 1).all(-1)
    grid = (uv * 2 - 1).flatten(1, 2)
    nearest = functional.grid_sample(depth[:, :1], grid, 'nearest', align_corners=False)
    nearest = nearest.view(depth.shape)                   # the distance of what frame 0 shows there
    not_hidden = point.norm(dim=-1) < 1.05 * nearest + .1
    return in_front & in_picture & not_hidden

# -----------------------------------------------------------------------------
# the scores

def path_by_path(function, *tensors):
    """function of all paths, one after the other: all at once would take much memory."""
    paths = zip(*(x.split(1) for x in tensors))
    return torch.cat([function(*path) for path in paths])


def known(values):
    """A tensor as a list, with None where it is not a number."""
    return [None if math.isnan(x) else x for x in values.tolist()]


def picture_scores(video, wrong, ceiling, truth):
    """Scores that need pictures only, (n, F, H, W, 3) in [0, 1] each. video: generated along the path; wrong:
    along another one; ceiling: the truth, encoded and decoded."""
    def psnr_by_frame(a, b):
        return path_by_path(psnr, a, b).mean(0).tolist()

    def ratio(measure):
        generated = path_by_path(measure, video).mean(0)
        real = path_by_path(measure, ceiling).mean(0)
        return (generated / real).tolist()

    def distance(pictures):
        return frechet(pictures[:, 1:].flatten(0, 1), truth[:, 1:].flatten(0, 1))

    p = path_by_path(psnr, video, truth)                  # (n, F) dB
    mean = p.mean(0)
    slope, _ = np.polyfit(range(1, len(mean)), mean[1:].double(), 1)
    return dict(
        psnr=mean.tolist(),
        psnr_se=(p.std(0) / len(p) ** .5).tolist(),
        psnr_ceiling=psnr_by_frame(ceiling, truth),
        psnr_copy=psnr_by_frame(ceiling[:, :1].expand_as(truth), truth),
        psnr_wrong_path=psnr_by_frame(wrong, truth),
        sharpness=ratio(sharpness),
        motion=[None] + ratio(motion),
        drift_db_per_frame=slope.item(),
        fd=distance(video),
        fd_ceiling=distance(ceiling),
        fd_features='4x4 means of RGB, luma gradient energy and its root',
    )


def other_worlds(world, c2w, H, W):
    """Renders (n, F, H, W, 3) in the colours of n Lowpoly worlds, but each of the next one's plan and along
    its path c2w (n, F, 4, 4): what a perfect text-to-world model might show."""
    plans = world['plan'].roll(-1).tolist()
    pictures = []
    for plan, palette, path, K in zip(plans, world['palette'].tolist(), c2w.roll(-1, 0), world['K']):
        views, _ = Lowpoly([plan], [palette]).render(path[None], K.expand(1, len(path), 4), H, W)
        pictures.append(views)
    return torch.cat(pictures)


def visible_pixels(worlds, c2w, K, H, W):
    """visible_mask (n, F, H, W) of the paths c2w (n, F, 4, 4) through n Lowpoly worlds; K (n, 4)."""
    masks = []
    for world, path, k in zip(worlds, c2w.split(1), K.split(1)):
        k_by_frame = k[:, None].expand(-1, path.shape[1], -1)
        _, depth = world.render(path, k_by_frame, H, W, edges=0)
        masks.append(visible_mask(depth, path, k))
    return torch.cat(masks)


def visible_scores(video, truth, visible):
    """PSNR of the pixels that show what frame 0 saw, and of the others, where they fill at least 5 %."""
    def squared_error(a, b):
        return (a.clamp(0, 1) - b).square().mean(-1)

    error = path_by_path(squared_error, video, truth)     # (n, F, H, W)
    scores = {}
    for name, mask in (('psnr_seen', visible), ('psnr_unseen', ~visible)):
        share = mask.float().mean((2, 3))                 # (n, F)
        mse = (error * mask).mean((2, 3)) / share
        db = -10 * mse.clamp(min=1e-10).log10()
        db = db.masked_fill(share < .05, torch.nan)
        scores[name] = known(db.nanmean(0))
    return scores


def find_paths(worlds, videos, c2w, K):
    """The poses found in each of the videos, (n, F, H, W, 3) -> (n, F, 4, 4). They are frames 1 to F of paths
    that begin at frame 0 of c2w. All that one world shows is searched at once. Only the first video must
    show all paths."""
    found = [[] for _ in videos]
    F = videos[0].shape[1]
    for i, world in enumerate(worlds):
        pictures = torch.cat([video[i] for video in videos if i < len(video)])
        frame = torch.arange(len(pictures)) % F + 1
        poses = locate(world, pictures, frame, c2w[i, 0], K[i])
        for paths, path in zip(found, poses.split(F)):
            paths.append(path)
    return [torch.stack(paths) for paths in found]


def pose_scores(worlds, video, ceiling, truth, c2w, K, visible):
    """Medians over the paths of how far the poses found are from the path, by frame: all; those whose view
    frame 0 mostly saw (_seen); and those of the true pictures of 16 paths, encoded and decoded (_ceiling)."""
    videos = [truth[:, 1:], video[:, 1:], ceiling[:16, 1:]]
    in_truth, in_video, in_ceiling = find_paths(worlds, videos, c2w, K)
    c2w = c2w[:, 1:]
    true_degrees, true_metres = pose_error(in_truth, c2w)          # (n, F) each
    degrees, metres = pose_error(in_video, c2w)
    coded_degrees, coded_metres = pose_error(in_ceiling, c2w[:len(in_ceiling)])

    lost = (true_degrees > 2) | (true_metres > .15)       # not found even in the truth: a bare wall
    new = visible[:, 1:].float().mean((2, 3)) < .5
    lost_or_new = lost | new

    def median(error, without):
        error = error.masked_fill(without[:len(error)], torch.nan)
        return [None] + known(error.nanmedian(0)[0])

    return dict(
        rot_err_deg=median(degrees, lost),
        trans_err_m=median(metres, lost),
        rot_err_deg_seen=median(degrees, lost_or_new),
        trans_err_m_seen=median(metres, lost_or_new),
        rot_err_deg_ceiling=median(coded_degrees, lost),
        trans_err_m_ceiling=median(coded_metres, lost),
        n_dropped=int(lost.sum()),
        n_views=lost.numel(),
    )


def distance_scores(fd_ceiling, truth, world, c2w, same_world):
    """What the Fréchet distance compares, and its floor, below which no model can come: that of the truth
    itself, encoded and decoded; or, for worlds made up from a caption, that of true renders of others."""
    if same_world:
        return dict(fd_floor=fd_ceiling, fd_compares='walks and renders along the same paths')
    compares = dict(fd_floor=None, fd_compares='other worlds of the same captions, along other paths')
    if 'palette' in world:
        others = other_worlds(world, c2w, *truth.shape[2:4])
        compares['fd_floor'] = frechet(others[:, 1:].flatten(0, 1), truth[:, 1:].flatten(0, 1))
    return compares


def score(model, cfg, header, codec, device, find_poses=True, strip=''):
    """The numbers of one checkpoint as a dict, its lists by frame. strip: a PNG to write."""
    recipe = header['data']['recipe']
    paths = range(min(cfg.paths, recipe['val_clips']))
    world, captions = held_out(cfg, header, paths, max(recipe['frames'], cfg.frames))
    n = len(captions)
    if n < 2:
        raise BadInput('a score needs two held-out paths or more: each is compared with the next one as well')
    K = world['K']                                        # (n, 4)
    length = min(cfg.frames or header['frames'], world['c2w'].shape[1])
    c2w = world['c2w'][:, :length]                        # (n, F, 4, 4)
    truth = world['frames'][:, :1 + (length - 1) * codec.stride]
    truth = truth.float() / 255                           # (n, F, H, W, 3), with Wan 4 F - 3 pictures
    z = path_by_path(codec.encode, truth)
    ceiling = path_by_path(codec.decode, z).cpu()
    first = None
    if cfg.first != 'prompt' and model.cfg.first_chunk == 1:
        first = z[:, :1].to(device)

    def follow(path):
        noise = noise_for([cfg.seed * 1000 + i for i in range(n)], z.shape[2:], device)
        path = relative(path).to(device)
        return generate(model, cfg, header, codec, path, K.to(device), captions, first, noise).cpu()

    video = follow(c2w)
    wrong = follow(c2w.roll(-1, 0))                       # each along the next clip's path
    scores = picture_scores(video, wrong, ceiling, truth)
    scores |= distance_scores(scores['fd_ceiling'], truth, world, c2w, same_world=first is not None)
    if first is None:                                     # another world: only its kind can be compared
        scores = {k: v for k, v in scores.items() if not k.startswith(('psnr', 'drift'))}
    elif recipe['world'] == 'lowpoly' and codec.stride == 1:
        plans, palettes = world['plan'].tolist(), world['palette'].tolist()
        worlds = [Lowpoly([plan], [palette]) for plan, palette in zip(plans, palettes)]
        H, W = truth.shape[2:4]
        visible = visible_pixels(worlds, c2w, K, H, W)
        scores |= visible_scores(video, truth, visible)
        if find_poses and length <= 17:                   # further, the search is too wide
            scores |= pose_scores(worlds, video, ceiling, truth, c2w, K, visible)
    if strip:
        write_strip(strip, truth[:6], video[:6])
    return scores | dict(
        n_paths=n, steps=cfg.steps, guidance=cfg.guidance, over=cfg.over,
        world=recipe['world'], plans=recipe['plans'], ckpt=cfg.ckpt, seed=cfg.seed)


def print_scores(scores):
    for name, value in scores.items():
        if isinstance(value, list):
            value = ' '.join('     -' if x is None else f'{x:6.2f}' for x in value)
        elif isinstance(value, float):
            value = f'{value:.4g}'
        print(f'{name:20s}', value)


def main(cfg):
    if cfg.frames == 1:
        raise BadInput('--frames 1: at least 2, or 0 for the usual')
    model, header, codec, device = prepare(cfg)
    check_folder(os.path.dirname(cfg.out) or '.')                  # complain before the work
    strip = os.path.splitext(cfg.out)[0] + '.png'
    scores = score(model, cfg, header, codec, device, strip=strip)
    write_json(cfg.out, scores)
    print_scores(scores)


if __name__ == '__main__':
    command_line(main, Config, __doc__)
