"""Capture by edges of autograd's graph: the function runs once, at a level of differentiation of our own.

- An op with a rule receives the bare parameter, and autograd's edge behind its output is remembered.
  One backward pass to all these edges at once gives the cotangents of all uses; since the op did
  not see a parameter that requires gradients, no weight gradient is computed on the way.
- Any other op receives the parameter as a tensor that requires gradients. Whatever depends on it
  through ops that have no rule, that no mode shows us, or that run at a level of the function's own
  (a ``grad`` or ``vmap`` inside it), reaches the parameter itself in the same backward pass: these
  rows are ``Dense``. So every dependency is accounted for, known or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gramjd.functional.per_sample_mode import Function, PerSampleMode, Run, Trace, basis
from gramjd.internals import (
    belongs_to,
    below_transform,
    depends_on_innermost_transform,
    differentiable,
    differentiated_outside,
    edge_behind,
)
from gramjd.uses.known_calls import KnownCalls


class _EdgeMode(PerSampleMode):
    """Remembers autograd's edge behind every use."""

    def __init__(self, wrapped: Sequence[Tensor], raw: Sequence[Tensor], zero: Tensor, shared: bool,
                 batch_independent: Sequence[Tensor], known_calls: KnownCalls) -> None:  # fmt: skip
        super().__init__(wrapped, raw, shared, batch_independent, known_calls)
        self.zero = zero  # requires gradients
        self.edges: list[Any] = []

    def mark(self, out: Tensor) -> Tensor:
        if not depends_on_innermost_transform(out):
            out = out + self.zero.to(out.dtype)
        found, out = edge_behind(out)
        self.edges.append(found)
        return out

    def bare_outputs(self, op: Any, args: Any, kwargs: dict[str, Any], outs: Sequence[Tensor]
                     ) -> list[Tensor] | None:  # fmt: skip
        below = below_transform(outs, self.level)
        if not any(depends_on_innermost_transform(t) for t in outs):
            return None  # a shape, a comparison, or detached
        if any(belongs_to(t, self.level - 1) for t in below):
            return None  # batched all the same
        return below


def by_edges(function: Function, raw: Sequence[Tensor], batch: Sequence[Tensor], given: Sequence[Tensor],
             shared: bool, batch_independent: Sequence[Tensor], known_calls: KnownCalls) -> Run:  # fmt: skip
    """Run a function of one sample; ``given`` are cotangents of its outputs (empty: all entries)."""
    found: list[Run] = []

    def run(zero: Tensor) -> Tensor:
        wrapped = differentiable(raw)
        tracker = _EdgeMode(wrapped, raw, zero, shared, batch_independent, known_calls)
        with tracker:
            outputs, aux = function(wrapped, batch)
        trace, level = tracker.trace, tracker.level
        cs = _pull(outputs, [*tracker.edges, *wrapped], list(given) or basis(outputs), trace)
        tracker.check_versions()

        # as vjp returns auxiliary values, without its walks over nested containers
        cs, saved, outputs, aux = (below_transform(each, level) for each in (cs, tracker.saved, outputs, aux))
        found.append(Run(trace, cs, saved, outputs, aux))
        return zero  # what it returns to torch is of no interest

    torch.func.vjp(run, torch.zeros(()))
    return found[0]


def _pull(outputs: Sequence[Tensor], inputs: Sequence[Any], cotangents: Sequence[Tensor], trace: Trace
          ) -> Sequence[Tensor]:  # fmt: skip
    """Cotangents ``[K, ...]`` of those inputs that the outputs depend on; ``trace`` learns which.

    Those of one objective have no such dimension, as ``trace`` learns, too.
    """
    live = [n for n, out in enumerate(outputs) if depends_on_innermost_transform(out)]
    if not live:
        trace.reached = [False] * len(inputs)
        return []
    ends = [outputs[n] for n in live]

    graph = any(differentiated_outside(out) for out in ends)

    def grad(*cs: Tensor, keep: bool = False) -> list[Tensor]:
        """One pass; what the graph saved is freed on the way, unless there is to be another."""
        found = torch.autograd.grad(
            ends, inputs, cs, retain_graph=keep or graph, create_graph=graph, allow_unused=True
        )
        trace.reached = [g is not None for g in found]
        return [g for g in found if g is not None]

    each = [cotangents[n] for n in live]
    K = len(each[0])
    if K == 1:
        trace.one_objective = True
        return grad(*[c[0] for c in each])
    if not trace.one_level:
        return list(torch.vmap(grad)(*each))
    rows = [grad(*(c[k] for c in each), keep=k < K - 1) for k in range(K)]
    return [torch.stack(column) for column in zip(*rows, strict=True)]
