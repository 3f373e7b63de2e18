"""Checkpoints in and out: one tiny random network in every layout that `load_model` reads."""
import glob
import json
import os
import pickle
import re
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file

from backbones.layouts import chunk_flops, find_config, flops, save_wan
from camera import BadInput, Camera, intrinsics, keys_to_poses
from common import load_model, save_model, save_tensors
from conftest import ROOT, run
from model import PRESETS, DiT, ModelConfig, rebuilt
from stream import Config, Live
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


def refusal(path, **kw):
    """The sentence that refuses what is at `path`."""
    with pytest.raises(BadInput) as e:
        load_model(str(path), **kw)
    sentence = str(e.value)
    assert len(sentence.replace(os.path.dirname(path), '')) < 400 and sentence.isprintable(), sentence
    return sentence


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
    file = tmp_path / 'chunkwise' / 'model.pt'                # of 4 latents, whatever the folder is called
    write_config(file.parent)
    torch.save({'generator': {f'model.{k}': v for k, v in model.state_dict().items()}}, file)
    same(file, model, chunks=(0, 0))


@pytest.mark.parametrize('meta', ['[1]', '{"model": "wan"}'])
def test_a_header_of_others_is_not_ours(model, tmp_path, meta):
    write_config(tmp_path)
    save_file(model.state_dict(), tmp_path / 'x.safetensors', {'meta': meta})
    same(tmp_path / 'x.safetensors', model)


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
        more = rebuilt(load_model(str(tmp_path))[0], camera=camera)
        new = set(more.state_dict()) - set(model.state_dict())
        assert more.cfg.camera == camera and new and all((more.state_dict()[k] == 0).all() for k in new)
        assert all(torch.equal(more.state_dict()[k], v) for k, v in model.state_dict().items())
        assert all(p.requires_grad for p in more.parameters())


def test_tensors_that_do_not_fit_are_named(model, tmp_path):
    state = model.state_dict()
    del state['blocks.1.ffn.2.bias'], state['blocks.0.norm3.weight']
    state['blocks.0.self_attn.o.bias'], state['img_emb.proj.0.weight'] = torch.zeros(3), torch.zeros(2)
    write_config(tmp_path)
    save_file(state, tmp_path / 'diffusion_pytorch_model.safetensors')
    sentence = refusal(tmp_path)
    assert sentence.startswith(f'{tmp_path}: its tensors do not fit its config')
    missing, rest = sentence.split('Missing key(s)')[1].split('Unexpected key(s)')
    unexpected, mismatch = rest.split('size mismatch')
    assert 'blocks.1.ffn.2.bias' in missing and 'blocks.0.norm3.weight' in missing
    assert 'img_emb.proj.0.weight' in unexpected and 'blocks.0.self_attn.o.bias' in mismatch and '[3]' in mismatch
    state |= {f'vace_blocks.{i}.weight': torch.zeros(1) for i in range(1000)}
    save_file(state, tmp_path / 'diffusion_pytorch_model.safetensors')
    refusal(tmp_path)                                         # still a sentence


def test_a_folder_without_weights_is_said(tmp_path):
    with pytest.raises(BadInput, match=r'^[^:]*: no \.safetensors in this folder: name a checkpoint'):
        load_model(str(tmp_path))


class Evil:
    def __reduce__(self):
        return os.system, (f'touch {Evil.path}',)


def test_a_pickle_with_code_is_refused_and_nothing_runs(tmp_path):
    Evil.path = tmp_path / 'ran'
    torch.save({'generator': Evil()}, tmp_path / 'model.pt')
    sentence = refusal(tmp_path / 'model.pt')
    assert 'a pickle with code in it, posix.system, which is never loaded' in sentence
    assert not Evil.path.exists()


class Training:
    """A class beside the tensors, such as omegaconf's."""


