"""MoDo's and SDMGrad's steps on the simplex for one small matrix on the CPU, by numpy: see ``_small``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gramjd.weighting._certificate import CERTIFIED
from gramjd.weighting._opaque import is_constant
from gramjd.weighting._small import finite, is_fixed, np, preference_array


def modo_step(cross: Tensor, state: Tensor | None, gamma: float, rho: float) -> Any:
    """MoDo's weights ``[m]`` as a float64 array; ``None`` if the matrix or the state is not easy."""
    matrix = finite(cross)
    w = None if matrix is None else _start(state, len(matrix))
    if w is None:
        return None
    start = w - gamma * (matrix @ w + rho * w)
    found = _project(start, np.arange(1.0, len(w) + 1))
    return found if _certified(start, found) else None


def sdmgrad_steps(cross: Tensor, state: Tensor | None, lr: float, momentum: float, n_iter: int,
                  lambda_: float, pref_vector: Tensor | None) -> Any:  # fmt: skip
    """SDMGrad's weights and its next ``w``, both ``[m]``; ``None`` if the matrix or the state is not easy."""
    matrix = finite(cross)
    w = None if matrix is None or not is_fixed(pref_vector) else _start(state, len(matrix))
    if w is None:
        return None
    pull = lambda_ * preference_array(pref_vector, cross)
    scale = float(np.sqrt(np.maximum(matrix.diagonal(), 0)).mean())
    matrix = matrix / (scale**2 + 1e-8)
    velocity = start = np.zeros_like(w)
    counts = np.arange(1.0, len(w) + 1)
    for _ in range(n_iter):
        velocity = momentum * velocity + matrix @ (w + pull)
        start = w - lr * velocity
        w = _project(start, counts)
    return ((w + pull) / (1 + lambda_), w) if _certified(start, w) else None


def shaped(weights: Any, state: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Both as tensors that share no memory, the weights in the dtype of ``like``."""
    return torch.from_numpy(weights).to(like.dtype), torch.from_numpy(state.copy())


def _start(state: Tensor | None, size: int) -> Any:
    """A state as a float64 array ``[m]``; ``1 / m`` each at first."""
    if state is None:
        return np.full(size, 1 / size)
    if type(state) is not Tensor or state.shape != (size,) or state.device.type != "cpu":
        return None
    return state.detach().to(torch.float64).numpy() if is_constant(state) else None


def _project(y: Any, counts: Any) -> Any:
    """``project_onto_simplex``; ``counts`` are 1 to ``m``."""
    ordered = np.sort(y)[::-1]
    levels = (ordered.cumsum() - 1) / counts
    support = max(int(np.count_nonzero(ordered > levels)), 1)
    return np.maximum(y - levels[support - 1], 0)


def _certified(y: Any, point: Any) -> bool:
    """Whether ``projection_residual`` is small enough."""
    rest = y - point
    level = rest.max(where=point > 0, initial=-np.inf)
    worst = max(float(np.abs(np.minimum(point, level - rest)).max()), abs(float(point.sum()) - 1))
    return worst <= CERTIFIED * (1 + float(np.abs(y).max()))
