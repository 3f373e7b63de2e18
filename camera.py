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
    10 degrees and 0.25 m a key) stands at t = (1, 0, 0) and looks along +x.

R = Ry(yaw) Rx(pitch): yaw turns about the world's up, whatever the pitch. Walking (w s a d) stays level,
u and o (minWM: u and dn) move straight up and down. Pitch is clamped to +-MAX_PITCH degrees.
Key strings are minWM's, of both its kinds, plus compound keys: "w*12,wl*6", or "w-12, wright-6", is 12 frames
forward, then 6 forward while turning right; an empty group such as "*3" stands still. Frame 0 is the start,
so n keys make n + 1 poses.
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


@dataclass
class Camera:
    """The cameras of consecutive frames of a batch of clips."""
    c2w: torch.Tensor                 # (B, F, 4, 4) camera to world, metres, float32
    K: torch.Tensor                   # (B, F, 4) normalised fx, fy, cx, cy
    on: torch.Tensor | None = None    # (B,) bool: False drops a sample's camera, for guidance; None: all on
    move: torch.Tensor | None = None  # (B, F, 4, 4) each pose seen from the frame before; None: moves(c2w)

    def __post_init__(self):
        if self.move is None:
            self.move = moves(self.c2w)

    def frames(self, index):
        """The cameras of some frames only (a slice or a list), with the moves that they have here."""
        return Camera(self.c2w[:, index], self.K[:, index], self.on, self.move[:, index])

    @staticmethod
    def cat(cameras, dim=1):
        """Join along frames (dim 1; `on` is the first one's) or along the batch (dim 0)."""
        def switch(camera):
            everyone = torch.ones(len(camera.K), dtype=torch.bool, device=camera.K.device)
            return everyone if camera.on is None else camera.on

        on = cameras[0].on
        if dim == 0 and any(camera.on is not None for camera in cameras):
            on = torch.cat([switch(camera) for camera in cameras])
        return Camera(
            torch.cat([camera.c2w for camera in cameras], dim),
            torch.cat([camera.K for camera in cameras], dim),
            on,
            torch.cat([camera.move for camera in cameras], dim),
        )

# -----------------------------------------------------------------------------
# poses

def make_pose(position, yaw, pitch):
    """c2w (..., 4, 4) from position (..., 3) in metres and yaw, pitch (...) in degrees."""
    a, b = torch.deg2rad(yaw), torch.deg2rad(pitch)
    sin_a, cos_a = a.sin(), a.cos()
    sin_b, cos_b = b.sin(), b.cos()
    zero = torch.zeros_like(a)
    x, y, z = position.unbind(-1)
    rows = [
        [cos_a, sin_a * sin_b, sin_a * cos_b, x],
        [zero, cos_b, -sin_b, y],
        [-sin_a, cos_a * sin_b, cos_a * cos_b, z],
        [zero, zero, zero, zero + 1],
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2).to(position.dtype)


def invert(pose):
    """The inverse of rigid poses (..., 4, 4): c2w to w2c and back. By R^T, so it is exact to rounding."""
    R, t = pose[..., :3, :3].mT, pose[..., :3, 3:]
    top = torch.cat([R, -R @ t], -1)                               # (..., 3, 4)
    return torch.cat([top, pose[..., 3:, :]], -2)


def relative(c2w, origin=None):
    """Poses (B, F, 4, 4) seen from `origin` (B, 4, 4), by default frame 0, which becomes the identity."""
    if origin is None:
        origin = c2w[:, 0]
    seen = invert(origin.double())[:, None] @ c2w.double()
    return seen.to(c2w.dtype)


def moves(c2w, before=None, jump=None):
    """Each pose of a path (B, F, 4, 4) seen from the frame before it.

    before (B, 1, 4, 4) is the frame before the path; without it the first move is the identity. jump (B,)
    bool marks the paths whose first frame does not lead to the second (a sink: the first picture of a walk,
    kept for ever while the other frames move on). That move says nothing, so it is the identity too.
    """
    start = c2w[:, :1] if before is None else before
    path = torch.cat([start, c2w], 1).double()                     # (B, 1 + F, 4, 4)
    move = invert(path[:, :-1]) @ path[:, 1:]                      # (B, F, 4, 4)
    move = move.to(c2w.dtype)
    if jump is not None:
        moved = 2 if before is None else 1                         # moves up to the one away from frame 0
        move[jump, :moved] = torch.eye(4, dtype=c2w.dtype, device=c2w.device)
    return move


