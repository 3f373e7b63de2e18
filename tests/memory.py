"""
Does a walk remember what it turned away from? Stand still, look right for four frames and back for four, inside one window;
how well does the last frame show the part of frame 0 that had left the picture? A shorter window has forgotten it.

    python tests/memory.py checkpoints/ar.safetensors checkpoints/dmd.safetensors
"""
import sys

import torch

from conftest import ROOT  # noqa: F401  (finds the scripts)
from camera import keys_to_poses, relative
from data import Lowpoly, find_codec, noise_for
from model import load_model
from stream import DISTILLED, Config, held_out, seen_mask, walk

PATHS = 64


def masked_psnr(dream, truth, mask):
    """Mean PSNR over the paths of the pixels in mask (n, H, W)."""
    error = (dream.clamp(0, 1) - truth).square().mean(-1) * mask
    return (-10 * (error.sum((1, 2)) / mask.sum((1, 2))).log10()).mean().item()


@torch.no_grad()
def row(path, degrees, window):
    """PSNR at the turn, where nobody has looked; of the same share of the picture on return; of the rest on return."""
    model, header = load_model(path)
    cfg, codec = Config(ckpt=path, steps=4 if header['stage'] in DISTILLED else 8, window=window), find_codec()
    world, captions = held_out(cfg, header, range(PATHS))
    c2w = world['c2w'][:, :1] @ keys_to_poses('l*4,j*4', degrees=degrees)
    K = world['K']
    truth, depth = Lowpoly(world['plan'].tolist(), world['palette'].tolist()).render(c2w, K[:, None].expand(-1, 9, -1), *world['frames'].shape[2:4])
    first = codec.encode(truth[:, :1])
    noise = noise_for(list(range(PATHS)), first.shape[2:], 'cpu')
    dream = walk(model.eval(), cfg, header, codec, relative(c2w), K, captions, first, noise)
    new = ~seen_mask(depth, c2w, K)[:, 4]                                     # at the turn: outside frame 0's view
    gone = ~seen_mask(depth[:, [4, 8]], c2w[:, [4, 8]], K)[:, 1]              # on return: outside the turn's view
    return [masked_psnr(dream[:, f], truth[:, f], mask) for f, mask in ((4, new), (8, gone), (8, ~gone))]


if __name__ == '__main__':
    print('| checkpoint | degrees away | window | at the turn, never seen | on return, had left the view | on return, never left |\n' + '|---' * 6 + '|')
    for path in sys.argv[1:]:
        for degrees in (5., 10.):
            for window in (9, 5):
                print(f'| {path} | {4 * degrees:.0f} | {window} | ' + ' | '.join(f'{x:.1f}' for x in row(path, degrees, window)) + ' |', flush=True)
