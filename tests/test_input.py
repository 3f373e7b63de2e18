"""What users bring that no script expects: each gets one sentence and exit code 1, and what was there stays."""
import argparse
import gc
import importlib
import json
import math
import os
import shutil
import sys
from dataclasses import dataclass

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import SMALL, dmd_args, run
from safetensors.torch import load_file, save_file

from camera import BadInput, parse_keys
from common import (Log, Run, check_limits, command_line, load_model, load_resume, load_tensors, make_optimizers,
                    save_model, save_resume, save_tensors, written_whole)
from data import Clips, get_batch, load_manifest, path_metrics
from model import PRESETS, DiT
from stream import load_picture, write_video
from worlds.poses import read_poses, minwm_keys


@pytest.mark.parametrize('script, flag, value, most', [
    ('stream', 'steps', 1001, 1000), ('stream', 'window', 2 ** 70, 10 ** 7),
    ('stream', 'guidance', 1e30, 1000), ('stream', 'fps', 2 ** 70, 1000),
    ('stream', 'clip', 2 ** 70, 10 ** 7), ('train_ar', 'sample_steps', 10 ** 9, 1000),
    ('train_ar', 'steps', 10 ** 10, 10 ** 7), ('distill_ode', 'pairs', 2 ** 70, 10 ** 7),
    ('distill_dmd', 'before', 2 ** 70, 10 ** 7), ('data', 'plans', 2 ** 70, 10 ** 7),
    ('experiments.bench', 'steps', 10 ** 9, 1000)])
def test_numbers_without_end(script, flag, value, most):
    cfg = importlib.import_module(script).Config(**{flag: value})
    with pytest.raises(BadInput, match=f'^--{flag} .*: at most {most}$'):
        check_limits(cfg)


@pytest.mark.parametrize('script, args, words', [
    ('data.py', ['--height', 0], 'at least 1'), ('data.py', ['--width', 0], 'at least 1'),
    ('train_ar.py', ['--out', __file__], 'cannot write into the folder'),
    ('stream.py', ['--out', f'{__file__}/walk.gif'], 'cannot write into the folder'),
    ('data.py', ['--out', __file__], 'is there, and no folder of clips'),
    ('data.py', ['--out', os.path.dirname(__file__)], 'is there, and no folder of clips'),
    ('stream.py', ['--over', 'keys'], 'error: --over keys: choose camera or text'),
    ('finetune_camera.py', ['--camera', 'none', '--init', 'base.safetensors', '--data', '{data}'], 'leave out --init'),
    ('experiments.score', ['--paths', 1, '--frames', 2], 'two held-out paths')])
def test_flags_that_cannot_be_meant(script, args, words, data, chain, tmp_path):
    args = [data if arg == '{data}' else arg for arg in args]
    if script == 'experiments.score':
        args += ['--ckpt', f'{chain}/ar.safetensors', '--out', tmp_path / 'score.json']
    if script == 'finetune_camera.py':
        args += ['--out', tmp_path]
    assert words in run(script, *args, ok=False)


def test_errors_of_memory_and_of_text_are_a_sentence_and_faults_of_ours_are_not(monkeypatch, tmp_path):
    @dataclass
    class Config:
        out: str = ''

    def raising(error):
        def main(cfg):
            raise error
        return main

    monkeypatch.setattr(sys, 'argv', ['x.py'])
    for error in (RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError(),
                  RuntimeError('A process in the process pool was terminated abruptly')):
        with pytest.raises(SystemExit, match='error: out of memory: ask for less'):
            command_line(raising(error), Config, '')
    with pytest.raises(RuntimeError, match='ours'):
        command_line(raising(RuntimeError('ours')), Config, '')
    (tmp_path / 'args').write_bytes(b'\xe8\xff')
    monkeypatch.setattr(sys, 'argv', ['x.py', f'@{tmp_path}/args'])
    with pytest.raises(SystemExit, match='^error: .utf-8. codec'):
        command_line(raising(BadInput()), Config, '')


def test_what_cannot_be_written_leaves_the_old_and_nothing_else(tmp_path):
    (tmp_path / 'a').write_text('old')
    for error in (OSError('No space left on device\nmuch more'), KeyboardInterrupt()):
        with pytest.raises((BadInput, KeyboardInterrupt)):
            with written_whole(f'{tmp_path}/a', '.png') as tmp:
                open(tmp, 'w').close()
                raise error
    (tmp_path / 'folder').mkdir()
    with pytest.raises(BadInput, match='folder: cannot be written .[^(]*Is a directory'):
        save_tensors(f'{tmp_path}/folder', {}, {})
    assert sorted(os.listdir(tmp_path)) == ['a', 'folder'] and (tmp_path / 'a').read_text() == 'old'


