"""Questions that torch answers only in private; nothing else of ours touches its internals."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _functorch


def inside_transform() -> bool:
    """Is a transform of ``torch.func`` in progress?"""
    return _functorch.peek_interpreter_stack() is not None


def depends_on_innermost_transform(tensor: Tensor) -> bool:
    """Inside ``grad`` or ``vjp``: was ``tensor`` computed from what is being differentiated?"""
    level = _functorch.peek_interpreter_stack().level()
    return _functorch.maybe_get_level(tensor) == level and tensor.requires_grad


def is_compiling() -> bool:
    """Is ``torch.compile`` tracing this very code?"""
    known = getattr(torch.compiler, "is_compiling", None) or torch._utils.is_compiling
    return bool(known())


def innermost_mode() -> object:
    """The ``TorchFunctionMode`` on top of the stack."""
    return torch.overrides._get_current_function_mode()


def saved_tensors_are_hooked() -> bool:
    """Is a ``saved_tensors_hooks`` context active (checkpointing, offloading)? Unknown on torch 2.1."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(False) is not None
