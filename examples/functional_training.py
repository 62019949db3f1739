"""Jacobian descent in functional style: pure functions from parameters to parameters.

Each step is one forward and one backward pass: the factors of the Jacobian give the Gramian, UPGrad's
weights, and then the weighted gradient, for which nothing is differentiated a second time. Adam is
written out, as a function from its state to the next one (Kingma and Ba, arXiv 1412.6980).
"""

import argparse
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gramjd
from gramjd.weighting import upgrad

Params = dict[str, Tensor]


class Adam(NamedTuple):
    """The state of the optimizer: how many steps it took, and running means of the gradients."""

    steps: int
    first: Params  # moments
    second: Params

    @staticmethod
    def init(params: Params) -> "Adam":
        zeros = {name: torch.zeros_like(p) for name, p in params.items()}
        return Adam(0, zeros, zeros)

    def update(self, params: Params, grads: Params, lr: float, b1: float = 0.9, b2: float = 0.999
               ) -> tuple[Params, "Adam"]:  # fmt: skip
        """The next parameters and the next state."""
        steps = self.steps + 1
        first = {name: b1 * m + (1 - b1) * grads[name] for name, m in self.first.items()}
        second = {name: b2 * v + (1 - b2) * grads[name] ** 2 for name, v in self.second.items()}

        def moved(name: str) -> Tensor:
            m, v = first[name] / (1 - b1**steps), second[name] / (1 - b2**steps)
            return params[name] - lr * m / (v.sqrt() + 1e-8)

        return {name: moved(name) for name in params}, Adam(steps, first, second)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()

    torch.manual_seed(0)
    bunch = load_digits()
    x, y = torch.tensor(bunch.data, dtype=torch.float32) / 16, torch.tensor(bunch.target)
    order = torch.randperm(len(x))
    train, test = order[:1347], order[1347:]

    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    loss, params = gramjd.functional_loss(model, nn.CrossEntropyLoss(reduction="none"))
    jacobian_and_losses = gramjd.jacobian_and_value(loss)
    state = Adam.init(params)
    for step in range(args.steps):
        batch = train[torch.randint(len(train), (args.batch_size,))]
        J, losses = jacobian_and_losses(params, x[batch], y[batch])
        weights = upgrad(J.gramian())  # [batch]
        params, state = state.update(params, J.vjp(weights), args.lr)
        if step % 50 == 0 or step == args.steps - 1:
            answers = torch.func.functional_call(model, params, (x[test],)).argmax(1)
            accuracy = (answers == y[test]).float().mean()
            print(f"step {step:4}  loss {losses.mean():.4f}  test accuracy {accuracy:.1%}")


if __name__ == "__main__":
    main()
