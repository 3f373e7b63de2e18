"""On a GPU: the same numbers as on a CPU. Skipped where there is none."""
import dataclasses
import re

import pytest
import torch

from backbones.flex import flex_frame_attention
from camera import Camera, keys_to_poses
from common import find_preset, shard
from data import Batch, Draws, embed_text, noise_for, to_device
from model import (attention, chunk_ids, dense_attention, masked_attention,
                   rollout_clip, schedule, teacher_forcing_mask)
from train_ar import Config, loss_fn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA here')


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_flex_attention_equals_the_dense_and_the_cpus(dtype, tolerance):
    """Forward and backward, against float64 on the CPU, relative to the largest value."""
    torch.manual_seed(0)
    mask = teacher_forcing_mask(chunk_ids(9, 1))
    q, k, v, g = torch.randn(4, 2, len(mask) * 64, 3, 64, dtype=torch.float64).to(dtype).double()
    want = q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    exact = [dense_attention(*want, mask)]
    exact += torch.autograd.grad(exact[0], want, g)
    for path in (flex_frame_attention, masked_attention, attention):
        x = [a.detach().to('cuda', dtype).requires_grad_() for a in (q, k, v)]
        got = [path(*x, mask)]
        got += torch.autograd.grad(got[0], x, g.to('cuda', dtype))
        for a, b in zip(got, exact):
            assert (a.cpu().double() - b).abs().max() < tolerance * b.abs().max(), path.__name__


@pytest.mark.parametrize('queries', [4, 36])
def test_unmasked_attention_equals_float64(queries):
    """By flash-attn where it is installed: also fewer queries than keys, as a cached step has."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 36, 3, 64, dtype=torch.float64).bfloat16()
    q = q[:, :queries]
    got = attention(q.cuda(), k.cuda(), v.cuda()).cpu().double()
    want = attention(q.double(), k.double(), v.double())
    assert (got - want).abs().max() < 2e-2 * want.abs().max()


def network(sink=True, preset='tiny'):
    torch.manual_seed(0)
    model = dataclasses.replace(find_preset(preset), sink=sink).build()
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=.1)
    return model.eval()


def a_batch():
    c2w, K = keys_to_poses('w*4,wl*4').expand(2, -1, -1, -1), torch.tensor([.5, .5, .5, .5]).expand(2, 9, 4)
    noise = noise_for([0, 1], (16, 8, 8), 'cpu')
    text = embed_text(['red walls', 'night sky'], 16, 64)
    return Batch(noise(9), Camera(c2w, K), text, noise(9), Draws(torch.rand(2, 22)), ('', ''))


@pytest.mark.parametrize('preset', ['tiny', 'hy-tiny'])
def test_a_training_loss_and_its_gradient_equal_the_cpus(preset):
    model, batch, results = network(preset=preset), a_batch(), []
    name, = [name for name, _ in model.named_parameters() if re.search(r'blocks\.0\..*attn[._]q\.weight', name)
             and not re.search('cross|txt', name)]
    for device in ('cpu', 'cuda'):
        model.to(device).zero_grad()
        loss = loss_fn(model, Config(), to_device(batch, device))[0]
        loss.backward()
        results.append((loss.item(), model.get_parameter(name).grad.cpu()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    assert (results[0][1] - results[1][1]).norm() < 1e-3 * results[0][1].norm()


@pytest.mark.parametrize('preset', ['tiny', 'hy-tiny'])
def test_compiled_blocks_give_the_same_loss_and_gradient(preset):
    model, batch, results = network(preset=preset).cuda(), to_device(a_batch(), 'cuda'), []
    for compiled in (False, True):
        net = shard(model, 'ddp', compiled=compiled)
        net.zero_grad()
        with torch.autocast('cuda', torch.bfloat16):
            loss = loss_fn(net, Config(), batch)[0]
        loss.backward()
        results.append((loss.item(), [p.grad.clone() for p in net.parameters() if p.grad is not None]))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-2)
    for a, b in zip(results[0][1], results[1][1]):
        assert (a - b).norm() < 3e-2 * a.norm() + 1e-6


@pytest.mark.parametrize('sink, preset', [(False, 'tiny'), (True, 'tiny'), (True, 'hy-tiny')])
def test_a_rollout_equals_the_cpus(sink, preset):
    """Twenty frames: the window fills and is encoded again, or with a sink rolls on."""
    model, c2w = network(sink, preset), keys_to_poses('w*9,wl*10')[None]
    K = torch.tensor([.5, .5, .5, .5]).expand(1, 20, 4)
    text, videos = embed_text(['red walls'], 16, 64), []
    for d in ('cpu', 'cuda'):
        noise = noise_for([0], (16, 8, 8), d)
        video = rollout_clip(model.to(d), c2w.to(d), K.to(d), text.to(d), schedule(4, 4.), noise, window=9)
        videos.append(video.detach().cpu())
    assert (videos[0] - videos[1]).abs().max() < 1e-3 * videos[0].abs().max()
