"""Ops that are replayed as others (recurrent ones have a file of their own), against the oracle."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, dense_gramian
from torch import Tensor, nn
from torch.func import functional_call

import gramjd
from gramjd import Engine
from gramjd.blocks import Lookup, Outer
from gramjd.decompositions.registry import expanded
from gramjd.rules.registry import op_name

BAGS: list[dict[str, Any]] = [
    {"mode": "sum"}, {"mode": "mean"}, {"mode": "mean", "padding_idx": 2},
    {"mode": "sum", "padding_idx": -1}, {"mode": "max"}, {"mode": "max", "padding_idx": 0},
]  # fmt: skip


class Bag(nn.Module):
    """One bag of ids for each sample, in ``[B, n]`` or in ``[total]`` with offsets."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(7, 4, **options)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.bag(*inputs).tanh()


def losses(out: Tensor, several: bool = True) -> Tensor:
    return torch.stack([out.sum(1), out.square().mean(1)], 1) if several else out.square().sum(1)


def check(model: nn.Module, *inputs: Any) -> None:
    for several, batch_dim in itertools.product((False, True), (0, None)):
        want = dense_gramian(losses(model(*inputs), several), model.parameters())
        engine = Engine(model, batch_dim=batch_dim, strategies=["ops"])
        for _ in range(2):
            got = engine.jacobian(losses(model(*inputs), several))
            assert_close(got.gramian(), want)
            assert {type(block) for block in got.blocks[0]} == {Lookup}
        engine.close()


def check_transform(model: nn.Module, *inputs: Tensor) -> None:
    def f(params: dict[str, Tensor], *sample: Tensor) -> Tensor:
        return losses(functional_call(model, params, tuple(x[None] for x in sample)), several)[0]

    params = {name: p.detach() for name, p in model.named_parameters()}
    for several in (False, True):
        want = dense_gramian(losses(model(*inputs), several), model.parameters())
        assert_close(gramjd.gramian(f)(params, *inputs), want)


@pytest.mark.parametrize("options", BAGS)
def test_bags_of_equal_length(options: dict[str, Any]) -> None:
    model, ids = Bag(**options).double(), torch.randint(0, 7, (5, 3))
    check(model, ids)
    check_transform(model, ids)


@pytest.mark.parametrize("options", BAGS)
@pytest.mark.parametrize("last", [False, True])
def test_bags_with_offsets(options: dict[str, Any], last: bool) -> None:
    """Bags of different lengths, one of them empty."""
    model = Bag(**options, include_last_offset=last).double()
    offsets = torch.tensor([0, 4, 4, 5, 9])
    check(model, torch.randint(0, 7, (9,)), offsets if last else offsets[:-1])


def test_weighted_bags() -> None:
    model, weights = Bag(mode="sum").double(), torch.randn(5, 3, dtype=torch.float64)
    ids = torch.randint(0, 7, (5, 3))
    check(model, ids, None, weights)
    check(model, ids.flatten(), torch.tensor([0, 2, 9]), weights.flatten())

    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.scores = nn.Parameter(torch.randn(7, 4)), nn.Parameter(torch.randn(3))

        def forward(self, ids: Tensor) -> Tensor:
            scores = self.scores.expand(ids.shape)
            return F.embedding_bag(ids, self.table, per_sample_weights=scores, mode="sum")

    learned = Learned().double()
    want = dense_gramian(losses(learned(ids)), learned.parameters())
    assert_close(Engine(learned, batch_dim=0, strategies=["ops"]).compute_gramian(losses(learned(ids))), want)


def test_a_bag_that_renormalises_its_weight_is_exact_row_by_row() -> None:
    model, ids = Bag(mode="sum", max_norm=1.0).double(), torch.randint(0, 7, (5, 3))
    engine = Engine(model, batch_dim=0)
    model(ids)
    want = dense_gramian(losses(model(ids)), model.parameters())
    with pytest.warns(gramjd.SlowPathWarning, match="max_norm"):
        assert_close(engine.compute_gramian(losses(model(ids))), want)


