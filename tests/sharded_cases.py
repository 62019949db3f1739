"""What the processes of ``test_distributed.py`` do with models that are sharded by ``fully_shard``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from distributed_cases import MODELS, losses_of, make, own, sizes_of
from torch import Tensor, nn
from traffic_cases import tasks

import gramjd
from gramjd.distributed import local_weights
from gramjd.engine.sharded import Lockstep
from gramjd.weighting import upgrad


def sharded(name: str, rank: int, size: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A model with a unit for each child that has parameters, and one for the rest."""
    from torch.distributed.fsdp import fully_shard

    model, x, y = make(name, sum(sizes_of(size)))
    for child in list(model.children())[1:]:
        if next(child.parameters(), None) is not None:
            fully_shard(child)
    return fully_shard(model), *own(rank, size, x, y)


@contextmanager
def gathered() -> Iterator[list[str]]:
    """The types of the units that are gathered for the sake of their blocks."""
    found: list[str] = []
    gather = Lockstep.gather

    def watching(self: Lockstep, nodes: Any) -> Any:
        found.extend(type(unit).__name__ for unit in self.units_of(nodes))
        return gather(self, nodes)

    with mock.patch.object(Lockstep, "gather", watching):
        yield found


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
            with gathered() as units:
                gramian = engine.compute_gramian(losses, group=group)
            weights = upgrad(gramian)
            share = local_weights(weights, losses, group)
            (losses if way == "autograd" else engine.jacobian(losses)).backward(share)
            found[(name, way)] = gramian, weights, whole(model), units
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


class Scale(torch.autograd.Function):
    """The product with a parameter, out of sight of any rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return x * scale

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, scale = ctx.saved_tensors
        return g * scale, (g * x).sum(0)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return Scale.apply(x, self.scale)


def case_sharded_refused(rank: int, size: int) -> Any:
    """A loss that is not finite on one rank, and a parameter that no rule covers."""
    from torch.distributed.fsdp import fully_shard

    found = {}
    torch.manual_seed(0)
    model = fully_shard(nn.Sequential(nn.Linear(4, 3).double(), fully_shard(Scaled())))
    engine = gramjd.Engine(model, batch_dim=0)
    for name, factor in (("finite", float("nan") if rank == size - 1 else 1.0), ("covered", 1.0)):
        try:
            engine.compute_gramian(factor * model(torch.ones(2, 4).double()).square().sum(1))
        except gramjd.GramjdError as error:
            found[name] = type(error).__name__, str(error)
    return found
