"""Questions about the function transforms in progress, which torch answers only in private."""

from __future__ import annotations

from torch import Tensor
from torch._C import _functorch


def inside_transform() -> bool:
    """Is a transform of ``torch.func`` in progress?"""
    return _functorch.peek_interpreter_stack() is not None


def depends_on_innermost_transform(tensor: Tensor) -> bool:
    """Inside ``grad`` or ``vjp``: was ``tensor`` computed from what is being differentiated?"""
    level = _functorch.peek_interpreter_stack().level()
    return _functorch.maybe_get_level(tensor) == level and tensor.requires_grad
