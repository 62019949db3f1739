"""The exact strategies from the graph of an output to blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

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
    for index, node in enumerate(task.graph.nodes):
        if isinstance(node.record, CallMark):  # what it holds was used by what no op shows
            failed.update(map(id, node.record.parameters))
        if isinstance(node.record, OpMark):
            if node.record.lost:
                for source in {slot.source for slot in node.record.record.slots} - resolved:
                    fail(source, f"{_name(node.record.record.call.op)} {node.record.lost}")
                continue
            use = _use(task, index, split, fail)
            if use is None:
                continue
            uses.append(use)
            if use.record.derived:
                resolved.update(Derived(use.record, i) for i, c in enumerate(use.cs) if c is not None)
            if use.record.derived and use.cs[0] is not None and task.batch_dim is not None:
                mine = task.layouts[index]
                split[use.record] = next(layout for layout in mine if layout not in (None, ZERO))
    blocks = blocks_of(uses, list(parameters.values()), fail)
    marks = [node.record for node in task.graph.nodes if isinstance(node.record, OpMark)]
    seen = {root for mark in marks for slot in mark.record.slots for root in roots(slot.source)}
    return {
        p: mine
        for p, mine in zip(parameters.values(), blocks, strict=True)
        if id(p) in seen and id(p) not in failed
    }


def _use(task: Task, index: int, split: Mapping[Record, Layout], fail: Callable[[Source, object], None]
         ) -> Use | None:  # fmt: skip
    """The use of a node in canonical layout; None, and ``fail`` called, where it has none."""
    node, mark = task.graph.nodes[index], task.graph.nodes[index].record
    if mark.replay is not None and any(c is not None for c in task.cotangents[index]):
        for slot in mark.record.slots:
            fail(slot.source, "its fused op could not be replayed")
        return None
    record = mark.record
    try:
        saved = values_of(node)
    except RuntimeError:
        for slot in record.slots:
            fail(slot.source, f"what {_name(record.call.op)} used it with was written in place afterwards")
        return None
    slots = saved[len(record.saved) :]
    if any(t.layout is not torch.strided for t in saved):
        for slot in record.slots:
            fail(slot.source, f"its use by {_name(record.call.op)} is with a sparse tensor")
        return None
    slots = [t if t.untyped_storage().size() else _hollow(t) for t in slots]  # no sharded weights
    live = iter(task.canonical(index))
    cs = [next(live) if is_live else None for is_live in mark.live]
    layouts = [layout for layout in task.layouts[index] if layout is not ZERO]
    if not layouts:
        return None
    layout = layouts[0]
    if layout is None or len(set(layouts)) > 1:
        if record.derived and task.is_open(index):
            for slot in record.slots:
                fail(slot.source, f"an op that was not recorded used the result of {_name(record.call.op)}")
            return None
        if record.derived:  # no sample's own: its rows come from where the tensor meets the batch
            return Use.of(record, saved[: len(record.saved)], [None] * len(cs), slots)
        for slot in record.slots:
            mixed = roots(slot.source) & task.plan.mixed
            what = (
                "there is cross-sample dependence at its use by {}"
                if mixed
                else "its use by {} is of no one sample"
            )
            fail(slot.source, what.format(_name(record.call.op)))
        return None
    values = saved[: len(record.saved)]
    if task.batch_dim is None:
        return Use.of(record, [t.unsqueeze(0) for t in values], cs, slots)
    output = next(c for c in task.cotangents[index] if c is not None).shape[1:]
    where = _where(record, saved, output, layout.dim)
    try:
        found = [canonical(t, at, layout, output[layout.dim], task.samples)
                 for t, at in zip(values, where, strict=False)]  # fmt: skip
    except ValueError as error:
        for slot in record.slots:
            fail(slot.source, error)
        return None
    own: dict[int, Tensor] = {}  # slots that have samples
    for slot, tensor in zip(record.slots, slots, strict=True):
        at = split.get(slot.source.record) if isinstance(slot.source, Derived) else None
        if at is None:
            continue
        if at.dim >= tensor.ndim or tensor.shape[at.dim] % task.samples:  # written in place since
            fail(slot.source, f"its use by {_name(record.call.op)} has samples elsewhere than its argument")
            return None
        own[slot.index] = at.split(tensor, at.dim, task.samples)
    return Use.of(record, found, cs, slots, own)


def _hollow(tensor: Tensor) -> Tensor:
    """Its shape and dtype, without values: an error for whoever asks for these."""
    return torch.empty_like(tensor, device="meta")


def _where(record: Record, saved: Sequence[Tensor], output: Sequence[int], dim: int) -> list[int | None]:
    """The dimensions of a call's saved arguments and slots that meet dimension ``dim`` of its output."""
    entry = next((entry for entry in record.entries if entry is not None), None) or any_entry(record.call.op)
    # as of most ops: the last dimensions meet
    last = [at if at >= 0 else None for at in (dim - len(output) + t.ndim for t in saved)]
    if entry is None:
        return last
    leaves = list(record.leaves)
    tensors = [*record.saved, *(slot.index for slot in record.slots)]
    for index, tensor in zip(tensors, saved, strict=True):
        leaves[index] = tensor.shape
    names = names_of_leaves(record.call)
    arguments = {name: leaf for name, leaf in zip(names, leaves, strict=True) if name is not None}
    arguments["output"] = output
    named = [(names[i], at) for i, at in zip(tensors, last, strict=True)]
    return [at if name is None else entry.meets(arguments, str(name), dim) for name, at in named]


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
    """Is a backward pass for each loss the strategy: few of them, no samples, and memory for all rows?"""
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