def change_header(source, path, change):
    header = load_tensors(source)[1]
    change(header)
    save_file(load_file(source), path, {'meta': json.dumps(header)})


@pytest.mark.parametrize('change, words', [
    (lambda h: h.update(data=None), 'it does not say what clips'),
    (lambda h: h.update(data={'recipe': {}}), 'it does not say what clips'),
    (lambda h: h['data']['recipe'].update(height='x'), 'it does not say what clips'),
    (lambda h: h['data']['recipe'].update(colour='red'), 'another version of this code'),
    (lambda h: h['model'].update(novel=1), 'settings are damaged, or of another version of this code')])
def test_headers_that_say_what_cannot_be(change, words, chain, tmp_path):
    change_header(f'{chain}/ar.safetensors', tmp_path / 'x.safetensors', change)
    assert words in run('stream.py', '--ckpt', tmp_path / 'x.safetensors', '--keys', 'w', '--steps', 1, ok=False,
                        cwd=tmp_path)


@pytest.mark.parametrize('settings', [
    dict(num_heads=7), dict(num_heads=True), dict(chunk=0), dict(dim=10 ** 9), dict(dim='x'), dict(dim=96.0),
    dict(sink=1), dict(eviction='other'), dict(eps='a'), dict(eps=-1.), dict(shift=math.nan),
    dict(num_layers=10 ** 4), dict(text_len=None), dict(camera=3), dict(patch=[2])])
def test_settings_that_no_network_has(settings, chain, tmp_path):
    change_header(f'{chain}/ar.safetensors', tmp_path / 'x.safetensors', lambda h: h['model'].update(settings))
    with pytest.raises(BadInput, match='settings are damaged'):
        load_model(str(tmp_path / 'x.safetensors'))


@pytest.mark.parametrize('wrong', [
    dict(frames='x'), dict(stage=5), dict(step=None), dict(metrics=[]), dict(context='a')])
def test_headers_of_other_types(wrong, chain, tmp_path):
    change_header(f'{chain}/ar.safetensors', tmp_path / 'x.safetensors', lambda h: h.update(wrong))
    with pytest.raises(BadInput, match=f'its header is damaged .{next(iter(wrong))}.: make the checkpoint again'):
        load_model(str(tmp_path / 'x.safetensors'))


def change_tensors(path, change):
    """Rewrite a file of save_tensors, after change(tensors, header)."""
    tensors, header = load_tensors(path)
    tensors = {name: x.clone() for name, x in tensors.items()}
    change(tensors, header)
    save_tensors(path, tensors, header)


@pytest.mark.parametrize('change', [
    lambda t, h: t.pop('opt0.0.exp_avg'), lambda t, h: t.pop('opt1.0.momentum_buffer'),
    lambda t, h: t.pop('opt0.1.step'), lambda t, h: t.update({'opt0.0.step': torch.ones(2)}),
    lambda t, h: t.update({'opt1.0.momentum_buffer': torch.ones(3)}),
    lambda t, h: h.update(step='x'), lambda t, h: h.update(step=None), lambda t, h: h.update(config=3),
    lambda t, h: [t.pop(name) for name in list(t) if name.startswith('opt')]])
def test_resume_files_that_lack_something(change, tmp_path):
    model = DiT(PRESETS['tiny'])
    optimizers = make_optimizers(model, 1e-3, True, (.9, .99), torch.float32)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for optimizer in optimizers:
        optimizer.step()
    run = Run(0, 1, torch.device('cpu'), torch.float32, 1)
    path, ema = f'{tmp_path}/x.resume.safetensors', {}
    save_resume(path, model, ema, optimizers, 3, {'lr': 1})
    assert load_resume(path, model, ema, optimizers, {'lr': 1}, run) == 3
    change_tensors(path, change)
    with pytest.raises(BadInput, match='x.resume.safetensors: damaged, or not what a run leaves'):
        load_resume(path, model, ema, optimizers, {'lr': 1}, run)


@pytest.mark.parametrize('change, words', [
    (lambda t: t.pop('frames'), 'missing or corrupt shard .*frames'),
    (lambda t: t.update(frames=t['frames'][:, :, :-1]), 'missing or corrupt shard .shapes'),
    (lambda t: t.update(latents=t['latents'][..., :-1], frames=t['frames'][:, :, :, :-8]),
     'missing or corrupt shard .shapes'),
    (lambda t: t['c2w'][0].fill_(math.nan), 'the val clips hold what is no number, in clip 0'),
    (lambda t: t['latents'][0, 0].fill_(math.inf), 'the val clips hold what is no number, in clip 0')])
