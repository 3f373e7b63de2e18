"""Every script, as a user runs it: the chain, resume, two processes, walks, scores, timings, bad input."""
import json
import os
import random
import shutil
import subprocess
import sys
import time

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from conftest import FLAGS, ROOT, SMALL, dmd_args, finish, run, start
from camera import keys_to_poses
from common import load_model, load_tensors, save_model


def logged(key, out, stage='ar'):
    """[(step, value)] of the log lines that hold this key."""
    return [(line['step'], line[key]) for line in map(json.loads, open(f'{out}/{stage}.jsonl')) if key in line]


def losses(out, stage='ar'):
    return [loss for _, loss in logged('loss', out, stage)]


def test_chain_leaves_checkpoints_logs_and_strips(chain):
    for stage in ('base', 'camera', 'ar', 'ode', 'cd', 'dmd'):
        tensors, meta = load_tensors(f'{chain}/{stage}.safetensors')
        assert meta['stage'] == stage and meta['step'] in ((2, 4) if stage == 'dmd' else (4,))
        assert meta['data']['recipe']['world'] == 'lowpoly' and meta['model']['first_chunk'] == 1
        assert ('camera_embedding.weight' in tensors) == (stage != 'base')
        assert meta['context'] == {'ar': .1, 'ode': .1, 'cd': .1, 'dmd': .2}.get(stage, 0)  # noise of its own history
        assert len(losses(chain, stage)) == 4
        score = 'val_loss' if stage == 'base' else 'psnr@1'    # against steps, the last that of the checkpoint
        assert [step for step, _ in logged(score, chain, stage)] == [2, 4]
        metrics = meta['choice'] if stage == 'dmd' else meta['metrics']
        assert dict(logged(score, chain, stage))[meta['step']] == metrics[score]
    assert load_tensors(f'{chain}/dmd.last.safetensors')[1]['step'] == 4
    for stage in ('base', 'camera', 'ar', 'ode', 'cd', 'dmd'):
        clips = 2 if stage == 'dmd' else 4                     # stage 3 reports one half of the held-out worlds
        assert iio.imread(f'{chain}/{stage}.png').shape == (clips * 2 * 32 * 2, 5 * 32 * 2, 3)
    assert not [f for f in os.listdir(chain) if '.tmp' in f]


def test_a_student_of_the_bidirectional_teacher_for_comparison(data, chain, tmp_path):
    """As experiments/why_causal.py makes it: by the loop of stage 2, with other pairs and another loss."""
    from distill_ode import Config
    from experiments.why_causal import train_on_bidirectional
    cfg = Config(init=f'{chain}/ar.safetensors', data=data, out=str(tmp_path), frames=5, steps=4, batch=4, log_every=1,
                 device='cpu', dtype='float32', teacher_steps=8, pairs=6, context_noise=0., context=0.)
    train_on_bidirectional(cfg, f'{chain}/camera.safetensors')
    tensors, meta = load_tensors(f'{tmp_path}/ode-bidirectional.safetensors')
    assert meta['stage'] == 'ode-bidirectional' and meta['step'] == 4 and meta['context'] == 0
    assert 'camera_embedding.weight' in tensors and len(losses(tmp_path, 'ode-bidirectional')) == 4
    assert load_tensors(f'{tmp_path}/pairs-bidirectional/train_000000.safetensors')[0]['states'].shape[:3] == (6, 5, 5)


def kill_during(script, stage, args, out):
    """Start a training and SIGKILL it at a random step, a few log lines on from where it stands."""
    log, state = out / f'{stage}.jsonl', out / f'{stage}.resume.safetensors'
    lines = lambda: len(log.read_text().splitlines()) if log.exists() else 0
    (p,), logs = start(script, *args, cwd=out.parent)
    goal, began = lines() + random.randint(1, 3), time.time()
    while not (lines() >= goal and state.exists()) and p.is_alive() and time.time() - began < 60:
        time.sleep(.02)
    assert p.is_alive(), 'it ended before it could be killed'
    p.kill()
    p.join()


