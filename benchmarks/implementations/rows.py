"""Libraries that give per-sample gradients, and what is left to do with them.

``make bench-peers`` installs them without their dependencies into a folder of their own, which comes
last on the path: torch stays the same, and the folder's other top-level packages hide nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.problem import NotApplicable, Outcome, Problem, Step

FOLDER = Path(__file__).parents[2] / "out" / "bench" / "peers"


def contract(jacobians: Sequence[Tensor], weights: Tensor | None) -> Outcome:
    """The Gramian of ``[m, *p.shape]``, and the weighted gradient if there are weights."""
    matrices = [rows.flatten(1) for rows in jacobians]
    gramian = matrices[0] @ matrices[0].T
    for matrix in matrices[1:]:
        gramian += matrix @ matrix.T
    if weights is None:
        return Outcome(gramian, None)
    return Outcome(gramian, [torch.tensordot(weights.flatten(), rows, 1) for rows in jacobians])


def taken(p: Tensor, name: str) -> Tensor:
    """An attribute that a library has left on a parameter, which loses it."""
    found: Tensor = getattr(p, name)
    delattr(p, name)
    return found


def opacus(problem: Problem) -> Step:
    """``GradSampleModule``."""
    on_path()
    from opacus.grad_sample import GradSampleModule

    model = GradSampleModule(problem.model, strict=False, loss_reduction="sum")

    def backward(each: Tensor) -> list[Tensor]:
        each.sum().backward()
        rows = [taken(p, "grad_sample") for p in problem.parameters]
        model.zero_grad()
        return rows

    return _by_backward(problem, model, backward)


def backpack(problem: Problem) -> Step:
    """``BatchGrad``."""
    on_path()
    from backpack import backpack as extensions
    from backpack import extend
    from backpack.extensions import BatchGrad

    model = extend(problem.model)

    def backward(each: Tensor) -> list[Tensor]:
        with extensions(BatchGrad()):
            each.sum().backward()
        rows = [taken(p, "grad_batch") for p in problem.parameters]
        problem.clear()
        return rows

    return _by_backward(problem, model, backward)


def _by_backward(problem: Problem, model: Callable[..., Tensor],
                 backward: Callable[[Tensor], list[Tensor]]) -> Step:  # fmt: skip
    """A step from a backward pass that leaves one row per sample, run once for each objective of a sample."""
    if problem.batch_dim is None:
        raise NotApplicable("rows of samples only, and the objectives are none")

    def step() -> Outcome:
        parts: list[list[Tensor]] = []
        count = 1
        while len(parts) < count:  # a forward pass each: Opacus keeps its activations for one backward
            losses = problem.loss(model(*problem.inputs), *problem.targets)
            count = losses[0].numel()
            parts.append(backward(losses.flatten(1)[:, len(parts)] if losses.ndim > 1 else losses))
        rows = [torch.stack(mine, 1).flatten(0, 1) for mine in zip(*parts, strict=True)]
        return contract(rows, None if problem.kernel else problem.weights_like(losses))

    return step


def on_path() -> None:
    if not FOLDER.exists():
        raise NotApplicable("not installed: make bench-peers")
    sys.path.append(str(FOLDER))
