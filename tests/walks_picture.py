"""
Ten held-out walks at frames 1, 8, 16 and 32: each row the first frame, then the truth and the dream of each.

    python tests/walks_picture.py checkpoints/dmd.safetensors assets/walks.png
"""
import sys

from PIL import Image, ImageDraw

from conftest import ROOT                                                     # noqa: F401 (finds the scripts)
from camera import relative
from data import noise_for
from stream import DISTILLED, Config, held_out, load, walk

SHOWN, WALKS, SIZE = (1, 8, 16, 32), 10, 128

if __name__ == '__main__':
    ckpt, path = sys.argv[1:]
    model, header, codec = load(ckpt, 'cpu')
    cfg = Config(ckpt=ckpt, steps=4 if header['stage'] in DISTILLED else 8)
    world, captions = held_out(cfg, header, range(WALKS), SHOWN[-1] + 1)
    truth = world['frames'].float() / 255
    first = codec.encode(truth[:, :1])
    noise = noise_for(range(WALKS), first.shape[2:], 'cpu')
    dream = walk(model.eval(), cfg, header, codec, relative(world['c2w']), world['K'], captions, first, noise)
    picture = Image.new('RGB', (SIZE * (1 + 2 * len(SHOWN)), SIZE * WALKS + 24), 'white')
    pen = ImageDraw.Draw(picture)
    columns = [(truth, 0)] + [(x, i) for i in SHOWN for x in (truth, dream)]
    for c, (video, i) in enumerate(columns):
        name = 'frame 0' if i == 0 else f'{i}: truth' if video is truth else f'{i}: dream'
        pen.text((c * SIZE + SIZE // 2, 12), name, 'black', anchor='mm', font_size=15)
        for r in range(WALKS):
            tile = Image.fromarray((video[r, i] * 255).round().byte().numpy()).resize((SIZE, SIZE), Image.LANCZOS)
            picture.paste(tile, (c * SIZE, r * SIZE + 24))
    picture.save(path, optimize=True)
