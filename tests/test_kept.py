"""Rows that a Gramian leaves behind, and the products with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import assert_close
from test_plan import convolutions, randn
from test_products import Ops
from torch import Tensor, nn

import gramjd
from gramjd.blocks import Conv
from gramjd.contraction import conv
from gramjd.contraction.conv import METHODS
from gramjd.contraction.options import Limits

BUDGET = 2**20


def model() -> nn.Module:
    """Convolutions of every kind, over 64 positions and more, and one product."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Tanh(), nn.ConvTranspose2d(4, 4, 3), nn.Tanh(),
        nn.Conv2d(4, 8, 3, groups=4, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3, groups=8, padding=1),
        nn.Flatten(2), nn.Linear(144, 5), nn.Flatten(), nn.Linear(40, 2),
    )  # fmt: skip


class Tokens(nn.Module):
    """A product over 80 tokens."""

    def __init__(self, inputs: int = 6, width: int = 7) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()).mean(1)


class Tied(nn.Module):
    """A table that is also the last layer, of one block each, and of two of the layer."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.table, self.twice = nn.Embedding(7, 5), twice

    def forward(self, x: Tensor) -> Tensor:
        h = self.table((x[..., 0] * 3).long().clamp(0, 6)).tanh()
        out = h @ self.table.weight.T
        if self.twice:
            out = out + nn.functional.linear(h.flip(1), self.table.weight)
        return out.square().mean(1)[:, :2]


CASES = {
    "images": (model, (3, 12, 12)),
    "tokens": (Tokens, (80, 6)),
    "tied": (Tied, (80, 1)),
    "tied twice": (lambda: Tied(twice=True), (80, 1)),
}
KEPT = {"images": (0, 2, 4, 6), "tokens": ("first", "second"), "tied": ("table",), "tied twice": ("table",)}


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("elements", [300, 2**20])
def test_rows_are_in_the_parameter_s_order(method: object, K: int, elements: int) -> None:
    points, windows = randn(K, 3, 2, 2, 2, 2, 3, 2), randn(1, 3, 2, 2, 2, 8, 5, 4)
    volume = Conv(points, windows, (4, 2, 3, 2, 2), (3, 1, 2), (2, 2, 1))
    signal = Conv(randn(1, 3, 1, 1, 2, 5), randn(K, 3, 1, 1, 3, 12), (2, 3, 2), (2,), (3,))
    for block in (*convolutions(K).values(), volume, signal):
        if isinstance(block, Conv):
            rows = method.rows(block, Limits(elements, torch.float64))  # type: ignore[attr-defined]
            assert_close(rows, block.dense().transpose(0, 1).flatten(0, 1).flatten(1))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("K", [1, 2])
def test_rows_of_a_few_samples_at_a_time(method: Any, K: int, monkeypatch: pytest.MonkeyPatch) -> None:
    block = Conv(randn(K, 5, 1, 1, 3, 5), randn(1, 5, 1, 1, 2, 6), (3, 2, 2), (1,), (1,))
    wanted = block.dense().transpose(0, 1).flatten(0, 1).flatten(1)
    built = []
    monkeypatch.setattr(conv, "CACHED", 2 * K * 12)  # of two samples
    rows = conv.Method._rows
    monkeypatch.setattr(
        conv.Method,
        "_rows",
        lambda self, some, *args: (built.append(some.rows[1]), rows(self, some, *args))[1],
    )
    assert_close(method.rows(block, Limits(2**20, torch.float64)), wanted)
    assert method.by_taps or max(built) <= 2


@pytest.mark.parametrize("case", CASES)
def test_products_with_kept_rows(case: str) -> None:
    torch.manual_seed(0)
    make, shape = CASES[case]
    net, x = make().double(), torch.randn(4, *shape).double()  # type: ignore[operator]
    engine = gramjd.Engine(net, batch_dim=0)
    J = engine.jacobian(net(x))
    dense = torch.cat([g.flatten(2) for g in J.dense().values()], 2)
    G = J.gramian(memory_budget=BUDGET)
    (part,) = J.parts
    kept = {J.names[n] for n in part.kept}
    assert kept == {f"{n}.weight" for n in KEPT[case]}
    assert sum(rows.nbytes for rows in part.kept.values()) <= BUDGET // 2
    assert_close(G, torch.einsum("bkp,clp->bklc", dense, dense))
    assert torch.equal(G, G.permute(3, 2, 1, 0))
    assert_close(J.gramian(), G)  # of the rows that are there

    w, several = torch.randn(4, 2).double(), torch.randn(3, 4, 2).double()
    want = torch.einsum("bkp,bk->p", dense, w)
    assert_close(_flat(J.vjp(w)), want)
    some = sorted(kept)[-1:]
    assert_close(_flat(J.select(some).vjp(w)), J.vjp(w)[some[0]].flatten())
    got = J.vjp(several)
    assert_close(
        torch.cat([g.flatten(1) for g in got.values()], 1), torch.einsum("bkp,nbk->np", dense, several)
    )
    both = gramjd.Jacobian.cat([J, engine.jacobian(net(x + 1))])
    assert_close(_flat(both.vjp(torch.cat([w, torch.zeros_like(w)]))), want)
    J.backward(w)
    assert_close(_flat({name: net.get_parameter(name).grad for name in J.vjp(w)}), want)


def test_kept_rows_are_used_on_the_terms_of_the_call() -> None:
    """What an earlier Gramian left behind decides neither on precision nor on memory."""
    net, x = Tokens(64, 60), torch.randn(40, 80, 64)
    f, params = gramjd.functional_loss(net, lambda out: out.sum(1))
    J, fresh = (gramjd.jacobian(f)(params, x) for _ in range(2))
    J.gramian()
    assert {J.names[n] for n in J.parts[0].kept} == {"first.weight", "second.weight"}
    got, want = (j.gramian(accumulate_dtype=torch.float64) for j in (J, fresh))
    assert got.dtype == torch.float64
    assert torch.equal(got, want)
    got, want = (j.gramian(memory_budget=BUDGET // 2) for j in (J, gramjd.jacobian(f)(params, x)))
    assert torch.equal(got, want)


def test_no_weight_gradient_where_rows_are_kept() -> None:
    net, x = model().double(), torch.randn(4, 3, 12, 12).double()
    J = gramjd.Engine(net, batch_dim=0).jacobian(net(x))
    counts = []
    for _ in range(2):
        with Ops() as ops:
            J.vjp(torch.ones(4, 2).double())
        counts.append(ops.count(("convolution_backward", "convolution")))
        J.gramian()
    assert counts == [4, 0]


def test_nothing_is_kept_beyond_half_of_the_budget_or_inside_transforms() -> None:
    net, x = Tokens(64, 200).double(), torch.randn(8, 80, 64).double()
    f, params = gramjd.functional_loss(net, lambda out: out.sum(1))
    J = gramjd.jacobian(f)(params, x)
    J.gramian(memory_budget=BUDGET)  # rows of the first weight take more than half
    assert {J.names[n] for n in J.parts[0].kept} == {"second.weight"}
    J.gramian()
    assert {J.names[n] for n in J.parts[0].kept} == {"first.weight", "second.weight"}

    def trace(params: dict[str, Tensor]) -> Tensor:
        J = gramjd.jacobian(f)(params, x)
        G = J.gramian()
        assert not J.parts[0].kept
        return G.trace()

    torch.func.grad(trace)(params)


def _flat(tree: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in tree.values()])