class Experts(nn.Module):
    """Tokens sorted by expert, each of which is a group of ``grouped_mm``, as in transformers' mixtures."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(4, experts), nn.Parameter(torch.randn(experts, 8, 4))
        self.down = nn.Parameter(torch.randn(experts, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        score, expert = self.gate(flat).softmax(1).max(1)
        order = expert.argsort(stable=True)
        ends = expert.bincount(minlength=len(self.up)).cumsum(0).int()
        hidden = F.grouped_mm(flat[order], self.up.mT, offs=ends).tanh()
        out = F.grouped_mm(hidden, self.down, offs=ends) * score[order, None]
        return torch.zeros_like(flat).index_copy(0, order, out).view(x.shape)


def has_grouped_mm() -> bool:
    """Whether this version of torch has it for float32 on the CPU."""
    try:
        F.grouped_mm(torch.ones(2, 8), torch.ones(1, 8, 8), offs=torch.ones(1).int())
    except (AttributeError, RuntimeError):
        return False
    return True


needs_grouped_mm = pytest.mark.skipif(not has_grouped_mm(), reason="no grouped_mm for the CPU")


@needs_grouped_mm
@pytest.mark.parametrize("batch_dim", [0, None])
def test_grouped_mm(batch_dim: int | None) -> None:
    """Routes change from step to step, and some experts get no token."""
    model = Experts()
    engine = Engine(model, batch_dim=batch_dim, audit=None, strategies=["ops"])
    for step in range(6):
        with torch.no_grad():
            model.gate.bias.copy_(torch.tensor([[0.0, 0, 0], [9, 0, 0], [-9, 0, 0]])[step % 3])
        each = losses(model(torch.randn(4, 3, 4)).flatten(1), step % 2 == 0)
        got = engine.jacobian(each)
        assert_close(got.gramian(), dense_gramian(each, model.parameters()), 1e-5)
        blocks = dict(zip(got.names, got.blocks, strict=True))
        assert all(isinstance(block, Outer) for name in ("up", "down") for block in blocks[name])
        if step % 3 != 1:  # several experts have tokens: each is a group
            assert [block.c.shape[3] for name in ("up", "down") for block in blocks[name]] == [3, 3]


@needs_grouped_mm
@pytest.mark.parametrize("of_weights", [True, False])
def test_groups_of_other_operands(of_weights: bool) -> None:
    """A product for each group of a batch is followed; groups of the inner dimension are not."""

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(*((3, 8, 8) if of_weights else (8, 8))))

        def forward(self, x: Tensor) -> Tensor:
            if of_weights:
                return F.grouped_mm(x, self.w)
            return F.grouped_mm(x[0], self.w, offs=torch.tensor([2, 4, 8], dtype=torch.int32))

    model = Grouped()
    engine = Engine(model, batch_dim=None, strategies=["ops", "rows"])
    each = model(torch.randn(3, 8, 8)).sin().mean((1, 2))
    with nullcontext() if of_weights else pytest.warns(gramjd.SlowPathWarning, match="groups of the rows"):
        assert_close(engine.compute_gramian(each), dense_gramian(each, model.parameters()), 1e-5)


def test_every_decomposition_has_a_test() -> None:
    recurrent = [getattr(torch._VF, kind + cell) for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")
                 for cell in ("", "_cell")]  # fmt: skip
    tested: list[Callable[..., Any]] = [*recurrent, F.embedding_bag]
    tested += [F.bilinear, torch._weight_norm]  # in test_rules and test_derived
    tested += [torch.linalg.solve]  # in test_contractions
    tested += [op for op in [getattr(torch, "_grouped_mm", None)] if op is not None]
    missing = [op_name(op) for op in expanded() if op not in tested]
    assert not missing, f"test {missing} and add them here"
