"""Looking rows of a table up: an embedding, or a parameter indexed by integers."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gramjd.blocks import Dense, Lookup
from gramjd.rules.registry import register_rule


def _plain(arguments: Mapping[Any, Any]) -> bool:
    """Frequencies in the batch, by which ``scale_grad_by_freq`` scales, depend on all samples."""
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
) -> Lookup | Dense:
    if not weight.numel():
        return Dense(c.new_zeros(*c.shape[:2], *weight.shape))
    ids = input.reshape(len(input), -1)  # a sample may have one id, without a dimension
    c = c.reshape(*c.shape[:2], ids.shape[1], c.shape[-1])
    if padding_idx is not None:  # the padding row gets no gradient
        c = c * (ids != padding_idx % weight.shape[0])[None, :, :, None]
    return Lookup(c, ids, tuple(weight.shape))


def _by_integers(arguments: Mapping[Any, Any]) -> bool:
    """One tensor of integers: no mask, slice or several indices."""
    index = arguments["index"]
    return isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)


def _of_rows(arguments: Mapping[Any, Any]) -> bool:
    return arguments["input"].ndim > 0 and arguments["dim"] % arguments["input"].ndim == 0


@register_rule(Tensor.__getitem__, wrt="input", needs=["index"], when=_by_integers)
def indexed_input(c: Tensor, input: Tensor, index: Tensor) -> Lookup | Dense:
    return _looked_up(c, input, index)


@register_rule(torch.index_select, Tensor.index_select, wrt="input", needs=["index"], when=_of_rows)
def selected_input(c: Tensor, input: Tensor, dim: int, index: Tensor) -> Lookup | Dense:
    return _looked_up(c, input, index)


def _looked_up(c: Tensor, table: Tensor, index: Tensor) -> Lookup | Dense:
    """The block of a table whose entries along the first dimension were taken, by ``index [B, ...]``."""
    ids = index.reshape(len(index), -1) % len(table)  # a negative one counts from the end
    found = Lookup(c.reshape(*c.shape[:2], ids.shape[1], prod(table.shape[1:])), ids, tuple(table.shape))
    return found if ids.shape[1] <= len(table) else Dense(found.dense())
