"""The dual problem of CAGrad, for Gramians ``[B, m, m]`` and for rows ``[m, n]`` in place of one."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from gramjd.weighting._hull import nearest
from gramjd.weighting._min_norm import min_norm


class Gradients(Protocol):
    """The operations on gradients ``g_i``, with mean ``g_0``, that the search needs."""

    diagonal: Tensor  # |g_i|² [B, m]
    slope: Tensor  # g_0'g_i [B, m]
    finest: float  # the shortest |J'w| that rounding leaves its digits, of gradients of trace 1

    def image(self, w: Tensor) -> Tensor:
        """The product ``Gw`` for ``w [B, m]``."""

    def norm(self, w: Tensor) -> Tensor:
        """The norms ``|J'w| [B, 1]``."""

    def nearest(self, r: Tensor, guess: Tensor | None) -> Tensor:
        """``w`` on the simplex that minimizes ``|J'w + r g_0|``: the hull of the ``g_i + r g_0``."""


class Dense:
    """The problem for Gramians ``[B, m, m]``."""

    finest = 1e-7  # squares are rounded

    def __init__(self, gramian: Tensor) -> None:
        self.gramian = gramian
        self.slope, self.diagonal = gramian.mean(-1), gramian.diagonal(dim1=-2, dim2=-1)

    def image(self, w: Tensor) -> Tensor:
        return (self.gramian @ w.unsqueeze(-1)).squeeze(-1)

    def norm(self, w: Tensor) -> Tensor:
        return (w * self.image(w)).sum(-1, keepdim=True).clamp(min=0).sqrt()

    def nearest(self, r: Tensor, guess: Tensor | None) -> Tensor:
        shift = r * self.slope
        shifted = self.gramian + shift.unsqueeze(-1) + shift.unsqueeze(-2)
        return min_norm(shifted + (r**2 * self.slope.mean(-1, keepdim=True)).unsqueeze(-1), guess)


class Factored:
    """The problem for rows ``[m, n]``; ``B = 1``."""

    finest = 1e-10

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.mean = rows, rows.mean(0)
        self.slope, self.diagonal = (rows @ self.mean).unsqueeze(0), rows.square().sum(-1).unsqueeze(0)

    def image(self, w: Tensor) -> Tensor:
        return (w @ self.rows) @ self.rows.mT

    def norm(self, w: Tensor) -> Tensor:
        return (w @ self.rows).norm(dim=-1, keepdim=True)

    def nearest(self, r: Tensor, guess: Tensor | None) -> Tensor:
        shifted = self.rows + r.reshape(()) * self.mean
        return nearest(shifted, None if guess is None else guess[0]).unsqueeze(0)


def averse_search(gradients: Gradients, c: float, norm_eps: float) -> tuple[Tensor, Tensor]:
    """``w c |g_0| / |J'w| [B, m]``, or zeros near stationarity, and the relative duality gap ``[B]``.

    ``w`` is ``w(r)``, which minimizes ``|J'w + r g_0|``, for the ``r > 0`` where
    ``|J'w(r)| = c |g_0| r``: the ratio of both sides decreases, and ``w(r)`` is piecewise
    linear, so chords of it find the root.
    """
    radius = c * gradients.slope.mean(-1, keepdim=True).clamp(min=0).sqrt()
    safe = torch.where(radius > 0, radius, 1)
    longest = gradients.diagonal.amax(-1, keepdim=True).sqrt()
    low, high = max(norm_eps, gradients.finest) / safe, (longest / safe).clamp(min=norm_eps) * 1.01
    at_low, at_high = (gradients.nearest(r, None) for r in (low, high))
    stationary = (gradients.norm(at_low) <= (1 + 1e-9) * radius * low) | (radius == 0)
    best, smallest = at_low, torch.full_like(low, torch.inf)
    for step in range(100):
        ratio = _crossing(gradients, at_low, at_high, radius * low, radius * high)
        ratio = ratio if step % 3 < 2 else torch.full_like(ratio, 0.5)
        middle = low + ratio * (high - low)
        at_middle = gradients.nearest(middle, at_low + at_high > 0)
        norm = gradients.norm(at_middle)
        above, error = norm >= radius * middle, (norm - radius * middle).abs()
        best = torch.where(error < smallest, at_middle, best)
        smallest = torch.minimum(error, smallest)
        low, at_low = torch.where(above, middle, low), torch.where(above, at_middle, at_low)
        high, at_high = torch.where(above, high, middle), torch.where(above, at_high, at_middle)
        found = smallest <= 1e-14 * longest + 1e-13 * norm
        if bool((found | stationary | (high - low <= 1e-15 * high)).all()):
            break
    return _finish(gradients, radius, best, stationary)


def _finish(gradients: Gradients, radius: Tensor, w: Tensor, stationary: Tensor) -> tuple[Tensor, Tensor]:
    slope, norm = gradients.slope, gradients.norm(w)
    safe = torch.where(norm > 0, norm, 1)
    derivative = slope + radius / safe * gradients.image(w)
    gap = (w * derivative).sum(-1) - derivative.amin(-1)
    lengths = gradients.diagonal.clamp(min=0).sqrt()
    mean_norm = slope.mean(-1).clamp(min=0).sqrt()
    size = (w * lengths).sum(-1) * (mean_norm + radius.squeeze(-1))
    gap = torch.where(stationary.squeeze(-1), 0, gap / torch.where(size > 0, size, 1))
    return torch.where(stationary, 0, w * (radius / safe)), gap


def _crossing(gradients: Gradients, first: Tensor, last: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """The ``x`` in (0, 1) with ``|J'(first + x (last - first))| = start + x (end - start)``."""
    delta = last - first
    image = gradients.image(first), gradients.image(delta)
    a = (delta * image[1]).sum(-1, keepdim=True) - (end - start) ** 2
    b = (delta * image[0]).sum(-1, keepdim=True) - start * (end - start)
    c = (first * image[0]).sum(-1, keepdim=True) - start**2
    q = -(b + torch.where(b < 0, -1, 1) * (b * b - a * c).clamp(min=0).sqrt())
    roots = torch.stack([q / a, c / q]).nan_to_num(nan=-1.0)
    valid = (roots > 0) & (roots < 1)
    return torch.where(valid[0], roots[0], torch.where(valid[1], roots[1], 0.5))
