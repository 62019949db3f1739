"""The best that a few lines of torch do: all rows at once, then ``G += v @ v.T`` for each parameter.

Two variants: rows kept until the weights are known, for ``w @ v``; or dropped as soon as they are in the
Gramian, and a weighted backward pass instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, jacrev, vmap

from benchmarks.problem import Outcome, Problem, Step

Rows = list[Tensor]  # [m, *p.shape] of each parameter, in order


def rows_kept(problem: Problem) -> Step:
    """Rows stay for the weighted gradient."""
    rows_of = _rows(problem)

    def step() -> Outcome:
        rows, objectives = rows_of()
        shapes, matrices = [v.shape[1:] for v in rows], [v.flatten(1) for v in rows]
        gramian = _zeros(matrices[0])
        for v in matrices:
            gramian.addmm_(v, v.T)
        if problem.kernel:
            return Outcome(gramian, None)
        w = problem.weights_like(objectives.detach()).flatten()
        return Outcome(gramian, [(w @ v).view(shape) for v, shape in zip(matrices, shapes, strict=True)])

    return step


def rows_dropped(problem: Problem) -> Step:
    """Each parameter's rows are dropped after its share; the weighted gradient is another backward pass."""
    rows_of = _rows(problem)

    def step() -> Outcome:
        rows, objectives = rows_of()
        gramian = _zeros(rows[0])
        while rows:
            v = rows.pop().flatten(1)
            gramian.addmm_(v, v.T)
            del v
        if problem.kernel:
            return Outcome(gramian, None)
        problem.clear()
        if not objectives.requires_grad:  # vmap left no graph
            objectives = problem.objectives()
        objectives.backward(problem.weights_like(objectives.detach()))
        return Outcome(gramian, problem.gradient())

    return step


def _zeros(v: Tensor) -> Tensor:
    return v.new_zeros(len(v), len(v))


def _rows(problem: Problem) -> Callable[[], tuple[Rows, Tensor]]:
    """By `vmap(grad)`, `vmap(jacrev)` of several objectives a sample, or a backward pass for each loss."""
    if problem.batch_dim is None:
        return lambda: _rows_of_losses(problem)
    model = problem.model
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def objectives(parameters: dict[str, Tensor], inputs: Any, targets: Any) -> Tensor:
        inputs, targets = (tuple(x.unsqueeze(0) for x in each) for each in (inputs, targets))
        return problem.loss(functional_call(model, parameters, inputs), *targets)[0]

    def with_values(*given: Any) -> tuple[Tensor, Tensor]:
        found = objectives(*given)
        return found, found.detach()

    with torch.no_grad():
        several = problem.objectives().ndim > 1
    each = jacrev(with_values, has_aux=True) if several else grad_and_value(objectives)
    rows_of = vmap(each, in_dims=(None, 0, 0))

    def rows() -> tuple[Rows, Tensor]:
        found, values = rows_of(parameters, problem.inputs, problem.targets)
        return [found.pop(name).flatten(0, values.ndim - 1) for name in parameters], values

    return rows


def _rows_of_losses(problem: Problem) -> tuple[Rows, Tensor]:
    """Of objectives that share all samples; their graph is kept."""
    objectives, parameters = problem.objectives(), problem.parameters
    each = [
        torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        for loss in objectives.flatten()
    ]
    return [torch.stack(of_parameter) for of_parameter in zip(*each, strict=True)], objectives
