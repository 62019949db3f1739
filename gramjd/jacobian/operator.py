"""A Jacobian as a matrix: products with flat vectors, and scipy's view of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gramjd import pytree
from gramjd.complexes import as_given, as_real, entries

if TYPE_CHECKING:
    from gramjd.jacobian.lazy import Jacobian


@dataclass(frozen=True, eq=False)
class Transposed:
    """``Jᵀ``, a linear operator from flat weights to flat gradients."""

    T: Jacobian[Any]

    @property
    def shape(self) -> tuple[int, int]:
        return self.T.shape[::-1]

    def __matmul__(self, w: Tensor) -> Tensor:
        """``Jᵀ w`` for ``w [rows]`` or ``[rows, n]``."""
        jac = self.T
        _check(w, jac.shape[0])
        if w.ndim == 2:
            given = pytree.map(lambda t: t.movedim(-1, 0), jac.outputs.unravel(w))
        else:
            given = jac.outputs.unravel(w)
        leaves = pytree.leaves(jac.vjp(given))
        flat = torch.cat([as_real(x).reshape(*w.shape[1:], -1).to(w.device) for x in leaves], -1)
        return flat.mT if w.ndim == 2 else flat


def times(jac: Jacobian[Any], right: Any) -> Tensor:
    """``J v`` for ``v [entries]`` or ``[entries, n]``; ``J₁ J₂ᵀ`` for a transposed Jacobian."""
    if isinstance(right, Transposed):
        other = right.T
        crossed = jac.gramian() if other is jac else jac.cross(other)
        rows = [
            torch.cat([_matrix(x, len(out.shape)) for x in pytree.leaves(row)], 1)
            for out, row in zip(jac.outputs.each, _rows(crossed, jac), strict=True)
        ]
        return torch.cat(rows)
    _check(right, jac.shape[1])
    if right.ndim == 2:
        found: Tensor = torch.vmap(lambda v: times(jac, v), 1, 1)(right)
        return found
    pieces = right.split([entries(p) for p in jac.parameters])
    shaped = [_shaped(x, p) for x, p in zip(pieces, jac.parameters, strict=True)]
    return jac.outputs.ravel(jac.jvp(pytree.unflatten(jac.parameters_spec, shaped)))


def _shaped(flat: Tensor, parameter: Tensor) -> Tensor:
    """A piece of a flat vector as the direction of a parameter."""
    shape = (*parameter.shape, 2) if parameter.is_complex() else parameter.shape
    return as_given(flat.reshape(shape).to(parameter.device), parameter)


def _rows(crossed: Any, jac: Jacobian[Any]) -> list[Any]:
    """The entry of each output of ``jac`` in a PyTree of PyTrees."""
    return jac.outputs.spec.flatten_up_to(crossed)


def _matrix(generalized: Tensor, left: int) -> Tensor:
    """Reshape ``[*left, *reversed(right)]`` to ``[prod(left), prod(right)]``."""
    order = [*range(left), *reversed(range(left, generalized.ndim))]
    straight = generalized.permute(order)
    return straight.reshape(straight.shape[:left].numel(), -1)


def _check(vector: Any, size: int) -> None:
    if not isinstance(vector, Tensor) or vector.ndim not in (1, 2) or vector.shape[0] != size:
        got = list(vector.shape) if isinstance(vector, Tensor) else type(vector).__name__
        raise ValueError(f"Expected a tensor of shape [{size}] or [{size}, n], got {got}.")


def as_linear_operator(jac: Jacobian[Any]) -> Any:
    """``J`` for scipy: arrays in, arrays out, products on the Jacobian's own device."""
    try:
        from scipy.sparse.linalg import LinearOperator
    except ImportError as error:
        raise ImportError("as_linear_operator needs scipy: pip install scipy.") from error
    like = as_real(jac.parameters[0])
    try:
        dtype = torch.empty((), dtype=like.dtype).numpy().dtype
    except TypeError as error:
        raise TypeError(f"numpy has no {like.dtype}: take J.to(dtype=torch.float32) first.") from error

    def product(left: Any) -> Any:
        def apply(x: Any) -> Any:
            given = torch.as_tensor(x, dtype=like.dtype, device=like.device)
            return (left @ (given if given.ndim == 2 else given.reshape(-1))).detach().cpu().numpy()

        return apply

    forward, transposed = product(jac), product(jac.T)
    return LinearOperator(jac.shape, forward, transposed, forward, dtype, transposed)
