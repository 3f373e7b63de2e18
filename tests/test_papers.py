"""The papers' ideas against plain versions of themselves. (data_uncertainty: tests/test_data_uncertainty.py)"""
import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
from einops import rearrange

from camera import Camera, intrinsics, make_pose, moves, rays, relative
from common import load_model, save_model
from data import Batch, Draws, decode, encode
from model import (KVCache, add_noise, causal_mask, chunk_ids, encoder_inputs, rollout, rollout_clip, rotary_table,
                   schedule, sinusoid)
from papers import analytic_precond, bridge, calibration, ddo, riflex
from papers.analytic_precond import (CTM, TIMES, coefficients, error, evaluate, fit, follow, given, mean_slope,
                                     segment_loss)
from papers.scd import KINDS, begin_with_both_ends, concatenate, guide_the_decoder_alone, noise_context
from test_cache import scene
from test_distill import Gaussian
from test_distill import batch as random_batch
from test_model import tiny_model
from test_split import split_model

# -----------------------------------------------------------------------------
# SCD

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


# -----------------------------------------------------------------------------
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


# -----------------------------------------------------------------------------
# calibration

def test_intervals_hold_the_truth_as_often_as_they_should():
    """Calibration: against a loop; and if truth and samples are of one distribution, however odd, the error is 0."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(20, 200_000, generator=generator).exp() * torch.rand(200_000, generator=generator) ** 4
    held = calibration.coverage(draws[:-1], draws[-1])
    for i in range(200):
        ordered = sorted(draws[:-1, i].tolist())
        want = [ordered[j - 1] <= draws[-1, i].item() <= ordered[19 - j] for j in range(1, 10)]
        assert held[:, i].tolist() == want
    assert calibration.coverage_error(held.mean(1)) < .003
    torch.testing.assert_close(held.mean(1), torch.arange(9, 0, -1) / 10, rtol=0, atol=.005)
    shares = torch.tensor([.85, .5, .15])                                 # too wide and too narrow do not cancel
    torch.testing.assert_close(calibration.coverage_error(shares), torch.tensor(.2 / 3))
    held = calibration.coverage(draws[:3], draws[3])                      # three samples, one interval
    assert held.shape == (1, 200_000) and calibration.coverage_error(held.mean(1)) < .003


def over_confident(factors, seed=0):
    """Samples (19, n, F, 16, 16, 3) whose deviations are the truth's (n, F, 16, 16, 3) divided by factors (n, F)."""
    generator = torch.Generator().manual_seed(seed)
    n, F = factors.shape
    centre = torch.randn(n, F, 16, 16, 3, generator=generator)
    draws = torch.randn(20, n, F, 16, 16, 3, generator=generator)
    return centre + draws[:-1] / factors.view(n, F, 1, 1, 1), centre + draws[-1]


def test_the_temperature_is_found_frame_by_frame():
    factors = torch.tensor([[1., 3., .5]]).repeat(8, 1)
    samples, truth = over_confident(factors)
    T = calibration.fit_temperature(samples, truth)
    size = 1 / factors[0]                                                 # of the samples; their mean is off as well
    want = ((1 + size ** 2 / 19) / (1 + 1 / 19)) ** .5 / size
    torch.testing.assert_close(T, want, rtol=.07, atol=0)
    before = calibration.error_by_frame(samples, truth)
    after = calibration.error_by_frame(calibration.temper(samples, T.view(-1, 1, 1, 1)), truth)
    assert before[0] < .02 and before[1] > .25 and before[2] > .15 and after.max() < .02
    mean = samples.mean(0)
    hot = calibration.temper(samples, torch.tensor([1., 2, 3]).view(-1, 1, 1, 1))
    torch.testing.assert_close(hot.mean(0), mean, rtol=0, atol=1e-5)
    torch.testing.assert_close((hot - mean)[:, :, 2], 3 * (samples - mean)[:, :, 2], rtol=0, atol=1e-5)


