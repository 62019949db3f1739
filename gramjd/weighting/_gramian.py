"""Prepares the input of every weighting: checks it, flattens it, and converts it to float64.

A Gramian of objectives of shape ``S`` has shape ``[*S, *reversed(S)]``, an even number of
dimensions. With one leading batch dimension that number is odd, so the shape alone says which it
is. Further batch dimensions are ``torch.vmap``'s.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite, prod
from typing import Any, NoReturn

import torch
from torch import Tensor

from gramjd.sketched import SketchedGramian
from gramjd.weighting._certificate import Certificate
from gramjd.weighting._opaque import opaque
from gramjd.weighting._options import real_tensor


def _check(matrix: Tensor) -> Tensor:
    """Raise on NaN, infinity, asymmetry beyond rounding or a negative diagonal entry."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    if not matrix.numel():
        return diagonal
    smallest = float(diagonal.min())
    if smallest >= 0 and isfinite(float(matrix.sum())) and torch.equal(matrix, matrix.mT):
        return diagonal  # most often; opaque functions return a tensor
    largest = matrix.abs().amax((-2, -1), keepdim=True)
    slack = rounding(matrix.dtype) * largest
    near = ((matrix - matrix.mT).abs() <= slack) & (largest < torch.inf)  # false where NaN
    if smallest >= -float(slack.max()) and bool(near.all()):
        return diagonal
    _explain(matrix, rounding(matrix.dtype))


def _explain(matrix: Tensor, tolerance: float) -> NoReturn:
    """Raise the error that says what is wrong with a Gramian."""
    bad = int((~torch.isfinite(matrix)).sum())
    if bad:
        raise ValueError(
            f"The Gramian has {bad} entries that are NaN or infinite. Look for a loss or gradient "
            "that overflowed; float32 Gramians overflow for gradient norms above about 1e19."
        )
    largest = matrix.abs().amax((-2, -1), keepdim=True)
    asymmetry = float(((matrix - matrix.mT).abs() / largest).nan_to_num().max())
    if asymmetry > tolerance:
        raise ValueError(
            f"The Gramian is not symmetric: entries differ from their mirror images by up to "
            f"{asymmetry:.1e} of its largest entry, more than rounding in {matrix.dtype} explains "
            f"({tolerance:.1e}). Pass J @ J.T, flattened as [*shape, *reversed(shape)]."
        )
    smallest = float(matrix.diagonal(dim1=-2, dim2=-1).min())
    raise ValueError(
        f"The Gramian has a negative diagonal entry, {smallest:.3e}, but squared gradient norms "
        "cannot be negative. Pass J @ J.T."
    )


def rounding(dtype: torch.dtype) -> float:
    """Relative size of what the computation of a Gramian in ``dtype`` can leave as rounding."""
    return float(torch.finfo(dtype).eps) ** 0.5


def prepare(gramian: Tensor | SketchedGramian) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Check a Gramian; return it as symmetric float64 ``[..., m, m]`` and the way back.

    The way back turns weights ``[..., m]`` into the objectives' shape and the input's dtype.

    Raises:
        TypeError: it is not a floating-point tensor.
        ValueError: its shape is no Gramian's, or it has NaN, infinity, asymmetry beyond rounding or
            a negative diagonal entry.
    """
    matrix, restore = _flatten(gramian)
    opaque(_check, matrix)
    matrix = matrix.to(torch.float64)
    return (matrix + matrix.mT) / 2, restore


def prepare_cross(cross: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Check and convert ``J₁J₂'`` of two batches, as :func:`prepare`; it only needs to be finite.

    Raises:
        TypeError: it is not a floating-point tensor.
        ValueError: its shape is no Gramian's, or it has NaN or infinity.
    """
    matrix, restore = _flatten(cross)
    opaque(_check_finite_matrix, matrix)
    return matrix.to(torch.float64), restore


