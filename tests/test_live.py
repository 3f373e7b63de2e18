"""The live walk: its server against good and bad company, and the page in a real browser (chromium, if it is there)."""
import base64
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from camera import BadInput
from conftest import ROOT
from stream import Held, to_jpeg, video_codec, write_video


def test_held_keys_move_for_as_long_as_they_are_held():
    held = Held()
    assert held.take(10., .04) == ({}, None)
    held.edge('w', True, 10.01, stamp=7)
    held.edge('w', True, 10.02, stamp=8)                      # repeated: nothing new
    seconds, stamp = held.take(10.02, .04)
    assert abs(seconds['w'] - .05) < 1e-9 and stamp == 7      # since the key, and one period ahead
    assert abs(held.take(10.06, .04)[0]['w'] - .04) < 1e-9
    held.edge('l', True, 10.07)
    held.edge('w', False, 10.2)
    seconds = held.take(10.21, .04)[0]
    assert abs(seconds['w'] - .1) < 1e-9 and abs(seconds['l'] - .18) < 1e-9
    held.edge('l', False, 10.22)                              # before what the last frame promised: no way back
    assert held.take(10.3, .04)[0] == {'l': 0}
    held.edge('j', True, 11.), held.edge('j', False, 11.03)   # a tap between two frames is not lost
    assert abs(held.take(11.04, .04)[0]['j'] - .03) < 1e-9


@contextlib.contextmanager
def serving(*args):
    env = {k: v for k, v in os.environ.items() if k != 'OMP_NUM_THREADS'} | {'PYTHONUNBUFFERED': '1'}
    command = [sys.executable, f'{ROOT}/stream.py', '--live', 'True', '--port', '0', '--browser', 'False',
               '--device', 'cpu', *args]
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=ROOT)
    try:
        line = p.stdout.readline()
        assert 'http://127.0.0.1:' in line, line + p.stdout.read()
        yield p, int(re.search(r':(\d+)/', line)[1])
    finally:
        p.kill()
        p.wait()


@pytest.fixture(scope='module')
def port():
    with serving('--ckpt', 'checkpoints/home.safetensors') as (_, port):
        yield port


def tab(port, **kw):
    return connect(f'ws://127.0.0.1:{port}/walk', origin=f'http://127.0.0.1:{port}', **kw)


def frame(ws, timeout=20):
    """The next picture: (header, (n, H, W, 3) uint8)."""
    while isinstance(data := ws.recv(timeout), str):
        pass
    header, _, rest = data.partition(b'\n')
    header = json.loads(header)
    return header, np.frombuffer(rest, np.uint8).reshape(header['n'], header['h'], header['w'], 3)


def press(ws, key, down=True, t=1.5):
    ws.send(json.dumps(dict(key=key, down=down, t=t)))


def test_keys_walk_and_the_world_rests_without_them(port):
    with tab(port) as ws:
        hello = json.loads(ws.recv(20))
        assert {'home', 'ar', 'ode', 'dmd'} <= set(hello['ckpts']) and hello['fps'] == 25
        ws.send('{"start": "world", "clip": 2}')
        while (header := frame(ws)[0])['clip'] != 2:
            pass
        assert header['metres'] == 0 and header['stamp'] is None
        press(ws, 'w', t=42.25)
        first = frame(ws)[0]
        assert first['stamp'] == 42.25 and 0 < first['metres'] < .3
        press(ws, 'l')
        seen, began = [frame(ws) for _ in range(12)], time.time()
        assert seen[-1][0]['metres'] > first['metres'] and seen[-1][0]['frame'] - first['frame'] >= 12
        assert np.abs(seen[-1][1].astype(float) - seen[0][1]).mean() > 3
        press(ws, 'w', False), press(ws, 'l', False)
        with pytest.raises(TimeoutError):                     # what is under way arrives; then nothing moves
            while time.time() < began + 20:
                frame(ws, timeout=.7)
        ws.send('{"truth": true}'), press(ws, 'j')
        for _ in range(2):
            header, picture = frame(ws)
        assert header['w'] == 256 and picture.shape == (1, 128, 256, 3)
        ws.send('{"truth": false}'), press(ws, 'j', False)


def test_steps_checkpoint_prompt_and_start_change_under_way(port):
    with tab(port) as ws:
        wishes = [
            ({'steps': 1}, 'steps'),
            ({'ckpt': 'ar'}, 'ckpt'),
            ({'steps': 2}, 'steps'),
            ({'prompt': 'night sky red floor'}, 'prompt'),
            ({'ckpt': 'dmd'}, 'ckpt'),
            ({'ckpt': 'doom'}, 'ckpt'),
            ({'start': 'world', 'clip': 3}, 'clip'),
            ({'ckpt': 'home'}, 'ckpt'),
            ({'start': 'prompt', 'clip': 5}, 'clip'),
            ({'start': 'world', 'clip': 0}, 'clip'),
        ]
        for message, key in wishes:
            value = message[key]
            ws.send(json.dumps(message))
            began = time.time()
            while (header := frame(ws)[0])[key] != value:
                assert time.time() < began + 20
            assert header['h'] == (48 if header['ckpt'] == 'doom' else 128)    # another size: another start
        assert header['metres'] == 0


