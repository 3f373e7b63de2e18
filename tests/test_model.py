"""Masks against literal grids, attention against the dense path, flow helpers against closed forms."""
import dataclasses
import json
import os

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional

import model as model_py
from backbones import flex
from camera import BadInput, Camera, intrinsics, keys_to_poses
from common import (NEWTON_SCHULZ, Muon, clip_gradients, gate, learning_rate, load_model, make_optimizers, save_model,
                    save_tensors, update_ema)
from conftest import ROOT
from model import (PRESETS, DiT, KVCache, ModelConfig, RMSNorm, add_noise, attention, causal_mask, chunk_ids,
                   dense_attention, mask_rows, masked_attention, rotary_table, rotate,
                   sample_clip, schedule, shift_time, teacher_forcing_mask, v_to_x0)

TINY = ModelConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=2, text_dim=8, text_len=4)


def torch_attention(q, k, v, mask):
    """Attention (B, S, N, Dh) under a frame mask, by expanding it to tokens: torch's own."""
    m = mask.repeat_interleave(q.shape[1] // mask.shape[0], 0).repeat_interleave(k.shape[1] // mask.shape[1], 1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=m).transpose(1, 2)


def grid(rows):
    return torch.tensor([[c == 'x' for c in row] for row in rows.split()])


def tiny_model(seed=0, **kw):
    """A model none of whose weights is zero."""
    torch.manual_seed(seed)
    model = DiT(dataclasses.replace(TINY, **kw)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -.5 if p.ndim > 1 else .3)
    return model


def test_masks_against_literal_grids():
    assert chunk_ids(7, 3).tolist() == [0, 1, 1, 1, 2, 2, 2] and chunk_ids(4, 2, first_chunk=2).tolist() == [0, 0, 1, 1]
    assert torch.equal(causal_mask(chunk_ids(3, 1)), grid('x.. xx. xxx'))
    assert torch.equal(causal_mask(chunk_ids(3, 2)), grid('x.. xxx xxx'))
    assert torch.equal(teacher_forcing_mask(chunk_ids(3, 1)), grid('x..... xx.... xxx... ...x.. x...x. xx...x'))
    assert torch.equal(teacher_forcing_mask(chunk_ids(3, 2)), grid('x..... xxx... xxx... ...x.. x...xx x...xx'))
    with pytest.raises(BadInput, match='9 frames do not divide'):
        chunk_ids(9, 3)


@pytest.mark.parametrize('frames, chunk, L', [(4, 1, 3), (5, 2, 2), (9, 4, 1), (3, 1, 128)])
def test_masked_attention_and_flex_equal_dense(frames, chunk, L):
    torch.manual_seed(0)
    mask = teacher_forcing_mask(chunk_ids(frames, chunk))
    q, k, v = (torch.randn(2, 2 * frames * L, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    dout = torch.randn_like(q)
    want = torch_attention(q, k, v, mask)
    exact = torch.autograd.grad(want, (q, k, v), dout)
    for kernel in dense_attention, masked_attention:
        got = kernel(q, k, v, mask)
        for a, b in zip((got, *torch.autograd.grad(got, (q, k, v), dout)), (want, *exact)):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    with torch.no_grad():
        got = flex.flex_frame_attention(*(x.float() for x in (q, k, v)), mask)
        torch.testing.assert_close(masked_attention(q, k, v, mask), want, rtol=0, atol=1e-12)
    torch.testing.assert_close(got, want.float(), rtol=0, atol=1e-5)


def test_cuda_takes_flex_attention_with_the_same_mask(monkeypatch):
    """Which path a CUDA tensor takes, asked of one without a memory behind it; the test above says that flex_attention
    agrees."""
    mask, taken = teacher_forcing_mask(chunk_ids(3, 1)), []
    monkeypatch.setattr(flex, 'flex_frame_attention', lambda q, k, v, m: taken.append(m) or q)
    monkeypatch.setattr(model_py, 'masked_attention', lambda *a: pytest.fail('the loop of the CPU'))
    with FakeTensorMode():
        q = torch.empty(1, 12, 2, 64, device='cuda', dtype=torch.bfloat16)
        assert attention(q, q, q, mask_rows(mask)).is_cuda and taken == [mask_rows(mask)]
        assert attention(q, q, q).shape == q.shape and len(taken) == 1       # nothing is masked: sdpa, or flash-attn


def test_bfloat16_on_a_cpu_equals_float32_to_its_precision(monkeypatch):
    """Without a mask too it is masked_attention there, by plain products, when a gradient is wanted."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 2, 16, requires_grad=True) for n in (12, 6, 6))
    dout, low = torch.randn_like(q), [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    want, taken = torch_attention(q, k, v, torch.ones(1, 1, dtype=torch.bool)), []
    monkeypatch.setattr(model_py, 'masked_attention', lambda *a: taken.append(a) or masked_attention(*a))
    got = attention(*low)
    assert len(taken) == 1 and got.dtype == torch.bfloat16
    ours = (got, *torch.autograd.grad(got, low, dout.bfloat16()))
    exact = (want, *torch.autograd.grad(want, (q, k, v), dout))
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a.float(), b, rtol=0, atol=.04)
    with torch.no_grad():
        attention(*low)
    attention(q, k, v)
    assert len(taken) == 1


def test_what_streaming_keeps_may_be_trained_with():
    """Rotary tables are kept; one made in inference mode could not be saved for a backward pass."""
    model, args = tiny_model(), (torch.randn(1, 3, 16, 6, 10), torch.rand(1, 3), torch.randn(1, 4, 8))
    with torch.inference_mode():
        streamed = model(*args)
    trained = model(*args)
    trained.sum().backward()
    torch.testing.assert_close(streamed, trained.detach(), rtol=0, atol=1e-5)


def test_gradients_are_clipped_to_the_limit_and_must_be_numbers():
    p = torch.nn.Parameter(torch.zeros(2))
    for limit, want in ((1., [.6, .8]), (9., [3., 4.])):
        p.grad = torch.tensor([3., 4.])
        assert clip_gradients([p], limit) == pytest.approx(5)
        torch.testing.assert_close(p.grad, torch.tensor(want), rtol=1e-4, atol=0)
    p.grad = torch.tensor([1., torch.nan])
    with pytest.raises(BadInput, match='nothing of it is kept'):
        clip_gradients([p], 1.)


@pytest.mark.parametrize('kind', ['plucker', 'prope', 'plucker+prope'])
def test_zero_initialised_camera_equals_the_base_model_and_dropped_camera_is_none(kind):
    torch.manual_seed(0)
    base, model = tiny_model(camera='none'), DiT(dataclasses.replace(TINY, camera=kind))
    model.load_state_dict(base.state_dict(), strict=False)
    x, t, text = torch.randn(2, 3, 16, 4, 4), torch.rand(2, 3), torch.randn(2, 4, 8)
    camera = Camera(keys_to_poses('wl*2').expand(2, 3, 4, 4), intrinsics(90, 1).expand(2, 3, 4))
    assert torch.equal(model(x, t, text, camera), base(x, t, text))
    steered = tiny_model(camera=kind)
    off = steered(x, t, text, dataclasses.replace(camera, on=torch.tensor([True, False])))
    assert not torch.allclose(off[0], steered(x, t, text)[0], atol=1e-3)
    torch.testing.assert_close(off[0], steered(x, t, text, camera)[0])
    torch.testing.assert_close(off[1], steered(x, t, text)[1])


def test_rotary_depends_on_the_distance_only():
    q, k = torch.randn(2, 1, 4, 1, 32)
    turned = lambda x, place: rotate(x, rotary_table((place,), 2, 2, 32, 'cpu'))
    score = lambda a: (turned(q, a) * turned(k, a + 3)).sum()
    torch.testing.assert_close(score(0), score(11), rtol=1e-4, atol=1e-4)


def test_flow_helpers():
    torch.testing.assert_close(schedule(4, 5.0), torch.tensor([1, .9375, 5 / 6, .625, 0]))
    assert torch.equal(shift_time(torch.tensor([0., .3, 1.]), 1.0), torch.tensor([0., .3, 1.]))
    x0, eps, t = torch.randn(2, 3, 1, 2, 2), torch.randn(2, 3, 1, 2, 2), torch.rand(2, 3)
    torch.testing.assert_close(v_to_x0(add_noise(x0, eps, t), eps - x0, t), x0, rtol=0, atol=1e-6)


def test_euler_on_a_gaussian_follows_the_closed_form():
    """Data N(m, s^2): E[v | x_t] is linear, and its ODE maps noise e to m + s e. First-order convergence in steps."""
    m, s = 1.5, .3
    velocity = lambda x, t, text, camera: (lambda t: ((t - (1 - t) * s ** 2) * (x - (1 - t) * m)
                                                      / ((1 - t) ** 2 * s ** 2 + t ** 2) - m))(t[..., None, None, None])
    eps = torch.randn(64, 2, 1, 1, 1, dtype=torch.float64)
    end = lambda n: sample_clip(velocity, eps, None, None, schedule(n, 1.0))
    errors = [(end(n) - (m + s * eps)).abs().max() for n in (50, 100, 200)]
    assert errors[2] < .02 and 1.6 < errors[0] / errors[1] < 2.4 and 1.6 < errors[1] / errors[2] < 2.4
    first = torch.full((64, 1, 1, 1, 1), 7., dtype=torch.float64)
    assert torch.equal(sample_clip(velocity, eps, None, None, schedule(4, 1.0), first)[:, :1], first)


def test_presets_have_wans_size_and_nano_fits_its_checkpoint():
    size = {k: sum(p.numel() for n, p in DiT(cfg).named_parameters() if 'camera' not in n) for k, cfg in
            [(k, PRESETS[k]) for k in ('nano', 'small')]}
    assert 1e6 < size['nano'] < 4e6 and 2 * size['small'] < 8e6
    with torch.device('meta'):
        assert sum(p.numel() for n, p in DiT(PRESETS['wan-1.3b']).named_parameters() if 'camera' not in n) == 1418996800


def test_checkpoints_round_trip_and_reject_what_they_are_not(tmp_path):
    model, path = tiny_model(), str(tmp_path / 'a.safetensors')
    save_model(path, model.state_dict(), model.cfg, stage='ar', step=3)
    again, header = load_model(path)
    assert header['stage'] == 'ar' and again.cfg == model.cfg
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    whole = open(path, 'rb').read()
    open(path, 'wb').write(whole[:len(whole) // 2])
    with pytest.raises(BadInput, match='truncated'):
        load_model(path)
    torch.save(model.state_dict(), path)
    with pytest.raises(BadInput, match='pickle'):
        load_model(path)
    with pytest.raises(BadInput, match='no such file'):
        load_model(str(tmp_path / 'b.safetensors'))
    save_model(path, model.state_dict(), dataclasses.replace(model.cfg, dim=96))
    with pytest.raises(BadInput, match='do not fit its config'):
        load_model(path)


def test_a_checkpoint_from_before_first_chunk_had_its_name_still_loads(tmp_path):
    model, path = tiny_model(chunk=4, first_chunk=4), str(tmp_path / 'a.safetensors')
    config = dataclasses.asdict(model.cfg)
    config['first'] = config.pop('first_chunk')
    save_tensors(path, model.state_dict(), {'model': config, 'stage': 'ar', 'step': 3})
    assert load_model(path)[0].cfg == model.cfg


@pytest.mark.parametrize('dtype, near', [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_rms_norm_is_torchs(dtype, near):
    g = torch.Generator().manual_seed(0)
    x, up, norm = torch.randn(2, 5, 48, generator=g), torch.randn(2, 5, 48, generator=g), RMSNorm(48, 1e-6)
    norm.weight.data = torch.randn(48, generator=g)
    grads = []
    exact = lambda x: functional.rms_norm(x, (48,), norm.weight, 1e-6)
    for f, x in ((norm, x.to(dtype).requires_grad_()), (exact, x.clone().requires_grad_())):
        y = f(x)
        grads.append((y, *torch.autograd.grad(y, (x, norm.weight), up.to(y.dtype))))
    for ours, theirs in zip(*grads):
        assert (ours.float() - theirs).norm() < near * theirs.norm()


def test_ema_optimizers_and_learning_rate():
    model = tiny_model()
    ema = {k: torch.zeros_like(v) for k, v in model.state_dict().items()}
    update_ema(ema, model, .9, 10 ** 6)
    torch.testing.assert_close(ema['head.head.weight'], .1 * model.head.head.weight.detach())
    update_ema(ema, model, .9, 0)                              # at first it forgets its start: 1/10, not .9
    torch.testing.assert_close(ema['head.head.weight'], .91 * model.head.head.weight.detach())
    adam, muon = make_optimizers(model, 1e-3, True, (.9, .99), torch.float32)
    count = lambda o: sum(len(g['params']) for g in o.param_groups)
    assert count(adam) + count(muon) == len(list(model.parameters())) and count(muon) == 2 * 10
    assert [learning_rate(s, 100, 1, 10, .5) for s in (0, 9, 49, 75, 99)] == pytest.approx([.1, 1, 1, .5, .02])


@pytest.mark.parametrize('dtype, near', [(torch.float32, 1e-5), (torch.bfloat16, 3e-3)])
def test_muon_against_singular_values(dtype, near):
    """Momentum, Nesterov, decay and scale as torch.optim.Muon has them, orthogonalised by an SVD in float64."""
    g = torch.Generator().manual_seed(0)
    shapes = (48, 32), (32, 48), (48, 32), (32, 32)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in shapes]
    opt, want, momentum = Muon(weights, .01, .01, dtype), [w.detach().double() for w in weights], [0.] * 4
    for _ in range(5):
        for i, w in enumerate(weights):
            w.grad = torch.randn(w.shape, generator=g)
            momentum[i] = .95 * momentum[i] + .05 * w.grad.double()
            U, S, V = torch.linalg.svd(.05 * w.grad.double() + .95 * momentum[i], full_matrices=False)
            S = S / S.pow(4).sum() ** .25
            for a, b, c in NEWTON_SCHULZ:
                S = a * S + b * S ** 3 + c * S ** 5
            assert ((S > .72) & (S < 1.28))[S > 0].float().mean() > .95
            want[i] = want[i] * (1 - 1e-4) - .01 * .2 * max(w.shape) ** .5 * (U * S) @ V
        opt.step()
    for ours, theirs in zip(weights, want):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=near)                # they move by .05


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('rank, size', [(1, 1e-3), (2, 1e-3), (24, 1e-3), (24, 1e-8), (24, 1e-11), (24, 1e-13),
                                        (24, 1e-20), (24, 1e-35)])
def test_muon_bounds_its_step_whatever_the_rank_and_size(rank, size, dtype):
    """The first polynomial is steep at 1, where the one singular value of rank 1 lies: rounding must not lead beyond.
    Nor must a gradient that dies out, as a layer's does that attends to one word alone."""
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        w = torch.nn.Parameter(torch.zeros(48, 64))
        w.grad = size * torch.randn(48, rank, generator=g) @ torch.randn(rank, 64, generator=g)
        Muon([w], 1.0, 0.0, dtype).step()
        assert torch.linalg.svdvals(w.detach().double()).max() < 1.5 * .2 * 64 ** .5


def test_cache_refuses_to_overflow():
    cache = KVCache(TINY, 1, 2, 4, 'cpu')
    cache.end = 2
    with pytest.raises(BadInput, match='a window of 2 frames is too small: use at least 3'):
        cache.prepare(1, None)


@pytest.mark.parametrize('preset', ['nano', 'small'])
def test_gate_passes_and_fails_by_the_committed_thresholds(preset):
    with open(os.path.join(ROOT, 'expected', f'{preset}.json')) as f:
        expected = json.load(f)
    stages = expected.keys() - {'hints', 'clips'}
    assert stages >= {'base', 'camera', 'ar', 'ode', 'dmd'}
    for stage in stages:
        x = expected[stage]
        assert x['curve'] and x['thresholds'] and x['command']
        assert gate(stage, preset, x['metrics']).startswith('gate: PASS')
        low_is_good = lambda name: 'loss' in name or name == 'fd' or name.startswith('to end')
        worse = {k: v + 10 if low_is_good(k) else v - 10 for k, v in x['metrics'].items()}
        line = gate(stage, preset, worse)
        assert line.startswith('gate: FAIL') and '\n  ' in line
    assert 'the walk drifts' in gate('ode', 'small', {'psnr@7, 1 step': 0.})
    assert 'blur' in gate('ode', 'small', {'to end, t 1.00': 1.})
    assert 'none for preset' in gate('ar', 'wan-14b', {})
