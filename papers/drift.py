"""
Learning on one's own rollouts before DMD: `--drift` of train_ar.py (stage 1) and distill_ode.py (stage 2).

Claim. A model that has only seen true history (teacher forcing) does not know what to do with its own, which
is a little wrong after one frame and lost after a hundred. Conditioned on its own rollouts in a share of the
steps, with the true clip still as the target, it learns to come back (scheduled sampling, Bengio et al.
2015). A student needs the same: its pairs must start from histories that the teacher has generated (DAgger,
Ross et al. 2011).

    python train_ar.py --drift 0.5 --sink True ...          # with clips longer than --frames
    python distill_ode.py --drift 0.5 ...

What it gives: checkpoints/home.safetensors was trained so, and keeps its place for 1,000 frames (NUMBERS.md).
A resumed run of stage 1 begins its rollouts again, so it does not repeat an uninterrupted run bit for bit.
"""
from dataclasses import dataclass, replace

import numpy as np
import torch

from camera import Camera, moves, relative, starts_elsewhere
from data import Batch, Draws, noise_for
from model import rollout_clip, schedule

TURNS = 16                        # batches of rollouts that take turns, so that training meets many places


def windows(c2w, K, rows, frames, jump):
    """The Camera of the frames (n, F) of the paths c2w[rows], with K (n, F, 4). jump (n,) marks those whose
    frame 0 does not lead to frame 1."""
    path = c2w[rows[:, None], frames]                                      # (n, F, 4, 4)
    return Camera(relative(path), K, move=moves(path, jump=jump))

# -----------------------------------------------------------------------------
# stage 1

@dataclass
class Rollout:
    """Where a batch of rollouts through whole clips stands."""
    clip: torch.Tensor            # (B, n, C, H, W) the true frames
    c2w: torch.Tensor             # (B, n, 4, 4) their poses
    K: torch.Tensor               # (B, F, 4)
    text: torch.Tensor            # (B, text_len, text_dim)
    history: torch.Tensor         # (B, half, C, H, W) the newest frames, the model's own
    start: torch.Tensor           # (B,) frame of the clip at which the history begins


class Drift:
    """loss_fn, except that in a share cfg.drift of the steps the history is the model's own rollout, while
    the target is still the clip. Every turn continues a batch of rollouts by half a window; a rollout ends
    with its clip, or by chance. Clips are read with these `keys`: batch.more holds whole clips and poses."""
    keys = ('latents', 'c2w', 'K', 'latents', 'c2w')                       # the second pair is not cropped

    def __init__(self, cfg, loss_fn):
        self.rng = np.random.default_rng([11, cfg.seed])
        self.loss_fn = loss_fn
        self.rollouts = {}                                                 # {turn: Rollout}

    def __call__(self, net, cfg, batch):
        if self.rng.random() >= cfg.drift:
            return self.loss_fn(net, cfg, batch)
        model = getattr(net, 'module', net)
        turn = int(self.rng.integers(TURNS))
        half = half_window(cfg.frames, model.cfg)
        now = self.continue_or_begin(turn, batch, half)
        # 1) the window: the history, and as many frames on; with a sink its first frame is the clip's
        frames = now.start[:, None] + torch.arange(cfg.frames, device=now.start.device)     # (B, F)
        jump = torch.zeros_like(now.start, dtype=torch.bool)
        if model.cfg.sink:
            jump = (now.start > 0) | starts_elsewhere(now.c2w)
        frames[jump, 0] = 0
        rows = torch.arange(len(frames), device=frames.device)
        # 2) generate it, conditioned on the history
        seeds = [int(u * 2 ** 24) for u in batch.draws.noise_seed.tolist()]
        noise = noise_for(seeds, now.clip.shape[2:], now.clip.device, stream=13)
        times = schedule(4, model.cfg.shift)
        if hasattr(model, 'unshard'):                                      # FSDP: for embed_camera
            model.unshard()
        with torch.no_grad():
            path = now.c2w[rows[:, None], frames]                          # (B, F, 4, 4)
            video = rollout_clip(model, path, now.K, now.text, times, noise, now.history, window=cfg.frames,
                                 context=cfg.context, jump=jump)
        # 3) the next turn goes on from its newest half
        newest = video[:, -half:]
        if model.cfg.sink:
            newest = torch.cat([video[:, :1], newest[:, 1:]], 1)
        self.rollouts[turn] = replace(now, history=newest, start=now.start + cfg.frames - half)
        # 4) the model's own frames are the history, the clip's are the target
        camera = windows(now.c2w, now.K, rows, frames, jump)
        target = replace(batch, x0=now.clip[rows[:, None], frames], camera=camera, text=now.text)
        return self.loss_fn(net, cfg, target, video)

    def continue_or_begin(self, turn, batch, half):
        """The rollouts of this turn; those that have ended begin again in the clips of this batch."""
        clip, c2w = batch.more
        start = torch.zeros(len(clip), dtype=torch.long, device=clip.device)
        clip = clip.float()
        new = Rollout(clip, c2w, batch.camera.K, batch.text, clip[:, :half], start)
        old = self.rollouts.get(turn, new)
        ended = old.start + batch.x0.shape[1] > clip.shape[1]                # (B,)
        ended |= batch.draws.restart < .05
        chosen = {}
        for name, fresh in vars(new).items():
            shape = -1, *[1] * (fresh.ndim - 1)
            chosen[name] = torch.where(ended.view(shape), fresh, getattr(old, name))
        return Rollout(**chosen)


