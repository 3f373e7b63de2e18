"""Stages 2 and 3 against closed forms: Gaussians, whose scores, flows and gradients are known."""
import dataclasses

import numpy as np
import pytest
import torch

import distill_dmd
import distill_ode
import train_ar
from camera import Camera, intrinsics, keys_to_poses, relative
from common import Run, save_model
from data import Batch, Clips, Draws, get_batch
from experiments import why_causal, why_self_rollout
from model import (KVCache, add_noise, causal_mask, chunk_ids, rollout, rollout_clip, schedule, teacher_forced,
                   teacher_forcing_mask, v_to_x0)
from papers import drift as papers_drift
from test_model import TINY, tiny_model

B, F, H, W = 3, 5, 4, 4
MEAN, STD = .7, .5
ALONE = Run(rank=0, world=1, device=torch.device('cpu'), dtype=torch.float32, micro=B)


def batch(seed=0, F=F, B=B):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(B, *s, generator=g)
    c2w = keys_to_poses('w*2,wl*30')[:F].expand(B, -1, 4, 4)
    camera = Camera(c2w, intrinsics(90, 1).expand(B, F, 4))
    x0, text, eps = draw(F, 16, H, W), draw(4, 8), draw(F, 16, H, W)
    return Batch(x0, camera, text, eps, Draws(torch.rand(B, 2 * F + 4, generator=g)), ('',) * B)


class Gaussian:
    """A network that knows the data to be N(mean, std^2), each number alone: the exact velocity of its flow, or, with
    jump=True, the velocity whose x0 is the end of the flow. Called with [history | noisy] it treats all alike."""

    cache_type = KVCache

    def __init__(self, mean=MEAN, std=STD, jump=False):
        self.mean, self.std, self.jump, self.calls = mean, std, jump, []
        self.cfg = dataclasses.replace(TINY, chunk=1, first_chunk=1, shift=3.0)

    def end(self, x, t):                                       # the flow map: the same quantile at t = 0
        return self.mean + (x - (1 - t) * self.mean) * self.std / ((1 - t) ** 2 * self.std ** 2 + t ** 2).sqrt()

    def x0(self, x, t):                                        # E[x0 | x_t]
        return self.mean + (1 - t) * self.std ** 2 / ((1 - t) ** 2 * self.std ** 2 + t ** 2) * (x - (1 - t) * self.mean)

    def __call__(self, x, t, text, camera=None, mask=None, pos=None, cache=None, last=0):
        self.calls.append((x, t))
        x, t = x[:, -last:], t[:, -last:, None, None, None]
        return (x - (self.end if self.jump else self.x0)(x, t)) / t.clamp(min=1e-6)


@pytest.mark.parametrize('chunk, frames', [(1, 5), (2, 5), (4, 5), (1, 1)])
def test_what_is_nobodys_history_is_not_missed(chunk, frames):
    """teacher_forced leaves the last clean chunk out: the same as [clean | noisy] in full, history noised, some cameras
    dropped."""
    model, data, u = tiny_model(), batch(F=frames), torch.rand(2, B, frames)
    model.cfg.chunk, model.cfg.first_chunk = chunk, 1
    x_t, history = (add_noise(data.x0, data.eps, t) for t in u)
    camera = dataclasses.replace(data.camera, on=torch.tensor([True, False, True]))
    with torch.no_grad():
        past = dataclasses.replace(data, x0=history, camera=camera)
        got = teacher_forced(model, model.cfg, past, x_t, u[0], u[1])
        want = model(torch.cat([history, x_t], 1), torch.cat([u[1], u[0]], 1), data.text, Camera.cat([camera, camera]),
                     teacher_forcing_mask(chunk_ids(frames, chunk, 1)), [*range(frames)] * 2)[:, frames:]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------ stage 2

