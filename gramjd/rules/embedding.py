"""Looking rows of a table up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from gramjd.blocks import Lookup
from gramjd.rules.registry import register_rule


def _plain(arguments: Mapping[Any, Any]) -> bool:
    """Frequencies in the batch, by which ``scale_grad_by_freq`` scales, mix the samples."""
    return not arguments.get("scale_grad_by_freq")


@register_rule(F.embedding, wrt="weight", needs=["input"], when=_plain)
def embedding_weight(
    c: Tensor,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Lookup:
    ids = input.flatten(1)
    c = c.reshape(*c.shape[:2], ids.shape[1], c.shape[-1])
    if padding_idx is not None:  # the padding row gets no gradient
        c = c * (ids != padding_idx % weight.shape[0])[None, :, :, None]
    return Lookup(c, ids, tuple(weight.shape))
