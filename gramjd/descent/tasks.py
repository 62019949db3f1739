"""``mtl_backward``: heads follow their own losses, what they share follows the weighted gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gramjd import distributed
from gramjd.descent.jacobians import Inputs
from gramjd.descent.parts import Part, Parts
from gramjd.engine.step import Scaled
from gramjd.objectives import Losses, Weights, combined


def mtl_backward(losses: Losses, features: Losses, weighting: Weights, *, shared: Inputs = None,
                 tasks: Sequence[Inputs] | None = None, wrt: str = "shared",
                 grad_tensors: Sequence[Tensor] | None = None, retain_graph: bool = False,
                 scaler: Any = None, chunk_size: int | None = None, group: Any = None, averaged: bool = True
                 ) -> Tensor:  # fmt: skip
    """A step of several tasks that share an encoder: each head by its own loss, the encoder by all of them.

    Each task's own parameters get the plain gradient of its loss. The shared parameters get ``Jᵀ w``, where
    ``J`` has a row for each task, and the weights ``w`` are computed from ``J Jᵀ``. A step takes one backward
    pass through each head, and one through the encoder for each task. With ``wrt="features"``, one pass
    through the encoder is enough. If the forward pass was recorded (:func:`gramjd.record`, an ``Engine``),
    the encoder's Jacobian is made of factors.

    Args:
        losses: one scalar loss for each task, in a list or in one tensor ``[tasks]``.
        features: the outputs of the encoder that the heads use: a tensor, or several, of which a task may use
            some. All paths from the losses to shared parameters must go through them.
        weighting: a function from the Gramian ``[tasks, tasks]`` to weights ``[tasks]``.
        shared: the modules or tensors of the encoder; by default all leaves that the features depend on.
            Frozen parameters of modules take no part.
        tasks: the modules or tensors of each task's head; by default all leaves that its loss depends on by a
            path outside of the features. A parameter of several tasks gets the sum of their gradients. A
            parameter that neither ``shared`` nor ``tasks`` names gets none.
        wrt: compute the Gramian with respect to the ``"shared"`` parameters, or to the ``"features"``
            (MGDA-UB, an upper bound: Sener and Koltun, arXiv 1810.04650, Section 3.2).
        grad_tensors: cotangents of losses that are not scalars, as in ``torch.autograd.backward``.
        retain_graph: with ``wrt="features"``, whether the encoder's part of the graph is kept, as in
            ``torch``. The rest of the graph stays until you delete the losses.
        scaler: a ``GradScaler``, as in :meth:`gramjd.Engine.backward`.
        chunk_size: as in :func:`gramjd.jac`.
        group: a ``torch.distributed`` process group, or a ``DeviceMesh`` of one dimension. Each rank calls
            this function for its own samples. The loss of a task is the sum of its ``losses`` over ranks, so
            divide sums over samples by the number of all samples. The Gramian is that of the sums, and the
            weights are the same on every rank.
        averaged: with a group, whether gradients are averaged over it, as by ``DistributedDataParallel``;
            ``False`` for a training loop that adds up the ranks' gradients by itself.

    Returns:
        The weights ``[tasks]``, detached.

    Raises:
        NotCoveredError: features have no graph, or no loss depends on them.
        ValueError: a loss depends on shared parameters by a path outside of the features; a parameter is
            both shared and a task's, or listed for a task whose loss does not depend on it; a feature is
            computed from another; a loss is not a scalar.
        NotFiniteError: losses or their Gramian have NaN or infinite entries.
        TypeError: the arguments hold something else than tensors; a parameter is sharded over ranks.
        RanksDisagreeError: ranks have other tasks, parameters or options; all of them raise it.
        RankFailedError: another rank could not take part; it raises what it failed by.

    Examples:
        >>> features = encoder(input)
        >>> losses = [criterion(head(features), y) for head, y in zip(heads, targets)]
        >>> weights = gramjd.mtl_backward(losses, features, UPGradWeighting())
    """

    def own() -> Part:
        """Compute the share of this process."""
        if wrt not in ("shared", "features"):
            raise ValueError(f"wrt must be 'shared' or 'features', not {wrt!r}.")
        apart = losses.unbind() if isinstance(losses, Tensor) and losses.ndim else losses
        each = _listed(apart, "losses")
        parts = Parts.of(each, _listed(features, "features"), shared, tasks)
        return Part(parts, Scaled.by(scaler, _contracted(each, grad_tensors)), wrt)

    if group is None:
        part = own()
        weights: Tensor = part.total.attempt(
            lambda: part.differentiated(chunk_size).step(weighting, retain_graph), part.parts.leaves
        )
        return weights
    first = losses if isinstance(losses, Tensor) else next(iter(losses), None)
    with distributed.taking_part(group, getattr(first, "device", torch.device("cpu"))):
        part = own().differentiated(chunk_size)
    return part.step(weighting, retain_graph, group, averaged)


def _listed(tensors: Any, what: str) -> list[Tensor]:
    """A list of tensors, none of them twice."""
    found = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    if not found:
        raise ValueError(f"There are no {what}.")
    for t in found:
        if not isinstance(t, Tensor):
            raise TypeError(f"{what} must be a tensor or a list of tensors, not of {type(t).__name__}.")
    if len({id(t) for t in found}) < len(found):
        raise ValueError(f"One of the {what} is given twice.")
    return found


def _contracted(losses: Sequence[Tensor], cotangents: Sequence[Tensor] | None) -> Tensor:
    """A scalar for each task, ``[tasks]``."""
    if cotangents is None:
        shapes = [list(loss.shape) for loss in losses if loss.ndim]
        if shapes:
            raise ValueError(
                f"The loss of a task is a scalar, but one has shape {shapes[0]}. Take its mean or sum, or "
                "pass grad_tensors."
            )
        with torch.enable_grad():
            return torch.stack([loss.to(losses[0].device) for loss in losses])
    if len(cotangents) != len(losses):
        raise ValueError(f"There are {len(cotangents)} grad_tensors for {len(losses)} losses.")
    with torch.enable_grad():
        pairs = zip(losses, cotangents, strict=True)
        each = [combined(loss, cotangent.unsqueeze(0)) for loss, cotangent in pairs]
        return torch.cat([mine.to(losses[0].device) for mine in each])
