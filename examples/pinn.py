"""A physics-informed network whose two losses compete: the equation inside, the values on the boundary.

The network u(x) is to satisfy -Δu = f in the unit square and u = 0 on its boundary. The two mean squares have
different units, so a plain sum needs a factor that nobody knows in advance. NashMTL (Navon et al., arXiv
2202.01017) and ConFIG (Liu et al., arXiv 2408.11104) do not depend on the scale of a loss; UPGrad (arXiv
2406.16232) raises none. Each method starts from the same weights and takes as many steps of Adam.

Prints a table, and writes `pinn.png` into the folder given by --out.
"""

import argparse
import time
from collections.abc import Callable
from math import pi
from pathlib import Path
from statistics import geometric_mean

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import gramjd
from gramjd.weighting import config, mean, nash_mtl, upgrad

# From the Gramian of the two losses to their weights.
METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": mean,
    "boundary × 10": lambda gramian: gramian.new_tensor([0.5, 5.0]),
    "boundary × 1000": lambda gramian: gramian.new_tensor([0.5, 500.0]),
    "UPGrad": upgrad,
    "ConFIG": config,
    "NashMTL": lambda gramian: nash_mtl(gramian),
}
COLORS = dict(zip(METHODS, ["#000000", "#999999", "#0072b2", "#d55e00", "#cc79a7", "#009e73"], strict=True))


def solution(x: Tensor) -> Tensor:
    return (pi * x).sin().prod(-1)


def boundary_points(count: int) -> Tensor:
    """Points on the four edges in turn."""
    x, index = torch.rand(count, 2), torch.arange(count)
    x[index, index % 2] = (index // 2 % 2).float()
    return x


def losses_of(model: nn.Module, inside: Tensor, edge: Tensor) -> list[Tensor]:
    """The mean squares of the equation's residual, which contains second derivatives, and of the boundary."""
    x = inside.requires_grad_()
    u = model(x).squeeze(-1)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    second = [torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
    residual = sum(second) + 2 * pi**2 * solution(x)
    return [residual.square().mean(), model(edge).square().mean()]


def train(method: str, seed: int, steps: int, every: int) -> tuple[list[float], float]:
    """The relative errors of the solution, and the milliseconds of a step."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    test, errors, spent = torch.rand(2000, 2), [], 0.0
    want = solution(test)
    for step in range(steps + 1):
        if step % every == 0:
            with torch.no_grad():
                errors.append(float((model(test).squeeze(-1) - want).norm() / want.norm()))
        start = time.perf_counter()
        losses = losses_of(model, torch.rand(128, 2), boundary_points(64))
        optimizer.zero_grad()
        gramjd.backward(losses, METHODS[method])  # in place of sum(losses).backward()
        optimizer.step()
        schedule.step()
        spent += time.perf_counter() - start
    return errors, 1e3 * spent / (steps + 1)


def plot(curves: dict[str, list[list[float]]], every: int) -> Figure:
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, mine in curves.items():
        middle = [geometric_mean(each) for each in zip(*mine, strict=True)]
        axes.semilogy([every * i for i in range(len(middle))], middle, label=name, color=COLORS[name])
    axes.set(xlabel="steps", ylabel="relative error of u", title="Equation and boundary of a Poisson problem")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR")
    args = parser.parse_args()

    every, curves = max(1, args.steps // 40), {}
    print("| method | relative error of u | ms per step |\n|---|---|---|")
    for name in args.methods:
        runs = [train(name, seed, args.steps, every) for seed in range(args.seeds)]
        curves[name] = [errors for errors, _ in runs]
        last = geometric_mean(errors[-1] for errors in curves[name])
        print(f"| {name} | {last:.1e} | {min(ms for _, ms in runs):.1f} |", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    plot(curves, every).savefig(args.out / "pinn.png", dpi=150)


if __name__ == "__main__":
    main()
