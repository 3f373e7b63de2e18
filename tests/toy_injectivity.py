"""
Causal Forcing's claim in closed form: why a causal student must not regress a bidirectional teacher's ODE.

A video of two frames, one number each, from a mixture of two Gaussians at (-1, -1) and (1, 1). The scores of all its
noised versions are known, so the probability-flow ODEs of two teachers are exact up to the step of the integrator:

    bidirectional   moves both frames together: where frame 1 ends depends on the noise of frame 2
    autoregressive  moves frame 1 alone, then frame 2 given the true frame 1

A causal student of frame 1 sees the noise of frame 1 only. Its best answer under squared error is the mean of the end
points that share this noise, found here by averaging over narrow bins. Lemma 3.2 and Proposition 3.3 say: after the
bidirectional teacher a loss floor E Var(Y | X) remains and E|Y^|^2 < E|Y|^2 (blur); after the autoregressive one neither.

    python tests/toy_injectivity.py
"""
import torch

MEANS, STD = torch.tensor([[-1., -1.], [1., 1.]], dtype=torch.float64), .2


def velocity(x, t, means, log_weights=None):
    """Exact (x - E[x0 | x_t]) / t of a mixture of N(means, STD^2), x (n, d), means (k, d), log_weights (n, k)."""
    var = (1 - t) ** 2 * STD ** 2 + t ** 2
    d = x[:, None] - (1 - t) * means                                         # (n, k, d)
    logits = -d.square().sum(-1) / (2 * var) + (0 if log_weights is None else log_weights)
    ends = means + (1 - t) * STD ** 2 / var * d                              # E[x0 | x_t, component]
    return (x - (logits.softmax(-1)[..., None] * ends).sum(1)) / t


def flow(x, means, log_weights=None, start=1.0, steps=100):
    """The end point of the ODE from x at time `start`, by Heun steps, the last one Euler's."""
    times = torch.linspace(start, 0, steps + 1).tolist()
    for t, s in zip(times[:-1], times[1:]):
        v = velocity(x, t, means, log_weights)
        if s > 0:
            v = (v + velocity(x + (s - t) * v, s, means, log_weights)) / 2
        x = x + (s - t) * v
    return x


def conditional(y, *given, bins=200):
    """(loss floor E Var(y | given), E y^^2 / E y^2) by averaging over quantile bins of each given variable."""
    n = int(bins ** (1 / len(given)))
    cell = sum((g.argsort().argsort() * n // len(g)) * n ** i for i, g in enumerate(given))
    count = torch.zeros(n ** len(given), dtype=y.dtype).index_add(0, cell, torch.ones_like(y))
    mean = (torch.zeros_like(count).index_add(0, cell, y) / count.clamp(min=1))[cell]
    return (y - mean).square().mean().item(), (mean.square().mean() / y.square().mean()).item()


def experiment(n=20_000, t=1.0, seed=0):
    """{teacher: (floor, ratio)} of frame 1 given what a causal student sees of it at time t, and of the AR frame 2."""
    g = torch.Generator().manual_seed(seed)
    data = MEANS[torch.randint(2, (n,), generator=g)] + STD * torch.randn(n, 2, generator=g, dtype=torch.float64)
    x_t = (1 - t) * data + t * torch.randn(n, 2, generator=g, dtype=torch.float64)
    first, second = x_t[:, :1], x_t[:, 1:]
    joint = flow(x_t, MEANS, start=t)
    given = -(data[:, :1, None] - MEANS[:, :1]).square().sum(-1) / (2 * STD ** 2)        # log p(true frame 1 | component)
    return {'bidirectional teacher, frame 1': conditional(joint[:, 0], first[:, 0]),
            'autoregressive teacher, frame 1': conditional(flow(first, MEANS[:, :1], start=t)[:, 0], first[:, 0]),
            'autoregressive teacher, frame 2': conditional(flow(second, MEANS[:, 1:], given, t)[:, 0], second[:, 0], data[:, 0], bins=10_000)}


if __name__ == '__main__':
    for t in (1.0, .9375, .8333, .625):
        for name, (floor, ratio) in experiment(t=t).items():
            print(f't {t:.4f}  {name:32s} loss floor {floor:.4f}   E|Y^|^2 / E|Y|^2 {ratio:.4f}')
