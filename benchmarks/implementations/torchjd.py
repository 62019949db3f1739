"""TorchJD's two engines."""

from __future__ import annotations

from benchmarks.implementations.rows import contract, taken
from benchmarks.problem import Outcome, Problem, Step


def autogram(problem: Problem) -> Step:
    """Its Gramian by layers, then an ordinary backward pass."""
    from torchjd.autogram import Engine

    engine = Engine(problem.model, batch_dim=problem.batch_dim)

    def step() -> Outcome:
        problem.clear()
        objectives = problem.objectives()
        gramian = engine.compute_gramian(objectives)
        if problem.kernel:
            return Outcome(gramian, None)
        objectives.backward(problem.weights_like(objectives))
        return Outcome(gramian, problem.gradient())

    return step


def autojac(problem: Problem) -> Step:
    """Its Jacobian, a row for each objective, then two products with it."""
    from torchjd.autojac import backward

    def step() -> Outcome:
        objectives = problem.objectives()
        backward(objectives.flatten())
        jacobians = [taken(p, "jac") for p in problem.parameters]
        weights = None if problem.kernel else problem.weights_like(objectives)
        return contract(jacobians, weights)

    return step