def half_window(frames, cfg):
    """Half of a window of frames, in whole chunks."""
    later = (frames + 1) // 2 - cfg.first_chunk
    return cfg.first_chunk + later // cfg.chunk * cfg.chunk

# -----------------------------------------------------------------------------
# stage 2

@torch.no_grad()
def rolled_out_windows(teacher, cfg, clip, rng, count):
    """Whole clips (a Batch) -> `count` windows of cfg.frames frames of them, generated by the teacher: the
    history of the pairs. A clip is rolled out once, from its first frame, for all its windows."""
    m, F = teacher.cfg, cfg.frames
    B, length = clip.x0.shape[:2]
    c2w, K = clip.camera.c2w, clip.camera.K
    jump = starts_elsewhere(c2w)                                           # (B,)
    times = schedule(min(cfg.student_steps, cfg.teacher_steps), m.shift)
    seeds = rng.integers(2 ** 31, size=B)
    noise = noise_for(seeds, clip.x0.shape[2:], K.device, stream=13)
    video = rollout_clip(teacher, c2w, K, clip.text, times, noise, clip.x0[:, :1], window=F, jump=jump,
                         guidance=cfg.guidance, over=cfg.over, context=cfg.context, null_text=clip.null_text)

    # window i is of clip rows[i] and begins at frame start[i]; with a sink its first frame is the clip's
    rows = torch.arange(count, device=K.device) % B
    chunks = rng.integers((length - F) // m.chunk + 1, size=count)
    start = torch.from_numpy(m.chunk * chunks).to(K.device)
    frames = start[:, None] + torch.arange(F, device=K.device)             # (count, F)
    kept = frames.clone()
    jump = jump[rows] | (start > 0)
    if m.sink:
        kept[:, 0] = 0
    else:
        jump = torch.zeros_like(jump)
    row = rows[:, None]
    columns = start[:, None] + torch.arange(2 * F + 4, device=K.device)
    return Batch(
        x0=video[row, kept],
        camera=windows(c2w, K[row, kept], rows, kept, jump),
        text=clip.text[rows],
        eps=clip.eps[row, frames],
        draws=Draws(clip.draws.u[row, columns]),
        captions=tuple(clip.captions[i] for i in rows.tolist()),
        null_text=None if clip.null_text is None else clip.null_text.expand_as(clip.text)[rows],
    )
