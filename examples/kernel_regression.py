"""Classify digits by regression with neural tangent kernels, beside the network that they come from.

A wide network in training behaves like regression with its kernel at initialisation (Jacot et al.,
arXiv 1806.07572; Lee et al., arXiv 1902.06720). Real networks learn features, and so their kernel
changes: regression with the kernel *after* training shows what it has become.

`ntk_dataset` writes the kernels to files in the folder given by --out, batch by batch. A run that is
interrupted goes on where it stopped; run again, the script finds them there.
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

import gramjd

Params = dict[str, Tensor]


def network(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(9 * width, 10),
    )  # fmt: skip


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()


def predict(kernels: list[Tensor], y: Tensor, ridge: float) -> Tensor:
    """Kernel ridge regression onto the classes: `[test, 10]`."""
    kernel, test_kernel = kernels[0].double(), kernels[1].double()
    noise = ridge * kernel.diagonal().mean() * torch.eye(len(kernel), dtype=kernel.dtype)
    targets = one_hot(y, 10).double() - 0.1
    return test_kernel @ torch.linalg.solve(kernel + noise, targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--samples", type=int, default=1797, help="how many digits, a quarter of them to test"
    )
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--ridge", type=float, default=1e-4, help="relative to the mean of the diagonal")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("out/kernels"), metavar="DIR")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    bunch = load_digits()
    order = torch.randperm(len(bunch.images))[: args.samples]
    x, y = (
        torch.tensor(bunch.images, dtype=torch.float32)[order, None] / 16,
        torch.tensor(bunch.target)[order],
    )
    cut = 3 * args.samples // 4
    train_x, train_y, test_x, test_y = x[:cut], y[:cut], x[cut:], y[cut:]

    model = network(args.width)
    function, before = gramjd.functional_loss(model)
    before = {name: p.clone() for name, p in before.items()}
    train(model, train_x, train_y, args.epochs)
    after = {name: p.detach() for name, p in model.named_parameters()}

    def accuracy(outputs: Tensor) -> float:
        return float((outputs.argmax(1) == test_y).float().mean())

    def regression(params: Params, name: str) -> float:
        kernels = [
            # the mean over the 10 outputs of each one's own kernel
            gramjd.ntk_dataset(
                function,
                params,
                rows.split(args.batch_size),
                columns,
                trace_axes=[-1],
                out=args.out / f"{name}-{part}.npy",
            )
            for part, rows, columns in [
                ("train", train_x, None),
                ("test", test_x, train_x.split(args.batch_size)),
            ]
        ]
        return accuracy(predict(kernels, train_y, args.ridge))

    print("| method | test accuracy |\n|---|---|")
    print(f"| kernel before training | {regression(before, 'before'):.1%} |")
    print(f"| kernel after training | {regression(after, 'after'):.1%} |")
    print(f"| trained network | {accuracy(model(test_x)):.1%} |")


if __name__ == "__main__":
    main()
