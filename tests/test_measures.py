"""What is measured: each stage's evaluation, the pictures' measures, which checkpoint is kept, what a log says."""
import dataclasses
import glob
import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

import common
import distill_dmd
import distill_ode
import experiments.score
import finetune_camera
import train_ar
from backbones.layouts import flops
from camera import BadInput, relative
from common import Log, Run, load_tensors, save_model, save_tensors
from conftest import run
from data import Clips, Config, Dct, decode, encode, get_batch, lowpoly_clips, make, make_recipe, noise_for
from experiments import bench
from experiments.score import other_worlds, picture_scores, visible_scores
from model import DiT, ModelConfig
from stream import Config as Walk
from stream import sampler

ALONE = Run(rank=0, world=1, device=torch.device('cpu'), dtype=torch.float32, micro=4)
TINY = ModelConfig(dim=24, ffn_dim=32, num_heads=1, num_layers=1, shift=3.)
STAGES = {finetune_camera: 'sample_clip', train_ar: 'rollout_clip', distill_ode: 'rollout_clip',
          distill_dmd: 'rollout_clip'}


def db(a, b):
    return -10 * (a - b).square().mean((2, 3, 4)).log10().mean(0)


@pytest.mark.parametrize('module', STAGES)
def test_an_evaluation_compares_with_the_raw_truth_on_the_right_path_and_on_another(module, data, monkeypatch):
    """The model's place is taken by one that says the truth, encoded and decoded, if it is asked for the right path,
    and grey for any other."""
    clips, calls = Clips(data, 'val'), []
    batch = get_batch(clips, 0, 4, 5, TINY)
    monkeypatch.setattr(module, 'distance_to_teacher', lambda *args: {}, raising=False)

    def told(model, *args, **options):
        c2w = args[2].c2w if module is finetune_camera else args[0]
        times = next(x for x in args if torch.is_tensor(x) and x.ndim == 1)
        calls.append((c2w, times, options))
        right = torch.allclose(c2w, batch.camera.c2w, atol=1e-6)
        return batch.x0 if right else torch.zeros_like(batch.x0)
    monkeypatch.setattr(module, STAGES[module], told)
    cfg = module.Config(frames=5)
    if module is not finetune_camera:
        cfg.context = .15
    if module is distill_dmd:
        cfg.before = 0
    metrics = module.evaluate(DiT(TINY), cfg, clips, torch.device('cpu'))
    truth = clips.truth(4, 5)
    right, wrong = db(decode(batch.x0), truth), db(decode(torch.zeros_like(batch.x0)), truth)
    assert right[1] > wrong[1] + 3
    assert metrics['psnr@1'] == pytest.approx(right[1].item(), abs=1e-3)
    assert metrics['psnr@4'] == pytest.approx(right[4].item(), abs=1e-3)
    assert metrics['gap@4'] == pytest.approx((right - wrong)[4].item(), abs=1e-3)
    u = lambda steps: [3 * (1 - i / steps) / (1 + 2 * (1 - i / steps)) for i in range(steps + 1)]
    steps = {finetune_camera: [16], train_ar: [8], distill_ode: [4, 2, 1], distill_dmd: [4]}[module]
    assert len(calls) == 2 * len(steps)
    for i, n in enumerate(steps):
        for c2w, shift in zip((calls[2 * i][0], calls[2 * i + 1][0]), (0, 1)):
            torch.testing.assert_close(c2w, batch.camera.c2w[[(b + shift) % 4 for b in range(4)]], rtol=0, atol=1e-6)
        for _, times, options in calls[2 * i:2 * i + 2]:
            assert times.tolist() == pytest.approx(u(n))
            if module is not finetune_camera:                 # few-step models are not sampled by Euler
                assert options.get('renoise', False) == (module in (distill_ode, distill_dmd))
                assert options['context'] == .15 and options['window'] == 5
    if module is distill_dmd:
        later = [x[:, 1:].flatten(0, 1) for x in (decode(batch.x0), truth)]             # frame 0 is given
        assert metrics['sharpness'] == metrics['motion'] == 1
        assert metrics['fd'] == metrics['fd_floor'] == pytest.approx(distill_dmd.frechet(*later)) and metrics['fd'] > 0
        assert metrics['score'] == metrics['fd']


