"""
Files of poses: what people have, as cameras in OpenCV's axes (camera.py).

    .txt    RealEstate10K: a title, or none, then a line for each frame: its time in microseconds, fx fy cx cy
            (normalised), 0 0, and the 3 x 4 world-to-camera matrix, row by row
            KITTI: a line for each frame, the 3 x 4 camera-to-world matrix, row by row
    .json   a list of 4 x 4 or 3 x 4 camera-to-world matrices
            minWM: {"0": {"extrinsic": 4 x 4 camera-to-world, "K": 3 x 3 in pixels}, "1": ...}
            nerfstudio, Blender: transforms.json, whose OpenGL axes (x right, y up, z backward) are turned

minWM's input JSON holds strings of keys, "w-8, right-11". And poses go back to the keys that lead along them.
"""
import json
import math
import re
from dataclasses import dataclass

import torch

from camera import DEGREES, METRES, BadInput, invert, make_pose, parse_keys


@dataclass
class Poses:
    """The cameras of a pose file, one for each line or matrix in it."""
    c2w: torch.Tensor                     # (N, 4, 4) float64, in the file's own unit
    K: torch.Tensor | None = None         # (N, 4) fx, fy, cx, cy; fy nan: the pixels are square
    size: torch.Tensor | None = None      # (N, 2) width and height of the picture K is of; None: not said
    times: torch.Tensor | None = None     # (N,) seconds
    bare: bool = False                    # matrices alone: nothing says what their axes are

# -----------------------------------------------------------------------------
# reading

def natural(name):
    """A key that sorts names by the numbers in them: frame_2 before frame_10."""
    parts = re.split('([0-9]+)', name.lower())
    parts[1::2] = map(int, parts[1::2])
    return parts, name


def to_matrices(rows):
    """Matrices of 3 x 4 or 4 x 4 numbers, or these in one row each -> (N, 4, 4) float64."""
    c2w = torch.tensor(rows, dtype=torch.float64)
    if c2w.ndim == 2 and c2w.shape[1] in (12, 16):
        c2w = c2w.view(len(c2w), -1, 4)
    if c2w.ndim == 3 and c2w.shape[1:] == (3, 4):
        bottom = c2w.new_tensor([0, 0, 0, 1]).expand(len(c2w), 1, 4)
        c2w = torch.cat([c2w, bottom], 1)
    return c2w


def parse_numbers(fields):
    """A list of numbers, or None if one is not."""
    try:
        return [float(field) for field in fields]
    except ValueError:
        return None


def is_title(fields):
    """Is the first line of a file no pose? A damaged pose is not taken for a title."""
    return len(fields) == 1 or len(fields) != 19 and parse_numbers(fields) is None


