"""Do samples meet anywhere in a graph, however small the derivatives are by which they do?

What one batch shows need not hold for the next: a gate that starts at zero, a saturated softmax, a dead
ReLU hide that samples are mixed. NaN times zero is NaN. So the derivatives of half of the samples'
objectives are made NaN: where NaN comes to a place of another sample, the two meet.
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
from gramjd.engine.layouts import ZERO, Layout
from gramjd.engine.task import Task

# Ops whose backward passes drop derivatives where the data say so, even if these are NaN.
_SELECT = ("Clamp", "Fmax", "Fmin", "Hard", "MaskedFill", "Maximum", "Minimum", "Relu", "Softshrink",
           "Threshold", "Where")  # fmt: skip

_HOOK = "BackwardHookFunctionBackward"  # of nn.Module.register_full_backward_hook

Masks = dict[Any, list[Tensor | None]]  # of each node of the graph: is its cotangent NaN?


class Spread:
    """Where NaN comes to from one half of the samples, and from the other."""

    def __init__(self, task: Task) -> None:
        generator = torch.Generator().manual_seed(task.samples)
        first = torch.randperm(task.samples, generator=generator) < (task.samples + 1) // 2
        self.task, self.halves, self.passes = task, (first, ~first), list[Masks]()
        nodes = _all_nodes(task.output)
        if any(type(node).__name__ == _HOOK for node in nodes):
            return  # what users' hooks keep of gradients must not become NaN
        with _passed_on(nodes), torch.autograd.set_detect_anomaly(False):
            try:
                self.passes += [_run(task, half) for half in self.halves]
            except Exception:  # a hook on a tensor that refuses NaN
                self.passes.clear()

    def stays_within(self) -> bool:
        """Does it come to places of those samples alone, by the layouts that the plan has of every node?"""
        plan, nodes = self.task.plan, self.task.graph.nodes
        return bool(self.passes) and all(
            _is_within(half, mask, layout)
            for half, masks in zip(self.halves, self.passes, strict=True)
            for number, region in enumerate(plan.regions)
            for index, layouts in zip(region.nodes, plan.layouts[number], strict=True)
            for mask, layout in zip(masks.get(nodes[index], ()), layouts, strict=False)
        )


def _is_within(half: Tensor, mask: Tensor | None, layout: Layout | None) -> bool:
    if mask is None or layout is None or layout is ZERO:  # of no sample, or nothing comes
        return True
    reached = layout.split(mask, layout.dim, len(half)).flatten(1).any(1)
    return not bool((reached & ~half.to(reached.device)).any())


def _run(task: Task, half: Tensor) -> Masks:
    """A backward pass of the objectives of some samples, NaN each."""
    found: Masks = {}

    def note(node: Any, grads: Sequence[Tensor | None]) -> Sequence[None]:
        found[node] = [g if g is None else g.isnan() for g in grads]
        return (None,) * len(grads)

    weights = torch.zeros(task.objectives, task.samples).to(task.output)
    weights[:, half.to(weights.device)] = math.nan
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


@contextmanager
def _passed_on(nodes: Iterable[Any]) -> Iterator[None]:
    """While the context lasts, NaN passes through ops that select, whatever the data are."""
    selecting = [node for node in nodes if type(node).__name__.startswith(_SELECT)]
    handles = [node.register_hook(_pass_on) for node in selecting]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pass_on(found: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients that a node returned, NaN where those that it was given are."""
    if given[0] is None:
        return tuple(found)
    lost = given[0].isnan().to(given[0].dtype)
    return tuple([g if g is None else g.masked_fill(lost.sum_to_size(g.shape) > 0, math.nan) for g in found])
