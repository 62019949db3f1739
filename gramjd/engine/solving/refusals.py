"""Errors for parameters without an exact strategy, and for samples that depend on each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from gramjd.engine.analysis.layouts import ZERO
from gramjd.engine.solving.lay_out import Finding
from gramjd.engine.solving.problem import Problem
from gramjd.engine.solving.program import Program
from gramjd.errors import CheckFailedError, NotSeparableError
from gramjd.internals import name_of_type, saved_value


def no_strategy(
    problem: Problem, program: Program, left: Mapping[str, Tensor], strategies: Sequence[str]
) -> CheckFailedError:
    """The error for a parameter that the allowed strategies are not exact for."""
    name, p = next(iter(left.items()))
    cause = program.causes.get(id(p), "no registered module call used it")
    remedy = "Allow more strategies (the default of Engine tries all), or freeze the parameter."
    if problem.lockstep is not None:
        remedy = (
            "Under fully_shard there is no per-row backward, whose backward passes ranks would not run in "
            "step: leave the module unsharded (DistributedDataParallel), or freeze the parameter."
        )
    return CheckFailedError(
        f"The Gramian of {name!r} could not be computed by {' or '.join(strategies)}: {cause}. {remedy}"
    )


def refuse_dependence(
    problem: Problem, program: Program, left: Mapping[str, Tensor], finding: Finding
) -> None:
    """Raise where ``batch_dim`` is wrong. Rows are exact all the same, but slow, and hardly what was meant.

    Args:
        problem: what is solved.
        program: with the causes.
        left: parameters that rows are asked for.
        finding: what is found of the layouts.

    Raises:
        NotSeparableError: there is cross-sample dependence, or nothing treats samples as independent.
    """
    sizes = finding.sizes
    mixed = finding.mixed | {root for root, dims in finding.flattened.items() if dims & sizes}
    names = [name for name, p in left.items() if id(p) in mixed]
    none_fits = finding.met <= {None, ZERO}
    if problem.samples == 1 or not (names or (None in finding.met and none_fits)):
        return
    shape, dim = list(problem.output.shape), problem.batch_dim
    if not names or none_fits:
        found = f"Nothing in the graph of the output, of shape {shape}, treats"
    else:
        cause = program.causes.get(id(left[names[0]]), "there is cross-sample dependence")
        found = f"For {names[0]!r} {cause}: the graph of the output, of shape {shape}, does not treat"
    first = _BATCH_NORM if _normalises_by_batch(problem) else ""
    raise NotSeparableError(
        f"{first}{found} the {problem.samples} entries of dimension {dim} as independent samples. Either "
        "batch_dim is not the batch dimension, or the loss or a layer makes samples depend on each other (a "
        "mean over the batch, batch normalisation in training mode), or an input of that size has no batch "
        "dimension (give it one of size 1: [1, ...]), or samples lie in two dimensions of an input (flatten "
        "them before the model: x.flatten(0, 1)). Correct it, or use Engine(..., batch_dim=None), which "
        "is exact for any computation."
    )


_BATCH_NORM = (
    "A batch normalisation uses statistics of the batch, so that samples depend on each other: call eval() "
    "on that layer, or use another normalisation, such as GroupNorm. "
)


def _normalises_by_batch(problem: Problem) -> bool:
    """Whether the graph contains a batch normalisation by statistics of the batch."""
    order = problem.graph.order
    return any(
        "BatchNorm" in name_of_type(type(node)) and saved_value(node, "training") is not False
        for node in order
    )
