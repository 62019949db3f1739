"""The commands ``check`` and ``explain``: whether the Gramian of a model is exact, and what it costs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from gramjd import pytree
from gramjd.cli.cost import cost, peak_bytes
from gramjd.cli.load import CannotRunError, Problem
from gramjd.cli.memory import Need, refuse
from gramjd.cli.terminal import Progress
from gramjd.complexes import entries as real_numel
from gramjd.engine import Engine
from gramjd.errors import GramjdError, SlowPathWarning
from gramjd.internals import without_hooks

EXACT, DIFFERS, CANNOT_RUN, REFUSED = range(4)  # exit codes
# Relative errors that rounding explains, by the precision in which a Gramian is judged.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4}
HALF_TOLERANCE = 5e-2
COLUMNS = 2**16  # that are in float64 at once
OTHER = 0.1  # relative differences of losses above it are no rounding


@dataclass
class Report:
    """The output of a command, line by line, and its exit code."""

    code: int = EXACT
    lines: list[str] = field(default_factory=list)

    @contextmanager
    def refusals(self) -> Iterator[None]:
        """Refusals and warnings of gramjd become lines."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", SlowPathWarning)
            try:
                yield
            except (GramjdError, ValueError, TypeError) as error:  # the last: complex parameters
                self.code = REFUSED
                self.lines.append(f"refused: {type(error).__name__}: {error}")
                if "batch_dim=None" in str(error):
                    self.lines.append("On this command line, batch_dim=None is --batch-dim none.")
        self.lines += [n for n in dict.fromkeys(f"note: {w.message}" for w in caught) if n not in self.lines]


def explain(problem: Problem, batch_dim: int | None, progress: Progress | None = None) -> Report:
    """Report every block of the model, or the reason for a refusal."""
    report, progress = Report(), progress or Progress(None)
    progress("running the losses")
    problem.losses()  # without an engine yet: what fails here is not gramjd's
    engine = Engine(problem.model, batch_dim=batch_dim)
    progress("running the losses once more")
    losses = problem.losses()
    progress("explaining the Gramian")
    with report.refusals():
        report.lines.append(str(engine.explain(losses)))
    engine.close()
    return report


def check(problem: Problem, batch_dim: int | None, *, own_precision: bool = False, rows: int = 64,
          tolerance: float | None = None, repeats: int = 5, mode: str = "both",
          progress: Progress | None = None) -> Report:  # fmt: skip
    """Compare Gramians with autograd's gradients, one loss at a time, then measure a step.

    One engine sees every batch, and each once more with its samples in another order, in the model's own
    mode and in the other: what it learned from one must be right for the next.

    Args:
        problem: the model is copied and stays as it is.
        batch_dim: as for :class:`gramjd.Engine`.
        own_precision: judge in the model's precision alone, not on a copy in float64.
        rows: at most so many of the losses are differentiated one by one.
        tolerance: relative error up to which the Gramian counts as exact; by default, what rounding
            explains in the precision that is judged.
        repeats: times that each step is measured.
        mode: ``"both"``, or ``"train"`` or ``"eval"`` alone.
        progress: shows the stages.

    Raises:
        CannotRunError: the model or its losses fail without gramjd, or memory does not hold the rows.
    """
    report, show = Report(), progress or Progress()
    show("running the losses")
    own = problem.copied()
    losses = _run(own, mode)  # without an engine yet: what fails here is not gramjd's
    again, forward = _measured(own)
    _refuse(own, min(rows, losses.numel()), losses, forward, own_precision)
    show(f"running the losses in {_name(losses.dtype if own_precision else torch.float64)}")
    judged, double = (own, losses) if own_precision else _in_float64(problem, mode)
    count = sum(p.numel() for p in judged.model.parameters() if p.requires_grad)
    facts = [f"losses of shape {list(losses.shape)}, {count} trainable parameters"]
    if not own_precision:
        facts += _other_function(losses, again, double)
    error = _compare(judged, batch_dim, rows, mode, report, show)
    report.lines = [*report.lines, *facts] if error is None else [*facts, *report.lines]
    if error is None:  # the refusal comes first
        return report
    judged_in = losses.dtype if own_precision else torch.float64
    if tolerance is None:
        tolerance = TOLERANCES.get(judged_in, HALF_TOLERANCE)
    verdict = [_verdict(error, tolerance, judged_in)]
    if not error <= tolerance:  # NaN is wrong, too
        report.code = DIFFERS
        report.lines = [*verdict, *report.lines]
        return report
    if not own_precision:
        del judged  # as much memory again as the model
        rounding = _compare(own, batch_dim, rows, mode, Report(), show)
        shown = "refused (see --own-precision)" if rounding is None else f"up to {rounding:.1e}"
        verdict.append(f"in the model's own precision, {_name(losses.dtype)}: {shown}")
    show("measuring a step")
    report.lines = [*verdict, *report.lines, "", *cost(own, batch_dim, repeats, losses.device)]
    return report


