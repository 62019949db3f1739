"""What is right: the dense Jacobian by ordinary autograd on a float64 copy of the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.problem import Outcome, Problem

ROWS = 2**28  # entries of rows that are held at once: 2 GiB


@dataclass(frozen=True)
class Oracle:
    """Of a problem, in float64."""

    objectives: Tensor
    gramian: Tensor  # [m, m]
    gradient: Sequence[Tensor]  # weighted, in order of the parameters

    @staticmethod
    def of(problem: Problem) -> Oracle:
        """A backward pass for each objective, and one of the weighted sum; more, if the rows are too many."""
        exact = problem.moved(torch.device("cpu")).moved(torch.float64)
        objectives, parameters = exact.objectives(), exact.parameters
        weights = exact.weights_like(objectives)
        gradient = torch.autograd.grad(objectives, parameters, weights, retain_graph=True)
        gramian = torch.zeros(objectives.numel(), objectives.numel(), dtype=torch.float64)
        for some in _groups(parameters, max(1, ROWS // objectives.numel())):
            rows = torch.empty(objectives.numel(), sum(p.numel() for p in some), dtype=torch.float64)
            for row, entry in zip(rows, objectives.flatten(), strict=True):
                found = torch.autograd.grad(entry, some, retain_graph=True, materialize_grads=True)
                torch.cat([g.flatten() for g in found], out=row)
            gramian += rows @ rows.T
        return Oracle(objectives.detach(), gramian, gradient)

    @staticmethod
    def kept(problem: Problem, path: Path) -> Oracle:
        """The same, read from a file if it is of the same problem, else computed and written there."""
        exact = problem.moved(torch.device("cpu")).moved(torch.float64)
        objectives = exact.objectives().detach()
        if path.exists():
            known = Oracle(**torch.load(path))
            if torch.equal(known.objectives, objectives):
                return known
        found = Oracle.of(problem)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(vars(found), path)
        return found

    def errors(self, outcome: Outcome) -> dict[str, float]:
        """Relative errors of what a step found, in the Frobenius norm."""
        errors = {}
        if outcome.gramian is not None:
            gramian = matrix(outcome.gramian.detach().cpu().double())
            errors["gramian_error"] = _relative(gramian, self.gramian)
        if outcome.gradient is not None:
            flat = [torch.cat([g.detach().cpu().double().flatten() for g in each])
                    for each in (outcome.gradient, self.gradient)]  # fmt: skip
            errors["gradient_error"] = _relative(*flat)
        return errors


def _groups(parameters: Sequence[Tensor], entries: int) -> Iterator[list[Tensor]]:
    """Parameters in order, as many at a time as have these entries; one at least."""
    some: list[Tensor] = []
    for p in parameters:
        if some and sum(q.numel() for q in some) + p.numel() > entries:
            yield some
            some = []
        some.append(p)
    if some:
        yield some


def matrix(gramian: Tensor) -> Tensor:
    """A generalized Gramian ``[*S, *reversed(S)]`` as ``[m, m]``."""
    half = gramian.ndim // 2
    order = [*range(half), *reversed(range(half, 2 * half))]
    m = round(gramian.numel() ** 0.5)
    return gramian.permute(order).reshape(m, m)


def _relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())