@pytest.mark.parametrize('over', ['camera', 'text'])
def test_guidance_of_the_teacher(over):
    net, data, clean = tiny_model(), batch(), torch.zeros(B, F)
    off = dict(text=torch.zeros_like(data.text))
    if over == 'camera':
        off = dict(camera=dataclasses.replace(data.camera, on=torch.zeros(B, dtype=torch.bool)))

    def one(data, s=1.0):
        return distill_ode.ode_states(net, data, clean, schedule(1, 3.0), torch.ones(1), s, over)[:, -1]
    cond, null = one(data), one(dataclasses.replace(data, **off))
    assert (cond - null).abs().max() > 1e-3
    torch.testing.assert_close(one(data, 3.0), null + 3 * (cond - null), rtol=0, atol=1e-4)


@pytest.mark.parametrize('causal', [True, False])
def test_ode_pairs_of_a_gaussian_are_its_flow_map(causal):
    """Also those of the bidirectional teacher, in experiments/why_causal.py, which is given frame 0."""
    net, data, error = Gaussian(), batch(), {}
    given = 0 if causal else 1
    for steps in (48, 96):
        times, at = schedule(steps, 3.0), schedule(4, 3.0)[:-1]
        if causal:
            states = distill_ode.ode_states(net, data, torch.zeros(B, F), times, at)
        else:
            states = why_causal.whole_clip_states(net, data, times, at)
        assert states.shape == (B, 5, F, 16, H, W) and torch.equal(states[:, 0, given:], data.eps[:, given:])
        if not causal:
            assert torch.equal(states[:, :, 0], data.x0[:, None, 0].expand(-1, 5, -1, -1, -1))
        exact = net.end(data.eps, torch.ones(()))[:, given:]
        error[steps] = (states[:, -1, given:] - exact).abs().max().item()
        for s, t in enumerate(schedule(4, 3.0)[:-1]):          # and every state that is kept flows to the same end
            assert (net.end(states[:, s, given:], t) - exact).abs().max() < 4 * error[48] + 1e-6
    assert error[48] < .15 and error[96] == pytest.approx(error[48] / 2, rel=.2)         # Euler: first order


def test_states_between_two_steps_are_what_fresh_noise_on_the_end_point_would_be():
    """Of one Euler step every state is (1 - t) end + t noise: a student of 4 times learns from it as one of 1 does."""
    data, at = batch(), schedule(4, 3.0)[:-1]
    states = distill_ode.ode_states(Gaussian(), data, torch.zeros(B, F), schedule(1, 3.0), at)
    for x, t in zip(states[:, :-1].unbind(1), at):
        torch.testing.assert_close(x, add_noise(states[:, -1], data.eps, t.expand(B, F)), rtol=0, atol=1e-5)


def test_ode_loss_is_zero_for_the_exact_student_and_gives_it_the_states_own_time():
    student, data = Gaussian(jump=True), batch()
    cfg = distill_ode.Config(student_steps=4)
    times = schedule(4, 3.0)[:-1].view(1, 4, 1, 1, 1, 1)
    ends = student.end(data.eps, torch.ones(()))
    on_the_flow = MEAN * (1 - times) + (data.eps[:, None]) * ((1 - times) ** 2 * STD ** 2 + times ** 2).sqrt()
    states = torch.cat([on_the_flow, ends[:, None]], 1)
    data.draws.u[:, 0] = torch.tensor([.1, .3, .9])            # a quarter of the draws for each of the four times
    data = dataclasses.replace(data, draws=Draws(data.draws.u), more=(states, data.camera.move, torch.zeros(B, F)))
    loss, error, t = distill_ode.ode_loss(student, cfg, data)
    assert loss < 1e-10 and error.shape == (B, F)
    assert torch.equal(t, schedule(4, 3.0)[[0, 1, 3]][:, None].expand(B, F))
    assert distill_ode.ode_loss(Gaussian(), cfg, data)[0] > 1e-2


