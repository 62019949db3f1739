"""The warning that parameters take one backward pass for each row: which, and why."""

from __future__ import annotations

import warnings

from torch import Tensor

from gramjd.engine.solving.problem import Problem
from gramjd.engine.solving.program import Program
from gramjd.errors import SlowPathWarning

_DERIVATIVES = (
    "the output contains derivatives of the model (create_graph=True), whose uses of parameters are known "
    "for linear, matmul and mul alone. The function transforms (gramjd.jacobian, gramjd.ntk) take such "
    "losses, with torch.func.grad inside, in one pass, whatever the ops"
)
_CLOSED = "the engine is closed: calls of its modules are no longer recorded"
_SKIPPED = (
    "the forward pass was not recorded, as the outputs before had few losses, which need no records. From "
    "now on, this engine records all forward passes"
)
_LATE = (
    "no call of a registered module was recorded: create the engine before the forward pass, and compute the "
    "output from what its modules return. Calls that run no hooks cannot be recorded: model.forward(x), and "
    "those of modules with a __call__ of their own, such as gpytorch's"
)


def warn_of_rows(problem: Problem, program: Program, closed: bool, skipped: bool) -> None:
    """Warn of parameters that take per-row backward passes: which, and why.

    ``closed``: the engine is. ``skipped``: it has recorded no calls lately.
    """
    slow = [name for name, p in problem.parameters.items() if program.strategies[id(p)] == "rows"]
    if not slow:
        return
    cause = _cause_of_rows(problem, program, problem.parameters[slow[0]], closed, skipped)
    more = f" (and {len(slow) - 1} more)" if len(slow) > 1 else ""
    warnings.warn(
        f"The Jacobian of parameter {slow[0]!r}{more} is computed one row at a time, which is exact "
        f"but slow, because {cause}.",
        SlowPathWarning,
        stacklevel=6,
    )


def _cause_of_rows(problem: Problem, program: Program, parameter: Tensor, closed: bool, skipped: bool) -> str:
    if not problem.graph.nodes:
        return _CLOSED if closed else _SKIPPED if skipped else _LATE
    if True in [node.differentiated for node in problem.graph.nodes]:
        return _DERIVATIVES
    return program.causes.get(id(parameter), "it was not used in a registered module")
