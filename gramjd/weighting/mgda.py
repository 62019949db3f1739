"""MGDA: the convex combination of the gradients that has the smallest norm."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal, overload

import torch
from torch import Tensor

from gramjd.sketched import SketchedGramian
from gramjd.weighting._base import Weighting
from gramjd.weighting._certificate import Certificate, certify
from gramjd.weighting._faces import on_face
from gramjd.weighting._gramian import nothing, prepare, rounding
from gramjd.weighting._hull import hull_gap, nearest
from gramjd.weighting._min_norm import min_norm, shifted_program, simplex_gap
from gramjd.weighting._opaque import opaque
from gramjd.weighting._options import unused
from gramjd.weighting._semidefinite import semidefinite
from gramjd.weighting._sketched import weigh


@overload
def mgda(gramian: Tensor | SketchedGramian, *, certificate: Literal[False] = False) -> Tensor: ...
@overload
def mgda(gramian: Tensor | SketchedGramian, *, certificate: Literal[True]) -> tuple[Tensor, Certificate]: ...


def mgda(
    gramian: Tensor | SketchedGramian, *, certificate: bool = False
) -> Tensor | tuple[Tensor, Certificate]:
    """Weights of MGDA: the ``w`` that minimizes ``w'Gw`` on the probability simplex.

    Désidéri (2012), "Multiple-gradient descent algorithm (MGDA) for multiobjective optimization",
    Equation 6. Solved exactly, by pivoting. Where several ``w`` are optimal, their weighted
    gradient is the same, and the choice among them is deterministic.

    Args:
        gramian: ``[*shape, *reversed(shape)]``, or a batch of these along one leading dimension; or a
            :class:`~gramjd.SketchedGramian`.
        certificate: also return the duality gap ``w'Gw - min_i (Gw)_i``, relative to the square of
            ``sum_i w_i |g_i|``, and do not raise if it is large.

    Returns:
        Weights of the objectives' shape and the Gramian's dtype; computed in float64. They are
        differentiable where the gradients on the support are linearly independent.

    Raises:
        ValueError: not a Gramian (shape, NaN, asymmetry, not positive semi-definite).
        NotConvergedError: the gap is above 1e-9; or, in the backward pass, no derivative exists.
    """
    if isinstance(gramian, SketchedGramian):
        return weigh(gramian, partial(mgda, certificate=certificate), _of_rows, certificate)
    matrix, restore = prepare(gramian)
    if not matrix.numel():
        return nothing(matrix, restore, certificate)
    matrix = semidefinite(matrix / _mean_diagonal(matrix), rounding(gramian.dtype))
    found = opaque(_solve, matrix)
    evidence = certify(simplex_gap(matrix.detach(), found), not certificate, "")
    hessian, linear, scale = shifted_program(matrix)
    x = (found / scale.detach()).unsqueeze(-2)  # solves the program up to a factor, found here
    curvature = (x @ hessian.detach() * x).sum(-1, keepdim=True)
    x = x * -(linear.detach().unsqueeze(-2) * x).sum(-1, keepdim=True) / curvature
    weights = scale * on_face(hessian, -linear.unsqueeze(-2), x > 0, x).squeeze(-2)
    result = restore(weights / weights.sum(-1, keepdim=True))
    return (result, evidence) if certificate else result


def _of_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Weights ``[m]`` and the gap, from a sketch ``[m, n]``."""
    mean = rows.square().sum(-1).mean()
    rows = rows / torch.where(mean > 0, mean, 1).sqrt()
    weights = nearest(rows)
    return weights, hull_gap(rows, weights)


def _mean_diagonal(matrix: Tensor) -> Tensor:
    """The mean of the diagonal, to divide by against overflow; one for a zero Gramian."""
    mean = matrix.detach().diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return torch.where(mean > 0, mean, 1)


def _solve(matrix: Tensor) -> Tensor:
    size = matrix.shape[-1]
    return min_norm(matrix.reshape(-1, size, size)).reshape(matrix.shape[:-1])


class MGDAWeighting(Weighting):
    """:func:`mgda` as an object.

    Args:
        epsilon: TorchJD's. The solution is exact: anything but the default is refused.
        max_iters: likewise.
    """

    _options: ClassVar = {"epsilon": unused(0.001), "max_iters": unused(100)}

    if TYPE_CHECKING:

        def __call__(self, gramian: Tensor | SketchedGramian, /) -> Tensor: ...

    def __init__(self, epsilon: float = 0.001, max_iters: int = 100) -> None:
        super().__init__()
        self.epsilon, self.max_iters = epsilon, max_iters

    def forward(self, gramian: Tensor | SketchedGramian, /) -> Tensor:
        """Weights of the objectives, of their shape."""
        return mgda(gramian)
