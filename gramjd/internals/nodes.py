"""The nodes of autograd's graphs: their types, their names, what they show of what they saved."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.nn.parallel.distributed import _DDPSink

# The type of the nodes at which gradients are added up: there is one for each leaf of a graph.
LEAF_TYPE: Any = torch._C._functions.AccumulateGrad  # type: ignore[attr-defined]

# The leaf of such a node.
leaf_of: Callable[[Any], Tensor] = attrgetter("variable")

# The name of a type of node, and of a node's.
name_of_type: Callable[[Any], str] = attrgetter("__name__")
name_of: Callable[[Any], str] = attrgetter("__class__.__name__")


def node_type(function: type[torch.autograd.Function]) -> Any:
    """The type of the nodes of an ``autograd.Function``."""
    return function._backward_cls


# Copies of the class, as other libraries have them, go by the same name.
_CHECKPOINT = name_of_type(node_type(torch.utils.checkpoint.CheckpointFunction))

# Each call of ``torch.compile`` makes a class of that name.
_COMPILED = "CompiledFunctionBackward"

# The type of those of ``DistributedDataParallel`` between a model and its loss.
DDP_SINK_TYPE: Any = node_type(_DDPSink)
# With derivatives of its mean and deviation, as a loss of gradients has them, torch's batching rule is wrong.
_GROUP_NORM = "NativeGroupNormBackward0"


@functools.lru_cache(maxsize=1024)
def is_compiled(kind: Any) -> bool:
    """Whether nodes of this type run compiled code; each that is compiled has a type of its own."""
    return name_of_type(kind) == _COMPILED


@functools.lru_cache(maxsize=1024)
def is_reentrant_checkpoint(kind: Any) -> bool:
    """Whether nodes of this type are reentrant checkpoints, which hide the graph behind them."""
    return name_of_type(kind) == _CHECKPOINT


def learns_static_graph(node: Any) -> bool:
    """Whether the model of a ``DDP_SINK_TYPE`` node learns its graph from the first backward pass."""
    return bool(node.ddp_weakref().static_graph)


@functools.lru_cache(maxsize=1024)
def takes_one_cotangent(kind: Any) -> bool:
    """Whether torch's batching rule is wrong for cotangents of all outputs but the first."""
    return name_of_type(kind) == _GROUP_NORM


def saved_value(node: Any, name: str) -> Any:
    """The value that a node saved under a name; ``None`` if there is none.

    Raises:
        RuntimeError: it was freed.
    """
    return getattr(node, f"_saved_{name}", None)


def saved_numbers(kind: type) -> dict[str, str]:
    """The attributes of a type of node that show saved values other than tensors, by name."""
    shown = [name for name in dir(kind) if name.startswith("_saved_")]
    return {name.removeprefix("_saved_"): name for name in shown if not hasattr(kind, f"_raw{name}")}


def is_torchs_own(kind: type) -> bool:
    """Whether a type of node belongs to an ``autograd.Function`` that torch itself defines."""
    function: Any = getattr(kind, "_forward_cls", None)
    return function is not None and function.__module__.partition(".")[0] == "torch"


def shapes_of(nodes: Iterable[Any]) -> list[list[tuple[int, ...]]] | None:
    """The shapes of what autograd nodes are the gradient functions of; ``None`` where torch cannot say."""
    found: list[list[tuple[int, ...]]] = []
    try:
        for node in nodes:  # every step comes by here for all of them: no call that can be spared
            metadata = node._input_metadata
            if len(metadata) == 1:
                found.append([tuple(metadata[0].shape)])
            else:
                found.append([tuple(output.shape) for output in metadata])
    except (AttributeError, RuntimeError):  # torch 2.1 has no metadata; shapes of nested tensors have symbols
        return None
    return found


def losses_of_stack(output: Tensor) -> list[Any] | None:
    """The edge of each loss of an output that ``torch.stack`` made; ``None`` for other outputs.

    For outputs that are no such stack, and on torch 2.1, no list.
    """
    node: Any = output.grad_fn
    if output.ndim != 1 or name_of(node) != "StackBackward0":
        return None
    make = getattr(torch.autograd.graph, "GradientEdge", None)
    if make is None:
        return None
    edges = [child and make(child, number) for child, number in node.next_functions]
    dtypes = {edge.node._input_metadata[edge.output_nr].dtype for edge in edges if edge is not None}
    return edges if dtypes == {output.dtype} else None


def dtypes_of(nodes: Iterable[Any]) -> set[torch.dtype]:
    """The dtypes of what autograd nodes are the gradient functions of; on torch 2.1, that of no node."""
    return {output.dtype for node in nodes for output in getattr(node, "_input_metadata", ())}
