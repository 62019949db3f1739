"""``grad`` and ``grad_and_value``: the weighted gradient of a pure function, as ``torch.func.grad``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, Literal, overload

import torch
from torch import Tensor

from gramjd import pytree
from gramjd.functional.arguments import InDims
from gramjd.functional.transforms import Argnums, In, Out, Rest, jacobian_and_value
from gramjd.internals import value_of
from gramjd.jacobian import Jacobian
from gramjd.objectives import Weights, not_finite
from gramjd.pytree import PyTree

if TYPE_CHECKING:
    from typing_extensions import TypedDict, Unpack

    class _Options(TypedDict, total=False):
        randomness: str
        chunk_size: int | None
        flat: bool


# fmt: off
@overload
def grad(func: Callable[Concatenate[In, Rest], Out], weighting: Weights, argnums: Literal[0] = 0,
         in_dims: InDims = ..., *, has_aux: Literal[False] = False, **options: Unpack[_Options]
         ) -> Callable[..., In]: ...
@overload
def grad(func: Callable[Concatenate[In, Rest], tuple[Out, Any]], weighting: Weights, argnums: Literal[0] = 0,
         in_dims: InDims = ..., *, has_aux: Literal[True], **options: Unpack[_Options]
         ) -> Callable[..., tuple[In, Any]]: ...
@overload
def grad(func: Callable[..., Out], weighting: Weights, argnums: Argnums, in_dims: InDims = ..., *,
         has_aux: Literal[False] = False, **options: Unpack[_Options]) -> Callable[..., Any]: ...
@overload
def grad(func: Callable[..., tuple[Out, Any]], weighting: Weights, argnums: Argnums, in_dims: InDims = ..., *,
         has_aux: Literal[True], **options: Unpack[_Options]) -> Callable[..., tuple[Any, Any]]: ...
@overload
def grad(func: Callable[..., Any], weighting: Weights, argnums: Argnums = ..., in_dims: InDims = ..., *,
         has_aux: bool, **options: Unpack[_Options]) -> Callable[..., Any]: ...
# fmt: on


def grad(
    func: Callable[..., Any],
    weighting: Weights,
    argnums: Argnums = 0,
    in_dims: InDims = 0,
    *,
    has_aux: bool = False,
    randomness: str = "error",
    chunk_size: int | None = None,
    flat: bool = False,
) -> Callable[..., Any]:
    """Transform a per-sample function into one that returns its weighted gradient ``Jᵀ w`` over a batch.

    As ``torch.func.grad``, but of many losses at once: the weights ``w = weighting(J Jᵀ)`` come from the
    Gramian of their gradients.

    Args:
        func: a pure function of one sample, ``func(params, *sample) -> losses``, as in :func:`jacobian`.
        weighting: a function from the Gramian, ``[B, *S, *reversed(S), B]`` for losses of shape ``S`` per
            sample, to weights ``[B, *S]``. If ``func`` returns several tensors, it gets the Gramian of all
            losses as a matrix and returns a vector, both in the order of the flattened leaves.
        argnums, in_dims, has_aux, randomness, chunk_size: as in :func:`jacobian`.
        flat: whether the weighting takes ``[m, m]`` and returns ``[m]`` also for one tensor of losses.

    Returns:
        A function of ``func``'s arguments, batched as ``in_dims`` says, that returns gradients in the
        structure, shapes and dtypes of the argument that ``argnums`` names (a tuple for several);
        ``(gradients, aux)`` if ``has_aux``.

    Raises:
        TypeError, ValueError: as :func:`jacobian`; the weights are no tensor, not shaped like the losses, or
            not finite. The last is not raised inside transforms and graphs, where values are not known.

    Examples:
        >>> gradients = gramjd.grad(per_sample_loss, upgrad)(params, inputs, targets)
    """
    whole = grad_and_value(
        func, weighting, argnums, in_dims,
        has_aux=has_aux, randomness=randomness, chunk_size=chunk_size, flat=flat,
    )  # fmt: skip

    def transformed(*args: Any, **kwargs: Any) -> Any:
        found, value = whole(*args, **kwargs)
        return (found, value[1]) if has_aux else found

    return transformed


# fmt: off
@overload
def grad_and_value(func: Callable[Concatenate[In, Rest], Out], weighting: Weights, argnums: Literal[0] = 0,
                   in_dims: InDims = ..., *, has_aux: Literal[False] = False, **options: Unpack[_Options]
                   ) -> Callable[..., tuple[In, Out]]: ...
@overload
def grad_and_value(func: Callable[Concatenate[In, Rest], tuple[Out, Any]], weighting: Weights,
                   argnums: Literal[0] = 0, in_dims: InDims = ..., *, has_aux: Literal[True],
                   **options: Unpack[_Options]) -> Callable[..., tuple[In, tuple[Out, Any]]]: ...
@overload
def grad_and_value(func: Callable[..., Out], weighting: Weights, argnums: Argnums, in_dims: InDims = ..., *,
                   has_aux: Literal[False] = False, **options: Unpack[_Options]
                   ) -> Callable[..., tuple[Any, Out]]: ...
@overload
def grad_and_value(func: Callable[..., tuple[Out, Any]], weighting: Weights, argnums: Argnums,
                   in_dims: InDims = ..., *, has_aux: Literal[True], **options: Unpack[_Options]
                   ) -> Callable[..., tuple[Any, tuple[Out, Any]]]: ...
@overload
def grad_and_value(func: Callable[..., Any], weighting: Weights, argnums: Argnums = ...,
                   in_dims: InDims = ..., *, has_aux: bool, **options: Unpack[_Options]
                   ) -> Callable[..., tuple[Any, Any]]: ...
# fmt: on


def grad_and_value(
    func: Callable[..., Any],
    weighting: Weights,
    argnums: Argnums = 0,
    in_dims: InDims = 0,
    *,
    has_aux: bool = False,
    randomness: str = "error",
    chunk_size: int | None = None,
    flat: bool = False,
) -> Callable[..., tuple[PyTree, Any]]:
    """Like :func:`grad`, but return the losses, too, from one run of the function.

    The arguments are those of :func:`grad`.

    Returns:
        A function that returns ``(gradients, losses)``, or ``(gradients, (losses, aux))`` if ``has_aux``, as
        ``torch.func.grad_and_value``; losses are ``[B, *S]``.

    Raises:
        TypeError, ValueError: as :func:`grad`.
    """
    lazy = jacobian_and_value(
        func, argnums, in_dims, has_aux=has_aux, randomness=randomness, chunk_size=chunk_size
    )

    def transformed(*args: Any, **kwargs: Any) -> tuple[PyTree, Any]:
        jac, value = lazy(*args, **kwargs)
        return jac.vjp(_weights(weighting, jac, flat)), value

    return transformed


def _weights(weighting: Weights, jac: Jacobian, flat: bool) -> PyTree:
    """Weights in the structure of the outputs."""
    if flat or len(jac.outputs.each) > 1:
        weights = _checked(weighting, jac @ jac.T, (jac.outputs.rows,))
        return jac.outputs.unravel(weights)
    out = jac.outputs.each[0]
    (gramian,) = pytree.leaves(jac.gramian())
    return pytree.unflatten(jac.outputs.spec, [_checked(weighting, gramian, out.shape)])


def _checked(weighting: Weights, gramian: Tensor, shape: tuple[int, ...]) -> Tensor:
    weights: Any = weighting(gramian)
    if not isinstance(weights, Tensor) or tuple(weights.shape) != shape:
        got = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(
            f"The weighting must return a tensor of one weight for each loss, {list(shape)}; got {got}."
        )
    if value_of(torch.isfinite(weights).all()) is False:
        raise not_finite(weighting, weights)
    return weights
