"""Families with ops that no rule covers, hooks on weight expressions, and complex values that mix samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from exactness import Net, draw, parameter
from steps import At, family
from torch import Tensor, nn

FIRST = torch.zeros(1, dtype=torch.int64)

# Ops with a parameter ``p [1, 6]`` that take all samples at once.
TOGETHER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index_add": lambda h, p: h.index_add(0, FIRST, p),
    "index_copy": lambda h, p: h.index_copy(0, FIRST, p),
    "index_put": lambda h, p: torch.index_put(h, (FIRST,), p),
    "slice_scatter": lambda h, p: torch.slice_scatter(h, p, 0, 0, 1),
    "select_scatter": lambda h, p: torch.select_scatter(h, p[0], 0, 0),
    "scatter": lambda h, p: h.scatter(0, FIRST[:, None].expand(1, 6), p),
    "put": lambda h, p: h.put(torch.arange(6), p[0], accumulate=True),
    "batch_norm": lambda h, p: F.batch_norm(h.view(-1, 2, 3), None, None, p[0, :2], training=True).flatten(1),
}


def _together(op: Callable[[Tensor, Tensor], Tensor]) -> tuple[nn.Module, At]:
    net = Net(lambda m, x: (m.f(x), op(m.f(x), m.p)), f=nn.Linear(6, 6), p=parameter(1, 6))

    def at(setting: tuple[int, bool]) -> Tensor:
        samples, shown = setting
        h, out = net(draw(samples, 6))
        mask = torch.ones(samples, dtype=h.dtype)
        mask[1:] = float(shown)  # else the term of the first sample alone
        return h.sin().sum(1) + mask * out.square().sum(1)

    return net, at


for _name, _op in TOGETHER.items():
    _mixes = _name == "batch_norm"
    family(
        (1, True), (1, True), (6, False), (6, True), (6, False), (1, True), (6, True),
        mixed=lambda setting, mixes=_mixes: mixes and setting[0] > 1,
        why="samples are normalised together" if _mixes else "",
        name=f"{_name} of all samples",
    )(lambda op=_op: _together(op))  # fmt: skip


@family(False, False, True, False, True)
def ids_that_samples_share() -> tuple[nn.Module, At]:
    """Gradients of an embedding are divided by how often the batch has an id."""
    parts = {"table": nn.Embedding(60, 4, scale_grad_by_freq=True),
             "bag": nn.EmbeddingBag(60, 4, mode="sum", scale_grad_by_freq=True)}  # fmt: skip
    net = Net(lambda m, ids: (m.table(ids).sum(1) + m.bag(ids).sin()).square().sum(1), **parts)
    return net, lambda shared: net(torch.randint(8, (6, 5)) if shared else torch.randperm(60)[:30].view(6, 5))


@family((6, False), (1, False), (6, False), (6, True), (6, False), (6, True))
def soft_prompts_put_where_a_mask_says() -> tuple[nn.Module, At]:
    def forward(m: Any, ids: Tensor) -> Tensor:
        h = m.table(ids)
        return m.f(h.masked_scatter(ids.eq(0)[..., None].expand_as(h), m.prompt)).square().sum((1, 2))

    net = Net(forward, table=nn.Embedding(9, 4), f=nn.Linear(4, 3), prompt=parameter(12, 4))

    def at(setting: tuple[int, bool]) -> Tensor:
        samples, everywhere = setting
        ids = torch.randint(1, 9, (samples, 8))
        ids[slice(None) if everywhere else 0, 2 if everywhere else slice(6)] = 0
        return net(ids)

    return net, at


@family(None, 1.0, 1.0, 0.0, 0.5, None, batch_dims=(0, None))
def hooks_on_weight_expressions() -> tuple[nn.Module, At]:
    """Gradients are masked, as in pruning; the mask, and whether there is one, changes."""

    def forward(m: Any, x: Tensor) -> Tensor:
        w = m.f.weight * 1.5
        if m.mask is not None:
            w.T.register_hook(lambda gradient: gradient * m.mask)
            w.register_hook(lambda gradient: gradient * m.mask)
        return F.linear(x, w).tanh().sum(1)

    net = Net(forward, f=nn.Linear(6, 6, bias=False))
    net.mask = None

    def at(factor: float | None) -> Tensor:
        net.mask = None if factor is None else torch.linspace(1, factor, 6, dtype=torch.float64).expand(6, 6)
        return net(draw(4, 6))

    return net, at


@family(False, False, True, False, True)
def hooks_that_are_functions_of_torch() -> tuple[nn.Module, At]:
    def forward(m: Any, x: Tensor, normalised: bool) -> Tensor:
        w = m.f.weight * 1.5
        if normalised:
            w.register_hook(F.normalize)
        return F.linear(x, w).tanh().sum(1)

    net = Net(forward, f=nn.Linear(6, 6, bias=False))
    return net, lambda normalised: net(draw(4, 6), normalised)


@family(1.0, 1.0, -1.0, 1.0, -1.0, mixed=lambda sign: sign < 0, why="the slope is that of all samples")
def slopes_of_prelu() -> tuple[nn.Module, At]:
    def forward(m: Any, x: Tensor, sign: float) -> Tensor:
        h = m.f(x)
        return h[:, 0] ** 2 + F.prelu(F.softplus(h[:, 1:2]) * sign, h[:, 2].mean().view(1)).squeeze(1)

    net = Net(forward, f=nn.Linear(6, 3))
    return net, lambda sign: net(draw(5, 6), sign)


ROWS = torch.arange(5)[:, None]
CHOOSING: dict[str, Callable[[Tensor], Tensor]] = {
    "masked_fill": lambda z: z.masked_fill(z.real > 100, 0),
    "index_select": lambda z: z.index_select(1, torch.tensor([1, 0])),
    "gather": lambda z: z.gather(1, torch.zeros(5, 2, dtype=torch.int64)),
    "pow": lambda z: z**2,
    "prod": lambda z: z.prod(1, keepdim=True),
    "index": lambda z: z[ROWS, torch.tensor([[0, 1]])],
    "vector_norm": lambda z: torch.linalg.vector_norm(z, dim=1, keepdim=True) + 0j,
}


def _imaginary(choose: Callable[[Tensor], Tensor]) -> tuple[nn.Module, At]:
    def forward(m: Any, x: Tensor, share: float) -> Tensor:
        h = m.f(x)
        z = torch.complex(h[:, :2], h[:, 2:] - share * h[:, 2:].mean(0))
        return torch.view_as_real(choose(z)).square().sum((1, 2))

    net = Net(forward, f=nn.Linear(6, 4))
    return net, lambda share: net(draw(5, 6), share)


for _name, _op in CHOOSING.items():
    family(
        0.0, 0.0, 0.5, 0.0, 0.8,
        mixed=lambda share: share > 0,
        why="the imaginary parts are centred",
        name=f"imaginary parts before {_name}",
    )(lambda op=_op: _imaginary(op))  # fmt: skip


@family(0.0, 0.0, 0.5, 0.0, 0.8, mixed=lambda share: share > 0, why="a mean of signs is added")
def signs_of_complex_numbers() -> tuple[nn.Module, At]:
    def forward(m: Any, x: Tensor, share: float) -> Tensor:
        h = m.f(x)
        z = torch.complex(h[:, 1] * share, h[:, 2] * share)
        return h[:, 0] ** 2 + h[:, 3] + torch.sgn(z).real.mean(0)

    net = Net(forward, f=nn.Linear(6, 4))
    return net, lambda share: net(draw(5, 6), share)