def test_the_newest_tab_steers_and_the_older_is_told(port):
    with tab(port) as old:
        frame(old)
        with tab(port) as new:
            frame(new)
            with pytest.raises(ConnectionClosed) as closed:
                while True:
                    old.recv(10)
            assert closed.value.rcvd.code == 4000
            press(new, 'd')
            assert frame(new)[0]['stamp'] == 1.5
            press(new, 'd', False), new.send('{"pause": true}')
    with tab(port) as ws:                                     # a new tab is not paused
        press(ws, 'a', t=2.5)
        while frame(ws)[0]['stamp'] != 2.5:
            pass


def test_a_tab_that_does_not_read_holds_nothing_up(port):
    with tab(port) as ws:
        before = frame(ws)[0]['frame']
        press(ws, 'j')
        time.sleep(3)                                         # nothing is read: the pipe fills, pictures are dropped
        press(ws, 'j', False)
    with tab(port) as ws:
        assert frame(ws)[0]['frame'] > before + 20


MALFORMED = [
    '', 'no json', '[]', '[' * 1500, '"' + 'x' * 10000 + '"', b'\xff\x00',
    '{"key": "w"}', '{"key": "wasd", "down": true, "t": 1}', '{"key": "w", "down": 1, "t": "x"}',
    '{"ckpt": "../../etc/passwd"}', '{"steps": 1000000}', '{"prompt": 7}', '{"prompt": "\\ud800"}',
    '{"start": "/etc/passwd", "clip": 0}', '{"start": "world", "clip": -1}',
]


@pytest.mark.parametrize('text', MALFORMED)
def test_malformed_messages_end_their_own_connection_only(port, text):
    with tab(port) as ws:
        ws.send(text)
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                ws.recv(10)
        assert closed.value.rcvd.code in (1003, 1009)
    with tab(port) as ws:
        frame(ws)


def get(port, path='/', host=None, **headers):
    c = http.client.HTTPConnection('127.0.0.1', port, timeout=10)
    c.request('GET', path, headers={'Host': host or f'127.0.0.1:{port}'} | headers)
    r = c.getresponse()
    return r.status, r.read()


def test_no_path_reaches_the_file_system(port):
    assert get(port)[0] == 200 and b'<canvas' in get(port)[1]
    for path in ('/stream.py', '/../stream.py', '/assets/stream.html', '//etc/passwd', '/%2e%2e/%2e%2e/etc/passwd',
                 '/walk', '/?x', '/favicon.ico'):
        status, body = get(port, path)
        assert status == 404 and len(body) < 100, path


def test_other_pages_and_other_names_cannot_steer(port):
    assert get(port, host=f'evil.example:{port}')[0] == 403                   # DNS rebinding
    assert get(port, Origin='http://evil.example')[0] == 403
    for origin in ('http://evil.example', f'http://127.0.0.1:{port + 1}', 'null', None):
        with pytest.raises(InvalidStatus):
            connect(f'ws://127.0.0.1:{port}/walk', origin=origin)


def test_slow_and_huge_requests_block_nobody(port):
    idle = [socket.create_connection(('127.0.0.1', port)) for _ in range(20)]
    for s in idle[::2]:
        s.sendall(b'GET / HTTP/1.1\r\nHost: 127')
    huge = socket.create_connection(('127.0.0.1', port))
    with contextlib.suppress(OSError):
        huge.sendall(b'GET /' + b'x' * 10 ** 6)
    assert get(port)[0] == 200
    with tab(port) as ws:
        frame(ws)
    for s in (*idle, huge):
        s.close()


def test_start_is_quick_and_ctrl_c_ends_it():
    began = time.time()
    with serving() as (p, port):
        with tab(port) as ws:
            frame(ws)
            assert time.time() - began < 30                   # about 4 s on two quiet cores
            press(ws, 'w')
            p.send_signal(signal.SIGINT)
            assert p.wait(15) == 0 and 'Traceback' not in p.stdout.read()


def test_a_port_in_use_is_said():
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, f'{ROOT}/stream.py', '--live', 'True', '--port', port]
        p = subprocess.run(command, capture_output=True, text=True)
    assert p.returncode == 1 and p.stderr.startswith('error: ')
    assert 'in use' in p.stderr and 'Traceback' not in p.stderr


