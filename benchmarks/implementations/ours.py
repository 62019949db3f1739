"""gramjd's own ways to take a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import gramjd
from benchmarks.problem import Outcome, Problem, Step

SMALLEST = 2**16  # bytes: the least memory_budget that is promised to be kept


def functional(problem: Problem, budget: int | None = None, gramian_alone: bool = False,
               audit: int | None = 256) -> Step:  # fmt: skip
    """``jacobian_and_value``, ``J.gramian()``, ``J.vjp(w)``."""
    lazy, parameters = _lazy(problem, audit)

    def step() -> Outcome:
        J, objectives = lazy(parameters, problem.inputs, *problem.targets)
        gramian = J.gramian(memory_budget=budget)
        if problem.kernel or gramian_alone:
            return Outcome(gramian, None)
        gradient = J.vjp(problem.weights_like(objectives))
        return Outcome(gramian, [gradient[name] for name in parameters])

    return step


def lazy_jacobian(problem: Problem) -> gramjd.Jacobian:
    """``J`` by itself."""
    lazy, parameters = _lazy(problem)
    found: gramjd.Jacobian = lazy(parameters, problem.inputs, *problem.targets)[0]
    return found


def _lazy(problem: Problem, audit: int | None = 256
          ) -> tuple[Callable[..., tuple[gramjd.Jacobian, Any]], dict[str, Tensor]]:  # fmt: skip
    """The transform, and the parameters to call it with."""
    function, parameters = _function(problem)
    in_dims = None if problem.batch_dim is None else (None,) + (0,) * (1 + len(problem.targets))
    return gramjd.jacobian_and_value(function, in_dims=in_dims, audit=audit), parameters


def _function(problem: Problem) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """The pure function of one sample, or of the batch if there are no samples."""
    if problem.batch_dim is not None:
        return gramjd.functional_loss(problem.model, problem.loss)
    model, parameters = problem.model, {n: p.detach() for n, p in problem.model.named_parameters()}

    def of_batch(parameters: dict[str, Tensor], inputs: Any, *targets: Tensor) -> Tensor:
        return problem.loss(torch.func.functional_call(model, parameters, inputs), *targets)

    return of_batch, parameters


def functional_gramian(problem: Problem) -> Step:
    """The Gramian alone."""
    return functional(problem, gramian_alone=True)


def functional_frugal(problem: Problem) -> Step:
    """With the smallest budget of memory."""
    return functional(problem, SMALLEST)


def engine(problem: Problem, budget: int | None = None, gramian_alone: bool = False,
           using: gramjd.Engine | None = None) -> Step:  # fmt: skip
    """``compute_gramian``, then an ordinary backward pass of the weighted objectives."""
    engine = using or gramjd.Engine(problem.model, batch_dim=problem.batch_dim, memory_budget=budget)

    def step() -> Outcome:
        problem.clear()
        objectives = problem.objectives()
        gramian = engine.compute_gramian(objectives)
        if problem.kernel or gramian_alone:
            return Outcome(gramian, None)
        objectives.backward(problem.weights_like(objectives))
        return Outcome(gramian, problem.gradient())

    return step


def engine_gramian(problem: Problem) -> Step:
    """``compute_gramian`` alone."""
    return engine(problem, gramian_alone=True)


def engine_frugal(problem: Problem) -> Step:
    """With the smallest budget of memory."""
    return engine(problem, SMALLEST)


def engine_backward(problem: Problem, using: gramjd.Engine | None = None) -> Step:
    """``jacobian``, ``J.gramian()``, ``J.backward(w)``: no second backward pass."""
    engine = using or gramjd.Engine(problem.model, batch_dim=problem.batch_dim)

    def step() -> Outcome:
        problem.clear()
        objectives = problem.objectives()
        J = engine.jacobian(objectives)
        gramian = J.gramian()
        if problem.kernel:
            return Outcome(gramian, None)
        J.backward(problem.weights_like(objectives))
        return Outcome(gramian, problem.gradient())

    return step