def test_held_out_clips_that_were_changed_by_hand(change, words, data, tmp_path):
    folder = shutil.copytree(data, tmp_path / 'clips')
    first = load_manifest(folder)['shards'][-1]['file']
    change_tensors(f'{folder}/{first}', lambda tensors, header: change(tensors))
    with pytest.raises(BadInput, match=words):
        clips = Clips(str(folder), 'val')
        get_batch(clips, 0, len(clips), 3, PRESETS['tiny'])


def test_poses_in_double_precision_are_read(data, tmp_path):
    folder = shutil.copytree(data, tmp_path / 'clips')
    for shard in load_manifest(folder)['shards']:
        change_tensors(f'{folder}/{shard["file"]}', lambda t, h: t.update(c2w=t['c2w'].double(), K=t['K'].double()))
    ours, theirs = (get_batch(Clips(str(path)), 0, 2, 3, PRESETS['tiny']).camera for path in (data, folder))
    assert torch.equal(ours.c2w, theirs.c2w) and torch.equal(ours.K, theirs.K) and torch.equal(ours.move, theirs.move)


def test_a_film_on_a_full_disk_is_one_sentence(tmp_path, capfd):
    if not os.path.exists('/dev/full'):
        pytest.skip('/dev/full is of Linux')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, 'getpid', lambda: 'x')
        os.symlink('/dev/full', tmp_path / 'walk.gif.tmpx.gif')
        with pytest.raises(BadInput, match='walk.gif: cannot be written .*No space left'):
            write_video(f'{tmp_path}/walk.gif', [np.zeros((64, 64, 3), np.uint8)] * 2, 8)
    gc.collect()
    assert capfd.readouterr().err == ''


def test_weights_that_are_no_numbers_make_no_film(chain, tmp_path):
    model, header = load_model(f'{chain}/ar.safetensors')
    state = {name: torch.full_like(x, torch.nan) for name, x in model.state_dict().items()}
    save_model(str(tmp_path / 'x.safetensors'), state, model.cfg, **{k: v for k, v in header.items() if k != 'model'})
    message = run('stream.py', '--ckpt', tmp_path / 'x.safetensors', '--keys', 'w', '--steps', 1, '--out',
                  tmp_path / 'walk.gif', ok=False)
    assert 'no numbers' in message and not (tmp_path / 'walk.gif').exists()


def test_clips_where_weights_belong_and_pairs_where_clips_belong(data, chain, tmp_path):
    with pytest.raises(BadInput, match='a folder of clips, not of weights'):
        load_model(data)
    change_header(f'{chain}/ar.safetensors', tmp_path / 'x.safetensors', lambda h: h.pop('data'))
    assert 'no folder of clips' in run('stream.py', '--ckpt', tmp_path / 'x.safetensors', '--data',
                                       f'{chain}/pairs-causal', '--keys', 'w', ok=False, cwd=tmp_path)


def test_a_camera_that_was_learned_is_not_exchanged_without_a_word(data, chain, tmp_path):
    args = ['--init', f'{chain}/camera.safetensors', '--data', data, '--out', tmp_path, '--steps', 1, *SMALL]
    assert 'has learned plucker already' in run('finetune_camera.py', '--camera', 'prope', *args, ok=False)


@pytest.mark.parametrize('change', [
    lambda m: [1], lambda m: {'shards': m['shards']}, lambda m: {'recipe': m['recipe']}, lambda m: m | {'recipe': None},
    lambda m: m | {'shards': None}, lambda m: m | {'shards': ['a']}, lambda m: m | {'shards': [{'name': 'a'}]},
    lambda m: m | {'shards': [{'file': m['shards'][0]['file']}]}])
def test_manifests_that_are_none(change, data, tmp_path):
    shutil.copytree(data, tmp_path / 'd')
    (tmp_path / 'd' / 'manifest.json').write_text(json.dumps(change(load_manifest(data))))
    with pytest.raises(BadInput, match='no clips there|corrupt shard'):
        Clips(str(tmp_path / 'd'))


@pytest.mark.parametrize('split, change', [
    ('train', lambda t: t.update(latents=t['latents'][:, :, :4])), ('train', lambda t: t.pop('K')),
    ('train', lambda t: t.update(c2w=t['c2w'][:, :2])),
    ('train', lambda t: t.update(c2w=t['c2w'][:, :, :3]))])
def test_shards_of_other_shapes(split, change, data, tmp_path):
    shutil.copytree(data, tmp_path / 'd')
    path = tmp_path / 'd' / f'{split}_000000.safetensors'
    tensors = load_file(path)
    _, header = load_tensors(path)
    change(tensors)
    save_tensors(str(path), tensors, header)
    with pytest.raises(BadInput, match=f'{split}_000000.safetensors: missing or corrupt shard'):
        Clips(str(tmp_path / 'd'), split)


