"""What the processes of ``test_descent_ranks.py`` do: steps in one call over a process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from distributed_cases import losses_of, make, own, sizes_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gramjd
from gramjd.weighting import upgrad

LAYERS = {"first": ["0.weight", "0.bias"], "rest": ["2.weight", "2.bias", "4.weight", "4.bias"]}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def task_losses(model: nn.Module, x: Tensor, y: Tensor, samples: int) -> Tensor:
    """``[2]``, the shares of a rank in two sums over all samples."""
    out = model(x)
    shares = F.cross_entropy(out, y, reduction="sum"), out.square().sum()
    return torch.stack(shares) / samples


def case_step(rank: int, size: int) -> Any:
    """Under ``DistributedDataParallel``, and with gradients that the loop adds up itself."""
    found = {}
    samples = sum(sizes_of(size))
    group = dist.group.WORLD
    for partial in (False, True):
        model, x, y = make("mlp", samples)
        x, y = own(rank, size, x, y)
        engine = gramjd.Engine(model[2] if partial else model, batch_dim=0)
        wrapped = DistributedDataParallel(model)
        weights = engine.backward(losses_of(wrapped, x, y), upgrad, group=group)
        found["partial" if partial else "averaged"] = weights, gradients(model)
    model, x, y = make("mlp", samples)
    x, y = own(rank, size, x, y)
    engine = gramjd.Engine(model, batch_dim=0)
    given: dict[str, Any] = {"group": group, "averaged": False}
    found["summed"] = engine.backward(losses_of(model, x, y), upgrad, **given), gradients(model)
    found["groups"] = engine.backward(losses_of(model, x, y), upgrad, per=LAYERS, **given), gradients(model)
    tasks = gramjd.Engine(model, batch_dim=None)
    losses = list(task_losses(model, x, y, samples))
    found["tasks"] = tasks.backward(losses, upgrad, **given), gradients(model)
    losses = list(task_losses(model, x, y, samples))
    weights = upgrad(tasks.compute_gramian(losses, group=group))
    share = gramjd.distributed.local_weights(weights, losses, group, batch_dim=None, averaged=False)
    torch.stack(losses).backward(share)
    found["by hand"] = weights, gradients(model)
    for name in ("summed", "groups", "tasks", "by hand"):
        for g in found[name][1].values():
            dist.all_reduce(g)
    return found
