"""HunyuanVideo-1.5's network: against diffusers' own, naive loops, and uncached passes."""
import dataclasses
import glob
import json
import math
import os
from types import SimpleNamespace

import imageio.v3 as iio
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from backbones.flex import flex_joint_mask
from backbones.hunyuan import PRESETS, HunyuanCache, MMDiT
from backbones.hunyuan_layouts import hunyuan_config, hunyuan_names
from backbones.hunyuan_words import attend
from backbones.layouts import flops, forced_flops
from backbones.worldplay import action_labels
import test_cache
from camera import BadInput, Camera, intrinsics, keys_to_poses, moves
from common import load_model
from conftest import FLAGS, SMALL, dmd_args, run
from model import causal_mask, chunk_ids, mask_rows, teacher_forced, teacher_forcing_mask
from test_split import processes_equal_one
from test_stages import losses

TINY = dataclasses.replace(PRESETS['hy-tiny'], text_dim=48, text_len=14, image_len=4, image_dim=16, glyph_len=3,
                           glyph_dim=24)

DIFFUSERS = dict(in_channels=33, out_channels=16, num_attention_heads=2, attention_head_dim=32, num_layers=2,
                 num_refiner_layers=2, mlp_ratio=2., patch_size=1, text_embed_dim=48, text_embed_2_dim=24,
                 image_embed_dim=16, rope_axes_dim=(4, 14, 14))


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
    theirs = diffusers.HunyuanVideo15Transformer3DModel(**DIFFUSERS)
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

def test_attention_of_words_and_frames_by_hand():
    """Each query with the keys that it may see; row by row as on a CPU, and by flex_attention as on a GPU."""
    L, mask = 4, teacher_forcing_mask(chunk_ids(3, 1))
    valid = torch.tensor([[True] * 5, [True, True, False, False, False]])
    q = torch.randn(2, 6 * L, 2, 32)
    k, v = (torch.randn(2, 5 + 6 * L, 2, 32) for _ in range(2))
    rows = mask_rows(mask)
    with torch.no_grad():
        results = [attend(q, k, v, valid, rows), attend(q, k, v, valid, flex_joint_mask(valid, rows, L))]
    results.append(attend(*(x.clone().requires_grad_() for x in (q, k, v)), valid, rows).detach())
    for row, n in enumerate((5, 2)):
        for query in range(6):
            keys = [*range(n), *(5 + L * frame + i for frame in range(6) if mask[query, frame] for i in range(L))]
            here = slice(query * L, query * L + L)
            scores = torch.einsum('qnd,knd->nqk', q[row, here], k[row, keys]) / 32 ** .5
            by_hand = torch.einsum('nqk,knd->qnd', scores.softmax(-1), v[row, keys])
            for got in results:
                torch.testing.assert_close(got[row, here], by_hand, rtol=0, atol=1e-5)


@pytest.mark.parametrize('camera', ['none', 'prope+action'])
def test_training_on_a_gpu_takes_another_path_to_the_same(camera, monkeypatch):
    """Teacher forcing with flex_attention, of one clip and of two, against the loop of the CPU."""
    model = tiny_model(camera=camera)
    x, t, text = torch.randn(2, 3, 16, 4, 4), torch.rand(2, 3), prompt(TINY)
    c2w = keys_to_poses('wl*3')[:3].expand(2, -1, -1, -1)
    batch = SimpleNamespace(x0=x, text=text, camera=Camera(c2w, intrinsics(90, 1).expand(2, 3, 4)))
    with torch.no_grad():
        want = teacher_forced(model, model.cfg, batch, x.flip(1), t)
        monkeypatch.setattr(MMDiT, 'frames_see', lambda self, valid, mask, cache, L: (
            None if mask is None or mask.all() else flex_joint_mask(valid, mask_rows(mask), L)))
        torch.testing.assert_close(teacher_forced(model, model.cfg, batch, x.flip(1), t), want, rtol=0, atol=1e-5)
        for i in range(2):
            one = SimpleNamespace(x0=x[[i]], text=text[[i]], camera=Camera(c2w[[i]], batch.camera.K[[i]]))
            alone = teacher_forced(model, model.cfg, one, x.flip(1)[[i]], t[[i]])
            torch.testing.assert_close(alone, want[[i]], rtol=0, atol=1e-5)

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


