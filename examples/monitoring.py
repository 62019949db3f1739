"""Monitor a weighting in a run: its weights, the conflicts it saw, its angle to the mean gradient.

A forward hook of the weighting sees each Gramian and its weights. See watch_gradients.py for pictures, and
`gramjd.diagnostics.Monitor` for TensorBoard. Prints a line an epoch.
"""

from typing import Any

import torch
from torch import Tensor, nn

from gramjd import Engine, diagnostics
from gramjd.weighting import UPGradWeighting


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 16, 10)  # 8 batches of 16 samples
    y = x @ torch.randn(10)
    model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, weighting = Engine(model, batch_dim=0), UPGradWeighting()
    angles: list[float] = []
    conflicts: list[float] = []

    def look(_: nn.Module, inputs: tuple[Any, ...], weights: Tensor) -> None:
        (gramian,) = inputs
        angles.append(diagnostics.angle(gramian, weights))
        conflicts.append(diagnostics.conflict_rate(gramian))

    weighting.register_forward_hook(look)
    for epoch in range(10):
        for inputs, targets in zip(x, y, strict=True):
            losses = (model(inputs)[:, 0] - targets).square()
            optimizer.zero_grad()
            weights = engine.backward(losses, weighting)
            optimizer.step()
        angle, rate = (sum(found[-8:]) / 8 for found in (angles, conflicts))
        print(f"epoch {epoch}: mean loss {losses.mean():.3f}, {rate:.0%} of the pairs in conflict, "
              f"{angle:.0f}° from the mean gradient, largest weight {weights.max():.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
