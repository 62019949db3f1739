"""``Problem``: a model, a batch and the objectives, which every implementation gets alike."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Outcome(NamedTuple):
    """What a step computed: what an implementation has no notion of is ``None``."""

    gramian: Tensor | None  # generalized, or [m, m]
    gradient: Sequence[Tensor] | None  # in order of the trainable parameters


Step = Callable[[], Outcome]


class NotApplicable(Exception):
    """An implementation has no meaning for a case; the message says why."""


@dataclass(frozen=True)
class Problem:
    """A case with its sizes chosen, on a device.

    Args:
        model: in training mode, without dropout.
        inputs: of the model, samples first.
        targets: of the loss, samples first.
        loss: ``loss(output, *targets)``, the objectives ``[B, *S]`` of a batch.
        batch_dim: 0, or ``None`` if the objectives are no samples.
        kernel: the Gramian alone is asked for, no weighted gradient.
    """

    model: nn.Module
    inputs: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]
    loss: Callable[..., Tensor]
    batch_dim: int | None = 0
    kernel: bool = False
    weights: Tensor | None = None  # None: of the mean

    def objectives(self) -> Tensor:
        """One forward pass."""
        return self.loss(self.model(*self.inputs), *self.targets)

    def weights_like(self, objectives: Tensor) -> Tensor:
        """The weights of the step, shaped like the objectives."""
        if self.weights is not None:
            return self.weights
        return torch.full_like(objectives, 1 / objectives.numel())

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, each once."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def gradient(self) -> list[Tensor]:
        """What a backward pass has left in ``.grad``."""
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]

    def clear(self) -> None:
        """Drop the gradients of the step before."""
        for p in self.parameters:
            p.grad = None

    def copied(self) -> Problem:
        """The same with a model of its own, which no hook of another's reaches."""
        return replace(self, model=copy.deepcopy(self.model))

    def moved(self, to: Any) -> Problem:
        """On a device, or in a dtype; indices stay integers."""

        def move(x: Tensor) -> Tensor:
            return x.to(to) if x.is_floating_point() or not isinstance(to, torch.dtype) else x

        return replace(
            self,
            model=copy.deepcopy(self.model).to(to),
            inputs=tuple(map(move, self.inputs)),
            targets=tuple(map(move, self.targets)),
            weights=None if self.weights is None else move(self.weights),
        )


def sgd(problem: Problem) -> Step:
    """The plain step that everything is compared with: forward, and backward of the mean."""

    def step() -> Outcome:
        problem.clear()
        problem.objectives().mean().backward()
        return Outcome(None, problem.gradient())

    return step
