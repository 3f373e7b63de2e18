"""
How long from a key to the picture that shows it, as a person has it? From the key's event in a browser's page
to the picture drawn there, by way of the server. 25 paced frames a second; keys are pressed and released at
random.

    python -m experiments.bench_live checkpoints/home.safetensors:4,1        # needs chromium

Prints a row for each number of steps: frames a second, median and 95th percentile over the last 100 keys. A
minute and a half a row. The browser shares the processor.
"""
import contextlib
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request

from websockets.sync.client import connect

CHROMIUM = 'chromium', 'chromium-browser', 'google-chrome'


@contextlib.contextmanager
def serving(ckpt):
    """Start the live server in a process; gives its port."""
    env = dict(os.environ, PYTHONUNBUFFERED='1')
    env.pop('OMP_NUM_THREADS', None)                               # the server chooses a number itself
    command = [sys.executable, 'stream.py', '--live', 'True', '--port', '0', '--browser', 'False',
               '--device', 'cpu', '--ckpt', ckpt]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
    try:
        line = process.stdout.readline()                           # http://127.0.0.1:PORT/
        found = re.search(r'127\.0\.0\.1:(\d+)/', line)
        if not found:
            raise RuntimeError(f'the server did not start: {line}{process.stdout.read()}')
        yield int(found[1])
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def chromium():
    """Start a headless browser; gives the port of its DevTools."""
    found = [path for path in map(shutil.which, CHROMIUM) if path]
    if not found:
        raise RuntimeError('there is no chromium here: install it first')
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [found[0], '--headless=new', '--no-sandbox', '--disable-gpu', '--remote-debugging-port=0',
                   '--remote-allow-origins=*', '--window-size=1000,960', f'--user-data-dir={folder}',
                   'about:blank']
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        file = pathlib.Path(folder, 'DevToolsActivePort')
        try:
            began = time.time()
            while not file.exists():
                if time.time() > began + 60 or process.poll() is not None:
                    raise RuntimeError('chromium did not start')
                time.sleep(.1)
            time.sleep(.5)
            yield int(file.read_text().split()[0])
        finally:
            process.kill()
            process.wait()


class Page:
    """A page in the browser, driven through the DevTools protocol."""

    def __init__(self, port, url):
        request = urllib.request.Request(f'http://127.0.0.1:{port}/json/new?{url}', method='PUT')
        target = json.load(urllib.request.urlopen(request))
        self.socket = connect(target['webSocketDebuggerUrl'], max_size=None)
        self.count = 0

    def call(self, method, **params):
        self.count += 1
        self.socket.send(json.dumps({'id': self.count, 'method': method, 'params': params}))
        while True:
            answer = json.loads(self.socket.recv(30))
            if answer.get('id') == self.count:                     # others are events
                return answer['result']

    def js(self, expression):
        """The value of an expression in the page."""
        answer = self.call('Runtime.evaluate', expression=expression, returnByValue=True)
        return answer['result'].get('value')

    def wait(self, expression, seconds=20):
        """Wait until an expression in the page is true."""
        began = time.time()
        while not self.js(expression):
            if time.time() > began + seconds:
                raise RuntimeError(f'not within {seconds} s: {expression}')
            time.sleep(.05)

    def key(self, key, down):
        kind = 'keyDown' if down else 'keyUp'
        self.call('Input.dispatchKeyEvent', type=kind, key=key)


def wander(page, rng, seconds):
    """Press keys for a random time, one or two together, with rests."""
    began = time.time()
    while time.time() < began + seconds:
        keys = rng.sample('wasdjlik', rng.choice((1, 2)))
        for down in (True, False):
            for key in keys:
                page.key(key, down)
            time.sleep(rng.uniform(.1, .5))


def measure(page, rng, steps):
    """(frames a second, median, 95th percentile in ms) at so many steps a frame."""
    page.js(f'say({{ steps: {steps} }})')
    page.wait(f'walk.steps === {steps}')
    wander(page, rng, 5)                                           # warm up
    page.js('latencies = []')
    before = page.js('walk.frames')
    began = time.time()
    page.key('w', True)
    time.sleep(10)
    page.key('w', False)
    rate = (page.js('walk.frames') - before) / (time.time() - began)
    wander(page, rng, 60)
    return rate, page.js('walk.p50'), page.js('walk.p95')


if __name__ == '__main__':
    path, steps = sys.argv[1].split(':')
    rng = random.Random(0)
    with serving(path) as port, chromium() as debug:
        page = Page(debug, f'http://127.0.0.1:{port}/')
        page.wait('window.walk && walk.frames > 0')
        print('| steps | frames/s | key to frame p50 / p95, ms |\n|---|---|---|')
        for n in steps.split(','):
            rate, p50, p95 = measure(page, rng, int(n))
            print(f'| {n} | {rate:.0f} | {p50} / {p95} |', flush=True)
