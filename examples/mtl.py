"""Multi-task learning: heads follow their own losses, the encoder they share follows UPGrad's direction.

With --wrt features, the Gramian is of the encoder's output in place of its parameters (MGDA-UB: Sener and
Koltun, arXiv 1810.04650), which takes one backward pass of the encoder. Prints the losses of both tasks.
"""

import argparse

import torch
from torch import nn

import gramjd
from gramjd.weighting import UPGradWeighting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wrt", choices=["shared", "features"], default="shared")
    args = parser.parse_args()
    torch.manual_seed(0)
    x = torch.randn(8, 16, 10)  # 8 batches of 16 samples
    regression, labels = x @ torch.randn(10), (x @ torch.randn(10, 3)).argmax(2)
    encoder = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU())
    value, classes = nn.Linear(4, 1), nn.Linear(4, 3)
    model = nn.ModuleList([encoder, value, classes])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    weighting = UPGradWeighting()
    for epoch in range(20):
        for inputs, y, label in zip(x, regression, labels, strict=True):
            features = encoder(inputs)
            losses = [
                nn.functional.mse_loss(value(features)[:, 0], y),
                nn.functional.cross_entropy(classes(features), label),
            ]
            optimizer.zero_grad()
            weights = gramjd.mtl_backward(losses, features, weighting, wrt=args.wrt)
            optimizer.step()
        shown = " ".join(f"{loss:.3f} ({w:.2f})" for loss, w in zip(losses, weights, strict=True))
        print(f"epoch {epoch}: losses (and weights) {shown}")


if __name__ == "__main__":
    main()
