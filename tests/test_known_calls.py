"""Calls that are known from earlier forwards: described as new ones, with every leaf in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from exactness import Net
from oracle import assert_close, dense_gramian
from steps import preparing
from torch import Tensor, nn
from torch.func import functional_call

import gramjd
from gramjd import Engine
from gramjd.uses.known_calls import KnownCalls
from gramjd.uses.use import describe


class Pair(NamedTuple):
    first: int
    second: int


Call = tuple[Any, tuple[Any, ...], dict[str, Any]]

# Of a parameter ``w [2, 3]`` and data ``x [4, 2, 3]``.
CALLS: dict[str, Callable[[Tensor, Tensor], Call]] = {
    "a tuple": lambda x, w: (F.layer_norm, (x, (2, 3), w), {}),
    "a list": lambda x, w: (F.layer_norm, (x, [2, 3]), {"weight": w}),
    "a size": lambda x, w: (F.layer_norm, (x, x.shape[-2:], w), {}),  # a leaf of PyTrees
    "a named tuple": lambda x, w: (F.layer_norm, (x, Pair(2, 3), w), {}),
    "nothing in it": lambda x, w: (torch.sum, (w, ()), {}),
    "booleans": lambda x, w: (torch.sum, (w, (True, 0)), {}),
    "tensors in a list": lambda x, w: (torch.stack, ([x[0], w],), {}),
    "pairs and texts": lambda x, w: (
        F.conv2d,
        (x[:, None], w[None, None]),
        {"stride": (1, 2), "padding": "same"},
    ),
    "numbers": lambda x, w: (torch.add, (x, w), {"alpha": 2.0}),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_description_is_that_of_a_new_call(name: str) -> None:
    w = torch.randn(2, 3)
    known = KnownCalls()
    for _ in range(3):
        op, args, kwargs = CALLS[name](torch.randn(4, 2, 3), w)
        tracked = args[1] if name == "pairs and texts" else w
        sources = {id(tracked): w}
        record, leaves = known.describe(op, args, kwargs, sources, False)
        want, expected = describe(op, args, kwargs, sources, False)
        assert len(leaves) == len(expected)
        assert all(type(a) is type(b) and (a is b or a == b) for a, b in zip(leaves, expected, strict=True))
        assert [leaves[slot.index] is tracked for slot in record.slots] == [True]
        assert (record.saved, record.spec, record.blank) == (want.saved, want.spec, want.blank)


def normalised(shape: Callable[[Tensor], Any]) -> nn.Module:
    """A norm over two dimensions, of a shape that is passed in some way."""

    def forward(net: Any, x: Tensor) -> Tensor:
        return F.layer_norm(x, shape(x), net.weight, net.bias).sin().sum((1, 2))

    parts = {name: nn.Parameter(torch.randn(2, 3)) for name in ("weight", "bias")}
    return Net(forward, **parts)


SHAPES: dict[str, Callable[[Tensor], Any]] = {
    "a tuple": lambda x: (2, 3),
    "a list": lambda x: [2, 3],
    "a size": lambda x: x.shape[-2:],
    "a named tuple": lambda x: Pair(2, 3),
}


@pytest.mark.parametrize("face", ["engine", "transform"])
@pytest.mark.parametrize("name", SHAPES)
def test_steps(name: str, face: str) -> None:
    model = normalised(SHAPES[name])
    engine = Engine(model, batch_dim=0, audit=None)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        out: Tensor = functional_call(model, parameters, (x[None],))[0]
        return out

    gramian = gramjd.gramian(loss)
    with preparing(at_once=True):
        for _ in range(5):
            x = torch.randn(4, 2, 3, dtype=torch.float64)
            losses = model(x)
            parameters = {name: p.detach() for name, p in model.named_parameters()}
            found = engine.compute_gramian(losses) if face == "engine" else gramian(parameters, x)
            assert_close(found, dense_gramian(losses, model.parameters()))
