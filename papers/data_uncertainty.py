"""
Which clips have wrong poses? After "Exploring Aleatoric Uncertainty in Object Detection via Vision Foundation
Models" (Cui et al., arXiv 2411.17767), with the relative distance of "Learning Sample Difficulty from
Pre-trained Models for Reliable Prediction" (Cui et al., NeurIPS 2023, arXiv 2304.10127).

Claim. Noisy samples can be found before any training, and leaving them out helps. Features V of a sample of
class c are taken to be Gaussian, with a mean for each class and one covariance for all. A sample is noisy if
it is far from the mean of its class, farther than from the mean of all samples:

    M_c = (V - mu_c)^T Sigma^-1 (V - mu_c)          relative distance = M_c - M_0

Here a sample is the step from one frame to the next. Its class is the kind of move that its poses claim. V is
how its pictures change. A clip is as suspicious as its moves are in the mean. Only the order of clips counts:
the covariances differ, so 0 means nothing.

    python -m papers.data_uncertainty data/mine --worst 20                       # lists them; a contact sheet
    python -m papers.data_uncertainty data/mine --drop 0.05 --out data/clean     # the others, to train on
    python -m papers.data_uncertainty              # the experiment, in experiments/wrong_poses.py

Clips are numbered as in the training shards. Held-out clips are copied as they are. 1,600 clips take seven
seconds.

What shows (LOG.md): if a tenth of the clips is wrong, this finds them, nine in ten of what it removes are
wrong, and leaving them out brings four fifths of the lost control back; the plain distance and the training
loss hardly find them.

What is ours: classes by k-means of the moves; V from the clips' own latents, where the paper pools features
of SAM; the mean over moves. The paper takes the logarithm of a distance; whether of the relative one we could
not see, nor its equations 3 to 6.
"""
import os
import shutil
import sys
from dataclasses import dataclass

import torch
from einops import rearrange
from torch.nn.functional import adaptive_avg_pool2d, one_hot

from camera import BadInput, moves
from common import command_line, save_tensors, write_json
from data import Clips, write_strip

SHEET = 'out/data_uncertainty/worst.png'

# -----------------------------------------------------------------------------
# the idea: do the pictures change as this kind of move changes them?

def change_features(latents):
    """Latents (n, F, C, 8, 8) -> (n (F - 1), 8 C), of each move: the cosine between the difference of its two
    frames and their gradient, down and across, in each channel of each quarter of the picture."""
    def quarters(x):
        return rearrange(x, 'n c (a h) (b w) -> n (c a b) (h w)', a=2, b=2)

    before = latents[:, :-1].flatten(0, 1)
    after = latents[:, 1:].flatten(0, 1)
    change = quarters(after - before)
    cosines = []
    for slope in torch.gradient((before + after) / 2, dim=(2, 3)):
        cosines.append(torch.cosine_similarity(change, quarters(slope), 2))
    return torch.cat(cosines, 1).double()


def move_vectors(c2w):
    """Paths (n, F, 4, 4) -> (n (F - 1), 5), of each move: where the camera went and how far its axis turned
    to the right and down, both in units of their RMS."""
    move = moves(c2w.double())[:, 1:].flatten(0, 1)
    parts = []
    for x in (move[:, :3, 3], move[:, :2, 2]):
        size = x.square().sum(1).mean().sqrt()
        parts.append(x / size.clamp(min=1e-9))
    return torch.cat(parts, 1)


def means(x, kind, kinds):
    """The mean of the rows of x (N, D) of each kind (N,): (kinds, D)."""
    member = one_hot(kind, kinds).double()                                 # (N, kinds)
    return member.T @ x / member.sum(0)[:, None].clamp(min=1)


def kinds_of_move(c2w, most=32):
    """A number for each move, one for all that are alike, by k-means: (n (F - 1),)."""
    vectors = move_vectors(c2w)
    kinds = min(most, 1 + len(vectors) // 50)
    order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))
    centres = vectors[order[:kinds]]
    for _ in range(20):
        kind = torch.cdist(vectors, centres).argmin(1)
        centres = means(vectors, kind, kinds)
    return kind


def mahalanobis(features, kind, ridge=.1):
    """Squared distance (N,) of features (N, D) to the mean of their kind (N,); one covariance for all."""
    rest = features - means(features, kind, 1 + kind.max())[kind]
    covariance = rest.T @ rest / len(rest)
    covariance.diagonal().add_(ridge * covariance.diagonal().mean() + 1e-9)
    return (rest @ covariance.inverse() * rest).sum(1)


