"""Fused attention under ``vmap``: torch has no batching rule for its kernel on the CPU.

The kernel takes batches anyway. So the samples of a ``vmap`` join the batch that a call has already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gramjd.internals import flash_attention, flash_attention_backward, in_forward_mode, unfused_attention

_DTYPES = (torch.float32, torch.float64)
_NAMES = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")  # after the tensors
_KNOWN = frozenset(_NAMES)


class Options(NamedTuple):
    """Of a call without a mask or dropout."""

    is_causal: bool
    scale: float | None


def fused(args: Sequence[Any], kwargs: dict[str, Any]) -> Options | None:
    """The options with which :func:`attention` computes ``scaled_dot_product_attention``, if it does.

    It does for ``[N, heads, T, d]`` without a mask or dropout, where nothing differentiates in forward mode.
    """
    if flash_attention is None or len(args) < 3 or in_forward_mode():
        return None
    options = {**dict(zip(_NAMES, args[3:], strict=False)), **kwargs}
    query, key, value = args[:3]
    plain = (
        not any(value is not None and name not in _KNOWN for name, value in options.items())
        and options.get("attn_mask") is None
        and not options.get("dropout_p")
        and not options.get("enable_gqa")
        and query.ndim == key.ndim == value.ndim == 4
        and query.dtype == key.dtype == value.dtype
        and query.dtype in _DTYPES
        and query.shape[:2] == key.shape[:2]
        and query.shape[3] == key.shape[3]
        and key.shape == value.shape
        and query.numel() > 0 < key.numel()
    )
    return Options(bool(options.get("is_causal")), options.get("scale")) if plain else None


def attention(query: Tensor, key: Tensor, value: Tensor, options: Options) -> Tensor:
    """``softmax(scale · q kᵀ) v`` by the fused kernel."""
    out: Tensor = _Attention.apply(query, key, value, *options)[0]
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None) -> Any:
        assert flash_attention is not None
        return flash_attention(query, key, value, 0.0, is_causal, scale=scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:3], *output)
        ctx.mark_non_differentiable(output[1])
        ctx.options = inputs[3:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> Any:
        return *_Gradients.apply(gradient, *ctx.saved_tensors, *ctx.options), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _folded(_Attention, info.batch_size, in_dims, inputs, 3)


class _Gradients(torch.autograd.Function):
    """Of query, key and value; of these themselves by ordinary ops."""

    @staticmethod
    def forward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor,
                is_causal: bool, scale: float | None) -> Any:  # fmt: skip
        assert flash_attention_backward is not None
        return flash_attention_backward(
            gradient, query, key, value, out, logsumexp, 0.0, is_causal, scale=scale
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.is_causal, ctx.scale = inputs[6:]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        def unfused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with unfused_attention():
                return F.scaled_dot_product_attention(
                    query, key, value, is_causal=ctx.is_causal, scale=ctx.scale
                )

        def gradients(gradient: Tensor, *inputs: Tensor) -> Any:
            return torch.func.vjp(unfused, *inputs)[1](gradient)

        # the output and its normaliser follow from the other arguments
        found = torch.func.vjp(gradients, *ctx.saved_tensors)[1](cotangents)
        return *found, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> Any:
        return _folded(_Gradients, info.batch_size, in_dims, inputs, 6)


def _folded(function: Any, size: int, in_dims: tuple[int | None, ...], inputs: tuple[Any, ...], count: int
            ) -> tuple[Any, Any]:  # fmt: skip
    """Call a function of ``count`` tensors with the dimension of a ``vmap`` as a part of their first one."""
    tensors = [
        (t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)).flatten(0, 1)
        for t, dim in zip(inputs[:count], in_dims[:count], strict=True)
    ]
    found = function.apply(*tensors, *inputs[count:])
    return tuple(t.unflatten(0, (size, -1)) for t in found), tuple(0 for _ in found)
