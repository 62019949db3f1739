"""A preconditioner for faces of a Hessian that is a diagonal plus nearly a matrix of low rank.

Gramians as they occur have a few large eigenvalues and many below the ridge that regularizes them.
With ``H = S + K``, ``S`` the ridge, pivoted Cholesky gives ``K ≈ LL'``, and the Woodbury identity
solves ``(S + LL') x = b`` on every row's own face by a small system each. Conjugate gradients then
take a handful of iterations where they took hundreds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SHARE, MOST = 8, 64  # the rank is at most the size over this, and this: more costs more than it saves
FLAT = 2.0  # columns that bring the largest entry left by no more than this factor are dropped
NEGLIGIBLE = 0.05  # of the ridge: what need not be in the low-rank part
WORTHWHILE = 0.1  # a low-rank part that leaves more than this of the largest entry is of no use


@dataclass
class LowRank:
    """``S + LL'``, as the diagonal ``root = S^(1/2)`` and ``factor = S^(-1/2) L [m, k]``, in float32."""

    root: Tensor
    factor: Tensor

    def on_faces(self, free: Tensor) -> OnFaces:
        """Factorize ``I + L' S⁻¹ L`` of every face ``free [R, m]``."""
        size, rank = self.factor.shape
        pairs = (self.factor.unsqueeze(2) * self.factor.unsqueeze(1)).reshape(size, rank * rank)
        inner = (free.to(pairs.dtype) @ pairs).reshape(-1, rank, rank)
        inner.diagonal(dim1=-2, dim2=-1).add_(1)
        return OnFaces(self, torch.linalg.cholesky_ex(inner)[0])


@dataclass
class OnFaces:
    """The preconditioner of some rows, each on its face."""

    whole: LowRank
    cholesky: Tensor

    def __call__(self, residual: Tensor) -> Tensor:
        """``(S + LL')⁻¹ r`` for ``r [R, m]``, which is zero off the face; to be masked there."""
        unit = residual / self.whole.root
        inner = torch.cholesky_solve((unit @ self.whole.factor).unsqueeze(-1), self.cholesky)
        return torch.addmm(unit, inner.squeeze(-1), self.whole.factor.mT, alpha=-1) / self.whole.root


def low_rank(hessian: Tensor, ridge: Tensor | None) -> LowRank | None:
    """A preconditioner of ``H [m, m]``, which contains the diagonal ``ridge [m]``; ``None`` if none pays."""
    if ridge is None or not bool((ridge > 0).all()):
        return None
    root = ridge.sqrt()
    matrix = hessian / root / root.unsqueeze(-1)
    matrix.diagonal().sub_(1)
    left = matrix.diagonal().clone()  # of the diagonal, as the factor grows by its largest entry
    most = min(len(hessian) // SHARE, MOST)
    factor, largest = matrix.new_zeros(len(hessian), most), []
    for rank in range(most + 1):
        value, pivot = left.max(0)
        largest.append(float(value))
        if rank == most or largest[-1] <= NEGLIGIBLE:
            break
        column = matrix[pivot] - factor[:, :rank] @ factor[pivot, :rank]
        factor[:, rank] = column * value.rsqrt()
        left = torch.addcmul(left, factor[:, rank], factor[:, rank], value=-1).clamp_(min=0)
    rank = next(k for k, value in enumerate(largest) if value <= max(FLAT * largest[-1], NEGLIGIBLE))
    useful = rank > 0 and largest[rank] <= WORTHWHILE * largest[0]
    return LowRank(root.to(torch.float32), factor[:, :rank].to(torch.float32)) if useful else None
