"""Do samples meet anywhere in a graph, however small the derivatives are by which they do?

What one batch shows need not hold for the next: a gate that starts at zero, a saturated softmax, a dead
ReLU hide that samples are mixed. NaN times zero is NaN. So the derivatives of some samples' objectives are
made NaN: where NaN comes to a place of another sample, the two meet.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gramjd import gramians
from gramjd.engine import backward
from gramjd.engine.layouts import ZERO, Layout, candidates
from gramjd.engine.nodes import forget
from gramjd.engine.regions import Region
from gramjd.engine.task import Layouts, Task, is_fused

# Ops, entry by entry, whose backward passes drop derivatives where the data say so, even if these are NaN.
_SELECT = ("Clamp", "Fmax", "Fmin", "Hard", "Logit", "MaskedFill", "Maximum", "Minimum", "Pow", "Relu",
           "Sinc", "Softshrink", "Threshold", "Where", "Xlog")  # fmt: skip
_CONSTANT = ("Ceil", "Fill", "Floor", "Round", "Sign", "Trunc", "Zero")  # never have derivatives
_PARTIAL = ("Cumprod", "Renorm")  # pass some on and drop others

_HOOK = "BackwardHookFunctionBackward"  # of nn.Module.register_full_backward_hook
_PRODUCTS = ("Addmm", "Bmm", "Mm", "Mv")
_FEW = 8  # samples, of which each is told from each other one

Masks = dict[Any, list[Tensor | None]]  # of each node of the graph: is its cotangent NaN?


class Spread:
    """Where NaN comes to from some of the samples, time and again from others."""

    def __init__(self, task: Task) -> None:
        self.task, self.passes = task, list[Masks]()
        self.chosen = _choices(task.samples, in_step=task.lockstep is not None)
        nodes = _all_nodes(task.output)
        if any(type(node).__name__ == _HOOK for node in nodes):
            return  # what users' hooks keep of gradients must not become NaN
        unpacked = any(node.hooked for node in task.graph.nodes)  # or a checkpoint runs again for each
        if any(type(node).__name__.startswith(_PARTIAL) or _is_sparse(node, not unpacked) for node in nodes):
            return  # the next batch may have its zeros elsewhere
        with _passed_on(nodes) as dropped, torch.autograd.set_detect_anomaly(False):
            try:
                self.passes += [_run(task, chosen) for chosen in self.chosen]
            except Exception:  # a hook on a tensor that refuses NaN
                self.passes.clear()
        if dropped:
            self.passes.clear()

    def stays_within(self) -> bool:
        """Does it come to places of those samples alone, by the layouts that the plan has of every node?"""
        return bool(self.passes) and all(
            _is_within(chosen, masks.get(node, ()), layouts)
            for chosen, masks in zip(self.chosen, self.passes, strict=True)
            for number, region in enumerate(self.task.plan.regions)
            for node, layouts in self._layouts(number, region)
        )

    def _layouts(self, number: int, region: Region) -> Iterable[tuple[Any, Layouts | None]]:
        """The nodes of a region with the layouts of their outputs, where these are not those of a replay."""
        nodes = [self.task.graph.nodes[index] for index in region.nodes]
        if any(map(is_fused, nodes)):
            return [(node, None) for node in nodes]
        return zip(nodes, self.task.plan.layouts[number], strict=True)


def _choices(samples: int, in_step: bool) -> list[Tensor]:
    """Halves of the samples: of up to eight, each is without each other one in one of them.

    For ranks in step as many whatever their samples are.
    """
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(samples))
    bits = _FEW.bit_length() - 1 if in_step else (samples - 1).bit_length() if samples <= _FEW else 1
    halves = [order % 2 ** (bit + 1) >= 2**bit for bit in range(bits)]
    return [*halves, *(~half for half in halves)]


def _is_within(chosen: Tensor, masks: Sequence[Tensor | None], layouts: Layouts | None) -> bool:
    """Do masks of outputs stay within some samples, in the layouts known, else in any that fits?"""
    samples = len(chosen)

    def fits(mask: Tensor, layout: Layout | None) -> bool:
        if layout is None or layout is ZERO:  # of no sample, or nothing comes
            return True
        reached = layout.split(mask, layout.dim, samples).flatten(1).any(1)
        return not bool((reached & ~chosen.to(reached.device)).any())

    return all(
        any(
            fits(mask, each)
            for each in (candidates(mask.shape, samples) if layouts is None else [layouts[n]])
        )
        for n, mask in enumerate(masks)
        if mask is not None
    )


def _run(task: Task, chosen: Tensor) -> Masks:
    """A backward pass of the objectives of some samples, NaN each."""
    found: Masks = {}

    def note(node: Any, grads: Sequence[Tensor | None]) -> Sequence[None]:
        found[node] = [g if g is None else g.isnan() for g in grads]
        forget([node])
        return (None,) * len(grads)

    weights = torch.zeros(task.objectives, task.samples).to(task.output)
    weights[:, chosen.to(weights.device)] = math.nan
    rows = gramians.from_rows(weights, task.output.shape, task.batch_dim).unsqueeze(0)
    with backward.tapped(task.graph.nodes, note) as taps:
        backward.gradients(task.output, [tap for mine in taps for tap in mine], rows)
    return found


def _all_nodes(output: Tensor) -> set[Any]:
    """The nodes of autograd's graph of an output."""
    stack: list[Any] = [output.grad_fn]
    seen = set(stack)
    while stack:
        children = {child for child, _ in stack.pop().next_functions if child is not None} - seen
        seen |= children
        stack += children
    return seen


def _is_sparse(node: Any, look: bool) -> bool:
    """Is a node that of a product with a sparse tensor? If its factors may be looked at."""
    name = type(node).__name__
    if name.startswith("Sparse") or not (look and name.startswith(_PRODUCTS)):
        return name.startswith("Sparse")
    factors = (getattr(node, f"_saved_{factor}", None) for factor in ("self", "mat1", "mat2"))
    return any(isinstance(t, Tensor) and t.layout is not torch.strided for t in factors)


@contextmanager
def _passed_on(nodes: Iterable[Any]) -> Iterator[list[str]]:
    """While the context lasts, NaN passes through ops that select, whatever the data are.

    The names of others that drop it are collected: the deviation of equal numbers has a derivative of zero.
    """
    dropped: list[str] = []

    def watch(node: Any) -> Any:
        name = type(node).__name__

        def note(found: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> None:
            asked = any(g is not None for g in found)
            if asked and any(map(_has_nan, given)) and not any(map(_has_nan, found)):
                dropped.append(name)

        return node.register_hook(_pass_on if name.startswith(_SELECT) else note)

    handles = [watch(node) for node in nodes if not type(node).__name__.startswith(_CONSTANT)]
    try:
        yield dropped
    finally:
        for handle in handles:
            handle.remove()


def _has_nan(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.sum().isnan())


def _pass_on(found: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients that a node returned, NaN where those that it was given are."""
    if given[0] is None:
        return tuple(found)
    lost = given[0].isnan().to(given[0].dtype)
    return tuple([g if g is None else g.masked_fill(lost.sum_to_size(g.shape) > 0, math.nan) for g in found])