def _run(problem: Problem, mode: str) -> Tensor:
    """The losses of the first batch in the mode that counts, without their graph."""
    if mode != "both":
        problem.model.train(mode == "train")
    return problem.losses().detach()


def _measured(problem: Problem) -> tuple[Tensor, int]:
    """The losses of the first batch once more, and the bytes that this forward pass held at most."""
    found: list[Tensor] = []
    peak = peak_bytes(lambda: found.append(problem.losses().detach()), problem.device)
    return found[0], peak


def _refuse(problem: Problem, rows: int, losses: Tensor, forward: int, own_precision: bool) -> None:
    """Refuse a comparison that memory does not hold, before it begins."""
    parameters = _trainable(problem.model)
    entries, dtype = sum(map(real_numel, parameters)), _rows_dtype(parameters)
    own = Need(0, entries * dtype.itemsize, forward)
    if own_precision:
        refuse(rows, own, None, losses.device)
        return
    double = torch.float64.itemsize
    held = [*problem.model.parameters(), *problem.model.buffers()]
    factor = max(1, double // losses.dtype.itemsize)
    need = Need(double * sum(map(real_numel, held)), double * entries, factor * forward)
    refuse(rows, need, own if dtype != torch.float64 else None, losses.device)


def _trainable(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def _rows_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    """The dtype that holds the entries of all gradients as they are."""
    kinds = [p.dtype.to_real() for p in parameters]
    return reduce(torch.promote_types, kinds)


def _in_float64(problem: Problem, mode: str) -> tuple[Problem, Tensor]:
    """A copy in float64, and its losses."""
    found = problem.copied(double=True)
    try:
        return found, _run(found, mode)
    except CannotRunError as error:
        raise CannotRunError(f"In float64: {error} Try --own-precision.") from error.__cause__


def _other_function(first: Tensor, again: Tensor, found: Tensor) -> list[str]:
    """A warning if a copy in float64 computes other losses, and not because it draws random numbers."""
    scale = float(first.abs().max())
    off = float((found - first).abs().max()) / scale if found.shape == first.shape and scale else 0.0
    if not torch.equal(first, again) or off <= OTHER:
        return []
    return [
        f"note: a copy in float64 computes other losses, by {off:.0e} of the largest: see --own-precision."
    ]


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


def _compare(problem: Problem, batch_dim: int | None, rows: int, mode: str, report: Report,
             show: Progress) -> float | None:  # fmt: skip
    """The largest relative error of the Gramians of all steps that one engine takes.

    None where that of the model's own mode is refused, as the report then says.
    """
    engine = Engine(problem.model, batch_dim=batch_dim)
    flags = {module: module.training for module in problem.model.modules()}
    worst, shown = 0.0, _mode(problem)
    try:
        for asked in (shown, *(["eval()" if shown == "train()" else "train()"] if mode == "both" else [])):
            if asked != shown:
                problem.model.train(asked == "train()")
            error = _compare_batches(problem, engine, batch_dim, rows, report, asked, asked == shown, show)
            if report.code == REFUSED:
                return None
            worst = max(worst, error) if error == error else error
    finally:
        engine.close()
        for module, flag in flags.items():
            module.training = flag
    return worst


def _mode(problem: Problem) -> str:
    return "train()" if problem.model.training else "eval()"


def _compare_batches(problem: Problem, engine: Engine, batch_dim: int | None, rows: int, report: Report,
                     mode: str, own: bool, show: Progress) -> float:  # fmt: skip
    """The largest relative error of the Gramians in one mode; a refusal in the other mode is but noted."""
    worst, steps, found = 0.0, 0, Report()
    for batch in problem.batches:
        for given in (batch, *_moved(problem, batch, batch_dim)):
            try:
                losses = problem.losses(given)
            except CannotRunError as failure:
                if own and given is batch:
                    raise
                found.lines.append(f"note: not judged in {mode}, where {failure}")
                continue
            stage = f"in {_name(losses.dtype)} and {mode}, step {steps + 1}"
            show(f"Gramian {stage}")
            shown = partial(show, f"gradients of autograd {stage}")
            error, steps = _error(problem, engine, losses, rows, found, shown), steps + 1
            del losses  # and its graph, before there is the next
            if error is None:
                report.lines += found.lines if own else [f"note: in {mode}, {line}" for line in found.lines]
                report.code = REFUSED if own else report.code
                return worst
            worst = max(worst, error) if error == error else error
    report.lines += [line for line in found.lines if line not in report.lines]
    count = len(problem.batches)
    taken = "1 step" if steps == 1 else f"{steps} steps"
    batches, their = ("1 batch", "its") if count == 1 else (f"{count} batches", "their")
    moved = f" and on the same with {their} samples in another order" if steps > count else ""
    report.lines.append(f"in {mode}: {taken} of one engine, on {batches}{moved}")
    return worst


def _moved(problem: Problem, batch: Any, batch_dim: int | None) -> list[Any]:
    """A batch with its samples in another order, if some tensors of it show how many there are."""
    if batch_dim is None:
        return []
    with torch.random.fork_rng():
        try:
            samples = problem.losses(batch).shape[batch_dim]
        except (CannotRunError, IndexError):  # said where it is judged
            return []
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(0))

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or samples not in leaf.shape:
            return leaf
        return leaf.index_select(leaf.shape.index(samples), order.to(leaf.device))

    return [pytree.map(move, batch)]


def _error(problem: Problem, engine: Engine, losses: Tensor, rows: int, report: Report,
           show: Callable[..., None]) -> float | None:  # fmt: skip
    """Relative error of the Gramian of some losses; None where it is refused, as the report then says."""
    parameters = _trainable(problem.model)
    m = losses.numel()
    with report.refusals():
        gramian = engine.compute_gramian(losses)
    if report.code == REFUSED:
        return None
    chosen = torch.linspace(0, m - 1, min(rows, m)).round().long()
    said = f"compared on {len(chosen)} of them (--rows)"
    if len(chosen) < m and said not in report.lines:
        report.lines.append(said)
    order = [*range(losses.ndim), *reversed(range(losses.ndim, 2 * losses.ndim))]  # the 2nd half is mirrored
    found = gramian.permute(order).reshape(m, m)[chosen][:, chosen].double()
    jacobian = _jacobian(losses.flatten()[chosen], parameters, show)
    want = _products(jacobian)
    scale = want.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    return float((found - want).abs().max() / scale)


def _jacobian(losses: Tensor, parameters: Sequence[Tensor], show: Callable[..., None]) -> Tensor:
    """``[m, n]``: the gradient of each loss by ordinary autograd, in the parameters' precision."""
    entries = sum(map(real_numel, parameters))
    rows = torch.empty(len(losses), entries, dtype=_rows_dtype(parameters), device=losses.device)
    for number, loss in enumerate(losses):
        show(number, len(losses))
        with without_hooks(parameters):
            found = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        start = 0
        for gradient in found:
            flat = _real(gradient).flatten()
            rows[number, start : start + len(flat)] = flat
            start += len(flat)
    return rows


def _products(rows: Tensor) -> Tensor:
    """``rows @ rows.mT`` in float64, some columns at a time."""
    total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
    for some in rows.split(COLUMNS, 1):
        wide = some.double()
        total += wide @ wide.mT
    return total


def _real(gradient: Tensor) -> Tensor:
    """The entries of a gradient as real numbers."""
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient
