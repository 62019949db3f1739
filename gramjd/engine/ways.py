"""From the nodes of a graph to blocks: three exact ways, and the checks between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gramjd.assembly import blocks_of
from gramjd.blocks import Block, Dense
from gramjd.engine import backward
from gramjd.engine.calls import call_blocks
from gramjd.engine.layouts import ZERO, Layout, canonical
from gramjd.engine.marks import CallMark, OpMark
from gramjd.engine.nodes import Cotangents, forget, values_of
from gramjd.engine.probe import Pass, Passes, Probe, agrees, find_layouts, is_noise
from gramjd.engine.regions import Later, Stream, regions_of
from gramjd.engine.replay import Replayed, replay
from gramjd.engine.sharded import needs_weights
from gramjd.engine.task import Task, is_fused
from gramjd.errors import CheckFailedError, NotFiniteError, NotSeparableError
from gramjd.rules.registry import any_entry
from gramjd.uses import Derived, Record, Source, Use, names_of_leaves, roots

WAYS = ("ops", "functional", "rows")
OVERFLOWED = (
    "The {} of the output has NaN or infinite entries: something overflowed in the backward pass, or it "
    "divides by zero. Under a GradScaler that happens in ordinary training: skip the step and lower the "
    "scale, scaler.update(scaler.get_scale() / 2)."
)

Found = dict[Tensor, list[Block]]  # of each parameter; those not covered are missing
Emit = Callable[[Found], None]


def solve(task: Task, ways: Sequence[str], check: bool, emit: Emit) -> None:
    """Give ``emit`` the blocks of every parameter, obtained in the first of ``ways`` that is exact for it.

    Those of a region as soon as the backward pass has been through it, where that is possible. Measures
    and checks what the task's plan does not know yet, and writes it there.

    Raises:
        NotFiniteError: gradients have NaN or infinite entries.
        NotSeparableError: the samples are mixed.
        CheckFailedError: no way is left for a parameter.
    """
    plan, nodes, lockstep = task.plan, task.graph.nodes, task.lockstep
    if not task.samples and lockstep is None:
        return
    plan.regions = plan.regions or regions_of(nodes)
    opaque = [isinstance(node.record, CallMark) for node in nodes]
    checking = check and (any(opaque) or not plan.checked)  # replays run the user's code anew
    probing = checking or (task.batch_dim is not None and len(plan.layouts) < len(plan.regions))
    passes = Passes(task, checking)
    done: set[int] = set()  # ids of parameters
    lasting = [True] * len(plan.regions)

    def solve_region(number: int, cotangents: list[Cotangents]) -> None:
        part = task.of_region(number, cotangents)
        probe = Probe(passes, plan.regions[number].nodes)
        try:
            _expand(part, probe)
            lasting[number] = find_layouts(part, probe)
            found = _first_exact(part, probe, ways, checking)
        except Later:
            plan.late.add(number)  # also the next time: the order of the sum decides on its rounding
            raise
        task.met.update(part.layouts_met())
        done.update(map(id, found))
        emit(found)
        forget([nodes[i] for i in probe.nodes])
        passes.forget(probe.nodes)

    early = {n for n, region in enumerate(plan.regions) if n not in plan.late
             and not any(opaque[i] or is_fused(nodes[i]) for i in region.nodes)}  # fmt: skip
    weighted = [node for node in nodes if lockstep is not None and needs_weights(node)]
    if lockstep is not None:  # whatever the data are, all ranks run the same backward passes
        ways = [way for way in ways if way != "rows"]
        early = set()
        lockstep.agree(probing, lockstep.units_of(weighted), None)
        if lockstep.passes:
            passes.run_all()
    elif probing:
        _refuse_overflow(passes.first)  # or what is measured now would be wrong, and remembered
    stream = Stream(nodes, plan.regions, early, solve_region)
    passes.busy = True
    backward.stream(task.output, nodes, backward.basis(task.output, task.batch_dim), stream)
    passes.busy = False
    with nullcontext() if lockstep is None else lockstep.gather(weighted):
        if not task.samples:
            return
        if lockstep is not None and probing:
            _refuse_overflow(passes.first)
        stream.finish()
    left = {name: p for name, p in task.parameters.items() if id(p) not in done}
    if left:
        emit(_row_by_row(task, left, ways))
    plan.checked = plan.checked or (checking and all(lasting) and passes.conclusive)


def _row_by_row(task: Task, left: dict[str, Tensor], ways: Sequence[str]) -> Found:
    """Blocks of the parameters that are left, if they may go this way."""
    if "rows" in ways:
        _refuse_mixed(task, left, ways)
        found = _rows(task, left)
        task.plan.ways.update(dict.fromkeys(map(id, left.values()), "rows"))
        return found
    name, p = next(iter(left.items()))
    cause = task.plan.causes.get(id(p), "no registered module call used it")
    remedy = "Allow more ways (the default of Engine tries all), or freeze the parameter."
    if task.lockstep is not None:
        remedy = (
            "Under fully_shard there is no way row by row, whose backward passes ranks would not run in "
            "step: leave the module unsharded (DistributedDataParallel), or freeze the parameter."
        )
    raise CheckFailedError(
        f"The Gramian of {name!r} could not be computed by {' or '.join(ways)}: {cause}. {remedy}"
    )


def _first_exact(task: Task, probe: Probe, ways: Sequence[str], checking: bool) -> Found:
    """Blocks of a region's parameters by the ops or by replays of calls, where these are exact."""
    plan, found, outside = task.plan, Found(), task.graph.outside
    plan.causes.update(dict.fromkeys(outside, "it was used outside of the calls of registered modules"))
    for way in ways:
        left = {n: p for n, p in task.parameters.items() if p not in found and id(p) not in outside}
        planned = {n: p for n, p in left.items()
                   if WAYS.index(plan.ways.get(id(p), way)) <= WAYS.index(way)}  # fmt: skip
        if way == "rows" or not planned:
            continue
        candidates = _WAYS[way](task, planned)
        for name, p in planned.items():
            blocks = candidates.get(p)
            if blocks is None:
                continue
            if checking and not agrees(probe, name, blocks):
                plan.causes[id(p)] = "its uses that were seen do not add up to autograd's gradient"
                continue
            found[p] = blocks
            plan.ways[id(p)] = way
    return found