@pytest.mark.parametrize('script, stage, dtype', [('train_ar.py', 'ar', 'bfloat16'),
                                                  ('finetune_camera.py', 'camera', 'float32')])
def test_killed_and_restarted_ends_in_the_same_weights(script, stage, dtype, data, chain, tmp_path):
    init = {'camera': 'base', 'ar': 'camera'}[stage]
    args = ['--data', data, '--init', f'{chain}/{init}.safetensors', '--steps', 60, *SMALL, '--dtype', dtype,
            '--save_every', 1]
    run(script, *args, '--out', tmp_path / 'whole')
    for _ in range(2):
        kill_during(script, stage, [*args, '--out', tmp_path / 'killed'], tmp_path / 'killed')
    assert 'go on from' in run(script, *args, '--out', tmp_path / 'killed')
    for name in (f'{stage}.safetensors', f'{stage}.resume.safetensors'):
        a, b = (load_tensors(f'{tmp_path}/{d}/{name}')[0] for d in ('whole', 'killed'))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert losses(f'{tmp_path}/killed', stage) == losses(f'{tmp_path}/whole', stage)
    message = run(script, *args, '--out', tmp_path / 'killed', '--lr', .1, ok=False)
    assert 'lr 0.008, not 0.1' in message


@pytest.mark.parametrize('method', ['ode', 'cd', 'dmd'])
def test_distillation_killed_and_restarted_ends_in_the_same_weights(method, data, chain, tmp_path):
    if method == 'dmd':
        script, args = 'distill_dmd.py', dmd_args(data, chain)
    else:
        script, args = 'distill_ode.py', ['--method', method, '--data', data, '--init', f'{chain}/ar.safetensors',
                                          '--teacher_steps', 8, '--pairs', 6, *FLAGS]
    args += ['--steps', 12 if method == 'dmd' else 60, '--save_every', 1]
    run(script, *args, '--out', tmp_path / 'whole')
    kill_during(script, method, [*args, '--out', tmp_path / 'killed'], tmp_path / 'killed')
    assert 'go on from' in run(script, *args, '--out', tmp_path / 'killed')
    for name in (f'{method}.safetensors', f'{method}.resume.safetensors'):
        a, b = (load_tensors(f'{tmp_path}/{d}/{name}')[0] for d in ('whole', 'killed'))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert losses(tmp_path / 'killed', method) == losses(tmp_path / 'whole', method)


def test_dmd_on_two_processes_equals_one(data, chain, tmp_path):
    args = [*dmd_args(data, chain), '--dtype', 'float32']
    run('distill_dmd.py', *args, '--out', tmp_path / 'one')
    run('distill_dmd.py', *args, '--out', tmp_path / 'two', torchrun=2)
    run('distill_dmd.py', *args, '--out', tmp_path / 'fsdp', '--shard', 'fsdp', '--offload', True, '--checkpoint', True,
        torchrun=2)
    for name in ('dmd.last', 'dmd.resume'):
        a, b, c = (load_tensors(f'{tmp_path}/{d}/{name}.safetensors')[0] for d in ('one', 'two', 'fsdp'))
        assert a.keys() == b.keys() == c.keys()
        assert max((a[k] - x[k]).abs().max() for x in (b, c) for k in a) < 1e-4


