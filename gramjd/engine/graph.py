"""A walk over the autograd graph of an output: the nodes of uses, parameters, and a signature."""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gramjd.engine.nodes import NODE_TYPE
from gramjd.errors import NoGraphError, NotCoveredError


@dataclass(frozen=True)
class Graph:
    """What an output's graph tells."""

    nodes: list[Any]  # of uses and module calls, in the order of the forward
    leaves: dict[int, Tensor]  # the tensors whose gradients the graph leads to, by id
    signature: Hashable  # equal for graphs of the same ops over the same leaves
    outside: set[int]  # ids of leaves that it leads to by a path on which there is no such node
    steady: bool  # does the signature tell where the samples go? Not where data index them
    batched: bool  # can its backward pass take several cotangents at once?


# Numbers that say where an op takes its entries from, and do not follow the size of the batch.
_PLACES = tuple(f"_saved_{name}" for name in ("dim", "dims", "dim0", "dim1", "start", "step", "shifts"))


# With derivatives of its mean and deviation, as a loss of gradients has them, torch's batching rule is wrong.
_UNBATCHED = "NativeGroupNormBackward0"

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


@functools.lru_cache(maxsize=1024)
def _places(kind: type) -> tuple[str, ...]:
    """The attributes of a type of node that belong to the signature."""
    return tuple(name for name in _PLACES if hasattr(kind, name))


@functools.lru_cache(maxsize=1024)
def _indexes_by_data(kind: type) -> bool:
    """Does an op of this type take its entries from where a tensor says (index, gather, sort)?"""
    if kind.__name__.startswith("Select"):  # by a number
        return False
    by_index = hasattr(kind, "_saved_indices") or hasattr(kind, "_saved_index")
    return by_index or kind.__name__.startswith(("MaskedSelect", "MaskedScatter"))


def _reorders(node: Any, kind: type) -> bool:
    """May a node put samples elsewhere on the next call? Looking a leaf table up does not."""
    if not _indexes_by_data(kind):
        return False
    return not (kind.__name__.startswith("Embedding") and hasattr(node.next_functions[0][0], "variable"))


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
    seen: dict[Any, int] = {output.grad_fn: 0}
    stack: list[Any] = [output.grad_fn]
    nodes: list[Any] = []
    leaves: dict[int, Tensor] = {}
    shape: list[Hashable] = []
    steady = batched = True
    while stack:
        node = stack.pop()
        kind: Any = type(node)
        edges: list[Any] = [seen[node], kind]
        if kind is NODE_TYPE:
            nodes.append(node)
            edges.append(node.record.signature)
        elif hasattr(node, "variable"):
            leaves[id(node.variable)] = node.variable
            edges.append(id(node.variable) if isinstance(node.variable, torch.nn.Parameter) else 0)
        elif kind.__name__ == "CheckpointFunctionBackward":
            raise NotCoveredError(_REENTRANT)
        elif kind.__name__ == "_DDPSinkBackward" and node.ddp_weakref().static_graph:
            raise NotCoveredError(_STATIC)
        steady = steady and not _reorders(node, kind)
        edges += [_hashable(getattr(node, name)) for name in _places(kind)]
        for child, number in node.next_functions:
            if child is None:
                continue
            if child not in seen:
                seen[child] = len(seen)
                stack.append(child)
            edges += [seen[child], number]
            batched = batched and not (number and type(child).__name__ == _UNBATCHED)
        shape.append(tuple(edges))
    nodes.sort(key=lambda node: node.record.number)
    return Graph(nodes, leaves, (output.ndim, tuple(shape)), _outside(output), steady, batched)


def _outside(output: Tensor) -> set[int]:
    """Ids of the leaves whose use no node knows of: a later step may weight it more than this one does."""
    stack: list[Any] = [output.grad_fn]
    seen, found = set(stack), set()
    while stack:
        node = stack.pop()
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        elif type(node) is not NODE_TYPE:
            children = {child for child, _ in node.next_functions if child is not None} - seen
            seen |= children
            stack += children
    return found


def _hashable(value: Any) -> Hashable:
    return tuple(value) if isinstance(value, (list, tuple)) else value