def _check_finite_matrix(matrix: Tensor) -> Tensor:
    if isfinite(float(matrix.sum())):  # most often, and a single pass
        return matrix.new_zeros(matrix.shape[:-2])
    bad = int((~torch.isfinite(matrix)).sum())
    if bad:
        raise ValueError(
            f"The matrix of inner products has {bad} entries that are NaN or infinite. Look for a loss or "
            "gradient that overflowed."
        )
    return matrix.new_zeros(matrix.shape[:-2])


def _flatten(gramian: Tensor | SketchedGramian) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """``[..., m, m]``, and the way back of weights ``[..., m]``."""
    if isinstance(gramian, SketchedGramian):
        raise TypeError(
            "Of the weightings, upgrad, dualproj, mgda and cagrad take a SketchedGramian. Pass "
            "gramian.dense() to others, if there are few objectives."
        )
    if not isinstance(gramian, Tensor) or not gramian.is_floating_point():
        got = gramian.dtype if isinstance(gramian, Tensor) else type(gramian).__name__
        raise TypeError(f"A Gramian is a real floating-point tensor; got {got}.")
    batch, half = gramian.ndim % 2, gramian.ndim // 2
    lead, shape = gramian.shape[:batch], gramian.shape[batch : batch + half]
    if gramian.shape[batch + half :] != shape[::-1]:
        raise ValueError(
            "A Gramian has shape [*shape, *reversed(shape)], with at most one leading batch "
            f"dimension; got {list(gramian.shape)}. Use torch.vmap for more."
        )
    if half > 1:
        order = [*range(batch + half), *reversed(range(batch + half, gramian.ndim))]
        gramian = gramian.permute(order)
    dtype = gramian.dtype

    def restore(weights: Tensor) -> Tensor:
        return weights.reshape((*lead, *shape)).to(dtype)

    return gramian.reshape((*lead, prod(shape), prod(shape))), restore


def same_shape(state: Tensor | None, matrix: Tensor, like: Tensor) -> Tensor:
    """A state shaped like the objectives as float64 ``[..., m]``; ``1 / m`` each at first.

    Raises:
        ValueError: it has another shape.
    """
    batch, half = like.ndim % 2, like.ndim // 2
    shape = like.shape[: batch + half]
    if state is None:
        return matrix.new_full(matrix.shape[:-1], 1 / max(matrix.shape[-1], 1))
    if state.shape != shape:
        raise ValueError(
            f"The state is of shape {list(state.shape)}, the objectives of shape {list(shape)}: start "
            "again without a state when the objectives change."
        )
    return state.to(matrix).reshape(matrix.shape[:-1])


def nothing(matrix: Tensor, restore: Callable[[Tensor], Tensor], certificate: bool) -> Any:
    """The answer for no objectives, or for a batch of no Gramians: nothing, and a certificate of it."""
    weights = restore(matrix.new_zeros(matrix.shape[:-1]))
    residual = matrix.new_zeros(matrix.shape[:-2])
    return (weights, Certificate(residual, residual == 0)) if certificate else weights


def flat_preference(preference: Tensor | None, matrix: Tensor, like: Tensor | SketchedGramian) -> Tensor:
    """A preference shaped like the objectives as float64 ``[..., m]``; ``1 / m`` each by default.

    Raises:
        TypeError: it is no tensor of real numbers.
        ValueError: its shape is not the objectives', or it has NaN or infinity.
    """
    size = matrix.shape[-1]
    if preference is None:
        return matrix.new_full((size,), 1 / max(size, 1))
    real_tensor("The preference", preference)
    batch, half = like.ndim % 2, like.ndim // 2
    shape = like.shape[batch : batch + half]
    if preference.shape not in (shape, like.shape[: batch + half]):
        raise ValueError(
            f"The preference must have the objectives' shape {list(shape)}; got {list(preference.shape)}."
        )
    flat = preference.to(device=matrix.device, dtype=torch.float64)
    opaque(_check_finite, flat)
    return flat.reshape((*preference.shape[: preference.ndim - half], size))


def _check_finite(preference: Tensor) -> Tensor:
    if not bool(preference.isfinite().all()):
        raise ValueError("The preference has NaN or infinite entries.")
    return preference.new_zeros(preference.shape[:-1])
