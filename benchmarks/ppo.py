"""Gramians as they occur: one PPO loss per sample of an actor-critic that learns to balance a pole.

Unlike those of random gradients, they have a few large eigenvalues and very many small ones, and
their solutions have many positive entries: harder for every quadratic program.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss

from gramjd import Engine

AGENTS, STEPS, EPOCHS = 16, 128, 4
LOSSES = ("whole", "huber", "scaled", "policy")  # of which value loss, see `losses_of`


class ActorCritic(nn.Module):
    """Log-probabilities of two actions, and the value of a state."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()

        def network(outputs: int) -> nn.Module:
            hidden = [nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
            return nn.Sequential(*hidden, nn.Linear(width, outputs))

        self.policy, self.value = network(2), network(1)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.policy(state).log_softmax(-1), self.value(state).squeeze(-1)


def cart_pole(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """The next states ``[n, 4]``, and which poles fell; Barto, Sutton and Anderson (1983)."""
    _, speed, angle, spin = state.unbind(-1)
    sine, cosine = angle.sin(), angle.cos()
    push = (torch.where(action == 1, 10.0, -10.0) + 0.05 * spin**2 * sine) / 1.1
    turn = (9.8 * sine - cosine * push) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
    change = torch.stack([speed, push - 0.05 * turn * cosine / 1.1, spin, turn], -1)
    state = state + 0.02 * change
    return state, (state[:, 0].abs() > 2.4) | (state[:, 2].abs() > 0.2094)


@torch.no_grad()
def rollout(model: ActorCritic, state: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The last state, and per sample: state, action, its log-probability, advantage, return."""
    seen = []
    for _ in range(STEPS):
        chances, value = model(state)
        action = torch.multinomial(chances.exp(), 1)
        following, fell = cart_pole(state, action.squeeze(-1))
        seen.append((state, action, chances.gather(-1, action).squeeze(-1), value, ~fell))
        state = torch.where(fell.unsqueeze(-1), 0.1 * torch.rand_like(state) - 0.05, following)
    states, actions, chances, values, going = (torch.stack(each) for each in zip(*seen, strict=True))
    following = torch.cat([values[1:], model(state)[1].unsqueeze(0)])
    surprise = 1 + 0.99 * following * going - values
    advantages, total = torch.empty_like(values), torch.zeros(AGENTS)
    for step in reversed(range(STEPS)):  # Schulman et al. (2016), generalized advantage estimation
        total = surprise[step] + 0.99 * 0.95 * going[step] * total
        advantages[step] = total
    unit = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    samples = (states, actions, chances, unit, advantages + values)
    return state, [each.flatten(0, 1) for each in samples]


def losses_of(model: ActorCritic, kind: str, state: Tensor, action: Tensor, chance: Tensor,
              advantage: Tensor, value: Tensor) -> Tensor:  # fmt: skip
    """Schulman et al. (2017), arXiv 1707.06347, Equation 9, without the mean over samples."""
    chances, guess = model(state)
    ratio = (chances.gather(-1, action).squeeze(-1) - chance).exp()
    policy = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    entropy = -(chances.exp() * chances).sum(-1)
    errors = {
        "whole": (guess - value).square(),
        "huber": smooth_l1_loss(guess, value, reduction="none"),
        "scaled": (guess - value / 20).square(),
        "policy": torch.zeros_like(value),
    }
    return policy + 0.5 * errors[kind] - 0.01 * entropy


def gramians(size: int, kind: str = "whole", rounds: int = 6, seed: int = 0) -> list[Tensor]:
    """Two Gramians ``[size, size]`` of each round of training: from its first and its last epoch."""
    torch.manual_seed(seed)
    model = ActorCritic()
    engine, optimizer = Engine(model, batch_dim=0), torch.optim.Adam(model.parameters(), 1e-3)
    state, found = 0.1 * torch.rand(AGENTS, 4) - 0.05, []
    for _ in range(rounds):
        state, samples = rollout(model, state)
        for epoch in range(EPOCHS):
            order = torch.randperm(AGENTS * STEPS)
            batches = order[: len(order) // size * size].split(size)
            for number, batch in enumerate(batches):
                losses = losses_of(model, kind, *(each[batch] for each in samples))
                if number == 0 and epoch in (0, EPOCHS - 1):
                    found.append(engine.compute_gramian(losses).detach())
                optimizer.zero_grad()
                losses.mean().backward()
                optimizer.step()
    return found
