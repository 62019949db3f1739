"""The structure of a result: how its blocks come about, whatever the values are."""

from __future__ import annotations

from collections.abc import Hashable

from gramjd.functional.arguments import Arguments
from gramjd.functional.capture import Captured
from gramjd.internals import autocasts
from gramjd.rules.registry import op_name, version
from gramjd.uses.use import Derived, kind


def structure(given: Arguments, found: Captured) -> Hashable:
    """Equal for calls whose blocks come about in the same way: of the same ops and kinds of arguments."""
    numbers: dict[int, int] = {id(p): n for n, p in enumerate(found.parameters)}
    uses = []
    for use in found.uses:
        record = use.record
        numbers[id(record)] = len(numbers)
        sources = [
            (numbers.get(id(slot.source.record)), slot.source.output)
            if isinstance(slot.source, Derived)
            else numbers.get(id(slot.source))
            for slot in record.slots
        ]
        uses.append((record.kind, *sources))
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


def ops_of(found: Captured) -> list[str]:
    """The names of the ops that received parameters, in order."""
    return [op_name(use.record.call.op) for use in found.uses]
