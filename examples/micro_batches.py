"""Accumulate over micro-batches, and still weigh the whole batch by its exact Gramian.

Every micro-batch leaves its lazy Jacobian; its graph, with the activations of the whole model, is freed.
`Jacobian.cat` puts them together without copying anything. Its Gramian has the inner products of samples
of different micro-batches, which no sum of the micro-batches' own Gramians has. Prints how far the result
is from that of the whole batch at once.
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gramjd import Engine, Jacobian
from gramjd.weighting import upgrad


def accumulated(model: nn.Module, engine: Engine, x: Tensor, y: Tensor, size: int) -> Jacobian:
    """The Jacobian of all samples' losses, `size` samples at a time."""
    found = []
    for mine, labels in zip(x.split(size), y.split(size), strict=True):
        losses = cross_entropy(model(mine), labels, reduction="none")
        found.append(engine.jacobian(losses))
    return Jacobian.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--micro-batch-size", type=int, default=24, help="need not divide the batch size")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 8 * 8, 10),
    )  # fmt: skip
    engine = Engine(model, batch_dim=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(args.batch_size, 3, 16, 16), torch.randint(0, 10, (args.batch_size,))

    J = accumulated(model, engine, x, y, args.micro_batch_size)
    gramian = J.gramian()  # [batch, batch]
    weights = upgrad(gramian)
    optimizer.zero_grad()
    J.backward(weights)  # the weighted gradient of the whole batch, with no further backward pass

    losses = cross_entropy(model(x), y, reduction="none")  # only to compare with
    whole = engine.compute_gramian(losses)
    wanted = torch.autograd.grad(losses, list(model.parameters()), weights)
    gradient = torch.cat([g.flatten() for g in wanted])
    got = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    print(J)
    print(f"Gramian: relative difference {(gramian - whole).norm() / whole.norm():.1e}")
    print(f"Gradient: relative difference {(got - gradient).norm() / gradient.norm():.1e}")
    optimizer.step()


if __name__ == "__main__":
    main()
