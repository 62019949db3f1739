"""Instance-wise multi-task learning: one objective for every task of every sample, `[16, 2]` at once.

Prints the mean loss of each task on the way.
"""

import torch
from torch import nn

from gramjd import Engine
from gramjd.weighting import UPGradWeighting


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 16, 10)  # 8 batches of 16 samples
    first, second = (x @ torch.randn(10) for _ in range(2))
    trunk = nn.Sequential(nn.Linear(10, 5), nn.ReLU(), nn.Linear(5, 3), nn.ReLU())
    heads = nn.Linear(3, 1), nn.Linear(3, 1)
    model = nn.ModuleList([trunk, *heads])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    engine, weighting = Engine(trunk, batch_dim=0), UPGradWeighting()  # what tasks and samples compete for
    for epoch in range(10):
        seen = []
        for inputs, *targets in zip(x, first, second, strict=True):
            features = trunk(inputs)
            losses = [(head(features)[:, 0] - y).square() for head, y in zip(heads, targets, strict=True)]
            optimizer.zero_grad()
            weights = engine.backward(losses, weighting)  # [16, 2]
            optimizer.step()
            seen.append(torch.stack(losses, 1).detach())
        means = torch.cat(seen).mean(0).tolist()
        print(f"epoch {epoch}: losses {means[0]:.3f} {means[1]:.3f}, {weights.numel()} weights")


if __name__ == "__main__":
    main()
