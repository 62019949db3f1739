"""Autograd's backward passes: hooks on what is saved, edges, callbacks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

_CHECKPOINTS = torch.utils.checkpoint.__file__


def edge_behind(tensor: Tensor) -> tuple[Any, Tensor]:
    """The edge that ``torch.autograd.grad`` takes for the tensor as it is now, and the tensor to go on with.

    Later writes into the latter do not change what the former means.
    """
    get_edge = getattr(torch.autograd.graph, "get_gradient_edge", None)
    if get_edge is None:  # torch 2.1
        return tensor, tensor.clone()
    node: Any = tensor.grad_fn
    if node is None or isinstance(node, torch._C._FunctionBase):  # which do not keep their graph alive
        return get_edge(tensor), tensor
    return torch.autograd.graph.GradientEdge(node, tensor.output_nr), tensor


def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` where no transform is in progress, for tensors that none has wrapped."""
    found: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return found


def _checkpoint_in_progress() -> object:
    """The call of a checkpoint that is in progress, all that torch 2.1 shows of hooks on what is saved."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name in ("checkpoint", "unpack_hook") and code.co_filename == _CHECKPOINTS:
            return id(frame)
        frame = frame.f_back
    return None


_TOP_HOOKS: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)

# The innermost ``saved_tensors_hooks`` (checkpointing, offloading); ``None`` if there are none. Asked often.
saved_tensors_hook: Callable[[], object] = (
    _checkpoint_in_progress if _TOP_HOOKS is None else partial(_TOP_HOOKS, False)
)


def after_backward(callback: Callable[[], None]) -> None:
    """Call something when the backward pass in progress is over."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def in_backward() -> bool:
    """Whether autograd runs a backward pass in this thread, as when a checkpoint computes again."""
    return bool(torch._C._current_graph_task_id() != -1)
