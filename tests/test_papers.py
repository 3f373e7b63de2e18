"""The papers' ideas against plain versions of themselves."""
import math

import pytest
import torch
from einops import rearrange

from camera import Camera, relative
from model import KVCache, causal_mask, chunk_ids, encoder_inputs, rollout, rotary_table, sinusoid
from papers import riflex
from papers.scd import KINDS, begin_with_both_ends, concatenate, guide_the_decoder_alone, noise_context
from test_cache import scene
from test_model import tiny_model
from test_split import split_model


def test_the_concatenating_decoder_reads_context_and_frame_side_by_side():
    """SCD: each chunk on its own, twice the tokens at the same places and times; the frame's half is kept."""
    for chunk, camera in ((1, 'plucker'), (2, 'prope')):
        model, F = split_model(chunk=chunk, camera=camera), 5
        own = chunk_ids(F, chunk)
        c2w, K, text, noise = scene(F, 4, 4)
        cam = Camera(relative(c2w), K)
        x, t = noise(F), torch.rand(2, F)
        inputs = encoder_inputs(model.cfg, noise(F), torch.rand(2, F), cam)
        past, t_past, camera, mask, pos = inputs.values()
        with torch.no_grad():
            args = past, t_past, text, model.embed_camera(camera, 4, 4), mask, pos, None, F + 1
            tokens, _ = model.run_blocks(range(2), *args)
            context = model.context_norm(torch.cat([tokens[:, -1:], tokens[:, 1:-1]], 1))
            want = torch.zeros_like(x)
            for i in range(int(own.max()) + 1):
                here = (own == i).nonzero().flatten()
                part = Camera(cam.c2w[:, here], cam.K[:, here], move=cam.move[:, here])
                c = model.embed_camera(part, 4, 4)
                n = len(here)
                patches = rearrange(x[:, here], 'b f c (h p) (w q) -> b f (h w) (c p q)', p=2, q=2)
                y = patches @ model.patch_embedding.weight.flatten(1).T + model.patch_embedding.bias
                e = model.time_embedding(sinusoid(t[:, here], 256))
                if c.tokens is not None:
                    y, e = y + c.tokens, e + c.time
                e0 = model.time_projection(e).unflatten(-1, (6, -1))
                y = torch.cat([context[:, here], y], 1)
                table = rotary_table(tuple(here.tolist()) * 2, 2, 2, 24, 'cpu')
                prope = None if c.prope is None else torch.cat([c.prope] * 2, 1)
                words = model.text_embedding(text)
                for layer in (2, 3):
                    y = model.blocks[layer](y, torch.cat([e0, e0], 1), words, table, prope, None, None, layer, 2 * n)
                out = model.head(y[:, n:], e)
                want[:, here] = rearrange(out, 'b f (h w) (p q c) -> b f c (h p) (w q)', h=2, p=2, q=2)
            concatenate(model)
            got = model(x, t, text, cam, causal_mask(own), context=inputs)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_noise_on_the_context_is_for_training_only():
    model = split_model()
    x, t, text = torch.randn(1, 3, 16, 4, 4), torch.rand(1, 3), torch.randn(1, 4, 8)
    clean = model.encode(x, t, text, None)
    noise_context(model, .05)
    with torch.no_grad():
        torch.testing.assert_close(model.encode(x, t, text, None), clean)
    noisy = model.encode(x, t, text, None)
    error = torch.linalg.solve(model.context_embedding.weight, (noisy - clean).detach().mT)
    assert abs(error.std().item() - .05) < .005


def test_guidance_of_the_decoder_alone():
    """Both branches have the conditioned context; the camera is dropped in the decoder only."""
    model, seen = split_model(camera='plucker+prope'), []
    guide_the_decoder_alone(model)
    model.register_forward_hook(lambda m, args, options, v: seen.append(options['context']), with_kwargs=True)
    c2w, K, text, noise = scene(3, 4, 4)
    cameras = [Camera(c2w[:, i:i + 1], K[:, i:i + 1]) for i in range(3)]
    plain = split_model(camera='plucker+prope')
    with torch.no_grad():
        list(rollout(model, cameras, text, torch.tensor([1., 0]), noise, torch.ones(2, 1, 16, 4, 4), guidance=2.))
        camera = Camera(relative(c2w[:, :2]), K[:, :2])
        want = plain.encode_clip(text, encoder_inputs(plain.cfg, torch.ones(2, 2, 16, 4, 4), torch.zeros(2, 2), camera))
    assert torch.equal(seen[0][:2], seen[0][2:])
    torch.testing.assert_close(seen[0][:2], want[:, 1:], rtol=0, atol=1e-5)


