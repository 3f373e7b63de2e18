"""Checkpoints in and out: one tiny random network in every layout that `load_model` reads."""
import glob
import json
import os
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file

from backbones.layouts import flops, save_wan
from camera import BadInput, Camera, intrinsics, keys_to_poses
from common import load_model, save_model, save_tensors
from conftest import ROOT, run
from finetune_camera import add_camera
from model import DiT, ModelConfig
from test_model import tiny_model

TINY = dict(dim=48, ffn_dim=64, num_heads=2, num_layers=2, text_dim=8, text_len=4, freq_dim=16)
CONFIG = {'text_len': 4, 'num_heads': 2, 'num_layers': 2, 'dim': 48, 'ffn_dim': 64}      # as in a config.json


@pytest.fixture(scope='module')
def model():
    return tiny_model(camera='none', chunk=4, first_chunk=4, shift=5.0, freq_dim=16, eviction='frames')


def same(path, model, **kw):
    """What is at `path` is this model, tensor by tensor, and computes the same; returns its header."""
    loaded, header = load_model(str(path), **kw)
    assert loaded.cfg == model.cfg
    for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    x, t, text = torch.randn(1, 4, 16, 4, 4), torch.rand(1, 4), torch.randn(1, 4, 8)
    assert torch.equal(loaded.eval()(x, t, text), model(x, t, text))
    assert all(p.requires_grad for p in loaded.parameters())
    return header


def write_config(folder, config=CONFIG):
    os.makedirs(folder, exist_ok=True)
    with open(f'{folder}/config.json', 'w') as f:
        json.dump(config, f)


def test_wans_own_folder_and_back(model, tmp_path):
    save_wan(str(tmp_path), model)
    same(tmp_path, model)
    assert sorted(os.listdir(tmp_path)) == ['config.json', 'diffusion_pytorch_model.safetensors']
    steered = tiny_model(camera='plucker', sink=True)         # what Wan's config has no words for is in the header
    save_wan(str(tmp_path), steered)
    assert load_model(str(tmp_path))[0].cfg == steered.cfg


def test_shards(model, tmp_path):
    state = model.state_dict()
    names, where = list(state), {}
    for i in range(3):
        file = f'diffusion_pytorch_model-{i + 1:05d}-of-00003.safetensors'
        part = {k: state[k] for k in names[i::3]}
        save_file(part, tmp_path / file)
        where |= {k: file for k in part}
    write_config(tmp_path)
    index = tmp_path / 'diffusion_pytorch_model.safetensors.index.json'
    index.write_text(json.dumps({'weight_map': where}))
    same(tmp_path, model)
    os.remove(tmp_path / 'diffusion_pytorch_model-00002-of-00003.safetensors')
    with pytest.raises(BadInput, match='00002-of-00003.safetensors: no such file'):
        load_model(str(tmp_path))


MEASURE = """
import sys, threading, time
sys.path.insert(0, {root!r})
from common import load_model

def anonymous():
    return int(open('/proc/self/status').read().split('RssAnon:')[1].split()[0]) / 1024      # MB

def watch():
    while not done:
        peak.append(anonymous())
        time.sleep(.001)

load_model({warm!r})                                          # what a first load needs for itself
start, peak, done = anonymous(), [0], []
thread = threading.Thread(target=watch)
thread.start()
model, _ = load_model({folder!r})
done.append(True)
thread.join()
print(max(peak) - start)
"""


@pytest.mark.skipif(not os.path.exists('/proc/self/status'), reason='memory is read from /proc')
def test_loading_takes_one_shard_of_spare_memory(tmp_path):
    """Beside the model itself: its tensors go from a mapped file to their place one by one, none is held twice."""
    cfg = ModelConfig(**TINY | dict(dim=384, ffn_dim=2048, num_layers=10, num_heads=3), camera='none')
    state = DiT(cfg).state_dict()
    names, where = sorted(state), {}
    for i in range(4):
        part = names[i * len(names) // 4:(i + 1) * len(names) // 4]
        save_file({k: state[k] for k in part}, tmp_path / f'{i}.safetensors')
        where |= {k: f'{i}.safetensors' for k in part}
    write_config(tmp_path, CONFIG | dict(num_heads=3))
    (tmp_path / 'x.safetensors.index.json').write_text(json.dumps({'weight_map': where}))
    save_wan(str(tmp_path / 'warm'), DiT(ModelConfig(**TINY, camera='none')))
    code = MEASURE.format(root=ROOT, warm=str(tmp_path / 'warm'), folder=str(tmp_path))
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    taken = float(done.stdout)
    size = sum(os.path.getsize(f) for f in glob.glob(f'{tmp_path}/?.safetensors')) / 2 ** 20
    shard = os.path.getsize(tmp_path / '0.safetensors') / 2 ** 20
    assert size > 100 and .9 * size < taken < size + shard, (taken, size, shard)


def test_diffusers_own_class(model, tmp_path):
    diffusers = pytest.importorskip('diffusers', reason='pip install diffusers')
    theirs = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=16, out_channels=16, text_dim=8,
        freq_dim=16, ffn_dim=64, num_layers=2, cross_attn_norm=True, qk_norm='rms_norm_across_heads', eps=1e-6)
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=.1)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    write_config(tmp_path, config | {'text_len': 4})
    ours, _ = load_model(str(tmp_path))
    x, text = torch.randn(1, 3, 16, 8, 4), torch.randn(1, 4, 8)
    with torch.no_grad():
        want = theirs(x.transpose(1, 2), torch.tensor([700.]), text).sample.transpose(1, 2)
        torch.testing.assert_close(ours(x, torch.full((1, 3), .7), text), want, rtol=0, atol=2e-4)


