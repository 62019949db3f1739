"""Steps by ``torch.compile``: what a plain SGD step gains by it, and what ours does.

The first call compiles, for seconds to a minute; it is not timed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gramjd
from benchmarks.problem import NotApplicable, Outcome, Problem, Step


def sgd(problem: Problem) -> Step:
    """The plain step: forward, and backward of the mean, in one graph each."""

    @torch.compile
    def mean(inputs: tuple[Tensor, ...], targets: tuple[Tensor, ...]) -> Tensor:
        return problem.loss(problem.model(*inputs), *targets).mean()

    def step() -> Outcome:
        problem.clear()
        mean(problem.inputs, problem.targets).backward()
        return Outcome(None, problem.gradient())

    return step


def functional(problem: Problem) -> Step:
    """``jacobian_and_value``, ``J.gramian()`` and ``J.vjp(w)`` in one graph; the weights are given."""
    if problem.batch_dim is None:
        raise NotApplicable("the objectives are none of samples")
    function, parameters = gramjd.functional_loss(problem.model, problem.loss)

    @torch.compile(fullgraph=True)
    def whole(parameters: dict[str, Tensor], inputs: Any, *targets: Tensor) -> Any:
        J, objectives = gramjd.jacobian_and_value(function)(parameters, inputs, *targets)
        gramian = J.gramian()
        return gramian, None if problem.kernel else J.vjp(problem.weights_like(objectives))

    def step() -> Outcome:
        gramian, gradient = whole(parameters, problem.inputs, *problem.targets)
        return Outcome(gramian, gradient and [gradient[name] for name in parameters])

    return step
