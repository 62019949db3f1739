"""CAGrad: near the mean gradient, the direction that best improves the worst objective."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal, overload

import torch
from torch import Tensor

from gramjd.sketched import SketchedGramian
from gramjd.weighting._averse import Dense, Factored, averse_search
from gramjd.weighting._base import Weighting
from gramjd.weighting._certificate import Certificate, certify
from gramjd.weighting._faces import solve
from gramjd.weighting._gramian import nothing, prepare, rounding
from gramjd.weighting._opaque import is_constant, opaque
from gramjd.weighting._options import not_negative
from gramjd.weighting._semidefinite import semidefinite
from gramjd.weighting._sketched import weigh
from gramjd.weighting._small import averse, easy, finish


# fmt: off
@overload
def cagrad(gramian: Tensor | SketchedGramian, c: float, *, norm_eps: float = ...,
           certificate: Literal[False] = False) -> Tensor: ...
@overload
def cagrad(gramian: Tensor | SketchedGramian, c: float, *, norm_eps: float = ...,
           certificate: Literal[True]) -> tuple[Tensor, Certificate]: ...
# fmt: on


def cagrad(
    gramian: Tensor | SketchedGramian, c: float, *, norm_eps: float = 1e-4, certificate: bool = False
) -> Tensor | tuple[Tensor, Certificate]:
    """Weights of CAGrad, whose step ``d`` maximizes ``min_i g_i'd`` over ``|d - g_0| <= c |g_0|``.

    Liu et al. (2021), "Conflict-Averse Gradient Descent for Multi-task Learning", arXiv 2110.14048,
    Equation 3 and its dual: with the mean gradient ``g_0 = J'u``, the weights are
    ``u + w c |g_0| / |J'w|``, for the ``w`` on the simplex that minimizes
    ``g_0'J'w + c |g_0| |J'w|``.

    Args:
        gramian: ``[*shape, *reversed(shape)]``, or a batch of these along one leading dimension; or a
            :class:`~gramjd.SketchedGramian`.
        c: relative radius of the ball; 0 gives the mean.
        norm_eps: a Gramian whose trace is below it counts as zero; the others are divided by it. If
            ``|J'w|`` is then below it, the gradients are nearly stationary: all weights are zero.
        certificate: also return the duality gap, relative to what its terms would sum to if none
            cancelled, and do not raise if it is large.

    Returns:
        Weights of the objectives' shape and the Gramian's dtype; computed in float64.

    Raises:
        ValueError: not a Gramian (shape, NaN, asymmetry, not positive semi-definite), or a negative
            argument.
        NotConvergedError: the gap is above 1e-9; or the Gramian requires a gradient where no
            derivative exists.
    """
    not_negative("c", c)
    not_negative("norm_eps", norm_eps)
    if isinstance(gramian, SketchedGramian):
        dense = partial(cagrad, c=c, norm_eps=norm_eps, certificate=certificate)
        return weigh(gramian, dense, partial(_of_rows, c=c, norm_eps=norm_eps), certificate)
    small = None if certificate else easy(gramian)
    if small is not None:
        found = averse(small, c, norm_eps)
        if found is not None:
            return finish(found, gramian)
    matrix, restore = prepare(gramian)
    if not matrix.numel():
        return nothing(matrix, restore, certificate)
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    usable = (trace >= norm_eps) & (trace > 0)
    matrix = torch.where(usable, matrix / torch.where(usable, trace, 1), 0)
    matrix = semidefinite(matrix, rounding(gramian.dtype))
    extra, gap = opaque(partial(_search, c=c, norm_eps=norm_eps), matrix)
    evidence = certify(gap, not certificate, "")
    if not is_constant(matrix):
        extra = _as_function(matrix, extra, c)
    moving = (extra.detach().sum(-1, keepdim=True) > 0) | (c == 0)
    result = restore(extra + moving.to(matrix.dtype) / matrix.shape[-1])
    return (result, evidence) if certificate else result


def _of_rows(rows: Tensor, c: float, norm_eps: float) -> tuple[Tensor, Tensor]:
    """Weights ``[m]`` and the gap, from a sketch ``[m, n]``."""
    trace = rows.square().sum()
    smallest = max(norm_eps, torch.finfo(trace.dtype).tiny)
    rows = rows * ((trace >= smallest) / trace.clamp(min=smallest)).sqrt()
    extra, gap = averse_search(Factored(rows), c, norm_eps)
    moving = (extra.sum() > 0) | (c == 0)
    return extra[0] + moving.to(rows.dtype) / len(rows), gap[0]


def _search(matrix: Tensor, c: float, norm_eps: float) -> tuple[Tensor, Tensor]:
    size = matrix.shape[-1]
    extra, gap = averse_search(Dense(matrix.reshape(-1, size, size)), c, norm_eps)
    return extra.reshape(matrix.shape[:-1]), gap.reshape(matrix.shape[:-2])


def _as_function(matrix: Tensor, extra: Tensor, c: float) -> Tensor:
    """The weights as a formula: ``s`` with ``Gs = t - Gu`` on its face and ``|J's| = c |g_0|``."""
    free = (extra > 0).unsqueeze(-2)
    slope = matrix.mean(-1)
    one = torch.ones_like(slope)
    both = solve(matrix, torch.stack([-slope, one], -2), free.expand(*free.shape[:-2], 2, -1))
    offset, ray = both.unbind(-2)
    moved = both @ matrix
    a, b = (moved[..., 1, :] * ray).sum(-1), (moved[..., 1, :] * offset).sum(-1)
    c0 = (moved[..., 0, :] * offset).sum(-1) - c**2 * slope.mean(-1)
    level = (-b + (b * b - a * c0).clamp(min=0).sqrt()) / torch.where(a > 0, a, 1)
    return offset + level.unsqueeze(-1) * ray


class CAGradWeighting(Weighting):
    """:func:`cagrad` as an object.

    Args:
        c: see :func:`cagrad`.
        norm_eps: see :func:`cagrad`.
    """

    _options: ClassVar = {"c": not_negative, "norm_eps": not_negative}

    if TYPE_CHECKING:

        def __call__(self, gramian: Tensor | SketchedGramian, /) -> Tensor: ...

    def __init__(self, c: float, norm_eps: float = 0.0001) -> None:
        super().__init__()
        self.c, self.norm_eps = c, norm_eps

    def forward(self, gramian: Tensor | SketchedGramian, /) -> Tensor:
        """Weights of the objectives, of their shape."""
        return cagrad(gramian, self.c, norm_eps=self.norm_eps)
