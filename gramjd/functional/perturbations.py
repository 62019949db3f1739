"""Capture as ``torch.compile`` can trace it, which knows no edges of autograd's graph.

A zero *perturbation* is added to the output of every op with a rule, and the pullback with respect to
all of them gives their cotangents in one backward pass. Their shapes must be known before that run, so
the function is traced once more for these; what that computes, nobody reads, and compilers drop it.

Tracing hides some ways to a parameter (``w.T`` is no call to it). So the function is also asked whether
its outputs depend on parameters though ops with rules took bare ones: those that it depends on are
*open*, and get rows by the same pullback.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gramjd import pytree
from gramjd.functional.per_sample_mode import Function, PerSampleMode, Run, basis
from gramjd.internals import constant_in_graphs, item_writes
from gramjd.rules import tensors_of
from gramjd.uses.use import Record, roots


class _PerturbationMode(PerSampleMode):
    """Perturbs the output of every use. The first run, without perturbations, finds out about them."""

    def __init__(self, wrapped: Sequence[Tensor], raw: Sequence[Tensor], shared: bool,
                 batch_independent: Sequence[Tensor], first: _PerturbationMode | None = None,
                 perturbations: Sequence[Tensor] = ()) -> None:  # fmt: skip
        super().__init__(wrapped, raw, shared, batch_independent)
        self.first = first
        self.bare_parameters = list(raw)
        self.perturbations = perturbations
        self.marked: list[tuple[torch.Size, torch.dtype, torch.device]] = []
        self.tracked: list[bool] = []  # what ops on tracked tensors alone returned
        self.opened: set[int] = set()  # parameters that an op without a rule received, by id
        self.items = 0  # writes of items that the mode was shown
        self.flagged = False  # has an op with a tracked tensor a flag by position, which may mean "in place"?
        self.derives = self.derives and (first is None or first.derives)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.items += func is Tensor.__setitem__
        if _is_unflatten(func):  # it calls the method of a class above, which cannot be traced
            func = torch.unflatten
        return super().__torch_function__(func, types, args, kwargs)

    def record(self, op: Any, args: Any, kwargs: dict[str, Any], derived: bool) -> tuple[Any, Record | None]:
        self.flagged = self.flagged or any(flag is True for flag in args)
        out, record = super().record(op, args, kwargs, derived)
        if record is None and any(t.requires_grad for t in tensors_of(out)):
            for leaf in pytree.leaves([*args, *kwargs.values()]):
                if isinstance(leaf, Tensor) and id(leaf) in self.sources:
                    self.opened |= roots(self.sources[id(leaf)])
        return out, record

    def mark(self, out: Tensor) -> Tensor:
        number = len(self.marked)
        self.marked.append((out.shape, out.dtype, out.device))
        return out + self.perturbations[number] if self.first else out

    def held(self, leaf: Tensor) -> Tensor:
        """A copy, as tracing counts no writes and does not show each of them; compilers drop idle copies."""
        return leaf.clone() if self.first else leaf

    def bare_outputs(self, op: Any, args: Any, kwargs: dict[str, Any], outs: Sequence[Tensor]
                     ) -> list[Tensor] | None:  # fmt: skip
        number = len(self.tracked)
        self.tracked.append(self.first.tracked[number] if self.first else any(t.requires_grad for t in outs))
        return tensors_of(self.call_bare(op, args, kwargs)) if self.tracked[number] else None


def by_perturbations(function: Function, raw: Sequence[Tensor], batch: Sequence[Tensor],
                     given: Sequence[Tensor], shared: bool, batch_independent: Sequence[Tensor]
                     ) -> Run:  # fmt: skip
    """Run a function of one sample; ``given`` are cotangents of its outputs (empty: all entries)."""

    derives = True

    def ask(wanted: Sequence[int]) -> tuple[_PerturbationMode, bool]:
        return _first_run(function, raw, batch, shared, batch_independent, wanted, derives)

    before = item_writes()
    first, depends = ask(range(len(raw)))
    hidden = item_writes() - before > first.items
    if first.derives and (first.flagged or hidden):  # perhaps something has written into what is derived
        derives = False
        first, depends = ask(range(len(raw)))
    is_open = [id(p) in first.opened for p in first.bare_parameters]
    if depends:
        unseen = [n for n, known in enumerate(is_open) if not known]
        for n in _those(unseen, lambda wanted: ask(wanted)[1]):
            is_open[n] = True
    zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in first.marked]
    seen: list[_PerturbationMode] = []

    def run(wrapped: Sequence[Tensor], perturbations: Sequence[Tensor]) -> Any:
        mine = [_fresh(tensor) for tensor in wrapped]
        watch = _PerturbationMode(mine, raw, shared, batch_independent, first, perturbations)
        with watch:
            outputs, aux = function(mine, batch)
        seen.append(watch)
        return list(outputs), (watch.saved, list(aux))

    outputs, pull, (saved, aux) = torch.func.vjp(run, list(raw), zeros, has_aux=True)  # type: ignore[misc]
    trace = seen[0].trace
    if seen[0].marked != first.marked:
        raise RuntimeError(
            f"Traced twice, the function used parameters {len(first.marked)} and {len(seen[0].marked)} times "
            "or in other shapes: it is not pure, as a transformed function must be."
        )
    rows, cs = _pulled(pull, list(given) or basis(outputs), trace.one_level)
    trace.reached = [True] * len(zeros) + is_open
    reached = [*cs, *(row for row, needed in zip(rows, is_open, strict=True) if needed)]
    return Run(trace, reached, saved, outputs, aux)


def _first_run(function: Function, raw: Sequence[Tensor], batch: Sequence[Tensor], shared: bool,
               batch_independent: Sequence[Tensor], wanted: Sequence[int], derives: bool,
               ) -> tuple[_PerturbationMode, bool]:  # fmt: skip
    """Run with gradients for some parameters; return the run, and whether the outputs depend on them."""
    seen: list[tuple[_PerturbationMode, bool]] = []

    def run(wrapped: Sequence[Tensor]) -> Any:
        mine = list(bare)
        for number, tensor in zip(wanted, wrapped, strict=True):
            mine[number] = _fresh(tensor)
        watch = _PerturbationMode(mine, bare, shared, batch_independent)
        watch.derives = watch.derives and derives
        with watch:
            outputs, _ = function(mine, batch)
        seen.append((watch, any(out.requires_grad for out in outputs)))
        return torch.zeros(())

    with torch.no_grad():  # outside: what requires gradients there is not meant
        bare = [p.detach() for p in raw]
        torch.func.vjp(run, [bare[n] for n in wanted])
    return seen[0]


def _pulled(pull: Callable[..., Any], cotangents: Sequence[Tensor], one_at_a_time: bool) -> tuple[Any, Any]:
    """``[K, ...]`` of everything that a pullback gives."""
    K = len(cotangents[0])
    if K > 1 and not one_at_a_time:
        return torch.vmap(pull)(cotangents)
    each = [pull([c[k] for c in cotangents]) for k in range(K)]
    rows, cs = zip(*each, strict=True)
    return _stacked(rows), _stacked(cs)


def _stacked(each: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(column) for column in zip(*each, strict=True)]


def _fresh(tensor: Tensor) -> Tensor:
    """An alias: of the tensor itself, tracing would not know that it requires gradients."""
    return tensor.view_as(tensor)


def _those(among: Sequence[int], any_of: Callable[[Sequence[int]], bool]) -> list[int]:
    """All for which a question has the answer yes, which can be asked of several at once."""
    if not among or not any_of(among):
        return []
    if len(among) == 1:
        return list(among)
    half = len(among) // 2
    return _those(among[:half], any_of) + _those(among[half:], any_of)


@constant_in_graphs
def _is_unflatten(op: Any) -> bool:
    return op is Tensor.unflatten
