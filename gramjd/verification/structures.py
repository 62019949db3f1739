"""The structure of a result: how its blocks come about, whatever the values are."""

from __future__ import annotations

from collections.abc import Hashable

from gramjd.functional.arguments import Arguments
from gramjd.functional.capture import Captured
from gramjd.internals import autocasts
from gramjd.rules.registry import version
from gramjd.uses.use import Derived, kind


def structure(given: Arguments, found: Captured) -> Hashable:
    """Equal for calls whose blocks come about in the same way: of the same ops and kinds of arguments."""
    numbers: dict[int, int] = {id(p): n for n, p in enumerate(found.parameters)}
    uses: list[Hashable] = []
    for use in found.uses:
        record = use.record
        numbers[id(record)] = len(numbers)
        uses.append(record.kind)
        for slot in record.slots:
            source = slot.source
            if isinstance(source, Derived):
                uses += [numbers.get(id(source.record)), source.output]
            else:
                uses.append(numbers.get(id(source)))
    return (
        tuple([(p.dtype, p.shape, p.device.type) for p in given.parameters]),
        tuple([kind(leaf) for leaf in given.leaves]),
        str(given.spec),
        tuple([kind(out) for out in found.outputs]),
        tuple([len(mine) for mine in found.blocks]),
        tuple([block.origin for mine in found.blocks for block in mine]),
        tuple(uses),
        tuple(autocasts().items()),
        version(),
    )


def ops_of(found: Captured) -> list[str]:
    """The names of the ops that received parameters, in order."""
    return [use.record.origin for use in found.uses]
