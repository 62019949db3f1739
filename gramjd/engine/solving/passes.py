"""Backward passes of the objectives weighted at random, which the checks compare blocks with.

One of them has all weights of another scaled by a number that is no power of two: the two differ by
rounding alone, which is measured so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite, prod

import torch
from torch import Tensor

from gramjd import gramians
from gramjd.blocks import Block, Dense
from gramjd.complexes import as_real
from gramjd.engine.recording.nodes import Cotangents
from gramjd.engine.solving import backward
from gramjd.engine.solving.problem import Problem
from gramjd.engine.solving.stream import Later

_SCALE = 1.37
_SMALL = 4096  # entries of a gradient that is kept as it is
_VECTORS = 8


@dataclass(frozen=True)
class Gradient:
    """What is kept of a parameter's gradient: its norm, and all entries or, if large, products with vectors.

    The products are those of the gradient, as a matrix of ``columns`` columns, with a few random vectors.
    They take a fraction of its memory, and a fraction of the time to form it from blocks. By them, a
    difference of two gradients looks ten times smaller than it is with a probability of about 1e-7.
    """

    values: Tensor  # a vector of all entries, or [rows, _VECTORS]
    columns: int  # 0: the values are the gradient's own
    size: float  # its norm
    is_finite: bool

    @staticmethod
    def of(gradient: Tensor) -> Gradient:
        """What to keep of a gradient, which is freed."""
        if gradient.is_sparse:  # of Embedding(sparse=True)
            gradient = gradient.to_dense()
        wide = torch.float32 if gradient.dtype in (torch.float16, torch.bfloat16) else None
        size = float(torch.linalg.vector_norm(gradient, dtype=wide))
        finite = isfinite(size) or bool(torch.isfinite(gradient).all())
        columns = prod(gradient.shape[1:]) if gradient.numel() > _SMALL else 0
        if columns < 2 * _VECTORS:
            return Gradient(gradient.flatten(), 0, size, finite)
        return Gradient(gradient.reshape(-1, columns) @ _vectors(columns, gradient), columns, size, finite)

    def less(self, blocks: Sequence[Block], weights: Tensor) -> Tensor:
        """What is left of the values without those of ``Jᵀ w`` from the blocks."""
        left = self.values
        if not self.columns:
            for block in blocks:
                left = left - block.vjp(weights).flatten()
            return left
        y = _vectors(self.columns, left)
        for block in blocks:
            known = block.grain == self.columns or isinstance(block, Dense)
            left = left - (block.sketch(weights, y) if known else block.vjp(weights).reshape(-1, len(y)) @ y)
        return left

    def norm(self, values: Tensor) -> float:
        """The norm of a gradient that has such values."""
        scale = (self.columns / _VECTORS) ** 0.5 if self.columns else 1.0
        return scale * float(_double(values).norm())


def _vectors(columns: int, like: Tensor) -> Tensor:
    """Random vectors ``[columns, _VECTORS]`` of entries so small that no product overflows."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(columns, _VECTORS, generator=generator) / columns**0.5).to(like)


@dataclass(frozen=True)
class Pass:
    """One backward pass of weighted objectives."""

    cotangents: list[Cotangents]  # of each node, [1, *y]
    gradients: Mapping[str, Gradient]  # of each parameter that has one

    def of(self, nodes: Sequence[int]) -> Pass:
        """The same with the cotangents of some nodes alone."""
        return replace(self, cotangents=[self.cotangents[n] for n in nodes])

    @cached_property
    def norms(self) -> list[float]:
        """The norm of each cotangent, as long as none of them was dropped."""
        return [float(c.norm()) for cs in self.cotangents for c in cs if c is not None]

    @property
    def is_finite(self) -> bool:
        """Whether all entries are finite. A norm is many times as fast as ``isfinite``."""
        cotangents = [c for cs in self.cotangents for c in cs if c is not None]
        found = zip(cotangents, self.norms, strict=True)
        return all(gradient.is_finite for gradient in self.gradients.values()) and all(
            isfinite(size) or bool(torch.isfinite(t).all()) for t, size in found
        )