def test_the_student_of_the_bidirectional_teacher_is_given_frame_0_without_loss():
    """experiments/why_causal.py: it sees the noisy past of the same trajectory."""
    student, data, cfg = Gaussian(jump=True), batch(), distill_ode.Config(student_steps=4)
    times = schedule(4, 3.0)[:-1].view(1, 4, 1, 1, 1, 1)
    ends = student.end(data.eps, torch.ones(()))
    states = MEAN * (1 - times) + (data.eps[:, None]) * ((1 - times) ** 2 * STD ** 2 + times ** 2).sqrt()
    states = torch.cat([states, ends[:, None]], 1)
    states[:, :, 0] = data.x0[:, None, 0]
    data = dataclasses.replace(data, more=(states, data.camera.move))
    loss, error, t = why_causal.whole_clip_loss(student, cfg, data)
    assert loss < 1e-10 and error.shape == (B, F) and (t[:, 0] == 0).all() and (t[:, 1:] > 0).all()
    states[:, -1, 0] += 9                                      # whatever frame 0 is, it carries no loss
    assert why_causal.whole_clip_loss(student, cfg, data)[0] == loss
    assert why_causal.whole_clip_loss(Gaussian(), cfg, data)[0] > 1e-2


@pytest.mark.parametrize('drift', [0., 1.])
@pytest.mark.parametrize('sink', [False, True])
def test_pairs_are_read_as_they_were_made(sink, drift, data, tmp_path):
    """One Euler step is one jump: on pairs of a single step student and teacher are one function, of the same frames
    and cameras."""
    model, path = tiny_model(sink=sink), f'{tmp_path}/ar.safetensors'
    save_model(path, model.state_dict(), model.cfg, stage='ar', step=1)
    cfg = distill_ode.Config(teacher_steps=1, student_steps=1, pairs=16, pair_batch=2, frames=3, drift=drift, init=path,
                             out=str(tmp_path))
    folder = distill_ode.make_pairs(cfg, Clips(data), model, ALONE)
    pairs = get_batch(Clips(folder, keys=('latents', 'c2w', 'K', 'states', 'step', 'level')), 0, 32, 3, model.cfg)
    states, move, level = pairs.more
    from_elsewhere = (move[:, 1] == torch.eye(4)).all((1, 2))
    assert 6 < from_elsewhere.sum() < 30 if sink else from_elsewhere.sum() < 6
    before = pairs.camera.move.clone()
    with torch.no_grad():
        loss = [distill_ode.ode_loss(model, cfg, dataclasses.replace(pairs, **change))[0].item()
                for change in ({}, dict(text=pairs.text + 1), dict(more=(states, move, 0 * level)))]
    assert loss[0] < 1e-4 < 1e-2 < loss[1] and loss[2] > 10 * loss[0]
    assert torch.equal(pairs.camera.move, before)              # a loss leaves its batch as it is


def test_the_history_is_noised_as_its_times_say():
    data, cfg = batch(), distill_ode.Config()
    noised, level = distill_ode.noised_history(cfg, data, dataclasses.replace(TINY, chunk=2, first_chunk=1))
    assert level.min() >= 0 and level.max() <= cfg.context_noise and len(set(level.flatten().tolist())) == 3 * B
    assert (level[:, 1::2] == level[:, 2::2]).all()                                  # one time a chunk
    assert torch.equal(noised.x0, add_noise(data.x0, data.eps, level)) and torch.equal(noised.eps, data.eps)
    clean, level = distill_ode.noised_history(distill_ode.Config(context_noise=0.), data, TINY)
    assert torch.equal(clean.x0, data.x0) and not level.any()


