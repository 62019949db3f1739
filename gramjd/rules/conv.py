"""Convolutions: unfolded, a convolution is a linear map at every output pixel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from gramjd.blocks import Dense, Outer
from gramjd.rules.registry import register_rule
from gramjd.rules.shapes import fold_samples, pad_like, patches, tuple_of

Option = int | Sequence[int]
CONVS = (F.conv1d, F.conv2d, F.conv3d)


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
) -> Outer:
    kernel, n = tuple(weight.shape[2:]), weight.ndim - 2
    steps, holes = tuple_of(stride, n), tuple_of(dilation, n)
    x, samples = fold_samples(input, n + 1)
    windows = patches(pad_like(x, padding, kernel, holes), kernel, steps, holes)  # [N, *out, C, *kernel]
    a = windows.reshape(input.shape[0], -1, groups, weight[0].numel())  # [B, T, G, i]
    K, B, o = c.shape[0], c.shape[1], weight.shape[0] // groups
    c = c.reshape(K, B, samples, groups, o, -1).permute(0, 1, 2, 5, 3, 4).flatten(2, 3)
    return Outer(c, a, tuple(weight.shape))


def _bias_rule(n: int) -> Callable[..., Dense]:
    """The rule of the bias in ``n`` spatial dimensions."""

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
        return Dense(c.movedim(-n - 1, -1).flatten(2, -2).sum(2))

    return conv_bias


for _n, _conv in enumerate(CONVS, start=1):
    register_rule(_conv, wrt="bias")(_bias_rule(_n))
