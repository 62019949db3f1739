"""The exact strategies from the graph of an output to blocks. All have one signature."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gramjd.blocks import Block, Dense
from gramjd.contraction import Options
from gramjd.contraction.accumulator import Factors
from gramjd.engine.analysis.layouts import ZERO, Layout
from gramjd.engine.recording.nodes import values_of
from gramjd.engine.recording.recorded import CallMark, OpMark
from gramjd.engine.solving import backward, finite
from gramjd.engine.solving.calls import call_blocks
from gramjd.engine.solving.canonical import Unusable, use_of
from gramjd.engine.solving.part import Part
from gramjd.engine.solving.problem import Problem
from gramjd.engine.solving.program import Layouts, Program
from gramjd.engine.solving.repeated import give_blocks
from gramjd.uses.accumulation import blocks_of
from gramjd.uses.use import Derived, Record, Source, Use, roots

Found = Mapping[str, Sequence[Block]]  # by name of the parameter; those not covered are missing


@dataclass(frozen=True)
class Material:
    """The input of a strategy: a region, or the whole problem where no part of it is needed."""

    problem: Problem
    program: Program
    causes: Mapping[int, str] = field(default_factory=dict)  # why strategies before failed, by parameter id
    part: Part | None = None
    layouts: Sequence[Layouts] = ()  # of each node of the part
    mixed: frozenset[int] = frozenset()  # ids of parameters whose uses have cross-sample dependence


@dataclass(frozen=True)
class Candidate:
    """Blocks that a strategy has built, not verified, and why it has none for other parameters."""

    blocks: Found
    causes: Mapping[int, str] = field(default_factory=dict)  # by parameter id


Strategy = Callable[[Material, Mapping[str, Tensor]], Candidate]


def by_ops(material: Material, parameters: Mapping[str, Tensor]) -> Candidate:
    """Strategy ``"ops"``: the uses that the forward recorded."""
    factors = Factors()
    if material.program.complete and give_blocks(blocks_by_ops, material, parameters, factors):
        return Candidate(factors.blocks)
    return blocks_by_ops(material, parameters)


def blocks_by_ops(material: Material, parameters: Mapping[str, Tensor]) -> Candidate:
    """The blocks of recorded uses, and the causes of those that have none."""
    part = material.part
    assert part is not None
    causes: dict[int, str] = {}

    def fail(source: Source, cause: object) -> None:
        for root in roots(source):
            causes.setdefault(root, str(cause))

    blocks = blocks_of(_uses_of(material, part, fail), list(parameters.values()), fail)
    # what a whole call holds was used by what no op shows
    covered = _received(part) - _of_calls(part) - causes.keys()
    pairs = zip(parameters.items(), blocks, strict=True)
    return Candidate({name: mine for (name, p), mine in pairs if id(p) in covered}, causes)


def _uses_of(material: Material, part: Part, fail: Callable[[Source, object], None]) -> list[Use]:
    """The uses of a region's nodes; ``fail`` is told which sources have others, and why."""
    uses: list[Use] = []
    split: dict[Record, Layout] = {}  # of derived tensors that have samples
    resolved: set[Source] = set()  # derived tensors whose cotangents contain all that their uses send
    for index, node in enumerate(part.nodes):
        mark = node.record
        if not isinstance(mark, OpMark):
            continue
        record, layouts = mark.record, material.layouts[index]
        sources = {slot.source for slot in record.slots}
        try:
            use = use_of(part, index, layouts, split, material.program.opened, material.mixed)
        except Unusable as cause:
            for source in sources - resolved if mark.lost else sources:
                fail(source, cause)
            continue
        if use is None:
            continue
        uses.append(use)
        if record.derived:
            resolved.update(Derived(record, i) for i, c in enumerate(use.cs) if c is not None)
            if use.cs[0] is not None and part.problem.batch_dim is not None:
                split[record] = next(layout for layout in layouts if layout not in (None, ZERO))
    return uses


def _of_calls(part: Part) -> set[int]:
    """Ids of the parameters that module calls answer for."""
    marks = [node.record for node in part.nodes if isinstance(node.record, CallMark)]
    return {id(p) for mark in marks for p in mark.parameters}


