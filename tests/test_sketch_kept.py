"""Factors of a random matrix that are kept for later sketches: the same numbers, made once, within bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gramjd
from gramjd import Jacobian
from gramjd.jacobian import philox, projection


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors of random numbers were made; nothing is kept before or after."""
    calls: list[int] = []
    plain = philox.philox

    def counted(counter: Any, key: Any) -> list[Tensor]:
        calls.extend([1] * isinstance(counter[0], Tensor))
        return plain(counter, key)

    monkeypatch.setattr(philox, "philox", counted)
    monkeypatch.setattr(projection, "_kept", None)
    return calls


def jacobian(batch: int = 5) -> Jacobian:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)).double()
    func, params = gramjd.functional_loss(model, lambda out: out.sin().sum(1))
    return gramjd.jacobian(func)(params, torch.randn(batch, 6, dtype=torch.float64))


def test_made_once(made: list[int]) -> None:
    first = jacobian().sketch(16, kind="factored")
    count = len(made)
    assert count > 0
    again = jacobian().sketch(16, kind="factored")
    assert len(made) == count and torch.equal(again, first)
    assert torch.equal(jacobian().sketch(16, kind="factored", memory_budget=2**20), first)
    assert len(made) == 2 * count  # a budget leaves no room for what is kept


@pytest.mark.parametrize("changed", [{"seed": 1}, {"dim": 9}, {"kind": "rademacher"}])
def test_another_projection(changed: dict[str, Any], made: list[int]) -> None:
    """Has numbers of its own, and those of the first are right again afterwards."""
    J = jacobian()
    options: dict[str, Any] = {"dim": 16, "seed": 0, "kind": "factored"}
    first = J.sketch(**options)
    other = J.sketch(**{**options, **changed})
    assert torch.equal(other, J.sketch(**{**options, **changed}, memory_budget=2**30))
    assert torch.equal(J.sketch(**options), first)
    assert other.shape != first.shape or not torch.equal(other, first)


def test_dtypes_and_subsets() -> None:
    """Of other dtypes and other parameters, other parts of the same projection."""
    J = jacobian()
    whole = J.sketch(16, kind="factored")
    single = J.to(dtype=torch.float32).sketch(16, kind="factored")
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), whole, rtol=1e-4, atol=1e-5)
    parts = [J.select([name]).sketch(16, kind="factored") for name in J.names]
    assert torch.allclose(torch.stack(parts).sum(0), whole, rtol=1e-12, atol=1e-12)


def test_no_more_than_fits(made: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    first = jacobian().sketch(16, kind="factored")
    held = projection._kept_of(projection.Projection(16, kind="factored")).held
    assert 0 < held <= projection._Kept.most
    monkeypatch.setattr(projection, "_kept", None)
    monkeypatch.setattr(projection._Kept, "most", held // 2)
    assert torch.equal(jacobian().sketch(16, kind="factored"), first)
    assert 0 < projection._kept_of(projection.Projection(16, kind="factored")).held <= held // 2
    count = len(made)
    assert torch.equal(jacobian().sketch(16, kind="factored"), first)
    assert count < len(made) < count + count // 2


def test_nothing_is_kept_where_it_could_not_be_used() -> None:
    """Of inference mode, and of a rademacher sketch, whose matrix is as large as the rows are long."""
    J = jacobian()
    with torch.inference_mode():
        first = J.sketch(16, kind="factored")
    J.sketch(16)
    kept = projection._kept
    assert kept is None or not kept.parts
    assert torch.equal(J.sketch(16, kind="factored"), first)
