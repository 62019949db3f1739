"""CAGrad: near the mean gradient, the direction that best improves the worst objective."""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal, overload

import torch
from torch import Tensor

from gramjd.weighting._base import Weighting
from gramjd.weighting._certificate import Certificate, certify
from gramjd.weighting._faces import solve
from gramjd.weighting._gramian import nothing, prepare, rounding
from gramjd.weighting._min_norm import min_norm
from gramjd.weighting._opaque import is_constant, opaque
from gramjd.weighting._options import not_negative
from gramjd.weighting._semidefinite import semidefinite
from gramjd.weighting._small import averse, easy, finish


# fmt: off
@overload
def cagrad(gramian: Tensor, c: float, *, norm_eps: float = ...,
           certificate: Literal[False] = False) -> Tensor: ...
@overload
def cagrad(gramian: Tensor, c: float, *, norm_eps: float = ...,
           certificate: Literal[True]) -> tuple[Tensor, Certificate]: ...
# fmt: on


def cagrad(
    gramian: Tensor, c: float, *, norm_eps: float = 1e-4, certificate: bool = False
) -> Tensor | tuple[Tensor, Certificate]:
    """Weights of CAGrad, whose step ``d`` maximizes ``min_i g_i'd`` over ``|d - g_0| <= c |g_0|``.

    Liu et al. (2021), "Conflict-Averse Gradient Descent for Multi-task Learning", arXiv 2110.14048,
    Equation 3 and its dual: with the mean gradient ``g_0 = J'u``, the weights are
    ``u + w c |g_0| / |J'w|``, for the ``w`` on the simplex that minimizes
    ``g_0'J'w + c |g_0| |J'w|``.

    Args:
        gramian: ``[*shape, *reversed(shape)]``, or a batch of these along one leading dimension.
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
    search = partial(_search, c=c, norm_eps=norm_eps)
    extra, gap = opaque(search, matrix)
    evidence = certify(gap, not certificate, "")
    if not is_constant(matrix):
        extra = _as_function(matrix, extra, c)
    moving = (extra.detach().sum(-1, keepdim=True) > 0) | (c == 0)
    result = restore(extra + moving.to(matrix.dtype) / matrix.shape[-1])
    return (result, evidence) if certificate else result


def _search(matrix: Tensor, c: float, norm_eps: float) -> tuple[Tensor, Tensor]:
    """``w c |g_0| / |J'w|``, or zeros near stationarity, and the relative duality gap.

    ``w`` is ``w(r)``, which minimizes ``|J'w + r g_0|``, for the ``r > 0`` where
    ``|J'w(r)| = c |g_0| r``: the ratio of both sides decreases, and ``w(r)`` is piecewise
    linear, so chords of it find the root.
    """
    size = matrix.shape[-1]
    gramian = matrix.reshape(-1, size, size)
    slope = gramian.mean(-1)  # g_0'g_i
    radius = c * slope.mean(-1, keepdim=True).clamp(min=0).sqrt()
    safe = torch.where(radius > 0, radius, 1)
    longest = gramian.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True).sqrt()
    low, high = max(norm_eps, 1e-10) / safe, (longest / safe).clamp(min=norm_eps) * 1.01
    at_low, at_high = (_nearest(gramian, slope, r, None) for r in (low, high))
    stationary = (_norm(gramian, at_low) <= (1 + 1e-9) * radius * low) | (radius == 0)
    best, smallest = at_low, torch.full_like(low, torch.inf)
    for step in range(100):
        ratio = _crossing(gramian, at_low, at_high, radius * low, radius * high)
        ratio = ratio if step % 3 < 2 else torch.full_like(ratio, 0.5)
        middle = low + ratio * (high - low)
        at_middle = _nearest(gramian, slope, middle, at_low + at_high > 0)
        norm = _norm(gramian, at_middle)
        above, error = norm >= radius * middle, (norm - radius * middle).abs()
        best = torch.where(error < smallest, at_middle, best)
        smallest = torch.minimum(error, smallest)
        low, at_low = torch.where(above, middle, low), torch.where(above, at_middle, at_low)
        high, at_high = torch.where(above, high, middle), torch.where(above, at_high, at_middle)
        found = smallest <= 1e-14 * longest + 1e-13 * norm
        if bool((found | stationary | (high - low <= 1e-15 * high)).all()):
            break
    return _finish(gramian, slope, radius, best, stationary, matrix.shape)


def _finish(
    gramian: Tensor, slope: Tensor, radius: Tensor, w: Tensor, stationary: Tensor, shape: torch.Size
) -> tuple[Tensor, Tensor]:
    norm = _norm(gramian, w)
    safe = torch.where(norm > 0, norm, 1)
    derivative = slope + radius / safe * (gramian @ w.unsqueeze(-1)).squeeze(-1)
    gap = (w * derivative).sum(-1) - derivative.amin(-1)
    lengths = gramian.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    mean_norm = slope.mean(-1).clamp(min=0).sqrt()
    size = (w * lengths).sum(-1) * (mean_norm + radius.squeeze(-1))
    gap = torch.where(stationary.squeeze(-1), 0, gap / torch.where(size > 0, size, 1))
    extra = torch.where(stationary, 0, w * (radius / safe))
    return extra.reshape(shape[:-1]), gap.reshape(shape[:-2])


def _nearest(gramian: Tensor, slope: Tensor, r: Tensor, guess: Tensor | None) -> Tensor:
    """``w`` on the simplex that minimizes ``|J'w + r g_0|``: the hull of the ``g_i + r g_0``."""
    shift = r * slope
    shifted = gramian + shift.unsqueeze(-1) + shift.unsqueeze(-2)
    return min_norm(shifted + (r**2 * slope.mean(-1, keepdim=True)).unsqueeze(-1), guess)


def _norm(gramian: Tensor, w: Tensor) -> Tensor:
    return (w * (gramian @ w.unsqueeze(-1)).squeeze(-1)).sum(-1, keepdim=True).clamp(min=0).sqrt()


def _crossing(gramian: Tensor, first: Tensor, last: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """The ``x`` in (0, 1) with ``|J'(first + x (last - first))| = start + x (end - start)``."""
    delta = last - first
    image = (gramian @ torch.stack([first, delta], -1)).unbind(-1)
    a = (delta * image[1]).sum(-1, keepdim=True) - (end - start) ** 2
    b = (delta * image[0]).sum(-1, keepdim=True) - start * (end - start)
    c = (first * image[0]).sum(-1, keepdim=True) - start**2
    q = -(b + torch.where(b < 0, -1, 1) * (b * b - a * c).clamp(min=0).sqrt())
    roots = torch.stack([q / a, c / q]).nan_to_num(nan=-1.0)
    valid = (roots > 0) & (roots < 1)
    return torch.where(valid[0], roots[0], torch.where(valid[1], roots[1], 0.5))


def _as_function(matrix: Tensor, extra: Tensor, c: float) -> Tensor:
    """The same by formula: ``s`` with ``Gs = t - Gu`` on its face and ``|J's| = c |g_0|``."""
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

    def __init__(self, c: float, norm_eps: float = 0.0001) -> None:
        super().__init__()
        self.c, self.norm_eps = c, norm_eps

    def forward(self, gramian: Tensor, /) -> Tensor:
        """Weights of the objectives, of their shape."""
        return cagrad(gramian, self.c, norm_eps=self.norm_eps)
