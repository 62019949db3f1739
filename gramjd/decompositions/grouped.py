"""``grouped_mm`` as a product for each group, such as the experts of a mixture with their tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from gramjd.decompositions.registry import register_decomposition
from gramjd.internals import grouped_mm_op


def grouped_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Groups of the rows of ``[S, i]``, up to each of ``offs``, by ``[groups, i, o]``; ``bmm`` without them.

    Raises:
        NotImplementedError: the groups are of another operand.
    """
    if mat_b.ndim != 3 or (mat_a.ndim == 3) != (offs is None):
        raise NotImplementedError("grouped_mm is followed for groups of the rows of mat_a alone.")
    if offs is None:
        out = torch.bmm(mat_a, mat_b)
    else:
        ends = offs.tolist()
        groups = zip([0, *ends[:-1]], ends, mat_b.unbind(), strict=True)
        products = [mat_a[start:end] @ weight for start, end, weight in groups if end > start]
        rest = mat_a.new_zeros(len(mat_a) - ends[-1], mat_b.shape[2])  # torch leaves these rows uninitialised
        out = torch.cat([*products, rest])
    out = out if bias is None else out + bias
    return out if out_dtype is None else out.to(out_dtype)


if grouped_mm_op is not None:
    register_decomposition(grouped_mm_op)(grouped_mm)
