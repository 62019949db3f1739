"""Pictures of the gradients of a training run, from the Gramians of its steps.

A small CNN learns handwritten digits. A `Monitor` follows the run (give it a TensorBoard
`SummaryWriter` to see it live). At the end every diagnostic is drawn for a batch of which a few samples
have a wrong label: their gradients are among the longest.

Prints the outliers, and writes pictures into the folder given by --out.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gramjd import Engine, Jacobian
from gramjd.diagnostics import (
    Monitor,
    outliers,
    plot_descent,
    plot_history,
    plot_layers,
    plot_norms,
    plot_similarity,
    plot_spectrum,
    plot_weights,
)
from gramjd.weighting import upgrad


def load_data() -> tuple[Tensor, Tensor]:
    bunch = load_digits()
    return torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(bunch.target)


def make_model() -> nn.Sequential:
    model = nn.Sequential()
    model.add_module("first", nn.Conv2d(1, 16, 3, padding=1))
    model.add_module("relu1", nn.ReLU())
    model.add_module("second", nn.Conv2d(16, 32, 3, stride=2, padding=1))
    model.add_module("relu2", nn.ReLU())
    model.add_module("flatten", nn.Flatten())
    model.add_module("hidden", nn.Linear(32 * 4 * 4, 64))
    model.add_module("relu3", nn.ReLU())
    model.add_module("head", nn.Linear(64, 10))
    return model


def train(model: nn.Module, engine: Engine, x: Tensor, y: Tensor, steps: int, monitor: Monitor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(steps):
        batch = torch.randint(0, len(y), (32,))
        jacobian = engine.jacobian(cross_entropy(model(x[batch]), y[batch], reduction="none"))
        gramian = jacobian.gramian()
        weights = upgrad(gramian)
        monitor.log(step, gramian, weights, labels=y[batch], jacobian=jacobian)
        optimizer.zero_grad()
        jacobian.backward(weights)
        optimizer.step()


def pictures(model: nn.Module, jacobian: Jacobian, labels: Tensor, monitor: Monitor
             ) -> dict[str, Callable[[], Any]]:  # fmt: skip
    """A function that draws each picture, by name."""
    gramian = jacobian.gramian()
    groups = [("0-3", "4-7", "8-9")[digit // 4] for digit in labels.tolist()]
    return {
        "similarity": lambda: plot_similarity(gramian, labels=labels),
        "clusters": lambda: plot_similarity(gramian, cluster=True),
        "layers": lambda: plot_layers(jacobian, labels=groups, per=model),
        "norms": lambda: plot_norms(gramian, labels=labels),
        "spectrum": lambda: plot_spectrum(gramian),
        "descent": lambda: plot_descent(gramian, upgrad(gramian)),
        "descent-exact": lambda: plot_descent(gramian, upgrad(gramian, reg_eps=1e-10)),
        "weights": lambda: plot_weights(monitor.steps, monitor.weights),
        "history": lambda: plot_history(monitor.steps, {
            "pairs in conflict": monitor.history["conflict_rate"],
            "raised by the step": monitor.history["raised"],
        }, ylabel="share"),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--wrong", type=int, default=4, help="samples with a wrong label")
    parser.add_argument("--out", type=Path, default=Path("out/gradients"), metavar="DIR")
    args = parser.parse_args()

    torch.manual_seed(0)
    x, y = load_data()
    model = make_model()
    engine = Engine(model, batch_dim=0)
    monitor = Monitor()  # Monitor(SummaryWriter(), figures=100, per=model) for TensorBoard
    train(model, engine, x, y, args.steps, monitor)

    batch = torch.randint(0, len(y), (100,))
    labels = y[batch]
    labels[: args.wrong] = (labels[: args.wrong] + 1) % 10
    jacobian = engine.jacobian(cross_entropy(model(x[batch]), labels, reduction="none"))
    engine.close()
    print(f"Mislabelled: {list(range(args.wrong))}. Longest gradients: {outliers(jacobian).tolist()}.")
    args.out.mkdir(parents=True, exist_ok=True)
    for name, draw in pictures(model, jacobian, labels, monitor).items():
        draw().figure.savefig(args.out / f"{name}.png", dpi=110)
    print(f"Pictures are in {args.out}.")


if __name__ == "__main__":
    main()
