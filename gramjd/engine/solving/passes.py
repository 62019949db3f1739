"""Backward passes of the objectives weighted at random, which the checks compare blocks with.

One of them has all weights of another scaled by a number that is no power of two: the two differ by
rounding alone, which is measured so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite

import torch
from torch import Tensor

from gramjd import gramians
from gramjd.complexes import as_real
from gramjd.engine.recording.nodes import Cotangents
from gramjd.engine.solving import backward
from gramjd.engine.solving.problem import Problem
from gramjd.engine.solving.stream import Later

_SCALE = 1.37


@dataclass
class Pass:
    """One backward pass of weighted objectives."""

    cotangents: list[Cotangents]  # of each node, [1, *y]
    gradients: dict[str, Tensor | None]  # of each parameter, [1, *p.shape]
    sizes: dict[str, float]  # norms of the gradients that there are

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
        found = list(zip(cotangents, self.norms, strict=True))
        found += [(g, self.sizes[name]) for name, g in self.gradients.items() if g is not None]
        return all(isfinite(size) or bool(torch.isfinite(t).all()) for t, size in found)


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
        pairs = [(_double(g), _double(h)) for g, h in found if g is not None and h is not None]
        off = sum(float((again / _SCALE - g).square().sum()) for g, again in pairs)
        return float((off / sum(float(g.square().sum()) for g, _ in pairs)) ** 0.5)

    @property
    def conclusive(self) -> bool:
        """Whether the pass would show every missing gradient: no size is zero."""
        return all(size > 0 for size in self.first.sizes.values())

    def forget(self, nodes: Sequence[int]) -> None:
        """Free what was found at some nodes."""
        for name in {"first", "again", "independent"} & vars(self).keys():
            for n in nodes:
                getattr(self, name).cotangents[n] = []

    def _run(self, weights: Tensor) -> Pass:
        if self.busy:
            raise Later
        problem, named = self.problem, self.problem.parameters if self.checking else {}
        rows = gramians.from_rows(weights, problem.output.shape, problem.batch_dim).unsqueeze(0)
        with backward.tapped(problem.graph.nodes) as taps:
            flat = [tap for mine in taps for tap in mine]
            found = backward.gradients(problem.output, [*flat, *named.values()], rows)
        cotangents = backward.grouped(found, [len(mine) for mine in taps])
        # those of Embedding(sparse=True) are written out
        dense = [g.to_dense() if g is not None and g.is_sparse else g for g in found[len(flat) :]]
        gradients = dict(zip(named, dense, strict=True))
        sizes = {name: float(g.norm()) for name, g in gradients.items() if g is not None}
        return Pass(cotangents, gradients, sizes)


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
