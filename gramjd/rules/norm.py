"""Normalisation layers with a scale and a shift."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from gramjd.blocks import Dense
from gramjd.rules.registry import register_rule
from gramjd.rules.shapes import broadcast_rows, sum_to


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
