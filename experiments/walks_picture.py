"""
What do long rollouts look like? Ten held-out paths at frames 1, 8, 16 and 32: each row shows the first frame,
then pairs of the truth and what was generated.

    python -m experiments.walks_picture checkpoints/dmd.safetensors assets/walks.png

Writes the picture. A minute.
"""
import sys

from PIL import Image, ImageDraw

from camera import relative
from data import noise_for
from stream import Config, generate, held_out, prepare

SHOWN = 1, 8, 16, 32                  # frames
PATHS = 10
SIZE = 128                            # pixels of a picture
TITLE = 24                            # pixels of the line above


def main(ckpt, path):
    cfg = Config(ckpt=ckpt, device='cpu')
    model, header, codec, _ = prepare(cfg)
    world, captions = held_out(cfg, header, range(PATHS), SHOWN[-1] + 1)
    truth = world['frames'].float() / 255
    first = codec.encode(truth[:, :1])
    noise = noise_for(range(PATHS), first.shape[2:], 'cpu')
    c2w = relative(world['c2w'])
    video = generate(model, cfg, header, codec, c2w, world['K'], captions, first, noise)

    columns = [('frame 0', truth[:, 0])]
    for i in SHOWN:
        columns.append((f'{i}: truth', truth[:, i]))
        columns.append((f'{i}: generated', video[:, i]))
    picture = Image.new('RGB', (SIZE * len(columns), TITLE + SIZE * PATHS), 'white')
    pen = ImageDraw.Draw(picture)
    for c, (name, frames) in enumerate(columns):
        pen.text((c * SIZE + SIZE // 2, TITLE // 2), name, 'black', anchor='mm', font_size=15)
        for r, frame in enumerate(frames):
            tile = Image.fromarray((frame * 255).round().byte().numpy())
            picture.paste(tile.resize((SIZE, SIZE), Image.LANCZOS), (c * SIZE, TITLE + r * SIZE))
    picture.save(path, optimize=True)


if __name__ == '__main__':
    main(*sys.argv[1:])
