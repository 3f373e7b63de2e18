"""
Does a model remember what it turned away from? Stand still, look right for four frames and back for four,
inside one window: how well does the last frame show the part of frame 0 that had left the picture? A shorter
window has forgotten it.

    python -m experiments.memory checkpoints/ar.safetensors checkpoints/dmd.safetensors

Prints a row for each checkpoint, angle and window: PSNR in dB over 64 held-out paths. A minute a checkpoint.
"""
import sys

import torch

from camera import keys_to_poses, relative
from data import Lowpoly, noise_for
from experiments.score import visible_mask
from stream import Config, generate, held_out, prepare

PATHS = 64
TURN, RETURN = 4, 8                   # frame 4 looks away, frame 8 is back


def masked_psnr(video, truth, mask):
    """Mean over the paths of the PSNR of the pixels in mask (n, H, W) of pictures (n, H, W, 3)."""
    error = (video.clamp(0, 1) - truth).square().mean(-1) * mask   # (n, H, W)
    error = error.sum((1, 2)) / mask.sum((1, 2))
    return (-10 * error.log10()).mean().item()


@torch.no_grad()
def measure(path, degrees, window):
    """PSNR at the turn, where nobody has looked; on return, of what had left the picture; and of the rest."""
    cfg = Config(ckpt=path, window=window, device='cpu')
    model, header, codec, _ = prepare(cfg)
    world, captions = held_out(cfg, header, range(PATHS))
    c2w = world['c2w'][:, :1] @ keys_to_poses('l*4,j*4', degrees=degrees)    # (n, 9, 4, 4)
    K = world['K']                                                 # (n, 4)
    height, width = world['frames'].shape[2:4]
    lowpoly = Lowpoly(world['plan'].tolist(), world['palette'].tolist())
    truth, depth = lowpoly.render(c2w, K[:, None].expand(-1, c2w.shape[1], -1), height, width)
    first = codec.encode(truth[:, :1])
    noise = noise_for(range(PATHS), first.shape[2:], 'cpu')
    video = generate(model, cfg, header, codec, relative(c2w), K, captions, first, noise)

    new = ~visible_mask(depth, c2w, K)[:, TURN]                    # outside frame 0's view
    back = [TURN, RETURN]
    left = ~visible_mask(depth[:, back], c2w[:, back], K)[:, 1]    # outside the turn's view
    return [
        masked_psnr(video[:, TURN], truth[:, TURN], new),
        masked_psnr(video[:, RETURN], truth[:, RETURN], left),
        masked_psnr(video[:, RETURN], truth[:, RETURN], ~left),
    ]


if __name__ == '__main__':
    print('| checkpoint | degrees away | window | at the turn, never seen | on return, had left the view '
          '| on return, never left |')
    print('|---' * 6 + '|')
    for path in sys.argv[1:]:
        for degrees in (5., 10.):
            for window in (9, 5):
                cells = [f'{x:.1f}' for x in measure(path, degrees, window)]
                print(f'| {path} | {4 * degrees:.0f} | {window} | ' + ' | '.join(cells) + ' |', flush=True)