def parse_lines(path, text):
    """RealEstate10K's or KITTI's lines -> Poses."""
    lines = [(i, line.split()) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    if lines and is_title(lines[0][1]):
        lines = lines[1:]
    rows = []
    for i, fields in lines:
        row = parse_numbers(fields)
        width = len(rows[0]) if rows else len(fields)
        if row is None or width not in (12, 19) or len(row) != width:
            found = f'{len(row)} numbers' if row else 'not numbers alone'
            raise BadInput(f'{path}, line {i}: {found}, RealEstate10K has 19: time, fx fy cx cy, 0 0, '
                           '3 x 4 world-to-camera pose; KITTI has the 12 of a 3 x 4 camera-to-world pose')
        rows.append(row)
    if not rows or len(rows[0]) == 12:
        return Poses(to_matrices(rows), bare=True)
    table = torch.tensor(rows, dtype=torch.float64)
    K = table[:, 1:5]
    in_pixels = K[:, 2:].max() > 2
    size = None if in_pixels else torch.ones(len(K), 2)
    return Poses(invert(to_matrices(table[:, 7:].tolist())), K, size, times=table[:, 0] / 1e6)


def parse_json(text):
    """A list of matrices, minWM's poses, or transforms.json -> Poses."""
    value = json.loads(text)
    if isinstance(value, list):
        return Poses(to_matrices(value), bare=True)
    if 'frames' in value:
        return parse_transforms(value)
    entries = [value[key] for key in sorted(value, key=int)]
    c2w = to_matrices([entry['extrinsic'] for entry in entries])
    if not all(entry.get('K') for entry in entries):
        return Poses(c2w, bare=True)
    K = torch.tensor([entry['K'] for entry in entries], dtype=torch.float64)
    return Poses(c2w, K[:, [0, 1, 0, 1], [0, 1, 2, 2]])


def parse_transforms(value):
    """nerfstudio's or Blender's transforms.json -> Poses, in the order of the pictures' names."""
    frames = sorted(value['frames'], key=lambda frame: natural(frame['file_path']))
    c2w = to_matrices([frame['transform_matrix'] for frame in frames])
    opencv = torch.tensor([1., -1, -1, 1], dtype=torch.float64)          # of x right, y up, z backward
    cameras = [parse_lens(value | frame) for frame in frames]
    K, size = (torch.tensor(column, dtype=torch.float64) for column in zip(*cameras))
    return Poses(c2w * opencv, K, size)


def parse_lens(camera):
    """((fx, fy, cx, cy), (width, height)) of an entry of transforms.json."""
    if 'fl_x' not in camera:
        fx = .5 / math.tan(camera['camera_angle_x'] / 2)
        return (fx, math.nan, .5, .5), (1, 1)
    fx, w, h = camera['fl_x'], camera['w'], camera['h']
    K = fx, camera.get('fl_y', fx), camera.get('cx', w / 2), camera.get('cy', h / 2)
    return K, (w, h)


def check_poses(path, poses):
    """Raise BadInput unless these are rotations, translations and lenses."""
    c2w = poses.c2w
    if c2w.ndim != 3 or c2w.shape[1:] != (4, 4) or not len(c2w):
        raise BadInput(f'{path}: shape {tuple(c2w.shape)}, wanted (frames, 4, 4)')
    R = c2w[:, :3, :3]
    orthogonal = (R @ R.mT - torch.eye(3)).abs().amax((1, 2)) < 1e-3
    right_handed = torch.linalg.det(R) > 0
    finite = c2w.float().isfinite().all(2).all(1)
    last_row = (c2w[:, 3] == c2w.new_tensor([0, 0, 0, 1])).all(1)
    bad = ~(orthogonal & right_handed & finite & last_row)
    if bad.any():
        raise BadInput(f'{path}: pose {int(bad.nonzero()[0])} is not a rotation and a translation '
                       'over a last row of 0 0 0 1')
    K = normalise(poses)
    if K is not None and not (K.isfinite().all() and (K[:, :2] > 0).all()):
        raise BadInput(f'{path}: fx, fy, cx, cy must be numbers, fx and fy above 0')


def read_poses(path):
    """The Poses of a file, .txt or .json. Raises BadInput that names the file and the line or pose."""
    try:
        with open(path, encoding='utf-8-sig') as f:
            text = f.read()
        poses = parse_lines(path, text) if path.lower().endswith('.txt') else parse_json(text)
    except BadInput:
        raise
    except OSError as e:
        raise BadInput(f'{path}: cannot be read ({e.strerror})') from None
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as e:
        raise BadInput(f'{path}: not a list of 4x4 or 3x4 matrices, nor minWM pose JSON, '
                       f'nor transforms.json, nor RealEstate10K ({e})') from None
    check_poses(path, poses)
    return poses

# -----------------------------------------------------------------------------
# poses and the video that they belong to

def picture_size(K, W, H):
    """(width, height) of the picture that K (4,) in pixels is of, beside a video of W x H: the video's own if
    its middle is near the centre of K, else twice that centre: the video is a resized one."""
    twice = 2 * K[2:]
    ratio = twice / K.new_tensor([W, H])
    resized = (ratio[0] / ratio[1] - 1).abs() < .03
    if (ratio - 1).abs().max() < (.1 if resized else .5):
        return K.new_tensor([W, H])
    return twice


def normalise(poses, W=0, H=0):
    """K (N, 4) divided by the size of its picture, float32, or None. W x H: the video's size, if known."""
    if poses.K is None:
        return None
    size = poses.size
    if size is None:
        size = torch.stack([picture_size(K, W, H) if W else 2 * K[2:] for K in poses.K])
    K = poses.K / torch.cat([size, size], 1)
    fy = K[:, 0] * W / H if W else K[:, 0]                    # of square pixels
    K[:, 1] = torch.where(K[:, 1].isnan(), fy, K[:, 1])
    return K.float()


def between(times, c2w, when):
    """c2w (n, 4, 4) at `when` (n,) of poses (N, 4, 4) at `times` (N,): on the straight line between two of
    them, with the rotation that is nearest to the mean of theirs."""
    after = torch.searchsorted(times, when).clamp(1, len(times) - 1)
    before = after - 1
    share = (when - times[before]) / (times[after] - times[before])
    share = share.clamp(0, 1)[:, None, None]
    c2w = torch.lerp(c2w[before], c2w[after], share)
    U, _, V = torch.linalg.svd(c2w[:, :3, :3])
    c2w[:, :3, :3] = U @ V
    return c2w


def match_frames(path, poses, K, when):
    """(c2w (n, 4, 4), K (n, 4) or None, notes) of the frames of a video, shown `when` (n,) seconds after the
    first (nan: nobody knows). Frame i has pose i. But where their numbers differ and the times of the poses
    last as long as the video, the times decide."""
    n, N = len(when), len(poses.c2w)
    alike = False
    notes = []
    if poses.times is not None and N > 1 and (poses.times.diff() > 0).all():
        times = poses.times - poses.times[0]
        step = times[-1] / (N - 1)
        alike = n <= N and ((times[:n] - when).abs() < step / 4).all()
        if n != N and not alike and when[-1] < times[-1] + step / 2:
            at = torch.searchsorted(times, when).clamp(max=N - 1)
            notes.append(f'{n} frames, but {N} poses: matched by the times in the first column')
            return between(times, poses.c2w, when), K[at], notes
        if n == N and (times[-1] - when[-1]).abs() > .1 * when[-1]:
            notes.append(f'{n} frames and as many poses: matched one by one, though by their times '
                         f'the poses last {times[-1]:.2f} s and the frames {when[-1]:.2f} s')
    if n > N:
        raise BadInput(f'{path}: {n} frames, but {N} poses')
    if N > n + 3 and not alike:                               # minWM's videos leave 3 over
        notes.append(f'{n} frames, but {N} poses: the first {n} are used; are they of another rate?')
    return poses.c2w[:n], K if K is None else K[:n], notes


def doubts(poses, K, W, H):
    """Sentences on what is odd about poses, and K normalised, for a video of W x H."""
    notes = []
    moves = poses.c2w[:, :3, 3].diff(dim=0)                               # (N - 1, 3)
    forward = (moves * poses.c2w[:-1, :3, 2]).sum()
    if poses.bare and forward < -.5 * moves.norm(dim=1).sum():
        notes.append('the camera moves mostly backward. The matrices are read as camera to world, in '
                     "OpenCV's axes (x right, y down, z forward). If theirs are OpenGL's (y up, z backward), "
                     'negate the second and the third column; if they are world to camera, invert them')
    if poses.times is not None and (poses.times.diff() < 0).any():
        notes.append('the times in the first column go back: are its lines in order?')
    if K is None:
        return notes
    fx, fy, cx, cy = K.mean(0).tolist()
    aspect = fx * W / (fy * H)
    if abs(aspect - 1) > .05:
        notes.append(f'fx W / (fy H) is {aspect:.2f}, so its pixels would not be square: was it cropped or '
                     'stretched after its poses were found? fx fy cx cy must be those of this very video')
    if max(abs(cx - .5), abs(cy - .5)) > .25:
        notes.append(f'the centre of its lens is at cx {cx:.2f}, cy {cy:.2f}, far off the middle: '
                     'were they divided by the size of another picture?')
    return notes

# -----------------------------------------------------------------------------
# poses and keys

def minwm_keys(path, text):
    """minWM's "w-8, right-11" -> the keys held in each latent. Capitals and empty groups are passed over."""
    groups = [group for group in text.lower().split(',') if group.strip()]
    try:
        return parse_keys(','.join(groups)) if groups else []
    except BadInput as e:
        raise BadInput(f'{path}: its pose_str: {e}') from None


def minwm_poses(keys, metres=0.08, degrees=3.0):
    """String or list of n keys -> c2w (n + 1, 4, 4) as minWM walks: it turns and moves in the camera's own
    axes, and its pitch is not clamped."""
    pose = torch.eye(4, dtype=torch.float64)
    poses = []
    if isinstance(keys, str):
        keys = parse_keys(keys)
    for held in ['', *keys]:
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

