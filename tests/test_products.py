"""What the functional step computes, op by op: nothing twice, and nothing per sample of a weight's size."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gramjd
from gramjd import contraction
from gramjd.blocks import Outer

MATMULS = ("mm", "bmm", "addmm", "baddbmm")
NONLINEAR = ("gelu", "_softmax")


class Ops(TorchDispatchMode):
    """Every op that runs, below all transforms: the name, the multiply-adds if it is a product, the sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name, work = func.overloadpacket.__name__, 0
        if name in MATMULS:
            left, right = [x for x in args if isinstance(x, Tensor)][-2:]
            work = left.numel() * right.shape[-1]
        tensors = out if isinstance(out, (list, tuple)) else [out]
        shapes = [tuple(x.shape) for x in tensors if isinstance(x, Tensor) and not _is_view(func)]
        self.calls.append((name, work, shapes))
        return out

    @property
    def multiply_adds(self) -> int:
        return sum(work for _, work, _ in self.calls)

    def count(self, names: tuple[str, ...]) -> int:
        return sum(name in names for name, _, _ in self.calls)

    @property
    def largest(self) -> int:
        """Entries of the largest tensor that an op made."""
        return max(prod(shape) for _, _, shapes in self.calls for shape in shapes)


def _is_view(func: Any) -> bool:
    return any(arg.alias_info is not None for arg in func._schema.returns)


class Block(nn.Module):
    """Pre-norm self-attention and an MLP, by plain products."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x)).chunk(3, -1)
        x = x + self.out((q @ k.mT / 8).softmax(-1) @ v)
        return x + self.down(F.gelu(self.up(self.second(x))))


class Transformer(nn.Module):
    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(50, width), nn.Parameter(torch.randn(4, width))
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.head = nn.Linear(width, 56)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(ids) + self.position).mean(1))


def mlp() -> tuple[nn.Module, Tensor, nn.Parameter]:
    model = nn.Sequential(nn.Linear(50, 80), nn.GELU(), nn.Linear(80, 70), nn.GELU(), nn.Linear(70, 60))
    return model.double(), torch.randn(6, 50).double(), model[0].bias


def transformer() -> tuple[nn.Module, Tensor, nn.Parameter]:
    model = Transformer().double()
    return model, torch.randint(0, 50, (6, 4)), model.position


def ordinary(model: nn.Module, losses_of: Callable[[], Tensor], wrt: list[nn.Parameter]) -> Ops:
    """Forward and backward of the summed losses by autograd, with respect to some parameters."""
    for p in model.parameters():
        p.requires_grad_(any(p is q for q in wrt))
    with Ops() as ops:
        torch.autograd.grad(losses_of().sum(), wrt)
    for p in model.parameters():
        p.requires_grad_(True)
    return ops


@pytest.mark.parametrize("make", [mlp, transformer])
def test_one_forward_one_backward_one_product_a_weight(
    make: Callable[[], tuple[nn.Module, Tensor, nn.Parameter]],
) -> None:
    torch.manual_seed(0)
    model, x, earliest = make()
    y = torch.randint(0, 40, (len(x),))
    loss = nn.CrossEntropyLoss(reduction="none")
    function, params = gramjd.functional_loss(model, loss)
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]

    with torch.no_grad(), Ops() as forward:
        loss(model(x), y)
    # the gradient of the earliest parameter that is no weight needs all activations' and no weight's
    activations = ordinary(model, lambda: loss(model(x), y), [earliest])
    everything = ordinary(model, lambda: loss(model(x), y), list(model.parameters()))

    with Ops() as capture:
        J, _ = gramjd.jacobian_and_value(function)(params, x, y)
    assert capture.multiply_adds == activations.multiply_adds  # one forward, one activation backward
    for name in NONLINEAR:
        assert capture.count((name,)) == forward.count((name,))
    backward = ("gelu_backward", "_softmax_backward_data")
    assert capture.count(backward) == activations.count(backward) > 0

    per_sample = len(x) * min(p.numel() for p in weights)  # entries of the smallest weight's rows
    outers = [mine for mine in J.blocks if any(isinstance(block, Outer) for block in mine)]
    assert len(outers) == len(weights)
    assert {step.plan for mine in outers for step in contraction.steps(mine)} == {"pairwise"}
    with Ops() as gramian:
        G = J.gramian()
    assert capture.largest < per_sample and gramian.largest < per_sample

    with Ops() as pulled:
        grads = J.vjp(G.mean(0))
    assert pulled.count(NONLINEAR + backward) == 0
    products = [work for name, work, shapes in pulled.calls if name in MATMULS and _makes(shapes, weights)]
    assert len(products) == len(weights)  # one a weight
    assert sum(products) == everything.multiply_adds - activations.multiply_adds
    assert pulled.largest < per_sample

    want = torch.autograd.grad(loss(model(x), y), list(model.parameters()), G.mean(0))
    for (name, _), g in zip(model.named_parameters(), want, strict=True):
        assert_close(grads[name], g)


def test_backward_copies_no_gradient() -> None:
    torch.manual_seed(0)
    model, x, _ = mlp()
    engine = gramjd.Engine(model, batch_dim=0)
    J = engine.jacobian(model(x).square().sum(1))
    with Ops() as ops:
        J.backward(torch.rand(len(x)).double())
    made = [name for name, _, shapes in ops.calls if _makes(shapes, list(model.parameters()))]
    copies = ("clone", "copy_", "new_empty_strided", "_to_copy")
    assert ops.count(("gelu", "gelu_backward")) == 0  # no second pass through the activations
    assert "mm" in made and not any(name in copies for name in made)  # short ones are split off one product


def _makes(shapes: list[tuple[int, ...]], weights: list[nn.Parameter]) -> bool:
    """Whether the result is as large as one of the weights."""
    return any(prod(shape) in {p.numel() for p in weights} for shape in shapes)
