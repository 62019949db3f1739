"""Convolutions, transposed or not, in one to three dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from gramjd.blocks import Conv, Dense
from gramjd.rules.registry import Op, register_rule
from gramjd.rules.shapes import pad_like, tuple_of

Option = int | Sequence[int]
CONVS = (F.conv1d, F.conv2d, F.conv3d)
TRANSPOSED_CONVS = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@register_rule(*CONVS, wrt="weight", needs=["input"])
def conv_weight(
    c: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Option = 1,
    padding: str | Option = 0,
    dilation: Option = 1,
    groups: int = 1,
) -> Conv:
    n = weight.ndim - 2
    steps, holes = tuple_of(stride, n), tuple_of(dilation, n)
    windows = pad_like(input, padding, weight.shape[2:], holes)
    return Conv(_grouped(c, n, groups), _grouped(windows[None], n, groups), tuple(weight.shape), steps, holes)


@register_rule(*TRANSPOSED_CONVS, wrt="weight", needs=["input"])
def conv_transpose_weight(
    c: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Option = 1,
    padding: Option = 0,
    output_padding: Option = 0,
    groups: int = 1,
    dilation: Option = 1,
) -> Conv:
    n = weight.ndim - 2
    steps, holes = tuple_of(stride, n), tuple_of(dilation, n)
    windows = pad_like(c, padding, weight.shape[2:], holes)  # what the op cut off got no cotangents
    return Conv(
        _grouped(input[None], n, groups), _grouped(windows, n, groups), tuple(weight.shape), steps, holes
    )


def _grouped(x: Tensor, n: int, groups: int) -> Tensor:
    """``[k, B, C, *spatial]`` or ``[k, B, m, C, *spatial]`` → ``[k, B, m, G, C / G, *spatial]``."""
    return x.unflatten(2, (1, groups, -1)) if x.ndim == n + 3 else x.unflatten(3, (groups, -1))


def _channel_sums(c: Tensor, n: int) -> Dense:
    """Rows of a bias: every position of every call adds up."""
    channels = c.ndim - n - 1
    return Dense(c.sum([dim for dim in range(2, c.ndim) if dim != channels]))


def _register_bias(conv: Op, conv_transpose: Op, n: int) -> None:
    """The rules of the biases in ``n`` spatial dimensions."""

    @register_rule(conv, wrt="bias")
    def conv_bias(
        c: Tensor,
        input: Tensor,
        weight: Tensor,
        bias: Tensor,
        stride: Option = 1,
        padding: str | Option = 0,
        dilation: Option = 1,
        groups: int = 1,
    ) -> Dense:
        return _channel_sums(c, n)

    @register_rule(conv_transpose, wrt="bias")
    def conv_transpose_bias(
        c: Tensor,
        input: Tensor,
        weight: Tensor,
        bias: Tensor,
        stride: Option = 1,
        padding: Option = 0,
        output_padding: Option = 0,
        groups: int = 1,
        dilation: Option = 1,
    ) -> Dense:
        return _channel_sums(c, n)


for _n, (_conv, _transposed) in enumerate(zip(CONVS, TRANSPOSED_CONVS, strict=True), start=1):
    _register_bias(_conv, _transposed, _n)
