"""Groups of parameters with weights of their own, each from the Gramian of the group.

GradVac remembers the similarities that it saw, so every group has a weighting object of its own. Prints the
weights of the groups on the way.
"""

import torch
from torch import nn

from gramjd import Engine
from gramjd.weighting import GradVacWeighting


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 16, 10)  # 8 batches of 16 samples
    targets = [x @ torch.randn(10), (x @ torch.randn(10)).relu()]
    model = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    engine = Engine(model, batch_dim=None)
    groups = {"hidden": ["0.weight", "0.bias"], "output": ["2.weight", "2.bias"]}
    weightings = {name: GradVacWeighting() for name in groups}
    for epoch in range(10):
        for inputs, *both in zip(x, *targets, strict=True):
            out = model(inputs)
            losses = [nn.functional.mse_loss(out[:, i], y) for i, y in enumerate(both)]
            optimizer.zero_grad()
            weights = engine.backward(losses, weightings, per=groups)
            optimizer.step()
        shown = ", ".join(f"{name} {w[0]:.2f} {w[1]:.2f}" for name, w in weights.items())
        print(f"epoch {epoch}: mean loss {sum(losses) / 2:.3f}; weights: {shown}")


if __name__ == "__main__":
    main()
