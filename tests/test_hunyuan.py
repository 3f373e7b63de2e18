"""HunyuanVideo-1.5's network: against diffusers' own, naive loops, and uncached passes."""
import dataclasses
import math

import imageio.v3 as iio
import pytest
import torch

from backbones.hunyuan import PRESETS, HunyuanCache, MMDiT
from backbones.hunyuan_layouts import hunyuan_config, hunyuan_names
import test_cache
from camera import Camera, intrinsics, keys_to_poses
from common import load_model, load_tensors
from conftest import FLAGS, SMALL, dmd_args, run
from test_stages import losses

TINY = dataclasses.replace(PRESETS['hy-tiny'], text_dim=48, text_len=14, image_len=4, image_dim=16, glyph_len=3,
                           glyph_dim=24)


def tiny_model(seed=0, **settings):
    """A model none of whose weights is zero."""
    torch.manual_seed(seed)
    model = dataclasses.replace(TINY, **settings).build().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -.5 if p.ndim > 1 else .3)
    return model


def prompt(cfg, words=(4, 6), letters=(2, 0), image=(True, False)):
    """Rows of zeros are no tokens."""
    text = torch.zeros(len(words), cfg.text_len, cfg.text_dim)
    for row, n, m, picture in zip(text, words, letters, image):
        if picture:
            row[:cfg.image_len, :cfg.image_dim] = torch.randn(cfg.image_len, cfg.image_dim)
        row[cfg.image_len:cfg.image_len + m, :cfg.glyph_dim] = torch.randn(m, cfg.glyph_dim)
        start = cfg.image_len + cfg.glyph_len
        row[start:start + n] = torch.randn(n, cfg.text_dim)
    return text


@pytest.mark.parametrize('picture', [True, False])
def test_it_equals_diffusers(picture, monkeypatch):
    diffusers = pytest.importorskip('diffusers')
    theirs = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=33, out_channels=16, num_attention_heads=2, attention_head_dim=32, num_layers=2, mlp_ratio=2.,
        num_refiner_layers=2, patch_size=1, text_embed_dim=48, text_embed_2_dim=24, image_embed_dim=16,
        rope_axes_dim=(4, 14, 14))
    torch.manual_seed(0)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -.5 if p.ndim > 1 else .3)
    state = {name: x.clone for name, x in theirs.state_dict().items()}
    state = hunyuan_names(state)
    cfg = hunyuan_config('it', state, dict(text_len=14, image_len=4, glyph_len=3), (4, 4))
    assert cfg == dataclasses.replace(TINY, patch=1, camera='none', chunk=4, first_chunk=4, shift=5., eviction='frames')
    ours = cfg.build()
    ours.load_state_dict({name: read() for name, read in state.items()})

    B, F, H, W = 2, 3, 4, 5
    x, picture0, text = torch.randn(B, F, 16, H, W), torch.randn(B, 16, H, W), prompt(cfg, image=(picture, picture))
    t = torch.tensor([.3, .8])
    given = torch.zeros(B, F, 17, H, W)
    given[:, 0, :16], given[:, 0, 16] = picture0, 1
    start = cfg.image_len + cfg.glyph_len
    with torch.no_grad():
        want = theirs(
            torch.cat([x, given], 2).transpose(1, 2), 1000 * t, text[:, start:], text[:, start:].any(-1),
            encoder_hidden_states_2=text[:, 4:start, :24], encoder_attention_mask_2=text[:, 4:start].any(-1),
            image_embeds=text[:, :4, :16]).sample.transpose(1, 2)
        # diffusers' words have the video's time, and frame 0 is noisy although its picture is given
        monkeypatch.setattr(type(ours), 'words_time', lambda self, t: t[:, :1])
        monkeypatch.setattr(type(ours), 'frames_in', lambda self, x, t, pos: torch.cat([x, given], 2))
        got = ours(x, t[:, None].expand(B, F), text)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

# -----------------------------------------------------------------------------
# the cache: the tests of tests/test_cache.py, with this network