def test_one_clip_has_no_other_path():
    video = torch.rand(2, 3, 8, 8, 3)
    assert 'gap@2' in path_metrics(video, video, video) and 'gap@2' not in path_metrics(*3 * [video[:1]])


def test_stage_3_keeps_a_checkpoint_or_says_why_not(data, chain, tmp_path):
    args = [*dmd_args(data, chain), '--out', tmp_path, '--before', 0, '--critic', 1]
    for more in (['--steps', 0], ['--steps', 1, '--lr', 1e30]):
        assert 'gave a score, so no checkpoint is kept' in run('distill_dmd.py', *args, *more, ok=False)


@pytest.mark.parametrize('other', ['model', 'header', 'cut'])
def test_a_resume_file_of_another_kind(other, data, chain, tmp_path):
    file = tmp_path / 'ar.resume.safetensors'
    shutil.copy(f'{chain}/ar.{"" if other == "model" else "resume."}safetensors', file)
    if other == 'header':
        change_header(f'{chain}/ar.resume.safetensors', file, lambda h: h.pop('step'))
    if other == 'cut':
        os.truncate(file, 1000)
    args = ['--data', data, '--init', f'{chain}/camera.safetensors', '--out', tmp_path, '--steps', 4, '--eval_every', 2]
    before = file.read_bytes()
    assert 'delete it to start over' in run('train_ar.py', *args, *SMALL, ok=False)
    assert file.read_bytes() == before and os.listdir(tmp_path) == ['ar.resume.safetensors']


def test_rubbish_in_a_log_is_dropped_and_the_rest_is_kept(tmp_path):
    good = '{"step": 2, "lr": 1}'
    rubbish = ['\0', '[1, 2]', '"x"', '{"step": "x"}', '{"step": null}', '{"step": 1e999}', '[' * 100_000, '']
    (tmp_path / 'a.jsonl').write_text('\n'.join([*rubbish, good, *rubbish]))
    Log(str(tmp_path / 'a.jsonl'), argparse.Namespace(rank=0), 4)
    assert (tmp_path / 'a.jsonl').read_text() == f'{good}\n'


def test_walks_to_files_of_unusual_names(chain, tmp_path):
    for name, prompt in ('A.MP4', '\udcff'), ('B.GIF', '\U0001f642 ' * 999), ('ein Weg \u65e5 \udcff.gif', ' '):
        run('stream.py', '--ckpt', f'{chain}/ar.safetensors', '--keys', 'w', '--steps', 1, '--prompt', prompt,
            '--out', tmp_path / name)
        assert len(iio.imread(tmp_path / name, extension=name[-4:].lower(), index=None)) == 2
    assert len(os.listdir(tmp_path)) == 3


def test_pictures_of_16_bits_and_damaged_ones(tmp_path):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    iio.imwrite(tmp_path / 'deep.png', ramp)
    picture = load_picture(tmp_path / 'deep.png', 64, 64)[0, ..., 0].numpy()
    assert np.abs(picture - ramp / 257.).max() <= 1
    whole = (tmp_path / 'deep.png').read_bytes()
    (tmp_path / 'deep.png').write_bytes(whole[:30] + b'\xff' * 20 + whole[50:])
    with pytest.raises(BadInput, match='not a readable picture'):
        load_picture(tmp_path / 'deep.png', 64, 64)


def test_poses_and_keys_without_end(tmp_path):
    far = np.tile(np.eye(4), (3, 1, 1))
    far[1, 0, 3] = 1e200
    (tmp_path / 'far.json').write_text(json.dumps(far.tolist()))
    with pytest.raises(BadInput, match='pose 1 is not'):
        read_poses(str(tmp_path / 'far.json'))
    with pytest.raises(BadInput, match='gone.json: cannot be read .No such file'):
        read_poses(str(tmp_path / 'gone.json'))
    with pytest.raises(BadInput, match='its pose_str: keys: group 1'):
        minwm_keys('a', 'w-999999999')
    with pytest.raises(BadInput, match='group 5001') as e:
        parse_keys('w,' * 5000 + 'x*3')
    assert len(str(e.value)) < 400


def test_a_walk_along_poses_of_other_axes_says_so(chain, tmp_path):
    c2w = np.tile(np.diag([1., -1, -1, 1]), (3, 1, 1))
    c2w[:, 2, 3] = .1, .2, .3                                 # forward, in OpenGL's axes: away from -z
    (tmp_path / 'poses.json').write_text(json.dumps(c2w.tolist()))
    text = run('stream.py', '--ckpt', f'{chain}/ar.safetensors', '--poses', tmp_path / 'poses.json', '--steps', 1,
               '--out', tmp_path / 'walk.gif')
    assert 'poses.json: the camera moves mostly backward' in text
