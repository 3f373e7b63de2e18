"""
The README's picture of all stages: the strips that `bash run.sh` leaves in out/, two held-out clips one below the other.

    python tests/stages_picture.py out assets/stages.png
"""
import sys

from PIL import Image, ImageDraw

if __name__ == '__main__':
    out, path = sys.argv[1:]
    strips = {n: Image.open(f'{out}/{n}.png') for n in ('base', 'camera', 'ar', 'ode', 'dmd')}
    width, row, clips = strips['ar'].width, strips['ar'].height // 12, (0, 4)
    rows = [[('truth', 'ar', 2 * c)] + [(n, n, 2 * c + 1) for n in strips] for c in clips]
    rows = sum(rows, [])
    picture = Image.new('RGB', (width + 110, row * len(rows)), 'white')
    pen = ImageDraw.Draw(picture)
    for i, (label, name, j) in enumerate(rows):
        picture.paste(strips[name].crop((0, j * row, width, (j + 1) * row)), (110, i * row))
        pen.text((6, i * row + row // 2), label, 'black', anchor='lm', font_size=16)
    picture.resize((picture.width * 3 // 4, picture.height * 3 // 4), Image.LANCZOS).save(path, optimize=True)
