"""What the processes of ``test_distributed.py`` do with models that are sharded by ``fully_shard``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from distributed_cases import MODELS, losses_of, make, own, sizes_of
from torch import Tensor, nn
from traffic_cases import tasks

import gramjd
from gramjd.distributed import local_weights
from gramjd.weighting import upgrad


def sharded(name: str, rank: int, size: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A model with a unit for each child that has parameters, and one for the rest."""
    from torch.distributed.fsdp import fully_shard

    model, x, y = make(name, sum(sizes_of(size)))
    for child in list(model.children())[1:]:
        if next(child.parameters(), None) is not None:
            fully_shard(child)
    return fully_shard(model), *own(rank, size, x, y)


def gathered(model: nn.Module) -> list[Any]:
    """Storages of parameters as modules hold them that are no shards."""
    return [p for p in model.parameters() if not hasattr(p, "full_tensor")]


def whole(model: nn.Module) -> list[Tensor]:
    """Gradients of all ranks' shards together."""
    found = [p.grad.full_tensor() for p in model.parameters()]
    model.zero_grad()
    return found


def case_sharded(rank: int, size: int) -> Any:
    """Gramians and steps of two rounds: the second by what was measured in the first."""
    group, found = dist.group.WORLD, {}
    for name in MODELS:
        model, x, y = sharded(name, rank, size)
        engine = gramjd.Engine(model, batch_dim=0)
        for way in ("autograd", "jacobian"):
            losses = losses_of(model, x, y)
            gramian = engine.compute_gramian(losses, group=group)
            weights = upgrad(gramian)
            share = local_weights(weights, losses, group)
            (losses if way == "autograd" else engine.jacobian(losses)).backward(share)
            if way == "jacobian":
                del losses
            found[(name, way)] = gramian, weights, whole(model)
    return found


def case_sharded_sums(rank: int, size: int) -> Any:
    group, found = dist.group.WORLD, {}
    for name in MODELS:
        model, x, y = sharded(name, rank, size)
        engine = gramjd.Engine(model, batch_dim=None)
        losses = tasks(model, x, y)
        gramian = engine.compute_gramian(losses, group=group)
        weights = upgrad(gramian)
        losses.backward(local_weights(weights, losses, group, batch_dim=None))
        found[name] = gramian, weights, whole(model)
    return found
