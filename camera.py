"""
Cameras: poses, intrinsics, rays, key strings, errors. Pure functions on torch tensors, no file I/O.

Conventions, stated once. Axes are OpenCV's, for the camera and for the world:

          z  forward          A pose c2w (4, 4) takes camera coordinates to world coordinates:
         /                        X_world = R X_camera + t,   so t is where the camera stands (metres)
        o ---- x  right       and the columns of R are the camera's right, down and forward in the world.
        |                     Intrinsics K = (fx, fy, cx, cy) are divided by image width (fx, cx) and
        y  down               height (fy, cy): resizing a picture leaves them as they are.

Signs, worked by hand. Yaw by +a about y and pitch by +a about x are

    Ry(a) = [ cos a  0  sin a]      Rx(a) = [1    0      0  ]
            [   0    1    0  ]              [0  cos a -sin a]
            [-sin a  0  cos a]              [0  sin a  cos a]

    Ry(a) (0,0,1) = (sin a, 0, cos a):   towards +x, so +yaw turns right: key l is +yaw, j is -yaw.
    Rx(a) (0,0,1) = (0, -sin a, cos a):  towards -y, so +pitch looks up:  key i is +pitch, k is -pitch.

    A camera at the origin that turns right by 90 degrees and then walks 1 m forward ("l*9,w*4" with
    10 degrees and 0.25 m a key) stands at t = (1, 0, 0) and looks along +x. Tested.

R = Ry(yaw) Rx(pitch): yaw turns about the world's up, whatever the pitch. Walking (w s a d) stays level,
u and o (minWM: u and dn) move straight up and down. Pitch is clamped to +-MAX_PITCH degrees.
Key strings are minWM's, plus compound keys: "w*12,wl*6" is 12 frames forward, then 6 forward while turning
right; an empty group such as "*3" stands still. Frame 0 is the start, so n keys make n + 1 poses.
"""
import math
import re
from dataclasses import dataclass

import torch

KEYS = 'wsadjlikuo'
MAX_PITCH = 30.0                      # degrees
METRES, DEGREES = 0.25, 10.0          # one key unit, in scores and in strings


class BadInput(ValueError):
    """Something the user gave is wrong: one sentence that says what, where, and what to do about it."""


def true_or_false(text):
    """The type of the scripts' boolean flags: 'True' or 'False'."""
    return bool(('False', 'True').index(text))


@dataclass
class Camera:
    """The cameras of consecutive frames of a batch of clips."""
    c2w: torch.Tensor                 # (B, F, 4, 4) camera to world, metres, float32
    K: torch.Tensor                   # (B, F, 4) normalised fx, fy, cx, cy
    on: torch.Tensor | None = None    # (B,) bool: False drops a sample's camera, for guidance; None: all on
    step: torch.Tensor | None = None  # (B, F, 4, 4) poses seen from the frame before; None: steps(c2w)

    def __post_init__(self):
        self.step = steps(self.c2w) if self.step is None else self.step

    @staticmethod
    def cat(cameras, dim=1):
        """Join along frames (dim 1; `on` is the first one's) or along the batch (dim 0)."""
        on = cameras[0].on
        if dim == 0 and any(c.on is not None for c in cameras):
            on = torch.cat([torch.ones(len(c.K), dtype=torch.bool, device=c.K.device) if c.on is None else c.on for c in cameras])
        join = lambda name: torch.cat([getattr(c, name) for c in cameras], dim)
        return Camera(join('c2w'), join('K'), on, join('step'))

# -----------------------------------------------------------------------------
# poses

def make_pose(position, yaw, pitch):
    """c2w (..., 4, 4) from position (..., 3) in metres and yaw, pitch (...) in degrees."""
    a, b = torch.deg2rad(yaw), torch.deg2rad(pitch)
    c2w = torch.zeros(*position.shape[:-1], 4, 4, dtype=position.dtype, device=position.device)
    c2w[..., 0, 0], c2w[..., 0, 1], c2w[..., 0, 2] = a.cos(), a.sin() * b.sin(), a.sin() * b.cos()
    c2w[..., 1, 1], c2w[..., 1, 2] = b.cos(), -b.sin()
    c2w[..., 2, 0], c2w[..., 2, 1], c2w[..., 2, 2] = -a.sin(), a.cos() * b.sin(), a.cos() * b.cos()
    c2w[..., :3, 3], c2w[..., 3, 3] = position, 1
    return c2w


