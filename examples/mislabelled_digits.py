"""Find mislabelled digits by the gradients of a network that was trained on them.

One label in twenty is wrong. A sample is suspicious if no gradient of a clean sample resembles its own: its
score is the mean cosine with the five most alike. Beside that, the usual scores: loss and gradient norm.

`gradients_dataset` writes sketches of all gradients to a folder, and `similarity` compares them. Prints a
table, and what `outliers` finds, which is not told how many to look for. Writes `mislabelled.png` into the
folder given by --out.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gramjd
from gramjd.diagnostics import outliers

COLORS = {"similarity": "#0072b2", "loss": "#d55e00", "gradient norm": "#999999"}
CLEAN = 200  # samples whose labels are known to be right
WHISKERS = 1.5, 3.0  # of `outliers`


def load_data(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels, and which of the latter are wrong; the first ones are clean."""
    generator = torch.Generator().manual_seed(seed)
    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=generator)
    x, y = torch.tensor(bunch.data, dtype=torch.float32)[order] / 16, torch.tensor(bunch.target)[order]
    suspects = CLEAN + torch.randperm(len(y) - CLEAN, generator=generator)
    flipped = suspects[: len(suspects) // 20]
    y[flipped] = (y[flipped] + torch.randint(1, 10, flipped.shape, generator=generator)) % 10
    wrong = torch.zeros(len(y), dtype=torch.bool)
    wrong[flipped] = True
    return x, y, wrong


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(y)).split(64):
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()


def suspicions(model: nn.Module, x: Tensor, y: Tensor, dim: int, folder: Path) -> dict[str, Tensor]:
    """Scores of all samples but the clean ones."""
    func, params = gramjd.functional_loss(model, nn.CrossEntropyLoss(reduction="none"))
    jac = gramjd.jacobian(func)

    def gradients(name: str, x: Tensor, y: Tensor) -> gramjd.GradientStore:
        batches = list(zip(x.split(128), y.split(128), strict=True))
        return gramjd.gradients_dataset(
            lambda batch: jac(params, *batch), batches, folder / name, dim, progress=False
        )

    suspects, clean = gradients("suspects", x[CLEAN:], y[CLEAN:]), gradients("clean", x[:CLEAN], y[:CLEAN])
    alike = gramjd.similarity(suspects, clean, cosine=True, topk=5)
    with torch.no_grad():
        losses = cross_entropy(model(x[CLEAN:]), y[CLEAN:], reduction="none")
    return {
        "similarity": -alike.values.mean(1),
        "loss": losses,
        "gradient norm": torch.tensor(suspects.norms),
    }


def precisions(scores: Tensor, wrong: Tensor) -> Tensor:
    """`[N]`: of the k most suspicious samples, which share has a wrong label, for each k."""
    found = wrong[scores.argsort(descending=True, stable=True)].double().cumsum(0)
    return found / torch.arange(1, len(wrong) + 1)


def found_by_outliers(model: nn.Module, x: Tensor, y: Tensor, wrong: Tensor) -> Tensor:
    """`[whiskers, 2]`: of the outliers, how many have a wrong label, and how many there are."""
    func, params = gramjd.functional_loss(model, nn.CrossEntropyLoss(reduction="none"))
    jac = gramjd.jacobian(func)(params, x, y)
    far = [outliers(jac, whisker) for whisker in WHISKERS]
    return torch.tensor([[int(wrong[each].sum()), len(each)] for each in far])


def plot(curves: dict[int, dict[str, Tensor]], flipped: int) -> Figure:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for ax, (epochs, mine) in zip(axes, curves.items(), strict=True):
        for name, values in mine.items():
            k = torch.arange(5, 2 * flipped + 1)
            ax.plot(k, 100 * values[k - 1], label=name, color=COLORS[name])
        ax.axvline(flipped, color="#cccccc", lw=1, zorder=0)
        ax.set(title=f"after {epochs} epochs", xlabel="k most suspicious", ylim=(0, 103))
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("of which mislabelled, %")
    axes[0].legend(frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--epochs", type=int, nargs="+", default=[20, 80], help="when to look, in ascending order"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--dim", type=int, default=512, help="of the sketches")
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR")
    args = parser.parse_args()

    curves: dict[int, dict[str, Tensor]] = {epochs: {} for epochs in args.epochs}
    counts = {epochs: torch.zeros(len(WHISKERS), 2) for epochs in args.epochs}
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        x, y, wrong = load_data(seed)
        model = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )
        done = 0
        for epochs in args.epochs:
            train(model, x[CLEAN:], y[CLEAN:], epochs - done)
            done = epochs
            with tempfile.TemporaryDirectory() as folder:
                scores = suspicions(model, x, y, args.dim, Path(folder))
            counts[epochs] += found_by_outliers(model, x[CLEAN:], y[CLEAN:], wrong[CLEAN:])
            for name, values in scores.items():
                mine = precisions(values, wrong[CLEAN:]) / args.seeds
                curves[epochs][name] = curves[epochs].get(name, torch.zeros_like(mine)) + mine

    flipped = int(wrong.sum())
    print(
        f"Of the {flipped} most suspicious of {len(wrong) - CLEAN} digits, {flipped} mislabelled, were so:\n"
    )
    print("| epochs | " + " | ".join(COLORS) + " |")
    print("|---" * (1 + len(COLORS)) + "|")
    for epochs, mine in curves.items():
        cells = [f"{100 * float(mine[name][flipped - 1]):.0f}%" for name in COLORS]
        print(f"| {epochs} | " + " | ".join(cells) + " |")
    print()
    for epochs, count in counts.items():
        for whisker, (hits, far) in zip(WHISKERS, count.tolist(), strict=True):
            precision, recall = hits / max(far, 1), hits / (flipped * args.seeds)
            print(
                f"{epochs} epochs, whisker {whisker}: {precision:.0%} of the outliers are mislabelled, "
                f"{recall:.0%} of the mislabelled are outliers"
            )
    args.out.mkdir(parents=True, exist_ok=True)
    plot(curves, flipped).savefig(args.out / "mislabelled.png", dpi=130)


if __name__ == "__main__":
    main()
