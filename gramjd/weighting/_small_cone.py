"""UPGrad's projections for one small Gramian on the CPU, by numpy: see ``_small``.

This is the same problem, pivoting and certificate as in ``_dual_cone`` and ``_pivoting``, without
what batches, derivatives, other devices and hard cases need. Those are left to the general way.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gramjd.weighting._certificate import CERTIFIED
from gramjd.weighting._small import easy, np

LARGEST = 32  # objectives: for more, the general way's better first guess and shared factors win
ROUNDS = 6  # of pivoting, before the general way takes over
STEP = 0.6  # of projected gradient descent, for a Hessian of unit diagonal


def small_projections(gramian: Tensor, norm_eps: float, reg_eps: float) -> tuple[Any, Any] | None:
    """The projections ``[m, m]`` and the scale ``[m]``, as of ``project_units`` and ``regularize``.

    ``None`` if the Gramian is not of the easy kind: then the general way says what is wrong with it,
    or solves it.
    """
    matrix = easy(gramian)
    if matrix is None or len(matrix) > LARGEST:
        return None
    diagonal = matrix.diagonal()
    trace = float(diagonal.sum())
    if not max(norm_eps, 1e-300) <= trace < 1e300 or not (reg_eps or diagonal.min() > 0):
        return None
    scale = 1 / np.sqrt(diagonal / trace + reg_eps)
    hessian = matrix * (scale[:, None] * (scale / trace))
    np.fill_diagonal(hessian, 1)
    try:
        np.linalg.cholesky(hessian)
    except np.linalg.LinAlgError:
        return None
    x = _pivot(hessian)
    if x is None or not np.abs(np.minimum(x, x @ hessian + hessian)).max() <= CERTIFIED:
        return None
    x.reshape(-1)[:: len(x) + 1] += 1
    return x, scale


def _pivot(hessian: Any) -> Any:
    """The ``x >= 0`` that minimizes ``(x + e_i)'H(x + e_i)``, for each row; ``None`` if it takes long."""
    start = hessian * -STEP
    matrix = start.copy()
    np.fill_diagonal(matrix, 1 - STEP)
    x = np.maximum(start, 0)
    for _ in range(3):
        x = np.maximum(start + x @ matrix, 0)
    free = x > 0
    bound = np.zeros_like(hessian)
    np.fill_diagonal(bound, -1)
    target = -hessian[:, :, None]
    for _ in range(ROUNDS):
        z = np.linalg.solve(np.where(free[:, None, :], hessian, bound), target)[:, :, 0]
        wrong = z < -1e-12
        if not wrong.any():
            return np.maximum(z * free, 0)
        free = free ^ wrong
    return None
