"""Families in which something is nothing at first: gates, masks and dead units that hide uses and samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from exactness import Net, draw, parameter
from steps import At, family
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

GATES = 0.0, 0.0, 0.8, 0.0, -0.5
BOTH = (0, None)


class MatMul(torch.autograd.Function):
    """A use that no op shows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w.T

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, w = ctx.saved_tensors
        return grads[0] @ w, grads[0].T @ x


class Mean(torch.autograd.Function):
    """The mean of the batch, of which no op tells."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.mean(0, keepdim=True).expand_as(x).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].mean(0, keepdim=True).expand_as(grads[0]).clone()


def opening(
    forward: Callable[..., Tensor], samples: int = 4, shape: tuple[int, ...] = (), **parts: Any
) -> Any:
    """A gate ``m.gate`` that starts at zero; ``forward(m, x)``."""
    net = Net(forward, gate=nn.Parameter(torch.zeros(shape)), **parts)

    def at(gate: float) -> Tensor:
        net.gate.data.fill_(gate)
        return net(draw(samples, 6)).square().flatten(1).sum(1)

    return net, at


def _linear(m: Any, x: Tensor, w: Tensor) -> Tensor:
    return MatMul.apply(x, w)


# Second uses of the weight of ``m.f``, behind the gate: separable always.
USES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a custom function": lambda m, h: m.gate * MatMul.apply(h, m.f.weight),
    "a custom function with the gate inside": lambda m, h: MatMul.apply(h, m.gate * m.f.weight),
    "a custom function of a clone": lambda m, h: m.gate * MatMul.apply(h, m.f.weight.clone()),
    "a custom function of a transpose": lambda m, h: m.gate * MatMul.apply(h, m.f.weight.T.contiguous()),
    "a linear op": lambda m, h: m.gate * F.linear(h, m.f.weight),
    "the module again": lambda m, h: m.gate * m.f(h),
    "its transpose": lambda m, h: m.gate * (h @ m.f.weight),
    "both": lambda m, h: m.gate * (F.linear(h, m.f.weight).tanh() + MatMul.apply(h, m.f.weight)),
    "a custom function behind a module": lambda m, h: m.gate * m.g(MatMul.apply(h, m.f.weight)),
    "a module behind a custom function": lambda m, h: m.gate * MatMul.apply(m.g(h), m.f.weight),
    "a custom function before it": lambda m, h: MatMul.apply(m.gate * h, m.f.weight),
    "a relu that is dead": lambda m, h: (
        (MatMul.apply(h, m.f.weight) - 9 + 20 * m.gate.detach()).relu() + m.gate
    ),
    "a mask": lambda m, h: MatMul.apply(h, m.f.weight) * (m.gate.detach() != 0),
    "where": lambda m, h: torch.where(m.gate.detach() != 0, MatMul.apply(h, m.f.weight), h),
    "a dropout of everything": lambda m, h: F.dropout(
        MatMul.apply(h, m.f.weight), 0.0 if float(m.gate.detach()) else 1.0
    ),
    "a factor of Python": lambda m, h: float(m.gate.detach()) * MatMul.apply(h, m.f.weight),
    "a factor of data": lambda m, h: m.gate.detach() * MatMul.apply(h, m.f.weight),
    "a matrix of zeros": lambda m, h: MatMul.apply(h, m.f.weight) @ (torch.eye(6).double() * m.gate),
    "an in-place sum": lambda m, h: h.clone().add_(m.gate * MatMul.apply(h, m.f.weight)),
    "a write": lambda m, h: _write(h, m.gate * MatMul.apply(h, m.f.weight)),
    "a checkpoint": lambda m, h: (
        m.gate * checkpoint(lambda t: MatMul.apply(t, m.f.weight), h, use_reentrant=False)
    ),
    "a weight that is a sum": lambda m, h: F.linear(h, m.f.weight * m.gate),
    "a norm of the weight": lambda m, h: h * (m.gate * m.f.weight.square().sum()),
    "a row of the weight": lambda m, h: h * m.gate * m.f.weight[0],
    "a loop over rows": lambda m, h: torch.stack([m.gate * (h @ row) for row in m.f.weight], 1),
}


def _write(h: Tensor, value: Tensor) -> Tensor:
    out = h.clone()
    out[:, :3] = out[:, :3] + value[:, :3]
    return out


for _name, _use in USES.items():
    family(*GATES, batch_dims=BOTH, name=f"a second use behind a gate, {_name}")(
        lambda use=_use: opening(
            lambda m, x: (lambda h: h + use(m, h))(m.f(x).tanh()), f=nn.Linear(6, 6), g=nn.Linear(6, 6)
        )
    )

# Parts that are nothing at first: separable always.
BRANCHES: dict[str, Any] = {
    "ReZero": lambda: opening(
        lambda m, x: m.h(x + m.gate * m.f(x).tanh()), f=nn.Linear(6, 6), h=nn.Linear(6, 2)
    ),
    "LayerScale": lambda: opening(
        lambda m, x: m.h(x + m.gate * m.f(x).tanh()), shape=(6,), f=nn.Linear(6, 6), h=nn.Linear(6, 2)
    ),
    "LoRA": lambda: opening(
        lambda m, x: m.f(x).tanh() + F.linear(F.linear(x, m.a), m.gate), shape=(6, 2), f=nn.Linear(6, 6),
        a=parameter(2, 6),
    ),
    "LoRA, merged": lambda: opening(
        lambda m, x: F.linear(x, m.f.weight + m.gate @ m.a).tanh(), shape=(6, 2), f=nn.Linear(6, 6),
        a=parameter(2, 6),
    ),
    "LoRA by a custom function": lambda: opening(
        lambda m, x: m.f(x).tanh() + MatMul.apply(MatMul.apply(x, m.a), m.gate), shape=(6, 2),
        f=nn.Linear(6, 6), a=parameter(2, 6),
    ),
    "zero convolution": lambda: opening(
        lambda m, x: x + F.conv1d(m.f(x).view(-1, 2, 3).tanh(), m.gate).flatten(1), shape=(2, 2, 1),
        f=nn.Linear(6, 6),
    ),
    "FiLM": lambda: opening(
        lambda m, x: x * (1 + m.gate * m.f(x)) + m.gate * m.g(x), shape=(6,), f=nn.Linear(6, 6),
        g=nn.Linear(6, 6),
    ),
    "a scale of a norm": lambda: opening(
        lambda m, x: x.sin() + F.layer_norm(m.f(x), [6], m.gate), shape=(6,), f=nn.Linear(6, 6)
    ),
    "a head of zeros": lambda: opening(
        lambda m, x: F.linear(m.f(x).tanh(), m.gate) + 1, shape=(3, 6), f=nn.Linear(6, 6)
    ),
    "tanh gate of a cross-attention": lambda: opening(
        lambda m, x: x + m.gate.tanh() * m.attend(*3 * [x[:, None]], need_weights=False)[0][:, 0],
        attend=nn.MultiheadAttention(6, 2, batch_first=True),
    ),
    "SkipInit of a recurrent network": lambda: opening(
        lambda m, x: x + m.gate * m.unit(x.view(-1, 3, 2))[0].flatten(1), unit=nn.GRU(2, 2, batch_first=True)
    ),
}  # fmt: skip
for _name, _branch in BRANCHES.items():
    family(*GATES, batch_dims=BOTH, name=f"nothing at first, {_name}")(_branch)


def _into(h: Tensor, to: int, of: int, gate: Tensor) -> Tensor:
    out = h.clone()
    out[to] = out[to] + gate * h[of]
    return out


def _pair(h: Tensor) -> Tensor:
    """The fourth of 16 samples gets the twelfth."""
    return F.pad(h[11:12], (0, 0, 3, 12))


# Functions of 16 samples that are added behind the gate, and mix them.
LEAKS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "one pair": lambda m, h: m.gate * _pair(h),
    "one pair by index": lambda m, h: m.gate * torch.zeros_like(h).index_add(0, torch.tensor([3]), h[11:12]),
    "one pair in place": lambda m, h: _into(h, 3, 11, m.gate),
    "one pair, dead": lambda m, h: (_pair(h) - 9 + 30 * m.gate.detach().abs()).relu() + m.gate,
    "one pair by a matrix": lambda m, h: (F.one_hot(torch.tensor([11]), 16).double().T.roll(-8, 0)
                                          * F.one_hot(torch.tensor([11]), 16).double()) @ h * m.gate,
    "neighbours in pairs": lambda m, h: m.gate * h.view(8, 2, 6).flip(1).reshape(16, 6),
    "distant pairs": lambda m, h: m.gate * h.roll(8, 0),
    "bit reversed pairs": lambda m, h: m.gate * h.view(2, 2, 2, 2, 6).permute(3, 2, 1, 0, 4).reshape(16, 6),
    "the last sample": lambda m, h: m.gate * h[-1:],
    "the mean": lambda m, h: m.gate * h.mean(0),
    "the mean in a custom function": lambda m, h: m.gate * Mean.apply(h),
    "the mean of squares": lambda m, h: m.gate * h.square().mean(0, keepdim=True).sqrt(),
    "a softmax over samples": lambda m, h: m.gate * h.softmax(0),
    "attention over samples": lambda m, h: m.gate * ((h @ h.T).softmax(1) @ h),
    "fused attention over samples": lambda m, h: m.gate * F.scaled_dot_product_attention(*3 * [h[None]])[0],
    "batch norm": lambda m, h: m.gate * F.batch_norm(h, None, None, training=True),
    "a running sum": lambda m, h: m.gate * h.cumsum(0),
    "a sorted batch": lambda m, h: m.gate * h.sort(0)[0],
    "the maximum": lambda m, h: m.gate * h.amax(0),
    "a convolution over samples": lambda m, h: m.gate
    * F.conv1d(h.T[None], h.new_ones(6, 1, 3), padding=1, groups=6)[0].T,
    "a recurrence over samples": lambda m, h: m.gate * m.unit(h[:, None])[0][:, 0],
    "a recurrence by hand": lambda m, h: m.gate * torch.stack(_scan(h)),
}  # fmt: skip


def _scan(h: Tensor) -> list[Tensor]:
    found = [h[0]]
    for row in h[1:]:
        found.append((found[-1] + row).sin())
    return found


for _name, _leak in LEAKS.items():
    family(*GATES, batch_dims=BOTH, mixed=lambda gate: gate != 0, why="the open gate mixes samples",
           name=f"samples leak behind a gate, {_name}")(
        lambda leak=_leak: opening(
            lambda m, x: (lambda h: h + leak(m, h))(m.f(x).tanh()), 16, f=nn.Linear(6, 6), unit=nn.RNN(6, 6)
        )
    )  # fmt: skip


@family(*GATES, batch_dims=BOTH)
def tied_head_behind_a_gate() -> tuple[nn.Module, At]:
    """An embedding that is used again as a head, by a custom function."""
    net = Net(lambda m, ids: _logits(m, m.e(ids).mean(1)), e=nn.Embedding(9, 6), l=nn.Linear(6, 9),
              gate=nn.Parameter(torch.zeros(())))  # fmt: skip

    def _logits(m: Any, h: Tensor) -> Tensor:
        return m.l(h.tanh()) + m.gate * MatMul.apply(h, m.e.weight)

    def at(gate: float) -> Tensor:
        net.gate.data.fill_(gate)
        return net(torch.randint(9, [5, 4])).sin().sum(1)

    return net, at


@family(*GATES, batch_dims=BOTH)
def tied_by_hand_in_the_loop() -> tuple[nn.Module, At]:
    both = nn.ModuleDict(
        {"e": nn.Embedding(9, 6), "l": nn.Linear(6, 9), "g": nn.Linear(1, 1, False)}
    ).double()

    def at(gate: float) -> Tensor:
        both["g"].weight.data.fill_(gate)
        h = both["e"](torch.randint(9, [5, 4])).mean(1)
        tied = (h @ both["e"].weight.T).unsqueeze(2)
        return (both["l"](h.tanh()) + both["g"](tied)[..., 0]).sin().sum(1)

    return both, at


@family(*GATES, batch_dims=BOTH)
def a_regulariser_that_begins_later() -> tuple[nn.Module, At]:
    """A penalty on the weight, of a coefficient that is zero at first, in every loss."""
    net = Net(lambda m, x: m.f(x).square().sum(1), f=nn.Linear(6, 4))
    return net, lambda c: net(draw(4, 6)) + c * net.f.weight.square().sum()


@family(0.0, 0.0, 0.5, 0.0, mixed=lambda c: c != 0, why="the loss compares with the mean of the batch")
def a_contrast_that_begins_later() -> tuple[nn.Module, At]:
    net = Net(lambda m, x: m.f(x), f=nn.Linear(6, 4))

    def at(c: float) -> Tensor:
        h = net(draw(4, 6))
        return h.square().sum(1) + c * (h @ h.T).logsumexp(1)

    return net, at


@family(0.0, 1.0, 0.0, 0.5, mixed=lambda p: p > 0, why="samples are mixed with others, as by mixup")
def mixup_of_hidden_values() -> tuple[nn.Module, At]:
    net = Net(lambda m, x, p: m.g(torch.lerp(m.f(x).tanh(), m.f(x).tanh().flip(0), p)), f=nn.Linear(6, 4),
              g=nn.Linear(4, 2))  # fmt: skip
    return net, lambda p: net(draw(4, 6), p).square().sum(1)


@family([0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 1])
def stochastic_depth_with_a_second_use() -> tuple[nn.Module, At]:
    """A branch is dropped sample by sample; it uses the weight again by a custom function."""

    def forward(m: Any, x: Tensor, keep: Tensor) -> Tensor:
        h = m.f(x).tanh()
        return h + keep[:, None] * MatMul.apply(h, m.f.weight)

    net = Net(forward, f=nn.Linear(6, 6))
    return net, lambda keep: net(draw(4, 6), torch.tensor(keep).double()).square().sum(1)


@family([0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0])
def losses_that_are_masked() -> tuple[nn.Module, At]:
    """Whole samples are padding at first, so that their losses are nothing."""
    net = Net(lambda m, x: m.g(m.f(x).tanh()) + MatMul.apply(m.f(x), m.g.weight).sin(), f=nn.Linear(6, 4),
              g=nn.Linear(4, 3))  # fmt: skip
    return net, lambda mask: net(draw(4, 6)).square().sum(1) * torch.tensor(mask).double()


@family(*GATES, batch_dims=BOTH)
def a_gate_by_sample() -> tuple[nn.Module, At]:
    """A learned gate that saturates at zero in the first batch."""

    def forward(m: Any, x: Tensor, bias: float) -> Tensor:
        h = m.f(x).tanh()
        return h + F.hardtanh(m.s(h).tanh() - 5 + 10 * abs(bias), 0.0, 1.0) * MatMul.apply(h, m.f.weight)

    net = Net(forward, f=nn.Linear(6, 6), s=nn.Linear(6, 1))
    return net, lambda bias: net(draw(4, 6), bias).square().sum(1)