@pytest.mark.parametrize('sink', [False, True])
def test_rolled_out_windows_are_parts_of_one_rollout_along_each_clip(sink, monkeypatch):
    model, clip, videos, options, n = tiny_model(sink=sink), batch(F=9), [], {}, 16

    def recorded(*args, **more):
        options.update(more)
        videos.append(rollout_clip(*args, **more))
        return videos[-1]
    monkeypatch.setattr(papers_drift, 'rollout_clip', recorded)
    clip.camera.c2w = clip.camera.c2w.clone()
    clip.camera.c2w[1, 1:, :3, 3] += 9                         # a clip of data.py --door that goes on elsewhere
    clip.captions = tuple(f'clip {b}' for b in range(B))
    cfg = distill_ode.Config(frames=3, student_steps=2)
    windows = papers_drift.rolled_out_windows(model, cfg, clip, np.random.default_rng(0), n)
    video, = videos
    assert video.shape == clip.x0.shape and torch.equal(video[:, 0], clip.x0[:, 0])
    assert not torch.isclose(video[:, 1:], clip.x0[:, 1:]).all((2, 3, 4)).any()      # generated, not the clip's
    assert options['jump'].tolist() == [b == 1 for b in range(B)]
    assert len(windows.x0) == len(windows.text) == len(windows.captions) == n
    assert windows.eps.shape == windows.x0.shape and len(windows.eps[:, :, 0, 0, 0].unique(dim=0)) > n / 2
    assert windows.draws.u.shape == (n, 2 * 3 + 4) and windows.draws.t.shape == (n, 3)
    seen = set()
    for i in range(n):
        b = i % B
        before = next(a for a in range(7) if torch.equal(windows.x0[i, 1:], video[b, a + 1:a + 3]))
        frames = [0 if sink else before, before + 1, before + 2]
        assert torch.equal(windows.x0[i], video[b, frames]) and torch.equal(windows.text[i], clip.text[b])
        assert windows.captions[i] == clip.captions[b]
        torch.testing.assert_close(windows.camera.c2w[i], relative(clip.camera.c2w[b:b + 1, frames])[0])
        assert (windows.camera.move[i, 1] == torch.eye(4)).all() == (sink and (before > 0 or b == 1))
        seen.add(before)
    assert len(seen) > 3


def test_the_consistency_loss_at_the_solution_vanishes_with_dt_squared():
    """One Euler step of length dt misses the flow by O(dt^2), so the exact student's error is O(dt^2)."""
    root = {}
    for steps in (48, 96):
        data = dataclasses.replace(batch(), draws=Draws(torch.full((B, 2 * F + 4), .5)))
        cfg = distill_ode.Config(teacher_steps=steps)
        loss, error, t = distill_ode.cd_loss(Gaussian(jump=True), cfg, data, Gaussian(), Gaussian(jump=True))
        root[steps] = error.sqrt().mean().item()
    assert root[96] == pytest.approx(root[48] / 4, rel=.1) and root[48] < 5e-3
    wrong = distill_ode.cd_loss(Gaussian(mean=0.), distill_ode.Config(), batch(), Gaussian(), Gaussian(jump=True))
    assert wrong[0] > 1e-2


@pytest.mark.parametrize('autocast', [False, True])
def test_consistency_times_are_exact_and_each_network_gets_its_own(autocast):
    """In bfloat16 neighbouring times of 48 differ by up to 64 % of dt; ours are float32 to the last digit."""
    teacher, averaged, student, data = Gaussian(), Gaussian(jump=True), Gaussian(jump=True), batch(B=64)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        distill_ode.cd_loss(student, distill_ode.Config(teacher_steps=48), data, teacher, averaged)
    u = 1 - torch.arange(49, dtype=torch.float64) / 48
    grid, (x, t), (x_next, t_next) = 3 * u / (1 + 2 * u), teacher.calls[0], averaged.calls[0]
    t, t_next, x, x_next = t[:, -F:], t_next[:, -F:], x[:, -F:], x_next[:, -F:]
    i = (t[:, :1].double() - grid).abs().argmin(1)
    assert t.dtype == t_next.dtype == torch.float32
    assert (t.double() - grid[i, None]).abs().max() < 1e-7
    assert (t_next.double() - grid[i + 1, None]).abs().max() < 1e-7
    assert torch.equal(student.calls[0][1][:, -F:], t) and torch.equal(student.calls[0][0][:, -F:], x)
    assert torch.equal(x, add_noise(data.x0, data.eps, t)) and len(i.unique()) > 20
    dt = (t_next - t)[..., None, None, None]
    v = (x - teacher.x0(x, t[..., None, None, None])) / t[..., None, None, None]
    assert (x_next - (x + dt * v)).abs().max() < 1e-5


# ------------------------------------------------------------------------------------------------ the few-step rollout

def cameras(data):
    return (Camera(a, b) for a, b in zip(data.camera.c2w.split(1, 1), data.camera.K.split(1, 1)))


def seeded(seed=0):
    g = torch.Generator().manual_seed(seed)
    return lambda n: torch.randn(B, n, 16, H, W, generator=g)


