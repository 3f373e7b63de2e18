"""The live walk: its server against good and bad company, and the page in a real browser (chromium, if it is there)."""
import base64
import contextlib
import http.client
import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from camera import BadInput
from common import load_model, save_model
from conftest import ROOT, run
from stream import Config, Held, Live, refusal, to_jpeg, video_codec, write_video


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


SEEN = '{"seen": true}'


def frame(ws, timeout=20):
    """The next picture, which is acknowledged: (header, (n, H, W, 3) uint8)."""
    while isinstance(data := ws.recv(timeout), str):
        pass
    ws.send(SEEN)
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


def test_a_slow_page_does_not_lag(port):
    """What it has not acknowledged, two pictures, is all that is under way; what it gets then is new."""
    with tab(port) as ws:
        frame(ws)
        press(ws, 'j')
        time.sleep(3)                                         # 75 frames, on two quiet cores
        press(ws, 'j', False)
        waiting = [ws.recv(1), ws.recv(1)]
        with pytest.raises(TimeoutError):
            ws.recv(1)
        for _ in waiting:
            ws.send(SEEN)
        last = json.loads(waiting[-1].partition(b'\n')[0])
        assert frame(ws)[0]['frame'] > last['frame'] + 5
        with pytest.raises(TimeoutError):
            ws.recv(1)


def text_frame(text):
    """A WebSocket frame of up to 125 bytes, as a client sends it (masked, here with zeros)."""
    return bytes([0x81, 0x80 + len(text), 0, 0, 0, 0]) + text.encode()


def test_a_hung_tab_is_neither_waited_for_nor_heard(port):
    hung = socket.create_connection(('127.0.0.1', port), timeout=20)
    hung.sendall(f'GET /walk HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nOrigin: http://127.0.0.1:{port}\r\n'
                 'Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n'
                 'Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n'.encode())
    hung.sendall(text_frame('{"key": "j", "down": true, "t": 1}'))
    size = 0
    while size < 2 * 128 * 128 * 3:                           # two pictures; it reads nothing after them
        size += len(hung.recv(2 ** 16))
    with tab(port) as ws:
        began = time.time()
        press(ws, 'w', t=9.5)
        while frame(ws)[0]['stamp'] != 9.5:
            pass
        assert time.time() - began < 3                        # the closing handshake waits ten seconds for the hung one
        press(ws, 'w', False)
        hung.sendall(text_frame('{"key": "j", "down": true, "t": 1}'))
        with pytest.raises(TimeoutError):
            while time.time() < began + 8:
                frame(ws, timeout=.7)
    hung.close()


class Silent:
    """A connection whose client says nothing until it leaves."""

    def __init__(self):
        self.left, self.closed, self.sent = threading.Event(), threading.Event(), queue.Queue()

    def send(self, data):
        self.sent.put(data)

    def close(self, code, reason):
        self.code = code
        self.closed.set()

    def __iter__(self):
        self.left.wait(10)
        return iter(())


def test_a_tab_whose_thread_starts_late_takes_nothing_over():
    """Its client may be gone by then: one that sent too much is closed before its thread begins."""
    walk, old, new = Live(Config(fps=25), torch.device('cpu'), torch.float32), Silent(), Silent()
    walk.newest_tab = new                                     # it asked last
    threading.Thread(target=walk.tab, args=[new], daemon=True).start()
    old.left.set()
    walk.tab(old)
    assert old.closed.wait(10) and old.code == 4000
    assert walk.owner is new and not new.closed.is_set()
    new.left.set()
    assert new.closed.wait(10) and walk.owner is None


def test_a_bad_checkpoint_is_said_to_the_page(tmp_path):
    walk, ws = Live(Config(fps=25), torch.device('cpu'), torch.float32), Silent()
    walk.ckpts['bad'] = str(tmp_path / 'bad.safetensors')
    (tmp_path / 'bad.safetensors').write_bytes(b'no tensors')
    walk.owner, walk.model = ws, 'the model before'
    walk.change_model('bad')
    header = json.loads(ws.sent.get(timeout=10))
    assert 'bad.safetensors' in header['error'] and walk.model == 'the model before'


def test_a_walk_that_is_no_numbers_ends_with_a_sentence(tmp_path):
    model, header = load_model(f'{ROOT}/checkpoints/ar.safetensors')
    state = {name: torch.full_like(x, torch.nan) for name, x in model.state_dict().items()}
    header = {name: value for name, value in header.items() if name != 'model'}
    save_model(f'{tmp_path}/nan.safetensors', state, model.cfg, **header)
    cfg = Config(ckpt=f'{tmp_path}/nan.safetensors', first='prompt', steps=1, fps=25)
    with pytest.raises(BadInput, match='nan.safetensors: what it generates is no numbers'):
        Live(cfg, torch.device('cpu'), torch.float32).run()


