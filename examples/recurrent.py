"""A recurrent network with a loss for each time step, or for each sequence: both are exact.

TorchJD's engine refuses recurrent layers with a batch dimension; here they need nothing special. Prints the
mean loss of both runs.
"""

import torch
from torch import Tensor, nn

from gramjd import Engine
from gramjd.weighting import UPGradWeighting


def train(batch_dim: int | None) -> Tensor:
    """Losses of the first and of the last step, `[2]`: over sequences, or over time for `None`."""
    torch.manual_seed(0)
    rnn, head = nn.GRU(input_size=4, hidden_size=8, batch_first=True), nn.Linear(8, 1)
    x = torch.randn(16, 12, 4)  # 16 sequences of 12 steps
    y = x.sum(2).cumsum(1) / 4
    model = nn.ModuleList([rnn, head])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    engine, weighting = Engine(rnn, head, batch_dim=batch_dim), UPGradWeighting()
    history = []
    for _ in range(60):
        errors = (head(rnn(x)[0])[..., 0] - y).square()  # [16, 12]
        losses = errors.mean(0) if batch_dim is None else errors.mean(1)  # [12] or [16]
        optimizer.zero_grad()
        engine.backward(losses, weighting)
        optimizer.step()
        history.append(losses.mean().detach())
    return torch.stack([history[0], history[-1]])


def main() -> None:
    for what, batch_dim in (("time step", None), ("sequence", 0)):
        first, last = train(batch_dim)
        print(f"a loss for each {what}: {first:.3f} at first, {last:.3f} at last")


if __name__ == "__main__":
    main()
