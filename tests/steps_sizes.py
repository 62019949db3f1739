"""Families in which sizes of batches and pieces change, or one batch leaves several layouts open."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from exactness import Net, draw, parameter
from steps import At, family
from torch import Tensor, nn

# Functions of hidden values ``[B, 4]`` that mix samples, which a batch of one does not show.
MIXES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda h: h - h.mean(0),
    "softmax": lambda h: h.softmax(0),
    "running sum": lambda h: h.cumsum(0),
    "roll": lambda h: h + h.roll(1, 0),
    "flip": lambda h: h + h.flip(0),
    "attention": lambda h: (h @ h.T).softmax(1) @ h,
    "fused attention": lambda h: F.scaled_dot_product_attention(h[None], h[None], h[None])[0],
    "maximum": lambda h: h + h.amax(0),
    "first sample": lambda h: h + h[:1],
    "last sample": lambda h: h + h[-1],
    "sort": lambda h: h.sort(0)[0] + h,
    "norm": lambda h: h / h.norm(),
    "layer norm": lambda h: F.layer_norm(h, h.shape),
    "convolution": lambda h: F.conv1d(h.T[None], h.new_ones(4, 4, 3), padding=1)[0].T,
    "transpose": lambda h: h + h.reshape(4, -1).T,
}
for _name, _mix in MIXES.items():
    family(
        1, 1, 4, 1, 3,
        mixed=lambda batch: batch > 1,
        why="samples are mixed",
        name=f"a batch of one first, {_name}",
    )(lambda mix=_mix: _batches(mix))  # fmt: skip


def _batches(mix: Callable[[Tensor], Tensor]) -> tuple[nn.Module, At]:
    net = Net(lambda m, x: m.last(mix(m.first(x).tanh())), first=nn.Linear(3, 4), last=nn.Linear(4, 2))
    return net, lambda batch: net(draw(batch, 3)).square().sum(1)


@family(1, 1, 4, 1, 3, 2)
def tokens_without_samples_and_a_batch_of_one() -> tuple[nn.Module, At]:
    """``[1, T, d]`` of parameters beside ``[B, T, d]`` of samples."""

    def forward(m: Any, x: Tensor) -> Tensor:
        token = m.f(m.token.expand(len(x), -1, -1)) + m.f(m.places)[None]
        return torch.cat([token[:, :1], m.f(x) + m.f(m.places)], 1).tanh()

    net = Net(forward, f=nn.Linear(3, 3), token=parameter(1, 1, 3), places=parameter(3, 3))
    return net, lambda batch: net(draw(batch, 3, 3)).square().sum((1, 2))


MASKS = {
    "one": torch.eye(4)[:1].T @ torch.eye(4)[:1],
    "diagonal": torch.eye(4),
    "row": torch.eye(4)[:, :1].expand(4, 4).clone().T,
    "column": torch.eye(4)[:, :1].expand(4, 4).clone(),
    "all": torch.ones(4, 4),
}


@family("one", "all", "one", "diagonal", "all")
def positions_that_leave_the_layout_open() -> tuple[nn.Module, At]:
    """``[B * T]`` with losses at so few positions that these could be of time or of samples."""
    net = Net(lambda m, x: m.last(m.first(x).tanh()), first=nn.Linear(3, 4), last=nn.Linear(4, 1))

    def at(kind: str) -> Tensor:
        return (net(draw(16, 3)).view(4, 4).square() * MASKS[kind].double()).sum(1)

    return net, at


@family(
    ("one", 1),
    ("all", 0),
    ("one", 0),
    ("diagonal", 1),
    ("all", 1),
    ("diagonal", 0),
    ("row", 0),
    ("column", 1),
)
def positions_that_leave_the_layout_open_by_either_dimension() -> tuple[nn.Module, At]:
    net = Net(lambda m, x: m.last(m.first(x).tanh()), first=nn.Linear(3, 4), last=nn.Linear(4, 1))

    def at(setting: tuple[str, int]) -> Tensor:
        kind, dim = setting
        return (net(draw(16, 3)).view(4, 4).square() * MASKS[kind].double()).sum(dim)

    return net, at


@family([1, 3], [3, 1], [2, 2], [1, 1, 2], [2, 1, 1], [1, 3])
def micro_batches_of_unequal_sizes() -> tuple[nn.Module, At]:
    net = Net(lambda m, x: m.last(m.first(x).tanh()), first=nn.Linear(3, 4), last=nn.Linear(4, 2))
    return net, lambda sizes: torch.cat([net(draw(n, 3)) for n in sizes]).square().sum(1)


@family([1, 3], [3, 1], [2, 2], [1, 3])
def micro_batches_of_losses_by_time() -> tuple[nn.Module, At]:
    """Micro-batches ``[T, b, d]``, concatenated along their second dimension."""
    net = Net(lambda m, x: m.last(m.first(x).tanh()), first=nn.Linear(3, 4), last=nn.Linear(4, 2))
    return net, lambda sizes: torch.cat([net(draw(3, n, 3)) for n in sizes], 1).square().sum((0, 2))


@family(False, True, False, True)
def twins_that_change_places() -> tuple[nn.Module, At]:
    """Two forwards; the losses have the first in the place of the second."""
    net = Net(lambda m, x: m.last(m.first(x).tanh()), first=nn.Linear(3, 4), last=nn.Linear(4, 2))

    def at(swapped: bool) -> Tensor:
        a, b = net(draw(3, 4, 3)), net(draw(4, 3, 3))
        if swapped:
            return _both(b, a.transpose(0, 1))
        return _both(a.transpose(0, 1), b)

    return net, at


def _both(a: Tensor, b: Tensor) -> Tensor:
    return a.square().sum((1, 2)) + b.sin().sum((1, 2))


@family(3, 4, 2, 3, 1, 4)
def modulated_convolution_of_other_batches() -> tuple[nn.Module, At]:
    """As many groups as samples, in channels."""

    def forward(m: Any, x: Tensor, style: Tensor) -> Tensor:
        b = len(x)
        kernels = (m.kernel * m.style(style)[:, None, :, None]).flatten(0, 1)
        return F.conv1d(m.first(x).reshape(1, b * 3, 5), kernels, groups=b).view(b, 2, 3)

    net = Net(forward, first=nn.Linear(2, 5), style=nn.Linear(4, 3), kernel=parameter(2, 3, 3))
    return net, lambda b: net(draw(b, 3, 2), draw(b, 4)).square().sum((1, 2))


@family("same", "permuted", "same", "detached", "permuted",
        mixed=lambda kind: kind == "permuted", why="states come from another sample's past")  # fmt: skip
def states_carried_over_from_an_earlier_forward() -> tuple[nn.Module, At]:
    """The graph reaches into another forward."""
    net = Net(lambda m, x, h: m.cell(x, h), cell=nn.GRUCell(3, 4))

    def at(kind: str) -> Tensor:
        past = net(draw(4, 3), torch.zeros(4, 4).double())
        past = past.detach() if kind == "detached" else past[[1, 0, 3, 2]] if kind == "permuted" else past
        now = net(draw(4, 3), past)
        return now.square().sum(1) + (past.square().sum(1) if kind != "detached" else 0)

    return net, at


@family(0, 1, 0, 1, batch_dims=(1,))
def losses_of_two_objectives_first() -> tuple[nn.Module, At]:
    """``[2, B]``; one of the objectives is nothing in some steps."""
    net = Net(lambda m, x: m.last(m.first(x).tanh()), first=nn.Linear(3, 4), last=nn.Linear(4, 2))

    def at(weight: int) -> Tensor:
        h = net(draw(4, 3))
        return torch.stack([h.square().sum(1), weight * h.sin().sum(1)])

    return net, at


@family((4, 2), (2, 4), (4, 4), (8, 1), (4, 2), (1, 8))
def tokens_in_blocks_of_a_constant_size() -> tuple[nn.Module, At]:
    """Blocked attention: ``[B * T]`` in blocks, each of one sample or of a part of one."""

    def forward(m: Any, x: Tensor, batch: int, length: int) -> Tensor:
        block = min(length, 2)
        h = m.f(x).view(-1, block, 4)
        return ((h @ h.mT).softmax(2) @ h).reshape(batch, length * 4)

    net = Net(forward, f=nn.Linear(3, 4))
    return net, lambda s: net(draw(s[0] * s[1], 3), *s).square().sum(1)


@family(4, 2, 8, 4, 1, mixed=lambda batch: batch > 1, why="blocks of two tokens hold two samples")
def tokens_in_blocks_across_samples() -> tuple[nn.Module, At]:
    """Blocks of two: each token is a sample."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.f(x)
        h = torch.cat([h, h]) if len(h) == 1 else h
        blocks = h.view(-1, 2, 4)
        return ((blocks @ blocks.mT).softmax(2) @ blocks).reshape(-1, 4)[: len(x)]

    net = Net(forward, f=nn.Linear(3, 4))
    return net, lambda batch: net(draw(batch, 3)).square().sum(1)