MALFORMED = [
    '', 'no json', '[]', '[' * 1500, '"' + 'x' * 10000 + '"', b'\xff\x00',
    '{"key": "w"}', '{"key": "wasd", "down": true, "t": 1}', '{"key": "w", "down": 1, "t": "x"}',
    '{"ckpt": "../../etc/passwd"}', '{"steps": 1000000}', '{"prompt": 7}', '{"prompt": "\\ud800"}',
    '{"start": "/etc/passwd", "clip": 0}', '{"start": "world", "clip": -1}', '{"start": "world", "clip": true}',
    '{"key": "w", "down": true, "t": NaN}', '{"key": "w", "down": true, "t": 1e999}',
    '{"key": "w", "down": true, "t": true}', '{"key": "w", "down": true, "t": -1}',
    '{"key": "w", "down": true, "t": 1' + 400 * '0' + '}', '{"steps": true}',
    '{"steps": 4.0}', '{"steps": NaN}', '{"seen": 1}', '{"prompt": ["' + 99 * '\u00e9' + '"]}',
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
    return r.status, r.read(), r.headers


def test_every_path_is_the_page_and_none_a_file(port):
    _, page, headers = get(port)
    assert b'<canvas' in page and headers['X-Frame-Options'] == 'DENY'
    for path in ('/?token=1', '/user/me/proxy/8000/', '/walk', '/stream.py', '/../stream.py', '//etc/passwd',
                 '/%2e%2e/%2e%2e/etc/passwd'):
        assert get(port, path)[:2] == (200, page), path


def test_behind_a_proxy_with_https_and_a_path_of_its_own(port):
    with connect(f'ws://127.0.0.1:{port}/user/me/proxy/8000/walk?token=1', origin=f'https://127.0.0.1:{port}') as ws:
        assert frame(ws)[1].std() > 10


def test_other_pages_and_other_names_cannot_steer(port):
    status, body, _ = get(port, host=f'evil.example:{port}')                  # DNS rebinding
    assert status == 403 and b'evil.example' in body and b'--host' in body
    assert get(port, Origin='http://evil.example')[0] == 403
    for origin in ('http://evil.example', f'http://127.0.0.1:{port + 1}', 'null', None):
        with pytest.raises(InvalidStatus):
            connect(f'ws://127.0.0.1:{port}/walk', origin=origin)


@pytest.mark.parametrize('address, names, host, origin, may', [
    ('127.0.0.1', [], 'localhost:8000', 'http://localhost:8000', True),
    ('127.0.0.1', [], '[::1]:8000', None, True),
    ('127.0.0.1', [], f'{socket.gethostname()}:8000', None, True),
    ('127.0.0.1', [], '192.168.1.9:8000', None, False),
    ('192.168.1.9', [], '192.168.1.9:8000', None, True),
    ('192.168.1.9', [], 'evil.example:8000', None, False),
    ('0.0.0.0', [], '192.168.1.9:8000', 'http://192.168.1.9:8000', True),
    ('0.0.0.0', [], 'evil.example:8000', None, False),
    ('0.0.0.0', [], '192.168.1.9.evil.example', None, False),
    ('0.0.0.0', [], '', None, False),
    ('127.0.0.1', ['demo.example'], 'Demo.example', 'https://demo.example', True),
    ('127.0.0.1', ['demo.example'], 'localhost:8000', 'https://demo.example', True),      # a proxy that changes Host
    ('127.0.0.1', [], 'localhost:8000', 'https://demo.example', False),
    ('127.0.0.1', ['demo.example'], 'demo.example', 'https://evil.example', False),
    ('127.0.0.1', ['demo.example'], 'demo.example', 'https://demo.example.evil.example', False),
])
def test_who_may_steer(address, names, host, origin, may):
    headers = {'Host': host} | ({'Origin': origin} if origin else {})
    why = refusal(headers, address, names)
    assert not why if may else f'--host {address},' in why


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


def test_what_keeps_it_from_serving_is_said(tmp_path):
    live = ['stream.py', '--live', 'True']
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        wrong = run(*live, '--port', port, ok=False)
    assert 'in use' in wrong and f'--port {port}' in wrong
    assert '--port 99999' in run(*live, '--port', 99999, ok=False)
    assert '--host nowhere.invalid' in run(*live, '--host', 'nowhere.invalid', ok=False)
    old = tmp_path / 'websockets/sync/server.py'              # version 12, in what matters
    old.parent.mkdir(parents=True)
    old.write_text('class ServerConnection:\n    pass\n\n\ndef serve():\n    pass\n')
    (tmp_path / 'websockets/__init__.py').touch()
    assert 'websockets 13 or newer' in run(*live, ok=False, PYTHONPATH=str(tmp_path))
    old.unlink()                                              # version 10
    assert 'websockets 13 or newer' in run(*live, ok=False, PYTHONPATH=str(tmp_path))


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
    with pytest.raises(BadInput, match='walk.mp4: cannot be written'):
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

NODE = shutil.which('node') and os.path.exists(os.environ.get('CASES', '') + '/live-page-keys')


@pytest.mark.skipif(not NODE, reason='CASES does not name the folder of cases, or there is no node')
def test_the_page_in_a_stand_in_for_a_browser():
    script = os.environ['CASES'] + '/live-page-keys/input/page.js'
    lines = subprocess.run(['node', script, ROOT], capture_output=True, text=True, check=True).stdout.splitlines()
    said = dict(line.split(' | ', 1) for line in lines)
    letters = '"+w","-w","+a","-a","+s","-s","+d","-d"'
    assert letters in said['azerty, physical wasd'] and letters in said['cyrillic, physical wasd']
    for name in ('qwerty w', 'IME on', 'mac: w, Cmd, w released unseen, Cmd up', 'shift w, shift up first', 'blur'):
        assert '["+w","-w"]' in said[name], name
    assert 'wss://demo.example/walk' in said['https'] and 'error null' in said['https']
    assert 'ws://hub.example/user/me/proxy/8000/walk' in said['sub path']


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

    def key(self, key, down, code=''):
        self.call('Input.dispatchKeyEvent', type='keyDown' if down else 'keyUp', key=key, code=code)

    def lit(self):
        """The keys that the page shows as held."""
        return self.js("[...document.querySelectorAll('kbd.lit')].map(e => e.dataset.key).join('')")

    def hold(self, keys, frames=6):
        goal = self.js('walk.frames') + frames
        for k in keys:
            self.key(k, True)
        self.wait(f'walk.frames >= {goal}')
        lit = self.lit()
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
               '--remote-allow-origins=*', '--window-size=1000,960', '--disable-quic', '--no-first-run',
               '--disable-background-networking', '--disable-component-update', '--disable-sync',
               f'--user-data-dir={folder}', 'about:blank']
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
    """By how many 64ths of its width to the right picture b is picture a, in the middle rows; -20 to 20."""
    a, b = (x[::len(x) // 64, ::len(x) // 64][16:48].mean(-1) for x in (a, b))
    error = {s: np.abs(a[:, max(0, -s):64 - max(0, s)] - b[:, max(0, s):64 + min(0, s)]).mean() for s in range(-20, 21)}
    return min(error, key=error.get)


def test_turning_left_moves_the_picture_right(page):
    for key, sign in (('j', 1), ('ArrowLeft', 1), ('l', -1), ('ArrowRight', -1)):
        before = page.picture()
        assert page.hold([key], 5) == {'j': 'j', 'l': 'l', 'ArrowLeft': 'j', 'ArrowRight': 'l'}[key]
        assert shift(before, page.picture()) * sign > 2, key


def test_keys_count_by_their_place_and_are_let_go(page):
    for key, code in (('z', 'KeyW'), ('\u0446', 'KeyW'), ('Process', 'KeyW'), ('W', 'KeyW'), ('w', '')):
        page.key(key, True, code)
        assert page.lit() == 'w', key
        page.key('w', False, code)                          # shift, or the input method, was let go first
        assert page.lit() == '', key
    page.key('a', True, 'KeyQ')                             # left of W: no key of the walk
    assert page.lit() == ''
    for event in ("dispatchEvent(new Event('blur'))", "document.dispatchEvent(new Event('visibilitychange'))",
                  "dispatchEvent(new Event('contextmenu'))", "document.getElementById('prompt').focus()",
                  "dispatchEvent(new KeyboardEvent('keydown', {key: 'Meta', metaKey: true}))",
                  "dispatchEvent(new KeyboardEvent('keyup', {key: 'Meta'}))"):
        page.key('w', True, 'KeyW')
        assert page.lit() == 'w', event
        page.js(event)
        assert page.lit() == '', event
        page.js("document.activeElement.blur()")
        page.key('w', False, 'KeyW')


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


def test_only_stamps_of_this_page_count_as_latency(page):
    """A new tab first sees the newest picture of the tab before, whose clock is another."""
    page.js("latencies = []; draw({w: 1, h: 1, n: 2, stamp: 1, metres: 0, steps: 1, frame: 0}, new Uint8Array(3), 0)")
    assert page.js('latencies.length') == 0
    page.hold(['j'], 3)
    assert page.js('latencies.length') >= 1


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


def test_a_fresh_tab_after_a_frozen_one(port, chromium):
    frozen = Browser(chromium, f'http://127.0.0.1:{port}/')
    frozen.wait('window.walk && walk.frames > 0')
    frozen.key('j', True, 'KeyJ')
    frozen.wait('walk.frames > 5')
    frozen.call('Debugger.enable'), frozen.call('Debugger.pause')
    time.sleep(2)
    fresh = Browser(chromium, f'http://127.0.0.1:{port}/')
    fresh.wait('window.walk && walk.frames > 0')
    began = time.time()
    fresh.hold(['w'], 3)
    assert time.time() - began < 3 and 0 < float(fresh.js('walk.p50')) < 3000
    frozen.call('Debugger.resume')
    frozen.wait("document.getElementById('note').textContent.includes('another tab')")
    frozen.call('Page.close'), fresh.call('Page.close')


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