class Passes:
    """Backward passes of the objectives weighted at random, each run when it is first asked for.

    While another one is in progress (``busy``), asking for one that was not run raises ``Later``.
    """

    def __init__(self, problem: Problem, calls: int, checking: bool) -> None:
        self.problem, self.calls, self.checking, self.busy = problem, calls, checking, False

    @cached_property
    def v(self) -> Tensor:
        """Weights ``[K, B]``."""
        return self._weights(0)

    @cached_property
    def others(self) -> Tensor:
        """Others like them."""
        return self._weights(1)

    def _weights(self, number: int) -> Tensor:
        problem = self.problem
        seed = 2 * self.calls + number
        return _random_weights(problem.objectives, problem.samples, problem.output, seed)

    @cached_property
    def full(self) -> Passes:
        """The same with the gradients of parameters."""
        if self.busy:
            raise Later
        return Passes(self.problem, self.calls, True)

    @cached_property
    def first(self) -> Pass:
        return self._run(self.v)

    @cached_property
    def again(self) -> Pass:
        """The same but for rounding."""
        return self._run(_SCALE * self.v)

    @cached_property
    def independent(self) -> Pass:
        """The pass with the other random weights."""
        return self._run(self.others)

    def run_all(self) -> None:
        """Every pass that may be asked for, now."""
        _ = self.first, self.again, self.independent

    @cached_property
    def rounding(self) -> float:
        """The rounding of all gradients together, relative to their norm.

        Not the largest one: a gradient that is nothing but rounding would excuse any other.
        """
        found = [(g, self.again.gradients[name]) for name, g in self.first.gradients.items()]
        off = sum(g.norm(_double(h.values) / _SCALE - _double(g.values)) ** 2 for g, h in found)
        return float((off / sum(g.norm(g.values) ** 2 for g, _ in found)) ** 0.5)

    @property
    def conclusive(self) -> bool:
        """Whether the pass would show every missing gradient: no size is zero."""
        return all(gradient.size > 0 for gradient in self.first.gradients.values())

    def forget(self, nodes: Sequence[int]) -> None:
        """Free what was found at some nodes."""
        for name in {"first", "again", "independent"} & vars(self).keys():
            for n in nodes:
                getattr(self, name).cotangents[n] = []

    def _run(self, weights: Tensor) -> Pass:
        if self.busy:
            raise Later
        problem = self.problem
        named = problem.parameters if self.checking else {}
        cotangent = gramians.from_rows(weights, problem.output.shape, problem.batch_dim)
        gradients: dict[str, Gradient] = {}
        names = list(named)

        def take(place: int, gradient: Tensor) -> None:
            gradients[names[place]] = Gradient.of(gradient)

        with backward.tapped(problem.graph.nodes) as taps:
            flat = [tap for mine in taps for tap in mine]
            found = backward.taken_gradients(problem.output, flat, list(named.values()), cotangent, take)
        return Pass(backward.grouped(found, [len(mine) for mine in taps]), gradients)


def rounding_of(first: Tensor | None, again: Tensor | None) -> float:
    """The relative difference of two passes that differ by rounding alone."""
    if first is None or again is None:
        return 0.0
    return float((_double(again) / _SCALE - _double(first)).norm() / _double(first).norm())


def _double(tensor: Tensor) -> Tensor:
    return as_real(tensor).double()


def _random_weights(objectives: int, samples: int, like: Tensor, seed: int) -> Tensor:
    """Row weights ``[K, B]``, none close to zero."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(2, objectives, samples, generator=generator, dtype=torch.float64)
    signs = 1 - 2 * (uniform[1] < 0.5).double()
    return ((0.5 + uniform[0]) * signs).to(like.device, like.dtype)
