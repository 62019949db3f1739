"""``embedding_bag`` as lookups that are weighted and added up."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gramjd.decompositions.registry import register_decomposition
from gramjd.internals import inside_transform


@register_decomposition(F.embedding_bag)
def embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Bags of equal length ``[bags, n]``, or ``[n]`` cut at ``offsets``, as ``torch`` documents them."""
    if max_norm is not None:
        raise NotImplementedError("embedding_bag with max_norm writes into its weight while it runs.")
    if scale_grad_by_freq:
        raise NotImplementedError("embedding_bag with scale_grad_by_freq counts the ids of all samples.")
    if offsets is not None:
        place, inside = _padded(offsets, len(input), include_last_offset)
        input = input[place]
        per_sample_weights = None if per_sample_weights is None else per_sample_weights[place]
    else:
        inside = torch.ones_like(input, dtype=torch.bool)
    if padding_idx is not None:
        inside = inside & (input != padding_idx % weight.shape[0])
    found = F.embedding(input, weight)
    if mode == "max":
        lowest = found.masked_fill(~inside.unsqueeze(-1), -torch.inf).max(1)[0]
        return torch.where(inside.any(1, keepdim=True), lowest, 0)
    if per_sample_weights is not None:
        found = found * per_sample_weights.unsqueeze(-1)
    total = torch.where(inside.unsqueeze(-1), found, 0).sum(1)
    return total / inside.sum(1, keepdim=True).clamp(min=1) if mode == "mean" else total


def _padded(offsets: Tensor, total: int, include_last: bool) -> tuple[Tensor, Tensor]:
    """The places of each bag's entries, ``[bags, longest]``, and which of them exist."""
    end = offsets.new_full((1,), total)
    ends = offsets[1:] if include_last else torch.cat([offsets[1:], end])
    starts = offsets[: len(ends)]
    sizes: Any = ends - starts
    longest = total if inside_transform() else int(sizes.max()) if len(sizes) else 0
    steps = torch.arange(longest, device=offsets.device)
    inside = steps < sizes[:, None]
    return torch.where(inside, starts[:, None] + steps, 0), inside
