"""The exact strategies from the graph of an output to blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gramjd.blocks import Block, Dense
from gramjd.engine.analysis.layouts import ZERO, Layout, canonical
from gramjd.engine.recording.calls import call_blocks
from gramjd.engine.recording.nodes import values_of
from gramjd.engine.recording.recorded import CallMark, OpMark
from gramjd.engine.solving import backward, finite
from gramjd.engine.solving.task import Task
from gramjd.rules.registry import any_entry
from gramjd.uses.accumulation import blocks_of
from gramjd.uses.use import Derived, Record, Source, Use, names_of_leaves, roots

STRATEGIES = ("losses", "ops", "functional", "rows")  # best first

Found = dict[Tensor, list[Block]]  # of each parameter; those not covered are missing


class _Unusable(Exception):
    """Why the blocks of a use cannot follow from what was recorded of it."""


def by_ops(task: Task, parameters: dict[str, Tensor]) -> Found:
    """Strategy ``"ops"``: the uses that the forward recorded."""
    failed: set[int] = set()

    def fail(source: Source, cause: object) -> None:
        failed.update(roots(source))
        for root in roots(source):
            task.plan.causes.setdefault(root, str(cause))

    uses: list[Use] = []
    split: dict[Record, Layout] = {}  # of derived tensors that have samples
    resolved: set[Source] = set()  # derived tensors whose cotangents contain all that their uses send
    seen: set[int] = set()  # ids of parameters
    for index, node in enumerate(task.graph.nodes):
        mark = node.record
        if not isinstance(mark, OpMark):  # what it holds was used by what no op shows
            failed.update(map(id, mark.parameters))
            continue
        record = mark.record
        for slot in record.slots:
            seen.update((id(slot.source),) if isinstance(slot.source, Tensor) else roots(slot.source))
        if mark.lost:
            for source in {slot.source for slot in record.slots} - resolved:
                fail(source, f"{_name(record.call.op)} {mark.lost}")
            continue
        try:
            use = _use(task, index, split)
        except _Unusable as cause:
            for slot in record.slots:
                fail(slot.source, cause)
            continue
        if use is None:
            continue
        uses.append(use)
        if record.derived:
            resolved.update(Derived(record, i) for i, c in enumerate(use.cs) if c is not None)
            if use.cs[0] is not None and task.batch_dim is not None:
                mine = task.layouts[index]
                split[record] = next(layout for layout in mine if layout not in (None, ZERO))
    blocks = blocks_of(uses, list(parameters.values()), fail)
    found: Found = {}
    for p, of_p in zip(parameters.values(), blocks, strict=True):
        if id(p) in seen and id(p) not in failed:
            found[p] = of_p
    return found


def _use(task: Task, index: int, split: Mapping[Record, Layout]) -> Use | None:
    """The use of a node in canonical layout; None where no cotangents come to it.

    Raises:
        _Unusable: it has none.
    """
    node, mark = task.graph.nodes[index], task.graph.nodes[index].record
    record = mark.record
    if mark.replay is not None and any(c is not None for c in task.cotangents[index]):
        raise _Unusable("its fused op could not be replayed")
    values, slots = _saved(task, node)
    cs = task.canonical(index)
    if False in mark.live:
        live = iter(cs)
        cs = [next(live) if is_live else None for is_live in mark.live]
    layouts = [layout for layout in task.layouts[index] if layout is not ZERO]
    if not layouts:
        return None
    layout = layouts[0]
    if layout is None or (len(layouts) > 1 and len(set(layouts)) > 1):
        if record.derived and not task.is_open(index):
            # no sample's own: its rows come from where the tensor meets the batch
            return Use.of(record, values, [None] * len(cs), slots)
        raise _Unusable(_no_layout(task, record))
    if task.batch_dim is None:
        return Use.of(record, [t.unsqueeze(0) for t in values], cs, slots)
    (first, *_), found = [c for c in task.cotangents[index] if c is not None], []
    if values:
        output, samples = first.shape[1:], task.samples
        try:
            for t, at in zip(values, _where(record, values, slots, output, layout.dim), strict=True):
                found.append(canonical(t, at, layout, output[layout.dim], samples))
        except ValueError as error:
            raise _Unusable(error) from error
    own = _with_samples(record, slots, split, task.samples) if split else {}
    return Use.of(record, found, cs, slots, own)


def _saved(task: Task, node: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The values that a node saved for rules, and the tensors of its slots."""
    record: Record = node.record.record
    try:
        saved = values_of(node)
    except RuntimeError as error:
        what = f"what {_name(record.call.op)} used it with was written in place afterwards"
        raise _Unusable(what) from error
    for t in saved:
        if t.layout is not torch.strided:
            raise _Unusable(f"its use by {_name(record.call.op)} is with a sparse tensor")
    count = len(record.saved)
    values, slots = saved[:count], saved[count:]
    if task.lockstep is not None:  # the memory of sharded weights is freed between the passes
        slots = [t if t.untyped_storage().size() else _hollow(t) for t in slots]
    return values, slots


def _no_layout(task: Task, record: Record) -> str:
    """Why the output of an op has no layout of samples."""
    name = _name(record.call.op)
    if record.derived:
        return f"an op that was not recorded used the result of {name}"
    if any(roots(slot.source) & task.plan.mixed for slot in record.slots):
        return f"there is cross-sample dependence at its use by {name}"
    return f"its use by {name} is of no one sample"