def test_what_is_measured_of_walks():
    """T is fitted on every second world and tested on the others; the last walk plays the truth, and is no sample."""
    factors = torch.tensor([[1., 3.]]).repeat(8, 1)
    factors[1::2] = 1                                                     # these worlds need no temperature
    samples, truth = over_confident(factors)
    walks = torch.cat([samples, samples[:1] + 100]).movedim(0, 1)         # the last is far out
    walks, truth = (torch.cat([torch.zeros_like(x[..., :1, :, :, :]), x], -4) for x in (walks, truth))
    spread = torch.zeros(8, 3, 16, 16)
    spread[:, 1:] = ((samples - samples.mean(0)).square().sum(0) / 18).sqrt().sum(-1)
    seen = (spread < spread.flatten(2).median(-1).values.mean(0)[:, None, None]).float()
    found = dict(walks=walks, truth=truth, seen=seen, contrast=torch.rand(8, 3, 16, 16))
    with mock.patch.object(calibration, 'WORLDS', range(8)):
        row = calibration.measure(found)
    torch.testing.assert_close(row['T of half of the worlds'], torch.tensor([1., 2.93]), rtol=.07, atol=0)
    assert row['error of the others'].max() < .02 and row['at this T'][0] < .02 and row['at this T'][1] > .2
    assert (row['coverage error'] - torch.tensor([0, .14])).abs().max() < .02
    assert row['if a walk is the truth'].min() > .49                      # no interval holds it
    assert abs(row['90 % hold'][0] - .9) < .02
    assert row['AUROC of spread'].min() == 1 and (row['of contrast'] - .5).abs().max() < .1
    assert len(row['errors']) == len(row['aurocs']) == 300
    assert abs(row['errors'].mean() - row['coverage error'].mean()) < .02


def test_auroc_is_the_share_of_pairs_in_the_right_order():
    """Frame by frame over all worlds, the blocks that frame 0 showed in part left out."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(2, 3, 8, 8, generator=generator)
    seen = torch.rand(2, 3, 8, 8, generator=generator)
    got = calibration.novelty_auroc(spread, seen)
    for frame in range(3):
        value, share = spread[:, frame].flatten().tolist(), seen[:, frame].flatten().tolist()
        new = [x for x, y in zip(value, share) if y < .1]
        known = [x for x, y in zip(value, share) if y > .9]
        assert abs(got[frame] - sum(a > b for a in new for b in known) / len(new) / len(known)) < 1e-6


def test_walks_of_one_world_differ_in_their_noise_alone():
    """And what they are compared with: the truth as latents have it, block by block."""
    cfg = calibration.Config(ckpt='checkpoints/dmd.safetensors', steps=1, device='cpu')
    model, header, codec, _ = calibration.prepare(cfg)
    asked, videos, real = [], [], calibration.generate

    def generate(*args):
        asked.append(args)
        videos.append(real(*args))
        return videos[-1]
    small = mock.patch.multiple(calibration, K=3, FRAMES=3, SHOWN=[1, 2], generate=generate)
    with small:
        kept = calibration.walk_often(cfg, model, header, codec, 64)
    c2w, K, captions, first, noise = asked[0][4:]
    assert len(set(captions)) == 1 and all((x == x[:1]).all() for x in (c2w, K, first))
    draws = noise(1)
    assert len({x.sum().item() for x in draws}) == 4
    world, _ = calibration.held_out(cfg, header, [64], 3)
    truth = codec.decode(codec.encode(world['frames']))[0]
    torch.testing.assert_close(kept['truth'][2, 3, 5], truth[2, 24:32, 40:48].mean((0, 1)))
    torch.testing.assert_close(kept['walks'][2, 0], kept['truth'][0], rtol=0, atol=1e-5)
    assert (kept['walks'][0, 1] - kept['walks'][1, 1]).abs().max() > 1e-3
    assert kept['seen'][0].min() > .99 and 0 < kept['seen'][2].mean() < 1
    want = truth[1:, 24:32, 40:48].var((1, 2), correction=0).sum(-1)
    torch.testing.assert_close(kept['contrast'][1:, 3, 5], want, rtol=.01, atol=1e-6)
    assert torch.equal(kept['shown'][0], truth[1:]) and kept['shown'].shape == (4, 2, 128, 128, 3)
    three = videos[0][:3, 1:]
    mean = three.sum(0) / 3
    torch.testing.assert_close(kept['shown'][2], 4 * ((three - mean).square().sum(0) / 2).sqrt(), rtol=0, atol=1e-5)
    torch.testing.assert_close(kept['shown'][3], 4 * (mean - truth[1:]).abs(), rtol=0, atol=1e-5)


# -----------------------------------------------------------------------------
# Analytic-Precond

def test_without_slope_the_coefficients_are_ctms_and_no_jump_moves_nothing():
    times = schedule(48, 4.)[:-1].double()
    zero = torch.zeros(48, 2, 3).double()
    want = (times[None] / times[:, None])[..., None, None].expand(48, 48, 2, 3)
    torch.testing.assert_close(coefficients(times, zero, zero + 3), torch.stack([want, 1 - want]))
    f, g = coefficients(times, torch.rand_like(zero), torch.rand_like(zero) + .1)
    torch.testing.assert_close(f.diagonal(), torch.ones(2, 3, 48).double())
    assert not g.diagonal().any()


def test_for_gaussian_data_the_jump_is_the_exact_flow():
    """Rectified flow of N(mean, std^2): x_s = (1 - s) mean + sqrt(var_s / var_t) (x_t - (1 - t) mean). A student that
    knows the teacher's D at s lands there; its D - l x keeps its direction."""
    times = torch.logspace(0, -2, 600).double()
    mean, std = torch.tensor([2., -.5]).double(), torch.tensor([.3, 1.]).double()
    t = times[:, None]
    variance = (1 - t) ** 2 * std ** 2 + t ** 2
    l = (1 - t) * std ** 2 / variance
    offset = (1 - l * (1 - t)) * mean                                 # D = l x + offset
    f, g = coefficients(times, l[:, None], offset.abs()[:, None])[..., 0, :]
    x = torch.tensor([1.3, .2]).double()
    for i, j in ((0, 599), (0, 140), (140, 300), (300, 599)):
        at_s = (1 - t[j]) * mean + (variance[j] / variance[i]).sqrt() * (x - (1 - t[i]) * mean)
        torch.testing.assert_close(f[i, j] * x + g[i, j] * (l[j] * at_s + offset[j]), at_s, rtol=1e-4, atol=0)


