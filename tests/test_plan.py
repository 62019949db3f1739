"""Every plan of every pair of blocks, under every budget, against rows written out in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracle import assert_close
from torch import Tensor

from gramjd import plan
from gramjd.blocks import Block, Conv, Dense, Lookup, Outer
from gramjd.plan import Options
from gramjd.plan.choice import plans, swapped
from gramjd.plan.options import limits

V, D, K, B = 6, 4, 2, 3
BUDGETS = [1, 700, None]


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def matrices(K: int = K, B: int = B) -> dict[str, Block]:
    """Blocks of one parameter ``[V, D]``."""
    return {
        "outer": Outer(randn(K, B, 5, 1, V), randn(B, 5, 1, D), (V, D)),
        "one position": Outer(randn(K, B, 1, 1, V), randn(B, 1, 1, D), (V, D)),
        "shared activations": Outer(randn(K, B, 5, 1, V), randn(1, 5, 1, D).expand(B, -1, -1, -1), (V, D)),
        "shared cotangents": Outer(randn(K, 1, 5, 1, V).expand(-1, B, -1, -1, -1), randn(B, 5, 1, D), (V, D)),
        "transposed": Outer(randn(K, B, 2, 1, D), randn(B, 2, 1, V), (V, D), transposed=True),
        "grouped": Outer(randn(K, B, 3, 2, V // 2), randn(B, 3, 2, D), (V, D)),
        "grouped otherwise": Outer(randn(K, B, 2, 3, V // 3), randn(B, 2, 3, D), (V, D)),
        "grouped and transposed": Outer(
            randn(K, B, 3, 2, D), randn(B, 3, 2, V // 2), (V, D), transposed=True
        ),
        "lookup": Lookup(randn(K, B, 7, D), torch.randint(0, V, (B, 7)), (V, D)),
        "shared ids": Lookup(randn(K, B, 2, D), torch.randint(0, V, (1, 2)).expand(B, -1), (V, D)),
        "dense": Dense(randn(K, B, V, D)),
    }


def convolutions(K: int = K, B: int = B) -> dict[str, Block]:
    """Blocks of one parameter ``[6, 2, 3, 2]``."""
    shape = (6, 2, 3, 2)
    return {
        "conv": Conv(randn(K, B, 1, 1, 6, 4, 3), randn(1, B, 1, 1, 2, 6, 4), shape, (1, 1), (1, 1)),
        "strided": Conv(randn(K, B, 2, 2, 3, 3, 2), randn(1, B, 2, 2, 2, 10, 7), shape, (2, 3), (2, 1)),
        "grouped": Conv(randn(K, B, 1, 3, 2, 4, 3), randn(1, B, 1, 3, 2, 6, 4), shape, (1, 1), (1, 1)),
        "backwards": Conv(randn(1, B, 1, 1, 6, 4, 3), randn(K, B, 1, 1, 2, 7, 5), shape, (1, 1), (1, 1)),
        "outer": Outer(randn(K, B, 3, 1, 6), randn(B, 3, 1, 12), shape),
        "dense": Dense(randn(K, B, *shape)),
    }


PAIRS = [
    pytest.param(kinds, left, right, id=f"{left}-{right}")
    for kinds in (matrices, convolutions)
    for left, right in itertools.combinations_with_replacement(kinds(), 2)
]


def rows(*found: Block) -> Tensor:
    K, B = found[0].rows
    return sum((block.dense() for block in found), torch.zeros(())).reshape(K * B, -1)


def inner(u: Block, v: Block) -> Tensor:
    return (rows(u) @ rows(v).T).view(*u.rows, *v.rows)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("kinds", "left", "right"), PAIRS)
def test_every_plan(kinds: object, left: str, right: str, budget: int | None) -> None:
    u, v = kinds()[left], kinds(3, 5)[right]  # type: ignore[operator]
    others = [(u, v), (v, u), (u, kinds()[right])]  # type: ignore[operator]
    options = Options(memory_budget=budget)
    for x, y in [(u, u), (v, v), *others]:
        if swapped(x, y):
            assert_close(plan.contract(x, y, options), inner(x, y))
            continue
        found = plans(x, y)
        assert found
        for way, _ in found:
            got = way.run(x, y, limits(options, u.dense(), torch.float64))
            assert_close(got, inner(x, y))
            if x is y:
                assert torch.equal(got, got.permute(2, 3, 0, 1)), way.name


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("kinds", "left", "right"), PAIRS)
def test_sums_of_blocks(kinds: object, left: str, right: str, budget: int | None) -> None:
    found = [kinds()[left], kinds()[right], kinds()[left]]  # type: ignore[operator]
    options, total = Options(memory_budget=budget), rows(*found)
    got = plan.gramian(found, options)
    assert_close(got.reshape(K * B, K * B), total @ total.T)
    assert torch.equal(got, got.permute(2, 3, 0, 1))
    assert_close(plan.squared_norms(found, options).flatten(), total.square().sum(1))
    other = [kinds(1, 4)[right]]  # type: ignore[operator]
    assert_close(plan.cross(found, other, options).reshape(K * B, 4), total @ rows(*other).T)
    steps = plan.steps(found, options)
    assert all(step.plan and step.multiply_adds >= 0 and step.bytes >= 0 for step in steps)
