"""What the processes of ``test_tasks_ranks.py`` do: ``mtl_backward`` over a process group."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from distributed_cases import own, sizes_of
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gramjd
from gramjd.weighting import mgda, upgrad

WEIGHTING: dict[str, Any] = {"shared": upgrad, "features": mgda}


class Net(nn.Module):
    """Two features; the first of three heads uses one of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 4)
        self.heads = nn.ModuleList([nn.Linear(6, 1), nn.Linear(10, 2), nn.Linear(4, 1)])
        self.double()

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        shared = torch.tanh(self.first(x))
        f, g = torch.sin(shared), torch.tanh(self.second(shared))
        inputs = [f, torch.cat([f, g], 1), g]
        return [f, g], [head(x) for head, x in zip(self.heads, inputs, strict=True)]


def data(samples: int) -> Tensor:
    return torch.randn(samples, 3, generator=torch.Generator().manual_seed(5)).double()


def losses_of(outputs: list[Tensor], samples: int) -> list[Tensor]:
    """Shares in sums over all samples."""
    a, b, c = outputs
    return [
        (a - 1).square().sum() / samples,
        10 * (b + 1).square().sum() / samples,
        (c + 2).abs().sum() / samples,
    ]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def case_tasks(rank: int, size: int) -> Any:
    """With gradients that the loop adds up itself, and under ``DistributedDataParallel``."""
    samples, group = sum(sizes_of(size)), dist.group.WORLD
    (x,) = own(rank, size, data(samples))
    found: dict[Any, Any] = {}
    for wrt, weighting in WEIGHTING.items():
        for kind in ("summed", "recorded", "averaged"):
            model = Net()
            wrapped = DistributedDataParallel(model) if kind == "averaged" else model
            with gramjd.record(model) if kind == "recorded" else nullcontext():
                features, outputs = wrapped(x)
            weights = gramjd.mtl_backward(
                losses_of(outputs, samples), features, weighting, wrt=wrt, group=group,
                averaged=kind == "averaged",
            )  # fmt: skip
            grads = gradients(model)
            if kind != "averaged":
                for g in grads.values():
                    dist.all_reduce(g)
            found[wrt, kind] = weights, grads
    return found


def case_mistakes(rank: int, size: int) -> Any:
    """Of one rank alone: the others learn of it, and nothing is added to any gradient."""
    samples, group = sum(sizes_of(size)), dist.group.WORLD
    (x,) = own(rank, size, data(samples))
    found: dict[str, str] = {}

    def attempt(name: str, **given: Any) -> None:
        model = Net()
        features, outputs = model(x)
        losses = losses_of(outputs, samples)
        if name == "infinite" and rank == 0:
            losses[1] = losses[1] * torch.inf
        if name == "fewer tasks" and rank == 0:
            losses = losses[1:]
        try:
            gramjd.mtl_backward(losses, features, upgrad, group=group, **given)
        except Exception as error:
            found[name] = type(error).__name__
        assert not gradients(model)

    attempt("infinite")
    attempt("fewer tasks")
    attempt("wrt", wrt="shared" if rank == 0 else "features")
    attempt("unknown", wrt="trunk")
    return found
