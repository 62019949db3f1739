"""Natural gradient by the kernel trick, beside Adam: a network that solves a Poisson problem.

The network u(x) is to satisfy -Δu = f in the unit square and u = 0 on its boundary. The residuals at N
points have a Jacobian J of N rows, and the Gauss-Newton step, the natural gradient of least squares, is

    (JᵀJ + λI)⁻¹ Jᵀ r = Jᵀ (J Jᵀ + λI)⁻¹ r.

The right side solves a system of size N in place of one in the number of parameters: all it takes is the
Gramian and one product with Jᵀ. Such steps reach accuracies that Adam does not (Müller and Zeinhofer,
arXiv 2302.13163). Each method has the same time; the picture shows the relative error of the solution.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from math import pi
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev

import gramjd

Params = dict[str, Tensor]
Curve = list[tuple[float, float]]  # seconds, relative error


def solution(x: Tensor) -> Tensor:
    return (pi * x).sin().prod(-1)


class Problem:
    """The residuals at points of the square and of its boundary, and the error of a solution."""

    def __init__(self, width: int, inside: int, outside: int) -> None:
        self.model = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(),
                                   nn.Linear(width, 1)).double()  # fmt: skip
        self.params = {name: p.detach() for name, p in self.model.named_parameters()}
        self.inside = torch.rand(inside, 2, dtype=torch.float64)
        edge = torch.rand(outside, 2, dtype=torch.float64)
        edge[torch.arange(outside), torch.arange(outside) % 2] = (torch.arange(outside) // 2 % 2).double()
        self.edge = edge
        self.test = torch.rand(2000, 2, dtype=torch.float64)
        self.of_equation = gramjd.jacobian_and_value(self.equation)
        self.of_boundary = gramjd.jacobian_and_value(self.boundary)

    def u(self, params: Params, x: Tensor) -> Tensor:
        return functional_call(self.model, params, (x,)).squeeze(-1)

    def equation(self, params: Params, x: Tensor) -> Tensor:
        """Δu + f at one point, of root mean square size 1 / √N: their squares add up to a mean."""
        hessian = jacrev(grad(self.u, 1), 1)(params, x)
        return (hessian.trace() + 2 * pi**2 * solution(x)) / len(self.inside) ** 0.5

    def boundary(self, params: Params, x: Tensor) -> Tensor:
        return self.u(params, x) * 10 / len(self.edge) ** 0.5

    def residuals(self, params: Params) -> Tensor:
        each = torch.vmap(self.equation, (None, 0)), torch.vmap(self.boundary, (None, 0))
        return torch.cat([each[0](params, self.inside), each[1](params, self.edge)])

    def jacobian(self, params: Params) -> tuple[gramjd.Jacobian, Tensor]:
        first, r = self.of_equation(params, self.inside)
        second, b = self.of_boundary(params, self.edge)
        return gramjd.Jacobian.cat([first, second]), torch.cat([r, b])

    def error(self, params: Params) -> float:
        want = solution(self.test)
        return float((self.u(params, self.test) - want).norm() / want.norm())


def natural_gradient(problem: Problem, damping: float) -> Iterator[Params]:
    params, steps = problem.params, 2.0 ** -torch.arange(12, dtype=torch.float64)
    loss = torch.vmap(lambda p: problem.residuals(p).square().sum())
    while True:
        J, r = problem.jacobian(params)
        G = J.gramian()
        noise = damping * r.square().sum() * torch.eye(len(G), dtype=G.dtype)  # less as the error falls
        direction = J.vjp(torch.linalg.solve(G + noise, r))
        tried = {k: p - steps.view(-1, *[1] * p.ndim) * direction[k] for k, p in params.items()}
        best = int(loss(tried).argmin())  # of several step sizes
        params = {k: p[best] for k, p in tried.items()}
        yield params


def adam(problem: Problem, lr: float) -> Iterator[Params]:
    params = {name: p.clone().requires_grad_() for name, p in problem.params.items()}
    optimizer = torch.optim.Adam(params.values(), lr=lr)
    while True:
        optimizer.zero_grad()
        problem.residuals(params).square().sum().backward()
        optimizer.step()
        yield {name: p.detach() for name, p in params.items()}


def curve(problem: Problem, method: Iterator[Params], seconds: float, every: int, most: int | None
          ) -> Curve:  # fmt: skip
    """The error after every so many steps, for some time or some points; measuring is not counted."""
    found, spent = [(0.0, problem.error(problem.params))], 0.0
    while spent < seconds if most is None else len(found) <= most:
        start = time.perf_counter()
        for _ in range(every):
            params = next(method)
        spent += time.perf_counter() - start
        found.append((spent, problem.error(params)))
    return found


def draw(curves: dict[str, Curve], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for name, points in curves.items():
        axes.semilogy(*zip(*points, strict=True), label=name)
    axes.set(xlabel="seconds", ylabel="relative error of u", title="A Poisson problem in the unit square")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20, help="for each method")
    parser.add_argument("--steps", type=int, help="instead: of natural gradient; of Adam ten times as many")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--points", type=int, default=300, help="inside; a third as many on the boundary")
    parser.add_argument("--damping", type=float, default=1e-5, help="relative to the sum of squares")
    parser.add_argument("--lr", type=float, default=3e-3, help="of Adam")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    problem = Problem(args.width, args.points, args.points // 3)
    methods: dict[str, tuple[Callable[[], Iterator[Params]], int]] = {
        "natural gradient": (lambda: natural_gradient(problem, args.damping), 1),
        "Adam": (lambda: adam(problem, args.lr), 10),
    }
    curves = {}
    print("| method | steps | relative error |\n|---|---|---|")
    for name, (make, every) in methods.items():
        next(make())  # the first run of anything is slow
        curves[name] = curve(problem, make(), args.seconds, every, args.steps)
        print(f"| {name} | {every * (len(curves[name]) - 1)} | {curves[name][-1][1]:.1e} |", flush=True)
    draw(curves, args.out / "poisson.png")


if __name__ == "__main__":
    main()