def test_a_long_evaluation_follows_the_truth_there_and_back(tmp_path, monkeypatch):
    clips = Clips(make(Config(out=str(tmp_path / 'd'), clips=1, val_clips=2, frames=7, height=16, width=16)), 'val')
    z = torch.stack([clips.read(i, ['latents'])[0] for i in range(2)]).float()
    path = [0, 1, 2, 3, 4, 5, 6, 5, 4, 3, 2, 1]
    monkeypatch.setattr(distill_dmd, 'rollout_clip', lambda model, c2w, *args, **options: z[:, path[:c2w.shape[1]]])
    cfg = distill_dmd.Config(frames=5, before=7)
    metrics = distill_dmd.evaluate(DiT(TINY), cfg, clips, torch.device('cpu'))
    last = db(decode(z[:, path]), clips.truth(2, 7)[:, path])[-1]
    assert metrics['psnr@11'] == pytest.approx(last.item(), abs=1e-3)


@pytest.mark.parametrize('stage, steps, few', [('ar', 8, False), ('camera', 8, False), ('ode', 4, True),
                                               ('ode-bidirectional', 4, True), ('cd', 2, True), ('dmd', 4, True),
                                               ('wan', 4, True), ('wan', 16, False)])
def test_each_kind_of_checkpoint_is_sampled_as_it_was_trained(stage, steps, few):
    header = {'stage': stage, 'frames': 9, 'context': .2}
    options = sampler(Walk(steps=steps), header, 3.)
    assert options['renoise'] == few and options['context'] == .2 and options['window'] == 9
    u = torch.linspace(1, 0, steps + 1)
    torch.testing.assert_close(options['times'], 3 * u / (1 + 2 * u))
    asked = dict(context=0., window=5, guidance=2., over='text')
    options = sampler(Walk(steps=steps, **asked), header, 3.)
    assert {name: options[name] for name in asked} == asked


def test_sharpness_and_motion_of_a_paler_and_slower_video():
    """Half the contrast has a quarter of the energy."""
    truth = torch.rand(2, 6, 16, 16, 3)
    lively = distill_dmd.liveliness(.5 * truth, truth)
    assert lively == pytest.approx({'sharpness': .25, 'motion': .25}, rel=1e-4)
    still = truth[:, :1].expand_as(truth)
    lively = distill_dmd.liveliness(still, truth)
    energy = distill_dmd.sharpness(truth)
    assert lively == pytest.approx({'sharpness': (energy[:, :1].mean() / energy[:, 1:].mean()).item(), 'motion': 0})
    scores = picture_scores(.5 * truth, truth, truth, truth)
    assert scores['sharpness'] == pytest.approx([.25] * 6, rel=1e-4)
    assert scores['motion'][0] is None and scores['motion'][1:] == pytest.approx([.25] * 5, rel=1e-4)
    step = torch.zeros(1, 1, 4, 4, 3)                         # one edge: 4 of the 12 differences across are 1
    step[..., 2:, :] = 1
    assert distill_dmd.sharpness(step).item() == pytest.approx(4 / 12)
    assert distill_dmd.motion(torch.cat([step, 0 * step], 1)).item() == pytest.approx(.5)


def test_seen_and_unseen_are_told_apart():
    truth = torch.rand(2, 3, 8, 8, 3) * .5
    visible = torch.zeros(2, 3, 8, 8, dtype=torch.bool)
    visible[..., :4] = True
    video = truth + torch.where(visible, .01, .1)[..., None]
    scores = visible_scores(video, truth, visible)
    assert scores['psnr_seen'] == pytest.approx([40] * 3, abs=.01)
    assert scores['psnr_unseen'] == pytest.approx([20] * 3, abs=.01)


