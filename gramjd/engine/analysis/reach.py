"""The leaves behind some tensors, and which of their uses were recorded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gramjd.engine.recording.nodes import NODE_TYPE
from gramjd.engine.recording.recorded import CallMark
from gramjd.internals import LEAF_TYPE, is_compiled, leaf_of, saved_value
from gramjd.uses.use import roots

Edge = tuple[Any, int]  # a node of autograd's graph, and which of its outputs


@dataclass(frozen=True)
class Reach:
    """The part of a graph between some tensors and others at which the walk stopped."""

    leaves: dict[int, Tensor]  # that require gradients, by id
    met: set[int]  # ids of the tensors at which it stopped
    recorded: set[int]  # ids of the leaves that are used in recorded ops or calls alone
    sparse: bool  # does it give sparse gradients?
    compiled: list[Any]  # the types of its nodes that run compiled code


def reach(tensors: Sequence[Tensor], stops: Sequence[Tensor] = ()) -> Reach:
    """Walk from ``tensors`` to their leaves, but not beyond ``stops``."""
    ends = {(t.grad_fn, t.output_nr): id(t) for t in stops if t.grad_fn is not None}
    ids = {id(t) for t in stops if t.grad_fn is None}
    starts = [(t.grad_fn, t.output_nr) for t in tensors if t.grad_fn is not None]
    own = {id(t): t for t in tensors if t.grad_fn is None and t.requires_grad}
    met: set[int] = set()
    nodes = list(_walk(starts, ends, met, through=True))
    leaves = own | _leaves(nodes)
    used = [_used(node) for node in nodes if type(node) is NODE_TYPE]
    outside = own | _leaves(_walk(starts, ends, met, through=False) if used else ())
    met |= ids & leaves.keys()
    kept = {n: t for n, t in leaves.items() if n not in ids}
    recorded = (set().union(*used) & kept.keys()) - outside.keys()
    sparse = any(saved_value(node, "sparse") for node in nodes)
    return Reach(kept, met, recorded, sparse, [kind for kind in map(type, nodes) if is_compiled(kind)])


def _leaves(nodes: Iterable[Any]) -> dict[int, Tensor]:
    """The leaves among some nodes, by id."""
    leaves = [leaf_of(node) for node in nodes if type(node) is LEAF_TYPE]
    return {id(leaf): leaf for leaf in leaves}


def _walk(starts: Sequence[Edge], ends: dict[Edge, int], met: set[int], through: bool) -> Iterator[Any]:
    """Every node once, up to the edges ``ends``, whose numbers go to ``met``; or not ``through`` ours."""
    stack: list[Edge] = list(starts)
    seen: set[Any] = set()
    while stack:
        node, number = stack.pop()
        if (node, number) in ends:
            met.add(ends[node, number])
        elif node not in seen:
            seen.add(node)
            yield node
            edges = node.next_functions
            if type(node) is NODE_TYPE:  # the second half leads to its taps
                edges = edges[: len(edges) // 2] if through else ()
            stack += [edge for edge in edges if edge[0] is not None]


def _used(node: Any) -> set[int]:
    """Ids of the parameters that a node's mark answers for."""
    mark = node.record
    if isinstance(mark, CallMark):
        return {id(p) for p in mark.parameters}
    return set().union(*(roots(slot.source) for slot in mark.record.slots))
