"""
Are larger pictures better ones? Held-out walks of checkpoints of different sizes, each compared with the truth at every size:
shrunk by area, enlarged bicubically. The paths, worlds and first frames are the same.

    python tests/sizes.py checkpoints/dmd.safetensors old/dmd.safetensors        # another commit's, by git show COMMIT:checkpoints/...
"""
import sys

import torch
import torch.nn.functional as F

from conftest import ROOT  # noqa: F401  (finds the scripts)
from camera import relative
from data import noise_for, psnr
from stream import DISTILLED, Config, held_out, load, walk

PATHS, FRAMES = 64, 16


def resize(video, size):
    """Pictures (B, F, H, W, 3) at (height, width) `size`."""
    x = video.flatten(0, 1).movedim(-1, 1)
    x = F.interpolate(x, size, mode='area' if size[0] < x.shape[2] else 'bicubic')
    return x.clamp(0, 1).movedim(1, -1).unflatten(0, video.shape[:2])


if __name__ == '__main__':
    videos, truths = {}, {}
    for path in sys.argv[1:]:
        model, header, codec = load(path, 'cpu')
        cfg = Config(ckpt=path, steps=4 if header['stage'] in DISTILLED else 8)
        world, captions = held_out(cfg, header, range(PATHS), FRAMES)
        truth = world['frames'].float() / 255
        first = codec.encode(truth[:, :1])
        noise = noise_for(range(PATHS), first.shape[2:], 'cpu')
        videos[path] = walk(model.eval(), cfg, header, codec, relative(world['c2w']), world['K'], captions, first, noise)
        truths[tuple(truth.shape[2:4])] = truth
    print('| checkpoint | size | ' + ' | '.join(f'at {h} x {w}: psnr@1 | @7 | @15' for h, w in sorted(truths)) + ' |\n' + '|---' * (2 + 3 * len(truths)) + '|')
    for path, video in videos.items():
        rows = [psnr(resize(video, size), truths[size]).mean(0)[[1, 7, 15]].tolist() for size in sorted(truths)]
        print(f'| {path} | {video.shape[2]} | ' + ' | '.join(f'{x:.2f}' for row in rows for x in row) + ' |')
