"""Blocks of recorded uses by prepared ops, where the same uses with the same layouts come again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gramjd import prepared
from gramjd.blocks import Block, Structure, flatten, unflatten
from gramjd.engine.analysis.layouts import Layout
from gramjd.engine.recording.nodes import values_of
from gramjd.engine.recording.recorded import OpMark
from gramjd.engine.solving.part import Part

if TYPE_CHECKING:
    from gramjd.engine.solving.strategies import Candidate, Material

Build = Callable[["Material", Mapping[str, Tensor]], "Candidate"]


class _Incomplete(Exception):
    """Raised if a parameter gets no blocks: the reason is for an ordinary call to find."""


def blocks_of_region(build: Build, material: Material, parameters: Mapping[str, Tensor]
                     ) -> dict[str, list[Block]] | None:  # fmt: skip
    """The blocks that ``build`` returns for parameters; ``None`` where it has to be called."""
    part = material.part
    key = None if part is None or not material.program.complete else _key(part, material.layouts, parameters)
    if part is None or key is None:
        return None
    try:
        given: list[Sequence[Tensor | None]] = [*part.cotangents, *map(values_of, part.nodes)]
    except RuntimeError:  # written in place
        return None
    sizes = [*map(len, given)]
    tensors = [*chain.from_iterable(given)]

    def blocks(tensors: Sequence[Any]) -> tuple[list[Tensor], Structure]:
        rest = iter(tensors)
        own = [[*islice(rest, size)] for size in sizes]
        nodes = len(part.nodes)
        mine = replace(part, cotangents=own[:nodes], values=own[nodes:])
        found = build(replace(material, part=mine), parameters)
        if found.causes or len(found.blocks) < len(parameters):
            raise _Incomplete
        return flatten([found.blocks[name] for name in parameters], origins=True)

    try:
        found, structure = prepared.call(blocks, (key, *sizes), tensors)
    except _Incomplete:
        return None
    return dict(zip(parameters, unflatten(structure, found), strict=True))


def _key(part: Part, layouts: Sequence[Sequence[Layout | None]], parameters: Mapping[str, Tensor]
         ) -> Hashable | None:  # fmt: skip
    """All that the ops of a region's blocks depend on, besides tensors; ``None`` where that has no key."""
    problem = part.problem
    if part.precisions or problem.lockstep is not None:
        return None
    places = {id(p): n for n, p in enumerate(parameters.values())}
    key: list[Hashable] = [problem.samples, problem.batch_dim is None]
    for layout in chain.from_iterable(layouts):
        if type(layout) is not Layout:
            return None
        key += [layout.dim, layout.sample_major]
    for node in part.nodes:
        mark = node.record
        if type(mark) is not OpMark or mark.lost or mark.replay is not None or not mark.record.plain:
            return None
        record = mark.record
        if record.key is None:
            return None
        key += [record.key, mark.live, *[places.get(id(slot.source)) for slot in record.slots]]
    return tuple(key)
