"""Capture as ``torch.compile`` can trace it, which knows no edges of autograd's graph.

A *perturbation*, zeros that require gradients, is added to the output of every op with a rule. One backward
pass to all perturbations and parameters gives the cotangents of the uses, and rows of what reaches a
parameter past them: through an op without a rule, or one that tracing hides (``w.T`` is no call to it). Which
of them the outputs depend on, autograd tells while it is traced; what the others get, compilers drop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gramjd.functional.per_sample_mode import Function, PerSampleMode, Run, Trace, basis
from gramjd.internals import (
    constant_in_graphs,
    gradients_in_graphs,
    item_writes,
    reached_in_graphs,
    zeros_that_require_gradients,
)
from gramjd.rules import tensors_of
from gramjd.uses.use import Record


class _PerturbationMode(PerSampleMode):
    """Perturbs the output of every use."""

    def __init__(self, wrapped: Sequence[Tensor], raw: Sequence[Tensor], shared: bool,
                 batch_independent: Sequence[Tensor], derives: bool) -> None:  # fmt: skip
        super().__init__(wrapped, raw, shared, batch_independent)
        self.derives = self.derives and derives
        self.perturbations: list[Tensor] = []
        self.items = 0  # writes of items that the mode was shown
        self.flagged = False  # has an op with a tracked tensor a flag by position, which may mean "in place"?

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.items += func is Tensor.__setitem__
        if _is_unflatten(func):  # it calls the method of a class above, which cannot be traced
            func = torch.unflatten
        return super().__torch_function__(func, types, args, kwargs)

    def record(self, op: Any, args: Any, kwargs: dict[str, Any], derived: bool) -> tuple[Any, Record | None]:
        self.flagged = self.flagged or any(flag is True for flag in args)
        return super().record(op, args, kwargs, derived)

    def mark(self, out: Tensor) -> Tensor:
        perturbation = zeros_that_require_gradients(out.shape, out.dtype, out.device)
        self.perturbations.append(perturbation)
        return out + perturbation

    def held(self, leaf: Tensor) -> Tensor:
        """A copy, as tracing counts no writes and does not show each of them; compilers drop idle copies."""
        return leaf.clone()

    def bare_outputs(self, op: Any, args: Any, kwargs: dict[str, Any], outs: Sequence[Tensor]
                     ) -> list[Tensor] | None:  # fmt: skip
        if not any(t.requires_grad for t in outs):
            return None  # a shape, a comparison, or detached
        return tensors_of(self.call_bare(op, args, kwargs))


def by_perturbations(function: Function, raw: Sequence[Tensor], batch: Sequence[Tensor],
                     given: Sequence[Tensor], shared: bool, batch_independent: Sequence[Tensor]
                     ) -> Run:  # fmt: skip
    """Run a function of one sample; ``given`` are cotangents of its outputs (empty: all entries)."""

    def attempt(derives: bool) -> tuple[_PerturbationMode, Run]:
        modes: list[_PerturbationMode] = []

        def run(wrapped: Sequence[Tensor]) -> Any:
            # aliases: of the tensors themselves, tracing would not know that they require gradients
            mine = [tensor.view_as(tensor) for tensor in wrapped]
            mode = _PerturbationMode(mine, raw, shared, batch_independent, derives)
            with mode:
                outputs, aux = function(mine, batch)
            modes.append(mode)
            cs = _pull(outputs, [*mode.perturbations, *wrapped], list(given) or basis(outputs), mode.trace)
            return torch.zeros(()), (cs, mode.saved, list(outputs), list(aux))

        _, _, (cs, saved, outputs, aux) = torch.func.vjp(run, list(raw), has_aux=True)  # type: ignore[misc]
        return modes[0], Run(modes[0].trace, cs, saved, outputs, aux)

    before = item_writes()
    mode, found = attempt(derives=True)
    hidden = item_writes() - before > mode.items
    if mode.derives and (mode.flagged or hidden):  # perhaps something has written into what is derived
        _, found = attempt(derives=False)
    return found


def _pull(outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], trace: Trace
          ) -> list[Tensor]:  # fmt: skip
    """Cotangents ``[K, ...]`` of those inputs that the outputs depend on; ``trace`` learns which.

    Those of one objective have no such dimension, as ``trace`` learns, too.
    """

    def grad(*cs: Tensor) -> Sequence[Tensor]:
        return gradients_in_graphs(outputs, inputs, cs)

    K = len(cotangents[0])
    if K == 1:
        trace.one_objective = True
        found = grad(*[c[0] for c in cotangents])
    elif not trace.one_level:
        found = torch.vmap(grad)(*cotangents)
    else:
        rows = [grad(*[c[k] for c in cotangents]) for k in range(K)]
        found = [torch.stack(column) for column in zip(*rows, strict=True)]
    trace.reached = list(reached_in_graphs())
    return [g for g, reached in zip(found, trace.reached, strict=True) if reached]


@constant_in_graphs
def _is_unflatten(op: Any) -> bool:
    return op is Tensor.unflatten
