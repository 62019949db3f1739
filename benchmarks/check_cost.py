"""What the checks cost: a checked ``compute_gramian`` beside an unchecked one, in ordinary backward passes.

Each model is timed in random order in this process: an ordinary backward pass of the mean loss, and
``compute_gramian`` of the same losses for the first time, always checked, known (``check="first"`` after
its first call) and never checked.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramjd import Engine


class Encoder(nn.Module):
    """Pre-norm transformer: width 256, 4 layers, sequence 64, vocabulary 1000."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True, norm_first=True)
        self.tokens, self.positions = nn.Embedding(1000, 256), nn.Parameter(torch.randn(64, 256))
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(256, 1000)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.tokens(ids) + self.positions)).mT


def mlp() -> nn.Module:
    sizes = itertools.pairwise([784, 1024, 1024, 1024])
    layers = [layer for i, o in sizes for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(1024, 10))


def convolutions() -> nn.Module:
    layers: list[nn.Module] = []
    for i, o in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.GroupNorm(8, o), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 16, 10))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], tuple[int, ...], int]] = {
    "transformer": (Encoder, lambda: torch.randint(0, 1000, (16, 64)), (16, 64), 1000),
    "MLP": (mlp, lambda: torch.randn(128, 784), (128,), 10),
    "convolutions": (convolutions, lambda: torch.randn(32, 3, 32, 32), (32,), 10),
}


def times_of(steps: dict[str, Callable[[], Callable[[], object]]], rounds: int) -> dict[str, float]:
    """Lower quartile of each step's seconds; what a step returns is timed, its preparation is not."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name in random.sample(list(steps), len(steps)):
            run = steps[name]()
            start = time.perf_counter()
            run()
            found[name].append(time.perf_counter() - start)
    return {name: statistics.quantiles(mine, n=4)[0] for name, mine in found.items()}


def measure(name: str, rounds: int = 30) -> str:
    """One row of the table."""
    torch.manual_seed(0)
    build, inputs, targets, classes = CASES[name]
    model, x, y = build(), inputs(), torch.randint(0, classes, targets)
    checks = {check: Engine(model, batch_dim=0, check=check) for check in ("always", "first", "never")}

    def losses() -> Tensor:
        found = F.cross_entropy(model(x), y, reduction="none")
        return found if found.ndim == 1 else found.mean(1)

    def backward() -> Callable[[], object]:
        out = losses().mean()
        parameters = list(model.parameters())
        return lambda: torch.autograd.grad(out, parameters)

    def gramian(engine: Engine) -> Callable[[], Callable[[], object]]:
        def prepare() -> Callable[[], object]:
            out = losses()
            return lambda: engine.compute_gramian(out)

        return prepare

    def new() -> Callable[[], object]:
        engine = Engine(model, batch_dim=0)
        out = losses()

        def run() -> None:
            engine.compute_gramian(out)
            engine.close()

        return run

    steps = {"backward": backward, "new": new, **{check: gramian(engine) for check, engine in checks.items()}}
    for step in steps.values():
        step()()  # the first call measures and checks
    seconds = times_of(steps, rounds)
    one = seconds["backward"]
    found = {step: seconds[step] / one for step in steps}
    found["check"] = found["always"] - found["first"]
    cells = [f"{found[column]:.2f}" for column in ("new", "always", "first", "never", "check")]
    return f"| {name} | {1e3 * one:.1f} | {' | '.join(cells)} | {found['first'] - found['never']:+.2f} |"


def main() -> None:
    """Print a table in units of an ordinary backward pass."""
    print("| model | backward, ms | first call | checked | known | never checked | check | known - never |")
    print("|---|---|---|---|---|---|---|---|")
    for name in CASES:
        print(measure(name), flush=True)


if __name__ == "__main__":
    main()
