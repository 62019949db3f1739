"""A walk over the autograd graph of an output: the nodes of uses, parameters, and the structure's key."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from gramjd.engine.recording.nodes import NODE_TYPE
from gramjd.errors import NoGraphError, NotCoveredError
from gramjd.internals import (
    DDP_SINK_TYPE,
    LEAF_TYPE,
    hooks_of,
    is_compiled,
    is_reentrant_checkpoint,
    leaf_of,
    learns_static_graph,
    takes_one_cotangent,
)


@dataclass(frozen=True)
class Graph:
    """The facts that an engine reads from the graph of an output."""

    nodes: list[Any]  # of uses and module calls, in the order of the forward
    leaves: dict[int, Tensor]  # the tensors whose gradients the graph leads to, by id
    structure: Hashable  # equal for graphs of the same nodes over the same leaves, recorded in the same order
    order: list[Any]  # all nodes, in the order of the walk
    numbers: dict[Any, int]  # the place of each in that order
    hooked: bool  # is there a hook on the output, or on a tensor that a recorded op received or came before?
    batched: bool  # can its backward pass take several cotangents at once?
    compiled: list[Any]  # the types of its nodes that run compiled code


_REENTRANT = (
    "The output was computed through a reentrant checkpoint, which hides its parameters from "
    "autograd.grad. Pass use_reentrant=False to torch.utils.checkpoint.checkpoint (for Hugging Face "
    'models, gradient_checkpointing_kwargs={"use_reentrant": False}).'
)


_STATIC = (
    "DistributedDataParallel(static_graph=True) learns its graph from the first backward pass, which must "
    "be an ordinary one. Take the first step without an engine (losses.mean().backward()), or leave "
    "static_graph=True out."
)


_NUMBER = attrgetter("record.number")  # the place in the forward


def walk(output: Tensor) -> Graph:
    """Visit every node that ``output`` was computed by.

    Raises:
        NoGraphError: ``output`` has no graph.
        NotCoveredError: a part of it is hidden in a reentrant checkpoint, or this backward pass is one
            that ``DistributedDataParallel`` learns a static graph from.
    """
    if output.grad_fn is None:
        raise NoGraphError(
            "The output has no autograd graph, so it has no Jacobian. Compute it from the model's "
            "outputs with gradients enabled (not under torch.no_grad(), not detached)."
        )
    numbers: dict[Any, int] = {output.grad_fn: 0}
    order: list[Any] = [output.grad_fn]
    nodes: list[Any] = []
    leaves: dict[int, Tensor] = {}
    structure: list[Hashable] = []
    batched, compiled = True, []
    for node in order:  # grows on the way
        kind: Any = type(node)
        structure.append(kind)
        if kind is NODE_TYPE:
            nodes.append(node)
            structure.append(node.record.signature)
        elif kind is LEAF_TYPE:
            leaf = leaf_of(node)
            leaves[id(leaf)] = leaf
            is_parameter = type(leaf) is not Tensor and isinstance(leaf, torch.nn.Parameter)
            structure.append(id(leaf) if is_parameter else 0)
        elif is_reentrant_checkpoint(kind):
            raise NotCoveredError(_REENTRANT)
        elif is_compiled(kind):
            compiled.append(kind)
        elif kind is DDP_SINK_TYPE and learns_static_graph(node):
            raise NotCoveredError(_STATIC)
        edges: list[tuple[int, int] | None] = []
        for child, number in node.next_functions:
            if child is None:
                edges.append(None)
                continue
            if child not in numbers:
                numbers[child] = len(order)
                order.append(child)
            edges.append((numbers[child], number))
            below: Any = type(child)
            batched = batched and not (number and takes_one_cotangent(below))
        structure.append(tuple(edges))
    nodes.sort(key=_NUMBER)
    recorded = tuple([numbers[node] for node in nodes])
    hooks = [getattr(node.record, "hooks", ()) for node in nodes]
    hooked = bool(hooks_of(output)) or any(hooks)
    key = output.ndim, recorded, tuple(structure)
    return Graph(nodes, leaves, key, order, numbers, hooked, batched, compiled)
