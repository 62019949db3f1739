"""Autograd's backward passes: hooks on what is saved, edges, callbacks."""

from __future__ import annotations

import sys
from collections.abc import Callable
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
    return get_edge(tensor), tensor


def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` where no transform is in progress, for tensors that none has wrapped."""
    found: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return found


def saved_tensors_hook() -> object:
    """The innermost ``saved_tensors_hooks`` (checkpointing, offloading); ``None`` if there are none.

    On torch 2.1, which does not show them, that of checkpoints alone: it is the call in progress.
    """
    known: Any = torch._C._autograd
    if hasattr(known, "_top_saved_tensors_default_hooks"):
        top = known._top_saved_tensors_default_hooks(False)
        return None if top is None else top[0]
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name in ("checkpoint", "unpack_hook") and code.co_filename == _CHECKPOINTS:
            return id(frame)
        frame = frame.f_back
    return None


def after_backward(callback: Callable[[], None]) -> None:
    """Call something when the backward pass in progress is over."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def in_backward() -> bool:
    """Whether autograd runs a backward pass in this thread, as when a checkpoint computes again."""
    return bool(torch._C._current_graph_task_id() != -1)