def test_save_gives_the_walk_as_a_film(port):
    with tab(port) as ws:
        press(ws, 'w'), press(ws, 'j')
        shown = [frame(ws)[1] for _ in range(12)]
        press(ws, 'w', False), press(ws, 'j', False)
        ws.send('{"save": true}')
        while not (isinstance(data := ws.recv(60), bytes) and data.startswith(b'{"mp4"')):
            pass
    film = iio.imread(data.partition(b'\n')[2], extension='.mp4')
    assert len(film) >= 12 and film.shape[1:] == (384, 384, 3)
    pictures = film[:, 1:192:3, 1::3].astype(float)           # the upper half: no keys are drawn there
    assert np.abs(pictures - shown[-1][0][:64]).mean((1, 2, 3)).min() < 8


def test_the_tape_holds_compressed_pictures():
    y, x = np.mgrid[:240, :416] / 40
    picture = np.uint8(127 * np.stack([np.sin(x), np.cos(x * y), np.sin(y) > 0], -1) + 128)
    jpeg = to_jpeg(picture)
    assert len(jpeg) < picture.nbytes / 5 and np.abs(iio.imread(jpeg) - picture.astype(float)).mean() < 3


def test_a_film_that_breaks_off_leaves_the_old_one(tmp_path, monkeypatch):
    film = tmp_path / 'walk.mp4'
    film.write_bytes(b'an older film')
    monkeypatch.setattr(iio, 'imwrite', lambda path, *_, **options: open(path, 'wb').write(b'half a film'))
    with pytest.raises(BadInput, match='walk.mp4 cannot be written'):
        write_video(str(film), [], 8)                         # as ffmpeg does on a full disk
    assert film.read_bytes() == b'an older film' and os.listdir(tmp_path) == ['walk.mp4']


def test_mp4_without_its_usual_codec_falls_back_or_says_why(tmp_path, monkeypatch):
    ffmpeg, fake, film = imageio_ffmpeg.get_ffmpeg_exe(), tmp_path / 'ffmpeg', str(tmp_path / 'walk.mp4')
    pictures = [np.full((64, 64, 3), i * 20, np.uint8) for i in range(10)]
    monkeypatch.setenv('IMAGEIO_FFMPEG_EXE', str(fake))

    def lacks(word):
        refuse = f'case "$*" in *{word}*) echo "Unknown encoder" >&2; exit 1;; esac'
        fake.write_text(f'#!/bin/sh\n{refuse}\nexec {ffmpeg} "$@"\n')
        fake.chmod(0o755)
        video_codec.cache_clear()

    lacks('libx264')
    write_video(film, pictures, 8)
    assert iio.immeta(film)['codec'] == 'mpeg4' and len(iio.imread(film)) == 10
    lacks('-vcodec')
    with pytest.raises(BadInput, match='Unknown encoder.*gif'):
        write_video(film, pictures, 8)
    monkeypatch.setenv('IMAGEIO_FFMPEG_EXE', str(tmp_path / 'nowhere'))
    video_codec.cache_clear()
    with pytest.raises(BadInput, match='nowhere.*gif'):
        write_video(film, pictures, 8)
    video_codec.cache_clear()

# -----------------------------------------------------------------------------
# in a browser, driven through its DevTools protocol

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')


class Browser:
    """A page in headless chromium: evaluate, press, screenshot."""

    def __init__(self, port, url):
        request = urllib.request.Request(f'http://127.0.0.1:{port}/json/new?{url}', method='PUT')
        target = json.load(urllib.request.urlopen(request))
        self.ws = connect(target['webSocketDebuggerUrl'], max_size=None).__enter__()
        self.count = 0

    def call(self, method, **params):
        self.count += 1
        self.ws.send(json.dumps(dict(id=self.count, method=method, params=params)))
        while (answer := json.loads(self.ws.recv(30))).get('id') != self.count:
            pass
        assert 'error' not in answer, answer
        return answer['result']

    def js(self, expression):
        return self.call('Runtime.evaluate', expression=expression, returnByValue=True)['result'].get('value')

    def wait(self, expression, seconds=20):
        began = time.time()
        while not self.js(expression):
            assert time.time() < began + seconds, f'not within {seconds} s: {expression}'
            time.sleep(.05)

    def key(self, key, down):
        self.call('Input.dispatchKeyEvent', type='keyDown' if down else 'keyUp', key=key)

    def hold(self, keys, frames=6):
        goal = self.js('walk.frames') + frames
        for k in keys:
            self.key(k, True)
        self.wait(f'walk.frames >= {goal}')
        lit = self.js("[...document.querySelectorAll('kbd.lit')].map(e => e.dataset.key).join('')")
        for k in keys:
            self.key(k, False)
        return lit

    def picture(self):
        size = self.js('[canvas.height, canvas.width]')
        data = self.js('Array.from(pen.getImageData(0, 0, canvas.width, canvas.height).data)')
        return np.array(data, float).reshape(*size, 4)[..., :3]

    def screenshot(self, path):
        with open(path, 'wb') as f:
            f.write(base64.b64decode(self.call('Page.captureScreenshot', format='png')['data']))