def test_minwms_walks(walks, monkeypatch):
    """Which lose frame by frame; in training they commit in a call of its own."""
    walks.test_training_walks_as_minwm_does()
    network = walks.tiny_model
    monkeypatch.setattr(walks, 'tiny_model', lambda **settings: network(given=False, **settings))
    for camera in ('prope', 'plucker'):
        walks.test_minwms_walk_equals_one_forward_under_its_sliding_mask(4, 4, 12, 24, camera == 'plucker', camera)


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

def test_actions_are_the_keys_that_were_held():
    """Right is 3 and left is 4, also where HunyuanVideo's inference has them swapped; i looks up."""
    keys = {'w': 9, 's': 18, 'd': 27, 'a': 36, 'wd': 45, 'wa': 54, 'sd': 63, 'sa': 72,
            'l': 1, 'j': 2, 'i': 3, 'k': 4, 'li': 5, 'lk': 6, 'ji': 7, 'jk': 8, 'wl': 10, 'sajk': 80}
    c2w = keys_to_poses(','.join(keys))[None]
    assert action_labels(moves(c2w))[0].tolist() == [0, *keys.values()]


def test_actions_change_the_video_and_can_be_dropped():
    model = tiny_model(camera='action')
    x, t, text = torch.randn(2, 3, 16, 4, 4), torch.rand(2, 3), prompt(TINY)
    c2w = torch.stack([keys_to_poses(keys) for keys in ('w*2', 'wl*2')])
    camera = Camera(c2w, intrinsics(90, 1).expand(2, 3, 4), torch.tensor([True, False]))
    with torch.no_grad():
        with_actions, without = model(x, t, text, camera), model(x, t, text)
    assert torch.equal(with_actions[1], without[1]) and (with_actions[0] - without[0]).abs().max() > .1


def test_a_dropped_camera_is_none():
    model = tiny_model(camera='plucker+prope+action')
    x, t, text = torch.randn(2, 3, 16, 4, 4), torch.rand(2, 3), prompt(TINY)
    c2w = torch.stack([keys_to_poses(keys) for keys in ('w*2', 'wl*2')])
    off = Camera(c2w, intrinsics(90, 1).expand(2, 3, 4), torch.zeros(2, dtype=torch.bool))
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, text, off), model(x, t, text), rtol=0, atol=1e-5)


def test_frame_0_is_given_if_it_is_clean_and_no_other():
    model = tiny_model()
    x = torch.randn(2, 3, 16, 4, 4)
    t = torch.tensor([[0, 0, .4], [.2, 0, 0]])
    channels = model.frames_in(x, t, [0, 1, 2])
    assert torch.equal(channels[:, :, :16], x) and torch.equal(channels[0, 0, 16:32], x[0, 0])
    assert channels[:, :, 32].amax((2, 3)).tolist() == [[1, 0, 0], [0, 0, 0]] and channels[0, 0, 32].min() == 1
    assert not channels[0, 1:, 16:].any() and not channels[1, :, 16:].any()
    assert not model.frames_in(x, t, [4, 5, 6])[:, :, 16:].any()


def test_the_empty_prompt_is_one_word():
    """Alone or in a batch, whole or causal; it differs from another prompt."""
    model = tiny_model(camera='none')
    x, t, text = torch.randn(2, 3, 16, 4, 4), torch.rand(2, 3), prompt(TINY)
    text[1] = 0
    for mask in (None, causal_mask(chunk_ids(3, 1))):
        with torch.no_grad():
            both = model(x, t, text, mask=mask)
            alone = model(x[1:], t[1:], text[1:], mask=mask)
            other = model(x[1:], t[1:], text[:1], mask=mask)
        torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-5)
        assert (alone - other).abs().max() > .1


