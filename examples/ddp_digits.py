"""The digits of `train_digits.py` over several processes, with checkpoint and restart.

    torchrun --nproc-per-node=2 examples/ddp_digits.py --out out/ddp

Every process computes the losses of its share of each batch. The Gramian is that of the whole batch, so that
UPGrad's weights, and the step, are those of one process; `python examples/ddp_digits.py` runs one. A run that
was cut off goes on from the checkpoint in --out when it is started again. The loss curve, in
`losses.json`, is the same however many processes there are and wherever the run was cut off.
"""

import argparse
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from train_digits import load_data, losses_of, make_batches, make_model

from gramjd import Engine
from gramjd.distributed import local_weights
from gramjd.weighting import UPGradWeighting


class Run:
    """Everything that a training run consists of."""

    def __init__(self, seed: int, lr: float) -> None:
        self.model = DistributedDataParallel(make_model(seed).double())  # one model on all ranks
        self.engine = Engine(self.model, batch_dim=0)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr)
        self.weighting = UPGradWeighting()
        self.curve: list[float] = []  # mean loss of each step's batch, over all ranks

    def step(self, x: Tensor, y: Tensor) -> None:
        """One step on this rank's share of a batch."""
        group = dist.group.WORLD
        losses = losses_of(self.model, x, y)
        weights = self.weighting(self.engine.compute_gramian(losses, group=group))  # of the whole batch
        self.optimizer.zero_grad()
        losses.backward(local_weights(weights, losses, group))
        self.optimizer.step()
        total = torch.stack([losses.detach().sum(), torch.tensor(len(y)).double()])
        dist.all_reduce(total)
        self.curve.append(float(total[0] / total[1]))

    def save(self, path: Path) -> None:
        """Save all of a checkpoint or nothing, on the first rank."""
        if dist.get_rank() == 0:
            part = path.with_suffix(".part")
            states = {"model": self.model.module.state_dict(), "optimizer": self.optimizer.state_dict()}
            torch.save({**states, "curve": self.curve}, part)
            part.replace(path)
        dist.barrier()

    def load(self, path: Path) -> None:
        found = torch.load(path, weights_only=True)
        self.model.module.load_state_dict(found["model"])
        self.optimizer.load_state_dict(found["optimizer"])
        self.curve = found["curve"]


def share(batch: Tensor) -> Tensor:
    """This rank's part of a batch; parts may differ in size."""
    return batch.tensor_split(dist.get_world_size())[dist.get_rank()]


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=33)  # odd: shares of two ranks differ
    parser.add_argument("--lr", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=20, metavar="STEPS")
    parser.add_argument("--stop-after", type=int, metavar="STEPS", help="as if the run were cut off")
    parser.add_argument("--out", type=Path, default=Path("out/ddp"), metavar="DIR")
    args = parser.parse_args()
    if "RANK" not in os.environ:  # not started by torchrun
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    dist.init_process_group("gloo")
    train(args)
    dist.destroy_process_group()


def train(args: argparse.Namespace) -> None:
    """Train from the last checkpoint on, if there is one."""
    data = load_data(args.seed)
    x, y = data.train_x.double(), data.train_y
    run, checkpoint = Run(args.seed, args.lr), args.out / "checkpoint.pt"
    args.out.mkdir(parents=True, exist_ok=True)
    if checkpoint.exists():
        run.load(checkpoint)
    first = len(run.curve)
    batches = make_batches(len(y), args.batch_size, args.epochs, args.seed)[: args.stop_after]
    for step, batch in enumerate(batches[first:], first + 1):
        mine = share(batch)
        run.step(x[mine], y[mine])
        if step % args.save_every == 0:
            run.save(checkpoint)

    if dist.get_rank() == 0 and run.curve:
        (args.out / "losses.json").write_text(json.dumps(run.curve))
        print(
            f"Processes: {dist.get_world_size()}. Steps {first + 1} to {len(run.curve)}: loss "
            f"{run.curve[0]:.3f} at first, {run.curve[-1]:.3f} at last, test accuracy "
            f"{accuracy(run.model.module, data.test_x.double(), data.test_y):.1%}."
        )


if __name__ == "__main__":
    main()
