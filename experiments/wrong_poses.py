"""
A tenth of the clips has wrong poses. Does papers/data_uncertainty.py find them, and what is that worth?

    python -m papers.data_uncertainty             # 35 minutes on one core; leaves out/data_uncertainty/

Makes data/lowpoly-500 and out/base.safetensors, as bash run.sh does, if they are missing. Of the wrong clips
half have the path of another one, and half are mirrored, left for right. Stage 0 learns from the clips (400
steps, frame 0 always given) in five WAYS. A clip that is left out is replaced by one that stays, so that all
ways see the rest at the same steps with the same noise. The filter is told how many clips are wrong. Prints
how well each score finds them, whom its worst tenth takes, and how well the camera is followed afterwards.
"""
import json
import os
import shutil

import numpy as np
import torch

import data
import finetune_camera
from camera import Camera, relative
from common import load_model, load_tensors, write_json
from data import Clips, get_batch
from experiments.ablate import BASE, DATA, print_row, print_title, pyplot, spread, table
from papers.data_uncertainty import move_vectors, read_clips, suspicion, write_clips

OUT = 'out/data_uncertainty'
SEEDS = 3
WRONG = .1                            # share of the clips
WAYS = 'clean', 'untouched', 'filtered', 'weighted', 'random'
SCORES = [
    'relative distance',
    'plain distance',
    'relative distance, 9 frames',
    'loss, 9 frames',
    'loss less loss without camera, 9 frames',
]

# -----------------------------------------------------------------------------
# wrong poses, and what is done about them

def spoil(c2w, seed):
    """(poses; 1 where they are of another clip, 2 where they are mirrored, else 0)"""
    order = np.random.default_rng([21, seed]).permutation(len(c2w))
    other, mirrored = np.array_split(order[:round(WRONG * len(c2w))], 2)
    mirror = torch.diag(torch.tensor([-1., 1, 1, 1]))
    poses = c2w.clone()
    poses[other] = c2w[np.roll(other, 1)]
    poses[mirrored] = mirror @ c2w[mirrored] @ mirror
    wrong = torch.zeros(len(c2w))
    wrong[other] = 1
    wrong[mirrored] = 2
    return poses, wrong


def how_often(way, score, rng):
    """How often each clip is used, 0 to 1: (n,)."""
    rank = score.argsort(descending=True).argsort().numpy() / len(score)   # 0: the most suspicious
    use = {
        'filtered': rank >= WRONG,
        'weighted': np.minimum(1, rank / WRONG / 2),                       # from 0 to 1 over a fifth of them
        'random': rng.permutation(rank) >= WRONG,
    }
    return use.get(way, rank >= 0).astype(float)


def train(way, seed, latents, c2w):
    """Stage 0 on the clips in one of the WAYS: the path of its checkpoint."""
    out = f'{OUT}/{way}-{seed}'
    path = f'{out}/camera.safetensors'
    if not os.path.exists(path):
        poses, _ = spoil(c2w, seed)
        score, _ = suspicion(latents, poses)
        rng = np.random.default_rng([22, seed])
        use = how_often(way, score, rng)
        gone = rng.random(len(use)) >= use
        order = np.arange(len(use))
        order[gone] = rng.choice(len(use), gone.sum(), p=use / use.sum())  # others come in their place
        folder = f'{out}/clips'
        if not os.path.exists(folder):                                     # else the run goes on
            write_clips(DATA, order, c2w if way == 'clean' else poses, folder)
        finetune_camera.main(finetune_camera.Config(
            init=BASE, data=folder, out=out, seed=seed, steps=400, p_first=1.))
        shutil.rmtree(folder)
    return path

# -----------------------------------------------------------------------------
# which score finds them?

@torch.inference_mode()
def losses(path, poses):
    """The loss of each clip's first frames at one time, and how much higher it is than without a camera."""
    model, _ = load_model(path)
    cfg = finetune_camera.Config(p_first=1.)
    clips = Clips(DATA)
    clips.split = 'val'                                                    # one after the other
    loss = []
    for i in range(0, len(clips), 40):
        count = min(40, len(clips) - i)
        batch = get_batch(clips, i, count, cfg.frames, model.cfg)
        batch.camera = Camera(relative(poses[i:i + 40, :cfg.frames]), batch.camera.K)
        batch.draws.u.fill_(.5)
        _, on, _ = finetune_camera.loss_fn(model, cfg, batch)
        batch.draws.drop_camera.fill_(0)
        _, off, _ = finetune_camera.loss_fn(model, cfg, batch)
        loss.append(torch.stack([on, on - off])[:, :, 1:].mean(2))
    return torch.cat(loss, 1)