def test_two_processes_and_accumulation_equal_one(data, chain, tmp_path):
    args = ['--data', data, '--init', f'{chain}/camera.safetensors', '--steps', 20, *SMALL, '--dtype', 'float32']
    run('train_ar.py', *args, '--out', tmp_path / 'one')
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    real = subprocess.run([*torchrun, 'train_ar.py', *map(str, args), '--out', tmp_path / 'two'], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | {'OMP_NUM_THREADS': '1'})
    assert real.returncode == 0, real.stderr[-3000:]
    run('train_ar.py', *args, '--out', tmp_path / 'accum', '--accum', 2)
    one, two, accum = (losses(tmp_path / d) for d in ('one', 'two', 'accum'))
    assert len(one) == 20 and max(abs(a - b) for a, b in zip(one, two)) < 1e-4
    assert max(abs(a - b) for a, b in zip(one, accum)) < 1e-4
    a, b = (load_tensors(f'{tmp_path}/{d}/ar.safetensors')[0] for d in ('one', 'two'))
    assert max((a[k] - b[k]).abs().max() for k in a) < 1e-5


def test_two_processes_equal_one_on_the_model_s_own_rollouts(data, chain, tmp_path):
    args = ['--data', data, '--init', f'{chain}/camera.safetensors', '--steps', 10, *SMALL, '--dtype', 'float32',
            '--sink', True, '--drift', .8]
    run('train_ar.py', *args, '--out', tmp_path / 'one')
    run('train_ar.py', *args, '--out', tmp_path / 'two', torchrun=2)
    one, two = (losses(tmp_path / d) for d in ('one', 'two'))
    assert len(one) == 10 and max(abs(a - b) for a, b in zip(one, two)) < 1e-4


@pytest.mark.parametrize('script, stage', [('finetune_camera.py', 'camera'), ('train_ar.py', 'ar'),
                                           ('distill_ode.py', 'ode'), ('distill_ode.py', 'cd')])
def test_fsdp_equals_one_process_and_goes_on_from_its_state(script, stage, data, chain, tmp_path):
    """Weights split over two processes, activations computed again: the same losses and weights as one process; and the
    state that either leaves, of whole tensors, is the same, so that a run may go on with another number of processes.
    """
    init = {'camera': 'base', 'ar': 'camera', 'ode': 'ar', 'cd': 'ar'}[stage]
    args = ['--data', data, '--init', f'{chain}/{init}.safetensors', '--steps', 40, '--dtype', 'float32',
            '--muon', False]
    args += [*FLAGS, '--teacher_steps', 8, '--pairs', 6, '--method', stage] if stage in ('ode', 'cd') else SMALL
    args += ['--out', 'out']                     # each in another folder
    for name in ('one', 'two', 'all', 'alone'):
        (tmp_path / name / 'out').mkdir(parents=True)
    run(script, *args, cwd=tmp_path / 'one')
    if stage == 'ar':                            # saved on two processes: goes on on one, and on two
        ps, logs = start(script, *args, '--shard', 'fsdp', '--save_every', 4, torchrun=2, cwd=tmp_path / 'all')
        while not (tmp_path / 'all/out/ar.resume.safetensors').exists() and ps[0].is_alive():
            time.sleep(.02)
        for to in ('alone', 'two'):
            for name in ('ar.resume.safetensors', 'ar.jsonl'):
                shutil.copy(tmp_path / 'all/out' / name, tmp_path / to / 'out')
            assert load_tensors(f'{tmp_path}/{to}/out/ar.resume.safetensors')[1]['step'] < 40
        finish(ps, logs)
        assert 'go on from' in run(script, *args, cwd=tmp_path / 'alone')
    else:
        kill_during(script, stage, [*args, '--save_every', 1], tmp_path / 'two/out')
        run(script, *args, '--shard', 'fsdp', torchrun=2, cwd=tmp_path / 'all')
    text = run(script, *args, '--shard', 'fsdp', '--checkpoint', True, torchrun=2, cwd=tmp_path / 'two')
    assert 'go on from' in text
    for other in ('two', 'all', 'alone') if stage == 'ar' else ('two', 'all'):
        both = zip(losses(tmp_path / 'one/out', stage), losses(tmp_path / other / 'out', stage), strict=True)
        assert max(abs(a - b) for a, b in both) < 1e-4
        for name in (f'{stage}.safetensors', f'{stage}.resume.safetensors'):
            a, b = (load_tensors(f'{tmp_path}/{d}/out/{name}')[0] for d in ('one', other))
            assert a.keys() == b.keys() and max((a[k] - b[k]).abs().max() for k in a) < 1e-4


