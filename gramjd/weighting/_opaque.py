"""Run a solver where autograd and ``torch.func`` cannot look inside, but can pass through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from gramjd.internals import is_watched, stops_functions


class _Opaque(torch.autograd.Function):
    """Constant for autograd; under ``vmap`` the function gets one more leading dimension."""

    @staticmethod
    def forward(function: Callable[..., Any], *tensors: Tensor) -> Any:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*([output] if isinstance(output, Tensor) else output))

    @staticmethod
    def vmap(info: Any, in_dims: Any, function: Callable[..., Any], *tensors: Tensor) -> Any:
        output = _Opaque.apply(function, *batched(info, in_dims[1:], *tensors))
        return output, 0 if isinstance(output, Tensor) else (0,) * len(output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return (None,) * len(ctx.needs_input_grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return None


def opaque(function: Callable[..., Any], *tensors: Tensor) -> Any:
    """``function(*tensors)``, not differentiated, on actual values even under ``torch.vmap``.

    ``function`` takes tensors with any number of leading batch dimensions, the same for all, and
    returns one or a tuple of them. It may branch on values and raise.
    """
    if not transforming():  # the ordinary case, without the 50 microseconds of a Function
        return function(*(unpack_dual(tensor.detach()).primal for tensor in tensors))
    return _Opaque.apply(function, *(tensor.detach() for tensor in tensors))


def transforming() -> bool:
    """Whether a ``torch.func`` transform is running; ``autograd.Function`` asks in the same way."""
    return stops_functions()


def watched() -> bool:
    """Whether a mode sees every operation, to trace it for instance: nothing may go past it."""
    return bool(is_watched())


def is_constant(*tensors: Tensor) -> bool:
    """Whether nothing can be differentiated with respect to these tensors, nor is mapped."""
    if transforming() or (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return False
    return all(unpack_dual(tensor).tangent is None for tensor in tensors)


def batched(info: Any, in_dims: Any, *tensors: Tensor) -> list[Tensor]:
    """The arguments of a ``vmap`` rule, all with the mapped dimension first."""
    return [
        tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, in_dims, strict=True)
    ]
