"""dattri-llm: factors of per-sample gradients by hooks of layers, and their inner products."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.implementations.rows import on_path
from benchmarks.problem import NotApplicable, Outcome, Problem, Step


def dattri_llm(problem: Problem) -> Step:
    """Inner products by the cheaper of its two routes, then an ordinary backward pass with the weights."""
    if problem.batch_dim is None:
        raise NotApplicable("gradients of samples only, and the objectives are none")
    on_path()
    from dattri_llm import REGISTER_ALL, HookManager, HookManagerConfig

    manager = HookManager(problem.model, HookManagerConfig(linear_io=REGISTER_ALL))
    return Inner(problem, manager)


class Inner:
    """A step, which knows after a call which parameters its inner products cover."""

    def __init__(self, problem: Problem, manager: Any) -> None:
        self.problem, self.manager = problem, manager
        self.layers: list[str] = []

    def __call__(self) -> Outcome:
        problem = self.problem
        problem.clear()
        first = self._objectives()
        captured = [self._captured(first, 0)]
        for number in range(1, first[0].numel()):  # a forward pass each: a capture ends with its backward
            captured.append(self._captured(self._objectives(), number))
        count, samples = len(captured), len(first)
        gramian = self._products(_concatenated(captured), count * samples)
        gramian = gramian.view(count, samples, count, samples).transpose(0, 1).transpose(2, 3)
        gramian = gramian.reshape(count * samples, count * samples)
        if problem.kernel:
            return Outcome(gramian, None)
        problem.clear()
        first.backward(problem.weights_like(first))
        return Outcome(gramian, problem.gradient())

    def _products(self, gradient: Any, rows: int) -> Tensor:
        """Inner products of rows, summed over layers.

        A layer without a batch dimension, such as an embedding of positions, has no rows of samples.
        """
        products: dict[str, Tensor] = gradient.similarity(gradient, reduce="none")
        mine = {name: found for name, found in products.items() if len(found) == rows}
        self.layers = list(mine)
        return reduce(torch.add, mine.values())

    def _objectives(self) -> Tensor:
        """With the hooks on; the manager has no switch but the one of its context."""
        self._context = self.manager.collect()
        self._context.__enter__()
        return self.problem.objectives()

    def _captured(self, objectives: Tensor, number: int) -> Any:
        """The gradients of one objective of each sample, by a backward pass of activations alone."""
        one = objectives.flatten(1)[:, number] if objectives.ndim > 1 else objectives
        one.sum().backward(retain_graph=number == 0, inputs=self._inputs())
        found = self.manager.get_gradient()
        self._context.__exit__(None, None, None)
        return found

    def _inputs(self) -> Sequence[nn.Parameter]:
        """Of the hooked backward pass: the weights of the first layer, so that it computes no others."""
        return list(self.problem.model.get_submodule(self.manager.layer_names[0]).parameters(recurse=False))

    @property
    def covered(self) -> list[str]:
        """Names of the parameters whose inner products the Gramian has."""
        layers = [(name, self.problem.model.get_submodule(name)) for name in self.layers]
        return [f"{name}.{own}" for name, layer in layers for own, _ in layer.named_parameters(recurse=False)]


def _concatenated(gradients: Sequence[Any]) -> Any:
    """One gradient of all their samples; by halves, since each call copies both of its arguments."""
    if len(gradients) == 1:
        return gradients[0]
    half = len(gradients) // 2
    return _concatenated(gradients[:half]).concatenate(_concatenated(gradients[half:]))
