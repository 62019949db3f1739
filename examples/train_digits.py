"""Train a small CNN on handwritten digits, by SGD and by Jacobian descent.

SGD steps along the gradient of the mean loss. Jacobian descent treats every sample's loss as an
objective of its own (instance-wise risk minimisation, Quinton and Rey, arXiv 2406.16232):
UPGrad weighs the samples' gradients so that, to first order, the step raises no loss of the
batch. Both runs start from the same weights and see the same batches.

Prints a table and writes `curves.png` and `conflicts.png` into the folder given by --out.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from gramjd import Engine
from gramjd.diagnostics import plot_similarity
from gramjd.weighting import UPGradWeighting

COLORS = {"SGD": "#0072b2", "UPGrad": "#d55e00"}  # told apart by colour-blind readers too


@dataclass(frozen=True)
class Digits:
    """8x8 grey images of handwritten digits, split into training and test samples."""

    train_x: Tensor  # [1347, 1, 8, 8]
    train_y: Tensor  # [1347]
    test_x: Tensor  # [450, 1, 8, 8]
    test_y: Tensor  # [450]


@dataclass
class Run:
    """The results of one optimisation."""

    model: nn.Module
    steps: list[int] = field(default_factory=list)
    train_losses: list[Tensor] = field(default_factory=list)  # one loss a sample
    test_losses: list[Tensor] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # one a step


def load_data(seed: int) -> Digits:
    bunch = load_digits()
    x = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(bunch.target)
    train, test = train_test_split(range(len(y)), test_size=0.25, random_state=seed, stratify=y)
    return Digits(x[train], y[train], x[test], y[test])


def make_model(seed: int) -> nn.Module:
    """No batch normalisation: it would make one sample's loss depend on the others."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def make_batches(n_samples: int, batch_size: int, epochs: int, seed: int) -> list[Tensor]:
    """Indices of every batch of the run, all of one size."""
    generator = torch.Generator().manual_seed(seed)
    return [
        batch
        for _ in range(epochs)
        for batch in torch.randperm(n_samples, generator=generator).split(batch_size)
        if len(batch) == batch_size
    ]


def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """One loss a sample."""
    return cross_entropy(model(x), y, reduction="none")


def mean_backward(losses: Tensor) -> None:
    losses.mean().backward()


def upgrad_backward(engine: Engine) -> Callable[[Tensor], None]:
    weighting = UPGradWeighting()

    def backward(losses: Tensor) -> None:
        gramian = engine.compute_gramian(losses)  # [batch, batch]
        losses.backward(weighting(gramian))

    return backward


def train(
    name: str,
    model: nn.Module,
    backward: Callable[[Tensor], None],
    lr: float,
    data: Digits,
    batches: list[Tensor],
    evaluations: int = 40,
) -> Run:
    """Take one step a batch; `backward` alone tells the methods apart."""
    run = Run(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
    every = max(1, len(batches) // evaluations)
    progress = tqdm(batches, desc=f"{name:>6}", unit="step", mininterval=0.5)
    for step, batch in enumerate(progress, start=1):
        start = time.perf_counter()
        losses = losses_of(model, data.train_x[batch], data.train_y[batch])
        backward(losses)
        optimizer.step()
        optimizer.zero_grad()
        decay.step()
        run.seconds.append(time.perf_counter() - start)
        if step == 1 or step % every == 0 or step == len(batches):
            with torch.no_grad():
                run.steps.append(step)
                run.train_losses.append(losses_of(model, data.train_x, data.train_y))
                run.test_losses.append(losses_of(model, data.test_x, data.test_y))
    return run


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return (model(x).argmax(dim=1) == y).float().mean().item()


def table(runs: dict[str, Run], data: Digits) -> str:
    rows = [
        "| method | train loss | worst train loss | train acc. | test loss | worst test loss "
        "| test acc. | ms per step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        train_losses, test_losses = run.train_losses[-1], run.test_losses[-1]
        train_accuracy = accuracy(run.model, data.train_x, data.train_y)
        test_accuracy = accuracy(run.model, data.test_x, data.test_y)
        milliseconds = 1000 * torch.tensor(run.seconds).median()
        rows.append(
            f"| {name} | {train_losses.mean():.4f} | {train_losses.max():.2f} "
            f"| {train_accuracy:.1%} | {test_losses.mean():.4f} | {test_losses.max():.2f} "
            f"| {test_accuracy:.1%} | {milliseconds:.1f} |"
        )
    return "\n".join(rows)


def plot_curves(runs: dict[str, Run]) -> Figure:
    """Mean and worst loss over all samples, against the number of steps."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True)
    for name, run in runs.items():
        for split, losses, style in [
            ("train", run.train_losses, "-"),
            ("test", run.test_losses, "--"),
        ]:
            every_sample = torch.stack(losses).numpy()  # [evaluations, samples]
            line = {"color": COLORS[name], "linestyle": style, "label": f"{name}, {split}"}
            axes[0].plot(run.steps, every_sample.mean(axis=1), **line)
            axes[1].plot(run.steps, every_sample.max(axis=1), **line)
    for ax, title in zip(axes, ["mean over all samples", "worst sample"], strict=True):
        ax.set(title=title, xlabel="step", yscale="log")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("cross-entropy")
    axes[0].legend(frameon=False)
    return figure


def plot_conflicts(models: dict[str, nn.Module], data: Digits, per_digit: int = 10) -> Figure:
    """Draw which gradients agree and which conflict, sorted by digit."""
    chosen = torch.cat([(data.train_y == digit).nonzero()[:per_digit, 0] for digit in range(10)])
    x, y = data.train_x[chosen], data.train_y[chosen]
    figure = Figure(figsize=(5 * len(models), 4.2), layout="constrained")
    for ax, (title, model) in zip(figure.subplots(1, len(models)), models.items(), strict=True):
        engine = Engine(model, batch_dim=0)
        plot_similarity(engine.compute_gramian(losses_of(model, x, y)), labels=y, ax=ax)
        engine.close()
        ax.set(title=f"{title}: {ax.get_title()}", xlabel="digit", ylabel="digit")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    # Each method's best of 0.1, 0.2, 0.3, 0.5, 0.7 and 1.0: the lowest training loss, averaged
    # over the run and over five seeds.
    parser.add_argument("--sgd-lr", type=float, default=0.5)
    parser.add_argument("--upgrad-lr", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/digits"), metavar="DIR")
    args = parser.parse_args()

    data = load_data(args.seed)
    batches = make_batches(len(data.train_y), args.batch_size, args.epochs, args.seed)

    model = make_model(args.seed)
    runs = {"SGD": train("SGD", model, mean_backward, args.sgd_lr, data, batches)}

    model = make_model(args.seed)
    engine = Engine(model, batch_dim=0)
    backward = upgrad_backward(engine)
    runs["UPGrad"] = train("UPGrad", model, backward, args.upgrad_lr, data, batches)
    engine.close()
    print(table(runs, data))

    models = {"before training": make_model(args.seed)}
    models |= {f"after {name}": run.model for name, run in runs.items()}
    args.out.mkdir(parents=True, exist_ok=True)
    plot_curves(runs).savefig(args.out / "curves.png")
    plot_conflicts(models, data).savefig(args.out / "conflicts.png")
    print(f"Learning curves and gradient conflicts are drawn in {args.out}.")


if __name__ == "__main__":
    main()
