"""The losses against what is worked out by hand: networks that answer with known numbers and remember their calls."""
import dataclasses
import types

import pytest
import torch

import common
import distill_dmd
import distill_ode
import finetune_camera
import train_ar
from camera import Camera, intrinsics, keys_to_poses
from common import Run, save_model
from data import Batch, Clips, Config, Draws, get_batch, make
from model import rollout, schedule
from test_distill import ALONE
from test_model import TINY, grid, tiny_model

B, F, H, W = 3, 5, 4, 4
SHIFT = 4.
DROP = .3                                                     # the share of all that is drawn at random


def batch(seed=0, length=F):
    """Clips, no two of which share a camera, a prompt or a random number. Clip 0 is given its frame 0, clip 2 has no
    prompt, clip 1 has no camera."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(B, *shape, generator=g)
    c2w = torch.stack([keys_to_poses(f'{keys}*{length}')[:length] for keys in ('w', 'wl', 'j')[seed:] + ('d',) * seed])
    u = torch.rand(B, 2 * F + 4, generator=g)
    u[:, F:F + 3] = torch.tensor([[.1, .5, .9], [.5, .9, .1], [.9, .1, .5]])
    camera = Camera(c2w, intrinsics(90, 1).expand(B, length, 4))
    return Batch(draw(length, 16, H, W), camera, draw(4, 8), draw(F, 16, H, W), Draws(u), tuple('abc'))


class Known:
    """A network that answers with the velocity `answer`, a tensor or a function of the call. It remembers its calls."""

    def __init__(self, answer, chunk=1, sink=False):
        self.cfg = dataclasses.replace(TINY, shift=SHIFT, chunk=chunk, sink=sink)
        self.answer, self.calls = answer, []

    def __call__(self, x, t, text, camera=None, mask=None, pos=None, cache=None, last=None):
        call = types.SimpleNamespace(x=x, t=t, text=text, camera=camera, mask=mask, pos=pos, last=last)
        self.calls.append(call)
        return self.answer(call) if callable(self.answer) else self.answer


def shifted(u):
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def mix(x0, eps, t):
    """x_t, number by number."""
    return torch.stack([torch.stack([(1 - t[b, f]) * x0[b, f] + t[b, f] * eps[b, f] for f in range(t.shape[1])])
                        for b in range(len(t))])


def by_frame(*values):
    """A velocity or a picture that is one number in each frame."""
    return torch.tensor(values)[None, :, None, None, None].expand(B, -1, 16, H, W)


def same_camera(got, want):
    return torch.equal(got.c2w, want.c2w) and torch.equal(got.K, want.K) and torch.equal(got.move, want.move)


# ------------------------------------------------------------------------------------------------ stages 0 and 1

def test_stage_0_by_hand():
    data = batch()
    off = [.1, .2, .3, .4, .5]                                # how far from eps - x0 the answer is, frame by frame
    net = Known(data.eps - data.x0 + by_frame(*off))
    cfg = finetune_camera.Config(p_first=DROP, drop_text=DROP, drop_camera=DROP)
    loss, error, times = finetune_camera.loss_fn(net, cfg, data)
    (call,) = net.calls
    t = shifted(data.draws.u[:, :1]).repeat(1, F)             # one time a clip
    t[0, 0] = 0                                               # u = .1 < .3: given
    torch.testing.assert_close(call.t, t)
    torch.testing.assert_close(call.x, mix(data.x0, data.eps, t))
    assert torch.equal(call.x[0, 0], data.x0[0, 0]) and call.mask is None
    assert torch.equal(call.text[:2], data.text[:2]) and not call.text[2].any()
    assert call.camera.on.tolist() == [True, False, True] and same_camera(call.camera, data.camera)
    squares = torch.tensor([c * c for c in off])
    torch.testing.assert_close(error, squares.expand(B, F))
    torch.testing.assert_close(loss, (squares[1:].mean() + 2 * squares.mean()) / 3)     # clip 0: without frame 0
    assert times[0, 0] < 0 and torch.equal(times[:, 1:], t[:, 1:])                      # the log leaves it out
    base = dataclasses.replace(cfg, camera='none')
    finetune_camera.loss_fn(net, base, data)
    assert net.calls[1].camera is None


@pytest.mark.parametrize('own', [False, True])
def test_stage_1_by_hand(own):
    """Chunks of 1, 2, 2 frames; the sequence is the history of the first two, then all five noisy ones. own: the
    history is what the model has generated."""
    data = batch()
    off = [.1, .2, .3, .4, .5]
    net = Known(data.eps - data.x0 + by_frame(*off), chunk=2)
    history = torch.randn(B, F, 16, H, W) if own else data.x0
    cfg = train_ar.Config(context_noise=.5, drop_text=DROP, drop_camera=DROP)
    loss, error, times = train_ar.loss_fn(net, cfg, data, history if own else None)
    (call,) = net.calls
    u = data.draws.u
    columns = [0, 1, 1, 2, 2]                                 # one time a chunk
    t, level = shifted(u[:, columns]), .5 * u[:, F + 4:][:, columns]
    torch.testing.assert_close(call.t, torch.cat([level[:, :3], t], 1))
    torch.testing.assert_close(call.x, torch.cat([mix(history, data.eps, level)[:, :3], mix(data.x0, data.eps, t)], 1))
    assert torch.equal(call.text[:2], data.text[:2]) and not call.text[2].any()
    assert call.camera.on.tolist() == [True, False, True]
    assert same_camera(call.camera.frames(slice(3)), data.camera.frames(slice(3)))
    assert same_camera(call.camera.frames(slice(3, None)), data.camera)
    assert torch.equal(call.mask, grid('x....... xxx..... xxx..... ...x.... x...xx.. x...xx.. xxx...xx xxx...xx'))
    assert list(call.pos) == [0, 1, 2, 0, 1, 2, 3, 4] and call.last == F
    squares = torch.tensor([c * c for c in off])
    torch.testing.assert_close(error, squares.expand(B, F))
    torch.testing.assert_close(loss, squares.mean())          # frame 0 too: from the prompt alone
    torch.testing.assert_close(times, t)


# ------------------------------------------------------------------------------------------------ stage 2

def noisy_half(call):
    return call.x[:, -F:], call.t[:, -F:]


@pytest.mark.parametrize('over', ['camera', 'text'])
def test_consistency_distillation_by_hand(over):
    """All three networks see one history, noised as its times say. The teacher says 1 and, unconditioned, 2: guided
    three times 2 + 3 (1 - 2) = -1. The student says .5, its average .25."""
    def conditioned(call):
        dropped = not call.text.any() if over == 'text' else call.camera.on is not None and not call.camera.on.any()
        return torch.full((B, F, 16, H, W), 2. if dropped else 1.)

    data = batch()
    teacher = Known(conditioned)
    student, average = (Known(torch.full((B, F, 16, H, W), v)) for v in (.5, .25))
    cfg = distill_ode.Config(teacher_steps=10, guidance=3., over=over, context_noise=.5)
    loss, error, times = distill_ode.cd_loss(student, cfg, data, teacher, average)

    grid = [shifted(1 - i / 10) for i in range(11)]
    i = (10 * data.draws.u[:, 0]).long().tolist()
    t, t_next = (torch.tensor([[grid[j + step]] for j in i]).expand(B, F) for step in (0, 1))
    x_t = mix(data.x0, data.eps, t)
    dt = (t_next - t)[..., None, None, None]
    level = .5 * data.draws.u[:, F + 4:]
    for call in (*teacher.calls, *student.calls, *average.calls):
        torch.testing.assert_close(call.t[:, :F - 1], level[:, :F - 1])
        torch.testing.assert_close(call.x[:, :F - 1], mix(data.x0, data.eps, level)[:, :F - 1])
        assert same_camera(call.camera.frames(slice(F - 1, None)), data.camera)
    kept, null = teacher.calls
    assert torch.equal(kept.text, data.text) and kept.camera.on is None
    assert torch.equal(null.text, data.text) == (over == 'camera')                      # nothing else is dropped
    assert (null.camera.on is None) == (over == 'text')
    for call, x, at in ((kept, x_t, t), (null, x_t, t), (student.calls[0], x_t, t),
                        (average.calls[0], x_t - dt, t_next)):
        torch.testing.assert_close(noisy_half(call), (x, at), rtol=0, atol=1e-5)
    jump, target = x_t - .5 * t[..., None, None, None], x_t - dt - .25 * t_next[..., None, None, None]
    torch.testing.assert_close(error, (jump - target).square().mean((2, 3, 4)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss, error.mean())
    torch.testing.assert_close(times, t)


def test_the_target_of_consistency_is_the_average_as_it_is_now(data, tmp_path):
    model, clips, path = tiny_model(), batch(), f'{tmp_path}/ar.safetensors'
    save_model(path, model.state_dict(), model.cfg, stage='ar', step=1)
    cfg = distill_ode.Config(method='cd', init=path, teacher_steps=4)
    ema = {name: x.clone() for name, x in model.state_dict().items()}
    objective, _ = distill_ode.choose_objective(cfg, ALONE, ema, Clips(data))
    for change in (.01, .02):
        for x in ema.values():
            x += change * torch.randn_like(x)
        average = tiny_model()
        average.load_state_dict(ema)
        want = distill_ode.cd_loss(model, cfg, clips, model, average)[0]
        torch.testing.assert_close(objective(model, cfg, clips)[0], want)
        assert (want - distill_ode.cd_loss(model, cfg, clips, model, model)[0]).abs() > 1e-6


# ------------------------------------------------------------------------------------------------ stage 3

def towards(x0):
    """The answer of a score network that says where every frame came from."""
    return lambda call: (call.x - x0) / call.t.clamp(min=.01)[..., None, None, None]


@pytest.mark.parametrize('given', [0, 1])
def test_the_generators_loss_by_hand(given, monkeypatch):
    """The mean of (fake - real)^2 / size^2 over the frames that are not given, size the mean of |x - real| of a clip
    over the same; the gradient in x is (fake - real) / size over their number."""
    data, here = batch(), batch(1)                            # the scores see the rollout's cameras, not the batch's
    x = torch.randn(B, F, 16, H, W, requires_grad=True)
    monkeypatch.setattr(distill_dmd, 'self_rollout', lambda *a: distill_dmd.Rollout(x, given, here))
    real_x0, fake_x0 = torch.randn(2, B, F, 16, H, W)
    nets = {'generator': Known(None), 'real': Known(towards(real_x0)), 'fake': Known(towards(fake_x0))}
    cfg = distill_dmd.Config(frames=F, guidance=1.)
    loss, gap, out = distill_dmd.generator_loss(nets, cfg, data, [(0, 0, j) for j in range(B)])
    loss.backward()

    t = shifted(here.draws.u[:, :1]).clamp(.02, .98).repeat(1, F)
    t[:, :given] = 0
    for name in ('real', 'fake'):
        (call,) = nets[name].calls
        torch.testing.assert_close(call.t, t)
        torch.testing.assert_close(call.x, mix(x.detach(), here.eps, t))
        assert same_camera(call.camera, here.camera) and torch.equal(call.text, here.text)
    size = torch.stack([(x[b, given:] - real_x0[b, given:]).abs().mean() for b in range(B)]).detach()
    grad = (fake_x0 - real_x0)[:, given:] / size[:, None, None, None, None]
    torch.testing.assert_close(loss, .5 * grad.square().mean(), rtol=1e-4, atol=0)
    torch.testing.assert_close(gap, grad.abs().mean(), rtol=1e-4, atol=0)
    torch.testing.assert_close(x.grad[:, given:], grad / grad.numel(), rtol=1e-3, atol=1e-8)
    assert not x.grad[:, :given].any() and not out.x.requires_grad


@pytest.mark.parametrize('over', ['camera', 'text'])
def test_guidance_of_the_real_score_by_hand(over):
    """x0 is 1 and, unconditioned, 2: guided three times 2 + 3 (1 - 2) = -1. The fake score, which says 5, is not
    guided."""
    data, answers = batch(), iter([1., 2.])
    real = Known(lambda call: towards(torch.full_like(call.x, next(answers)))(call))
    fake = Known(lambda call: towards(torch.full_like(call.x, 5.))(call))
    t = torch.full((B, F), .5)
    grad = distill_dmd.dmd_gradient(data.x0, data.eps, t, data, real, fake, 3., over=over)
    size = (data.x0 + 1).abs().mean((1, 2, 3, 4))
    torch.testing.assert_close(grad, (6 / size)[:, None, None, None, None].expand_as(grad), rtol=1e-4, atol=1e-4)
    kept, null = real.calls
    (of_fake,) = fake.calls
    for call in (kept, of_fake):
        assert torch.equal(call.text, data.text) and call.camera.on is None
    assert null.text.any() == (over == 'camera') and (null.camera.on is None) == (over == 'text')
    assert same_camera(null.camera, data.camera) and (over == 'text' or not null.camera.on.any())


@pytest.mark.parametrize('given', [0, 1])
def test_the_critics_loss_by_hand(given):
    data, here = batch(), batch(1)
    x = torch.randn(B, F, 16, H, W)
    off = [.1, .2, .3, .4, .5]
    fake = Known(data.eps - x + by_frame(*off))               # fresh noise, the rollout's frames
    loss = distill_dmd.critic_loss({'fake': fake}, distill_dmd.Config(), data, distill_dmd.Rollout(x, given, here))
    (call,) = fake.calls
    t = shifted(data.draws.u[:, :1]).clamp(.02, .98).repeat(1, F)
    t[:, :given] = 0
    torch.testing.assert_close(call.t, t)
    torch.testing.assert_close(call.x, mix(x, data.eps, t))
    assert same_camera(call.camera, here.camera) and torch.equal(call.text, here.text)
    torch.testing.assert_close(loss, torch.tensor([c * c for c in off[given:]]).mean())


def test_every_plan_comes_up_and_all_processes_agree():
    cfg, m = distill_dmd.Config(student_steps=4, before=24, p_first=.5), dataclasses.replace(TINY, chunk=4)
    plans = [distill_dmd.plan_rollout(m, cfg, [(0, update, 0)]) for update in range(400)]
    assert plans == [distill_dmd.plan_rollout(m, cfg, [(0, update, 7)]) for update in range(400)]
    for values, known in zip(zip(*plans), (range(4), (0, 1), range(0, 25, 4))):
        share = [values.count(v) / 400 * len(known) for v in known]
        assert sum(values.count(v) for v in known) == 400 and .6 < min(share) and max(share) < 1.5


@pytest.mark.parametrize('sink', [False, True])
def test_a_self_rollout_is_the_walk_that_is_asked_for(sink, monkeypatch):
    """Its schedule, the noise of its history, its exit; and only what the scores see carries gradient."""
    cfg, data = distill_dmd.Config(frames=F, context=.25, student_steps=4, before=4), batch(length=12)
    data.eps = data.eps[:, :F]
    model, seen, asked = tiny_model(sink=sink, shift=SHIFT), [], {}

    def recorded(*args, **options):
        asked.update(options, times=args[3], text=args[2])
        return rollout(*args, **options)
    monkeypatch.setattr(distill_dmd, 'rollout', recorded)
    model.register_forward_hook(lambda m, args, kw, v: seen.append((args[0], args[1], v)), with_kwargs=True)
    for update in range(6):
        index = [(0, update, j) for j in range(B)]
        exit_step, given, before = distill_dmd.plan_rollout(model.cfg, cfg, index)
        seen.clear()
        out = distill_dmd.self_rollout(model, cfg, data, index)
        torch.testing.assert_close(asked['times'], torch.tensor([shifted(1 - i / 4) for i in range(5)]))
        assert asked['renoise'] and asked['window'] == F and asked['context'] == .25 and asked['exit_step'] == exit_step
        assert torch.equal(asked['text'], data.text) and out.x.shape[1] == F
        assert not any(x.requires_grad for x, _, _ in seen)   # a chunk is detached before it becomes history
        learn = [t[0, -1].item() for _, t, v in seen if v.requires_grad]
        learners = F if before and not sink else F - 1        # else frame 0, which is given, is among the scored ones
        assert learn == pytest.approx([shifted(1 - exit_step / 4)] * learners, rel=1e-4)
        denoising = sorted({round(t[0, -1].item(), 4) for _, t, _ in seen} - {0., .25})
        assert denoising == sorted(round(shifted(1 - i / 4), 4) for i in range(exit_step + 1))


@pytest.mark.parametrize('sink, before, elsewhere, jumps', [
    (False, 0, False, False), (False, 3, True, False), (True, 0, False, False), (True, 3, False, True),
    (True, 0, True, True)])
def test_the_move_across_a_sink_is_not_told(sink, before, elsewhere, jumps):
    data, m = batch(length=12), dataclasses.replace(TINY, sink=sink)
    if elsewhere:
        c2w = data.camera.c2w.clone()
        c2w[:, 1:, 0, 3] += 9
        data.camera = Camera(c2w, data.camera.K)
    path = distill_dmd.there_and_back(data.camera.c2w, before + F)
    kept, scored = distill_dmd.scored_window(m, data, path, before, F)
    assert kept == [0 if sink else before, *range(before + 1, before + F)]
    assert torch.equal(scored.x0, data.x0[:, kept])
    c2w = data.camera.c2w[:, kept].double()
    move = torch.linalg.inv(c2w[:, :-1]) @ c2w[:, 1:]
    if jumps:
        move[:, 0] = torch.eye(4)
    torch.testing.assert_close(scored.camera.move[:, 1:], move.float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(scored.camera.c2w, (torch.linalg.inv(c2w[:, :1]) @ c2w).float(), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------ what a chunk keeps

@pytest.mark.parametrize('camera, sink', [('plucker', False), ('plucker', True), ('prope', False)])
def test_a_yielded_chunk_keeps_no_graph(camera, sink):
    """Also when the window rolls, or is encoded again."""
    model, data, inputs = tiny_model(camera=camera, sink=sink), batch(length=9), []
    model.register_forward_hook(lambda m, args, kw, v: inputs.append(args[0].requires_grad), with_kwargs=True)
    one_by_one = map(Camera, data.camera.c2w.split(1, 1), data.camera.K.split(1, 1))
    noise = lambda n: torch.randn(B, n, 16, H, W)
    chunks = rollout(model, one_by_one, data.text, schedule(4, SHIFT), noise, data.x0[:, :1], window=4, renoise=True,
                     exit_step=1, context=.2)
    assert [x.requires_grad for x in chunks] == [False] + [True] * 8
    assert len(inputs) >= 16 and not any(inputs)


@pytest.mark.parametrize('sink', [False, True])
def test_walks_of_stage_3_begin_at_the_door(sink, tmp_path):
    """Where clips have one, and a sink keeps it: also if nothing is generated before the scored frames."""
    folder = make(Config(out=f'{tmp_path}/d', plans=1, clips=8, val_clips=1, frames=9, door=True, height=16, width=16))
    clips = Clips(folder)
    run = Run(0, 1, torch.device('cpu'), torch.float32, micro=16)
    cfg = distill_dmd.Config(frames=F, before=0, batch=16)
    ((data, _),) = distill_dmd.micro_batches(0, tiny_model(sink=sink), cfg, run, clips)
    doors = [clips.read(i, ['latents'])[0][0].float() for i in range(8)]
    at_the_door = [any(torch.equal(x, door) for door in doors) for x in data.x0[:, 0]]
    assert all(at_the_door) if sink else 0 < sum(at_the_door) < 16


def test_other_processes_are_waited_for_longer_than_an_evaluation_takes(monkeypatch, tmp_path):
    """NCCL's own ten minutes would end a run while rank 0 evaluates."""
    asked = {}
    monkeypatch.setattr(common.dist, 'init_process_group', lambda backend, timeout: asked.update(timeout=timeout))
    for name, value in (('RANK', '1'), ('WORLD_SIZE', '2'), ('LOCAL_RANK', '0')):
        monkeypatch.setenv(name, value)
    common.setup(train_ar.Config(out=str(tmp_path), device='cpu'))
    assert asked['timeout'].total_seconds() >= 3600