def test_a_class_in_a_pickle_is_named_and_how_to_save_the_tensors_alone(model, tmp_path):
    write_config(tmp_path)
    torch.save({'generator': model.state_dict(), 'config': Training()}, tmp_path / 'model.pt')
    sentence = refusal(tmp_path / 'model.pt')
    assert f'{Training.__module__}.Training' in sentence
    command = re.search(r'torch\.save\(.*?\.pt"\)', sentence)[0].replace('model.pt', str(tmp_path / 'model.pt'))
    exec(command.replace('weights.pt', str(tmp_path / 'weights.pt')))         # as it says
    same(tmp_path / 'weights.pt', model)


def test_other_pickles(model, tmp_path):
    write_config(tmp_path)
    old, new, two, listed, half = (tmp_path / f'{name}.pt' for name in ('old', 'new', 'two', 'listed', 'half'))
    torch.save({'state_dict': model.state_dict(), 'epoch': 3}, old, _use_new_zipfile_serialization=False)
    same(old, model)
    torch.save({'generator': {'model': {1: torch.zeros(1), **model.state_dict()}}}, old)
    same(old, model)
    torch.save(list(model.state_dict().values()), listed)
    assert 'a list, not a dict of tensors' in refusal(listed)
    half.write_bytes(old.read_bytes()[:3000])
    assert 'half.pt: not a readable checkpoint' in refusal(half) and 'truncated' in refusal(half)
    new.write_bytes(pickle.dumps({'a': 1}, protocol=5))
    assert 'new.pt: not a readable checkpoint (Unsupported operand' in refusal(new)
    prefixed = {f'{part}.{name}': x for part in ('model', 'ema') for name, x in model.state_dict().items()}
    torch.save(prefixed, two)
    assert 'several networks, model., ema.' in refusal(two)


