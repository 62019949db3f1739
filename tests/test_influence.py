"""Damped kernel influence against dense float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gramjd
from gramjd import Engine, Jacobian, NotFiniteError, TopK, influence, similarity
from gramjd.weighting import NotConvergedError

Batch = tuple[Tensor, Tensor]


class Work:
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
        self.criterion = nn.CrossEntropyLoss(reduction="none")
        self.func, self.params = gramjd.functional_loss(self.model, self.criterion)
        self.x, self.y = torch.randn(40, 6, dtype=dtype), torch.randint(0, 3, (40,))
        self.batches: Any = list(zip(self.x.split(9), self.y.split(9), strict=True))
        self.passes = 0
        self.jac = gramjd.jacobian(self.func)
        self.queries = self.jac(self.params, torch.randn(4, 6, dtype=dtype), torch.tensor([0, 1, 2, 0]))

    def jacobian(self, batch: Batch) -> Jacobian:
        self.passes += len(batch[0]) == len(self.batches[-1][0])
        return self.jac(self.params, *batch)

    def run(self, damping: float, **changes: Any) -> Any:
        return influence(self.queries, self.jacobian, self.batches, damping, **changes)


def dense(jac: Jacobian) -> Tensor:
    found = [rows.detach().double() for rows in jac.dense().values()]
    return torch.cat([rows.reshape(len(rows), -1) for rows in found], 1)


def expected(work: Work, damping: float) -> Tensor:
    train, queries = dense(work.jac(work.params, work.x, work.y)), dense(work.queries)
    kernel = train @ train.T + damping * torch.eye(len(train), dtype=torch.float64)
    return torch.linalg.solve(kernel, train @ queries.T).T


@pytest.mark.parametrize("damping", [1e-3, 0.1, 1e4])
def test_dense(damping: float) -> None:
    work = Work()
    found, want = work.run(damping, tol=1e-10, max_passes=300), expected(work, damping)
    assert found.shape == (4, 40)
    assert float((found - want).norm()) <= 1e-8 * float(want.norm())


def test_single_precision() -> None:
    work = Work(torch.float32)
    found, want = work.run(0.1), expected(work, 0.1)
    assert found.dtype == torch.float32
    assert float((found - want).norm()) <= 1e-4 * float(want.norm())


def test_passes() -> None:
    """One for each iteration, and one that proves the result; more damping needs fewer."""
    work = Work()
    work.run(10.0)
    few, work.passes = work.passes, 0
    work.run(1e-2)
    assert 2 <= few < work.passes <= 100


def test_faces_and_shapes() -> None:
    """The engine's Jacobians, queries of another shape, and the best alone."""
    work = Work()
    engine = Engine(work.model, batch_dim=0)

    def of_engine(batch: Batch) -> Jacobian:
        return engine.jacobian(work.criterion(work.model(batch[0]), batch[1]))

    want = expected(work, 0.1)
    queries = of_engine((work.x[:4], work.y[:4]))
    mine = influence(queries, of_engine, work.batches, 0.1, tol=1e-10)
    assert isinstance(mine, Tensor)
    train = dense(work.jac(work.params, work.x, work.y))
    kernel = train @ train.T
    torch.testing.assert_close(mine, torch.linalg.solve(kernel + 0.1 * torch.eye(40), kernel)[:, :4].T)
    best = work.run(0.1, tol=1e-10, topk=3)
    assert isinstance(best, TopK)
    torch.testing.assert_close(best.values, want.topk(3).values)
    assert torch.equal(best.indices, want.topk(3).indices)
    total = gramjd.jacobian(lambda p, x, y: work.func(p, x, y) * torch.ones(2, 2, dtype=x.dtype))
    grid = influence(total(work.params, work.x[:2], work.y[:2]), work.jacobian, work.batches, 0.1, tol=1e-10)
    assert isinstance(grid, Tensor) and grid.shape == (2, 2, 2, 40)
    torch.testing.assert_close(grid[:, 1, 0], mine[:2])


def test_queries_without_a_gradient() -> None:
    work = Work()
    nothing = gramjd.jacobian(lambda p, x, y: work.func(p, x, y) * 0)(work.params, work.x[:2], work.y[:2])
    found = influence(nothing, work.jacobian, work.batches, 0.1)
    assert isinstance(found, Tensor) and not found.any() and found.shape == (2, 40)


def test_refused() -> None:
    work = Work()
    for bad in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="damping must be positive"):
            work.run(bad)
    for changes in ({"tol": 0.0}, {"tol": 1.0}, {"max_passes": 0}):
        with pytest.raises(ValueError, match="tol must be in"):
            work.run(0.1, **changes)
    with pytest.raises(NotConvergedError, match="After 3 passes over the dataset the residual is"):
        work.run(1e-6, max_passes=3)
    with pytest.raises(NotConvergedError, match="use float64"):
        Work(torch.float32).run(1e-6, tol=1e-12)
    with pytest.raises(ValueError, match="has no samples"):
        influence(work.queries, work.jacobian, [], 0.1)
    with pytest.raises(TypeError, match="only once"):
        influence(work.queries, work.jacobian, iter(work.batches), 0.1)
    with pytest.raises(ValueError, match="different parameters"):
        influence(work.queries.select(["0.weight"]), work.jacobian, work.batches, 0.1)

    class Shrinking:
        left = 5

        def __iter__(self) -> Any:
            self.left -= 1
            return iter(work.batches[: self.left])

    with pytest.raises(ValueError, match="other sizes"):
        influence(work.queries, work.jacobian, Shrinking(), 0.1)
    work.batches[1][0][2] = torch.inf
    with pytest.raises(NotFiniteError):
        work.run(0.1)


@pytest.mark.parametrize("dim", [16, 64])
def test_of_sketches(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer and more columns than samples, some rows at a time."""
    monkeypatch.setitem(similarity.__globals__, "_TILE", 49)
    work = Work()
    right = work.jac(work.params, work.x, work.y).sketch(dim).detach()
    left = work.queries.sketch(dim).detach()
    want = left @ right.T @ torch.linalg.inv(right @ right.T + 0.3 * torch.eye(40, dtype=torch.float64))
    found = similarity(left, right, damping=0.3)
    assert isinstance(found, Tensor)
    torch.testing.assert_close(found, want)
    best = similarity(left, right, damping=0.3, topk=2)
    assert isinstance(best, TopK) and torch.equal(best.indices, want.topk(2).indices)
    for bad in ({"damping": 0.0}, {"damping": -1.0}, {"damping": 0.1, "cosine": True}):
        with pytest.raises(ValueError, match="damping must be positive"):
            similarity(left, right, **bad)  # type: ignore[arg-type]
    right[3, 3] = torch.inf
    with pytest.raises(NotFiniteError):
        similarity(left, right, damping=0.3)
