"""Compare the weightings by what they promise, on random gradients that conflict.

For each weighting the table says, measured on --trials Jacobians:
- worst cosine: the smallest cosine of a gradient with the step `Jᵀ w`; below zero, the step raises a loss;
- scale-invariant: whether the direction of the step stays when one loss is multiplied by 10;
- random: whether a second call gives other weights;
- milliseconds of a call, for 4 and for 64 objectives.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from gramjd import weighting as W

WEIGHTINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "upgrad": W.upgrad,
    "upgrad, reg_eps=1e-10": lambda gramian: W.upgrad(gramian, reg_eps=1e-10),
    "dualproj, reg_eps=1e-10": lambda gramian: W.dualproj(gramian, reg_eps=1e-10),
    "mgda": W.mgda,
    "cagrad": lambda gramian: W.cagrad(gramian, c=0.5),
    "nash_mtl": lambda gramian: W.nash_mtl(gramian),
    "fairgrad": lambda gramian: W.fairgrad(gramian, alpha=1.0),
    "imtl_g": W.imtl_g,
    "aligned_mtl": W.aligned_mtl,
    "config": lambda gramian: W.config(gramian),
    "pcgrad": W.pcgrad,
    "gradvac": lambda gramian: W.GradVacWeighting()(gramian),
    "krum": lambda gramian: W.krum(gramian, n_byzantine=1),
    "random": W.random,
    "mean": W.mean,
}


def gradients(objectives: int, seed: int) -> Tensor:
    """A Jacobian `[objectives, 2 * objectives]` of gradients of unequal lengths, many of which conflict."""
    generator = torch.Generator().manual_seed(seed)
    J = torch.randn(objectives, 2 * objectives, dtype=torch.float64, generator=generator)
    J = J - 1.5 * J.mean(0)  # which makes them point away from their mean
    return J * torch.logspace(-0.5, 0.5, objectives, dtype=torch.float64).unsqueeze(1)


def step(weigh: Callable[[Tensor], Tensor], J: Tensor) -> Tensor:
    """The step `Jᵀ w`; random weightings draw the same numbers in each call."""
    torch.manual_seed(0)
    return J.T @ weigh(J @ J.T)


def worst_cosine(weigh: Callable[[Tensor], Tensor], trials: int) -> float:
    """The smallest cosine of a gradient with the step."""
    found = []
    for seed in range(trials):
        J = gradients(4, seed)
        found.append(float(cosine_similarity(J, step(weigh, J).unsqueeze(0)).min()))
    return min(found)


def turned(weigh: Callable[[Tensor], Tensor], trials: int) -> float:
    """The smallest cosine between the steps before and after one loss is multiplied by 10."""
    found = []
    for seed in range(trials):
        J = gradients(4, seed)
        scaled = J * torch.tensor([10.0, 1, 1, 1], dtype=torch.float64).unsqueeze(1)
        found.append(float(cosine_similarity(step(weigh, J), step(weigh, scaled), dim=0)))
    return min(found)


def is_random(weigh: Callable[[Tensor], Tensor]) -> bool:
    J = gradients(4, 0)
    calls = [weigh(J @ J.T) for _ in range(10)]
    return any(not torch.equal(call, calls[0]) for call in calls)


def milliseconds(weigh: Callable[[Tensor], Tensor], objectives: int, repeats: int = 5) -> float:
    """The median of some calls."""
    J = gradients(objectives, 0)
    G, seconds = J @ J.T, []
    for _ in range(repeats):
        start = time.perf_counter()
        weigh(G)
        seconds.append(time.perf_counter() - start)
    return 1e3 * sorted(seconds)[repeats // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=100)
    args = parser.parse_args()
    print("| weighting | worst cosine | scale-invariant | random | ms, 4 objectives | ms, 64 |")
    print("|---|---|---|---|---|---|")
    for name, weigh in WEIGHTINGS.items():
        promises = turned(weigh, args.trials) > 1 - 1e-6, is_random(weigh)
        said = [f"{worst_cosine(weigh, args.trials):.4f}", *("yes" if each else "no" for each in promises)]
        times = [f"{milliseconds(weigh, objectives):.2g}" for objectives in (4, 64)]
        print(f"| {name} | " + " | ".join(said + times) + " |", flush=True)


if __name__ == "__main__":
    main()
