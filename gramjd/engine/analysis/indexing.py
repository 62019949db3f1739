"""Advanced indexing, ``x[i, j, ...]``: which entries of ``x`` its result can have, whatever the data are.

An index that counts its dimension up, ``torch.arange(B)``, takes each entry to its own place, as in
``log_probs[torch.arange(B), actions]``. Any other may take any entries of its dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gramjd.internals import saved_value


def sources(node: Any, rank: int) -> tuple[int | None, ...]:
    """For each dimension of ``x``, the dimension of the result that has its entries in their order.

    ``None`` for a dimension of which any entries may be taken. ``rank`` is that of the result.

    Raises:
        RuntimeError: the indices were written in place, or are freed.
    """
    sizes = saved_value(node, "self_sym_sizes")
    by_dimension: list[Tensor | None] = []
    for index in saved_value(node, "indices"):
        by_dimension += [index] if index is None or not _is_mask(index) else [index] * index.ndim
    by_dimension += [None] * (len(sizes) - len(by_dimension))
    indexed = [dim for dim, index in enumerate(by_dimension) if index is not None]
    block = rank - by_dimension.count(None)  # dimensions of the result that the indices make
    together = indexed == list(range(indexed[0], indexed[-1] + 1))
    first = indexed[0] if together else 0  # of these
    found: list[int | None] = []
    whole = 0  # dimensions before this one that are not indexed
    for index, size in zip(by_dimension, sizes, strict=True):
        if index is None:
            found.append(whole if whole < first else whole + block)
            whole += 1
            continue
        axis = _counts_up(index, size)
        place = None if axis is None else first + block - index.ndim + axis
        found.append(None if place in found else place)  # x[i, i] is a diagonal
    return tuple(found)


def before(mask: Tensor, places: Sequence[int | None]) -> Tensor:
    """A mask of the result as one of ``x`` with :func:`sources`, of size 1 where any entry may be taken."""
    others = [dim for dim in range(mask.ndim) if dim not in places]
    if others:
        mask = mask.amax(others)
    kept = [place for place in places if place is not None]
    mask = mask.permute([sorted(kept).index(place) for place in kept])
    for dim, place in enumerate(places):
        if place is None:
            mask = mask.unsqueeze(dim)
    return mask


def _is_mask(index: Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


def _counts_up(index: Tensor, size: int) -> int | None:
    """The dimension of an index along which it counts from 0 to ``size`` - 1; ``None`` if it does not."""
    if size == 1 or index.numel() != size or size not in index.shape or _is_mask(index):
        return None
    counted = torch.arange(size, dtype=index.dtype, device=index.device)
    return index.shape.index(size) if torch.equal(index.flatten(), counted) else None