def test_hutchinsons_trace_of_a_linear_network():
    torch.manual_seed(0)
    W = .1 * torch.randn(3, 64, 64).double() + torch.tensor([0., .5, 1.])[:, None, None] * torch.eye(64)

    def denoise(x, t):                                                # each frame by its own matrix
        return torch.einsum('fij,bfj->bfi', W, x.flatten(2)).view(x.shape)
    got = mean_slope(denoise, torch.zeros(4000, 3, 4, 4, 4).double(), 1).mean(0)
    want = W.diagonal(0, 1, 2).unflatten(1, (4, 16)).mean(2)
    torch.testing.assert_close(got, want, rtol=0, atol=.01)


def flow(x, t, s):
    """Where the ODE of Gaussian data goes from time t to time s: the same quantile."""
    teacher = Gaussian()
    deviation = [((1 - u) ** 2 * teacher.std ** 2 + u ** 2).sqrt() for u in (s, t)]
    return (1 - s) * teacher.mean + deviation[0] / deviation[1] * (x - (1 - t) * teacher.mean)


def test_a_gaussian_teacher_leaves_no_gap_under_its_own_coefficients(data, monkeypatch):
    """Its path is the exact flow, its slope is known, and what its student must know is its D at s."""
    monkeypatch.setattr(analytic_precond, 'CFG', replace(analytic_precond.CFG, frames=5))
    monkeypatch.setattr(analytic_precond, 'clips_128', lambda: data)
    teacher = Gaussian()
    denoise, noise = given('val', teacher)
    x, D = follow(denoise, noise)
    t = TIMES.view(-1, 1, 1, 1, 1, 1)
    torch.testing.assert_close(x, flow(noise, torch.ones(()), t), rtol=0, atol=3e-3)
    torch.testing.assert_close(D, teacher.x0(x, t), rtol=0, atol=1e-3)
    l = torch.stack([mean_slope(denoise, *state) for state in zip(x, TIMES)]).mean(1)
    want = (1 - t) * teacher.std ** 2 / ((1 - t) ** 2 * teacher.std ** 2 + t ** 2)
    torch.testing.assert_close(l, want.view(-1, 1, 1).expand(l.shape), rtol=0, atol=2e-3)
    for i, j in ((0, 12), (12, 24), (24, 36), (3, 9), (36, 45)):
        for axes in ((1, 2), (2,), (1,)):
            gaps = [error(lambda *_: D[j], x, i, j, table) for table in (fit(x, D, l, axes), CTM)]
            assert gaps[0] < .1 * gaps[1], (axes, i, j)
    to_0 = fit(x, D, l, (1, 2))[:, :-1, -1]                           # there is no choice: the student predicts D
    torch.testing.assert_close(to_0, CTM[:, :-1, -1], rtol=0, atol=2e-3)