def test_a_few_step_model_is_sampled_by_renoising_not_by_euler():
    model, data, calls, noises = tiny_model(), batch(), [], []
    noise = lambda n, draw=seeded(): noises.append(draw(n)) or noises[-1]
    model.register_forward_hook(lambda m, args, kw, v: calls.append((args[0], args[1], v)), with_kwargs=True)
    chunks = rollout(model, cameras(data), data.text, schedule(4, 3.0), noise, data.x0[:, :1], renoise=True)
    out = torch.cat(list(chunks), 1)
    for frame in range(1, F):                                  # a frame: 4 denoising calls, and the next one's first
        (x, t, v), *rest = calls[4 * (frame - 1):][:5]
        assert x.shape[1] == 2 and torch.equal(x[:, :1], out[:, frame - 1:frame]) and (t[:, 0] == 0).all()
        step, fresh = [(x[:, 1:], t[:, 1:], v), *rest], noises[4 * (frame - 1):][:4]
        assert torch.equal(step[0][0], fresh[0])
        for s in range(3):
            x0 = v_to_x0(*[step[s][i] for i in (0, 2, 1)])
            assert torch.allclose(step[s + 1][0], add_noise(x0, fresh[s + 1], step[s + 1][1]), atol=1e-6)


def test_a_training_rollout_that_exits_last_equals_the_streamed_one():
    model, data = tiny_model(), batch()

    def go(**more):
        return torch.cat(list(rollout(model, cameras(data), data.text, schedule(4, 3.0), seeded(), data.x0[:, :1],
                                      renoise=True, **more)), 1)
    streamed, trained = go(), go(exit_step=3)
    assert torch.allclose(streamed, trained, atol=1e-5) and trained.requires_grad and not streamed.requires_grad
    with torch.no_grad():
        assert not go(exit_step=3).requires_grad
    assert not torch.allclose(go(exit_step=1), streamed, atol=1e-2)