@pytest.mark.parametrize('name, content, what', [
    ('x.safetensors', b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n', 'a Git LFS pointer'),
    ('x.pt', b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n', 'git lfs pull'),
    ('x.gguf', b'GGUF\3\0\0\0' + 99 * b'\0', 'GGUF'), ('x.safetensors', b'<!doctype html>', 'a web page'),
    ('x.pt', b'', 'truncated'), ('x.safetensors', b'', 'truncated'), ('x.pth', b'\x93NUMPY' + 99 * b'\0', 'neither')])
def test_what_is_no_checkpoint_is_said(tmp_path, name, content, what):
    (tmp_path / name).write_bytes(content)
    assert re.search(f'{name}: .*{what}', refusal(tmp_path / name))
    assert re.search(f'{name}: .*{what}', refusal(tmp_path))   # and in a folder
    assert what in run('backbones.layouts', tmp_path / name, ok=False)


@pytest.mark.parametrize('names, what', [
    (['diffusion_model.blocks.0.self_attn.q.lora_A.weight'], 'a LoRA'),
    (['lora_unet_blocks_0_self_attn_q.lora_down.weight'], 'a LoRA'), (['blocks.0.self_attn.q.diff_b'], 'a LoRA'),
    (['patch_embedding.weight', 'blocks.0.ffn.0.scale_weight'], 'quantised'),
    (['encoder.conv1.weight'], "no network of ours or of Wan's")])
def test_other_tensors_are_told_by_their_names(tmp_path, names, what):
    save_file({name: torch.zeros(2, 2) for name in names}, tmp_path / 'x.safetensors')
    assert what in refusal(tmp_path / 'x.safetensors')
    torch.save({name: torch.zeros(2, 2) for name in names}, tmp_path / 'x.pt')
    assert what in refusal(tmp_path / 'x.pt')


@pytest.mark.parametrize('channels, out', [(48, 48), (36, 16), (16, 32)])
def test_other_channels_than_those_of_clips(tmp_path, channels, out):
    state = tiny_model(camera='none', in_dim=channels, out_dim=out).state_dict()
    state |= {f'img_emb.{i}.weight': torch.zeros(1) for i in range(500)}      # which image-to-video models have
    save_file(state, tmp_path / 'x.safetensors')
    assert f'takes {channels} channels and gives {out}' in refusal(tmp_path)


@pytest.mark.parametrize('prefix', ['model.diffusion_model.', 'diffusion_model.', 'module.model.', 'pipe.dit.'])
def test_any_prefix_is_taken_off(model, tmp_path, prefix):
    """ComfyUI's files and others; what does not have it is another network."""
    write_config(tmp_path)
    state = {prefix + name: x for name, x in model.state_dict().items()}
    save_file(state | {'vae.conv1.weight': torch.zeros(1)}, tmp_path / 'wan.safetensors')
    same(tmp_path, model)
    same(tmp_path / 'wan.safetensors', model)                 # the config beside it is read
    torch.save(state, tmp_path / 'wan.pt')
    same(tmp_path / 'wan.pt', model)


def test_the_root_of_a_repository(model, tmp_path):
    save_wan(str(tmp_path / 'transformer'), tiny_model())     # ours, by its header
    (tmp_path / 'model_index.json').write_text('{"_class_name": "WanPipeline"}')
    os.makedirs(tmp_path / 'vae')
    save_file({'conv1.weight': torch.zeros(1)}, tmp_path / 'vae' / 'diffusion_pytorch_model.safetensors')
    same(tmp_path, tiny_model())
    save_wan(str(tmp_path / 'transformer_2'), model)          # Wan2.2: one for high noise, one for low
    assert 'transformer_2/diffusion_pytorch_model.safetensors: name one' in refusal(tmp_path)


def test_a_folder_of_several_checkpoints_asks_for_one(model, tmp_path):
    def save(name):
        save_model(str(tmp_path / name), model.state_dict(), model.cfg)

    save('ar.safetensors')
    save('ar.resume.safetensors')                             # lies beside one, is none
    same(tmp_path, model)
    save('camera.safetensors')
    assert 'holds several checkpoints, ar.safetensors, camera.safetensors: name one' in refusal(tmp_path)
    for name in 'cde':
        save(f'{name}.safetensors')
    assert 'ar.safetensors, c.safetensors, camera.safetensors, d.safetensors and 1 more' in refusal(tmp_path)
    for stage in ('ar', 'dmd'):                               # minWM's
        os.makedirs(tmp_path / 'Action2V' / stage)
        torch.save(model.state_dict(), tmp_path / 'Action2V' / stage / 'model.pt')
        write_config(tmp_path / 'Action2V' / stage)
    assert 'ar/model.pt, dmd/model.pt' in refusal(tmp_path / 'Action2V')
    same(tmp_path / 'Action2V' / 'dmd', model)


def test_shards_without_an_index_and_one_alone(model, tmp_path):
    state = model.state_dict()
    names = list(state)
    for i in range(2):
        save_file({k: state[k] for k in names[i::2]}, tmp_path / f'x-0000{i + 1}-of-00002.safetensors')
    write_config(tmp_path)
    same(tmp_path, model)
    assert 'name the folder that holds them all' in refusal(tmp_path / 'x-00001-of-00002.safetensors')
    index = tmp_path / 'x.safetensors.index.json'
    index.write_text(json.dumps({'weight_map': {k: f'x-0000{i % 2 + 1}-of-00002.safetensors'
                                                for i, k in enumerate(names)}}))
    same(f'{tmp_path}/', model)
    same(index, model)
    index.write_text('version https://git-lfs.github.com/spec/v1')
    assert 'index.json: not readable as JSON' in refusal(tmp_path)


def test_heads_are_told_or_asked_for(model, tmp_path):
    file = tmp_path / 'x.safetensors'
    save_file(model.state_dict(), file)
    assert 'width of 48, and its config says None: write {"num_heads": N}' in refusal(file)
    for heads in (5, 0, '2'):
        write_config(tmp_path, CONFIG | {'num_heads': heads})
        assert f'its config says {heads}' in refusal(file)
    (tmp_path / 'config.json').write_text('[]]')
    assert 'config.json: not readable as JSON' in refusal(file)
    for preset, heads in (('wan-1.3b', 12), ('wan-14b', 40)):
        with torch.device('meta'):
            tensors = DiT(PRESETS[preset]).state_dict()
        opened = {name: lambda x=x: x for name, x in tensors.items()}
        assert find_config('wan.safetensors', opened, {}).num_heads == heads


@pytest.mark.parametrize('file, config, chunks', [
    ('framewise/causal_forcing.pt', {}, (1, 1)), ('chunkwise/causal_forcing.pt', {}, (3, 3)),
    ('causal-forcing++/framewise-2step.pt', {}, (1, 1)), ('self_forcing_dmd.pt', {}, (3, 3)),
    ('Wan2_1-Self-Forcing.safetensors', {}, (3, 3)), ('minWM/model.pt', {}, (4, 4)), ('wan.safetensors', {}, (4, 4)),
    ('x.pt', {'num_frame_per_block': 3}, (3, 3)), ('framewise/x.pt', {'num_frame_per_block': 2}, (2, 2)),
    ('x.pt', {'num_frame_per_block': 3, 'independent_first_frame': True}, (3, 1)),
    ('x.safetensors', {'chunk': 2, 'first_chunk': 1}, (2, 1))])
def test_the_chunk_that_a_file_tells(model, tmp_path, file, config, chunks):
    file = tmp_path / file
    write_config(file.parent, CONFIG | config)
    state = model.state_dict()
    save_file(state, file) if file.suffix == '.safetensors' else torch.save({'generator_ema': state}, file)
    cfg = load_model(str(file), chunks=(0, 0))[0].cfg
    assert (cfg.chunk, cfg.first_chunk) == chunks
    if file.suffix == '.pt':                                  # the config may be in it
        write_config(file.parent)
        torch.save({'generator_ema': state, 'config': config}, file)
        cfg = load_model(str(file), chunks=(0, 0))[0].cfg
        assert (cfg.chunk, cfg.first_chunk) == chunks
    cfg = load_model(str(file), chunks=(5, 1))[0].cfg         # the user knows better
    assert (cfg.chunk, cfg.first_chunk) == (5, 1)


def test_a_chunk_that_no_file_tells_is_asked_for(model, data, tmp_path, capsys):
    ckpt = tmp_path / 'causal_forcing.pt'                     # of chunks or of frames?
    write_config(tmp_path)
    torch.save({'generator': model.state_dict()}, ckpt)
    assert 'does not say how many latents it denoises together: --chunk 3' in refusal(ckpt, chunks=(0, 0))
    assert 'at least 1 each' in refusal(ckpt, chunks=(-1, 0))
    load_model(str(ckpt))                                     # a stage that trains
    assert '4 are assumed' in capsys.readouterr().out
    walk = ('stream.py', '--data', data, '--first', 'prompt', '--keys', 'w*8', '--steps', 1, '--out',
            tmp_path / 'walk.mp4', '--ckpt')
    assert '--chunk 3' in run(*walk, ckpt, ok=False)
    assert 'walk.mp4: 9 frames' in run(*walk, ckpt, '--chunk', 3)
    assert 'walk.mp4: 7 frames' in run(*walk, ckpt, '--chunk', 3, '--first_chunk', 1)
    assert '4 are assumed' not in run(*walk, ckpt, '--chunk', 4)
    save_model(str(tmp_path / 'ours.safetensors'), model.state_dict(), model.cfg, stage='ar', frames=5)
    assert 'was trained with 4' in run(*walk, tmp_path / 'ours.safetensors', '--chunk', 3, ok=False)
    live = Live(Config(ckpt=str(ckpt), data=str(data), chunk=3, fps=8), torch.device('cpu'), torch.float32)
    live.change_model(ckpt.name)
    assert live.model.cfg.chunk == live.model.cfg.first_chunk == 3


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
    split = rebuilt(model, num_layers=4, encoder_blocks=3, chunk=5, first_chunk=5)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        context = split.encode(x, t, text, cameras)
        for _ in range(2):
            split(x, t, text, cameras, context=context)
    assert chunk_flops(split.cfg, 2, 16, 5) == pytest.approx(counter.get_total_flops(), rel=.02)
