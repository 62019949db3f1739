"""Gramians over real processes of a gloo group, against those of one process with all samples."""

from __future__ import annotations

from typing import Any

import distributed_cases as cases
import pytest
import ranks
import torch
from oracle import dense_gramian
from torch import Tensor

import gramjd

SIZES = [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
Results = list[dict[str, Any]]


@pytest.fixture(scope="module", params=SIZES)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Of every case, of each rank."""
    return ranks.run("distributed_cases", request.param, tmp_path_factory.mktemp("ranks"))


def of(results: Results, case: str) -> list[Any]:
    """What each rank returned; their tracebacks, if they raised."""
    found = [mine[case] for mine in results]
    assert not any(isinstance(x, str) for x in found), "\n".join(map(str, found))
    return found


def close(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert (got - want).norm() <= 1e-10 * want.norm()


@pytest.mark.parametrize("name", list(cases.MODELS))
def test_engine(results: Results, name: str) -> None:
    sizes = cases.sizes_of(len(results))
    model, x, y = cases.make(name, sum(sizes))
    want = dense_gramian(cases.losses_of(model, x, y), model.parameters())
    for rank, (whole, rows) in enumerate(found[name] for found in of(results, "engine")):
        close(whole, want)
        assert torch.equal(whole, whole.T)
        assert torch.equal(rows, whole[sum(sizes[:rank]) :][: sizes[rank]])


def test_functional(results: Results) -> None:
    sizes = cases.sizes_of(len(results))
    model, x, y = cases.make("mlp", sum(sizes))
    jac = cases.functional(model, x, y, len(results))
    want, shares = jac.gramian(), jac.gramian("parameter")
    for rank, found in enumerate(of(results, "functional")):
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        for one in want:
            for two in want:
                close(found["tree"][one][two], want[one][two])
                close(found["rows"][one][two], want[one][two][mine])
                close(found["micro"][one][two], want[one][two])
                for name in shares:
                    close(found["shares"][name][one][two], shares[name][one][two])


def test_bfloat16(results: Results) -> None:
    model, x, y = cases.make("mlp", sum(cases.sizes_of(len(results))))
    engine = gramjd.Engine(model.bfloat16(), batch_dim=0)
    want = engine.compute_gramian(cases.losses_of(model, x.bfloat16(), y))
    for got in of(results, "bfloat16"):
        assert got.dtype == torch.float32
        assert (got - want).norm() < 0.01 * want.norm()  # products of other shapes round otherwise


def test_subgroup(results: Results) -> None:
    sizes = cases.sizes_of(len(results))
    model, x, y = cases.make("mlp", sum(sizes))
    losses = cases.losses_of(model, x, y)[: sum(sizes[:-1])]
    want = dense_gramian(losses, model.parameters())
    *members, outsider = of(results, "subgroup")
    assert outsider is None
    for got in members:
        close(got, want)
