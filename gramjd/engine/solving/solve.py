"""Blocks of every parameter of an output: each region by the first strategy that passes the checks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gramjd.engine.analysis.coverage import uncovered
from gramjd.engine.analysis.layouts import ZERO
from gramjd.engine.analysis.regions import Later, Stream, regions_of
from gramjd.engine.analysis.separation import Masks, patterns, patterns_for, spread, stays_within
from gramjd.engine.recording.nodes import Cotangents, forget
from gramjd.engine.recording.recorded import CallMark
from gramjd.engine.sharded import Lockstep, needs_weights
from gramjd.engine.solving import backward, finite
from gramjd.engine.solving.passes import Passes
from gramjd.engine.solving.probe import Probe, agrees, fewest_digits, find_layouts, is_noise
from gramjd.engine.solving.replay import Replayed, replay
from gramjd.engine.solving.strategies import FROM_USES, STRATEGIES, Found, are_few, by_losses, by_rows
from gramjd.engine.solving.task import Separation, Task, is_fused
from gramjd.errors import CheckFailedError, NotSeparableError
from gramjd.internals import name_of_type, saved_value
from gramjd.uses.use import roots

_PATTERNS_A_CALL = 2  # backward passes of the proof of separation; until it is whole, layouts are measured

Emit = Callable[[Found], None]


def solve(task: Task, strategies: Sequence[str], check: bool, emit: Emit, rows_budget: int = 0) -> None:
    """Give ``emit`` the blocks of every parameter, by the first strategy that is exact for it.

    Those of a region as soon as the backward pass has been through it, where that is possible. Measures
    and verifies what the task's plan does not know yet, and writes it there.

    Args:
        task: what to solve.
        strategies: the strategies allowed.
        check: whether results are verified.
        emit: what takes the blocks.
        rows_budget: bytes that the rows of all parameters together may take.

    Raises:
        NotFiniteError: gradients have NaN or infinite entries.
        NotSeparableError: there is cross-sample dependence.
        CheckFailedError: no strategy is left for a parameter, or an audit failed.
    """
    plan, lockstep = task.plan, task.lockstep
    if not task.samples and lockstep is None:
        return
    if "losses" in strategies and are_few(task, rows_budget):
        found = by_losses(task)
        plan.strategies.update(dict.fromkeys(map(id, found), "losses"))
        emit(found)
    elif not FROM_USES.keys() & set(strategies) and lockstep is None:  # no strategy that takes recorded uses
        emit(_row_by_row(task, task.parameters, strategies))
    else:
        plan.regions = plan.regions or regions_of(task.graph.nodes)
        if plan.outside is None:
            plan.outside, opened = uncovered(task.output)
            plan.opened = {index for index, node in enumerate(task.graph.nodes) if node in opened}
        _Solver(task, strategies, check, emit).run()


class _Solver:
    """Solves the regions of a task one after the other, as its backward pass reaches them."""

    def __init__(self, task: Task, strategies: Sequence[str], check: bool, emit: Emit) -> None:
        plan, lockstep = task.plan, task.lockstep
        self.task, self.check, self.emit = task, check, emit
        # whatever the data are, all ranks run the same backward passes
        self.strategies = (
            strategies if lockstep is None else [strategy for strategy in strategies if strategy != "rows"]
        )
        opaque = any(isinstance(node.record, CallMark) for node in task.graph.nodes)
        # replays of opaque calls run the user's code anew
        checking = check and (opaque or not plan.complete or bool(plan.audit))
        self.probing = checking or (task.batch_dim is not None and len(plan.layouts) < len(plan.regions))
        # with ranks in step, none may ask for one more pass later
        self.checking = checking or (check and self.probing and lockstep is not None)
        self.passes = Passes(task, self.checking)
        self.done: set[int] = set()  # ids of parameters

    def run(self) -> None:
        """Solve all regions, and note what that proves."""
        task, plan, passes = self.task, self.task.plan, self.passes
        masks = None if task.lockstep is None else self._in_step(task.lockstep)
        if task.lockstep is None and self.probing:
            self._refuse_overflow()  # or what is measured now would be wrong, and remembered
            if fewest_digits(task) != task.output.dtype:  # rounding will be asked for: regions need not wait
                _ = passes.again
        stream = Stream(task.graph.nodes, plan.regions, self._early(), self._solve_region)
        passes.busy = True
        basis = backward.basis(task.output, task.batch_dim)
        backward.stream(task.output, task.graph.nodes, basis, stream, task.graph.batched)
        passes.busy = False
        with nullcontext() if task.lockstep is None else task.lockstep.gather(self._weighted()):
            if not task.samples:
                return
            if task.lockstep is not None and self.probing:
                self._refuse_overflow()
            stream.finish()
        left = {name: p for name, p in task.parameters.items() if id(p) not in self.done}
        if left:
            self.emit(_row_by_row(task, left, self.strategies))
        proven = self.checking and plan.seen and passes.conclusive
        plan.complete = plan.complete or proven or not self.check
        if task.batch_dim is not None:
            plan.separation = _separation(task, self.check, masks)

    def _early(self) -> set[int]:
        """The regions that are solved while the backward pass is in progress."""
        if self.task.lockstep is not None:
            return set()
        nodes, plan = self.task.graph.nodes, self.task.plan
        waits = [isinstance(node.record, CallMark) or is_fused(node) for node in nodes]  # for a replay
        return {number for number, region in enumerate(plan.regions)
                if number not in plan.late and not any(waits[i] for i in region.nodes)}  # fmt: skip

    def _weighted(self) -> list[Any]:
        return [node for node in self.task.graph.nodes if needs_weights(node)]

    def _in_step(self, lockstep: Lockstep) -> list[Masks] | None:
        """Run the passes that any rank needs; the masks of the proof of separation."""
        task = self.task
        lockstep.agree(self.probing, lockstep.units_of(self._weighted()), task.samples, None)
        if not lockstep.passes:
            return None
        self.passes.run_all()
        return spread(task, patterns(task.samples, patterns_for(lockstep.most))) if self.check else None

    def _refuse_overflow(self) -> None:
        """Raise where a pass met NaN or infinity."""
        if self.passes.first.is_finite:
            return
        if self.task.lockstep is not None:
            raise finite.unexplained("gradient")
        raise finite.of_gradient(self.task.output, self.task.batch_dim)

    def _solve_region(self, number: int, cotangents: list[Cotangents]) -> None:
        plan = self.task.plan
        part = self.task.of_region(number, cotangents)
        probe = Probe(self.passes, plan.regions[number].nodes)
        try:
            _expand(part, probe)
            find_layouts(part, probe)
            pattern, known = part.pattern(), plan.patterns.setdefault(number, set())
            verifying = self.checking or (self.check and pattern not in known)
            audit = plan.audit if pattern in known else ""
            found = _first_exact(part, probe.verifying() if verifying else None, self.strategies, audit)
            known.add(pattern)
        except Later:
            plan.late.add(number)  # also the next time: the order of the sum decides on its rounding
            raise
        self.task.met.update(part.met, part.layouts_met())
        self.done.update(map(id, found))
        self.emit(found)
        forget([self.task.graph.nodes[i] for i in probe.nodes])
        self.passes.forget(probe.nodes)


def _separation(task: Task, check: bool, masks: list[Masks] | None) -> Separation | None:
    """What is proven of the layouts, a little more than before where they are the same.

    With ranks in step, the masks are those of all patterns, if they were needed.
    """
    plan, lockstep, before = task.plan, task.lockstep, task.plan.separation
    if not plan.complete or not plan.lasting or plan.unlisted:
        return None
    if before is not None and before.is_whole:
        return before
    needed = patterns_for(task.samples if lockstep is None else lockstep.most)
    if not check:
        return Separation(plan.layouts, task.samples, needed, needed)
    passed, until = 0, needed
    if lockstep is None:
        same = before is not None and (before.samples, before.layouts) == (task.samples, plan.layouts)
        passed = before.passed if before is not None and same else 0
        until = min(needed, passed + _PATTERNS_A_CALL)
        masks = spread(task, patterns(task.samples, needed)[passed:until], first=not passed)
    chosen = patterns(task.samples, needed)[passed:until]
    if masks is None or not stays_within(task, chosen, masks):
        return None
    return Separation(plan.layouts, task.samples, until, needed)


def _row_by_row(task: Task, left: dict[str, Tensor], strategies: Sequence[str]) -> Found:
    """Blocks of the parameters that are left, if this strategy is allowed."""
    if "rows" in strategies:
        _refuse_mixed(task, left, strategies)
        found = by_rows(task, left)
        task.plan.strategies.update(dict.fromkeys(map(id, left.values()), "rows"))
        return found
    name, p = next(iter(left.items()))
    cause = task.plan.causes.get(id(p), "no registered module call used it")
    remedy = "Allow more strategies (the default of Engine tries all), or freeze the parameter."
    if task.lockstep is not None:
        remedy = (
            "Under fully_shard there is no per-row backward, whose backward passes ranks would not run in "
            "step: leave the module unsharded (DistributedDataParallel), or freeze the parameter."
        )
    raise CheckFailedError(
        f"The Gramian of {name!r} could not be computed by {' or '.join(strategies)}: {cause}. {remedy}"
    )


def _first_exact(task: Task, probe: Probe | None, strategies: Sequence[str], audit: str) -> Found:
    """Blocks of a region's parameters by the ops or by replays of calls, where these are exact.

    With a probe they are compared with autograd's gradients. In an ``audit`` a difference is an error.
    """
    plan, found, outside = task.plan, Found(), task.plan.outside or set()
    opaque = bool(audit) and any(isinstance(node.record, CallMark) for node in task.graph.nodes)
    if outside:
        plan.causes.update(dict.fromkeys(outside, "it was used outside of the calls of registered modules"))
    for strategy in strategies:
        if strategy not in FROM_USES:
            continue
        rank, planned = STRATEGIES.index(strategy), {}
        for name, p in task.parameters.items():
            if id(p) not in outside and p not in found:
                known = plan.strategies.get(id(p))
                if known is None or STRATEGIES.index(known) <= rank:
                    planned[name] = p
        if not planned:
            continue
        candidates = FROM_USES[strategy](task, planned)
        for name, p in planned.items():
            blocks = candidates.get(p)
            if blocks is None:
                continue
            if probe is not None and not agrees(probe, name, blocks):
                if audit and not opaque and not agrees(probe.by_others(), name, blocks, fewest_digits(task)):
                    raise CheckFailedError(audit.format(name))
                plan.causes[id(p)] = "its uses that were seen do not add up to autograd's gradient"
                continue
            found[p] = blocks
            plan.strategies[id(p)] = strategy
    return found


def _expand(task: Task, probe: Probe) -> None:
    """Put the nodes of its replay in the place of every fused op."""
    if not any(is_fused(node) for node in task.graph.nodes):
        return
    nodes: list[Any] = []
    cotangents: list[Cotangents] = []
    probed: list[Cotangents] = []
    precisions: list[torch.dtype | None] = []
    places: list[int] = []
    measuring = task.batch_dim is not None and task.region not in task.plan.layouts
    for index, (node, cs) in enumerate(zip(task.graph.nodes, task.cotangents, strict=True)):
        given = probe.first.cotangents[index] if measuring else None
        found = Replayed([node], [cs], [given or []])
        if measuring and is_fused(node) and is_noise(task, probe, index):
            found = Replayed([node], [[None] * len(cs)], [given or []])
        elif is_fused(node) and any(c is not None for c in cs):
            try:
                found = replay(node, cs, given)
            except (ValueError, RuntimeError) as error:  # a slower strategy is left
                for slot in node.record.record.slots:
                    for root in roots(slot.source):
                        task.plan.causes.setdefault(root, str(error))
        nodes += found.nodes
        cotangents += found.cotangents
        probed += found.probed
        # under autocast the op computed with fewer digits than its replay does
        precision = next(c.dtype for c in cs if c is not None) if found.graph is not None else None
        precisions += [precision] * len(found.nodes)
        places += [index] * len(found.nodes)
        task.replays.append(found)
    task.graph, task.cotangents = replace(task.graph, nodes=nodes), cotangents
    task.precisions, task.places = precisions, places
    if measuring:
        probe.first.cotangents = probed


def _refuse_mixed(task: Task, planned: dict[str, Tensor], strategies: Sequence[str]) -> None:
    """Rows are exact whatever ``batch_dim`` is; but a wrong one is an error, not a slow path."""
    layouts, plan = task.met, task.plan
    plan.mixed.update(root for root, sizes in plan.flattened.items() if sizes & plan.sizes)
    mixed = [name for name, p in planned.items() if id(p) in plan.mixed]
    if (
        task.samples == 1
        or len(strategies) == 1
        or not (mixed or (None in layouts and layouts <= {None, ZERO}))
    ):
        return
    shape, dim = list(task.output.shape), task.batch_dim
    if not mixed or layouts <= {None, ZERO}:
        found = f"Nothing in the graph of the output, of shape {shape}, treats"
    else:
        cause = task.plan.causes.get(id(planned[mixed[0]]), "there is cross-sample dependence")
        found = f"For {mixed[0]!r} {cause}: the graph of the output, of shape {shape}, does not treat"
    raise NotSeparableError(
        f"{found} the {task.samples} entries of dimension {dim} as independent samples. Either batch_dim "
        "is not the batch dimension, or the loss or a layer makes samples depend on each other (a mean over "
        "the batch, batch normalisation in training mode), or an input of that size has no batch dimension "
        "(give it one of size 1: [1, ...]). Correct it, or use Engine(..., batch_dim=None), which is exact "
        f"for any computation.{_BATCH_NORM if _normalises_by_batch(task) else ''}"
    )


_BATCH_NORM = (
    " This graph does contain batch normalisation that uses statistics of the batch: call eval() on that "
    "layer, or use another normalisation, such as GroupNorm."
)


def _normalises_by_batch(task: Task) -> bool:
    """Is there a batch normalisation by statistics of the batch in the graph?"""
    names = (name_of_type(type(node)) for node in task.graph.order)
    return any(
        "BatchNorm" in name and saved_value(node, "training") is not False
        for name, node in zip(names, task.graph.order, strict=True)
    )