def suspicion(latents, c2w):
    """How badly clips (n, F, C, 8, 8) fit their poses (n, F, 4, 4), (n,): relative and plain distance."""
    features = change_features(latents)
    kind = kinds_of_move(c2w)
    plain = mahalanobis(features, kind)
    to_any_kind = mahalanobis(features, torch.zeros_like(kind))
    return [x.view(len(c2w), -1).mean(1) for x in (plain - to_any_kind, plain)]

# -----------------------------------------------------------------------------
# the tool

@dataclass
class Config:
    data: str = ''                # folder of clips; none: the experiment
    worst: int = 20               # how many suspicious clips are shown
    drop: float = 0.              # this share of the training clips, the most suspicious, ...
    out: str = ''                 # ... is left out of this new folder


def read_clips(clips):
    """The latents of all clips, averaged to 8 x 8 cells, and their poses."""
    latents, c2w = [], []
    for i in range(len(clips)):
        z, path = clips.read(i, ['latents', 'c2w'])
        if len(z) < 2 or not (z.isfinite().all() and path.isfinite().all()):
            raise BadInput(f'clip {i} is a single frame, or holds what is no number: make the clips again')
        latents.append(adaptive_avg_pool2d(z.float(), 8))
        c2w.append(path.float())
    return torch.stack(latents), torch.stack(c2w)


def write_clips(folder, order, poses, out):
    """A new folder: the training clips `order` of another, with these of all its poses, and its held-out
    clips. It gets its name when it is whole."""
    clips = Clips(folder)
    file, _ = clips.rows[0]
    tmp = f'{os.path.normpath(out)}.tmp'
    os.makedirs(tmp, exist_ok=True)
    shards = [shard for shard in clips.manifest['shards'] if shard['file'].startswith('val')]
    for shard in shards:
        shutil.copy(f'{folder}/{shard["file"]}', tmp)
    for start in range(0, len(order), 50):
        rows = order[start:start + 50]
        tensors = {}
        for key in file.keys():
            if key == 'null_text':                                         # one for all clips
                tensors[key] = file.get_tensor(key)
            else:
                tensors[key] = torch.stack([clips.read(i, [key])[0] for i in rows])
        tensors['c2w'] = poses[rows]
        name = f'train_{start:06d}.safetensors'
        save_tensors(f'{tmp}/{name}', tensors, {'captions': [clips.captions[i] for i in rows]})
        shards.append({'file': name, 'clips': len(rows)})
    clips.manifest['shards'] = shards
    clips.manifest['recipe']['clips'] = len(order)
    write_json(f'{tmp}/manifest.json', clips.manifest)
    os.rename(tmp, out)


def look(cfg):
    """List the suspicious clips of a folder, write the others, show the suspicious ones."""
    if not 0 <= cfg.drop < 1 or bool(cfg.drop) != bool(cfg.out):
        raise BadInput('--drop, a share below 1, and --out go together: --drop 0.05 --out data/clean')
    if os.path.exists(cfg.out):
        raise BadInput(f'--out {cfg.out}: it is there already, name another')
    clips = Clips(cfg.data)
    latents, c2w = read_clips(clips)
    score, _ = suspicion(latents, c2w)
    order = score.argsort(descending=True).tolist()
    worst = order[:max(1, cfg.worst)]
    for i in worst:
        print(f'{score[i]:8.2f}  clip {i:5d}  {clips.captions[i][:80]}')
    if cfg.out:
        kept = sorted(order[int(cfg.drop * len(order)):])
        write_clips(cfg.data, kept, c2w, cfg.out)
        print(f'{cfg.out}: {len(kept)} of the {len(order)} training clips')
    decode = clips.codec().decode
    videos = torch.cat([decode(clips.read(i)[0][None].float()) for i in worst])     # (n, F, H, W, 3)
    step = 1 + videos.shape[2] // 128                                      # pixels
    write_strip(SHEET, videos[:, :, ::step, ::step], scale=1)
    print(f'{SHEET}: their frames, a row for each')


def main(cfg):
    if cfg.data:
        return look(cfg)
    from experiments.wrong_poses import experiment
    return experiment()


if __name__ == '__main__':
    if len(sys.argv) > 1 and not sys.argv[1].startswith('-'):
        sys.argv.insert(1, '--data')
    command_line(main, Config, __doc__)
