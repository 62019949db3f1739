"""Sketches of tables of which a sample looks up few of the entries that its batch uses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close
from torch import Tensor
from torch.func import grad, vmap

import gramjd
from gramjd import Jacobian
from gramjd.blocks import Lookup
from gramjd.jacobian import sketches
from gramjd.jacobian.philox import key_of, normals, signs

DRAW = {"rademacher": signs, "gaussian": normals}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def by_entry(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many entries were in use in each call of the plan."""
    calls: list[int] = []
    plain = sketches.by_lookups

    def counted(block: Lookup, ids: Tensor, used: Tensor, *others: object) -> Tensor:
        calls.append(len(used))
        found: Tensor = plain(block, ids, used, *others)
        return found

    monkeypatch.setattr(sketches, "by_lookups", counted)
    return calls


def func(p: dict[str, Tensor], ids: Tensor) -> Tensor:
    h = F.embedding(ids, p["table"]).tanh().sum(0)
    return torch.stack([h.sin().sum(), h.square().sum()])  # two objectives


def problem(batch: int = 40, entries: int = 60) -> tuple[dict[str, Tensor], Tensor]:
    ids = torch.randint(0, entries, (batch, 3))
    ids[:, 0] = ids[0, 0]  # one entry that every sample looks up, some of them twice
    ids[1] = ids[0, 0]
    return {"table": torch.randn(entries, 5, dtype=torch.float64)}, ids


def omega(p: dict[str, Tensor], dim: int, seed: int, kind: str) -> Tensor:
    which = torch.arange(p["table"].numel())
    return DRAW[kind](which, dim, key_of(seed, "table"), torch.float64) / dim**0.5


@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("kind", DRAW)
def test_exact(kind: str, budget: int | None, by_entry: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where neither an entry of the table nor the samples that look it up fit at once."""
    monkeypatch.setattr(gramjd.contraction.options, "SMALLEST", 2**13)
    p, ids = problem()
    J = gramjd.jacobian(func)(p, ids)
    got = J.sketch(150, seed=3, kind=kind, memory_budget=budget)
    assert by_entry == [len(ids.unique())]
    rows = J.dense()["table"].flatten(2)
    assert_close(got, rows @ omega(p, 150, 3, kind))


def test_batches_are_one(by_entry: list[int]) -> None:
    """The plan depends on the batch, and the sketch does not."""
    p, ids = problem()
    jac = gramjd.jacobian(func)
    whole = jac(p, ids).sketch(16)
    parts: list[Jacobian] = [jac(p, some) for some in ids.split([1, 37, 2])]
    count = len(by_entry)
    assert_close(torch.cat([J.sketch(16) for J in parts]), whole)
    assert count < len(by_entry) < count + len(parts)
    assert_close(Jacobian.cat(parts).sketch(16), whole)


def test_vmap_and_grad(by_entry: list[int]) -> None:
    """Through sums in place."""
    p, ids = problem()

    def sketched(table: Tensor) -> Tensor:
        return gramjd.jacobian(func)({"table": table}, ids).sketch(16)

    def dense(table: Tensor) -> Tensor:
        rows = vmap(torch.func.jacrev(lambda t, i: func({"table": t}, i)), (None, 0))(table, ids)
        return rows.flatten(2) @ omega(p, 16, 0, "rademacher")

    tables = torch.stack([p["table"], p["table"].flip(0)])
    assert_close(vmap(sketched)(tables), torch.stack([dense(t) for t in tables]))
    assert_close(
        grad(lambda t: sketched(t).sin().sum())(p["table"]), grad(lambda t: dense(t).sin().sum())(p["table"])
    )
    assert by_entry