@pytest.mark.parametrize('first', ['world', 'prompt'])
def test_a_score_compares_each_path_with_its_truth_and_with_the_next_clips(first, monkeypatch):
    """The model's place is taken by one that shows the truth, encoded and decoded, along the right path, else grey."""
    recipe = make_recipe(Config(clips=1, val_clips=4, frames=3, height=32, width=32))
    world, captions = lowpoly_clips(Config(**recipe), 1, range(4))
    truth, asked = world['frames'].float() / 255, []

    def told(model, cfg, header, codec, c2w, K, prompts, first, noise):
        asked.append((c2w, prompts, first))
        return decode(encode(truth)) if len(asked) == 1 else torch.full_like(truth, .5)
    monkeypatch.setattr(experiments.score, 'generate', told)
    cfg = experiments.score.Config(steps=1, first=first)
    header = {'stage': 'ar', 'frames': 3, 'data': {'recipe': recipe}}
    scores = experiments.score.score(DiT(TINY), cfg, header, Dct(), torch.device('cpu'), find_poses=False)
    for (c2w, prompts, latents), shift in zip(asked, (0, 1)):
        torch.testing.assert_close(c2w, relative(world['c2w'][[(i + shift) % 4 for i in range(4)]]), rtol=0, atol=1e-6)
        assert prompts == captions and (latents is None) == (first == 'prompt')
    if first == 'prompt':                                     # other worlds: no PSNR, and fd has a higher floor
        assert not [name for name in scores if 'psnr' in name] and scores['fd_floor'] > 10 * scores['fd_ceiling']
        assert 'other worlds' in scores['fd_compares']
        return
    assert scores['psnr'] == pytest.approx(db(decode(encode(truth)), truth).tolist(), abs=1e-3)
    assert scores['psnr_wrong_path'] == pytest.approx(db(torch.full_like(truth, .5), truth).tolist(), abs=1e-3)
    assert scores['fd'] == scores['fd_floor'] == scores['fd_ceiling'] > 0 and 'same paths' in scores['fd_compares']


def test_the_frechet_floor_of_other_worlds_is_far_above_that_of_the_same_paths():
    """Text to world is compared with other worlds of the same captions: even true renders are not close."""
    world, captions = lowpoly_clips(Config(frames=3), 1, range(24))
    truth = world['frames'].float() / 255
    others = other_worlds(world, world['c2w'], 64, 64)
    again, _ = lowpoly_clips(Config(frames=3), 1, range(24))
    same = distill_dmd.frechet(again['frames'].float().flatten(0, 1) / 255, truth.flatten(0, 1))
    assert others.shape == truth.shape and abs(same) < 1e-6 < .1 < distill_dmd.frechet(others.flatten(0, 1),
                                                                                      truth.flatten(0, 1))


def test_training_held_out_clips_and_walks_draw_from_streams_of_their_own(data):
    train, val = (get_batch(Clips(data, split), 0, 4, 5, TINY) for split in ('train', 'val'))
    for batch, stream in ((train, 11), (val, 10)):
        for j in range(4):
            r = np.random.default_rng([0, stream, j])
            if stream == 11:                                  # which clip, and where its window begins
                r.integers(12), r.integers(1)
            eps = r.standard_normal((5, 16, 4, 4), dtype=np.float32)
            assert torch.equal(batch.eps[j], torch.from_numpy(eps))
    assert not torch.isclose(train.draws.u, val.draws.u).all(1).any()
    short = get_batch(Clips(data, 'val'), 0, 4, 3, TINY)      # held-out clips come in order, each from its start
    assert torch.equal(short.x0, val.x0[:, :3])
    assert not torch.equal(train.x0, val.x0)
    one = Config(plans=1, frames=3)
    paths = [lowpoly_clips(one, split, range(4))[0]['c2w'] for split in (0, 1)]
    assert not torch.isclose(paths[0], paths[1]).all((1, 2, 3)).any()
    many = [set(lowpoly_clips(Config(plans=5, frames=1), split, range(9))[0]['plan'].tolist()) for split in (0, 1)]
    assert not many[0] & many[1]
    # numpy's seeds end in zeros that do not count: (0, 5) of an evaluation and (0, 5, 0) of a rollout are one
    a, b = (noise_for([seed], (2, 2), 'cpu', stream)(1) for seed, stream in (((0, 5), 9), ((0, 5, 0), 13)))
    assert not torch.isclose(a, b).any()


# ------------------------------------------------------------------------------------------------ which one is kept

