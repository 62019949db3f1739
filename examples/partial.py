"""Partial Jacobian descent: weights from the Gramian of the last layers, gradients for all of them.

Prints the mean loss on the way, and how far the weights are from those of the whole model.
"""

import torch
from torch import nn

from gramjd import Engine, diagnostics
from gramjd.weighting import UPGradWeighting, upgrad


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 16, 10)  # 8 batches of 16 samples
    y = x @ torch.randn(10)
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    engine, weighting = Engine(model[2], model[4], batch_dim=0), UPGradWeighting()
    whole = Engine(model, batch_dim=0)
    for epoch in range(10):
        for inputs, targets in zip(x, y, strict=True):
            losses = (model(inputs)[:, 0] - targets).square()
            gramian = whole.compute_gramian(losses)  # for the comparison below alone
            optimizer.zero_grad()
            weights = engine.backward(losses, weighting)
            optimizer.step()
        angle = diagnostics.angle(gramian, weights, upgrad(gramian))
        print(f"epoch {epoch}: mean loss {losses.mean():.3f}, {angle:.0f}° off")


if __name__ == "__main__":
    main()
