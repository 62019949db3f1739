"""The structure of a result: how its blocks come about, whatever the values are."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor

from gramjd.functional.arguments import Arguments
from gramjd.functional.capture import Captured
from gramjd.internals import autocasts
from gramjd.rules.registry import op_name, version
from gramjd.uses.use import Derived, Record


def structure(given: Arguments, found: Captured) -> Hashable:
    """Equal for calls whose blocks come about in the same way: of the same ops and kinds of arguments."""
    numbers: dict[int, int] = {id(p): n for n, p in enumerate(found.parameters)}
    uses = []
    for use in found.uses:
        record = use.record
        numbers[id(record)] = len(numbers)
        op = op_name(record.call.op), record.derived
        uses.append((*op, *_slots(record, numbers), *map(kind, record.leaves)))
    return (
        tuple([(p.dtype, p.shape, p.device.type) for p in given.parameters]),
        tuple([kind(leaf) for leaf in given.leaves]),
        str(given.spec),
        tuple([kind(out) for out in found.outputs]),
        tuple([tuple([block.origin for block in mine]) for mine in found.blocks]),
        tuple(uses),
        tuple(autocasts().items()),
        version(),
    )


def _slots(record: Record, numbers: dict[int, int]) -> Iterator[Hashable]:
    for slot, entry in zip(record.slots, record.entries, strict=True):
        source = slot.source
        key = (source.record, source.output) if isinstance(source, Derived) else (source, 0)
        yield slot.index, numbers.get(id(key[0])), key[1], entry is None


def ops_of(found: Captured) -> list[str]:
    """The names of the ops that received parameters, in order."""
    return [op_name(use.record.call.op) for use in found.uses]


def kind(leaf: Any) -> Hashable:
    """The properties of arguments that decide on rules: dtypes, dimensions, sizes of one, flags, integers."""
    if isinstance(leaf, Tensor):
        return leaf.dtype, *[min(size, 2) for size in leaf.shape]
    if isinstance(leaf, slice):
        return leaf.start, leaf.stop, leaf.step
    if leaf is None or isinstance(leaf, (bool, int, str, torch.dtype)):
        return leaf
    return type(leaf).__name__
