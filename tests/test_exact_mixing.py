"""What mixes samples raises at the first call with a batch dimension, and is exact without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exactness import Net, check, draw
from oracle import assert_close, dense_gramian
from torch import Tensor, nn

import gramjd
from gramjd import Engine
from gramjd.engine.analysis.layouts import owned

X, Y = draw(6, 4), draw(6, 4)


def per_sample(out: Tensor) -> Tensor:
    return out.square().sum(1)


def normalised(h: Tensor) -> Tensor:
    return (h - h.mean(0)) / (h.var(0) + 1e-5).sqrt()


def attended(h: Tensor) -> Tensor:
    return (h @ h.T).softmax(1) @ h


def info_nce(a: Tensor, b: Tensor) -> Tensor:
    """``[B]``: every sample against every other, by cosines (Oord et al., arXiv 1807.03748)."""
    cosines = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    return F.cross_entropy(cosines / 0.1, torch.arange(len(a)), reduction="none")


def nt_xent(a: Tensor, b: Tensor) -> Tensor:
    """``[2B]``: SimCLR's, both views of a sample among the negatives (Chen et al., arXiv 2002.05709)."""
    views = F.normalize(torch.cat([a, b]), dim=1)
    scores = (views @ views.T).masked_fill(torch.eye(len(views), dtype=torch.bool), -torch.inf)
    return F.cross_entropy(scores, torch.arange(len(views)).roll(len(a)), reduction="none")


def neighbour_apart(h: Tensor) -> Tensor:
    return per_sample(h - h.roll(1, 0))


def inner(m: Any) -> Tensor:
    return m.first(X.to(m.scale.dtype))


LOSSES: dict[str, Callable[[Any], Tensor]] = {
    "minus the mean": lambda m: per_sample(m(X)) - per_sample(m(X)).mean(),
    "divided by the sum": lambda m: per_sample(m(X)) / per_sample(m(X)).sum(),
    "softmax over the batch": lambda m: per_sample(m(X)).softmax(0),
    "ranked": lambda m: per_sample(m(X)).sort()[0].diff(append=m.shift.detach()[:1]),
    "cosine contrastive": lambda m: info_nce(m(X), m(Y)),
    "contrastive, two views": lambda m: nt_xent(m(X), m(Y)),
    "a learned batch normalisation": lambda m: per_sample(normalised(inner(m)) * m.scale + m.shift),
    "batch normalisation inside": lambda m: per_sample(m.last(normalised(inner(m)).tanh())),
    "attention across the batch": lambda m: per_sample(m.last(attended(inner(m)))),
    "the batch's mean as a feature": lambda m: per_sample(m.last(inner(m) + inner(m).mean(0))),
    "a sample and its neighbour": lambda m: neighbour_apart(m(X)),
    "mixed in another layout": lambda m: per_sample(m.last(normalised(inner(m)).T.contiguous().T)),
    "convolved along the batch": lambda m: per_sample(m.last(F.avg_pool1d(inner(m).T[None], 3, 1, 1)[0].T)),
}


def model() -> nn.Module:
    parts = {"first": nn.Linear(4, 5), "last": nn.Linear(5, 3)}
    scale, shift = nn.Parameter(torch.rand(5) + 1), nn.Parameter(torch.rand(5))
    return Net(lambda m, x: m.last(m.first(x.to(m.scale.dtype)).tanh()), **parts, scale=scale, shift=shift)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", list(LOSSES))
def test_mixing_losses(name: str, dtype: torch.dtype) -> None:
    mixing = model().to(dtype)
    engine = Engine(mixing, batch_dim=0)

    for _ in range(2):  # a refusal is not forgotten
        with pytest.raises(
            gramjd.NotSeparableError,
            match=r"samples depend on each other.*Engine\(\.\.\., batch_dim=None\)",
        ):
            engine.compute_gramian(LOSSES[name](mixing))
    engine.close()
    check(mixing, LOSSES[name], batch_dims=[None], rows=["scale", "shift"],
          tolerance=1e-10 if dtype == torch.float64 else 1e-4)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_few_digits_hide_no_mixing(dtype: torch.dtype) -> None:
    """Places with a sample each are told from those with 0.3 of another one, by their cotangents."""
    own, other = (draw(1, 4, 6, 3).to(dtype) for _ in range(2))
    v = torch.rand(1, 4, dtype=torch.float64).to(dtype) + 0.5
    mine, others = (weights.view(4, 1, 1) for weights in (v[0], v[0].roll(1)))
    found = owned(own, mine * own[0], v)
    assert found is not None and found.sample_of.tolist() == [0, 1, 2, 3]  # type: ignore[attr-defined]
    assert owned(own + 0.3 * other, mine * own[0] + 0.3 * others * other[0], v) is None


def test_micro_batches_of_one_sample_in_front_of_a_float32_island() -> None:
    """Their owners are found within its rounding, which is measured."""
    island = Net(lambda m, x: F.normalize(m.first(x).float(), dim=-1).double() * m.scale,
                 first=nn.Linear(4, 2), scale=nn.Parameter(torch.rand(2)))  # fmt: skip
    engine, x = Engine(island, batch_dim=0, strategies=("ops", "functional")), draw(3, 6, 4)
    for _ in range(2):
        losses = torch.cat([island(part) for part in (x[:1], x[1:])]).sin().sum((1, 2))
        assert_close(engine.compute_gramian(losses), dense_gramian(losses, island.parameters()), 1e-5)


def test_a_wrong_view_in_a_batch_of_another_size() -> None:
    """Of 3 samples, each has positions of its own in it; of 4, they are mixed. Refused, by our own error."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.first(x)
        return h.transpose(0, 1).reshape(h.shape)[:, :2].square().sum((1, 2))

    viewed = Net(forward, first=nn.Linear(4, 5))
    engine = Engine(viewed, batch_dim=0)
    for samples in (3, 4):
        losses = viewed(draw(samples, 6, 4))
        try:
            found = engine.compute_gramian(losses)
        except gramjd.NotSeparableError:
            assert samples == 4
        else:
            assert_close(found, dense_gramian(losses, viewed.parameters()))
