"""Uses in canonical layout, samples first, from the nodes that recorded them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gramjd.engine.analysis.layouts import ZERO, Layout, canonical
from gramjd.engine.recording.nodes import Cotangents, values_of
from gramjd.engine.recording.recorded import OpMark
from gramjd.engine.solving.part import Part
from gramjd.engine.solving.program import Layouts
from gramjd.rules.registry import Align, alignment, meets, weights_of
from gramjd.uses.use import Derived, Record, Use, names_of_leaves, roots


class Unusable(Exception):
    """Raised with the reason why the record of a use does not determine its blocks."""


def use_of(part: Part, index: int, layouts: Layouts, split: Mapping[Record, Layout],
           opened: frozenset[int], mixed: frozenset[int]) -> Use | None:  # fmt: skip
    """The use of a node; None where no cotangents come to it.

    Args:
        part: of which region.
        index: of the node.
        layouts: of its outputs.
        split: of derived tensors that have samples.
        opened: nodes of the graph whose derived tensors an op used that was not recorded.
        mixed: ids of parameters whose uses have cross-sample dependence.

    Raises:
        Unusable: it has none.
    """
    mark: OpMark = part.nodes[index].record
    record, problem = mark.record, part.problem
    if mark.lost:
        raise Unusable(mark.lost)
    if mark.replay is not None and any(c is not None for c in part.cotangents[index]):
        raise Unusable("its fused op could not be replayed")
    values, slots = _saved(part, index)
    cs = _of_all_outputs(mark, part.canonical(index, layouts))
    found = [layout for layout in layouts if layout is not ZERO]
    if not found:
        return None
    layout = found[0]
    if layout is None or (len(found) > 1 and len(set(found)) > 1):
        if record.derived and not part.is_among(index, opened):
            # no sample's own: its rows come from where the tensor meets the batch
            return Use.of(record, values, [None] * len(cs), slots)
        raise Unusable(no_layout(record, mixed))
    if problem.batch_dim is None:
        return Use.of(record, [t.unsqueeze(0) for t in values], cs, slots)
    own = _with_samples(record, slots, split, problem.samples) if split else {}
    return Use.of(record, _by_sample(part, index, layout, values, slots), cs, slots, own)


def _of_all_outputs(mark: OpMark, cs: Cotangents) -> Cotangents:
    """Cotangents of all outputs from those of the outputs that require gradients."""
    if False not in mark.live:
        return cs
    live = iter(cs)
    return [next(live) if is_live else None for is_live in mark.live]


def _by_sample(part: Part, index: int, layout: Layout, values: Sequence[Tensor], slots: Sequence[Tensor]
               ) -> list[Tensor]:  # fmt: skip
    """The values that a node saved for rules, samples first."""
    if not values:
        return []
    record: Record = part.nodes[index].record.record
    first = next(c for c in part.cotangents[index] if c is not None)
    output, samples = first.shape[1:], part.problem.samples
    try:
        dims = _dims(record, values, slots, output, layout.dim)
        return [
            canonical(t, dim, layout, output[layout.dim], samples)
            for t, dim in zip(values, dims, strict=True)
        ]
    except ValueError as error:
        raise Unusable(error) from error


def _saved(part: Part, index: int) -> tuple[list[Tensor], list[Tensor]]:
    """The values that a node saved for rules, and the tensors of its slots."""
    node = part.nodes[index]
    record: Record = node.record.record
    try:
        saved = [*part.values[index]] if part.values else values_of(node)
    except RuntimeError as error:
        what = f"what {record.origin} used it with was written in place afterwards"
        raise Unusable(what) from error
    for t in saved:
        if t.layout is not torch.strided:
            raise Unusable(f"its use by {record.origin} is with a sparse tensor")
    count = len(record.saved)
    values, slots = saved[:count], saved[count:]
    if part.problem.lockstep is not None:  # the memory of sharded weights is freed between the passes
        slots = [t if t.untyped_storage().size() else _hollow(t) for t in slots]
    return values, slots


def no_layout(record: Record, mixed: frozenset[int]) -> str:
    """The reason why the output of an op has no layout of samples."""
    name = record.origin
    if record.derived:
        return f"an op that was not recorded used the result of {name}"
    if any(roots(slot.source) & mixed for slot in record.slots):
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
            raise Unusable(f"its use by {record.origin} has samples elsewhere than its argument")
        own[slot.index] = at.split(tensor, at.dim, samples)
    return own


def _hollow(tensor: Tensor) -> Tensor:
    """A tensor of the same shape and dtype without values; to read them is an error."""
    return torch.empty_like(tensor, device="meta")


def _dims(record: Record, values: Sequence[Tensor], slots: Sequence[Tensor], output: Sequence[int],
          dim: int) -> list[int | None]:  # fmt: skip
    """The dimensions of a call's saved arguments that meet dimension ``dim`` of its output."""
    # as of most ops: the last dimensions meet
    last = [at if (at := dim - len(output) + t.ndim) >= 0 else None for t in values]
    align = _alignment(record)
    if align is None:
        return last
    names = record.call.names if record.spec is None else names_of_leaves(record.call)
    arguments = {**_arguments(record, names, values, slots), "output": output}
    weights = weights_of(record.call.op)
    found: list[int | None] = []
    for index, place in zip(record.saved, last, strict=True):
        name = names[index]
        if name in weights:  # not even a frozen one has samples
            found.append(None)
        else:
            found.append(place if name is None else meets(align, arguments, str(name), dim))
    return found


def _arguments(record: Record, names: Sequence[str | int | None], values: Sequence[Tensor],
               slots: Sequence[Tensor]) -> dict[Any, Any]:  # fmt: skip
    """The arguments of a call by name, shapes in place of tensors."""
    arguments: dict[Any, Any] = dict(zip(record.call.names, record.call.values, strict=True))
    for index, value in zip(record.saved, values, strict=True):
        arguments[names[index]] = value.shape
    for slot, tensor in zip(record.slots, slots, strict=True):
        arguments[slot.name] = tensor.shape
    return arguments


def _alignment(record: Record) -> Align | None:
    """How dimensions meet, by the rule of a slot, or else by what is known of the op."""
    known = (entry.align for entry in record.entries if entry is not None)
    return next(known, alignment(record.call.op))