def invert(pose):
    """The inverse of rigid poses (..., 4, 4): c2w to w2c and back. R^T, not a general solve: exact to rounding."""
    R, t = pose[..., :3, :3].mT, pose[..., :3, 3:]
    return torch.cat([torch.cat([R, -R @ t], -1), pose[..., 3:, :]], -2)


def relative(c2w, origin=None):
    """Poses (B, F, 4, 4) seen from `origin` (B, 4, 4), by default frame 0, which becomes the identity."""
    origin = c2w[:, 0] if origin is None else origin
    return (invert(origin.double())[:, None] @ c2w.double()).to(c2w.dtype)


def steps(c2w, before=None, jump=None):
    """Poses (B, F, 4, 4) seen from the frame before; the first from `before` (B, 1, 4, 4), else it is the identity; so is
    the first move where jump (B,) says that it leads elsewhere."""
    path = torch.cat([c2w[:, :1] if before is None else before, c2w], 1).double()
    step = (invert(path[:, :-1]) @ path[:, 1:]).to(c2w.dtype)
    if jump is not None:
        step[jump, :1 + (before is None)] = torch.eye(4, dtype=c2w.dtype, device=c2w.device)
    return step


def jumps(c2w):
    """Which paths (B, F, 4, 4) go on elsewhere than they begin (`data.py --door`): a first move of over 1 m + 3 times any other."""
    move = c2w[..., :3, 3].diff(dim=1).norm(dim=2)
    return (move[:, :1] > 1 + 3 * move[:, 1:]).all(1)


def pose_error(a, b):
    """Rotation (degrees) and translation (metres) between poses (..., 4, 4), each of shape (...). The angle is
    2 asin(|Ra - Rb|_F / sqrt 8), which stays accurate near 0 where acos of the trace does not."""
    a, b = a.double(), b.double()
    chord = (a[..., :3, :3] - b[..., :3, :3]).flatten(-2).norm(dim=-1)
    return torch.rad2deg(2 * torch.asin((chord / math.sqrt(8)).clamp(max=1))), (a - b)[..., :3, 3].norm(dim=-1)

# -----------------------------------------------------------------------------
# intrinsics and rays

def intrinsics(fov_x, aspect):
    """K (4,) of a centred pinhole camera: horizontal field of view in degrees, aspect = width / height."""
    f = 0.5 / math.tan(math.radians(fov_x) / 2)
    return torch.tensor([f, f * aspect, 0.5, 0.5])


def crop_intrinsics(K, x, y, width, height):
    """K (..., 4) after cropping to a box given as fractions of the picture. A resize changes nothing."""
    size = K.new_tensor([width, height])
    return torch.cat([K[..., :2] / size, (K[..., 2:] - K.new_tensor([x, y])) / size], -1)


def rays(c2w, K, H, W):
    """Origins (..., 3) and unit directions (..., H, W, 3), in the world, through the centres of an H x W grid."""
    y, x = torch.meshgrid(*((torch.arange(n, device=K.device) + 0.5) / n for n in (H, W)), indexing='ij')
    fx, fy, cx, cy = (k[..., None, None] for k in K.float().unbind(-1))
    d = torch.stack([(x - cx) / fx, (y - cy) / fy, torch.ones_like(x).expand(fx.shape[:-2] + x.shape)], -1)
    d = torch.einsum('...ij,...hwj->...hwi', c2w[..., :3, :3].float(), torch.nn.functional.normalize(d, dim=-1))
    return c2w[..., :3, 3].float(), d


def plucker(c2w, K, H, W):
    """The Plücker map (B, F, 6, H, W), float32: each cell's ray as (direction d, moment o x d in metres)."""
    o, d = rays(c2w, K, H, W)
    moment = torch.linalg.cross(o[..., None, None, :].expand_as(d), d)
    return torch.cat([d, moment], -1).movedim(-1, 2)

