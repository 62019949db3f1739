"""Blocks of recorded uses by prepared ops, where the same uses with the same layouts come again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, count, islice
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gramjd import prepared
from gramjd.contraction.accumulator import Sink
from gramjd.engine.analysis.layouts import Layout
from gramjd.engine.recording.nodes import values_of
from gramjd.engine.recording.recorded import OpMark
from gramjd.engine.solving.part import Part

if TYPE_CHECKING:
    from gramjd.engine.solving.strategies import Candidate, Material

_SOURCE = attrgetter("source")
Build = Callable[["Material", Mapping[str, Tensor]], "Candidate"]


class _Incomplete(Exception):
    """Raised if a parameter gets no blocks: the reason is for an ordinary call to find."""


def give_blocks(build: Build, material: Material, parameters: Mapping[str, Tensor], sink: Sink) -> bool:
    """Give a sink the blocks that ``build`` returns for parameters, if the same may be asked for again.

    What the sink reduces them to is prepared together with them. Otherwise ``build`` has to be called.
    """
    part = material.part
    assert part is not None
    key = _key(part, material.layouts, parameters)
    if key is None:
        return False
    try:
        given: list[Sequence[Tensor | None]] = [*part.cotangents, *map(values_of, part.nodes)]
    except RuntimeError:  # written in place
        return False
    sizes = [*map(len, given)]
    tensors = [*chain.from_iterable(given)]

    def reduced(tensors: Sequence[Any]) -> tuple[Sequence[Tensor], Any]:
        rest = iter(tensors)
        own = [[*islice(rest, size)] for size in sizes]
        nodes = len(part.nodes)
        mine = replace(part, cotangents=own[:nodes], values=own[nodes:])
        found = build(replace(material, part=mine), parameters)
        if found.causes or len(found.blocks) < len(parameters):
            raise _Incomplete
        return sink.reduce({name: found.blocks[name] for name in parameters})

    try:
        full = (key, sink.key, *sizes, *(parameters if sink.by_name else ()))
        found = prepared.call(reduced, full, tensors)
    except _Incomplete:
        return False
    sink.take([*parameters], *found)
    return True


def _key(part: Part, layouts: Sequence[Sequence[Layout | None]], parameters: Mapping[str, Tensor]
         ) -> Hashable | None:  # fmt: skip
    """All that the ops of a region's blocks depend on, besides tensors; ``None`` where that has no key."""
    problem = part.problem
    if part.precisions or problem.lockstep is not None:
        return None
    places = dict(zip(map(id, parameters.values()), count()))
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
        key += [record.key, mark.live, *map(places.get, map(id, map(_SOURCE, record.slots)))]
    return tuple(key)
