"""Policy, value and entropy on one network: proximal policy optimisation of a pole on a cart.

The usual loss is a sum, `policy + 0.5 * value - 0.01 * entropy` (Schulman et al., arXiv 1707.06347). Here the
losses stay apart: all three, or the value apart from the policy with its entropy bonus. UPGrad (arXiv
2406.16232) takes no step that raises an objective; of three, it takes the numbers of the sum as preferences.
NashMTL (arXiv 2202.01017) does not depend on the scale of a loss.

Prints how long the pole stays up on average, in steps, and how often the losses conflict; writes `pole.png`
into the folder given by --out.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss

import gramjd
from gramjd.diagnostics import conflict_rate
from gramjd.weighting import UPGradWeighting, nash_mtl, upgrad

AGENTS, LENGTH, EPOCHS = 16, 64, 10
SHARES = torch.tensor([1.0, 0.5, 0.01])  # of policy, value, entropy

# For each, the objectives as rows of coefficients of policy, value and entropy, and a weighting of them.
APART, JOINED = torch.eye(3), torch.tensor([[1.0, 0.0, 0.01], [0.0, 1.0, 0.0]])
METHODS: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {
    "fixed sum": (APART, lambda gramian: SHARES),
    "fixed sum, value × 0.01": (APART, lambda gramian: torch.tensor([1.0, 0.005, 0.01])),
    "three losses, UPGrad": (APART, UPGradWeighting(SHARES)),
    "three losses, NashMTL": (APART, lambda gramian: nash_mtl(gramian)),
    "two losses, UPGrad": (JOINED, upgrad),
    "two losses, NashMTL": (JOINED, lambda gramian: nash_mtl(gramian)),
}
COLORS = dict(zip(METHODS, ["#000000", "#999999", "#e69f00", "#56b4e9", "#d55e00", "#009e73"], strict=True))


class ActorCritic(nn.Module):
    """A trunk that the policy and the value share."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.policy, self.value = nn.Linear(width, 2), nn.Linear(width, 1)

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the actions, and the value of the state."""
        features = self.trunk(state)
        return self.policy(features).log_softmax(-1), self.value(features).squeeze(-1)


def physics(state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """The next states `[n, 4]`, and which poles fell (Barto, Sutton and Anderson, 1983)."""
    _, speed, angle, spin = state.unbind(-1)
    sine, cosine = angle.sin(), angle.cos()
    push = (torch.where(action == 1, 10.0, -10.0) + 0.05 * spin**2 * sine) / 1.1
    turn = (9.8 * sine - cosine * push) / (0.5 * (4 / 3 - 0.1 * cosine**2 / 1.1))
    state = state + 0.02 * torch.stack([speed, push - 0.05 * turn * cosine / 1.1, spin, turn], -1)
    return state, (state[:, 0].abs() > 2.4) | (state[:, 2].abs() > 0.2094)


def starts() -> Tensor:
    return 0.1 * torch.rand(AGENTS, 4) - 0.05


@torch.no_grad()
def rollout(model: ActorCritic, state: Tensor) -> tuple[Tensor, dict[str, Tensor], int]:
    """The last states; what was seen, one row a sample; how many poles fell."""
    seen: dict[str, list[Tensor]] = {name: [] for name in ("state", "action", "chance", "value", "up")}
    for _ in range(LENGTH):
        chances, value = model(state)
        action = torch.multinomial(chances.exp(), 1)
        following, fell = physics(state, action.squeeze(-1))
        chance = chances.gather(-1, action).squeeze(-1)
        for name, entry in zip(seen, (state, action, chance, value, (~fell).float()), strict=True):
            seen[name].append(entry)
        state = torch.where(fell.unsqueeze(-1), starts(), following)
    batch = {name: torch.stack(each) for name, each in seen.items()}
    following = torch.cat([batch["value"][1:], model(state)[1].unsqueeze(0)])
    surprise = 1 + 0.99 * following * batch["up"] - batch["value"]
    advantage, total = torch.empty_like(surprise), torch.zeros(AGENTS)
    for t in reversed(range(LENGTH)):  # generalized advantage estimation, arXiv 1506.02438
        total = surprise[t] + 0.99 * 0.95 * batch["up"][t] * total
        advantage[t] = total
    batch["return"] = advantage + batch["value"]
    batch["advantage"] = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    return state, {name: each.flatten(0, 1) for name, each in batch.items()}, int((1 - batch["up"]).sum())


def losses_of(model: ActorCritic, batch: dict[str, Tensor]) -> Tensor:
    """The losses of policy, value and entropy, `[3]`."""
    chances, value = model(batch["state"])
    ratio = (chances.gather(-1, batch["action"]).squeeze(-1) - batch["chance"]).exp()
    gain = torch.minimum(ratio * batch["advantage"], ratio.clamp(0.8, 1.2) * batch["advantage"])
    entropy = -(chances.exp() * chances).sum(-1)
    return torch.stack([-gain.mean(), smooth_l1_loss(value, batch["return"]), -entropy.mean()])


def train(method: str, rounds: int, seed: int) -> tuple[list[float], float]:
    """Mean steps between falls in each round, and the share of pairs of losses that conflict."""
    torch.manual_seed(seed)
    model, (objectives, weigh), rates = ActorCritic(), METHODS[method], []
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    state, lengths = starts(), []

    def watched(gramian: Tensor) -> Tensor:
        rates.append(conflict_rate(gramian))
        return weigh(gramian)

    for _ in range(rounds):
        state, batch, falls = rollout(model, state)
        lengths.append(AGENTS * LENGTH / max(falls, 1))
        for _ in range(EPOCHS):
            losses = objectives @ losses_of(model, batch)
            optimizer.zero_grad()
            gramjd.backward(losses, watched)
            optimizer.step()
    return lengths, sum(rates) / len(rates)


def plot(curves: dict[str, list[list[float]]]) -> Figure:
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, mine in curves.items():
        middle = torch.tensor(mine).median(0).values
        axes.semilogy(middle, label=name, color=COLORS[name])
    axes.set(xlabel="rounds of 1,024 samples", ylabel="steps between falls", title="A pole on a cart")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR")
    args = parser.parse_args()

    curves = {}
    print("| method | steps between falls, first | last | pairs in conflict |\n|---|---|---|---|")
    for name in METHODS:
        runs = [train(name, args.rounds, seed) for seed in range(args.seeds)]
        curves[name] = [lengths for lengths, _ in runs]
        lengths = torch.tensor(curves[name])
        tail = max(1, args.rounds // 10)
        first, last = (float(part.mean(1).median()) for part in (lengths[:, :tail], lengths[:, -tail:]))
        rate = sum(rate for _, rate in runs) / len(runs)
        print(f"| {name} | {first:.0f} | {last:.0f} | {rate:.0%} |", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    plot(curves).savefig(args.out / "pole.png", dpi=150)


if __name__ == "__main__":
    main()