@pytest.mark.parametrize('wrap', ['model.', 'model._fsdp_wrapped_module.', 'model._orig_mod.', ''])
def test_pt_files(model, tmp_path, wrap):
    """minWM, Self-Forcing, Causal-Forcing; the EMA is taken where there are both."""
    state = {}
    for k, v in model.state_dict().items():
        state[wrap + k.replace('blocks.0.', 'blocks.0._checkpoint_wrapped_module.')] = v
    zeros = {k: 0 * v for k, v in state.items()}
    write_config(tmp_path)
    for name, content in (('a', {'generator': state}), ('b', {'generator': zeros, 'generator_ema': state}),
                          ('c', {'model': state}), ('d', state)):
        torch.save(content, tmp_path / f'{name}.pt')
        same(tmp_path / f'{name}.pt', model)


def test_action2v_brings_its_second_attention(tmp_path):
    model = tiny_model(camera='prope', chunk=4, first_chunk=4, shift=5.0, freq_dim=16, eviction='frames')
    write_config(tmp_path)
    torch.save({'generator': {f'model.{k}': v for k, v in model.state_dict().items()}}, tmp_path / 'model.pt')
    same(tmp_path / 'model.pt', model)


def test_ours(model, tmp_path):
    save_model(str(tmp_path / 'x.safetensors'), model.state_dict(), model.cfg, stage='base', step=7)
    assert same(tmp_path / 'x.safetensors', model)['step'] == 7


def test_a_header_of_before_the_rename_is_read(model, tmp_path):
    """`first_chunk` was `first` in the shipped checkpoints, and is in everybody's old ones."""
    cfg = asdict(model.cfg)
    cfg['first'] = cfg.pop('first_chunk')
    save_tensors(str(tmp_path / 'x.safetensors'), model.state_dict(), {'model': cfg})
    same(tmp_path / 'x.safetensors', model)
    save_wan(str(tmp_path / 'wan'), model)
    os.replace(tmp_path / 'x.safetensors', tmp_path / 'wan' / 'diffusion_pytorch_model.safetensors')
    same(tmp_path / 'wan', model)


def test_dtype_and_a_camera_that_starts_at_zero(model, tmp_path):
    save_wan(str(tmp_path), model)
    assert {p.dtype for p in load_model(str(tmp_path), dtype=torch.bfloat16)[0].parameters()} == {torch.bfloat16}
    for camera in ('plucker', 'prope', 'plucker+prope'):
        more = add_camera(load_model(str(tmp_path))[0], camera)
        new = set(more.state_dict()) - set(model.state_dict())
        assert more.cfg.camera == camera and new and all((more.state_dict()[k] == 0).all() for k in new)
        assert all(torch.equal(more.state_dict()[k], v) for k, v in model.state_dict().items())
        assert all(p.requires_grad for p in more.parameters())


def test_every_tensor_that_does_not_fit_is_named(model, tmp_path):
    state = model.state_dict()
    del state['blocks.1.ffn.2.bias'], state['blocks.0.norm3.weight']
    state['blocks.0.self_attn.o.bias'], state['img_emb.proj.0.weight'] = torch.zeros(3), torch.zeros(2)
    write_config(tmp_path)
    save_file(state, tmp_path / 'diffusion_pytorch_model.safetensors')
    with pytest.raises(BadInput) as e:
        load_model(str(tmp_path))
    sentence = str(e.value)
    assert sentence.startswith(f'{tmp_path}: its tensors do not fit its config')
    missing, rest = sentence.split('Missing key(s)')[1].split('Unexpected key(s)')
    unexpected, mismatch = rest.split('size mismatch')
    assert 'blocks.1.ffn.2.bias' in missing and 'blocks.0.norm3.weight' in missing
    assert 'img_emb.proj.0.weight' in unexpected
    assert 'blocks.0.self_attn.o.bias' in mismatch and '[3]' in mismatch and '[48]' in mismatch


def test_a_folder_without_weights_is_said(tmp_path):
    with pytest.raises(BadInput, match=r'^[^:]*: no \.safetensors in this folder: name a checkpoint'):
        load_model(str(tmp_path))


class Evil:
    def __reduce__(self):
        return os.system, (f'touch {Evil.path}',)


def test_a_pickle_with_code_is_refused_and_nothing_runs(tmp_path):
    Evil.path = tmp_path / 'ran'
    torch.save({'generator': Evil()}, tmp_path / 'model.pt')
    with pytest.raises(BadInput, match='pickle with code in it, which is never loaded'):
        load_model(str(tmp_path / 'model.pt'))
    assert not Evil.path.exists()


def test_what_is_this_checkpoint(model, tmp_path):
    save_wan(str(tmp_path / 'wan'), model)
    out = run('backbones.layouts', tmp_path / 'wan', '--out', tmp_path / 'x.safetensors')
    assert f'{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters' in out
    same(tmp_path / 'x.safetensors', model)
    run('backbones.layouts', tmp_path / 'x.safetensors', '--out', tmp_path / 'back')
    same(tmp_path / 'back', model)
    assert 'no such file' in run('backbones.layouts', tmp_path / 'none.pt', ok=False)


@pytest.mark.parametrize('camera', ['none', 'plucker', 'prope'])
def test_the_predicted_arithmetic_is_torchs_own_count(camera):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    cfg = ModelConfig(**TINY | dict(dim=96, ffn_dim=256), camera=camera)
    model = DiT(cfg)
    cameras = Camera(keys_to_poses('wl*4')[None], intrinsics(90, 1).expand(1, 5, 4))
    x, t, text = torch.randn(1, 5, 16, 8, 8), torch.rand(1, 5), torch.randn(1, 4, 8)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):                         # whose products are counted
        model(x, t, text, cameras)
    assert flops(cfg, 5, 16, 5) == pytest.approx(counter.get_total_flops(), rel=.02)
