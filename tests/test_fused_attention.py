"""Fused attention under the function transforms: the kernel runs, and every composition is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, dense_gramian
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import gramjd
from gramjd.internals import flash_attention, unfused_attention

pytestmark = [
    pytest.mark.skipif(flash_attention is None, reason="torch 2.1 has no such kernel for the CPU"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),  # torch's own, of forward mode
]
Parameters = dict[str, Tensor]


class Kernels(TorchDispatchMode):
    """Counts calls of the fused kernel and of its gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.backward = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if "flash_attention_for_cpu" in name:
            self.backward += name.endswith("backward")
            self.forward += not name.endswith("backward")
        return func(*args, **(kwargs or {}))


def model(objectives: int = 1, **options: Any) -> Callable[[Parameters, Tensor], Tensor]:
    def f(p: Parameters, x: Tensor) -> Tensor:  # x [T, d]
        q, k, v = ((x @ p[name]).view(1, len(x), 2, -1).transpose(1, 2) for name in "qkv")
        out = F.scaled_dot_product_attention(q, k, v, **options)
        out = out.transpose(1, 2).flatten(2)[0] @ p["o"]
        return out.square().mean((0, 1)) if objectives == 1 else out.sin().sum(0)[:objectives]

    return f


def parameters() -> Parameters:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(6, 6, generator=generator, dtype=torch.float64) for name in "qkvo"}


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def dense(f: Callable[..., Tensor], p: Parameters, x: Tensor) -> Tensor:
    live = {name: t.clone().requires_grad_() for name, t in p.items()}
    return dense_gramian(torch.stack([f(live, each) for each in x]), live.values())


OPTIONS = {
    "plain": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "no mask": {"attn_mask": None},
}


@pytest.mark.parametrize("objectives", [1, 3])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gramians(options: dict[str, Any], objectives: int) -> None:
    f, p, x = model(objectives, **options), parameters(), inputs(4, 5, 6)
    with Kernels() as kernels:
        G = gramjd.gramian(f, check="never")(p, x)
    assert (kernels.forward, kernels.backward) == (1, 1)  # all samples and objectives at once
    assert_close(G, dense(f, p, x))
    assert_close(gramjd.gramian(f, check="always")(p, x), G)
    assert_close(gramjd.gramian(f, chunk_size=3)(p, x), G)


def test_modules_take_the_kernel() -> None:
    layer = torch.nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True).double()
    f, p = gramjd.functional_loss(layer, lambda out: out.square().mean((1, 2)))
    with Kernels() as kernels:
        G = gramjd.gramian(f, check="never")(p, x := inputs(4, 5, 6))
    assert kernels.forward == 1
    assert_close(G, dense_gramian(layer(x).square().mean((1, 2)), layer.parameters()))


@pytest.mark.parametrize(
    "options",
    [{"dropout_p": 0.5}, {"attn_mask": torch.zeros(5, 5, dtype=torch.float64)}],
    ids=["dropout", "mask"],
)
def test_other_calls_are_left_alone(options: dict[str, Any]) -> None:
    with Kernels() as kernels:
        gramjd.gramian(model(**options), randomness="different", check="never")(parameters(), inputs(4, 5, 6))
    assert not kernels.forward


def test_differentiated_once_more() -> None:
    p, x = parameters(), inputs(4, 5, 6)

    def trace(p: Parameters, f: Callable[..., Tensor]) -> Tensor:
        return gramjd.gramian(f, check="never")(p, x).pow(2).sum()

    def by_grad(p: Parameters, f: Callable[..., Tensor]) -> Tensor:
        with unfused_attention():  # torch has no second derivative of its kernel
            rows = vmap(grad(f), (None, 0))(p, x)
        flat = torch.cat([g.flatten(1) for g in rows.values()], 1)
        return (flat @ flat.T).pow(2).sum()

    f = model(is_causal=True)
    got, want = grad(trace)(p, f), grad(by_grad)(p, f)
    for name in p:
        assert_close(got[name], want[name])
    tangent = {name: torch.ones_like(t) for name, t in p.items()}
    got_value, got_tangent = jvp(lambda p: trace(p, f), (p,), (tangent,))
    assert_close(got_value, trace(p, f))
    assert_close(got_tangent, sum(((want[name] * tangent[name]).sum() for name in p), torch.zeros(())))


def test_under_another_vmap_and_inside_derivatives() -> None:
    p, x = parameters(), inputs(3, 4, 5, 6)
    f = model()
    nested = vmap(gramjd.gramian(f, check="never"), (None, 0))(p, x)
    several = vmap(lambda p: gramjd.gramian(f, check="never")(p, x[0]))(
        {name: torch.stack([t, 2 * t]) for name, t in p.items()}
    )
    for n in range(3):
        assert_close(nested[n], dense(f, p, x[n]))
    assert_close(several[0], dense(f, p, x[0]))
    assert_close(several[1], dense(f, {name: 2 * t for name, t in p.items()}, x[0]))

    def penalty(p: Parameters, x: Tensor) -> Tensor:  # a derivative by the input is part of the loss
        return grad(lambda x: f(p, x))(x).square().sum()

    live = {name: t.clone().requires_grad_() for name, t in p.items()}
    rows = []
    for each in x[0]:
        each = each.clone().requires_grad_()
        with unfused_attention():
            (g,) = torch.autograd.grad(f(live, each), each, create_graph=True)
        rows.append(g.square().sum())
    assert_close(gramjd.gramian(penalty)(p, x[0]), dense_gramian(torch.stack(rows), live.values()))
