"""Completeness: is there a path from an output to a parameter that no recorded use of it lies on?

Autograd's graph has every way in which an output depends on a parameter, also those whose derivative is zero
now: a gate that opens later. A recorded use accounts for the paths through its own op, from the op's output
to the parameters that it received, and for nothing behind the op's other arguments.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from gramjd.engine.marks import CallMark
from gramjd.engine.nodes import NODE_TYPE


def uncovered(output: Tensor) -> set[int]:
    """Ids of the leaves that a path leads to on which no recorded use of that leaf lies."""
    found: set[int] = set()
    _search([output.grad_fn], set(), set(), found)
    return found


def _search(start: Iterable[Any], covered: set[int], ends: set[Any], found: set[int]) -> set[Any]:
    """Add the leaves that are not covered to what was found; the ``ends`` that were reached.

    Args:
        start: nodes to begin at.
        covered: ids of the parameters that a call of a module, whose inside this is, accounts for.
        ends: what computed that call's arguments.
        found: ids of leaves.
    """
    stack, reached = list[Any](start), set[Any]()
    seen = set(stack)
    while stack:
        node: Any = stack.pop()
        if node in ends:
            reached.add(node)
            continue
        if hasattr(node, "variable"):
            found |= {id(node.variable)} - covered
            continue
        if type(node) is not NODE_TYPE:
            children = _children(node)
        elif isinstance(mark := node.record, CallMark):
            mine = covered | set(map(id, mark.parameters))
            children = _search(_children(node, taps=False), mine, set(mark.arguments), found)
        else:
            children, leaves = _behind(node)
            received = {id(slot.source) for slot in mark.record.slots if isinstance(slot.source, Tensor)}
            found |= leaves - received - covered
        stack += children - seen
        seen |= children
    return reached


def _behind(node: Any) -> tuple[set[Any], set[int]]:
    """Through the inside of a recorded op: what computed its arguments, and the leaves that it received."""
    arguments = set(node.record.arguments)
    stack = list(_children(node, taps=False))
    seen, behind, leaves = set(stack), set[Any](), set[int]()
    while stack:
        inner = stack.pop()
        if inner in arguments or type(inner) is NODE_TYPE:
            behind.add(inner)
        elif hasattr(inner, "variable"):
            leaves.add(id(inner.variable))
        else:
            children = _children(inner) - seen
            seen |= children
            stack += children
    return behind, leaves


def _children(node: Any, taps: bool = True) -> set[Any]:
    """What a node passes gradients to; half of that of a recorded use are its taps."""
    edges = node.next_functions
    return {child for child, _ in (edges if taps else edges[: len(edges) // 2]) if child is not None}
