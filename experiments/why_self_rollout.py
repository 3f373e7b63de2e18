"""
Why does stage 3 roll out the generator on its own frames?

Self Forcing's argument: in streaming the generator is conditioned on frames that it generated itself. If
stage 3 conditions it on true frames instead, it never meets its own errors, and DMD has nothing of them to
correct.

    python -m experiments.why_self_rollout out data/lowpoly-500

Runs stage 3 twice from the same student: with its self-rollout, then with `rollout_on_true_history` in its
place, all else equal. Prints how both roll out along held-out paths on their own frames, after the last
update. Twice the minutes of stage 3; leaves both runs in the first folder. If it is stopped, run it again:
it continues.
"""
import sys

import torch

import distill_dmd
from common import load_tensors
from data import noise_for
from distill_dmd import Rollout, plan_rollout, scored_window, there_and_back
from model import add_noise, schedule, teacher_forced, v_to_x0

COLUMNS = {                           # of the table: digits
    'psnr@1': 2, 'psnr@7': 2, 'gap@7': 2, 'sharpness': 2, 'motion': 2, 'fd': 3,
}


def rollout_on_true_history(model, cfg, batch, index):
    """As distill_dmd.self_rollout, but all chunks at once, each conditioned on the true frames before it."""
    grad = torch.is_grad_enabled()
    exit_step, given, before = plan_rollout(model.cfg, cfg, index)
    path = there_and_back(batch.camera.c2w, before + cfg.frames)
    _, scored = scored_window(model.cfg, batch, path, before, cfg.frames)
    noise = noise_for(index, batch.x0.shape[2:], batch.x0.device, stream=13)
    times = schedule(cfg.student_steps, model.cfg.shift)
    x = noise(cfg.frames)
    for i in range(exit_step + 1):
        t = times[i].expand(x.shape[:2]).to(x.device)
        with torch.set_grad_enabled(grad and i == exit_step):
            v = teacher_forced(model, model.cfg, scored, x, t)
            x0 = v_to_x0(x, v, t)
        t_next = torch.full_like(t, times[i + 1].item())
        x = add_noise(x0, noise(cfg.frames), t_next)
    x0 = torch.cat([scored.x0[:, :given], x0[:, given:]], 1)
    return Rollout(x0, given, scored)


def stage_3(start, data, out, rollout):
    """Metrics after the last update of stage 3 with this rollout."""
    distill_dmd.self_rollout = rollout                             # generator_loss looks it up there
    cfg = distill_dmd.Config(init=f'{start}/ode.safetensors', score=f'{start}/camera.safetensors',
                             data=data, out=out)
    distill_dmd.main(cfg)
    _, header = load_tensors(f'{out}/dmd.last.safetensors')
    return header['metrics']


def main(start, data):
    rollouts = {'its own frames': distill_dmd.self_rollout, 'true frames': rollout_on_true_history}
    metrics = {}
    for i, (name, rollout) in enumerate(rollouts.items()):
        metrics[name] = stage_3(start, data, f'{start}/why-self-rollout-{i}', rollout)
    print('\n| conditioned on | ' + ' | '.join(COLUMNS) + ' |\n' + '|---' * (len(COLUMNS) + 1) + '|')
    for name, m in metrics.items():
        cells = [f'{m[key]:.{digits}f}' for key, digits in COLUMNS.items()]
        print(f'| {name} | ' + ' | '.join(cells) + ' |')


if __name__ == '__main__':
    main(*sys.argv[1:])