def test_stage_3_keeps_the_best_and_reports_it_in_other_worlds(data, tmp_path, monkeypatch):
    """Scores of .5, .2, .9 (lower is better): the second is kept. It was chosen in one half of the held-out worlds;
    its metrics are of the other half."""
    monkeypatch.chdir(tmp_path)
    model, scores, judged, updates, averaged = DiT(TINY), iter([.5, .2, .9]), [], [], []
    for name, stage in (('ode', 'ode'), ('camera', 'camera')):
        save_model(f'{name}.safetensors', model.state_dict(), model.cfg, stage=stage, step=1)
    cfg = distill_dmd.Config(init='ode.safetensors', score='camera.safetensors', data=data, out=str(tmp_path), frames=5,
                             steps=3, eval_every=1, log_every=1, batch=4, before=0, critic=2, warmup=0)
    clips, held_out = Clips(data), Clips(data, 'val')

    def scored(evaluate, cfg, stage, run, model, ema, clips, log, step):
        judged.append(clips.captions)
        return {name: x + step for name, x in model.state_dict().items()}, {'score': next(scores)}
    monkeypatch.setattr(distill_dmd, 'score', scored)
    monkeypatch.setattr(distill_dmd, 'evaluate', lambda model, cfg, clips, *args: judged.append(clips.captions) or {
        'score': 7.})
    def stepped(net, optimizer, *args):
        (group,) = optimizer.param_groups
        assert {id(p) for p in group['params']} == {id(p) for p in net.parameters()}
        updates.append((net, group['lr']))
        return 0.
    monkeypatch.setattr(distill_dmd, 'step_on', stepped)
    monkeypatch.setattr(distill_dmd, 'update_ema', lambda ema, *args: averaged.append(args))
    nets = distill_dmd.start_nets(cfg, ALONE)
    distill_dmd.train(cfg, ALONE, nets, clips, held_out)
    tensors, header = load_tensors(f'{tmp_path}/dmd.safetensors')
    assert header['step'] == 2 and header['choice'] == {'score': .2} and header['metrics'] == {'score': 7.}
    torch.testing.assert_close(tensors['head.head.bias'], model.head.head.bias + 2)
    assert load_tensors(f'{tmp_path}/dmd.last.safetensors')[1]['step'] == 3
    assert judged == [held_out.captions[2:]] * 3 + [held_out.captions[:2]]
    # the critic goes first: while fake = real the generator has nothing to learn from
    generator = nets['generator']
    assert [net is generator for net, _ in updates] == [False, False] + 3 * [True, False, False]
    assert [lr for _, lr in updates[:3]] == [cfg.critic_lr, cfg.critic_lr, cfg.lr]
    assert [(net is generator, decay, step) for net, decay, step in averaged] == [(True, cfg.ema, i) for i in range(3)]


@pytest.mark.parametrize('stage', ['base', 'camera', 'ar', 'ode', 'cd', 'dmd'])
def test_the_average_is_saved_not_the_raw_weights(stage, chain):
    name = 'dmd.last' if stage == 'dmd' else stage
    saved, _ = load_tensors(f'{chain}/{name}.safetensors')
    resume, _ = load_tensors(f'{chain}/{stage}.resume.safetensors')
    raw = 'model.generator.' if stage == 'dmd' else 'model.'
    assert all(torch.equal(x, resume[f'ema.{k}']) for k, x in saved.items())
    assert any(not torch.equal(x, resume[raw + k]) for k, x in saved.items())


# ------------------------------------------------------------------------------------------------ logs, resumed runs

def test_a_log_goes_on_whatever_its_last_lines_are(tmp_path):
    path = str(tmp_path / 'a.jsonl')
    lines = [json.dumps({'step': step, 'lr': 1, 'loss': step}) for step in (1, 2, 3)]
    lines.insert(2, json.dumps({'step': 2, 'psnr@1': 9}))
    for broken in ('{"step": 2, "lr"', '\0\0\0\0', '[1]', '"step"', ''):
        open(path, 'w').write('\n'.join([*lines[:1], broken, *lines[1:]]) + '\n' + lines[0][:9])
        log = Log(path, ALONE, start=2, again=2)
        log.write('', step=3, loss=7)
        entries = [json.loads(line) for line in open(path)]
        assert [entry['loss'] for entry in entries] == [1, 2, 7]


