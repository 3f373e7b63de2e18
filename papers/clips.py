"""
The clips on which papers/ train from the shipped checkpoints: 512 at their size, 128 x 128, and 128 held out.

    python -m papers.clips                # data/papers, two minutes on one core, 190 MB; made once
"""
import os

import data

FOLDER = 'data/papers'


def clips_128():
    """The folder of the clips; they are made if they are not there."""
    if not os.path.exists(f'{FOLDER}/manifest.json'):
        data.make(data.Config(plans=512, clips=512, height=128, width=128, out=FOLDER))
    return FOLDER


if __name__ == '__main__':
    clips_128()
