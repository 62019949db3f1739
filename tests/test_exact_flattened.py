"""Samples and positions flattened into one dimension: exact, and an error where an op mixes them there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exactness import Net, check, check_on, draw, parameter
from torch import Tensor, nn

import gramjd
from gramjd import Engine

B, T, D = 3, 4, 5

# To [B·T, D] and back.
FLAT: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "sample-major": (lambda x: x.flatten(0, 1), lambda h: h.unflatten(0, (-1, T))),
    "position-major": (
        lambda x: x.transpose(0, 1).flatten(0, 1),
        lambda h: h.unflatten(0, (T, -1)).transpose(0, 1),
    ),
}

INSIDE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "linear": lambda m, h: m.b(m.a(h).tanh()),
    "normalised": lambda m, h: m.b(F.layer_norm(m.a(h), (D,), m.scale, m.shift)),
    "products of parameters": lambda m, h: (m.a(h) * m.scale + m.shift) @ m.b.weight,
    "dropout": lambda m, h: m.b(F.dropout(m.a(h), 0.5)),
    "a layer twice": lambda m, h: m.a(m.b(m.a(h).sin())),
    "convolved": lambda m, h: m.b(F.conv1d(m.a(h)[:, None], m.scale[None, None], padding=2)[:, 0]),
    "looked up": lambda m, h: m.a(F.embedding((h[:, 0] > 0).long(), m.b.weight)) * h,
}  # fmt: skip


def net(forward: Callable[..., Tensor]) -> nn.Module:
    return Net(forward, a=nn.Linear(D, D), b=nn.Linear(D, D), scale=parameter(D), shift=parameter(D))


@pytest.mark.parametrize("layout", list(FLAT))
@pytest.mark.parametrize("name", list(INSIDE))
def test_flattened_layouts(name: str, layout: str) -> None:
    flatten, back = FLAT[layout]
    for samples in (B, T):  # T: as many samples as positions
        check_on(net(lambda m, x: back(INSIDE[name](m, flatten(x)))), draw(samples, T, D))


def test_three_dimensions_flattened() -> None:
    check_on(net(lambda m, x: m.b(m.a(x.flatten(0, 2)).tanh()).unflatten(0, x.shape[:3])), draw(B, 2, T, D))


def test_frames_of_videos() -> None:
    """``[B·frames, C, H, W]`` through convolutions and group normalisation."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.norm(m.first(x.flatten(0, 1))).relu()
        return m.head(m.second(h).mean((2, 3)).unflatten(0, x.shape[:2]).mean(1))

    parts = {"first": nn.Conv2d(2, 4, 3), "norm": nn.GroupNorm(2, 4), "second": nn.Conv2d(4, 3, 2)}
    check_on(Net(forward, **parts, head=nn.Linear(3, 2)), draw(B, T, 2, 5, 5))


def test_heads_as_samples() -> None:
    """``[B·heads, T, d]``, as attention by ``bmm`` has it."""

    def forward(m: Any, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(2, (2, 3)).transpose(1, 2).flatten(0, 1) for f in (m.q, m.k, m.v))
        h = torch.bmm(torch.bmm(q, k.mT).softmax(-1), v * m.scale)
        return m.out(h.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2))

    maps = {name: nn.Linear(6, 6) for name in ("q", "k", "v", "out")}
    check_on(Net(forward, **maps, scale=parameter(3)), draw(B, T, 6))


# Ops along the flattened dimension: they take a sample's entries from others.

MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "rolled": lambda h: h + h.roll(1, 0),
    "summed up": lambda h: h.cumsum(0),
    "multiplied": lambda h: h @ h.T @ h,
    "attended": lambda h: (h @ h.T).softmax(1) @ h,
    "fused attention": lambda h: F.scaled_dot_product_attention(h, h, h),
    "sorted": lambda h: h * h.sort(0)[0],
    "softmax": lambda h: h * h.softmax(0),
    "minus the mean": lambda h: h - h.mean(0),
    "times the largest": lambda h: h * h.max(),
    "flipped": lambda h: h * h.flip(0),
    "running maximum": lambda h: h * h.cummax(0)[0],
    "average pooling": lambda h: F.avg_pool1d(h.T[None], 3, 1, 1)[0].T,
    "shuffled": lambda h: h * h[torch.randperm(len(h))],
    "batch normalisation": lambda h: F.batch_norm(h, None, None, training=True),
}

# Where the op is: the layers around it see [B·T, D], or only those on one side do.
WHERE: dict[str, Callable[[Any, Tensor, Any, Any, Any], Tensor]] = {
    "between": lambda m, x, flatten, back, mix: back(m.b(mix(m.a(flatten(x)).tanh()))),
    "behind": lambda m, x, flatten, back, mix: back(mix(m.b(m.a(flatten(x)).tanh()))),
    "then apart": lambda m, x, flatten, back, mix: m.b(back(mix(m.a(flatten(x)).tanh()))),
    "by itself": lambda m, x, flatten, back, mix: m.b(back(mix(flatten(m.a(x).tanh())))),
}


@pytest.mark.parametrize("where", list(WHERE))
@pytest.mark.parametrize("layout", list(FLAT))
@pytest.mark.parametrize("name", list(MIXING))
def test_mixing_across_samples_in_flattened_form(name: str, layout: str, where: str) -> None:
    flatten, back = FLAT[layout]

    def losses(m: nn.Module) -> Tensor:
        return m(x).square().sum((1, 2))

    x = draw(B, T, D)
    model = Net(
        lambda m, x: WHERE[where](m, x, flatten, back, MIXING[name]), a=nn.Linear(D, D), b=nn.Linear(D, D)
    )
    engine = Engine(model, batch_dim=0)
    for _ in range(2):  # a refusal is not forgotten
        with pytest.raises(gramjd.NotSeparableError, match=r"depend on each other.*batch_dim=None"):
            engine.compute_gramian(losses(model))
    engine.close()
    check(model, losses, batch_dims=[None])


@pytest.mark.parametrize("name", ["rolled", "summed up", "attended", "softmax"])
def test_mixing_within_samples_in_flattened_form(name: str) -> None:
    """The same ops along the positions of each sample, with flattened layers around them."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.a(x.flatten(0, 1)).tanh().unflatten(0, x.shape[:2])
        mixed = torch.stack([MIXING[name](one) for one in h])
        return m.b(mixed.flatten(0, 1)).unflatten(0, x.shape[:2])

    check_on(Net(forward, a=nn.Linear(D, D), b=nn.Linear(D, D)), draw(B, T, D))