@pytest.fixture
def walks(monkeypatch):
    """tests/test_cache.py, its network replaced and one of its two prompts shorter."""
    scene = test_cache.scene

    def shorter(frames, H, W):
        c2w, K, text, noise = scene(frames, H, W)
        text[0, 2:] = 0
        return c2w, K, text, noise

    def network(camera='prope', given=True, **settings):
        model = tiny_model(text_dim=8, text_len=4, image_len=0, glyph_len=0, camera=camera, **settings)
        if not given:                              # a reference that has copies of frame 0 in other places
            model.patch_embedding.weight.data[:, 16:] = 0
            for block in model.blocks:             # frames find words by their own place, and the copies have others
                block.txt_attn_k_norm.weight.data.zero_()
        return model

    monkeypatch.setattr(test_cache, 'scene', shorter)
    monkeypatch.setattr(test_cache, 'tiny_model', network)
    return test_cache


@pytest.mark.parametrize('chunk, first, frames', [(1, 1, 5), (4, 1, 9), (4, 4, 8)])
@pytest.mark.parametrize('given, camera', [(True, 'prope+action'), (False, 'prope+action'), (True, 'plucker+action')])
def test_cached_rollout_equals_one_teacher_forced_forward(chunk, first, frames, given, camera, walks):
    """With PRoPE and actions, whose reference lacks a cache of its own for PRoPE."""
    walks.test_cached_rollout_equals_one_teacher_forced_forward(chunk, first, frames, 4, 4, given, camera)


@pytest.mark.parametrize('chunk, window, frames', [(1, 6, 16), (4, 9, 21)])
def test_after_a_window_is_encoded_again_nothing_is_stale(chunk, window, frames, walks, monkeypatch):
    network = walks.tiny_model
    monkeypatch.setattr(walks, 'tiny_model', lambda **settings: network('plucker', given=False, **settings))
    walks.test_after_a_window_is_encoded_again_nothing_is_stale(chunk, window, frames)


@pytest.mark.parametrize('camera, sink', [('prope+action', False), ('plucker+prope+action', True)])
@pytest.mark.parametrize('chunk, window, frames', [(1, 4, 11), (2, 7, 17)])
def test_a_rolling_cache_equals_a_forward_under_a_sliding_mask(chunk, window, frames, camera, sink, walks, monkeypatch):
    network = walks.tiny_model
    monkeypatch.setattr(walks, 'tiny_model', lambda **settings: network(given=False, **settings))
    walks.test_a_rolling_cache_equals_one_forward_under_a_sliding_mask(chunk, window, frames, camera, sink)


def test_frames_stay_as_near_to_the_words_as_in_training():
    """A walk that has rolled on by five frames gives, from there, what it would give at the start."""
    model = tiny_model(camera='none')
    text, x = prompt(TINY), torch.randn(2, 3, 16, 4, 4)
    outs = []
    for gone in (0, 5):
        cache = HunyuanCache(model.cfg, 2, 3, 4, 'cpu')
        cache.gone = gone
        t = torch.full((2, 3), .1)
        with torch.no_grad():
            model(x[:, :2], t[:, :2], text, cache=cache)
            cache.end = 2
            outs.append(model(x[:, 2:], 5 * t[:, 2:], text, cache=cache))
    torch.testing.assert_close(*outs, rtol=0, atol=1e-5)


def test_another_prompt_in_the_middle_of_a_walk():
    """From then on frames see its words, as a cache of these words alone would have them, and the frames before."""
    model = tiny_model(camera='prope+action')
    first, second = prompt(TINY), prompt(TINY)
    x, t = torch.randn(2, 3, 16, 4, 4), torch.tensor([[.1, .1, .6]] * 2)
    c2w = keys_to_poses('wl*3')[:3].expand(2, -1, -1, -1)
    camera = Camera(c2w, intrinsics(90, 1).expand(2, 3, 4))
    with torch.no_grad():
        walk, fresh = (HunyuanCache(model.cfg, 2, 4, 4, 'cpu') for _ in range(2))
        model(x[:, :2], t[:, :2], first, camera.frames(slice(2)), cache=walk)
        model(x[:, :2], t[:, :2], second, camera.frames(slice(2)), cache=fresh)
        walk.end = 2
        before = model(x[:, 2:], t[:, 2:], second, camera.frames([2]), cache=walk)        # without saying so
        walk.forget_words()
        after = model(x[:, 2:], t[:, 2:], second, camera.frames([2]), cache=walk)
        for a, b in zip(walk.text, fresh.text):
            assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
        fresh.kv, fresh.end = walk.kv, 2
        assert torch.equal(after, model(x[:, 2:], t[:, 2:], second, camera.frames([2]), cache=fresh))
    assert (before - after).abs().max() > .01

