"""
What does each stage add? The README's picture of all stages, from the strips that `bash run.sh` leaves in
out/: two held-out clips, one below the other.

    python -m experiments.stages_picture out assets/stages.png

Writes the picture. A second.
"""
import sys

from PIL import Image, ImageDraw

STAGES = 'base', 'camera', 'ar', 'ode', 'dmd'
CLIPS = 0, 4                          # of the six in a strip
LABEL = 110                           # pixels on the left for the names


def main(folder, path):
    strips = {name: Image.open(f'{folder}/{name}.png') for name in STAGES}
    width = strips['ar'].width
    height = strips['ar'].height // 12                             # six clips, the truth above the model
    rows = []                                                      # (label, strip, row of the strip)
    for clip in CLIPS:
        rows.append(('truth', 'ar', 2 * clip))
        for name in STAGES:
            rows.append((name, name, 2 * clip + 1))
    picture = Image.new('RGB', (LABEL + width, height * len(rows)), 'white')
    pen = ImageDraw.Draw(picture)
    for i, (label, name, row) in enumerate(rows):
        part = strips[name].crop((0, row * height, width, (row + 1) * height))
        picture.paste(part, (LABEL, i * height))
        pen.text((6, i * height + height // 2), label, 'black', anchor='lm', font_size=16)
    smaller = picture.resize((picture.width * 3 // 4, picture.height * 3 // 4), Image.LANCZOS)
    smaller.save(path, optimize=True)


if __name__ == '__main__':
    main(*sys.argv[1:])