def _received(part: Part) -> set[int]:
    """Ids of the parameters that recorded ops received, or what was derived from them."""
    records = [node.record.record for node in part.nodes if isinstance(node.record, OpMark)]
    return {root for record in records for slot in record.slots for root in roots(slot.source)}


def by_calls(material: Material, parameters: Mapping[str, Tensor]) -> Candidate:
    """Strategy ``"functional"``: module calls as pure functions under ``vmap(vjp)``."""
    part = material.part
    assert part is not None
    found: dict[int, list[Block]] = {}
    causes: dict[int, str] = {}
    failed: set[int] = set()
    for index, node in enumerate(part.nodes):
        mark = node.record
        if not isinstance(mark, CallMark):
            continue
        ids = [id(p) for p in mark.parameters]
        try:
            blocks = _of_call(part, index, material.layouts[index])
        except Exception as error:  # whatever the user's module does under vmap: a slower strategy is left
            failed.update(ids)
            causes = {**dict.fromkeys(ids, f"{type(mark.module).__name__}: {error}"), **causes}
            continue
        for each, mine in zip(ids, blocks, strict=True):
            found.setdefault(each, []).extend(mine)
    covered = found.keys() - failed
    return Candidate({name: found[id(p)] for name, p in parameters.items() if id(p) in covered}, causes)


def _of_call(part: Part, index: int, layouts: Layouts) -> list[list[Block]]:
    """The blocks of the parameters that a call of a module answers for.

    Raises:
        ValueError: its outputs do not belong to one sample each, or a replay differs.
    """
    node, problem = part.nodes[index], part.problem
    given = zip(layouts, part.cotangents[index], strict=True)
    used = {layout for layout, c in given if c is not None}
    layout = used.pop() if len(used) == 1 else None
    if layout is None:
        raise ValueError("its outputs do not belong to one sample each")
    mine = None if problem.batch_dim is None else layout
    cs = part.canonical(index, layouts)
    return call_blocks(node.record, values_of(node), cs, mine, problem.samples)


def are_few(problem: Problem, options: Options) -> bool:
    """Whether each loss gets a backward pass: few losses, no samples, and memory for all rows."""
    output = problem.output
    if problem.batch_dim is not None or problem.lockstep is not None or output.numel() > backward.FEW:
        return False
    rows = sum(p.numel() * p.element_size() for p in problem.parameters.values())
    return rows * output.numel() <= options.rows_budget(output.device)


def by_losses(material: Material, parameters: Mapping[str, Tensor]) -> Candidate:
    """Strategy ``"losses"``: one ordinary backward pass for each of a few, exact by definition.

    Raises:
        NotFiniteError: gradients have NaN or infinite entries.
    """
    problem = material.problem
    rows = backward.loss_gradients(problem.output, list(parameters.values()))
    found = [row for row in rows if row is not None]
    # a sum reads them once, and has NaN or infinity where they have; or it overflows itself
    device = problem.output.device
    sums = [row.sum().abs().float().to(device) for row in found]
    if (
        found
        and not bool(torch.stack(sums).isfinite().all())
        and not all(bool(row.isfinite().all()) for row in found)
    ):
        raise finite.of_gradient(problem.output, problem.batch_dim)
    origin = "one of few losses (a backward pass for each is the fastest)"
    return Candidate(_dense(parameters, rows, [origin] * len(rows)))


def by_rows(material: Material, parameters: Mapping[str, Tensor]) -> Candidate:
    """Strategy ``"rows"``: one row after the other by ordinary autograd, exact by definition."""
    problem = material.problem
    rows = backward.row_gradients(problem.output, list(parameters.values()), problem.batch_dim)
    origins = [
        f"one row at a time ({material.causes.get(id(p), 'it was not used in a registered module')})"
        for p in parameters.values()
    ]
    return Candidate(_dense(parameters, rows, origins))


def _dense(parameters: Mapping[str, Tensor], rows: Sequence[Tensor | None], origins: Sequence[str]) -> Found:
    """Wrap rows as ``Dense`` blocks."""
    return {
        name: [] if row is None else [Dense(row, origin=origin)]
        for name, row, origin in zip(parameters, rows, origins, strict=True)
    }


STRATEGIES: dict[str, Strategy] = {  # best first
    "losses": by_losses,
    "ops": by_ops,
    "functional": by_calls,
    "rows": by_rows,
}
FROM_USES = ("ops", "functional")  # those that a region alone is enough for
