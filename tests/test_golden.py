"""The network against tensors made by the official Wan2.1 code and by minWM's (GOLDEN names the folder)."""
import ast
import os

import pytest
import torch
from safetensors import safe_open

from camera import Camera, invert, relative
from model import (DiT, ModelConfig, causal_mask, chunk_ids, project, rotary_table, rotate, schedule, sinusoid,
                   teacher_forcing_mask)
from worlds.poses import minwm_poses

GOLDEN = os.environ.get('GOLDEN')
pytestmark = pytest.mark.skipif(not GOLDEN, reason='GOLDEN is not set: the folder of golden files')
TOL = dict(rtol=0, atol=3e-5)


def load(name, camera='none'):
    with safe_open(f'{GOLDEN}/{name}.safetensors', 'pt') as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}
        c = ast.literal_eval(f.metadata().get('config', '{}'))
    if not c:
        return tensors
    same = 'dim', 'ffn_dim', 'num_heads', 'num_layers', 'freq_dim', 'text_dim', 'text_len'
    cfg = ModelConfig(patch=c['patch_size'][1], camera=camera, **{k: c[k] for k in same})
    model = DiT(cfg)
    state = {k.removeprefix('sd_prope.').removeprefix('sd.'): v for k, v in tensors.items() if k.startswith('sd')}
    model.load_state_dict({k: v for k, v in state.items() if camera == 'prope' or 'prope' not in k})
    return tensors, model


def pad(context, n=16):
    return torch.cat([context, context.new_zeros(n - len(context), context.shape[1])])


@torch.no_grad()
def bidirectional(model, x, t, context, camera=None):
    """(C, F, H, W) at Wan's timestep t -> velocity (C, F, H, W)."""
    x = x.transpose(0, 1)[None]
    return model(x, (t / 1000).expand(1, x.shape[1]), pad(context)[None], camera)[0].transpose(0, 1)


def to_camera(viewmats, Ks):
    """minWM's world-to-camera matrices and 3 x 3 intrinsics as ours."""
    return Camera(invert(viewmats), torch.stack([Ks[..., 0, 0], Ks[..., 1, 1], Ks[..., 0, 2], Ks[..., 1, 2]], -1))


def test_bidirectional():
    g, model = load('wan_tiny_bidir')
    torch.testing.assert_close(bidirectional(model, g['A.x'], g['A.t'], g['A.context']), g['A.out'], **TOL)
    for i in range(2):                                   # case B, of two sizes, run unpadded
        out = bidirectional(model, g[f'B.x{i}'], g['B.t'][i], g[f'B.context{i}'])
        torch.testing.assert_close(out, g[f'B.out{i}'], **TOL)


def test_parts():
    g, model = load('wan_tiny_bidir')
    torch.testing.assert_close(sinusoid(g['A.t'][None] / 1000, 32)[0], g['A.mid.sinusoid'], **TOL)
    q = rotate(g['rope.q_in'], rotary_table(tuple(range(5)), 4, 6, 32, 'cpu'))
    torch.testing.assert_close(q, g['rope.q_out'], **TOL)
    seen = {}
    model.blocks[0].self_attn.o.register_forward_hook(lambda m, i, o: seen.update(block0_self_attn=o))
    model.blocks[0].cross_attn.o.register_forward_hook(lambda m, i, o: seen.update(block0_cross_attn=o))
    for k, block in enumerate(model.blocks):
        block.register_forward_hook(lambda m, i, o, k=k: seen.update({f'block{k}_out': o.flatten(1, 2)}))
    model.text_embedding.register_forward_hook(lambda m, i, o: seen.update(context_emb=o))
    bidirectional(model, g['A.x'], g['A.t'], g['A.context'])
    assert len(seen) == 6
    for name, value in seen.items():
        torch.testing.assert_close(value, g[f'A.mid.{name}'], **TOL)


@pytest.mark.parametrize('chunk', [1, 2])
def test_teacher_forcing(chunk):
    g, model = load('wan_tiny_causal_tf')
    mask = teacher_forcing_mask(chunk_ids(4, chunk, first_chunk=chunk))
    tokens = mask.repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(tokens, g[f'mask_chunk{chunk}_2tok'].bool())
    text = torch.stack([pad(g['context0']), pad(g['context1'])])
    x, clean = g['x'].transpose(1, 2), g['clean_x'].transpose(1, 2)
    t = g[f't_chunk{chunk}'] / 1000
    with torch.no_grad():
        out = model(torch.cat([clean, x], 1), torch.cat([torch.zeros_like(t), t], 1), text, mask=mask,
                    pos=[*range(4)] * 2)
    torch.testing.assert_close(out[:, 4:].transpose(1, 2), g[f'out_chunk{chunk}_nocam'], **TOL)


