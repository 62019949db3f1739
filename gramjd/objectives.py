"""Turns the losses and the weighting of a user into one output and its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gramjd import gramians
from gramjd.complexes import as_real
from gramjd.rounding import own_precision

Losses = Tensor | Sequence[Tensor]
Weights = Callable[[Tensor], Tensor]  # from a Gramian


def joined(losses: Losses, batch_dim: int | None) -> Any:
    """One output of several losses; a tensor as it is.

    Without a batch dimension their entries become one vector, one loss after the other. With one, losses
    of equal shape are stacked along a new dimension: the last one, or the first where ``batch_dim``
    counts from the end, so that it names the samples of each loss and of the result.

    Raises:
        ValueError: there is none, their shapes differ, or they have no dimension ``batch_dim``.
        TypeError: one of them is not a tensor.
    """
    if not isinstance(losses, (list, tuple)):
        return losses
    _check(losses)
    with torch.enable_grad():
        if batch_dim is None:
            return torch.cat([loss.reshape(-1) for loss in losses])
        shapes = {tuple(loss.shape) for loss in losses}
        if len(shapes) > 1 or not all(-len(shape) <= batch_dim < len(shape) for shape in shapes):
            raise ValueError(
                f"With batch_dim={batch_dim}, losses in a {type(losses).__name__} have one shape, with that "
                f"dimension for the samples; got {[list(loss.shape) for loss in losses]}. Pass losses that "
                "still have their batch dimension (reduction='none'), or use batch_dim=None."
            )
        return torch.stack(list(losses), -1 if batch_dim >= 0 else 0)


@own_precision
def combined(outputs: Losses, cotangents: Tensor | Sequence[Tensor | None]) -> Tensor:
    """``[m]``, whose Jacobian is that of the outputs times cotangents ``[m, *output.shape]`` of each.

    An output may have none, which means zeros.

    Raises:
        ValueError: cotangents do not fit the outputs.
        TypeError: one of them is not a tensor.
    """
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    given = [cotangents] if isinstance(cotangents, Tensor) else list(cotangents)
    _check(outputs)
    if len(given) != len(outputs):
        raise ValueError(f"There are {len(given)} jac_outputs for {len(outputs)} outputs; give one for each.")
    pairs = [(out, c) for out, c in zip(outputs, given, strict=True) if c is not None]
    _check([c for _, c in pairs])
    rows = {len(c) if c.ndim else None for _, c in pairs}
    for out, c in pairs:
        if c.shape[1:] != out.shape or len(rows) > 1 or None in rows:
            raise ValueError(
                f"The jac_outputs of an output of shape {list(out.shape)} have shape [m, *output.shape], "
                f"with the same m for all outputs; got {list(c.shape)}."
            )
    with torch.enable_grad():
        shares = [
            as_real(c.detach().to(out)).reshape(len(c), -1) @ as_real(out).reshape(-1) for out, c in pairs
        ]
        return torch.stack(shares).sum(0)


def _check(losses: Sequence[Any]) -> None:
    if not losses:
        raise ValueError("There are no losses. Pass a tensor of losses, or at least one of them in a list.")
    for loss in losses:
        if not isinstance(loss, Tensor):
            raise TypeError(f"Expected a tensor or a list of tensors, got a {type(loss).__name__} in a list.")
    if len(devices := {loss.device for loss in losses}) > 1:
        raise ValueError(f"All tensors must be on one device, not {sorted(map(str, devices))}: move them.")


def weigh(
    weighting: Weights, gramian: Tensor, shape: Sequence[int], *, flat: bool = False, scale: float = 1.0
) -> Tensor:
    """Weights of the losses' ``shape`` from their Gramian, detached.

    Args:
        weighting: from a Gramian to one weight for each objective.
        gramian: generalized, ``[*shape, *reversed(shape)]``.
        shape: of the losses.
        flat: whether the weighting takes ``[m, m]`` and returns ``[m]``.
        scale: what the losses were multiplied with, which the weighting shall not see.

    Raises:
        TypeError: the weighting is no function, or does not return a tensor.
        ValueError: its weights have another shape, or are NaN or infinite.
    """
    if not callable(weighting):
        raise TypeError(
            "The weighting must be a function of the Gramian, such as gramjd.weighting.upgrad; "
            f"got {weighting!r}."
        )
    if scale != 1.0:
        gramian = gramian / scale / scale
    weights: Any = weighting(gramians.flatten(gramian) if flat else gramian)
    if not isinstance(weights, Tensor):
        raise TypeError(
            f"{_name(weighting)} returned a {type(weights).__name__}; it must return a tensor of weights."
        )
    want = torch.Size([torch.Size(shape).numel()]) if flat else torch.Size(shape)
    if weights.shape != want:
        more = "" if flat else " (flat=True gives it the Gramian as a matrix, which TorchJD's need)"
        raise ValueError(
            f"{_name(weighting)} returned weights of shape {list(weights.shape)} for {list(want)} "
            f"objectives; there must be one for each{more}."
        )
    if not bool(torch.isfinite(weights).all()):
        raise not_finite(weighting, weights)
    return weights.detach().reshape(tuple(shape))


def not_finite(weighting: object, weights: Tensor) -> ValueError:
    """The error for weights that no gradient can be made of."""
    return ValueError(f"{_name(weighting)} returned weights that are NaN or infinite: {weights}.")


def _name(weighting: object) -> str:
    return getattr(weighting, "__name__", type(weighting).__name__)