def _with_samples(record: Record, slots: Sequence[Tensor], split: Mapping[Record, Layout],
                  samples: int) -> dict[int, Tensor]:  # fmt: skip
    """The slots that have samples, by leaf."""
    own: dict[int, Tensor] = {}
    for slot, tensor in zip(record.slots, slots, strict=True):
        at = split.get(slot.source.record) if isinstance(slot.source, Derived) else None
        if at is None:
            continue
        if at.dim >= tensor.ndim or tensor.shape[at.dim] % samples:  # written in place since
            name = _name(record.call.op)
            raise _Unusable(f"its use by {name} has samples elsewhere than its argument")
        own[slot.index] = at.split(tensor, at.dim, samples)
    return own


def _hollow(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and dtype without values; to read them is an error."""
    return torch.empty_like(tensor, device="meta")


def _where(record: Record, values: Sequence[Tensor], slots: Sequence[Tensor], output: Sequence[int],
           dim: int) -> list[int | None]:  # fmt: skip
    """The dimensions of a call's saved arguments that meet dimension ``dim`` of its output."""
    entry = record.entries[0]
    if entry is None:
        known = [entry for entry in record.entries if entry is not None]
        entry = known[0] if known else any_entry(record.call.op)
    # as of most ops: the last dimensions meet
    last = [at if (at := dim - len(output) + t.ndim) >= 0 else None for t in values]
    if entry is None:
        return last
    names = record.call.names if record.spec is None else names_of_leaves(record.call)
    arguments: dict[Any, Any] = dict(zip(names, record.leaves, strict=True))
    arguments["output"] = output
    for index, value in zip(record.saved, values, strict=True):
        arguments[names[index]] = value.shape
    for slot, tensor in zip(record.slots, slots, strict=True):
        arguments[slot.name] = tensor.shape
    found: list[int | None] = []
    for index, place in zip(record.saved, last, strict=True):
        name = names[index]
        found.append(place if name is None else entry.meets(arguments, str(name), dim))
    return found


def by_calls(task: Task, parameters: dict[str, Tensor]) -> Found:
    """Strategy ``"functional"``: module calls as pure functions under ``vmap(vjp)``."""
    found: dict[int, list[Block]] = {}
    failed: set[int] = set()
    for index, node in enumerate(task.graph.nodes):
        mark = node.record
        if not isinstance(mark, CallMark):
            continue
        used = [i for i, c in enumerate(task.cotangents[index]) if c is not None]
        layouts = {task.layouts[index][i] for i in used}
        ids = [id(p) for p in mark.parameters]
        cs = task.canonical(index)
        try:
            layout = layouts.pop() if len(layouts) == 1 else None
            if layout is None:
                raise ValueError("its outputs do not belong to one sample each")
            layout = None if task.batch_dim is None else layout
            blocks = call_blocks(mark, values_of(node), cs, layout, task.samples)
        except Exception as error:  # whatever the user's module does under vmap: a slower strategy is left
            failed.update(ids)
            for each in ids:
                task.plan.causes.setdefault(each, f"{type(mark.module).__name__}: {error}")
            continue
        for each, mine in zip(ids, blocks, strict=True):
            found.setdefault(each, []).extend(mine)
    covered = found.keys() - failed
    return {p: found[id(p)] for p in parameters.values() if id(p) in covered}


def are_few(task: Task, budget: int) -> bool:
    """Whether each loss gets a backward pass: few losses, no samples, and memory for all rows."""
    if task.batch_dim is not None or task.lockstep is not None or task.output.numel() > backward.FEW:
        return False
    rows = sum(p.numel() * p.element_size() for p in task.parameters.values())
    return rows * task.output.numel() <= budget


def by_losses(task: Task) -> Found:
    """One ordinary backward pass for each of a few losses: exact by definition, there is nothing to prove.

    Raises:
        NotFiniteError: gradients have NaN or infinite entries.
    """
    rows = backward.loss_gradients(task.output, list(task.parameters.values()))
    found = [row for row in rows if row is not None]
    # a sum reads them once, and has NaN or infinity where they have; or it overflows itself
    sums = torch.stack([row.sum().abs().float() for row in found]) if found else torch.zeros(0)
    if not bool(sums.isfinite().all()) and not all(bool(row.isfinite().all()) for row in found):
        raise finite.of_gradient(task.output, task.batch_dim)
    origin = "one of few losses (a backward pass for each is the fastest)"
    return {
        p: [] if row is None else [Dense(row, origin=origin)]
        for p, row in zip(task.parameters.values(), rows, strict=True)
    }


def by_rows(task: Task, parameters: dict[str, Tensor]) -> Found:
    """Strategy ``"rows"``: one row after the other by ordinary autograd."""
    rows = backward.row_gradients(task.output, list(parameters.values()), task.batch_dim)
    causes = [
        task.plan.causes.get(id(p), "it was not used in a registered module") for p in parameters.values()
    ]
    return {
        p: [] if row is None else [Dense(row, origin=f"one row at a time ({cause})")]
        for p, row, cause in zip(parameters.values(), rows, causes, strict=True)
    }


FROM_USES: dict[str, Callable[[Task, dict[str, Tensor]], Found]] = {"ops": by_ops, "functional": by_calls}


def _name(op: object) -> str:
    return getattr(op, "__name__", repr(op))