def test_a_decoder_that_begins_with_both_ends():
    model = split_model()
    first, last = (dict(model.blocks[i].state_dict()) for i in (0, 3))
    begin_with_both_ends(model)
    for got, want in ((model.blocks[2], first), (model.blocks[3], last)):
        assert all(torch.equal(x, want[name]) for name, x in got.state_dict().items())
    assert set(KINDS) >= {'dense', '4+2', '4+2 concat'}


# RIFLEx

def test_riflex_lowers_one_frequency_until_its_period_exceeds_the_frames():
    theta = riflex.frequencies(12)
    periods = [2 * math.pi * 10000 ** (2 * (k - 1) / 24) for k in range(1, 13)]
    torch.testing.assert_close(2 * math.pi / theta, torch.tensor(periods, dtype=torch.float64))
    assert periods[0] < riflex.TRAINED < periods[1] < riflex.LENGTHS[0] < riflex.LENGTHS[1] < periods[2]
    lowered = riflex.lower(theta, 2, 27)
    assert (2 * math.pi / lowered[1]).item() == pytest.approx(27 / .9)
    assert (lowered == theta).tolist() == [k != 2 for k in range(1, 13)]
    for k in range(1, 13):                                     # it never raises one; within trained frames it is idle
        assert (riflex.lower(theta, k, 27) <= theta).all()
    assert torch.equal(riflex.lower(theta, 2, riflex.TRAINED), theta) and theta[1] == 10000 ** (-1 / 12)


def test_riflex_turns_the_frame_axis_alone():
    """Token by token, in float64: an angle of position times theta for the frame, Wan's for row and column."""
    pos, h, w, Dh = (0, 3, 26), 2, 3, 64
    theta = riflex.lower(riflex.frequencies(12), 2, 27)
    want = torch.zeros(3, h, w, 32, dtype=torch.complex128)
    for f, place in enumerate(pos):
        for i in range(h):
            for j in range(w):
                angles = [place * x for x in theta.tolist()]
                angles += [p * 10000 ** (-n / 10) for p in (i, j) for n in range(10)]
                want[f, i, j] = torch.tensor([complex(math.cos(a), math.sin(a)) for a in angles])
    got = riflex.turned(theta, pos, h, w, Dh, 'cpu')
    torch.testing.assert_close(got.to(want), want.view(18, 1, 32), rtol=0, atol=1e-6)
    plain = riflex.turned(riflex.frequencies(12), pos, h, w, Dh, 'cpu')
    torch.testing.assert_close(plain, rotary_table(pos, h, w, Dh, 'cpu'), rtol=0, atol=1e-6)


def test_riflex_reaches_the_network_and_the_sink_and_is_taken_back():
    model = tiny_model(camera='none')
    theta = riflex.frame_frequencies(model.cfg)
    x, t, text = torch.randn(1, 3, 16, 4, 4), torch.rand(1, 3), torch.randn(1, 4, 8)
    Dh = model.cfg.dim // model.cfg.num_heads
    with torch.no_grad():
        plain = model(x, t, text)
        with riflex.use(riflex.lower(theta, 1, 27)):
            assert not torch.equal(model(x, t, text), plain)
            torch.testing.assert_close(model(x[:, :1], t[:, :1], text), model(x[:, :1], t[:, :1], text, pos=[5]))
            turn = KVCache(model.cfg, 1, 2, 4, 'cpu').turn(7, Dh, 'cpu')
            assert turn[0, 0, 0].angle().item() == pytest.approx(7 * .9 * 2 * math.pi / 27, abs=1e-5)
        assert torch.equal(model(x, t, text), plain)


def test_riflex_finds_when_a_video_comes_back():
    pictures = torch.rand(2, 5, 2, 2, 3)
    got = riflex.by_lag(riflex.differences(pictures))
    for n in range(2):
        for lag in range(5):
            pairs = [(pictures[n, i] - pictures[n, i + lag]).square().mean().sqrt() for i in range(5 - lag)]
            torch.testing.assert_close(got[n, lag], sum(pairs) / len(pairs))

    def loop(period, F=27):                                    # of frames on a circle
        return [abs(math.sin(math.pi * lag / period)) for lag in range(F)]
    assert [riflex.first_return(loop(period)) for period in (10, 13.5, 20)] == [10, 13, 20]
    assert riflex.first_return(loop(6.28)) == 13               # not within the trained frames
    assert riflex.first_return(loop(60)) is None
    shallow = [1 - .1 * (lag == 14) for lag in range(27)]
    assert riflex.first_return(shallow) is None