# One entry of the parameter for each place, or, when the batch has as many samples, for each sample.
PER_ENTRY: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "divided": lambda x, s, t: x / s + t,
    "dividing": lambda x, s, t: t / (x.square() + s),
    "addcmul": lambda x, s, t: torch.addcmul(x, s, t),
    "addcdiv": lambda x, s, t: torch.addcdiv(x, s, t),
    "lerp": lambda x, s, t: torch.lerp(x, s, t),
    "where": lambda x, s, t: torch.where(x > 0, s, t),
    "power": lambda x, s, t: x.abs().add(1) ** s - t,
    "matmul": lambda x, s, t: (x.reshape(len(x), -1, 1) * s) @ t,
    "mv": lambda x, s, t: torch.mv(x.reshape(len(x), -1).expand(-1, 4), t) + s[0],
}
for _name, _op in PER_ENTRY.items():
    family(
        *[(5, 4)] * 6, (4,), (4, 4), (4,), (3, 4), (4, 1),
        mixed=lambda shape: shape[0] == 4,
        why="each sample uses an entry of its own",
        name=f"as many samples as entries, {_name}",
    )(lambda op=_op: _per_entry(op))  # fmt: skip


def _per_entry(op: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[nn.Module, At]:
    net = Net(lambda m, x: op(x, m.s, m.t), s=parameter(4), t=parameter(4))
    return net, lambda shape: net(draw(*shape)).reshape(shape[0], -1).tanh().square().sum(1)


# Functions of runs of hidden values ``[n, width, F]`` that mix the entries of each run.
IN_RUNS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda h: h.softmax(1),
    "mean": lambda h: h - h.mean(1, keepdim=True),
    "running sum": lambda h: h.cumsum(1),
    "maximum": lambda h: h + h.amax(1, keepdim=True),
}
for _name, _mix in IN_RUNS.items():
    family(
        *[7] * 6, 28, 14, 7, 28,
        mixed=lambda width: width > 14,
        why="runs have entries of two samples",
        name=f"runs of a part of the batch, {_name}",
    )(lambda mix=_mix: _runs_of_a_part(mix))  # fmt: skip
    family(
        *[2] * 6, 8, 4, 2, 8, 1,
        mixed=lambda width: width > 4,
        why="windows reach over two samples",
        name=f"windows over padded positions, {_name}",
    )(lambda mix=_mix: _padded_windows(mix))  # fmt: skip


def _runs_of_a_part(mix: Callable[[Tensor], Tensor]) -> tuple[nn.Module, At]:
    """The first four of ten samples, 14 entries each, joined with the others again."""
    net = Net(lambda m, x: m.first(x), first=nn.Linear(3, 14))

    def at(width: int) -> Tensor:
        h = net(draw(10, 3))
        part = mix(h[:4].reshape(-1, width, 1)).reshape(4, 14)
        return torch.cat([part, h[4:]]).square().sum(1)

    return net, at


def _padded_windows(mix: Callable[[Tensor], Tensor]) -> tuple[nn.Module, At]:
    """Three samples of eight positions, one after the other, behind four more that are zero."""
    net = Net(lambda m, x: m.first(x), first=nn.Linear(3, 5))

    def at(width: int) -> Tensor:
        h = F.pad(net(draw(24, 3)), (0, 0, 4, 20))  # [48, 5]
        h = h.reshape(3, 16 // width, width, 5)
        h = mix(h.transpose(1, 2)).transpose(1, 2).reshape(48, 5)[4:28]
        return h.reshape(3, -1).square().sum(1)

    return net, at