# -----------------------------------------------------------------------------
# the recipe

@pytest.fixture(scope='module')
def hunyuan_chain(data, tmp_path_factory):
    """All stages, four steps each, by the same commands."""
    out = tmp_path_factory.mktemp('hunyuan')
    args = ['--data', data, '--out', out, '--steps', 4, *SMALL]
    run('finetune_camera.py', '--camera', 'none', '--preset', 'hy-tiny', *args)
    run('finetune_camera.py', '--camera', 'plucker+prope+action', '--init', f'{out}/base.safetensors', '--sink', True,
        *args)
    run('train_ar.py', '--init', f'{out}/camera.safetensors', *args)
    few = ['--data', data, '--out', out, '--steps', 4, *FLAGS, '--init', f'{out}/ar.safetensors', '--teacher_steps', 8,
           '--pairs', 6, '--guidance', 1.3]
    run('distill_ode.py', *few)
    run('distill_ode.py', '--method', 'cd', *few)
    run('distill_dmd.py', *dmd_args(data, out), '--out', out)
    return out


def test_all_stages_train_it_and_it_walks(hunyuan_chain):
    for stage in ('base', 'camera', 'ar', 'ode', 'cd', 'dmd'):
        model, header = load_model(f'{hunyuan_chain}/{stage}.safetensors')
        assert isinstance(model, MMDiT) and all(math.isfinite(x) for x in header['metrics'].values())
        assert len(losses(hunyuan_chain, stage)) == 4
    before, after = (load_model(f'{hunyuan_chain}/{stage}.safetensors')[0].state_dict() for stage in ('ar', 'dmd'))
    still = [name for name, x in before.items() if name.endswith('weight') and torch.equal(x, after[name])]
    assert all('double_blocks.1.txt_' in name or 'cond_type' in name for name in still), still    # nobody sees them
    for name, args in (('ar', ['--guidance', 1.5, '--over', 'text']), ('dmd', ['--window', 3])):
        run('stream.py', '--ckpt', f'{hunyuan_chain}/{name}.safetensors', '--keys', 'w*3,wl*6', '--out',
            hunyuan_chain / 'walk.gif', *args)
        assert len(iio.imread(hunyuan_chain / 'walk.gif')) == 10
    words = run('backbones.layouts', hunyuan_chain / 'dmd.safetensors')
    assert 'preset hy-tiny' in words and 'a streamed chunk in 4 steps' in words


def test_two_processes_equal_one(hunyuan_chain, data, tmp_path):
    args = ['--data', data, '--init', f'{hunyuan_chain}/camera.safetensors', '--steps', 10, *SMALL,
            '--dtype', 'float32']
    run('train_ar.py', *args, '--out', tmp_path / 'one')
    run('train_ar.py', *args, '--out', tmp_path / 'two', torchrun=2)
    run('train_ar.py', *args, '--out', tmp_path / 'fsdp', '--shard', 'fsdp', '--muon', False, torchrun=2)
    one, two, fsdp = (losses(tmp_path / d) for d in ('one', 'two', 'fsdp'))
    assert len(one) == 10 and max(abs(a - b) for a, b in zip(one, two)) < 1e-4 and abs(one[0] - fsdp[0]) < 1e-5
    args = [*dmd_args(data, hunyuan_chain), '--dtype', 'float32']
    run('distill_dmd.py', *args, '--out', tmp_path / 'one')
    run('distill_dmd.py', *args, '--out', tmp_path / 'two', torchrun=2)
    run('distill_dmd.py', *args, '--out', tmp_path / 'fsdp', '--shard', 'fsdp', '--checkpoint', True, torchrun=2)
    a, b, c = (load_tensors(f'{tmp_path}/{d}/dmd.resume.safetensors')[0] for d in ('one', 'two', 'fsdp'))
    for k in a:
        assert (a[k] - b[k]).abs().max() < 1e-4 and (a[k] - c[k]).abs().max() < 1e-4, k