def starts_elsewhere(c2w):
    """Which paths (B, F, 4, 4) have a first frame far from all others: (B,) bool, where the first move is
    longer than 1 m + 3 times any other. Clips of `data.py --door` may jump like that from the door. Of fewer
    than three frames nothing can be said: False."""
    distance = c2w[..., :3, 3].diff(dim=1).norm(dim=2)             # (B, F - 1) metres
    longer = distance[:, :1] > 1 + 3 * distance[:, 1:]             # (B, F - 2)
    return longer.all(1) & (longer.shape[1] > 0)


def pose_error(a, b):
    """Rotation (degrees) and translation (metres) between poses (..., 4, 4), each of shape (...).
    The angle is 2 asin(|Ra - Rb|_F / sqrt 8), accurate near 0 where acos of the trace is not."""
    a, b = a.double(), b.double()
    chord = (a[..., :3, :3] - b[..., :3, :3]).flatten(-2).norm(dim=-1)
    angle = 2 * torch.asin((chord / math.sqrt(8)).clamp(max=1))
    distance = (a - b)[..., :3, 3].norm(dim=-1)
    return torch.rad2deg(angle), distance

# -----------------------------------------------------------------------------
# intrinsics and rays

def intrinsics(fov_x, aspect):
    """K (4,) of a centred pinhole camera: horizontal field of view in degrees, aspect = width / height."""
    f = 0.5 / math.tan(math.radians(fov_x) / 2)
    return torch.tensor([f, f * aspect, 0.5, 0.5])


def crop_intrinsics(K, x, y, width, height):
    """K (..., 4) after cropping to a box given as fractions of the picture. A resize changes nothing."""
    size = K.new_tensor([width, height])
    focal = K[..., :2] / size
    centre = (K[..., 2:] - K.new_tensor([x, y])) / size
    return torch.cat([focal, centre], -1)


def rays(c2w, K, H, W):
    """Origins (..., 3) and unit directions (..., H, W, 3), in the world, of the cells of an H x W grid."""
    row = (torch.arange(H, device=K.device) + 0.5) / H
    column = (torch.arange(W, device=K.device) + 0.5) / W
    y, x = torch.meshgrid(row, column, indexing='ij')                      # (H, W) each, in [0, 1]
    fx, fy, cx, cy = K.float()[..., None, None].unbind(-3)                 # (..., 1, 1) each
    right, down = (x - cx) / fx, (y - cy) / fy                             # (..., H, W)
    direction = torch.stack([right, down, torch.ones_like(right)], -1)     # in the camera's axes
    direction = torch.nn.functional.normalize(direction, dim=-1)
    direction = torch.einsum('...ij,...hwj->...hwi', c2w[..., :3, :3].float(), direction)
    return c2w[..., :3, 3].float(), direction


def plucker(c2w, K, H, W):
    """The Plücker map (B, F, 6, H, W), float32: each cell's ray as (direction d, moment o x d in metres)."""
    origin, direction = rays(c2w, K, H, W)
    origin = origin[..., None, None, :].expand_as(direction)               # (B, F, H, W, 3)
    moment = torch.linalg.cross(origin, direction)
    return torch.cat([direction, moment], -1).movedim(-1, 2)

# -----------------------------------------------------------------------------
# keys

# minWM's words: its data say "right-6" where its command line says "l*6"
WORDS = {'left': 'j', 'right': 'l', 'up': 'i', 'down': 'k', 'dn': 'o'}