@pytest.mark.parametrize('given', [True, False])
@pytest.mark.parametrize('exit_step', [0, 2])
def test_no_gradient_reaches_the_past_through_the_cache(given, exit_step):
    """The gradient of a self-rollout is that of one teacher-forced pass on its own, detached, frames."""
    model, data, calls = tiny_model(), batch(), []

    def record(m, args, kw, v):
        if v.requires_grad:
            calls.append((args[0], args[1], v))
    hook = model.register_forward_hook(record, with_kwargs=True)
    first_frame = data.x0[:, :1] if given else None
    out = torch.cat(list(rollout(model, cameras(data), data.text, schedule(4, 3.0), seeded(), first_frame,
                                 renoise=True, exit_step=exit_step)), 1)
    hook.remove()
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    assert len(calls) == F - given                             # one call of each chunk carries gradient
    params = list(model.parameters())
    grads = torch.autograd.grad((out * weight)[:, int(given):].sum(), params, allow_unused=True)
    x_t, t = (torch.cat([c[i] for c in calls], 1).detach() for i in (0, 1))
    if given:
        x_t, t = torch.cat([data.x0[:, :1], x_t], 1), torch.cat([torch.zeros(B, 1), t], 1)
    ids, cache = chunk_ids(F, 1), KVCache(model.cfg, B, 2 * F, H * W // 4, out.device)
    with torch.no_grad():                                      # the history's keys and values carry none either
        model(out.detach(), 0 * t, data.text, data.camera, causal_mask(ids), cache=cache)
    cache.end = F
    v = model(x_t, t, data.text, data.camera, teacher_forcing_mask(ids)[F:], range(F), cache)
    want = torch.autograd.grad((v_to_x0(x_t, v, t) * weight)[:, int(given):].sum(), params, allow_unused=True)
    for g, w in zip(grads, want):
        assert (g is None) == (w is None) and (g is None or torch.allclose(g, w, atol=2e-4 * (1 + w.abs().max())))


# ------------------------------------------------------------------------------------------------ stage 3

def test_the_dmd_gradient_of_gaussians_is_the_difference_of_scores():
    data, real, fake = batch(F=1), Gaussian(.7, .5), Gaussian(.2, .9)
    t = torch.full((B, 1), .6)
    x = data.x0
    x_t = add_noise(x, data.eps, t)
    grad = distill_dmd.dmd_gradient(x, x_t, t, data, real, fake, 1.0)
    real_x0 = real.x0(x_t, .6)
    score = lambda g: -(x_t - .4 * g.mean) / (.4 ** 2 * g.std ** 2 + .6 ** 2)        # of N((1-t) m, (1-t)^2 s^2 + t^2)
    want = .6 ** 2 / .4 * (score(fake) - score(real))                                # x0 = (x_t + t^2 score) / (1 - t)
    assert torch.allclose(grad, want / (x - real_x0).abs().mean((1, 2, 3, 4), keepdim=True), atol=1e-5)
    nothing = distill_dmd.dmd_gradient(x, x_t, t, data, real, Gaussian(.7, .5), 1.0)
    assert grad.abs().max() > .1 and nothing.abs().max() == 0


def test_descending_the_dmd_gradient_moves_samples_to_the_data():
    real, x = Gaussian(.7, .5), torch.randn(B, 1, 16, H, W) * .9 - 1
    for step in range(300):
        fake = Gaussian(x.mean().item(), x.std().item())       # the exact score of where the samples are now
        data = dataclasses.replace(batch(step, F=1), x0=x)
        x_t, t = distill_dmd.noised(x, data, 3.0, 0)
        x = x - .05 * distill_dmd.dmd_gradient(x, x_t, t, data, real, fake, 1.0)
    assert x.mean().item() == pytest.approx(.7, abs=.05) and x.std().item() == pytest.approx(.5, abs=.08)


@pytest.fixture
def nets(tmp_path):
    """Three networks as the script makes them, from two checkpoints."""
    model = tiny_model()
    for name, stage in (('ode', 'ode'), ('camera', 'camera')):
        state = tiny_model(seed=len(name)).state_dict()
        save_model(f'{tmp_path}/{name}.safetensors', state, model.cfg, stage=stage, step=1)
    cfg = distill_dmd.Config(init=str(tmp_path / 'ode.safetensors'), score=str(tmp_path / 'camera.safetensors'),
                             frames=F, before=0)
    return distill_dmd.start_nets(cfg, ALONE), cfg


@pytest.mark.parametrize('conditioned_on', ['its own frames', 'true frames'])
def test_three_networks_share_nothing_and_only_the_right_one_learns(nets, conditioned_on, monkeypatch):
    """Also where experiments/why_self_rollout.py puts another rollout in the place of self_rollout."""
    nets, cfg = nets
    if conditioned_on == 'true frames':
        monkeypatch.setattr(distill_dmd, 'self_rollout', why_self_rollout.rollout_on_true_history)
    cfg.guidance = 3.0                                         # at first fake = real: only guidance makes a gradient
    places = [{p.data_ptr() for p in n.parameters()} for n in nets.values()]
    assert not any(p.requires_grad for p in nets['real'].parameters())
    assert len(places) == 3 and not places[0] & places[1] and not places[1] & places[2] and not places[0] & places[2]
    index = [(0, 0, j) for j in range(B)]
    learns = lambda name: any(p.grad is not None and p.grad.abs().max() > 0 for p in nets[name].parameters())
    loss, _, out = distill_dmd.generator_loss(nets, cfg, batch(), index)
    loss.backward()
    assert torch.equal(out.x[:, 0], batch().x0[:, 0]) and not torch.isclose(out.x[:, 1:], batch().x0[:, 1:]).all()
    assert [learns(n) for n in ('generator', 'real', 'fake')] == [True, False, False]
    for p in nets['generator'].parameters():
        p.grad = None
    distill_dmd.critic_loss(nets, cfg, batch(), out).backward()
    assert [learns(n) for n in ('generator', 'real', 'fake')] == [False, False, True]


def test_a_longer_walk_goes_there_and_back_and_only_its_window_learns(nets):
    """--before: the scores see the last frames of a rollout that runs to the end of the clip's path, and back."""
    nets, cfg = nets
    c2w = keys_to_poses('w*4')[None]
    assert distill_dmd.there_and_back(c2w, 12).tolist() == [0, 1, 2, 3, 4, 3, 2, 1, 0, 1, 2, 3]
    assert distill_dmd.there_and_back(c2w, 5).tolist() == [0, 1, 2, 3, 4]
    assert distill_dmd.there_and_back(c2w[:, :1], 3).tolist() == [0, 0, 0]
    c2w[:, 1:, 0, 3] += 9                                      # from a door to elsewhere: it does not come back there
    assert distill_dmd.there_and_back(c2w, 12).tolist() == [0, 1, 2, 3, 4, 3, 2, 1, 1, 1, 2, 3]
    cfg.before, calls, data, befores = 9, [], batch(), set()
    model, forward = nets['generator'], nets['generator'].forward

    def recorded(x, t, *args, **kw):
        calls.append(torch.is_grad_enabled())
        return forward(x, t, *args, **kw)
    model.forward = recorded
    for update in range(8):
        index = [(0, update, j) for j in range(B)]
        calls.clear()
        out = distill_dmd.self_rollout(model, cfg, data, index)
        befores.add(len(calls))
        assert out.x.shape == data.x0.shape and out.x.requires_grad and sum(calls) == F - out.given
        assert out.batch.eps.shape == data.eps.shape
        assert torch.allclose(out.batch.camera.c2w[:, 0], torch.eye(4), atol=1e-6)
        with torch.no_grad():
            again = distill_dmd.self_rollout(model, cfg, data, index)
        assert torch.allclose(again.x, out.x, atol=1e-5) and torch.equal(again.batch.x0, out.batch.x0)
        assert out.given == torch.equal(out.x[:, 0], data.x0[:, 0])
    assert len(befores) > 2


@pytest.mark.parametrize('p_first', [1., 0.])
def test_both_scores_are_given_the_time_that_noised_their_input(nets, p_first):
    """minWM's 8B line gives a table index instead. Frame 0, when given, is clean and at t = 0."""
    (nets, cfg), data, seen = nets, batch(), {}
    cfg.p_first, cfg.guidance, index = p_first, 1.0, [(0, 0, j) for j in range(B)]
    for name in ('real', 'fake'):
        nets[name].register_forward_hook(lambda m, args, v, name=name: seen.setdefault(name, args) and None)
    out = distill_dmd.generator_loss(nets, cfg, data, index)[2]
    x, given = out.x, int(p_first)
    assert torch.equal(seen['real'][0], seen['fake'][0]) and torch.equal(seen['real'][1], seen['fake'][1])
    x_t, t = seen['real'][:2]
    assert torch.allclose(x_t, add_noise(x, data.eps, t), atol=1e-6)
    assert (t[:, :given] == 0).all() and (t[:, given:] > .019).all()
    assert torch.equal(x[:, 0], data.x0[:, 0]) == bool(given)
    seen.clear()
    again = batch(1)                                           # its own noise and times, on the same rollout
    distill_dmd.critic_loss(nets, cfg, again, out)
    earlier, (x_t, t) = t, seen['fake'][:2]
    assert torch.allclose(x_t, add_noise(x, again.eps, t), atol=1e-6) and (t[:, :given] == 0).all()
    assert (t[:, given:] != earlier[:, given:]).all()
    assert torch.equal(seen['fake'][3].c2w, out.batch.camera.c2w)


@pytest.mark.parametrize('camera, sink', [('plucker', False), ('plucker', True), ('prope', False)])
def test_checkpointed_blocks_compute_again_from_the_cache_as_it_was(camera, sink):
    """The window is full while gradient is recorded, so the cache is encoded again (or rolls on) before the backward
    pass."""
    data, grads = batch(), []
    c2w, K = keys_to_poses('w*2,wl*6').expand(B, -1, 4, 4), intrinsics(90, 1).expand(B, 9, 4)
    for on in (False, True):
        model = tiny_model(camera=camera, sink=sink)
        model.checkpoint = on
        one_by_one = map(Camera, c2w.split(1, 1), K.split(1, 1))
        chunks = rollout(model, one_by_one, data.text, schedule(4, 3.0), seeded(), data.x0[:, :1], window=4,
                         renoise=True, exit_step=1, context=.2)
        with torch.enable_grad():
            x = torch.cat(list(chunks), 1)
            (x[:, 1:] * torch.arange(1., 9)[:, None, None, None]).square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert grads[0].abs().max() > 1e-3
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5 * grads[0].abs().max().item())