def test_prope_from_a_base_model_to_a_walk_beyond_its_window(data, chain, tmp_path):
    more = ['--data', data, '--steps', 2, '--out', tmp_path, *SMALL]
    run('finetune_camera.py', '--init', f'{chain}/base.safetensors', '--camera', 'prope', *more)
    run('train_ar.py', '--init', tmp_path / 'camera.safetensors', *more)
    run('stream.py', '--ckpt', tmp_path / 'ar.safetensors', '--keys', 'w*8,wl*4', '--steps', 2,
        '--out', tmp_path / 'walk.mp4')
    assert iio.imread(tmp_path / 'walk.mp4').shape[0] == 13
    state, header = load_tensors(tmp_path / 'ar.safetensors')
    assert header['model']['camera'] == 'prope' and state['blocks.0.self_attn.prope_o.weight'].abs().max() > 0
    from backbones.layouts import save_wan
    save_wan(str(tmp_path / 'wan'), load_model(f'{chain}/base.safetensors')[0])
    assert 'does not say what clips' in run('stream.py', '--ckpt', tmp_path / 'wan', ok=False)


def test_chunks_of_four(data, chain, tmp_path):
    run('train_ar.py', '--data', data, '--init', f'{chain}/camera.safetensors', '--out', tmp_path, '--steps', 2,
        '--chunk', 4, *SMALL)
    out = tmp_path / 'walk.gif'
    run('stream.py', '--ckpt', tmp_path / 'ar.safetensors', '--keys', 'w*8', '--steps', 2, '--out', out)
    assert iio.imread(out, index=None).shape[0] == 9


@pytest.mark.parametrize('first', ['world', 'prompt', 'picture'])
def test_walk(first, chain, tmp_path):
    if first == 'picture':
        first = tmp_path / 'drawing.png'
        iio.imwrite(first, np.random.default_rng(0).integers(0, 255, (50, 90, 3), dtype=np.uint8))
    out = tmp_path / 'walk.mp4'
    run('stream.py', '--ckpt', f'{chain}/ar.safetensors', '--keys', 'w*3,wl*6,dn*1', '--steps', 2, '--first', first,
        '--out', out, '--truth', first == 'world')
    assert iio.imread(out).shape == (11, 384, 768 if first == 'world' else 384, 3)


def test_poses_instead_of_keys_walk_the_same(chain, tmp_path):
    poses = keys_to_poses('w*2,l*2').tolist()
    (tmp_path / 'ours.json').write_text(json.dumps(poses))
    theirs = {str(i): {'extrinsic': p, 'K': None} for i, p in enumerate(poses)}
    (tmp_path / 'minwm.json').write_text(json.dumps(theirs))
    for name, args in (('keys', ['--keys', 'w*2,l*2']), ('ours', ['--poses', tmp_path / 'ours.json']),
                       ('minwm', ['--poses', tmp_path / 'minwm.json'])):
        run('stream.py', '--ckpt', f'{chain}/ar.safetensors', '--steps', 2, '--out', tmp_path / f'{name}.gif', *args)
    videos = {(tmp_path / f'{name}.gif').read_bytes() for name in ('keys', 'ours', 'minwm')}
    assert len(videos) == 1


