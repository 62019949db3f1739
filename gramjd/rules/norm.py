"""Normalisation layers with a scale and a shift."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from gramjd.blocks import Dense
from gramjd.rules.registry import register_rule
from gramjd.rules.shapes import broadcast_rows, sum_to, times


@register_rule(F.layer_norm, wrt="weight", needs=["input"])
def layer_norm_weight(
    c: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Dense:
    return broadcast_rows(c, F.layer_norm(input, normalized_shape, eps=eps), weight)


@register_rule(F.layer_norm, wrt="bias")
def layer_norm_bias(
    c: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None,
    bias: Tensor,
    eps: float = 1e-5,
) -> Dense:
    return Dense(sum_to(c, bias.shape))


if hasattr(F, "rms_norm"):  # not on torch 2.1

    @register_rule(F.rms_norm, wrt="weight", needs=["input"])
    def rms_norm_weight(
        c: Tensor, input: Tensor, normalized_shape: Sequence[int], weight: Tensor, eps: float | None = None
    ) -> Dense:
        return broadcast_rows(c, F.rms_norm(input, normalized_shape, eps=eps), weight)


@register_rule(F.group_norm, wrt="weight", needs=["input"])
def group_norm_weight(
    c: Tensor,
    input: Tensor,
    num_groups: int,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Dense:
    return _per_channel(times(c, _each(input, lambda x: F.group_norm(x, num_groups, eps=eps))))


@register_rule(F.group_norm, wrt="bias")
def group_norm_bias(
    c: Tensor, input: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor, eps: float = 1e-5
) -> Dense:
    return _per_channel(c)


def _only_input(arguments: Mapping[Any, Any], name: str, dim: int) -> int | None:
    """Running statistics belong to no sample."""
    return dim if name == "input" else None


@register_rule(F.instance_norm, wrt="weight", needs=["input", "running_mean", "running_var"],
               align=_only_input)  # fmt: skip
def instance_norm_weight(
    c: Tensor,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Dense:
    if use_input_stats or running_mean is None or running_var is None:
        return _per_channel(times(c, _each(input, lambda x: F.instance_norm(x, eps=eps))))
    return _per_channel(times(c, _standardized(input, running_mean, running_var, eps)))


@register_rule(F.instance_norm, wrt="bias", align=_only_input)
def instance_norm_bias(
    c: Tensor,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Dense:
    return _per_channel(c)


def _in_evaluation(arguments: Mapping[Any, Any]) -> bool:
    """Whether the op runs in evaluation mode; in training mode, the statistics are of all samples."""
    return not arguments.get("training", False)


@register_rule(F.batch_norm, wrt="weight", needs=["input", "running_mean", "running_var"],
               align=_only_input, when=_in_evaluation)  # fmt: skip
def batch_norm_weight(
    c: Tensor,
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Dense:
    return _per_channel(times(c, _standardized(input, running_mean, running_var, eps)))


@register_rule(F.batch_norm, wrt="bias", when=_in_evaluation)
def batch_norm_bias(
    c: Tensor,
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Dense:
    return _per_channel(c)


def _each(x: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
    """``norm`` of ``x [B, n, C, ...]``, which takes one batch dimension."""
    return norm(x.flatten(0, 1)).reshape(x.shape)


def _standardized(x: Tensor, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    """``x [B, n, C, ...]`` by statistics ``[B, C]``."""
    per_channel = (x.shape[0], 1, -1, *[1] * (x.ndim - 3))
    return (x - mean.reshape(per_channel)) * (variance + eps).rsqrt().reshape(per_channel)


def _per_channel(c: Tensor) -> Dense:
    """``[K, B, n, C, ...]`` summed to rows ``[K, B, C]``."""
    return Dense(c.sum((2, *range(4, c.ndim))))