def test_a_resumed_run_names_what_it_starts_from_if_that_has_changed(chain, data, tmp_path):
    """By its content: where it lies does not matter."""
    shutil.copytree(data, tmp_path / 'clips')
    shutil.copy(f'{chain}/camera.safetensors', tmp_path / 'camera.safetensors')
    args = lambda where: ['--data', where / 'clips', '--init', where / 'camera.safetensors', '--out', where / 'out',
                          '--frames', 5, '--batch', 4, '--steps', 2, '--sample_steps', 1, '--device', 'cpu']
    run('train_ar.py', *args(tmp_path))
    moved = tmp_path / 'moved'
    moved.mkdir()
    for name in ('clips', 'camera.safetensors', 'out'):
        shutil.move(tmp_path / name, moved / name)
    assert 'go on from' in run('train_ar.py', *args(moved))
    tensors, header = load_tensors(f'{chain}/camera.safetensors')
    tensors['head.head.bias'] += 1
    (moved / 'camera.safetensors').unlink()
    save_tensors(f'{moved}/camera.safetensors', tensors, header)
    assert 'another --init' in run('train_ar.py', *args(moved), ok=False)
    shutil.copy(f'{chain}/camera.safetensors', moved / 'camera.safetensors')
    manifest = json.loads((moved / 'clips/manifest.json').read_text())
    manifest['recipe']['seed'] = 1
    (moved / 'clips/manifest.json').write_text(json.dumps(manifest))
    assert 'other clips' in run('train_ar.py', *args(moved), ok=False)


# ------------------------------------------------------------------------------------------------ files

@pytest.mark.parametrize('mask, mode', [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_permissions_that_the_user_wants(mask, mode, tmp_path):
    before = os.umask(mask)
    try:
        save_tensors(f'{tmp_path}/a/b.safetensors', {'x': torch.zeros(1)}, {})
        folder = make(Config(out=f'{tmp_path}/d', clips=1, val_clips=1, frames=2, height=16, width=16))
    finally:
        os.umask(before)
    files = [f'{tmp_path}/a/b.safetensors', *glob.glob(f'{folder}/*')]
    assert {os.stat(path).st_mode & 0o777 for path in files} == {mode}
    assert os.stat(folder).st_mode & 0o777 == 0o777 & ~mask


@pytest.mark.parametrize('error', [OSError(28, 'No space left on device'), SafetensorError('I/O error: disk full')])
def test_a_full_disk_is_one_sentence_and_the_older_file_stays(error, tmp_path, monkeypatch):
    path = f'{tmp_path}/a.safetensors'
    save_tensors(path, {'x': torch.zeros(1)}, {})

    def full(tensors, path, meta):
        open(path, 'wb').write(b'half')
        raise error
    monkeypatch.setattr(common, 'save_file', full)
    with pytest.raises(BadInput, match='a.safetensors: cannot be written'):
        save_tensors(path, {'x': torch.ones(1)}, {})
    assert os.listdir(tmp_path) == ['a.safetensors'] and not load_tensors(path)[0]['x'].any()


@pytest.mark.parametrize('chunk', [1, 4])
def test_the_floor_of_a_timing_counts_the_passes_that_a_walk_makes(chunk, monkeypatch):
    """Each frame goes through the network at every step and once more, clean."""
    model = DiT(dataclasses.replace(TINY, chunk=chunk)).eval()
    recipe, passed, counted = make_recipe(Config(clips=1, val_clips=4, frames=3, height=16, width=16)), [], []
    model.register_forward_hook(lambda m, args, kw, v: passed.append(args[0].shape[1]), with_kwargs=True)
    monkeypatch.setattr(bench, 'floor_seconds', lambda flop, *args: counted.append(flop) or 1.)
    header = {'stage': 'dmd', 'frames': 400, 'data': {'recipe': recipe}}
    cfg = bench.Config(steps=4, frames=200)
    bench.bench(model, cfg, header, Dct(), torch.device('cpu'))
    passes = sum(passed) / 200
    assert passes == pytest.approx(5, abs=.15)                # not 4.25
    assert counted[0] == pytest.approx(passes * flops(model.cfg, chunk, 1, 300) / chunk, rel=.04)