@contextlib.contextmanager
def chrome(folder):
    """The DevTools port of a headless chromium."""
    command = [CHROMIUM, '--headless=new', '--no-sandbox', '--disable-gpu', '--remote-debugging-port=0',
               '--remote-allow-origins=*', '--window-size=1000,960', f'--user-data-dir={folder}', 'about:blank']
    p = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        began = time.time()
        while not (folder / 'DevToolsActivePort').exists():
            assert time.time() < began + 60 and p.poll() is None, 'chromium did not start'
            time.sleep(.1)
        time.sleep(.5)
        yield int((folder / 'DevToolsActivePort').read_text().split()[0])
    finally:
        p.kill()
        p.wait()


@pytest.fixture(scope='module')
def chromium(tmp_path_factory):
    if not CHROMIUM:
        pytest.skip('no chromium here')
    with chrome(tmp_path_factory.mktemp('chromium')) as debug:
        yield debug


@pytest.fixture
def page(port, chromium):
    b = Browser(chromium, f'http://127.0.0.1:{port}/')
    b.wait('window.walk && walk.frames > 0')
    b.js('act.restart()')
    b.wait('walk.metres === 0 && walk.frames > 1')
    yield b
    b.call('Page.close')


def shift(a, b):
    """By how many pixels to the right picture b is picture a, in the middle rows; -20 to 20."""
    a, b = (x[16:48].mean(-1) for x in (a, b))
    error = {s: np.abs(a[:, max(0, -s):64 - max(0, s)] - b[:, max(0, s):64 + min(0, s)]).mean() for s in range(-20, 21)}
    return min(error, key=error.get)


def test_turning_left_moves_the_picture_right(page):
    for key, sign in (('j', 1), ('ArrowLeft', 1), ('l', -1), ('ArrowRight', -1)):
        before = page.picture()
        assert page.hold([key], 5) == {'j': 'j', 'l': 'l', 'ArrowLeft': 'j', 'ArrowRight': 'l'}[key]
        assert shift(before, page.picture()) * sign > 2, key


def test_two_keys_at_once_hud_and_restart(page):
    assert sorted(page.hold(['w', 'l'], 30)) == ['l', 'w']
    hud = page.js("document.getElementById('hud').textContent")
    numbers = re.search(r'(\d+) fps   key to frame (\d+) / (\d+) ms.*\n.* (\d+\.\d) m', hud).groups()
    rate, p50, p95, metres = map(float, numbers)
    assert rate > 3 and 0 < p50 <= p95 and metres > .3
    page.key('r', True), page.key('r', False)
    page.wait('walk.metres === 0')
    page.key('p', True), page.key('p', False)
    time.sleep(.5)                                            # what is under way arrives
    frames = page.js('walk.frames')
    page.key('w', True), page.key('w', False)
    time.sleep(.5)
    assert page.js('walk.frames') == frames and page.js("document.getElementById('note').textContent") == 'paused'
    page.key('p', True), page.key('p', False)
    page.hold(['w'], 2)


def test_save_gives_a_playable_film(page, tmp_path):
    page.call('Browser.setDownloadBehavior', behavior='allow', downloadPath=str(tmp_path))
    page.hold(['w', 'j'], 20)
    page.js('act.save()')
    page.wait('walk.saved > 1000', 60)
    began = time.time()
    while not (tmp_path / 'walk.mp4').exists() and time.time() < began + 10:
        time.sleep(.1)
    film = iio.imread(tmp_path / 'walk.mp4')
    assert len(film) >= 20 and film.shape[1:] == (384, 384, 3) and film.std() > 10


def test_a_closed_tab_stops_the_walk_and_the_next_goes_on(port, chromium):
    one = Browser(chromium, f'http://127.0.0.1:{port}/')
    one.wait('window.walk && walk.frames > 0')
    one.key('j', True)
    one.wait('walk.frames > 5')
    frame_before = one.js('walk.frame')
    one.call('Page.close')                                    # with the key still down
    time.sleep(1.5)
    two = Browser(chromium, f'http://127.0.0.1:{port}/')
    two.wait('window.walk && walk.frames > 0')
    assert two.js('walk.frame') < frame_before + 30           # it did not walk on alone
    two.hold(['l'], 3)
    if path := os.environ.get('SCREENSHOT'):                  # how assets/page.png is made
        two.js('act.restart()'), two.js('act.truth()')
        two.hold(['w', 'l'], 12)
        two.key('w', True), two.key('l', True)
        time.sleep(.5)
        two.screenshot(path)
        two.key('w', False), two.key('l', False)
    two.call('Page.close')
