"""Checkpoint and resume: a run that is cut off and goes on ends where the uninterrupted one does.

What has to be saved besides model and optimizer: the state of the weighting, if it has one (NashMTL,
GradVac, CR-MOGM), and the random numbers. An `Engine` has nothing to save. Prints whether the parameters
of both runs are equal, bit by bit.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from gramjd import Engine
from gramjd.weighting import CRMOGMWeighting, UPGradWeighting


class Run:
    """Everything that a training run consists of."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 4))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2)
        self.weighting = CRMOGMWeighting(UPGradWeighting())  # smooths the weights from step to step
        self.engine = Engine(self.model, batch_dim=0)
        self.step = 0

    def train(self, steps: int) -> None:
        while self.step < steps:
            x = torch.randn(16, 20)
            losses = cross_entropy(self.model(x), x[:, :4].argmax(1), reduction="none")
            weights = self.weighting(self.engine.compute_gramian(losses))
            self.optimizer.zero_grad()
            losses.backward(weights)
            self.optimizer.step()
            self.step += 1

    def save(self, path: Path) -> None:
        """Save all of a checkpoint or nothing: a file that was cut off never gets the name."""
        states = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "weighting": self.weighting.state_dict(),
            "step": self.step,
            "random": torch.get_rng_state(),
        }
        part = path.with_suffix(".part")
        torch.save(states, part)
        part.replace(path)

    def load(self, path: Path) -> None:
        found = torch.load(path, weights_only=True)
        self.model.load_state_dict(found["model"])
        self.optimizer.load_state_dict(found["optimizer"])
        self.weighting.load_state_dict(found["weighting"])
        self.step = found["step"]
        torch.set_rng_state(found["random"])


def parameters(run: Run) -> Tensor:
    return nn.utils.parameters_to_vector(run.model.parameters()).detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    whole = Run()
    whole.train(args.steps)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        cut = Run()
        cut.train(args.steps // 2)
        cut.save(path)
        resumed = Run()
        resumed.load(path)
        resumed.train(args.steps)
    same = torch.equal(parameters(whole), parameters(resumed))
    print(
        f"Resumed after step {args.steps // 2} of {args.steps}: parameters are {'' if same else 'not '}equal."
    )


if __name__ == "__main__":
    main()
