"""Computes each rank's share of the weights of all objectives, for its backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gramjd.distributed.ranks import Ranks
from gramjd.objectives import Losses, joined


def local_weights(weights: Tensor, output: Losses, group: Any, *, batch_dim: int | None = 0,
                  averaged: bool = True) -> Tensor:  # fmt: skip
    """This rank's share of the weights of all ranks' objectives, for its own backward pass.

    Pass the share to ``output.backward(share)`` or ``J.backward(share)``. Under ``DistributedDataParallel``
    or ``fully_shard``, every rank then gets the gradients that one process with all samples would get. These
    wrappers divide the sum of the gradients by the number of ranks, so the share is multiplied by it.

    Args:
        weights: the weights of all ranks' objectives, in order of ranks; the same on every rank.
        output: this rank's objectives, of which only the shape counts; or a list or tuple of them, as in
            :meth:`gramjd.Engine.compute_gramian`.
        group: the process group over which gradients are averaged; each of its ranks calls this function.
        batch_dim: the dimension of the samples. ``None``: the objectives are sums over ranks, and each rank
            uses all weights for its share of the sums.
        averaged: ``False`` for a training loop that adds up the gradients of all ranks itself.

    Returns:
        Weights of the shape of ``output``, detached.

    Raises:
        ValueError: the weights are not shaped like the objectives of all ranks; every rank raises it.
    """
    own: Tensor = joined(output, batch_dim)
    ranks = Ranks.of(group, own.device)
    shapes: list[tuple[tuple[int, ...], tuple[int, ...]]]
    shapes = ranks.gather_objects((tuple(weights.shape), tuple(own.shape)))
    sizes = [_samples(shape, batch_dim) for _, shape in shapes]
    for rank, (given, shape) in enumerate(shapes):
        want = list(shape)
        if batch_dim is not None and shape:
            want[batch_dim % len(shape)] = sum(sizes)
        if list(given) != want:
            raise ValueError(
                f"On rank {rank} the weights have shape {list(given)}, and all objectives {want} "
                f"(its own {list(shape)}, batch_dim={batch_dim}). Pass the weights of the whole Gramian."
            )
    mine = weights.detach()
    if batch_dim is not None:
        mine = mine.narrow(batch_dim, sum(sizes[: ranks.rank]), sizes[ranks.rank])
    return mine * (ranks.size if averaged else 1)


def is_sharded(parameter: Tensor) -> bool:
    """Whether a parameter is a ``DTensor``, of which each rank has a shard."""
    return hasattr(type(parameter), "full_tensor")


def are_sharded(parameters: Sequence[Tensor]) -> list[bool]:
    """The same of several parameters."""
    return [hasattr(type(p), "full_tensor") for p in parameters]


def averaged(gradient: Tensor, parameter: Any) -> Tensor:
    """This rank's gradient of a parameter; of a sharded one, its shard of the average over all ranks."""
    if not hasattr(type(parameter), "full_tensor"):  # is_sharded: asked of every gradient of every step
        return gradient
    from torch.distributed.tensor import DTensor, Partial  # where parameters are sharded, there is one

    mesh = parameter.device_mesh
    mine = DTensor.from_local(gradient / mesh.size(), mesh, [Partial()] * mesh.ndim, run_check=False)
    return mine.redistribute(placements=parameter.placements)


def _samples(shape: tuple[int, ...], batch_dim: int | None) -> int:
    return 0 if batch_dim is None or not -len(shape) <= batch_dim < len(shape) else shape[batch_dim]
