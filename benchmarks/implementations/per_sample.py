"""What a user of ``torch.func`` would write: rows of the Jacobian, of the model or of each layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vjp, vmap

from benchmarks.implementations.rows import contract
from benchmarks.problem import NotApplicable, Outcome, Problem, Step


def vmap_grad(problem: Problem) -> Step:
    """All rows of the whole model at once: ``vmap(grad)``, or of ``jacrev`` for several objectives."""
    model = problem.model
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    batched = problem.batch_dim is not None

    def objectives(parameters: dict[str, Tensor], inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        if batched:
            inputs, targets = (tuple(x.unsqueeze(0) for x in each) for each in (inputs, targets))
        found = problem.loss(functional_call(model, parameters, inputs), *targets)
        found = found[0] if batched else found
        return found, found.detach()

    rows_of = jacrev(objectives, has_aux=True)
    if batched:
        rows_of = vmap(rows_of, in_dims=(None, 0, 0))

    def step() -> Outcome:
        found, values = rows_of(parameters, problem.inputs, problem.targets)
        rows = [found[name].flatten(0, values.ndim - 1) for name in parameters]
        return contract(rows, None if problem.kernel else problem.weights_like(values))

    return step


@dataclass(frozen=True)
class Call:
    """Of a layer, in one forward pass."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor  # the first one, of several


@contextmanager
def recorded(layers: Sequence[nn.Module]) -> Iterator[list[Call]]:
    """Every call of some layers."""
    calls: list[Call] = []

    def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(Call(layer, args, kwargs, output if isinstance(output, Tensor) else output[0]))

    handles = [layer.register_forward_hook(keep, with_kwargs=True) for layer in layers]
    yield calls
    for handle in handles:
        handle.remove()


def units(module: nn.Module) -> list[nn.Module]:
    """The outermost modules that have parameters of their own."""
    if next(module.parameters(recurse=False), None) is not None:
        return [module]
    return [unit for child in module.children() for unit in units(child)]


def layer_vjp(problem: Problem) -> Step:
    """Cotangents of all layers by one backward pass, then ``vmap(vjp)`` of each layer by itself.

    Rows of a parameter used twice are added up.
    """
    if problem.batch_dim is None:
        raise NotApplicable("rows of samples only, and the objectives are none")
    layers = units(problem.model)

    def step() -> Outcome:
        with recorded(layers) as calls:
            objectives = problem.objectives()
        rows: dict[Tensor, Tensor] = {}
        cotangents = _cotangents(objectives, [call.output for call in calls])
        for call, c in zip(calls, cotangents, strict=True):
            parameters = dict(call.layer.named_parameters())
            for name, mine in _rows(call, parameters, c).items():
                p, mine = parameters[name], mine.flatten(0, 1)
                rows[p] = rows[p] + mine if p in rows else mine
        weights = None if problem.kernel else problem.weights_like(objectives)
        found = contract(list(rows.values()), weights)
        if found.gradient is None:
            return found
        known = dict(zip(rows, found.gradient, strict=True))
        return Outcome(found.gramian, [known.get(p, torch.zeros_like(p)) for p in problem.parameters])

    return step


def _cotangents(objectives: Tensor, outputs: list[Tensor]) -> list[Tensor]:
    """``[B, K, *]`` for each output: samples are independent, so one pass does for an objective of all."""
    if objectives.ndim == 1:
        return [c.unsqueeze(1) for c in torch.autograd.grad(objectives.sum(), outputs)]
    columns = objectives.flatten(1).sum(0)
    basis = torch.eye(len(columns), dtype=columns.dtype, device=columns.device)
    found = torch.autograd.grad(columns, outputs, basis, is_grads_batched=True)
    return [c.transpose(0, 1) for c in found]


def _rows(call: Call, parameters: Mapping[str, Tensor], c: Tensor) -> dict[str, Tensor]:
    """``[B, K, *p.shape]`` of each parameter of a layer."""
    values = {name: p.detach() for name, p in parameters.items()}
    args = [x.detach() if isinstance(x, Tensor) else x for x in call.args]
    batched = [isinstance(x, Tensor) and len(x) == len(c) for x in args]

    def of_sample(c: Tensor, *args: Any) -> dict[str, Tensor]:
        args = tuple(x.unsqueeze(0) if mapped else x for x, mapped in zip(args, batched, strict=True))

        def output(values: dict[str, Tensor]) -> Tensor:
            found = functional_call(call.layer, values, args, call.kwargs)
            return (found if isinstance(found, Tensor) else found[0])[0]

        pull_back = vjp(output, values)[1]
        return vmap(lambda each: pull_back(each)[0])(c)

    in_dims = (0, *(0 if mapped else None for mapped in batched))
    found: dict[str, Tensor] = vmap(of_sample, in_dims=in_dims)(c, *args)
    return found
