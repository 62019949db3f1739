"""Losses of derivatives of the model (``create_graph=True``): penalties, physics, forces."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exactness import Net, check, draw, parameter
from oracle import assert_close, dense_gramian
from torch import Tensor, nn

import gramjd
from gramjd import Engine

pytestmark = pytest.mark.filterwarnings("ignore:Using backward.*create_graph:UserWarning")
B, D = 4, 3


def slope(model: Any, x: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs, and their derivative by the inputs."""
    z = x.clone().requires_grad_()
    u = model(z, *others)
    return u, torch.autograd.grad(u.sum(), z, create_graph=True)[0]


def penalty(model: Any, x: Tensor) -> Tensor:
    u, g = slope(model, x)
    return torch.stack([u.flatten(1).sum(1), g.flatten(1).square().sum(1)], 1)


def laplacian(model: Any, x: Tensor) -> Tensor:
    z = x.clone().requires_grad_()
    u = model(z)
    g = torch.autograd.grad(u.sum(), z, create_graph=True)[0]
    second = [torch.autograd.grad(g[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(D)]
    return (sum(second) - u[:, 0]).square()  # type: ignore[operator]


def third(model: Any, x: Tensor) -> Tensor:
    z = x.clone().requires_grad_()
    g = model(z).sum()
    for _ in range(3):
        g = torch.autograd.grad(g.sum(), z, create_graph=True)[0]
    return g.sum(1)


def product(model: Any, x: Tensor) -> Tensor:
    """A product of the Hessian and a vector."""
    z = x.clone().requires_grad_()
    g = torch.autograd.grad(model(z).sum(), z, create_graph=True)[0]
    return torch.autograd.grad(g, z, x.sin(), create_graph=True)[0].square().sum(1)


def of_a_layer(model: Any, x: Tensor) -> Tensor:
    """The derivative by what is in the middle."""
    h = model[:2](x)
    u = model[2:](h)
    return torch.autograd.grad(u.sum(), h, create_graph=True)[0].square().sum(1) + u[:, 0]


LOSSES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "penalty": penalty,
    "laplacian": laplacian,
    "third": third,
    "product": product,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 5), nn.Softplus(), nn.Linear(5, 1)),
    "no bias": lambda: nn.Sequential(nn.Linear(D, 5, bias=False), nn.Tanh(), nn.Linear(5, 1, bias=False)),
    "residual": lambda: Net(lambda m, x: (x + m.a(x).tanh() + m.a(m.b(x).sin())).square(), **pair()),
    "tied": lambda: Net(
        lambda m, x: (m.a(x).tanh() @ m.a.weight).sin() * m.scale, a=nn.Linear(D, D), scale=parameter(D)
    ),
    "matrices": lambda: Net(
        lambda m, x: torch.addmm(m.c, (x @ m.u).sin(), m.v).exp(),
        u=parameter(D, 4),
        v=parameter(4, 2),
        c=parameter(2),
    ),
    "products": lambda: Net(
        lambda m, x: (m.scale * (x * m.shift).sin()).exp(), scale=parameter(D), shift=parameter(D)
    ),
    "one for all": lambda: Net(lambda m, x: (x * m.scale).sin() * m.scale, scale=parameter(1)),
    "a computed weight": lambda: Net(lambda m, x: F.linear(x, (m.w * 2).T).sin(), w=parameter(D, 2)),
    "weight norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(D, 4)), nn.Tanh(), nn.Linear(4, 1)
    ),
    "attention": lambda: Net(
        lambda m, x: (
            (m.q(x) @ m.k(x).mT).softmax(-1) @ m.v(x).sin() if x.ndim == 3 else m.v(m.q(x).sin() * m.k(x))
        ),
        **three(),
    ),
}


def pair() -> dict[str, nn.Module]:
    return {"a": nn.Linear(D, D), "b": nn.Linear(D, D)}


def three() -> dict[str, nn.Module]:
    return {"q": nn.Linear(D, D), "k": nn.Linear(D, D), "v": nn.Linear(D, D)}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", MODELS)
def test_derivatives_by_inputs(name: str, loss: str) -> None:
    """From the ops of forward and backward, not row by row, but for what is computed from parameters."""
    torch.manual_seed(1)
    rows = {"a computed weight": ["w"], "weight norm": ["0."], "one for all": ["scale"]}
    model = MODELS[name]().double()
    check(model, lambda m: LOSSES[loss](m, draw(B, D)), rows=rows.get(name, ()), tolerance=1e-9, times=3)


@pytest.mark.parametrize("name", ["mlp", "residual", "attention", "matrices"])
def test_of_positions(name: str) -> None:
    """Inputs of three dimensions."""
    model = (
        MODELS[name]().double()
        if name != "matrices"
        else Net(lambda m, x: (x @ m.u).sin(), u=parameter(D, 4))
    )
    check(model, lambda m: penalty(m, draw(B, 2, D)), tolerance=1e-9)


def test_of_a_layer_in_the_middle() -> None:
    check(MODELS["mlp"]().double(), lambda m: of_a_layer(m, draw(B, D)), rows=["0."])


