"""The empirical neural tangent kernel: inner products of the Jacobians of two batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from string import ascii_letters
from typing import Any

import torch
from torch import Tensor

from gramjd import pytree
from gramjd.contraction import default_budget
from gramjd.contraction.outputs import Outputs
from gramjd.errors import NotFiniteError
from gramjd.functional.transforms import jacobian
from gramjd.internals import value_of
from gramjd.jacobian import Jacobian, Output
from gramjd.pytree import PyTree
from gramjd.verification.schedule import Check


def ntk(
    func: Callable[..., Tensor],
    in_dims: PyTree = 0,
    *,
    trace_axes: int | Sequence[int] = (),
    diagonal_axes: int | Sequence[int] = (),
    randomness: str = "error",
    chunk_size: int | None = None,
    check: Check = "first",
    audit: int | None = 256,
) -> Callable[..., Tensor]:
    """The empirical neural tangent kernel ``J(x1) J(x2)ᵀ`` (Jacot et al., arXiv 1806.07572).

    Args:
        func: a pure function of one sample, ``func(params, x) -> output``: ``params`` and ``x`` are
            any PyTrees of tensors, the output is a tensor of shape ``S``.
        in_dims: which dimension of ``x`` is the batch (a PyTree of them for a PyTree).
        trace_axes: one or several axes of the batched output ``[B, *S]``. The kernel has each of them twice;
            the result has the *mean* of the diagonal in place of both.
        diagonal_axes: one or several axes of ``[B, *S]`` of which only the diagonal is kept, in place of the
            first of the two. Axis 0 compares each sample of ``x1`` with the same sample of ``x2``.
        randomness, chunk_size: as in ``torch.func.vmap``.
        check, audit: as in :func:`gramjd.jacobian`.

    ``trace_axes`` and ``diagonal_axes`` mean the same as in ``neural_tangents.empirical_ntk_fn``, but the
    axes of the result are in another order.

    Returns:
        A function ``kernel(params, x1, x2=None)``. Its result is ``[B1, *S, *reversed(S), B2]``, without the
        axes that the two options remove. Without ``x2``, it is the kernel of ``x1`` with itself, exactly
        symmetric, from one pass over the function.

    Raises:
        ValueError: an axis does not exist or is named twice, or the sizes of its two ends differ.
        TypeError: the output is not a tensor; the function fails on inputs and parameters of different
            dtypes.
        NotFiniteError: the kernel has NaN or infinite entries. Inside transforms and compiled graphs, values
            are not known, and nothing is raised.
    """
    lazy = jacobian(
        func, 0, (None, in_dims), randomness=randomness, chunk_size=chunk_size, check=check, audit=audit
    )

    def kernel(params: PyTree, x1: PyTree, x2: PyTree = None) -> Tensor:
        left = jacobian_of(lazy, params, x1, "x1")
        axes = Axes.of(output_shape(left), trace_axes, diagonal_axes)
        right = None if x2 is None else jacobian_of(lazy, params, x2, "x2")
        found = axes.kernel(left, right)
        check_finite(found, params=params, x1=x1, x2=x2)
        return found

    return kernel


def jacobian_of(lazy: Callable[..., Jacobian], params: PyTree, x: PyTree, name: str) -> Jacobian:
    """The Jacobian at a batch; if dtypes are what the function fails by, an error says so."""
    try:
        return lazy(params, x)
    except RuntimeError as error:
        mine, theirs = _dtypes(params), _dtypes(x)
        if mine == theirs or not theirs:
            raise
        raise TypeError(
            f"The function failed on parameters of {_listed(mine)} and {name} of {_listed(theirs)}: "
            f"{error}. Convert one of them, for instance by {name}.to({_listed(mine)})."
        ) from error


def check_finite(kernel: Tensor, **given: PyTree) -> None:
    """Raise if a kernel has entries that are not finite; name those of ``given`` that have some, too."""
    # the sum tells it faster, unless it overflows
    if any(value_of(torch.isfinite(entries).all()) is not False for entries in (kernel.sum(), kernel)):
        return
    bad = [name for name, tree in given.items() if not all(map(_is_finite, pytree.leaves(tree)))]
    cause = f"{' and '.join(bad)} has them, too" if bad else "its inputs have not: a derivative overflowed"
    raise NotFiniteError(
        f"The kernel has NaN or infinite entries; {cause}. Clean or scale the data, or compute in a wider "
        "dtype."
    )


def _is_finite(leaf: Any) -> bool:
    return not isinstance(leaf, Tensor) or bool(torch.isfinite(leaf).all())


def _dtypes(tree: PyTree) -> set[torch.dtype]:
    """The dtypes of the floating-point tensors of a tree."""
    return {x.dtype for x in pytree.leaves(tree) if isinstance(x, Tensor) and x.is_floating_point()}


def _listed(dtypes: set[torch.dtype]) -> str:
    return " and ".join(sorted(map(str, dtypes)))


def output_shape(jac: Jacobian) -> tuple[int, ...]:
    """``[B, *S]`` of a Jacobian of one tensor."""
    if jac.outputs.spec != pytree.flatten(jac.parameters[0])[1]:
        raise TypeError("The kernel of a function whose output is a PyTree: let it return one tensor.")
    return jac.outputs.each[0].shape


@dataclass(frozen=True)
class Axes:
    """The axes of the batched output ``[B, *S]`` that are traced, or of which only the diagonal is kept."""

    ndim: int
    trace: tuple[int, ...]
    diagonal: tuple[int, ...]

    @staticmethod
    def of(
        output: Sequence[int], trace_axes: int | Sequence[int], diagonal_axes: int | Sequence[int]
    ) -> Axes:
        """The axes that a caller named; negative numbers count from the last axis."""
        trace_axes = [trace_axes] if isinstance(trace_axes, int) else trace_axes
        diagonal_axes = [diagonal_axes] if isinstance(diagonal_axes, int) else diagonal_axes
        for axis in (*trace_axes, *diagonal_axes):
            if not -len(output) <= axis < len(output):
                raise ValueError(f"Axis {axis} is none of the {len(output)} axes of the batched output.")
        trace, diagonal = (tuple(a % len(output) for a in axes) for axes in (trace_axes, diagonal_axes))
        if len({*trace, *diagonal}) < len(trace) + len(diagonal):
            raise ValueError(f"trace_axes {trace_axes} and diagonal_axes {diagonal_axes} name an axis twice.")
        return Axes(len(output), trace, diagonal)

    @property
    def order(self) -> list[int]:
        """Axes ``[*kept, *mirrored]`` of the result among all; the mirror of ``a`` is ``-1 - a``."""
        kept = [a for a in range(self.ndim) if a not in self.trace]
        return kept + [2 * self.ndim - 1 - a for a in reversed(kept) if a not in self.diagonal]

    def kernel(self, left: Jacobian, right: Jacobian | None = None) -> Tensor:
        """``J₁ J₂ᵀ`` less what the options take away; of ``J₁`` with itself, exactly symmetric."""
        mine, other = output_shape(left), output_shape(left if right is None else right)
        both = (*self.trace, *self.diagonal)
        for axis in both:
            if (n := mine[axis]) != (m := other[axis]):
                raise ValueError(f"Axis {axis} has {n} entries in x1 and {m} in x2: there is no diagonal.")
        if not both:
            return left.gramian() if right is None else left.cross(right)
        names = list(ascii_letters[: 2 * self.ndim])
        for axis in both:
            names[-1 - axis] = names[axis]
        first = [a for a in both if a != 0]
        rest = [a for a in range(self.ndim) if a not in first]
        given = [names[a] for a in (*first, *rest, *(-1 - a for a in reversed(rest)))]
        kept = [names[a] for a in self.order]
        pieces = _pieces(left, right, first)
        size = prod([mine[a] for a in self.trace])
        found = torch.einsum(f"{''.join(given)}->{''.join(kept)}", pieces) / size
        return (found + self.mirrored(found)) / 2 if right is None and self.trace else found

    def mirrored(self, kernel: Tensor) -> Tensor:
        """Swap the inputs of a kernel: ``K(x1, x2)`` becomes ``K(x2, x1)``."""
        mirror = {a: a if a in self.diagonal else 2 * self.ndim - 1 - a for a in self.order}
        return kernel.permute([self.order.index(mirror[a]) for a in self.order])


def _pieces(left: Jacobian, right: Jacobian | None, first: Sequence[int]) -> Tensor:
    """Kernels of the entries along some axes of the output, each with itself alone.

    ``[*first, B1, *rest, *reversed(rest), B2]``: what lies off the diagonals is never computed.
    """
    shape = output_shape(left)[1:]
    rest = [a for a in range(1, 1 + len(shape)) if a not in first]
    sizes, others = ([shape[a - 1] for a in axes] for axes in (first, rest))
    numbers = torch.arange(left.objectives, device=left.parameters[0].device).view(shape)
    which = numbers.permute([a - 1 for a in (*first, *rest)]).reshape(prod(sizes), -1)
    budget = max(2**20, default_budget(which.device) // len(which))  # for each of them

    def piece(mine: Tensor) -> Tensor:
        x = _objectives(left, mine, others)
        if right is None:
            return x.gramian(memory_budget=budget)
        return x.cross(_objectives(right, mine, others), memory_budget=budget)

    found = torch.vmap(piece)(which)
    return found.reshape(*sizes, *found.shape[1:])


def _objectives(jac: Jacobian, which: Tensor, shape: Sequence[int]) -> Jacobian:
    """The Jacobian of some objectives of each sample, an output of this shape."""
    output = Output(0, (jac.samples, *shape), 0)
    outputs = Outputs([output], jac.outputs.spec, jac.samples)
    return replace(jac, parts=[part.objectives(which) for part in jac.parts], outputs=outputs)