def test_a_gradient_on_top_of_a_cache_that_goes_on():
    """With --checkpoint the blocks compute again when the walk has long written to the cache's places."""
    x, text = torch.randn(2, 4, 16, 4, 4), prompt(TINY)
    grads = []
    for again in (False, True):
        model = tiny_model(camera='none')
        model.checkpoint = again
        cache = HunyuanCache(model.cfg, 2, 4, 4, 'cpu')
        with torch.no_grad():
            model(x[:, :2], torch.zeros(2, 2), text, cache=cache)
            cache.end = 2
        loss = model(x[:, 2:3], torch.full((2, 1), .5), text, cache=cache).square().mean()
        with torch.no_grad():
            cache.kv.mul_(.5)
        loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

# -----------------------------------------------------------------------------
# files

@pytest.mark.parametrize('camera', ['none', 'prope', 'prope+action'])
def test_files_of_hunyuanvideo_worldplay_and_minwm(camera, tmp_path):
    """checkpoint-N/transformer, as the trainings of minWM and HY-WorldPlay leave it; its tensors tell the cameras."""
    model = tiny_model(camera=camera, patch=1, chunk=4, first_chunk=4, shift=5., eviction='frames')
    folder = tmp_path / 'checkpoint-6000' / 'transformer'
    os.makedirs(folder)
    save_file(model.state_dict(), folder / 'diffusion_pytorch_model.safetensors')
    sizes = dict(text_len=14, image_len=4, glyph_len=3, _class_name='HunyuanVideo_1_5_DiffusionTransformer')
    (folder / 'config.json').write_text(json.dumps(sizes))
    for path in (folder, folder.parent, folder / 'diffusion_pytorch_model.safetensors'):
        loaded, header = load_model(str(path))
        assert loaded.cfg == model.cfg and header['stage'] == 'wan'
        assert all(torch.equal(x, model.state_dict()[name]) for name, x in loaded.state_dict().items())
    assert f'camera {camera}' in run('backbones.layouts', folder)


def test_files_of_diffusers(tmp_path):
    """A whole repository, in shards; halves and parts that it keeps in another order."""
    diffusers = pytest.importorskip('diffusers')
    theirs = diffusers.HunyuanVideo15Transformer3DModel(**DIFFUSERS)
    theirs.save_pretrained(tmp_path / 'transformer', max_shard_size='1MB')
    assert len(glob.glob(f'{tmp_path}/transformer/*.safetensors')) > 3
    model, _ = load_model(str(tmp_path))
    assert model.cfg.text_len == 729 + 256 + 1000 and model.cfg.num_heads == 2
    state = hunyuan_names({name: x.clone for name, x in theirs.state_dict().items()})
    assert all(torch.equal(x, state[name]()) for name, x in model.state_dict().items())


def test_a_pt_of_minwm_and_what_does_not_fit(tmp_path):
    model = tiny_model(camera='prope', patch=1, chunk=4, first_chunk=4, shift=5., eviction='frames')
    state = {f'model._fsdp_wrapped_module.{name}': x for name, x in model.state_dict().items()}
    (tmp_path / 'config.json').write_text(json.dumps(dict(text_len=14, image_len=4, glyph_len=3)))
    torch.save({'generator_ema': state}, tmp_path / 'model.pt')
    loaded, _ = load_model(str(tmp_path / 'model.pt'))
    assert loaded.cfg == model.cfg
    lost = dict(model.state_dict())
    del lost['double_blocks.1.txt_mlp.fc2.bias']
    save_file(lost, tmp_path / 'lost.safetensors')
    with pytest.raises(BadInput, match='double_blocks.1.txt_mlp.fc2.bias'):
        load_model(str(tmp_path / 'lost.safetensors'))
    lost['img_in.proj.weight'] = lost['img_in.proj.weight'][:, :16].contiguous()
    save_file(lost, tmp_path / 'channels.safetensors')
    with pytest.raises(BadInput, match='takes 16 channels, no noisy latent, given one and mask'):
        load_model(str(tmp_path / 'channels.safetensors'))


