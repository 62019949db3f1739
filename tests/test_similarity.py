"""Similarity of gradients, exact and of sketches, against dense Jacobians."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import assert_close, dense_jacobian
from torch import Tensor, nn
from zoo import CASES, make

import gramjd
from gramjd import (
    Engine,
    GradientStore,
    Jacobian,
    SlowPathWarning,
    TopK,
    dataset_similarity,
    similarity,
    tracin,
)

MODULE = __import__("importlib").import_module("gramjd.datasets.similarity")


def assert_best(got: Any, scores: Tensor, k: int) -> None:
    """The greatest entries of each row, and where they are."""
    assert isinstance(got, TopK)
    assert_close(got.values, scores.topk(k, -1).values)
    assert_close(got.values, scores.gather(-1, got.indices))
    assert all(len(set(row.tolist())) == k for row in got.indices.flatten(0, -2))


# exact


@pytest.mark.parametrize("name", CASES)
def test_zoo(name: str) -> None:
    """Tied weights, bare parameters, reuse."""
    module, inputs = make(name)
    engine = Engine(module, batch_dim=0)
    held: list[Tensor] = []

    def jacobian(x: tuple[Tensor, ...]) -> Jacobian:
        out = module(*x).flatten(1).square().sum(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SlowPathWarning)
            J = engine.jacobian(out)
        held.append(dense_jacobian(out, J.parameters))
        return J

    queries = jacobian(inputs(2))
    got = dataset_similarity(queries, jacobian, [inputs(n) for n in (3, 1, 2)])
    assert_close(got, held[0] @ torch.cat(held[1:]).T)


def lora() -> tuple[nn.Module, Any]:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["0", "2"], r=2, init_lora_weights=False)
    )
    return adapted.double().eval(), [torch.randn(n, 6, dtype=torch.float64) for n in (2, 3, 4)]


def test_lora() -> None:
    model, (x, *batches) = lora()
    engine = Engine(model, batch_dim=0)
    got = dataset_similarity(
        engine.jacobian(model(x).square().sum(1)), lambda b: engine.jacobian(model(b)[:, 0]), batches
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    left = dense_jacobian(model(x).square().sum(1), trained)
    right = torch.cat([dense_jacobian(model(b)[:, 0], trained) for b in batches])
    assert_close(got, left @ right.T)


class Work:
    def __init__(self) -> None:
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        self.func, self.params = gramjd.functional_loss(model, nn.CrossEntropyLoss(reduction="none"))
        self.jac = gramjd.jacobian(self.func)
        self.x, self.y = torch.randn(14, 6, dtype=torch.float64), torch.randint(0, 3, (14,))
        self.loader = list(zip(self.x.split(4), self.y.split(4), strict=True))
        self.queries = self.jac(self.params, self.x[:3] + 0.1, self.y[:3])

    def jacobian(self, batch: tuple[Tensor, Tensor]) -> Jacobian:
        return self.jac(self.params, *batch)

    def rows(self, J: Jacobian) -> Tensor:
        dense = J.dense()
        return torch.cat([dense[name].flatten(1) for name in J.names], 1)

    @property
    def all(self) -> Tensor:
        return self.rows(self.jac(self.params, self.x, self.y))


@pytest.fixture
def work() -> Work:
    torch.manual_seed(0)
    return Work()


@pytest.mark.parametrize("cosine", [False, True])
def test_exact(work: Work, cosine: bool) -> None:
    left, right = work.rows(work.queries), work.all
    if cosine:
        left, right = nn.functional.normalize(left), nn.functional.normalize(right)
    want = left @ right.T
    assert_close(dataset_similarity(work.queries, work.jacobian, work.loader, cosine=cosine), want)
    for k in (1, 5, 14):  # of more than one batch, and of all
        assert_best(
            dataset_similarity(work.queries, work.jacobian, work.loader, cosine=cosine, topk=k), want, k
        )


def test_shapes_of_queries(work: Work) -> None:
    """A mean loss, and several outputs for each sample."""
    trained = {name: p.requires_grad_() for name, p in work.params.items()}
    total = gramjd.jacobian(lambda p: torch.stack([q.sum() for q in p.values()]).sum(), in_dims=None)
    got = dataset_similarity(total(trained), work.jacobian, work.loader)
    assert_close(got, work.all.sum(1).detach())
    assert not got.requires_grad
    outputs = gramjd.jacobian(lambda p, x: torch.stack([work.func(p, x, work.y[n]) for n in (0, 1)]))
    several = outputs(work.params, work.x[:5])
    dense = several.dense()
    rows = torch.cat([dense[name].flatten(2) for name in several.names], 2)
    assert_close(dataset_similarity(several, work.jacobian, work.loader), rows @ work.all.T)
    assert_best(dataset_similarity(several, work.jacobian, work.loader, topk=2), rows @ work.all.T, 2)


def test_gradients_of_zero(work: Work) -> None:
    """Their cosine is 0."""
    jac = gramjd.jacobian(lambda p, x, y, w: work.func(p, x, y) * w)
    weights = torch.ones(14, dtype=torch.float64).index_fill_(0, torch.tensor([2, 9]), 0)
    batches = list(zip(work.x.split(4), work.y.split(4), weights.split(4), strict=True))
    got = dataset_similarity(work.queries, lambda b: jac(work.params, *b), batches, cosine=True)
    assert not got[:, [2, 9]].any() and bool(torch.isfinite(got).all()) and int((got == 0).sum()) == 6


def test_tracin(work: Work) -> None:
    checkpoints = [{n: p + 0.1 * c for n, p in work.params.items()} for c in range(3)]
    rates = [0.1, 0.5, 0.02]
    queries = [work.jac(p, work.x[:2], work.y[:2]) for p in checkpoints]
    each = [lambda batch, p=p: work.jac(p, *batch) for p in checkpoints]
    got = tracin(queries, each, work.loader, rates)
    want = sum(
        rate * work.rows(q) @ work.rows(work.jac(p, work.x, work.y)).T
        for rate, q, p in zip(rates, queries, checkpoints, strict=True)
    )
    assert isinstance(want, Tensor)
    assert_close(got, want)
    assert_best(tracin(queries, each, iter(work.loader), rates, topk=3), want, 3)  # one pass
    with pytest.raises(ValueError, match="as checkpoints: got 3, 3 and 2"):
        tracin(queries, each, work.loader, rates[:2])
    with pytest.raises(ValueError, match="as checkpoints: got 0, 0 and 0"):
        tracin([], [], work.loader, [])


def test_refused(work: Work) -> None:
    with pytest.raises(ValueError, match="different parameters"):
        dataset_similarity(work.queries.select(["0.bias"]), work.jacobian, work.loader)
    with pytest.raises(ValueError, match="The dataset has no samples"):
        dataset_similarity(work.queries, work.jacobian, [])
    with pytest.raises(ValueError, match="topk=15 of 14 samples"):
        dataset_similarity(work.queries, work.jacobian, work.loader, topk=15)
    with pytest.raises(ValueError, match="topk must be a positive integer, not 0"):
        dataset_similarity(work.queries, work.jacobian, work.loader, topk=0)
    pairs = gramjd.jacobian(lambda p, x, y: work.func(p, x, y).expand(2))
    with pytest.raises(ValueError, match="one loss for each sample, got Jacobian"):
        dataset_similarity(work.queries, lambda b: pairs(work.params, *b), work.loader)
    work.loader[1] = (work.loader[1][0].index_fill(0, torch.tensor([2]), torch.nan), work.loader[1][1])
    with pytest.raises(gramjd.NotFiniteError, match="of sample 6 or of a query"):
        dataset_similarity(work.queries, work.jacobian, work.loader)


# of sketches


@pytest.fixture
def stores(work: Work, tmp_path: Path) -> tuple[GradientStore, GradientStore]:
    few = [(work.x[:5], work.y[:5])]
    given = [(work.loader, torch.float64), (few, torch.float16)]
    left, right = (
        gramjd.gradients_dataset(
            work.jacobian, batches, tmp_path / str(dtype), 32, dtype=dtype, progress=False
        )
        for batches, dtype in given
    )
    return right, left


@pytest.mark.parametrize("cosine", [False, True])
def test_stores(
    stores: tuple[GradientStore, GradientStore], cosine: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "_TILE", 16)  # four rows at a time
    left, right = (store.rows(0, len(store)).double() for store in stores)
    if cosine:
        left, right = nn.functional.normalize(left), nn.functional.normalize(right)
    assert_close(similarity(*stores, cosine=cosine), left @ right.T)
    for k in (1, 6, 14):
        assert_best(similarity(*stores, cosine=cosine, topk=k), left @ right.T, k)


def test_arrays(stores: tuple[GradientStore, GradientStore]) -> None:
    """Stores beside what any library gives."""
    store, rows = stores[1], torch.randn(3, 32)
    want = rows.double() @ torch.tensor(store.sketches).T
    assert_close(similarity(rows, store), want)
    assert_close(similarity(rows.numpy(), store.sketches), want)
    in_float16 = stores[0]
    assert torch.equal(similarity(rows, in_float16.sketches), similarity(rows, in_float16))
    assert_close(similarity(rows.half(), rows.half()), rows.half().float() @ rows.half().float().T, 1e-6)
    assert similarity(np.zeros((2, 32)), store, cosine=True).abs().max() == 0


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more of the scores than a tile exists at a time."""
    monkeypatch.setattr(MODULE, "_TILE", 400)
    seen = []
    better = MODULE._better
    monkeypatch.setattr(
        MODULE,
        "_better",
        lambda best, scores, *rest: seen.append(scores.shape) or better(best, scores, *rest),
    )
    x = torch.randn(90, 4)
    assert_best(similarity(x, x, topk=3), x @ x.T, 3)
    assert sum(a * b for a, b in seen) == 8100 and max(a * b for a, b in seen) <= 400


