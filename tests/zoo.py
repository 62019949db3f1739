"""Awkward but ordinary modules: reuse, tying, derived weights, PyTrees, odd layouts.

``CASES[name]`` makes a float64 module and its inputs for a batch of B; the module's first tensor
output has one slice per sample.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optree
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class State:
    """A user's own container, registered with optree."""

    hidden: Tensor
    label: str
    nothing: None = None


optree.register_pytree_node(
    State,
    lambda s: ((s.hidden, s.label, s.nothing), None, None),
    lambda _, children: State(*children),
    namespace="gramjd",
)


class Reused(nn.Module):
    """One layer three times, once with a ReLU that writes into its output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.act = nn.Linear(4, 4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.act(self.layer(self.layer(x))))


class ReusedParameter(nn.Module):
    """One parameter in several roles inside one module."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x @ self.w, self.w) * self.w[0] + self.w.sum(0) + x @ self.w.T


class UsesChildsWeight(nn.Module):
    """A parent that uses its child's parameters directly, and also calls the child."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x) @ self.child.weight.T + self.child.bias


class Tied(nn.Module):
    """A language model with tied weights, positions looked up once, and a transposed layout."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(11, 6, padding_idx=0), nn.Embedding(5, 6)
        self.norm, self.mix = nn.LayerNorm(6), nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        h = self.mix(h.transpose(0, 1)).transpose(0, 1)  # time first inside
        return (self.norm(h) * self.scale) @ self.tokens.weight.T


class FlattenedTime(nn.Module):
    """Samples and positions in one dimension, first one way round, then the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.flatten(0, 1)).unflatten(0, x.shape[:2]).tanh()
        h = self.second(h.transpose(0, 1).flatten(0, 1))
        return h.unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)


class ClassToken(nn.Module):
    """A class token and position parameters in front of patches."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.positions = (
            nn.Parameter(torch.randn(1, 1, 4)),
            nn.Parameter(torch.randn(4, 4)),
        )
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.layer(h)[:, 0]


class Convolutions(nn.Module):
    """Grouped, strided, dilated, padded convolutions, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, padding="same")
        self.b = nn.Conv2d(4, 4, 3, stride=2, dilation=2, padding=2, groups=2)
        self.c = nn.Conv2d(4, 4, (1, 2), groups=4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.b(torch.relu(self.a(x))))
        return self.c(self.c(h)).flatten(1)


class Nested(nn.Module):
    """PyTrees in and out, keyword arguments, strings and None, an unused output and parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.other = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(3, 4)
        self.unused = nn.Parameter(torch.randn(2))

    def forward(self, pair: Pair, *, extra: dict[str, Any], state: State) -> dict[str, Any]:
        h = self.left(pair.left) + self.right(pair.right) * extra["deep"]["scale"]
        return {
            "out": h * state.hidden,
            "unused": [self.other(pair.left), "text", None],
            "state": State(h, state.label),
        }


class UsesNested(nn.Module):
    """Calls :class:`Nested` as a child."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Nested()

    def forward(self, x: Tensor) -> Tensor:
        extra = {"deep": {"scale": x.sum(1, keepdim=True)}, "name": "n"}
        state = State(torch.ones(len(x), 4, dtype=x.dtype), "label")
        return self.inner(Pair(x, x.tanh()), extra=extra, state=state)["out"]


class Stateful(nn.Module):
    """Returns nothing; what it computed is read from it afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> None:
        self.result = self.layer(x)


class UsesStateful(nn.Module):
    """A module whose child returns no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Stateful()

    def forward(self, x: Tensor) -> Tensor:
        self.child(x)
        return self.child.result


class Frozen(nn.Module):
    """Some layers frozen, some biases missing."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 2)])
        self.layers[1].requires_grad_(False)
        self.layers[2].bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


class Weird(nn.Module):
    """Derived weights: normalised, reparametrised, summed; ops that have no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.g = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4, 1))
        self.a, self.b = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 3))
        self.mix = nn.Parameter(torch.randn(3))
        self.register_buffer("mask", (torch.randn(4, 3) > 0).double())

    def forward(self, x: Tensor) -> Tensor:
        weight = self.g * self.v / self.v.norm(dim=1, keepdim=True) + self.a @ self.b * self.mask
        h = F.linear(x * self.mix.softmax(0), weight)
        h = h + torch.cdist(x, self.v)
        return torch.maximum(h, self.g[:, 0]) - (self.mix**2).sum()


class InPlace(nn.Module):
    """Writes parameters into activations."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.shift = nn.Linear(3, 3), nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        h += self.shift
        h -= self.layer.bias
        return h.sigmoid_()


class ParameterFunction(torch.autograd.Function):
    """Hides a linear map by a parameter from everyone but autograd."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x @ w

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return grad @ w.T, x.mT @ grad


class Hidden(nn.Module):
    """A custom autograd function that holds a parameter, inside an ordinary module."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.layer = nn.Parameter(torch.randn(3, 3)), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(ParameterFunction.apply(self.layer(x), self.w))


def floats(*shape: int) -> Callable[[int], tuple[Tensor]]:
    """Inputs ``[B, *shape]``."""
    return lambda B: (torch.randn(B, *shape, dtype=torch.float64),)


def tokens(B: int) -> tuple[Tensor]:
    """Token ids ``[B, 5]`` of a vocabulary of 11."""
    return (torch.randint(0, 11, (B, 5)),)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[Tensor, ...]]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), floats(3)),
    "reused": (Reused, floats(4)),
    "reused parameter": (ReusedParameter, floats(4)),
    "uses child's weight": (UsesChildsWeight, floats(4)),
    "tied": (Tied, tokens),
    "flattened time": (FlattenedTime, floats(5, 3)),
    "class token": (ClassToken, floats(3, 4)),
    "convolutions": (Convolutions, floats(2, 5, 6)),
    "nested": (UsesNested, floats(3)),
    "returns nothing": (UsesStateful, floats(3)),
    "frozen": (Frozen, floats(3)),
    "derived": (Weird, floats(3)),
    "in place": (InPlace, floats(3)),
    "hidden": (Hidden, floats(3)),
    "prelu": (lambda: nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2)), floats(3)),
}


def make(name: str) -> tuple[nn.Module, Callable[[int], tuple[Tensor, ...]]]:
    """A fresh module in float64, in training mode, and the function that draws inputs for it."""
    build, inputs = CASES[name]
    return build().double(), inputs
