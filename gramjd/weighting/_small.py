"""Weightings of one small Gramian on the CPU by numpy, with as few and as cheap calls as possible.

Of a dozen objectives the arithmetic takes no time: what counts is how many functions are called, and
numpy's take a third of torch's time. These are the problems, faces and certificates of the general
solvers, without what batches, derivatives, other devices and hard cases need. Whatever is not easy
is left to those: then the answer here is ``None``.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import Tensor

from gramjd.internals import is_compiling
from gramjd.weighting._certificate import CERTIFIED
from gramjd.weighting._gramian import flat_preference, rounding
from gramjd.weighting._opaque import is_constant, watched

LARGEST = 128  # objectives
ROUNDS = 10  # of pivoting
DEPENDENT = 1e-6  # sine of the angle below which a gradient counts as a combination of others


def _usable_numpy() -> Any:
    """numpy, if it is there and torch can share memory with it."""
    try:
        import numpy

        torch.zeros(1).numpy()
    except (ImportError, RuntimeError):
        return None
    return numpy


np = _usable_numpy()


def finite(matrix: Tensor) -> Any:
    """A float64 array ``[m, m]``, if the matrix is a small one on the CPU, finite and constant."""
    if np is None or type(matrix) is not Tensor or matrix.ndim != 2 or is_compiling() or watched():
        return None
    if not 0 < len(matrix) <= LARGEST or matrix.device.type != "cpu" or not matrix.is_floating_point():
        return None
    if not is_constant(matrix):
        return None
    array = matrix.detach().to(torch.float64).numpy()
    return array if array.shape[1] == len(array) and np.isfinite(array).all() else None


def own_array(tensor: Tensor) -> Any:
    """An array that shares memory with a constant tensor on the CPU in float32 or float64, else ``None``."""
    if np is None or type(tensor) is not Tensor or tensor.device.type != "cpu" or is_compiling() or watched():
        return None
    known = tensor.dtype in (torch.float32, torch.float64)  # numpy is slow at half precision
    return tensor.detach().numpy() if known and is_constant(tensor) else None


def easy(gramian: Tensor) -> Any:
    """An exactly symmetric float64 array ``[m, m]``, if the Gramian is a finite and constant one."""
    matrix = finite(gramian)
    if matrix is None:
        return None
    if not (matrix == matrix.T).all():  # as products of large matrices are
        if not (abs(matrix - matrix.T) <= rounding(gramian.dtype) * abs(matrix).max()).all():
            return None
        matrix = (matrix + matrix.T) / 2
    return matrix if matrix.diagonal().min() >= 0 else None


def is_fixed(pref_vector: Tensor | None) -> bool:
    """Whether a preference is one that numpy may see."""
    return pref_vector is None or (type(pref_vector) is Tensor and is_constant(pref_vector))


def preference_array(pref_vector: Tensor | None, gramian: Tensor) -> Any:
    """A preference as a float64 array ``[m]``; ``1 / m`` each by default."""
    if pref_vector is None:
        return np.full(len(gramian), 1 / len(gramian))
    return flat_preference(pref_vector, gramian.detach().to(torch.float64), gramian).detach().numpy()


def finish(weights: Any, like: Tensor) -> Tensor:
    """The weights as a tensor of the Gramian's dtype."""
    found: Tensor = torch.from_numpy(weights)
    return found if found.dtype == like.dtype else found.to(like.dtype)


def dual_cone(matrix: Any, preference: Any, norm_eps: float, reg_eps: float) -> Any:
    """DualProj's weights ``[m]``, for a preference ``[m]``."""
    diagonal = matrix.diagonal()
    trace = float(diagonal.sum())
    if not max(norm_eps, 1e-300) <= trace < 1e300:
        return None
    scale = 1 / np.sqrt(diagonal / trace + reg_eps) if reg_eps else None
    if scale is None:
        return None
    hessian = matrix * (scale[:, None] * (scale / trace))
    np.fill_diagonal(hessian, 1)
    if not _definite(hessian):
        return None
    target = preference / scale
    size = max(float(np.abs(target).max()), 1e-300)
    linear = hessian @ target / size
    growth = max(1.0, float(np.abs(linear).max()))
    x = _nonnegative(hessian, linear / growth)
    return None if x is None else scale * (target + size * growth * x)


def nonnegative(hessian: Tensor, linear: Tensor, dependent: float) -> Tensor | None:
    """The ``x >= 0`` that minimizes ``x'Hx / 2 + q'x``, for a Hessian that is easy, of unit diagonal.

    It is not if the sine of the angle between a gradient and others is below ``dependent``.
    """
    if np is None or not 0 < len(hessian) <= LARGEST:
        return None
    matrix = hessian.numpy()
    x = _nonnegative(matrix, linear.numpy()) if _definite(matrix, dependent) else None
    return None if x is None else torch.from_numpy(x)


def _definite(matrix: Any, dependent: float = DEPENDENT) -> bool:
    """Whether no row is, nearly, a combination of others."""
    try:
        pivots = np.linalg.cholesky(matrix).diagonal()
    except np.linalg.LinAlgError:
        return False
    return bool((pivots > dependent * np.sqrt(matrix.diagonal())).all())