def test_score_and_bench_write_every_key(chain, tmp_path):
    run('experiments.score', '--ckpt', f'{chain}/ar.safetensors', '--out', tmp_path / 's.json', '--steps', 2)
    s = json.load(open(tmp_path / 's.json'))
    for k in ('psnr psnr_se psnr_seen psnr_ceiling psnr_copy psnr_wrong_path rot_err_deg rot_err_deg_seen trans_err_m '
              'sharpness motion').split():
        assert len(s[k]) == 5, k
    assert {'drift_db_per_frame', 'fd', 'fd_features', 'n_paths', 'n_dropped', 'steps', 'world', 'plans', 'ckpt',
            'seed'} <= s.keys()
    assert s['n_paths'] == 4 and s['psnr'][0] == pytest.approx(s['psnr_ceiling'][0], abs=1e-3)
    run('experiments.bench', '--ckpt', f'{chain}/ar.safetensors', '--out', tmp_path / 'b.json', '--steps', 1,
        '--frames', 240)
    b = json.load(open(tmp_path / 'b.json'))
    assert {'fps', 'fps_denoiser', 'latency_ms_p50', 'latency_ms_p95', 'latency_growth', 'first_frame_s', 'peak_mb',
            'floor_ratio', 'device', 'dtype', 'height', 'width', 'steps', 'chunk'} <= b.keys()
    assert b['fps'] <= b['fps_denoiser'] and b['latency_ms_p50'] <= b['latency_ms_p95'] and b['floor_ratio'] > 1


@pytest.mark.parametrize('args, words', [
    (['--keys', 'w*3,x*2'], 'group 2'), (['--ckpt', 'nowhere.safetensors'], 'no such file'),
    (['--steps', -1], 'at least 0'), (['--clip', -1], 'at least 0'),
    (['--live', 'True', '--port', 80000], 'port must be'),
    (['--first', 'nowhere.png'], 'not a readable picture'), (['--out', 'walk.avi'], 'end it in .mp4 or .gif'),
    (['--poses', __file__], 'not a list of 4x4'), (['--window', 1], 'too small'),
    (['--device', 'abacus'], 'choose auto'),
    (['--out', '/proc/nowhere/walk.mp4'], '/proc/nowhere'),
    (['--guidance', 2, '--over', 'keys'], 'choose camera or text')])
def test_stream_says_what_is_wrong(args, words, chain):
    assert words in run('stream.py', '--ckpt', f'{chain}/ar.safetensors', '--steps', 1, *args, ok=False)


def test_score_says_what_is_wrong(chain):
    args = ['--ckpt', f'{chain}/ar.safetensors', '--steps', 1, '--frames', 1]
    assert 'at least 2' in run('experiments.score', *args, ok=False)


def test_a_distilled_model_walks_in_few_steps(chain, tmp_path):
    for steps, said in ((0, 4), (2, 2), (1, 1)):
        text = run('stream.py', '--ckpt', f'{chain}/dmd.safetensors', '--keys', 'w*3', '--first', 'prompt',
                   '--steps', steps, '--out', tmp_path / 'walk.gif')
        assert f'{said} steps a frame' in text


@pytest.mark.parametrize('script, args, words', [
    ('distill_ode.py', ['--method', 'magic'], 'choose ode or cd'),
    ('distill_ode.py', ['--student_steps', 0], '--student_steps 0: at least 1'),
    ('distill_ode.py', ['--pairs', 0], '--pairs 0: at least 1'),
    ('distill_dmd.py', ['--before', -1], '--before -1: at least 0'),
    ('distill_ode.py', ['--init', 'nowhere'], 'nowhere: no such file: run train_ar.py first'),
    ('distill_dmd.py', ['--init', 'nowhere'], 'generator needs it'),
    ('distill_dmd.py', ['--score', 'nowhere'], 'real score needs it'),
    ('distill_dmd.py', ['--frames', 3, '--init', '{chunk}'], '3 frames do not divide')])
def test_distillation_says_what_is_wrong(script, args, words, data, chain, tmp_path):
    start = ['--init', f'{chain}/ode.safetensors', '--data', data, '--out', tmp_path]
    if script == 'distill_dmd.py':
        start += ['--score', f'{chain}/camera.safetensors']
    if '{chunk}' in args:
        model, header = load_model(f'{chain}/ode.safetensors')
        model.cfg.chunk = 4
        args = [*args[:-1], f'{tmp_path}/chunk.safetensors']
        save_model(args[-1], model.state_dict(), model.cfg, stage='ode', step=1)
    assert words in run(script, *start, *args, ok=False)


