"""The cost of a plan, in units of one multiply-add of a large matrix product."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from gramjd.contraction.options import Limits
from gramjd.contraction.tiles import HALVES, LEAF

# Calibrated by benchmarks/plans.py; see benchmarks/NOTES.md, "Plans".
MOVE = 40  # multiply-adds that take as long as writing and reading an element
CALL = 400_000  # multiply-adds that take as long as a call of an op
SMALL = 15_000  # multiply-adds that take as long as starting on one more matrix of a batch


T = TypeVar("T")


@dataclass(frozen=True)
class Cost:
    """The cost of one contraction by one plan."""

    multiply_adds: int
    moved: int  # elements of intermediate results, written and read
    calls: int = 1  # of ops
    working: int = 0  # elements of working memory, if nothing is tiled

    @property
    def time(self) -> int:
        """The estimated time, in multiply-adds."""
        return self.multiply_adds + MOVE * self.moved + CALL * self.calls


@dataclass(frozen=True)
class Plan:
    """One exact method to contract two blocks of certain types."""

    name: str
    cost: Callable[[Any, Any], Cost | None]  # None: it does not apply
    run: Callable[[Any, Any, Limits], Tensor]  # [K₁, B₁, K₂, B₂], exactly symmetric if u is v


def ascending(items: Iterable[T], size: Callable[[T], int]) -> list[T]:
    """Sort by comparisons alone, because ``torch.compile`` does not sort by sizes that are symbols."""
    found: list[tuple[int, T]] = []
    for item in items:
        mine = size(item)
        found.insert(sum(1 for other, _ in found if other <= mine), (mine, item))
    return [item for _, item in found]


def half(same: bool, products: int, rows: int) -> int:
    """Multiply-adds of a product of which the half is enough if the rows are the ``same``."""
    count = min(HALVES, rows // LEAF)
    return products * (count + 1) // (2 * count) if same and count > 1 else products
