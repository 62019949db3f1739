"""The dual active-set method of Goldfarb and Idnani (1983), in terms of the Gramian (PCD).

It minimizes ``|d - g|² / 2`` over the ``d`` with ``g_j'd >= c_j``, by adding the most violated
constraint and dropping those whose multipliers would become negative; ``d = g + Σ μ_j g_j`` all the
while. Unlike a solver of the dual program alone, it tells when no ``d`` satisfies all constraints.
"""

from __future__ import annotations

import torch
from torch import Tensor


def multipliers(
    gramian: Tensor, bound: Tensor, dependent: float, tolerance: float
) -> tuple[Tensor, Tensor | None]:
    """``μ [m]`` for ``G [m, m]`` of unit diagonal, and ``b_j = c_j - g_j'g``, of order one.

    A gradient counts as a combination of those of active constraints if the square of its distance
    from them is at most ``dependent``. A constraint holds if it is violated by no more than ``tolerance``
    times ``1 + Σ μ_j``, what its terms may be. If no ``d`` satisfies all constraints, also the combination
    ``ray [m]``, not negative, with ``G ray = 0`` and ``b'ray > 0``, that proves it; else ``None``.
    """
    mu, active = torch.zeros_like(bound), torch.zeros(0, dtype=torch.long)
    for _ in range(50 * len(bound) + 50):
        slack = gramian @ mu - bound
        slack[active] = 0
        new = int(slack.argmin())
        if float(slack[new]) >= -tolerance * (1 + float(mu.sum())):
            return _polished(gramian, bound, mu, active), None
        while True:
            along = torch.linalg.solve(gramian[active][:, active], gramian[active, new])
            distance = float(1 - gramian[new, active] @ along)
            full = -float(gramian[new] @ mu - bound[new]) / distance if distance > dependent else torch.inf
            ratios = torch.where(along > 0, mu[active] / along, torch.inf)
            first = int(ratios.argmin()) if len(ratios) else -1
            part = float(ratios[first]) if len(ratios) else torch.inf
            step = min(full, part)
            if step == torch.inf:
                ray = torch.zeros_like(mu)
                ray[active], ray[new] = (-along).clamp(min=0), 1
                return mu, ray
            mu[active] -= step * along
            mu[new] += step
            if full <= part:
                active = torch.cat([active, torch.tensor([new])])
                break
            mu[active[first]] = 0
            active = torch.cat([active[:first], active[first + 1 :]])
    return mu, None  # not converged: the certificate tells


def _polished(gramian: Tensor, bound: Tensor, mu: Tensor, active: Tensor) -> Tensor:
    """The multipliers of the active constraints solved for anew, without what the steps have added up."""
    if not len(active):
        return torch.zeros_like(mu)
    exact = torch.zeros_like(mu)
    exact[active] = torch.linalg.solve(gramian[active][:, active], bound[active])
    return exact.clamp(min=0)
