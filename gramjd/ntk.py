"""The empirical neural tangent kernel: inner products of the Jacobians of two batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor

from gramjd.pytree import PyTree
from gramjd.transforms import jacobian


def ntk(
    func: Callable[..., Tensor],
    in_dims: PyTree = 0,
    *,
    trace_axes: Sequence[int] = (),
    diagonal_axes: Sequence[int] = (),
    randomness: str = "error",
    chunk_size: int | None = None,
) -> Callable[..., Tensor]:
    """The empirical neural tangent kernel ``J(x1) J(x2)ᵀ`` (Jacot et al., arXiv 1806.07572).

    Args:
        func: a pure function of one sample, ``func(params, x) -> output``: ``params`` and ``x`` are
            any PyTrees of tensors, the output is a tensor of shape ``S``.
        in_dims: which dimension of ``x`` is the batch (a PyTree of them for a PyTree).
        trace_axes: axes of the batched output ``[B, *S]`` along which the *mean* of the kernel's
            diagonal is taken; both of its axes vanish.
        diagonal_axes: axes of ``[B, *S]`` along which only the kernel's diagonal is kept, in the place
            of the first of its two axes; 0 compares each sample of ``x1`` with the same one of ``x2``.
        randomness, chunk_size: as in ``torch.func.vmap``.

    The two options are those of ``neural_tangents.empirical_ntk_fn``, whose results have their axes in
    another order and divide traces by the size of the axis likewise.

    Returns:
        A function ``kernel(params, x1, x2=None)``: ``[B1, *S, *reversed(S), B2]`` less the axes that
        the options take away. Without ``x2`` it is that of ``x1`` with itself, exactly symmetric,
        from one pass over the function in place of two.

    Raises:
        ValueError: an axis does not exist or is named twice, or the sizes of its two ends differ.
        TypeError: the output is not a tensor.
    """
    lazy = jacobian(func, 0, (None, in_dims), randomness=randomness, chunk_size=chunk_size)

    def kernel(params: PyTree, x1: PyTree, x2: PyTree = None) -> Tensor:
        left = lazy(params, x1)
        full = left.gramian() if x2 is None else left.cross(lazy(params, x2))
        if not isinstance(full, Tensor):
            raise TypeError("The kernel of a function whose output is a PyTree: let it return one tensor.")
        return _reduce(full, trace_axes, diagonal_axes)

    return kernel


def _reduce(full: Tensor, trace_axes: Sequence[int], diagonal_axes: Sequence[int]) -> Tensor:
    """Take traces and diagonals of ``[B1, *S, *reversed(S), B2]``."""
    n = full.ndim // 2
    trace, diagonal = [_axis(a, n) for a in trace_axes], [_axis(a, n) for a in diagonal_axes]
    both = [*trace, *diagonal]
    if len(set(both)) < len(both):
        raise ValueError(f"trace_axes {trace_axes} and diagonal_axes {diagonal_axes} name an axis twice.")
    size = 1
    for axis in both:
        if full.shape[axis] != full.shape[-1 - axis]:
            raise ValueError(
                f"Axis {axis} has {full.shape[axis]} entries in x1 and {full.shape[-1 - axis]} in x2: there "
                "is no diagonal."
            )
        size *= full.shape[axis] if axis in trace else 1
    if not both:
        return full
    letters: list[Any] = list(ascii_letters[: 2 * n])
    for axis in both:
        letters[-1 - axis] = letters[axis]
    kept = [a for a in range(n) if a not in trace]
    mirrored = [2 * n - 1 - a for a in reversed(kept) if a not in diagonal]
    out = [letters[a] for a in (*kept, *mirrored)]
    return torch.einsum(f"{''.join(letters)}->{''.join(out)}", full) / size


def _axis(axis: int, ndim: int) -> int:
    if not -ndim <= axis < ndim:
        raise ValueError(f"Axis {axis} is none of the {ndim} axes of the batched output.")
    return axis % ndim
