"""Steps of few losses without a batch dimension, beside ten lines of ``autograd.grad``.

Gramian, mean weights and weighted gradient, in plain SGD steps of the same process; every case is timed
in random order. The engine has a copy of the model, so that its hooks cost the others nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases.perceptrons import tasks
from benchmarks.check_cost import times_of
from gramjd import Engine

Case = tuple[nn.Module, Callable[[nn.Module], list[Tensor]]]


def physics(width: int) -> Case:
    """A physics-informed net: residual of ``u'' = f``, and two boundary values."""
    model = nn.Sequential(
        nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
    )
    x = torch.linspace(0, 1, 256)[:, None]

    def losses(model: nn.Module) -> list[Tensor]:
        at = x.clone().requires_grad_()
        u = model(at)
        first = torch.autograd.grad(u.sum(), at, create_graph=True)[0]
        second = torch.autograd.grad(first.sum(), at, create_graph=True)[0]
        ends = model(torch.tensor([[0.0], [1.0]]))
        return [(second + torch.sin(x)).square().mean(), ends[0].square().sum(), ends[1].square().sum()]

    return model, losses


def convolutional(outputs: int, norm: bool) -> Case:
    """A small CNN with one binary loss for each output."""
    layers: list[nn.Module] = []
    for i, o in ((3, 32), (32, 64), (64, 64)):
        layers += [
            nn.Conv2d(i, o, 3, padding=1),
            *([nn.BatchNorm2d(o)] if norm else []),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, outputs))
    x, y = torch.randn(32, 3, 32, 32), torch.randint(0, 2, (32, outputs)).float()

    def losses(model: nn.Module) -> list[Tensor]:
        out = model(x)
        return [F.binary_cross_entropy_with_logits(out[:, k], y[:, k]) for k in range(outputs)]

    return model, losses


def shared_trunk() -> Case:
    """Case I of the table."""
    problem = tasks()
    return problem.model, lambda model: list(problem.loss(model(*problem.inputs), *problem.targets).unbind())


CASES: dict[str, Callable[[], Case]] = {
    "physics-informed, 3 losses, width 32": lambda: physics(32),
    "physics-informed, 3 losses, width 512": lambda: physics(512),
    "CNN, 3 tasks": lambda: convolutional(3, norm=False),
    "CNN with batch norm, 10 tasks": lambda: convolutional(10, norm=True),
    "I: 4 tasks, shared trunk": shared_trunk,
}


def steps(case: Case) -> dict[str, Callable[[], Callable[[], object]]]:
    """Each step, ready to be timed."""
    model, losses = case
    parameters = list(model.parameters())
    hooked = copy.deepcopy(model)
    engine = Engine(hooked, batch_dim=None)

    def sgd() -> None:
        torch.stack(losses(model)).mean().backward()

    def rows() -> None:
        each = losses(model)
        weights, total = torch.full((len(each),), 1 / len(each)), torch.zeros(len(each), len(each))
        found = [torch.autograd.grad(x, parameters, retain_graph=True, allow_unused=True) for x in each]
        for p, column in zip(parameters, zip(*found, strict=True), strict=True):
            matrix = torch.stack([torch.zeros_like(p) if g is None else g for g in column])
            total += matrix.flatten(1) @ matrix.flatten(1).T
            p.grad = torch.tensordot(weights, matrix, 1)

    def ours() -> None:
        stacked = torch.stack(losses(hooked))
        jacobian = engine.jacobian(stacked)
        jacobian.gramian()
        jacobian.backward(torch.full((len(stacked),), 1 / len(stacked)))

    def of(step: Callable[[], None]) -> Callable[[], Callable[[], object]]:
        def ready() -> Callable[[], object]:
            model.zero_grad()
            hooked.zero_grad()
            return step

        return ready

    return {"SGD": of(sgd), "autograd.grad": of(rows), "J.backward": of(ours)}


def main() -> None:
    """Print the table."""
    print(f"{'':42}  autograd.grad  J.backward   (SGD steps)")
    for name, make in CASES.items():
        torch.manual_seed(0)
        found = times_of(steps(make()), rounds=15)
        plain, ours = (found[key] / found["SGD"] for key in ("autograd.grad", "J.backward"))
        print(f"{name:42}  {plain:13.2f}  {ours:10.2f}")


if __name__ == "__main__":
    main()
