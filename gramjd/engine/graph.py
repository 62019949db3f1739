"""A walk over the autograd graph of an output: the nodes of uses, parameters, and a signature."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gramjd.engine.nodes import NODE_TYPE
from gramjd.errors import NoGraphError


@dataclass(frozen=True)
class Graph:
    """What an output's graph tells."""

    nodes: list[Any]  # of uses and module calls, in the order of the forward
    leaves: dict[int, Tensor]  # the tensors whose gradients the graph leads to, by id
    signature: Hashable  # equal for graphs of the same ops over the same leaves


def walk(output: Tensor) -> Graph:
    """Visit every node that ``output`` was computed by.

    Raises:
        NoGraphError: ``output`` has no graph.
    """
    if output.grad_fn is None:
        raise NoGraphError(
            "The output has no autograd graph, so it has no Jacobian. Compute it from the model's "
            "outputs with gradients enabled (not under torch.no_grad(), not detached)."
        )
    seen: dict[Any, int] = {output.grad_fn: 0}
    stack: list[Any] = [output.grad_fn]
    nodes: list[Any] = []
    leaves: dict[int, Tensor] = {}
    shape: list[Hashable] = []
    while stack:
        node = stack.pop()
        kind = type(node)
        edges: list[Any] = [seen[node], kind]
        if kind is NODE_TYPE:
            nodes.append(node)
            edges.append(node.record.signature)
        elif hasattr(node, "variable"):
            leaves[id(node.variable)] = node.variable
            edges.append(id(node.variable) if isinstance(node.variable, torch.nn.Parameter) else 0)
        for child, number in node.next_functions:
            if child is None:
                continue
            if child not in seen:
                seen[child] = len(seen)
                stack.append(child)
            edges += [seen[child], number]
        shape.append(tuple(edges))
    nodes.sort(key=lambda node: node.record.number)
    return Graph(nodes, leaves, (output.ndim, tuple(shape)))