def top_tenth(x):
    return x >= x.quantile(.9)


def judge(score, wrong, hard):
    """How well a score (n,) tells wrong clips from right ones, and what its worst tenth is."""
    right = wrong == 0
    removed = top_tenth(score).double()

    def auroc(bad):
        return (score[bad, None] > score[right]).double().mean().item()

    row = {"AUROC, another's path": auroc(wrong == 1), 'AUROC, mirrored': auroc(wrong == 2)}
    row['wrong among removed'] = (removed @ (~right).double() / removed.sum()).item()
    row['right removed'] = removed[right].mean().item()
    for name, those in hard.items():
        row[f'{name} removed'] = removed[right & those].mean().item()
    return row


def find(seed, latents, c2w):
    """{score: how well it does}; kept in a file."""
    path = f'{OUT}/found-{seed}.json'
    if not os.path.exists(path):
        poses, wrong = spoil(c2w, seed)
        hard = {
            'fast': top_tenth(move_vectors(c2w).norm(dim=1).view(len(c2w), -1).mean(1)),
            'bare': top_tenth(-latents.diff(dim=4).square().mean((1, 2, 3, 4))),
        }
        distances = suspicion(latents, poses)
        short, _ = suspicion(latents[:, :9], poses[:, :9])
        scores = [*distances, short, *losses(train('untouched', seed, latents, c2w), poses)]
        write_json(path, {name: judge(score, wrong, hard) for name, score in zip(SCORES, scores)})
    with open(path) as f:
        return json.load(f)

# -----------------------------------------------------------------------------
# tables and picture

def draw(score, wrong, trained):
    """How suspicious right and wrong clips are; how well the camera is followed after training on them."""
    if pyplot is None:
        return print('no picture: pip install matplotlib')
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout='constrained')
    bins = np.linspace(score.min(), score.max(), 35)
    for i, label in enumerate(('right poses', "another clip's poses", 'mirrored poses')):
        left.hist(score[wrong == i], bins, density=True, alpha=.55, label=label)
    left.set(xlabel='relative distance, mean over the moves of a clip', ylabel='density of clips')
    left.set_title('clips with wrong poses stand apart', fontsize=10)
    left.legend(fontsize=8)
    means, spreads = zip(*[spread(runs, 'gap@7') for runs in trained.values()])
    right.bar(list(trained), means, .6, yerr=spreads, capsize=3)
    right.set(ylabel='gap@7, dB')
    right.set_title('control after training (clean: without wrong poses)', fontsize=10)
    figure.savefig('assets/papers/data_uncertainty.png', dpi=110)
    return None


def experiment():
    data.make(data.Config(out=DATA))
    if not os.path.exists(BASE):
        finetune_camera.main(finetune_camera.Config(camera='none', steps=300, data=DATA))
    latents, c2w = read_clips(Clips(DATA))
    found, trained = {}, {}
    for seed in range(SEEDS):
        for way in WAYS:
            _, header = load_tensors(train(way, seed, latents, c2w))
            trained.setdefault(way, []).append(header['metrics'])
        for name, row in find(seed, latents, c2w).items():
            found.setdefault(name, []).append(row)
    print_title(['score', *row])
    for name, runs in found.items():
        print_row([name], runs, row)
    table('clips', trained)
    for key in ('psnr@7', 'gap@7'):
        means = {way: spread(runs, key)[0] for way, runs in trained.items()}
        cost = means['clean'] - means['untouched']
        for way, mean in means.items():
            print(f'{key}, {way}: {(mean - means["untouched"]) / cost:.0%} of the {cost:.2f} dB come back')
    poses, wrong = spoil(c2w, 0)
    draw(suspicion(latents, poses)[0], wrong, trained)
