"""Backward passes of the objectives weighted at random, which the checks compare blocks with.

One of them has all weights of another scaled by a number that is no power of two: the two differ by
rounding alone, which is measured so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gramjd import gramians
from gramjd.complexes import as_real
from gramjd.engine.recording.nodes import forget
from gramjd.engine.recording.recorded import OpMark
from gramjd.engine.solving import backward
from gramjd.engine.solving.problem import Problem, is_fused
from gramjd.engine.solving.projected import Gradient, Probed
from gramjd.engine.solving.stream import Later

_SCALE = 1.37


@dataclass(frozen=True)
class Pass:
    """One backward pass of weighted objectives."""

    cotangents: list[list[Probed | None]]  # of each node
    gradients: Mapping[str, Gradient]  # of each parameter that has one
    largest: float  # the norm of the largest cotangent

    def of(self, nodes: Sequence[int]) -> list[list[Probed | None]]:
        """The cotangents of some nodes alone."""
        return [self.cotangents[n] for n in nodes]

    @property
    def is_finite(self) -> bool:
        """Whether all entries are finite, as long as none of the cotangents was freed."""
        cotangents = (c for cs in self.cotangents for c in cs if c is not None)
        return all(g.is_finite for g in self.gradients.values()) and all(c.is_finite for c in cotangents)


class Passes:
    """Backward passes of the objectives weighted at random, each run when it is first asked for.

    While another one is in progress (:meth:`waiting`), asking for one that was not run raises ``Later``.
    """

    def __init__(self, problem: Problem, calls: int, checking: bool, projected: bool = True) -> None:
        self.problem, self.calls, self.checking = problem, calls, checking
        self.projected, self.busy = projected, False

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context in which a backward pass is in progress, so that no other can run."""
        self.busy = True
        try:
            yield
        finally:
            self.busy = False

    @cached_property
    def v(self) -> Tensor:
        """Random weights ``[K, B]``."""
        return self._weights(0)

    @cached_property
    def others(self) -> Tensor:
        """Other random weights ``[K, B]``."""
        return self._weights(1)

    def _weights(self, number: int) -> Tensor:
        problem = self.problem
        seed = 2 * self.calls + number
        return _random_weights(problem.objectives, problem.samples, problem.output, seed)

    @cached_property
    def with_gradients(self) -> Passes:
        """These passes, with the gradients of parameters."""
        if self.busy:
            raise Later
        return Passes(self.problem, self.calls, True, self.projected)

    @property
    def unprojected(self) -> Passes:
        """These passes, with all entries of every cotangent."""
        return self._whole if self.projected else self

    @cached_property
    def _whole(self) -> Passes:
        if self.busy:
            raise Later
        return Passes(self.problem, self.calls, False, projected=False)

    @cached_property
    def first(self) -> Pass:
        return self._run(self.v)

    @cached_property
    def again(self) -> Pass:
        """A pass with the same weights, which differs by rounding."""
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
        off = sum(g.norm(h.values / _SCALE - g.values) ** 2 for g, h in found)
        return float((off / sum(g.norm(g.values) ** 2 for g, _ in found)) ** 0.5)

    @property
    def conclusive(self) -> bool:
        """Whether the pass would show every missing gradient: no size is zero."""
        return all(gradient.size > 0 for gradient in self.first.gradients.values())

    def forget(self, nodes: Sequence[int]) -> None:
        """Free what was found at some nodes."""
        if "_whole" in vars(self):
            self._whole.forget(nodes)
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
        cotangents: dict[Any, list[Probed | None]] = {}
        names, nodes = list(named), problem.graph.nodes

        def take(place: int, gradient: Tensor) -> None:
            gradients[names[place]] = Gradient.of(gradient)

        def receive(node: Any, grads: Sequence[Tensor | None]) -> Sequence[None]:
            keep = Probed.of if self.projected and _may_be_projected(node) else Probed
            cotangents[node] = [g if g is None else keep(g) for g in grads]
            forget([node])
            return (None,) * len(grads)

        with backward.tapped(nodes, receive) as taps:
            flat = backward.flattened(taps)
            backward.taken_gradients(problem.output, flat, list(named.values()), cotangent, take)
        counts = [len(mine) for mine in taps]
        found = [cotangents.get(node, [None] * n) for node, n in zip(nodes, counts, strict=True)]
        largest = max((c.norm for cs in found for c in cs if c is not None), default=0.0)
        return Pass(found, gradients, largest)


def _may_be_projected(node: Any) -> bool:
    """Whether samples are hardly in the last dimension of its outputs, and no replay needs all entries."""
    return isinstance(node.record, OpMark) and not node.record.batch_independent and not is_fused(node)


def rounding_of(first: Tensor, again: Tensor) -> float:
    """The relative difference of two passes that differ by rounding alone."""
    return float((_double(again) / _SCALE - _double(first)).norm() / _double(first).norm())


def _double(tensor: Tensor) -> Tensor:
    return as_real(tensor).double()


def _random_weights(objectives: int, samples: int, like: Tensor, seed: int) -> Tensor:
    """Row weights ``[K, B]``, none close to zero."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(2, objectives, samples, generator=generator, dtype=torch.float64)
    signs = 1 - 2 * (uniform[1] < 0.5).double()
    return ((0.5 + uniform[0]) * signs).to(like.device, like.dtype)