def parse_keys(text):
    """"w*12,wl*6" -> ['w'] * 12 + ['wl'] * 6. As in minWM, a comma at the end says nothing, and 6.5 frames
    are 6. Raises BadInput that names the malformed group."""
    words = '|'.join(WORDS)
    groups = text.split(',')
    if len(groups) > 1 and not groups[-1].strip():
        groups.pop()
    keys = []
    for i, group in enumerate(groups, 1):
        group = group.strip()
        match = re.fullmatch(rf'((?:{words}|[{KEYS}])*)\s*(?:[*-]\s*(\d{{1,6}})(?:\.\d*)?)?', group)
        if not match or not group:
            raise BadInput(f'keys: group {i} of "{text[:80]}" is "{group[:40]}": write letters of {KEYS} '
                           f'or {words}, then *count, below a million, as in "w*12,wl*6"')
        held, count = match.groups()
        for word, key in WORDS.items():
            held = held.replace(word, key)
        keys += [held] * int(count or 1)
    return keys


def apply_keys(position, yaw, pitch, keys, metres=METRES, degrees=DEGREES):
    """One frame of walking: (x, y, z), yaw, pitch (metres, degrees) and the keys held -> the new three."""
    def amount(plus, minus):                                               # -1, 0 or 1
        return (plus in keys) - (minus in keys)

    yaw = (yaw + degrees * amount('l', 'j') + 180) % 360 - 180
    pitch = min(MAX_PITCH, max(-MAX_PITCH, pitch + degrees * amount('i', 'k')))
    forward = metres * amount('w', 's')
    right = metres * amount('d', 'a')
    down = metres * amount('o', 'u')
    sin, cos = math.sin(math.radians(yaw)), math.cos(math.radians(yaw))
    x, y, z = position
    x = x + forward * sin + right * cos
    z = z + forward * cos - right * sin
    return (x, y + down, z), yaw, pitch


def keys_to_poses(keys, metres=METRES, degrees=DEGREES):
    """Key string or list of n keys -> c2w (n + 1, 4, 4); the first pose is the identity."""
    if isinstance(keys, str):
        keys = parse_keys(keys)
    states = [((0., 0., 0.), 0., 0.)]
    for held in keys:
        states.append(apply_keys(*states[-1], held, metres, degrees))
    return states_to_poses(states)


def states_to_poses(states):
    """A list of (position, yaw, pitch) -> c2w (n, 4, 4) float32, computed in float64."""
    position, yaw, pitch = (torch.tensor(x, dtype=torch.float64) for x in zip(*states))
    return make_pose(position, yaw, pitch).float()


def random_path(may_stand, arena, frames, rng, door=None):
    """A random keyboard path around things: c2w (frames, 4, 4) float32.

    may_stand(x, z) says where one can be, within +-arena metres. Keys are held for 3 to 8 frames, at a speed
    drawn once; a blocked move becomes a turn. The path begins anywhere, or where the generator `door` says:
    at the wall z = -arena, looking in.
    """
    speed = rng.uniform(.04, .25), rng.uniform(1.5, 10)       # metres and degrees a frame
    while True:
        if door:
            x, z, yaw = door.uniform(-4, 4), .6 - arena, 0.
        else:
            x, z = rng.uniform(-arena, arena, 2)
            yaw = rng.uniform(-180, 180)
        dx = math.sin(math.radians(yaw))
        dz = math.cos(math.radians(yaw))
        if all(may_stand(x + s * dx, z + s * dz) for s in (0, .5, 1, 1.5)):
            break                                             # there is a view: 1.5 m are free ahead
    pitch = 0 if door else rng.choice([0, 0, 0, -8, 8])

    states = [((x, -1.0, z), yaw, pitch)]
    hold = 0
    while len(states) < frames:
        if hold == 0:
            keys = rng.choice('w wl wj l j a d s wi wk sl dj'.split(),
                              p=[.25, .15, .15, .09, .09, .06, .06, .05, .025, .025, .025, .025])
            hold = rng.integers(3, 9)
        (x, _, z), _, _ = apply_keys(*states[-1], keys, *speed)
        if not may_stand(x, z):
            keys = rng.choice(['l', 'j'])
            hold = rng.integers(3, 9)
        states.append(apply_keys(*states[-1], keys, *speed))
        hold -= 1
    return states_to_poses(states)
