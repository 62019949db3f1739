"""Two tasks in different units on one trunk: which digit an image shows, and how much ink it has.

The amount of ink is a regression target, whose mean square depends on its unit. In a small unit it dwarfs the
cross-entropy, and the sum of the losses learns nothing else. NashMTL (Navon et al., arXiv 2202.01017) and
ConFIG (Liu et al., arXiv 2408.11104) weigh the tasks by the Gramian of their gradients, so that the unit does
not matter. Each method takes the best of several learning rates of Adam.

Prints a table, the mean over --seeds runs: accuracy, and the share of the variance of the ink that is left.
"""

import argparse
from collections.abc import Callable
from typing import cast

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import gramjd
from gramjd.weighting import config, nash_mtl, upgrad
from gramjd.weighting import sum as add_up

TRAIN = 1300
# From the Gramian of the tasks to their weights.
METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": add_up,
    "UPGrad": upgrad,
    "ConFIG": config,
    "NashMTL": lambda gramian: nash_mtl(gramian),
}


class Model(nn.Module):
    """A trunk that both tasks share, and a head for each."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
        self.digit, self.ink = nn.Linear(16, 10), nn.Linear(16, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(x)
        return self.digit(features), self.ink(features).squeeze(-1)


def load_data(unit: float) -> tuple[Tensor, Tensor, Tensor]:
    """Images, digits, and the ink beyond the mean: its standard deviation is ``unit``."""
    bunch = load_digits()
    x, y = torch.tensor(bunch.data, dtype=torch.float32) / 16, torch.tensor(bunch.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    ink = x.sum(1)
    return x[order], y[order], (unit * (ink - ink.mean()) / ink.std())[order]


def train(method: str, unit: float, lr: float, seed: int, steps: int) -> tuple[float, float]:
    """Accuracy on the test samples, and the share of the variance of their ink that is left."""
    torch.manual_seed(seed)
    x, y, ink = load_data(unit)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        batch = torch.randint(0, TRAIN, (64,))
        digits, amounts = model(x[batch])
        losses = [cross_entropy(digits, y[batch]), mse_loss(amounts, ink[batch])]
        optimizer.zero_grad()
        gramjd.backward(losses, METHODS[method])
        optimizer.step()
    with torch.no_grad():
        digits, amounts = model(x[TRAIN:])
    accuracy = (digits.argmax(1) == y[TRAIN:]).double().mean()
    return float(accuracy), float(mse_loss(amounts, ink[TRAIN:]) / ink[TRAIN:].var())


def mean(runs: list[tuple[float, float]]) -> tuple[float, float]:
    return cast(tuple[float, float], tuple(sum(each) / len(each) for each in zip(*runs, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--units", type=float, nargs="+", default=[1, 30])
    parser.add_argument("--lr", type=float, nargs="+", default=[0.003, 0.01, 0.03])
    args = parser.parse_args()

    heads = [f"{what}, unit {unit:g}" for unit in args.units for what in ("accuracy", "ink left")]
    print("| method | " + " | ".join(heads) + " |")
    print("|---" * (1 + len(heads)) + "|")
    for method in METHODS:
        cells = []
        for unit in args.units:
            each = [mean([train(method, unit, lr, seed, args.steps) for seed in range(args.seeds)])
                    for lr in args.lr]  # fmt: skip
            accuracy, left = min(each, key=lambda found: 1 - found[0] + found[1])
            cells += [f"{accuracy:.1%}", f"{left:.1%}"]
        print(f"| {method} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
