"""Random chains of ops between parameters and what meets the batch: a reshape may come between any two."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
import torch
import torch.nn.functional as F
from oracle import OLD, assert_close, dense_gramian
from torch import Tensor, nn
from torch.func import functional_call

import gramjd
from gramjd import Engine

LARGEST = 150  # entries of a weight


def w(*shape: int) -> Tensor:
    """Batch-independent numbers, the same in every call."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).cos().view(shape)


def factorized(n: int, dims: int, r: Random) -> list[int]:
    """A random shape of ``n`` entries."""
    sizes = [n]
    for _ in range(dims - 1):
        n = sizes.pop()
        first = r.choice([d for d in range(1, n + 1) if n % d == 0])
        sizes += [first, n // first]
    return sizes


def diagonal(x: Tensor, d: int) -> list[int]:
    return [size if each == d else 1 for each, size in enumerate(x.shape)]


# from a tensor, one of its dimensions, and random numbers; on any tensor of at least one dimension
ANY: list[Callable[[Tensor, int, Random], Tensor]] = [
    lambda x, d, r: x.reshape(factorized(x.numel(), r.choice([2, 2, 3]), r)),
    lambda x, d, r: x.flatten(0, -2) if x.ndim > 1 else x,
    lambda x, d, r: x.permute(r.sample(range(x.ndim), x.ndim)),
    lambda x, d, r: x.transpose(d, -1),
    lambda x, d, r: x.narrow(d, r.randrange(x.shape[d]), 1),
    lambda x, d, r: x[(slice(None),) * d + (slice(r.randrange(x.shape[d]), None, 2),)],
    lambda x, d, r: x.unbind(d)[-1] - 2 * x.unbind(d)[0],
    lambda x, d, r: torch.stack(x.unbind(d)[::-1], d),
    lambda x, d, r: x.chunk(2, d)[0],
    lambda x, d, r: x[:1].expand(3, *x.shape[1:]),
    lambda x, d, r: x.expand(2, *x.shape),
    lambda x, d, r: x.unsqueeze(d),
    lambda x, d, r: x * w(*diagonal(x, d)),
    lambda x, d, r: x * w(*x.shape),
    lambda x, d, r: x + w(*x.shape[1:]),
    lambda x, d, r: torch.cat([w(*x.shape), x, x.sin()], d),
    lambda x, d, r: torch.stack([x, w(*x.shape)], d),
    lambda x, d, r: x.repeat(2, *[1] * (x.ndim - 1)),
]
MATRICES: list[Callable[[Tensor, int, Random], Tensor]] = [
    lambda x, d, r: x @ w(x.shape[1], r.choice([1, 2, 4])),
    lambda x, d, r: torch.matmul(w(r.choice([1, 2, 4]), x.shape[0]), x),
    lambda x, d, r: F.embedding(torch.arange(4) % len(x), x),
    lambda x, d, r: x.T,
]


class Chain(nn.Module):
    """A low-rank product, then two to four ops, then an op with the batch; the seed chooses all of them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        r, self.seed = Random(seed), seed
        m, n, k = r.choice([2, 4, 6]), r.choice([2, 4, 6]), r.choice([1, 2, 3])
        self.u = nn.Parameter(torch.randn(m, k, dtype=torch.float64))
        self.v = nn.Parameter(torch.randn(k, n, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        r = Random(self.seed)
        weight = self.u @ self.v
        for _ in range(r.choice([1, 2, 2, 3])):
            ops = [*ANY, *MATRICES, *MATRICES] if weight.ndim == 2 else ANY
            new = r.choice(ops)(weight, r.randrange(weight.ndim), r)
            weight = new if 0 < new.numel() <= LARGEST and new.ndim > 0 else weight
        weight = weight.reshape(factorized(weight.numel(), 2, r)) if r.random() < 0.6 else weight
        return self.apply_to(x, weight, r).flatten(1)

    def apply_to(self, x: Tensor, weight: Tensor, r: Random) -> Tensor:
        """The op that meets the batch ``x [B, 2, LARGEST]``."""
        ids = (x[..., :3].abs() * 50).long() % len(weight)
        given = x[:, :, : weight.shape[-1]]
        if weight.ndim == 2:
            kernel = weight.unsqueeze(1)
            return r.choice([
                lambda: F.linear(given, weight), lambda: given @ weight.T, lambda: weight @ given.mT,
                lambda: F.embedding(ids, weight), lambda: F.conv1d(x[:, :1], kernel),
            ])()  # fmt: skip
        if weight.ndim == 3:
            each = x[:, 0, : len(weight) * weight.shape[1]].view(len(x), 1, len(weight), -1).transpose(0, 2)
            return torch.bmm(each[:, 0], weight).transpose(0, 1) if r.random() < 0.5 else weight[ids]
        return (x[:, 0, : weight.numel()].view(len(x), *weight.shape) + weight).sin()


def losses(out: Tensor) -> Tensor:
    return torch.stack([out.sin().sum(1), out.square().sum(1)], 1)


@pytest.mark.skipif(OLD, reason="torch 2.1 reports not all indexing to modes")
@pytest.mark.parametrize("first", range(0, 120, 12))
def test_chains_of_ops(first: int) -> None:
    for seed in range(first, first + 12):
        torch.manual_seed(seed)
        model, x = Chain(seed), torch.randn(3, 2, LARGEST, dtype=torch.float64)
        want = dense_gramian(losses(model(x)), model.parameters())
        for batch_dim in (0, None):
            with Engine(model, batch_dim=batch_dim, strategies=["ops"]) as engine:
                assert_close(engine.compute_gramian(losses(model(x))), want, 1e-9)

        def per_sample(p: dict[str, Tensor], sample: Tensor, model: nn.Module = model) -> Tensor:
            return losses(functional_call(model, p, (sample[None],)))[0]

        assert_close(gramjd.gramian(per_sample)(dict(model.named_parameters()), x), want, 1e-9)