def test_its_size_is_hunyuanvideos():
    """The counts of the real files: base, with PRoPE and actions."""
    for camera, parameters, tensors in (('none', 8326608160, 1793), ('prope+action', 8557933856, 1905)):
        with torch.device('meta'):
            model = dataclasses.replace(PRESETS['hy1.5-8b'], camera=camera).build()
        assert sum(p.numel() for p in model.parameters()) == parameters and len(model.state_dict()) == tensors


@pytest.mark.parametrize('camera', ['none', 'prope'])
def test_the_predicted_arithmetic_is_torchs_own_count(camera):
    """Of a whole clip, of a causal pass and of teacher forcing."""
    model = tiny_model(camera=camera, image_len=0, glyph_len=0)
    x, t, text = torch.randn(1, 5, 16, 16, 16), torch.rand(1, 5), torch.randn(1, TINY.text_len, TINY.text_dim)
    batch = SimpleNamespace(x0=x, text=text, camera=Camera(torch.eye(4).expand(1, 5, 4, 4), torch.ones(1, 5, 4)))
    first_sees_all = torch.ones(5, 5, dtype=torch.bool)
    first_sees_all[1:] = torch.eye(5, dtype=torch.bool)[1:]

    def count(call):
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            call()
        return counter.get_total_flops()

    assert count(lambda: model(x, t, text, batch.camera)) == pytest.approx(flops(model.cfg, 5, 64, 5), rel=.02)
    got = count(lambda: model(x, t, text, batch.camera, first_sees_all))
    assert got == pytest.approx(flops(model.cfg, 5, 64, 9 / 5), rel=.02)
    got = count(lambda: teacher_forced(model, model.cfg, batch, x, t))
    assert got == pytest.approx(forced_flops(model.cfg, 5, 64), rel=.02)

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
    assert all('double_blocks.1.txt_' in name for name in still), still                            # nobody sees them
    for name, args in (('ar', ['--guidance', 1.5, '--over', 'text']), ('dmd', ['--window', 3])):
        run('stream.py', '--ckpt', f'{hunyuan_chain}/{name}.safetensors', '--keys', 'w*3,wl*6', '--out',
            hunyuan_chain / 'walk.gif', *args)
        assert len(iio.imread(hunyuan_chain / 'walk.gif')) == 10
    words = run('backbones.layouts', hunyuan_chain / 'dmd.safetensors')
    assert 'preset hy-tiny' in words and 'a streamed chunk in 4 steps' in words


def test_two_processes_equal_one(hunyuan_chain, data, tmp_path):
    processes_equal_one(hunyuan_chain, data, tmp_path)


def test_a_world_model_enters_at_stages_0_1_and_2(data, tmp_path):
    """As HY-WorldPlay's would: both of its cameras are kept, or at stage 0 one of them."""
    model = tiny_model(camera='prope+action', text_len=16, text_dim=64)
    save_file(model.state_dict(), tmp_path / 'diffusion_pytorch_model.safetensors')
    sizes = dict(text_len=16, image_len=4, glyph_len=3, chunk=1)
    (tmp_path / 'config.json').write_text(json.dumps(sizes))
    args = ['--init', tmp_path, '--data', data, '--steps', 2]
    assert 'camera prope+action' in run('finetune_camera.py', *args, *SMALL, '--out', tmp_path / 'both')
    text = run('finetune_camera.py', '--camera', 'prope', *args, *SMALL, '--out', tmp_path / 'one')
    assert 'of its cameras only prope is kept' in text
    run('train_ar.py', *args, *SMALL, '--out', tmp_path / 'both')
    run('distill_ode.py', *args, *FLAGS, '--teacher_steps', 8, '--pairs', 2, '--out', tmp_path / 'both')
    kinds = {'one/camera': 'prope'} | {f'both/{stage}': 'prope+action' for stage in ('camera', 'ar', 'ode')}
    for name, camera in kinds.items():
        trained, _ = load_model(f'{tmp_path}/{name}.safetensors')
        assert trained.cfg.camera == camera and hasattr(trained, 'action_in') == ('action' in camera)
    assert 'has learned prope+action already' in run('finetune_camera.py', '--camera', 'plucker+prope', *args, *SMALL,
                                                     '--out', tmp_path / 'no', ok=False)
