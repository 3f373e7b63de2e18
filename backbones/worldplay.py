"""
HY-WorldPlay's actions: each frame's move as one of 81 kinds, which its networks read beside the exact pose.
"""
import torch

# rows: none, forward, back, or of a turn none, right, left; columns: none, right, left, or none, up, down
KINDS = torch.tensor([
    [0, 3, 4],
    [1, 5, 6],
    [2, 7, 8],
])


def action_labels(move):
    """Each frame's move (B, F, 4, 4) since the frame before -> 9 step + turn, (B, F).

    step    0 none, 1 forward, 2 back, 3 right, 4 left; 5 to 8 forward right, forward left, back right, ...
    turn    0 none, 1 right, 2 left, 3 up, 4 down; 5 to 8 right up, right down, left up, left down

    A step counts from .01 of the poses' unit, within 60 degrees of an axis; a turn from .05 degrees.
    """
    step = move[..., :3, 3]
    size = step.norm(dim=-1, keepdim=True)
    cosine = torch.where(size > .01, step / size.clamp(min=1e-9), 0)
    x, _, z = cosine.unbind(-1)                                       # to the right, forward
    right = -move[..., 2, 0].clamp(-1, 1).asin().rad2deg()
    up = torch.atan2(move[..., 2, 1], move[..., 2, 2]).rad2deg()
    kinds = KINDS.to(move.device)
    steps = kinds[side(z, .5), side(x, .5)]
    turns = kinds[side(right, .05), side(up, .05)]
    return 9 * steps + turns


def side(x, least):
    """1 above `least`, 2 below its negative, else 0."""
    return (x > least).long() + 2 * (x < -least).long()