UNKNOWN: dict[str, Callable[[], nn.Module]] = {  # no formula of ours: row by row, and exact
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, D)), nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten()
    ),
    "normalised": lambda: nn.Sequential(nn.Linear(D, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1)),
    "bilinear": lambda: Net(lambda m, x: m.a(x, x.sin()), a=nn.Bilinear(D, D, 2)),
    "scaled": lambda: Net(
        lambda m, x: torch.addmm(m.c, x, m.u, alpha=2).sin(), u=parameter(D, 2), c=parameter(2)
    ),
    "both tracked": lambda: Net(lambda m, x: x @ (m.u @ m.v).sin(), u=parameter(D, 2), v=parameter(2, D)),
    "a sum with another": lambda: Net(
        lambda m, x: torch.addmm((x * x).exp(), torch.ones(len(x), D).double(), m.u).sin() * m.c,
        u=parameter(D, D),
        c=parameter(D),
    ),
    "a frozen bias": lambda: Net(
        lambda m, x: F.linear(x, m.u, m.c).sin(), u=parameter(2, D), c=torch.ones(2)
    ),
    "division": lambda: Net(lambda m, x: (x / m.c).sin(), c=parameter(D)),
    "batched": lambda: Net(
        lambda m, x: torch.bmm(x[None].expand(2, -1, -1), m.u).sin().transpose(0, 1), u=parameter(2, D, 2)
    ),
}


@pytest.mark.parametrize("checks", ["first", "never"])
@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.filterwarnings("ignore::gramjd.SlowPathWarning")
def test_uses_without_a_formula_are_not_missed(name: str, checks: str) -> None:
    """Nor where the penalty counts for nothing at first."""
    model = UNKNOWN[name]().double()
    engine = Engine(model, batch_dim=0, check=checks)
    for gate in (0.0, 0.0, 1.0, -2.0):
        losses = penalty(model, draw(B, D)) * torch.tensor([1.0, gate])
        assert_close(engine.compute_gramian(losses), dense_gramian(losses, model.parameters()))


@pytest.mark.parametrize("checks", ["first", "always", "never"])
def test_one_forward_many_graphs(checks: str) -> None:
    """Gradients of gradients taken again and again, of several outputs, between Gramians."""
    model = MODELS["mlp"]().double()
    engine = Engine(model, batch_dim=0, check=checks)
    for _ in range(2):
        z = draw(B, D).requires_grad_()
        u = model(z)
        g = [torch.autograd.grad(o.sum(), z, create_graph=True)[0] for o in (u, u.sin(), u * z[:, :1])]
        assert_close(engine.compute_gramian(u[:, 0]), dense_gramian(u[:, 0], model.parameters()))
        torch.autograd.grad(u.sum(), list(model.parameters()), retain_graph=True)
        for losses in (g[0].sum(1), (g[1] * g[2]).sum(1), (g[0] * g[2]).sum(1) * u[:, 0]):
            assert_close(engine.compute_gramian(losses), dense_gramian(losses, model.parameters()))
        mixed = torch.autograd.grad(g[1].square().sum(), z, create_graph=True)[0].sum(1)
        assert_close(engine.compute_gramian(mixed), dense_gramian(mixed, model.parameters()))


@pytest.mark.parametrize("loss", [*LOSSES.values(), of_a_layer])
def test_gradients_are_those_without_an_engine(loss: Callable[[Any, Tensor], Tensor]) -> None:
    model, x = MODELS["mlp"]().double(), draw(B, D)
    without = loss(model, x)
    want = torch.autograd.grad(without.sum(), list(model.parameters()), allow_unused=True)
    engine = Engine(model, batch_dim=0)
    found = loss(model, x)
    assert torch.equal(found, without)
    for again in (False, True):
        if again:
            engine.compute_gramian(found)
        got = torch.autograd.grad(found.sum(), list(model.parameters()), allow_unused=True, retain_graph=True)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b) if b is not None else a is None


def test_an_engine_per_sample_model_of_energies() -> None:
    """Forces taken inside the forward."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(m.f(x).sum(), x, create_graph=True)[0]

    model = Net(forward, f=MODELS["mlp"]())
    check(model, lambda m: m(draw(B, D)).square().sum(1), tolerance=1e-9)


def test_dependence_between_samples_is_refused() -> None:
    """A derivative of a norm over the batch."""
    model = MODELS["mlp"]().double()
    z = draw(B, D).requires_grad_()
    engine = Engine(model, batch_dim=0)
    g = torch.autograd.grad(model(z).square().sum().sqrt(), z, create_graph=True)[0]
    with pytest.raises(gramjd.NotSeparableError):
        engine.compute_gramian(g.square().sum(1))


def test_graphs_of_gradients_are_freed() -> None:
    """Without the garbage collector: nothing refers to itself."""
    model = MODELS["mlp"]().double()
    engine = Engine(model, batch_dim=0)
    gc.collect()
    gc.disable()
    try:
        for partly in (False, True):
            z = draw(B, D).requires_grad_()
            u = model(z)
            g = torch.autograd.grad(u.sum(), z, create_graph=True)[0]
            again = torch.autograd.grad(g.square().sum(), z, create_graph=True)[0]
            if not partly:
                engine.compute_gramian(again.sum(1))
            held = weakref.ref(z)  # by the graph, for its gradient
            del z, u, g, again
            assert held() is None
    finally:
        gc.enable()
