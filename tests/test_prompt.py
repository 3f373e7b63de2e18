"""A prompt that is dropped is zeros or, with --wan, the empty prompt as Wan's text encoder embeds it."""
from dataclasses import replace

import numpy as np
import pytest
import torch

import distill_dmd
import distill_ode
import finetune_camera
import stream
import train_ar
from camera import Camera
from data import Dct
from model import rollout_clip, schedule
from papers.drift import rolled_out_windows
from test_distill import B, F, batch
from test_model import tiny_model

OVER_TEXT = dict(guidance=2., over='text')


def noise(n):
    return torch.randn(B, n, 16, 4, 4)


def walk(model, b):
    rollout_clip(model, b.camera.c2w, b.camera.K, b.text, schedule(1, 3.), noise, null_text=b.null_text, **OVER_TEXT)


class Codec(Dct):
    def __init__(self, b):
        self.b = b

    def embed(self, captions, cfg, first=None):
        null = torch.zeros(B, 4, 8) if self.b.null_text is None else self.b.null_text
        return (self.b.text if captions[0] else null)[:len(captions)]


def generate(model, b):
    cfg = stream.Config(steps=1, **OVER_TEXT)
    stream.generate(model, cfg, {'stage': 'ar', 'frames': F}, Codec(b), b.camera.c2w, b.camera.K[:, 0], ['a room'] * B,
                    None, noise)


def live(model, b):
    server = stream.Live(stream.Config(fps=8, **OVER_TEXT), torch.device('cpu'), torch.float32)
    server.model, server.codec, server.header = model, Codec(b), {'stage': 'ar', 'frames': F}
    server.asked = {'ckpt': 'dmd', 'steps': 1, 'prompt': 'a room'}
    server.latents, server.frame = None, 0
    server.cameras = lambda path: [Camera(b.camera.c2w[:1, :1], b.camera.K[:1, :1])]
    with pytest.raises(IndexError):                           # it looks for the keys of this frame: there are none
        server.walk(32, 32)


def drift(model, b):
    cfg = distill_ode.Config(frames=3, student_steps=1, **OVER_TEXT)
    windows = rolled_out_windows(model, cfg, b, np.random.default_rng(0), 2)
    if b.null_text is not None:                               # window i is of clip i % B
        assert torch.equal(windows.null_text, b.null_text[torch.arange(2) % B])


def consistency(model, b):
    cfg = distill_ode.Config(method='cd', teacher_steps=4, **OVER_TEXT)
    distill_ode.cd_loss(tiny_model(), cfg, b, model, tiny_model())


@pytest.mark.parametrize('embedded', [False, True])
@pytest.mark.parametrize('drop', [
    lambda model, b: finetune_camera.loss_fn(model, finetune_camera.Config(drop_text=1.), b),
    lambda model, b: train_ar.loss_fn(model, train_ar.Config(drop_text=1.), b),
    lambda model, b: distill_ode.ode_states(model, b, torch.zeros(B, F), schedule(2, 3.), torch.ones(1), **OVER_TEXT),
    lambda model, b: distill_dmd.dmd_gradient(b.x0, b.eps, torch.ones(B, F), b, model, tiny_model(), **OVER_TEXT),
    consistency, drift, walk, generate, live],
    ids=['stage 0', 'stage 1', 'pairs', 'dmd', 'cd', 'drift', 'rollout', 'stream', 'live'])
def test_what_a_dropped_prompt_is(drop, embedded):
    model, texts = tiny_model(), []
    model.register_forward_pre_hook(lambda _, args: texts.append(args[2]))
    null = torch.randn(1, 4, 8).expand(B, -1, -1) if embedded else None
    drop(model, replace(batch(), null_text=null))
    want = torch.zeros(B, 4, 8) if null is None else null
    assert any(torch.equal(text[-1], want[-1]) for text in texts)