def _nonnegative(hessian: Any, linear: Any) -> Any:
    """The ``x >= 0`` that minimizes ``x'Hx / 2 + q'x``, by block principal pivoting, certified."""
    free = linear < 0
    bound = np.zeros_like(hessian)
    np.fill_diagonal(bound, -1)
    for _ in range(ROUNDS):
        z = np.linalg.solve(np.where(free, hessian, bound), -linear)
        wrong = z < -1e-13 * max(1.0, float(z.max()))
        if not wrong.any():
            x = np.maximum(z * free, 0)
            residual = float(np.abs(np.minimum(x, hessian @ x + linear)).max())
            return x if residual <= CERTIFIED else None
        free = free ^ wrong
    return None


def _least_squares(matrix: Any, right: Any, eps: float) -> Any:
    """``H⁺b`` for a symmetric ``H``, with eigenvalues below its rounding ``eps`` taken for zero."""
    values, vectors = np.linalg.eigh(matrix)
    share, least = right @ vectors, len(matrix) * eps * max(float(values[-1]), -float(values[0]))
    if values[0] > least:
        return vectors @ (share / values)
    kept = np.abs(values) > least
    return vectors @ (share * kept / np.where(kept, values, 1))


def impartial(matrix: Any, eps: float) -> Any:
    """IMTL-G's weights ``[m]``, for the rounding ``eps`` of the Gramian's dtype."""
    trace = float(matrix.trace())
    matrix = matrix / trace if trace > 0 else matrix
    v = _least_squares(matrix, np.sqrt(matrix.diagonal()), eps)
    total = float(v.sum())
    return v / total if abs(total) > 1e-12 * float(np.abs(v).sum()) else np.zeros_like(v)


def conflict_free(matrix: Any, preference: Any, eps: float) -> Any:
    """ConFIG's weights ``[m]`` for the rounding ``eps``; ``None`` if the normal equations do not hold."""
    diagonal, size = matrix.diagonal(), len(matrix)
    positive = diagonal > 0
    inverse = positive / np.sqrt(np.where(positive, diagonal, 1))
    cosines = matrix * inverse[:, None] * inverse
    v = _least_squares(cosines, preference, eps)
    image = cosines @ v
    miss = float(np.abs(cosines @ (image - preference)).max())
    scale = float((np.abs(cosines) @ np.abs(v) + np.abs(preference)).max())
    if not miss <= (CERTIFIED + size * eps) * size * scale:
        return None
    square, direction = float(v @ image), inverse * v
    usable = square > 1e-24
    return direction * (float((matrix @ direction).sum()) / square) if usable else np.zeros_like(v)


def aligned(matrix: Any, preference: Any, scale_mode: str, eps: float) -> Any:
    """Aligned-MTL's weights ``[m]``, for the rounding ``eps`` of the Gramian's dtype."""
    values, vectors = np.linalg.eigh(matrix)
    kept = values > max(float(values[-1]) * len(matrix) * eps, 0.0)
    rank = int(kept.sum())
    if not rank:
        return np.array(preference)
    above = values[-rank:]
    scale = {"min": above[0], "median": above[(rank - 1) // 2], "rmse": above.mean()}[scale_mode]
    inverse = kept / np.sqrt(np.where(kept, values, 1))
    return sqrt(scale) * (vectors @ (inverse * (preference @ vectors)))


def averse(matrix: Any, c: float, norm_eps: float) -> Any:
    """CAGrad's weights ``[m]``, by pivoting on its faces; ``None`` near stationarity.

    On a face, ``Gs = t - Gu`` and ``s'Gs = c² g_0'g_0`` give ``s`` and the level ``t``: a linear and a
    quadratic equation. Entries of ``s`` are not negative, and off the face ``(Gs + Gu)_i >= t``.
    """
    trace = float(matrix.trace())
    if not max(norm_eps, 1e-300) <= trace < 1e300 or not _definite(matrix):
        return None
    matrix = matrix / trace
    slope = matrix.mean(1)
    square = float(slope.mean())
    if c == 0 or square <= 0:
        return None
    free, radius = slope <= slope.mean(), c * sqrt(square)
    identity = np.eye(len(matrix))
    for _ in range(ROUNDS):
        face = np.where(free & free[:, None], matrix, identity)
        offset, ray = np.linalg.solve(face, np.stack([-slope * free, free * 1.0], 1)).T
        a, b = float(ray @ (free * 1.0)), float(offset @ (free * 1.0))
        determinant = b * b - a * (float(-slope @ offset) - radius**2)
        if not a > 0:
            return None
        # where the ball has no point that is as good for all of the face, its nearest one says what to drop
        level = (-b + sqrt(max(determinant, 0.0))) / a
        s = offset + level * ray
        slack = slope + matrix @ s - level
        wrong = np.where(free, s, slack) < -1e-13 * max(1.0, float(s.max()))
        if not wrong.any():
            if determinant < 0:
                return None
            return _certified_averse(matrix, slope, radius, np.maximum(s, 0), norm_eps)
        free = free ^ wrong
        if not free.any():
            return None
    return None


def _certified_averse(matrix: Any, slope: Any, radius: float, s: Any, norm_eps: float) -> Any:
    """The weights, if the duality gap of CAGrad's own problem shows them right."""
    total = float(s.sum())
    if not total > 0:
        return None
    w = s / total
    image = matrix @ w
    norm = sqrt(max(float(w @ image), 0.0))
    if not norm > 2 * max(norm_eps, 1e-10):
        return None
    derivative = slope + radius / norm * image
    size = float(w @ np.sqrt(matrix.diagonal())) * (sqrt(float(slope.mean())) + radius)
    if not float(w @ derivative) - float(derivative.min()) <= CERTIFIED * size:
        return None
    return w * (radius / norm) + 1 / len(w)
