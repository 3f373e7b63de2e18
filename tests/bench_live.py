"""
Key to frame as a person has it: from a key's event in a browser's page to the picture drawn there, to the server and back,
25 paced frames a second, keys pressed and let go at random (the last 100 count). The browser shares the processor.

    python tests/bench_live.py checkpoints/home.safetensors:4,1          # needs chromium
"""
import pathlib
import random
import sys
import tempfile
import time

from test_live import Browser, chrome, serving


def wander(page, rng, seconds):
    """Keys of random length, one or two at a time, with rests."""
    began = time.time()
    while time.time() < began + seconds:
        keys = rng.sample('wasdjlik', rng.choice((1, 2)))
        for down in (True, False):
            for k in keys:
                page.key(k, down)
            time.sleep(rng.uniform(.1, .5))


if __name__ == '__main__':
    path, steps = sys.argv[1].split(':')
    with tempfile.TemporaryDirectory() as folder, serving('--ckpt', path) as (_, port), chrome(pathlib.Path(folder)) as debug:
        page, rng = Browser(debug, f'http://127.0.0.1:{port}/'), random.Random(0)
        page.wait('window.walk && walk.frames > 0')
        print('| steps | frames/s | key to frame p50 / p95, ms |\n|---|---|---|')
        for n in steps.split(','):
            page.js(f'say({{ steps: {n} }})')
            page.wait(f'walk.steps === {n}')
            wander(page, rng, 5)                                              # warm up
            before, began = page.js('latencies = [], walk.frames'), time.time()
            page.key('w', True), time.sleep(10), page.key('w', False)
            rate = (page.js('walk.frames') - before) / (time.time() - began)
            wander(page, rng, 60)
            print(f'| {n} | {rate:.0f} | {page.js("walk.p50")} / {page.js("walk.p95")} |', flush=True)