# ------------------------------------------------------------------------------------------------ the loop

def test_a_step_averages_its_micro_batches_and_no_sample_comes_twice(data, tmp_path, monkeypatch):
    """Three steps of two micro-batches of two: samples 0 to 11, in order. The loss is the bias times the mean of the
    noise, so its gradient is that mean, over a step's four samples. (The loop is the same in stages 0 to 2.)"""
    model, clips, seen, grads, kept = tiny_model(), Clips(data), [], [], []
    cfg = train_ar.Config(frames=F, batch=4, accum=2, steps=3, warmup=0, data=data, out=str(tmp_path), muon=False)
    bias = model.head.head.bias

    def objective(net, cfg, batch):
        seen.append(batch.eps)
        return bias.sum() * batch.eps.mean(), torch.zeros(2, F), torch.zeros(2, F)

    def before_the_step(params, limit):
        grads.append(bias.grad.clone())
        return 0.
    monkeypatch.setattr(train_ar, 'clip_gradients', before_the_step)
    monkeypatch.setattr(train_ar, 'score', lambda evaluate, cfg, stage, run, model, ema, *more: (ema, {}))
    monkeypatch.setattr(train_ar, 'update_ema', lambda ema, model, decay, step: kept.append((decay, step)))
    run = Run(0, 1, torch.device('cpu'), torch.float32, micro=2)
    ema = {name: x.clone() for name, x in model.state_dict().items()}
    train_ar.train(cfg, 'ar', run, model, ema, objective, clips, Clips(data, 'val'))
    eps = get_batch(clips, 0, 12, F, model.cfg).eps
    assert torch.equal(torch.cat(seen), eps)
    for step, grad in enumerate(grads):
        torch.testing.assert_close(grad, eps[4 * step:4 * step + 4].mean().expand(len(bias)))
    assert len(grads) == 3 and kept == [(cfg.ema, 0), (cfg.ema, 1), (cfg.ema, 2)]
