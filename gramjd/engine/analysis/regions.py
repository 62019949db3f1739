"""Regions: the nodes that share parameters, whose blocks can be built and contracted by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gramjd.engine.recording.recorded import CallMark
from gramjd.uses.use import roots


def parameter_ids(node: Any) -> set[int]:
    """Ids of the parameters that a node is of."""
    mark = node.record
    if isinstance(mark, CallMark):
        return set(map(id, mark.parameters))
    return set().union(*(roots(slot.source) for slot in mark.record.slots))


@dataclass(frozen=True, eq=False)
class Region:
    """Nodes that share parameters with each other and with no others."""

    nodes: tuple[int, ...]  # indices, in the order of the forward
    parameters: frozenset[int]  # ids of the parameters


def regions_of(nodes: Sequence[Any]) -> list[Region]:
    """The regions of the nodes of a graph."""
    home: dict[int, tuple[list[int], set[int]]] = {}  # of each parameter: nodes and parameters of its region
    for index, node in enumerate(nodes):
        mine = parameter_ids(node)
        joined = {id(home[p]): home[p] for p in mine if p in home}.values()
        region = [index], set(mine)
        for those, parameters in joined:
            region[0].extend(those)
            region[1].update(parameters)
        home.update(dict.fromkeys(region[1], region))
    found = {id(region): region for region in home.values()}.values()
    regions = [Region(tuple(sorted(those)), frozenset(parameters)) for those, parameters in found]
    return sorted(regions, key=lambda region: region.nodes[0])
