"""Is the Gramian of a user's model right, and what does it cost?"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gramjd.cli.cost import cost
from gramjd.cli.load import CannotRunError, Problem
from gramjd.engine import Engine
from gramjd.errors import GramjdError, SlowPathWarning
from gramjd.internals import without_hooks

EXACT, DIFFERS, CANNOT_RUN, REFUSED = range(4)  # exit codes
# Relative errors that rounding explains, by the precision in which a Gramian is judged.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4}
HALF_TOLERANCE = 5e-2


@dataclass
class Report:
    """What a command found, line by line, and its exit code."""

    code: int = EXACT
    lines: list[str] = field(default_factory=list)

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Refusals and warnings of gramjd become lines."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", SlowPathWarning)
            try:
                yield
            except (GramjdError, ValueError) as error:
                self.code = REFUSED
                self.lines.append(f"refused: {type(error).__name__}: {error}")
                if "batch_dim=None" in str(error):
                    self.lines.append("On this command line, batch_dim=None is --batch-dim none.")
        self.lines += [f"note: {w.message}" for w in caught]


def explain(problem: Problem, batch_dim: int | None) -> Report:
    """Every block of the model, or why there is none."""
    report = Report()
    problem.losses()  # without an engine yet: what fails here is not gramjd's
    engine = Engine(problem.model, batch_dim=batch_dim)
    losses = problem.losses()
    with report.refusals():
        report.lines.append(str(engine.explain(losses)))
    engine.close()
    return report


def check(problem: Problem, batch_dim: int | None, *, own_precision: bool = False, rows: int = 64,
          tolerance: float | None = None, repeats: int = 5) -> Report:  # fmt: skip
    """Compare Gramians with autograd's gradients, one loss at a time, then measure a step.

    Args:
        problem: the model is copied and stays as it is.
        batch_dim: as for :class:`gramjd.Engine`.
        own_precision: judge in the model's precision alone, not on a copy in float64.
        rows: at most so many of the losses are differentiated one by one.
        tolerance: relative error up to which the Gramian counts as exact; by default, what rounding
            explains in the precision that is judged.
        repeats: times that each step is measured.

    Raises:
        CannotRunError: the model or its losses fail without any help of gramjd.
    """
    report = Report()
    own = problem.copied()
    losses = own.losses()  # without an engine yet: what fails here is not gramjd's
    judged = own if own_precision else _in_float64(problem)
    error = _compare(judged, batch_dim, rows, report)
    if error is None:
        return report
    judged_in = losses.dtype if own_precision else torch.float64
    if tolerance is None:
        tolerance = TOLERANCES.get(judged_in, HALF_TOLERANCE)
    report.lines.append(_verdict(error, tolerance, judged_in))
    if not error <= tolerance:  # NaN is wrong, too
        report.code = DIFFERS
        return report
    if not own_precision:
        rounding = _compare(own, batch_dim, rows, Report())
        shown = "refused (see --own-precision)" if rounding is None else f"up to {rounding:.1e}"
        report.lines.append(f"in the model's own precision, {_name(losses.dtype)}: {shown}")
    report.lines += ["", *cost(own, batch_dim, repeats, losses.device)]
    return report


def _in_float64(problem: Problem) -> Problem:
    found = problem.copied(torch.float64)
    try:
        found.losses()
    except CannotRunError as error:
        raise CannotRunError(f"In float64: {error} Try --own-precision.") from error.__cause__
    return found


def _verdict(error: float, tolerance: float, judged_in: torch.dtype) -> str:
    found = f"{error:.1e} of its largest entry"
    if error <= tolerance:
        return f"exact: in {_name(judged_in)}, the Gramian is autograd's up to {found}."
    inside = "Where a model computes in float32 inside, 1e-5 is to be expected. Otherwise, "
    cause = f"{inside if judged_in == torch.float64 else ''}this is a bug of gramjd: please report it."
    return (
        f"WRONG: in {_name(judged_in)}, the Gramian differs from autograd's by {found}; --tolerance is "
        f"{tolerance:.0e}. {cause[0].upper()}{cause[1:]}"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _compare(problem: Problem, batch_dim: int | None, rows: int, report: Report) -> float | None:
    """Relative error of the Gramian of some losses; None where it is refused, as the report then says."""
    engine = Engine(problem.model, batch_dim=batch_dim)
    losses = problem.losses()
    parameters = [p for p in problem.model.parameters() if p.requires_grad]
    m, entries = losses.numel(), sum(p.numel() for p in parameters)
    report.lines.append(f"losses of shape {list(losses.shape)}, {entries} trainable parameters")
    with report.refusals():
        gramian = engine.compute_gramian(losses)
    engine.close()
    if report.code == REFUSED:
        return None
    chosen = torch.linspace(0, m - 1, min(rows, m)).round().long()
    if len(chosen) < m:
        report.lines.append(f"compared on {len(chosen)} of them (--rows)")
    order = [*range(losses.ndim), *reversed(range(losses.ndim, 2 * losses.ndim))]  # the 2nd half is mirrored
    found = gramian.permute(order).reshape(m, m)[chosen][:, chosen].double()
    jacobian = _jacobian(losses.flatten()[chosen], parameters)
    want = jacobian @ jacobian.mT
    scale = want.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    return float((found - want).abs().max() / scale)


def _jacobian(losses: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """``[m, n]``: the gradient of each loss by ordinary autograd, in float64."""
    rows = []
    for loss in losses:
        with without_hooks(parameters):
            found = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([g.flatten().double() for g in found]))
    return torch.stack(rows)
