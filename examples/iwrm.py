"""Instance-wise risk minimisation: every sample's loss is an objective of its own (arXiv 2406.16232).

Prints the mean and the worst loss on the way.
"""

import torch
from torch import nn

from gramjd import Engine
from gramjd.weighting import UPGradWeighting


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 16, 10)  # 8 batches of 16 samples
    y = x @ torch.randn(10) + 0.3 * x[..., 0] ** 2
    model = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.MSELoss(reduction="none")  # one loss a sample
    engine, weighting = Engine(model, batch_dim=0), UPGradWeighting()
    for epoch in range(10):
        worst = []
        for inputs, targets in zip(x, y, strict=True):
            losses = criterion(model(inputs).squeeze(1), targets)  # [16]
            optimizer.zero_grad()
            engine.backward(losses, weighting)
            optimizer.step()
            worst.append(losses.detach())
        found = torch.cat(worst)
        print(f"epoch {epoch}: mean loss {found.mean():.3f}, worst {found.max():.2f}")


if __name__ == "__main__":
    main()