def test_prope():
    g, model = load('wan_tiny_bidir', 'prope')
    camera = to_camera(g['P.viewmats'], g['P.Ks'])
    torch.testing.assert_close(bidirectional(model, g['A.x'], g['A.t'], g['A.context'], camera), g['P.out'], **TOL)
    P, inverse = model.embed_camera(camera, 8, 12).prope.unbind(2)
    for name, x, M in (('q_t', 'q', P.mT), ('k_t', 'k', inverse), ('v_t', 'v', inverse), ('o_t', 'v', P)):
        y = project(g[f'P.unit.{x}'].transpose(1, 2), M).transpose(1, 2)     # theirs: (batch, head, token, channel)
        torch.testing.assert_close(y, g[f'P.unit.{name}'], **TOL)
    moved = Camera(relative(camera.c2w), camera.K)                                        # only relative poses matter
    torch.testing.assert_close(bidirectional(model, g['A.x'], g['A.t'], g['A.context'], moved), g['P.out'], **TOL)


@pytest.mark.parametrize('name, chunk', [('chunk1', 1), ('chunk2', 2), ('chunk2_aug', 2), ('chunk4', 4)])
def test_teacher_forcing_with_cameras(name, chunk):
    g, model = load('wan_tiny_causal_tf', 'prope')
    text, camera = torch.stack([pad(g['context0']), pad(g['context1'])]), to_camera(g['viewmats'], g['Ks'])
    x, clean = g['x'].transpose(1, 2), g['clean_x'].transpose(1, 2)
    t = {1: g['t_chunk1'], 2: g['t_chunk2'], 4: g['t_chunk2'][:, :1].expand(2, 4)}[chunk] / 1000
    history = g['aug_t_chunk2'] / 1000 if 'aug' in name else torch.zeros_like(t)
    with torch.no_grad():
        out = model(torch.cat([clean, x], 1), torch.cat([history, t], 1), text, Camera.cat([camera, camera]),
                    teacher_forcing_mask(chunk_ids(4, chunk, first_chunk=chunk)), [*range(4)] * 2)
    torch.testing.assert_close(out[:, 4:].transpose(1, 2), g[f'out_{name}'], **TOL)


@pytest.mark.parametrize('i, keys', [*enumerate(['w*19', 'i*12,j*7', 'a*10,l*9', 'dn*3,u*2,s*4,d*5,k*5'])])
def test_minwm_walks(i, keys):
    torch.testing.assert_close(invert(minwm_poses(keys)), load('wan_schedules')[f'traj{i}.viewmats'], **TOL)


def quaternion_pose(t, q):
    """Poses (..., 4, 4) from translations t (..., 3) and quaternions q (..., 4), x, y, z, w, of any length."""
    x, y, z, w = torch.nn.functional.normalize(q, dim=-1).unbind(-1)
    R = torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w),
                     2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w),
                     2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)], -1).unflatten(-1, (3, 3))
    bottom = torch.tensor([0., 0, 0, 1], dtype=t.dtype, device=t.device).expand(*t.shape[:-1], 1, 4)
    return torch.cat([torch.cat([R, t[..., None]], -1), bottom], -2)


def test_minwm_quaternions():
    g = load('wan_schedules')
    w2c = quaternion_pose(g['pose7.in'][:, :3], g['pose7.in'][:, 3:])
    torch.testing.assert_close(invert(relative(invert(w2c)[None])[0]), g['pose7.viewmats'], **TOL)


def test_whole_clip_chunk_is_bidirectional():
    g, model = load('wan_tiny_causal_tf')
    ids = chunk_ids(4, 4, first_chunk=4)
    assert causal_mask(ids).all()
    text = torch.stack([pad(g['context0']), pad(g['context1'])])
    x, clean, t = g['x'].transpose(1, 2), g['clean_x'].transpose(1, 2), g['t_chunk2'] / 1000
    with torch.no_grad():
        tf = model(torch.cat([clean, x], 1), torch.cat([0 * t, t], 1), text, mask=teacher_forcing_mask(ids),
                   pos=[*range(4)] * 2)[:, 4:]
        torch.testing.assert_close(tf, model(x, t, text), **TOL)


def test_schedules():
    g = load('wan_schedules')
    torch.testing.assert_close(schedule(4, 5.0)[:4] * 1000, g['warp.out'].flatten()[:4].float(), rtol=0, atol=1e-3)
    torch.testing.assert_close(schedule(48, 5.0)[:48], g['cd48.sigmas'], rtol=0, atol=1e-6)
    torch.testing.assert_close(schedule(1000, 5.0)[:1000], g['train1000.sigmas'], rtol=0, atol=1e-6)
    torch.testing.assert_close(schedule(50, 5.0)[:50], g['cd50.sigmas'], rtol=0, atol=1e-6)


def test_euler():
    """Along the 48 steps, of the files' own field, every state on the way."""
    g, times = load('wan_schedules'), schedule(48, 5.0)
    x = g['euler48.xs'][0]
    for i in range(48):
        x = x + (times[i + 1] - times[i]) * (torch.sin(1.3 * x) * (.5 + times[i]) + .2 * x)
        torch.testing.assert_close(x, g['euler48.xs'][i + 1], **TOL)