@pytest.mark.parametrize('args, words', [
    (['--chunk', 3], '5 frames do not divide'),
    (['--batch', 3, '--accum', 2], 'does not divide by 1 processes x --accum 2'),
    (['--preset', 'huge', '--init', 'none'], 'choose one of tiny, nano'),
    (['--init', 'camera.safetensors'], 'camera.safetensors: no such file'), (['--frames', 99], 'frames'),
    (['--out', '/proc/nowhere'], '/proc/nowhere'), (['--eval_every', 0], '--eval_every 0: at least 1'),
    (['--frames', 1], 'at least 2'), (['--lr', -1], '--lr -1.0: at least'), (['--lr', 'nan'], '--lr nan: at least'),
    (['--clip', 0], '--clip 0.0: at least'), (['--seed', 2 ** 70], 'at most 4294967296'),
    (['--seed', -1], 'at least 0'),
    (['--drift', 1.5], 'at most 1'), (['--context_noise', -.1], 'at least 0'), (['--device', 'mps'], 'float64')])
def test_training_says_what_is_wrong(args, words, data, chain, tmp_path):
    start = ['--data', data, '--init', f'{chain}/camera.safetensors', '--out', tmp_path, '--steps', 1, *SMALL]
    assert words in run('train_ar.py', *start, *args, ok=False)


def test_a_loss_that_is_no_number_stops_the_run_and_leaves_no_file(data, chain, tmp_path):
    message = run('train_ar.py', '--data', data, '--init', f'{chain}/camera.safetensors', '--out', tmp_path,
                  '--steps', 9, '--lr', 1e30, *SMALL, ok=False)
    assert 'the gradient of this step is' in message and os.listdir(tmp_path) == ['ar.jsonl']


def test_damaged_files_are_named_and_earlier_output_survives(data, chain, tmp_path):
    copy = str(tmp_path / 'clips')
    shutil.copytree(data, copy)
    shard = next(f for f in sorted(os.listdir(copy)) if f.startswith('train'))
    out = tmp_path / 'out'
    args = ['--data', copy, '--init', f'{chain}/camera.safetensors', '--out', out, '--steps', 1, *SMALL]
    run('train_ar.py', *args)
    before = (out / 'ar.safetensors').read_bytes()
    os.remove(out / 'ar.resume.safetensors')
    for damage in (b'', open(f'{copy}/{shard}', 'rb').read()[:1000]):
        open(f'{copy}/{shard}', 'wb').write(damage)
        assert shard in run('train_ar.py', *args, ok=False)
    torch.save({'a': torch.zeros(1)}, tmp_path / 'evil.safetensors')
    evil = ['--data', data, '--init', tmp_path / 'evil.safetensors', '--out', out, '--steps', 1, *SMALL]
    assert 'pickle' in run('train_ar.py', *evil, ok=False)
    assert (out / 'ar.safetensors').read_bytes() == before


def test_a_missing_package_is_named(tmp_path):
    (tmp_path / 'vizdoom.py').write_text('raise ImportError')
    message = run('data.py', '--world', 'doom', '--out', tmp_path / 'doom', '--clips', 1, ok=False,
                  PYTHONPATH=str(tmp_path))
    assert 'pip install vizdoom' in message and not os.path.exists(tmp_path / 'doom')


def test_data_script_leaves_clips_and_a_sheet(tmp_path):
    from data import Config
    small = Config(out=str(tmp_path / 'd'), plans=2, clips=2, val_clips=2, frames=5, height=32, width=32)
    text = run('data.py', *sum(([f'--{k}', v] for k, v in vars(small).items()), []))
    assert 'sheet.png' in text and iio.imread(tmp_path / 'd' / 'sheet.png').ndim == 3
