"""``torch.linalg.solve`` with as many batch dimensions on both sides: ``vmap`` confuses others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gramjd.decompositions.registry import register_decomposition


def solves_vectors(A: Sequence[int], B: Sequence[int]) -> bool:
    """Whether ``torch.linalg.solve`` takes right-hand sides of this shape for vectors."""
    return len(B) == 1 or (len(A) - 1 == len(B) and tuple(B) == tuple(A[:-1]))


@register_decomposition(torch.linalg.solve)
def solve(A: Tensor, B: Tensor, *, left: bool = True) -> Tensor:
    """Solutions ``[..., n]`` or ``[..., n, k]``; a singular matrix is an error."""
    vectors = left and solves_vectors(A.shape, B.shape)
    B = B.unsqueeze(-1) if vectors else B
    batch = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
    A, B = A.expand(*batch, *A.shape[-2:]), B.expand(*batch, *B.shape[-2:])
    out: Tensor = torch.linalg.solve_ex(A, B, left=left, check_errors=True)[0]
    return out.squeeze(-1) if vectors else out