# -----------------------------------------------------------------------------
# keys

def parse_keys(text):
    """"w*12,wl*6" -> ['w'] * 12 + ['wl'] * 6. Raises BadInput that names the malformed group."""
    keys = []
    for i, group in enumerate(text.split(',')):
        m = re.fullmatch(rf'((?:dn|[{KEYS}])*)(?:\*(\d+))?', group.strip())
        if not m or not group.strip():
            raise BadInput(f'keys: group {i + 1} of "{text}" is "{group.strip()}": write letters of {KEYS} (or dn), then *count, as in "w*12,wl*6"')
        keys += [m[1].replace('dn', 'o')] * int(m[2] or 1)
    return keys


def move(position, yaw, pitch, keys, metres=METRES, degrees=DEGREES):
    """One frame of walking: floats (x, y, z), yaw, pitch in degrees and the keys held -> the new three."""
    on = lambda plus, minus: (plus in keys) - (minus in keys)
    yaw = (yaw + degrees * on('l', 'j') + 180) % 360 - 180
    pitch = min(MAX_PITCH, max(-MAX_PITCH, pitch + degrees * on('i', 'k')))
    forward, right, down = metres * on('w', 's'), metres * on('d', 'a'), metres * on('o', 'u')
    s, c = math.sin(math.radians(yaw)), math.cos(math.radians(yaw))
    x, y, z = position
    return (x + forward * s + right * c, y + down, z + forward * c - right * s), yaw, pitch


def keys_to_poses(keys, metres=METRES, degrees=DEGREES):
    """Key string or list of n keys -> c2w (n + 1, 4, 4); the first pose is the identity."""
    states = [((0., 0., 0.), 0., 0.)]
    for k in parse_keys(keys) if isinstance(keys, str) else keys:
        states.append(move(*states[-1], k, metres, degrees))
    return make_pose(*(torch.tensor(x, dtype=torch.float64) for x in zip(*states))).float()


def minwm_poses(keys, metres=0.08, degrees=3.0):
    """Key string of n keys -> c2w (n + 1, 4, 4) as minWM walks: turns and moves in the camera's own axes, pitch unclamped."""
    pose, poses = torch.eye(4, dtype=torch.float64), []
    for k in [''] + parse_keys(keys):
        right, down, forward, yaw, pitch = (float((a in k) - (b in k)) for a, b in ('da', 'ou', 'ws', 'lj', 'ik'))
        turn = make_pose(pose.new_zeros(3), pose.new_tensor(degrees * yaw), pose.new_tensor(degrees * pitch))
        turn[:3, 3] = turn[:3, :3] @ (metres * pose.new_tensor([right, down, forward]))
        poses.append(pose := pose @ turn)
    return torch.stack(poses).float()


def poses_to_keys(c2w, metres=METRES, degrees=DEGREES):
    """Poses (F, 4, 4) -> F - 1 keys, those whose motion is at least half a unit: undoes keys_to_poses, letter for letter."""
    R, t = c2w[:, :3, :3].double(), c2w[:, :3, 3].double()
    yaw, pitch = torch.rad2deg(torch.atan2(R[:, 0, 2], R[:, 2, 2])), torch.rad2deg(torch.asin(-R[:, 1, 2]))
    dyaw, dpitch = (yaw.diff() + 180) % 360 - 180, pitch.diff()
    s, c = torch.deg2rad(yaw[1:]).sin(), torch.deg2rad(yaw[1:]).cos()
    dx, dy, dz = t.diff(dim=0).unbind(-1)
    axes = [('w', 's', (dx * s + dz * c) / metres), ('d', 'a', (dx * c - dz * s) / metres),
            ('l', 'j', dyaw / degrees), ('i', 'k', dpitch / degrees), ('o', 'u', dy / metres)]
    letters = [[p if x > 0.5 else m if x < -0.5 else '' for x in a.tolist()] for p, m, a in axes]
    return [''.join(k) for k in zip(*letters)]