def test_float32_masters_move_where_bfloat16_weights_would_not():
    """A step of 1e-4 of a weight is below bfloat16's 1/256: in bfloat16 weights nothing would move."""
    data, index = batch(), [(0, 0, j) for j in range(B)]
    moved = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model().to(dtype)
        nets = {'generator': model, 'real': tiny_model(seed=1), 'fake': tiny_model(seed=2)}
        before = [p.detach().clone() for p in model.parameters()]
        opt = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0., .999), weight_decay=0)
        cfg = distill_dmd.Config(frames=F, before=0)
        with torch.autocast('cpu', torch.bfloat16):
            loss = distill_dmd.generator_loss(nets, cfg, data, index)[0]
        loss.backward()
        assert distill_dmd.step_on(model, opt, cfg, ALONE) > 0
        changed = [(p != b)[b.abs() > .01] for p, b in zip(model.parameters(), before)]
        moved[dtype] = torch.cat(changed).float().mean().item()
    assert moved[torch.float32] > .5 and moved[torch.bfloat16] < .02


def test_bidirectional_pairs_collapse_and_causal_pairs_do_not():
    """Causal Forcing, lemma 3.2 and proposition 3.3, in closed form: see experiments/why_causal.py."""
    (floor, ratio), *causal = why_causal.closed_form().values()
    assert floor > .4 and ratio < .6
    for floor, ratio in causal:
        assert floor < .01 and ratio > .99


