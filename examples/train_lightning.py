"""Jacobian descent in PyTorch Lightning, by manual optimisation.

Needs `pip install pytorch-lightning`. Prints the accuracy on held-out handwritten digits.
"""

import argparse
from typing import Any

import pytorch_lightning as lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split

from gramjd import Engine
from gramjd.weighting import UPGradWeighting


class Digits(lightning.LightningModule):
    """A classifier that weighs the samples of each batch by UPGrad."""

    def __init__(self, lr: float = 0.3) -> None:
        super().__init__()
        self.automatic_optimization = False  # the step is taken below
        self.lr = lr
        self.model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.engine = Engine(self.model, batch_dim=0)  # no module: not in checkpoints
        self.weighting = UPGradWeighting()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x)
        return out

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        losses = cross_entropy(self(x), y, reduction="none")  # one loss a sample
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.engine.backward(losses, self.weighting)  # in place of self.manual_backward(losses.mean())
        optimizer.step()
        self.log("train_loss", losses.mean())

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("accuracy", (self(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def load_data() -> TensorDataset:
    bunch = load_digits()
    return TensorDataset(torch.tensor(bunch.data, dtype=torch.float32) / 16, torch.tensor(bunch.target))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    lightning.seed_everything(0)
    train_set, test_set = random_split(load_data(), [1347, 450])
    trainer = lightning.Trainer(max_epochs=args.epochs, logger=False, enable_checkpointing=False)
    model = Digits()
    train_loader = DataLoader(train_set, batch_size=32, shuffle=True, drop_last=True)
    trainer.fit(model, train_loader, DataLoader(test_set, batch_size=450))
    print(f"Accuracy after {args.epochs} epochs: {trainer.callback_metrics['accuracy']:.1%}")


if __name__ == "__main__":
    main()
