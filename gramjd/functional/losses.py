"""Losses by fewer ops than ``vmap`` takes them apart into."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """``F.cross_entropy``; with class indices and no reduction, by a gather.

    ``vmap`` compares and masks the indices twice, and again in the backward pass.
    """
    dim = min(1, input.ndim - 1)
    classes = input.ndim > 0 and target.shape == input.shape[:dim] + input.shape[dim + 1 :]
    reduced = size_average is not None or reduce is not None or reduction != "none"
    if not classes or target.dtype != torch.int64 or reduced or weight is not None or label_smoothing:
        return F.cross_entropy(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    ignored = target == ignore_index
    places = target.masked_fill(ignored, 0).unsqueeze(dim)
    found = torch.log_softmax(input, dim).gather(dim, places).squeeze(dim)
    return found.neg().masked_fill(ignored, 0)