def test_refused_stores(work: Work, stores: tuple[GradientStore, GradientStore], tmp_path: Path) -> None:
    def other(name: str, jacobian: Any = work.jacobian, **options: Any) -> GradientStore:
        given = {"dim": 32, "progress": False, **options}
        return gramjd.gradients_dataset(jacobian, work.loader, tmp_path / name, **given)

    for changed in ({"seed": 1}, {"kind": "gaussian"}):
        with pytest.raises(ValueError, match="differ in projection: their sketches have nothing to do"):
            similarity(stores[0], other(str(changed), **changed))
    with pytest.raises(ValueError, match="differ in shapes of parameters"):
        similarity(stores[0], other("few", lambda b: work.jacobian(b).select(["0.weight"])))
    with pytest.raises(ValueError, match="Rows of left have 31 entries, those of right 32"):
        similarity(torch.randn(2, 31), stores[0])
    with pytest.raises(ValueError, match=r"left must be rows of numbers, \[n, dim\], got the shape \[32\]"):
        similarity(torch.randn(32), stores[0])
    with pytest.raises(gramjd.NotFiniteError, match="of sample 1 or"):
        similarity(torch.randn(2, 2), torch.tensor([[1.0, 2], [torch.inf, 1]]))


def test_progress(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A bar for each function that reads a dataset, only if it takes more than two seconds."""
    pytest.importorskip("tqdm")
    model = torch.nn.Linear(3, 2)
    function, params = gramjd.functional_loss(model, torch.nn.CrossEntropyLoss(reduction="none"))
    jac, x, y = gramjd.jacobian(function), torch.randn(6, 3), torch.randint(0, 2, (6,))
    batches, named = list(zip(x.split(2), y.split(2), strict=True)), dict(model.named_parameters())
    optimizer = torch.optim.Adam(model.parameters())
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()

    def run(progress: bool) -> str:
        def of(batch: Any) -> gramjd.Jacobian:
            return jac(params, *batch)

        queries = jac(params, x[:2], y[:2])
        gramjd.dataset_similarity(queries, of, batches, progress=progress)
        gramjd.tracin([queries], [of], batches, [0.1], progress=progress)
        gramjd.less(queries, of, batches, optimizer, named, progress=progress)
        gramjd.influence(queries, of, batches, 1.0, progress=progress)
        return capsys.readouterr().err

    assert run(True) == ""
    monkeypatch.setattr("gramjd.datasets.progress.PATIENCE", 0)
    shown = run(True)
    assert all(f"{name}:" in shown for name in ("similarity", "TracIn", "LESS", "influence"))
    assert "3/3" in shown and run(False) == ""
