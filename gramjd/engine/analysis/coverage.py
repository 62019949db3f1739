"""Completeness: looks for a path from an output to a parameter without a recorded use.

Autograd's graph has every way in which an output depends on a parameter, also those whose derivative is zero
now: a gate that opens later. A recorded use accounts for the paths through its own op, from the op's output
to the tracked tensors that it received, and for nothing behind the op's other arguments. What was derived
from parameters, and then used by an op that was not recorded, is *open*: its blocks follow from its own
cotangents, if these have samples, or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gramjd.engine.recording.nodes import NODE_TYPE
from gramjd.engine.recording.recorded import CallMark, OpMark
from gramjd.internals import LEAF_TYPE, leaf_of
from gramjd.uses.use import Derived


def uncovered(output: Tensor) -> tuple[set[int], set[Any]]:
    """Ids of the leaves that a path leads to on which no recorded use of that leaf lies; and open nodes."""
    search = _Search()
    search.run([output.grad_fn], set(), set())
    return search.leaves, search.opened


@dataclass
class _Search:
    """A search of a graph, with its findings."""

    leaves: set[int] = field(default_factory=set)  # ids
    opened: set[Any] = field(default_factory=set)  # nodes of derived tensors

    def run(self, start: Iterable[Any], covered: set[int], ends: set[Any]) -> set[Any]:
        """Find what is not covered from some nodes on; the ``ends`` that were reached.

        Args:
            start: nodes to begin at.
            covered: ids of the parameters that a call of a module, whose inside this is, accounts for.
            ends: what computed that call's arguments.
        """
        stack, reached = list[Any](start), set[Any]()
        seen = set(stack)
        self._open(stack)
        while stack:
            node: Any = stack.pop()
            if node in ends:
                reached.add(node)
                continue
            if type(node) is LEAF_TYPE:
                self.leaves |= {id(leaf_of(node))} - covered
                continue
            children = self._behind(node, covered)
            stack += children - seen
            seen |= children
        return reached

    def _open(self, nodes: Iterable[Any]) -> None:
        """Note the derived tensors among what an op received that was not recorded."""
        self.opened |= {node for node in nodes if _is_derived(node)}

    def _behind(self, node: Any, covered: set[int]) -> set[Any]:
        """The nodes behind a node that the walk visits next."""
        if type(node) is not NODE_TYPE:
            children = _children(node)
            self._open(children)
            return children
        mark: OpMark | CallMark = _mark(node)
        if isinstance(mark, CallMark):
            mine = covered | set(map(id, mark.parameters))
            return self.run(_children(node, taps=False), mine, set(mark.arguments))
        behind, leaves = _through(node, set(mark.arguments))
        sources = [slot.source for slot in mark.record.slots]
        self.leaves |= leaves - {id(source) for source in sources if isinstance(source, Tensor)} - covered
        received = {source.record for source in sources if isinstance(source, Derived)}
        self._open(other for other in behind if not (_is_derived(other) and _mark(other).record in received))
        return behind


def _mark(node: Any) -> Any:
    return node.record


def _is_derived(node: Any) -> bool:
    """Whether a node is that of a tensor computed from parameters."""
    return type(node) is NODE_TYPE and isinstance(_mark(node), OpMark) and _mark(node).record.derived


def _through(node: Any, arguments: set[Any]) -> tuple[set[Any], set[int]]:
    """Through the inside of a recorded op: what computed its arguments, and the leaves that it received."""
    stack = list(_children(node, taps=False))
    seen, behind, leaves = set(stack), set[Any](), set[int]()
    while stack:
        inner: Any = stack.pop()
        if inner in arguments or type(inner) is NODE_TYPE:
            behind.add(inner)
        elif type(inner) is LEAF_TYPE:
            leaves.add(id(leaf_of(inner)))
        else:
            children = _children(inner) - seen
            seen |= children
            stack += children
    return behind, leaves


def _children(node: Any, taps: bool = True) -> set[Any]:
    """The nodes that receive gradients of a node; of a recorded use, half of them are its taps."""
    edges = node.next_functions
    return {child for child, _ in (edges if taps else edges[: len(edges) // 2]) if child is not None}