# --------------------------------------------------------------------------------- stage 1 on its own rollouts

@pytest.mark.parametrize('sink', [False, True])
def test_a_rollout_of_stage_1_goes_on_where_it_was_and_the_clip_stays_the_target(sink, monkeypatch):
    model, data, clip, calls, moved = tiny_model(sink=sink), batch(), batch(F=14), [], []
    embed = model.embed_camera
    monkeypatch.setattr(model, 'embed_camera', lambda camera, *size: moved.append(camera.move) or embed(camera, *size))
    data.draws.u[:, F] = 1                                     # none ends by chance
    data = dataclasses.replace(data, draws=Draws(data.draws.u), more=(clip.x0, clip.camera.c2w))
    cfg = train_ar.Config(frames=F, drift=1.0)
    drift = papers_drift.Drift(cfg, lambda net, cfg, batch, history: calls.append((batch, history)))
    drift.rng = dataclasses.make_dataclass('Always', [])()
    drift.rng.random, drift.rng.integers = lambda: .5, lambda n: 0
    for turn in range(7):                                      # each 2 frames on: 0, 2, 4, 6, 8, and again
        moved.clear()
        drift(model, cfg, data)
        age = 2 * turn if turn < 5 else 2 * turn - 10
        frames = [0 if sink else age, *range(age + 1, age + F)]
        now, history = calls[-1]
        assert torch.equal(now.x0, clip.x0[:, frames]) and not history.requires_grad
        torch.testing.assert_close(now.camera.c2w, relative(clip.camera.c2w[:, frames]), rtol=0, atol=1e-6)
        assert (now.camera.move[0, 1] == torch.eye(4)).all() == (sink and age > 0)
        torch.testing.assert_close(torch.cat(moved, 1)[:, :F], now.camera.move, rtol=0, atol=1e-6)   # the rollout too
        if age == 0:
            assert torch.equal(history[:, :3], clip.x0[:, :3])
        else:
            earlier = calls[-2][1]
            assert torch.equal(history[:, 1:3], earlier[:, -2:])
            assert torch.equal(history[:, 0], earlier[:, 0 if sink else -3])
        assert (history[:, 3:] - now.x0[:, 3:]).abs().max() > .1
