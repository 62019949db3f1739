"""Cases of fully connected layers: A, D, I and J."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases.objectives import Several, cross_entropy, outputs
from benchmarks.problem import Problem


def layers(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers, ReLU between them."""
    each = [module for i, o in itertools.pairwise(sizes) for module in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*each[:-1])


def mlp(batch: int = 64, width: int = 1024, depth: int = 4, objectives: int = 1) -> Problem:
    """A: hidden layers of one width, one loss per sample, or several."""
    loss = cross_entropy if objectives == 1 else Several(10, objectives)
    model = layers([width] * (depth + 1) + [10])
    return Problem(model, (torch.randn(batch, width),), (torch.randint(0, 10, (batch,)),), loss)


def kernel(batch: int = 128, inputs: int = 784, width: int = 512, depth: int = 2,
           objectives: int = 10) -> Problem:  # fmt: skip
    """D: the full kernel of all logits."""
    model = layers([inputs] + [width] * depth + [objectives])
    return Problem(model, (torch.randn(batch, inputs),), (), outputs, kernel=True)


class SharedTrunk(nn.Module):
    """One trunk, and a head for each of four regression tasks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.trunk = layers([64, width, width, width])
        self.heads = nn.ModuleList(nn.Linear(width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.trunk(x))
        return torch.cat([head(h) for head in self.heads], 1)  # [B, 4]


def _task_losses(predicted: Tensor, wanted: Tensor) -> Tensor:
    return (predicted - wanted).square().mean(0)  # [4]


def tasks(batch: int = 256, width: int = 512) -> Problem:
    """I: one loss per task, each of the whole batch."""
    data = (torch.randn(batch, 64),), (torch.randn(batch, 4),)
    return Problem(SharedTrunk(width), *data, _task_losses, batch_dim=None)


def _two_losses(output: Tensor, labels: Tensor, values: Tensor) -> Tensor:
    return torch.stack([cross_entropy(output[:, :-1], labels), (output[:, -1] - values).square()], 1)


def two_losses(batch: int = 32, width: int = 512) -> Problem:
    """J: a classification and a regression loss for each sample."""
    targets = torch.randint(0, 10, (batch,)), torch.randn(batch)
    return Problem(layers([128, width, width, width, 11]), (torch.randn(batch, 128),), targets, _two_losses)