def _refuse_overflow(weighted: Pass) -> None:
    """Raise where a pass met NaN or infinity."""
    if not weighted.is_finite:
        raise NotFiniteError(OVERFLOWED.format("gradient"))


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
            except (ValueError, RuntimeError) as error:  # a slower way is left
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


def _refuse_mixed(task: Task, planned: dict[str, Tensor], ways: Sequence[str]) -> None:
    """Rows are exact whatever ``batch_dim`` is; but a wrong one is an error, not a slow path."""
    layouts, plan = task.met, task.plan
    plan.mixed.update(root for root, sizes in plan.flattened.items() if sizes & plan.sizes)
    mixed = [name for name, p in planned.items() if id(p) in plan.mixed]
    if task.samples == 1 or len(ways) == 1 or not (mixed or (None in layouts and layouts <= {None, ZERO})):
        return
    shape, dim = list(task.output.shape), task.batch_dim
    if not mixed or layouts <= {None, ZERO}:
        found = f"Nothing in the graph of the output, of shape {shape}, treats"
    else:
        cause = task.plan.causes.get(id(planned[mixed[0]]), "samples are mixed")
        found = f"For {mixed[0]!r} {cause}: the graph of the output, of shape {shape}, does not treat"
    raise NotSeparableError(
        f"{found} the {task.samples} entries of dimension {dim} as independent samples. Either batch_dim "
        "is not the batch dimension, or the loss or a layer mixes samples (a mean over the batch, batch "
        "normalisation in training mode), or an input of that size has no batch dimension (give it one of "
        "size 1: [1, ...]). Correct it, or use Engine(..., batch_dim=None), which is "
        "exact for any computation."
    )