def test_coefficients_that_a_frame_has_to_itself():
    x, D, l = torch.randn(49, 4, 2, 3, 2, 2), torch.randn(49, 4, 2, 3, 2, 2), torch.rand(49, 2, 3)
    table = fit(x, D, l, (2,))
    for frame in range(2):
        own = l[:, frame].mean(1)
        rest = D[:, :, frame] - own.view(-1, 1, 1, 1, 1) * x[:, :, frame]
        want = coefficients(TIMES, own[:, None, None], rest.flatten(1).square().mean(1).sqrt()[:, None, None])
        torch.testing.assert_close(table[..., frame, :], want[..., 0, :], rtol=1e-4, atol=1e-5)


class Jumper(Gaussian):
    """Knows, of Gaussian data, the D with which a jump by this table ends where the flow does."""

    def __init__(self, table):
        super().__init__(jump=True)
        self.table = table

    def end(self, x, t):
        i = (t.flatten(1)[:, 0, None] - TIMES).abs().argmin(1)        # (B,)
        j = (i // 12 * 12 + 12).clamp(max=48)
        f, g = self.table[:, i, j, ..., None, None]
        return (flow(x, t, TIMES[j].view(-1, 1, 1, 1, 1)) - f * x) / g.clamp(min=1e-6)


def test_the_student_that_hits_the_flow_has_no_loss_and_no_distance(data, monkeypatch):
    cfg = replace(analytic_precond.CFG, frames=5)
    monkeypatch.setattr(analytic_precond, 'CFG', cfg)
    monkeypatch.setattr(analytic_precond, 'clips_128', lambda: data)
    half = torch.full((49, 5, 16), .5)
    for table in (CTM, coefficients(TIMES, half, half * TIMES.view(-1, 1, 1))):
        student, teacher, batch = Jumper(table), Gaussian(), random_batch(B=64)
        x = torch.randn(8, 5, 16, 4, 4)
        path = torch.stack([flow(x, torch.ones(()), t) for t in TIMES])
        assert max(evaluate(student, path, table).values()) < 1e-3
        assert min(evaluate(teacher, path, table).values()) > .01
        more = batch, teacher, student.__call__, table                # the average is a function, as in distill_ode
        loss, errors, t = segment_loss(student, cfg, *more)
        assert loss < 1e-4 < .01 * segment_loss(teacher, cfg, *more)[0]
        assert errors.shape == t.shape == (64, 5)


# -----------------------------------------------------------------------------
# bridge

def bridge_scene():
    """x0, y, z (2, 3, 16, 64, 64), float64, with y off by .3; times t > r (2, 3); the bridge."""
    g = torch.Generator().manual_seed(3)
    x0, z, e = torch.randn(3, 2, 3, 16, 64, 64, generator=g, dtype=torch.float64)
    t = .05 + .9 * torch.rand(2, 3, generator=g, dtype=torch.float64)
    return x0, x0 + .3 * e, z, t, t * torch.rand(2, 3, generator=g, dtype=torch.float64), bridge.Bridge(.3)


def test_states_of_one_bridge_are_steps_of_its_ode():
    """CBT: with the same z, a step of the ODE with the true x0 leads from one state to the other. The step is CDBM's
    Eq. 16, for alpha 1 and rho^2 = size^2 t, and DBIM's without noise (eta 0)."""
    x0, y, z, t, r, process = bridge_scene()
    x_t, x_r = process.state(x0, y, z, t), process.state(x0, y, z, r)
    t, r = t[..., None, None, None], r[..., None, None, None]
    rho_T2 = torch.tensor(.3 ** 2, dtype=torch.float64)
    rho_t, rho_r = (rho_T2 * t).sqrt(), (rho_T2 * r).sqrt()
    bar_t, bar_r = (rho_T2 - rho_t ** 2).sqrt(), (rho_T2 - rho_r ** 2).sqrt()

    def eq16(x, x0):
        of_x0 = bar_r ** 2 - bar_t * rho_r * bar_r / rho_t
        of_y = rho_r ** 2 - rho_t * rho_r * bar_r / bar_t
        return rho_r * bar_r / (rho_t * bar_t) * x + (of_x0 * x0 + of_y * y) / rho_T2

    def dbim(x, x0):
        coefficients = []
        for s in (t, r):
            one, none = torch.ones_like(x0), torch.zeros_like(x0)
            s = s[..., 0, 0, 0]
            coefficients.append([process.state(*units, s) for units in
                                 ((none, one, none), (one, none, none), (none, none, one))])
        (a, b, c), (A, B, C) = coefficients
        return C / c * x + (B - b * C / c) * x0 + (A - a * C / c) * y
    for step in (eq16, dbim):
        torch.testing.assert_close(step(x_t, x0), x_r, rtol=0, atol=1e-10)
    torch.testing.assert_close(eq16(x_t, z), dbim(x_t, z), rtol=0, atol=1e-10)


def test_the_network_is_told_how_far_a_state_is_from_its_frame():
    """What it gets is (1 - time) x0 + time e with an e of size 1, as in flow matching; at t = 0 it is not needed."""
    x0, y, z, t, _, process = bridge_scene()

    def oracle(x, time):
        time = time[..., None, None, None]
        e = (x - (1 - time) * x0) / time
        assert (e.square().mean((2, 3, 4)).sqrt() - 1).abs().max() < .02
        return e - x0
    for process, guess in ((process, y), (bridge.FromNoise(), None)):
        x = process.state(x0, guess, z, t)
        torch.testing.assert_close(process.predict(oracle, x, t), x0)
        x = process.state(x0, x0 if guess is None else y, z, 0 * t)
        assert torch.equal(process.predict(lambda x, t: torch.ones_like(x), x, 0 * t), x0)


def test_consistency_pairs_share_their_noise(monkeypatch):
    """Both networks see the same y and z, at t and at share t; the target is x0 for share 0, and has no gradient."""
    x0, y, z, _, _, process = bridge_scene()
    model, average = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    model.cfg = tiny_model().cfg
    u = torch.rand(2, 10, dtype=torch.float64)
    batch = Batch(x0, Camera(torch.eye(4).expand(2, 3, 4, 4), None), None, z, Draws(u), ())
    calls = []

    def stub(net, cfg, past, x, t, level):
        calls.append((net, x, t, past.x0, level))
        return 0 * x + (net is model) * net.weight.double()
    monkeypatch.setattr(bridge, 'teacher_forced', stub)
    def guess(latents, move, K):
        level = .3 * u[:, 7:, None, None, None]
        torch.testing.assert_close(latents, ((1 - level) * x0 + level * z)[:, [2, 0, 1]])
        return y
    for share in (.75, 0):
        calls.clear()
        loss, _, _ = bridge.consistency_loss(model, average, process, guess, batch, share)
        t = 4 * u[:, :3] / (1 + 3 * u[:, :3])                 # shift 4
        want = []
        for net, time in ((average, share * t), (model, t)):
            n = .3 * time.sqrt()
            want.append((net, process.state(x0, y, z, time) / (1 + n)[..., None, None, None], n / (1 + n)))
        for (net, x, time, past, level), (want_net, want_x, want_time) in zip(calls, want, strict=True):
            assert net is want_net and torch.equal(past, calls[0][3]) and torch.equal(level, calls[0][4])
            torch.testing.assert_close((x, time), (want_x, want_time))
        (_, target, _), (_, x, time) = want
        jumped = x - time[..., None, None, None] * model.weight.item()
        torch.testing.assert_close(loss, (jumped - target)[:, 1:].square().mean())
        if share == 0:
            torch.testing.assert_close(target, x0)
        model.zero_grad()
        loss.backward()
        assert model.weight.grad is not None and average.weight.grad is None


def test_a_bridge_from_noise_walks_like_the_recipe():
    model = tiny_model(sink=True)
    F = 6
    c2w, K, text, _ = scene(F, 4, 4)
    first = torch.randn(2, 1, 16, 4, 4)

    def noise():
        g = torch.Generator().manual_seed(5)
        return lambda n: torch.randn(2, n, 16, 4, 4, generator=g)
    args, options = (model, c2w, K, text, schedule(2, model.cfg.shift)), dict(window=4, context=.1)
    got = bridge.follow(bridge.FromNoise(), bridge.unchanged, *args, noise(), first, **options)
    with torch.no_grad():
        want = rollout_clip(*args, noise(), first, renoise=True, **options)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_guesses_are_made_of_the_frame_before():
    """Without a network every frame is its guess, from what came out before and the move from there."""
    model = tiny_model(sink=True)
    c2w, K, text, noise = scene(4, 4, 4)
    first, seen = torch.randn(2, 1, 16, 4, 4), []

    def guess(latents, move, K):
        seen.append(move)
        return latents + 1
    got = bridge.follow(None, guess, model, c2w, K, text, schedule(0, 4), noise, first, window=9, context=.1)
    torch.testing.assert_close(got - first, torch.arange(4.).view(1, 4, 1, 1, 1).expand_as(got))
    torch.testing.assert_close(torch.cat(seen, 1), moves(c2w)[:, 1:])


def test_the_warp_shows_a_ball_from_inside():
    """Waves on the inside of a ball around the new pose: the frame before sees them from elsewhere, and warped it shows
    what the new pose sees."""
    K = intrinsics(90, 1).expand(1, 2, 4)
    c2w = make_pose(torch.tensor([[.5, -.2, -.6], [0., 0, 0]]), torch.tensor([-8., 4]), torch.tensor([5., 0]))[None]
    origin, direction = rays(c2w, K, 64, 64)
    origin = origin[:, :, None, None].expand_as(direction)
    along = (origin * direction).sum(-1)
    distance = -along + (along ** 2 - origin.square().sum(-1) + bridge.DISTANCE ** 2).sqrt()
    point = origin + distance[..., None] * direction          # of the ball
    picture = .5 + .3 * torch.sin(2 * point)
    guess = bridge.warped(encode(picture[:, :1]), moves(c2w)[:, 1:], K[:, 1:])
    inside = slice(20, 44)
    error, still = ((x - picture[0, 1])[inside, inside].abs().mean() for x in (decode(guess)[0, 0], picture[0, 0]))
    assert error < .01 and still > .06


# -----------------------------------------------------------------------------
# DDO

def ddo_windows(model, seed=0):
    """A batch of windows as DDO makes them of random latents."""
    clips = random_batch(seed)
    with mock.patch.multiple(ddo, WINDOWS=3, BATCH=3, get_batch=lambda *a: clips):
        (batch,) = ddo.make_windows(model, None, 0)
    return clips, batch


def alone(model, batch, x, t, i):
    """The velocity of frame i alone, behind the frames before it: one sequence, no mask of teacher forcing."""
    seen, level = slice(i + 1), batch.more[2] if batch.more else None
    camera = batch.camera.frames(seen)
    history = torch.cat([batch.x0[:, :i], x[:, None]], 1)
    times = torch.cat([level[:, :i], t[:, None]], 1)
    if not model.cfg.encoder_blocks:
        return model(history, times, batch.text, camera, causal_mask(torch.arange(i + 1)), last=1)[:, 0]
    padded = lambda y, last: torch.cat([y[:, :i], last], 1)
    inputs = encoder_inputs(model.cfg, padded(batch.x0, 9 * x[:, None]), padded(level, .3 * t[:, None]), camera)
    return model(history, times, batch.text, camera, causal_mask(torch.arange(i + 1)), context=inputs)[:, -1]


@pytest.mark.parametrize('alpha', [.5, 4.])
def test_ddo_starts_where_nothing_can_be_told_apart(alpha):
    """theta = reference: Delta is 0, the loss (1 + alpha) log 2 before the division. Only theta learns."""
    model, reference = split_model(), split_model()
    _, batch = ddo_windows(reference)
    real, fake = ddo.both_ratios(model, reference, batch)
    assert max(real.abs().max(), fake.abs().max()) < 1e-5 and real.shape == (3, 4)      # attention with gradient rounds
    loss = ddo.ddo_loss(real, fake, alpha, 30.)
    assert abs(loss.item() * max(alpha, 1) - (1 + alpha) * math.log(2)) < 1e-4
    loss.backward()
    assert all(p.grad is None for p in reference.parameters()) and model.head.head.weight.grad.any()


@pytest.mark.parametrize('beta', [1., .5, .2])
def test_ddo_on_a_table_ends_at_the_density_of_the_paper(beta):
    """Theorem 3.3: p* ~ p_ref^(1 - 1 / beta) p_data^(1 / beta), for a normalised model at this alpha."""
    counts = torch.tensor([[5, 1, 2, 8], [2, 6, 4, 4]])
    data, reference = counts.double() / 16
    alpha = (reference * (data / reference) ** (1 / beta)).sum() ** beta
    samples = [torch.arange(4).repeat_interleave(n) for n in counts]        # expectations, exactly
    logits = torch.zeros(4, dtype=torch.float64)
    loss = lambda z: ddo.ddo_loss(*[(z.log_softmax(0) - reference.log())[i] for i in samples], alpha.item(), beta)
    for _ in range(100):                                                    # Newton, a little damped
        H = torch.autograd.functional.hessian(loss, logits) + 1e-9 * torch.eye(4)
        logits = logits - .5 * torch.linalg.solve(H, torch.autograd.functional.jacobian(loss, logits))
    want = reference ** (1 - 1 / beta) * data ** (1 / beta)
    torch.testing.assert_close(logits.softmax(0), want / want.sum(), rtol=0, atol=1e-8)


@pytest.mark.parametrize('kind', [tiny_model, split_model])
def test_ddo_fakes_and_errors_frame_by_frame(kind):
    """A fake is where Euler steps end, each frame behind the true, noised history; so is the error of x0."""
    model = kind()
    clips, batch = ddo_windows(model)
    real, fake, level = batch.more
    assert real is clips.x0
    torch.testing.assert_close(batch.x0, add_noise(real, clips.eps, level))
    assert level.max() <= .3 and level.unique().numel() == level.numel()
    eps, t = ddo.draw(batch, 4.)
    times = schedule(8, model.cfg.shift)
    with torch.no_grad():
        for i in (0, 1, 4):
            x = clips.eps[:, i]
            for a, b in zip(times[:-1], times[1:]):
                x = x + (b - a) * alone(model, batch, x, a.expand(3), i)
            torch.testing.assert_close(fake[:, i], x, rtol=0, atol=1e-4)
            for x0 in real, fake:
                x_t = add_noise(x0, eps, t)[:, i]
                v = alone(model, batch, x_t, t[:, i], i)
                want = [(x_t[b] - t[b, i] * v[b] - x0[b, i]).square().mean() for b in range(3)]
                got = ddo.error(model, batch, x0, eps, t)[:, i]
                torch.testing.assert_close(got, torch.stack(want), rtol=1e-3, atol=1e-6)


def test_ddo_shares_noise_and_times_between_reals_fakes_and_networks():
    model, other = split_model(), split_model(seed=1)
    _, batch = ddo_windows(other)
    real, fake, level = batch.more
    torch.manual_seed(0)
    eps, t = ddo.draw(batch, model.cfg.shift)
    torch.manual_seed(0)
    with torch.no_grad():
        got = ddo.both_ratios(model, other, batch)
        for delta, x0 in zip(got, (real, fake)):
            want = ddo.error(other, batch, x0, eps, t) - ddo.error(model, batch, x0, eps, t)
            torch.testing.assert_close(delta, want[:, 1:])
        same = replace(batch, more=(real, real, level))
        a, b = ddo.both_ratios(model, other, same)
    assert torch.equal(a, b) and a.any()


def test_ddo_keeps_the_best_of_a_round_not_the_last(tmp_path):
    model = split_model()
    start, path = f'{tmp_path}/ar.safetensors', f'{tmp_path}/best.safetensors'
    save_model(start, model.state_dict(), model.cfg, stage='ar')
    seen = []

    def evaluate(net, clips):
        seen.append(net.head.head.bias.detach().clone())
        return {'score': [3., 1., 2.][len(seen) - 1]}

    with mock.patch.multiple(ddo, REFERENCE=start, evaluate=evaluate, STEPS=4, EVERY=2):
        curve = ddo.train(lambda net, step: net.head.head.bias.sum(), 2, None, path)
    best, header = load_model(path)
    assert [point['score'] for point in curve] == [3, 1, 2] and header['stage'] == 'ar'
    assert torch.equal(best.head.head.bias, seen[1]) and not torch.equal(seen[1], seen[2])