def _ops(task: Task, parameters: dict[str, Tensor]) -> Found:
    """Way 1: the uses that the forward recorded."""
    failed: set[int] = set()

    def fail(source: Source, cause: object) -> None:
        failed.update(roots(source))
        for root in roots(source):
            task.plan.causes.setdefault(root, str(cause))

    uses: list[Use] = []
    split: dict[Record, Layout] = {}  # of derived tensors that have samples
    resolved: set[Source] = set()  # derived tensors whose cotangents contain all that their uses send
    for index, node in enumerate(task.graph.nodes):
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
    record, saved = mark.record, values_of(node)
    slots = saved[len(record.saved) :]
    slots = [t if t.untyped_storage().size() else _hollow(t) for t in slots]  # no sharded weights
    live = iter(task.canonical(index))
    cs = [next(live) if is_live else None for is_live in mark.live]
    layouts = [layout for layout in task.layouts[index] if layout is not ZERO]
    if not layouts:
        return None
    layout = layouts[0]
    if layout is None or len(set(layouts)) > 1:
        if record.derived:  # no sample's own: its rows come from where the tensor meets the batch
            return Use.of(record, saved[: len(record.saved)], [None] * len(cs), slots)
        for slot in record.slots:
            mixed = roots(slot.source) & task.plan.mixed
            what = "samples are mixed at its use by {}" if mixed else "its use by {} is of no one sample"
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
        if at is not None:
            own[slot.index] = at.split(tensor, at.dim, task.samples)
    return Use.of(record, found, cs, slots, own)


def _hollow(tensor: Tensor) -> Tensor:
    """Its shape and dtype, without values: an error for whoever asks for these."""
    return torch.empty_like(tensor, device="meta")


def _where(record: Record, saved: Sequence[Tensor], output: Sequence[int], dim: int) -> list[int | None]:
    """The dimensions of a call's saved arguments and slots that meet dimension ``dim`` of its output."""
    entry = next((entry for entry in record.entries if entry is not None), None) or any_entry(record.call.op)
    if entry is None:  # as of most ops: the last dimensions meet
        dims = [dim - len(output) + t.ndim for t in saved]
        return [dim if dim >= 0 else None for dim in dims]
    leaves = list(record.leaves)
    tensors = [*record.saved, *(slot.index for slot in record.slots)]
    for index, tensor in zip(tensors, saved, strict=True):
        leaves[index] = tensor.shape
    names = names_of_leaves(record.call)
    arguments = {name: leaf for name, leaf in zip(names, leaves, strict=True) if name is not None}
    arguments["output"] = output
    return [entry.meets(arguments, str(names[i]), dim) for i in tensors]


def _functional(task: Task, parameters: dict[str, Tensor]) -> Found:
    """Way 2: module calls whose inside was not seen, as pure functions under ``vmap(vjp)``."""
    found: dict[int, list[Block]] = {}
    failed: set[int] = set()
    for index, node in enumerate(task.graph.nodes):
        mark = node.record
        if not isinstance(mark, CallMark):
            continue
        used = [i for i, c in enumerate(task.cotangents[index]) if c is not None]
        layouts = {task.layouts[index][i] for i in used}
        owners = [id(p) for p in mark.parameters]
        cs = task.canonical(index)
        try:
            layout = layouts.pop() if len(layouts) == 1 else None
            if layout is None:
                raise ValueError("its outputs do not belong to one sample each")
            layout = None if task.batch_dim is None else layout
            blocks = call_blocks(mark, values_of(node), cs, layout, task.samples)
        except Exception as error:  # whatever the user's module does under vmap: a slower way is left
            failed.update(owners)
            for owner in owners:
                task.plan.causes.setdefault(owner, f"{type(mark.module).__name__}: {error}")
            continue
        for owner, mine in zip(owners, blocks, strict=True):
            found.setdefault(owner, []).extend(mine)
    covered = found.keys() - failed
    return {p: found[id(p)] for p in parameters.values() if id(p) in covered}


def _rows(task: Task, parameters: dict[str, Tensor]) -> Found:
    """Way 3: one row after the other by ordinary autograd."""
    rows = backward.row_gradients(task.output, list(parameters.values()), task.batch_dim)
    causes = [
        task.plan.causes.get(id(p), "it was not used in a registered module") for p in parameters.values()
    ]
    return {
        p: [] if row is None else [Dense(row, origin=f"one row at a time ({cause})")]
        for p, row, cause in zip(parameters.values(), rows, causes, strict=True)
    }


_WAYS: dict[str, Callable[[Task, dict[str, Tensor]], Found]] = {"ops": _ops, "functional": _functional}


def _name(op: object) -> str:
    return getattr(op, "__name__", repr(op))
