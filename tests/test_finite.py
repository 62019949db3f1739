"""Errors about NaN and infinity name the samples and the op that they come from."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from exactness import draw
from torch import Tensor, nn

import gramjd
from gramjd import Engine

POLES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "root": (lambda h: h.square().sum(1).sqrt(), "Sqrt"),
    "hidden division": (lambda h: (h / h.norm(dim=1, keepdim=True)).sum(1).nan_to_num(), "Div"),
    "hidden logarithm": (lambda h: torch.where(h.sum(1) == 0, 0.0, h.abs().sum(1).log()), "Log"),
    "power": (lambda h: h.abs().sum(1) ** 0.5, "Pow"),
    "inverse cosine": (lambda h: (1 - h.abs().sum(1).clamp(max=1)).acos(), "Acos"),
    "inverse root": (lambda h: torch.where(h.sum(1) == 0, 0.0, h.abs().sum(1).rsqrt()), "Rsqrt"),
}


def batch() -> Tensor:
    x = draw(6, 3)
    x[2] = x[4] = 0
    return x


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("name", POLES)
def test_divisions_by_zero(name: str, known: bool) -> None:
    torch.manual_seed(0)
    function, op = POLES[name]
    model = nn.Linear(3, 2, bias=False).double()
    engine = Engine(model, batch_dim=0)
    if known:
        engine.compute_gramian(function(model(draw(6, 3))))
    with pytest.raises(gramjd.NotFiniteError) as found:
        engine.compute_gramian(function(model(batch())))
    message = str(found.value)
    assert f"the backward pass of {op} of samples 2, 4 divides by zero" in message
    assert "GradScaler" not in message and "torch.where" in message


def test_overflow_says_in_which_dtype_and_of_which_samples() -> None:
    model = nn.Linear(3, 2)
    scale = torch.tensor([1, 1, 1, 1e8, 1, 1.0])
    with pytest.raises(gramjd.NotFiniteError, match=r"of sample 3 overflowed float16.*GradScaler"):
        Engine(model, batch_dim=0).compute_gramian(model(torch.randn(6, 3)).half().float().sum(1) * scale)
    with pytest.raises(gramjd.NotFiniteError, match="entries of sample 3: a product of gradients"):
        Engine(model, batch_dim=0).compute_gramian(model(torch.randn(6, 3)).sum(1) * scale**3)


def test_which_samples_of_an_output() -> None:
    model = nn.Linear(3, 2).double()
    engine = Engine(model, batch_dim=1)
    out = (model(draw(20, 3)).T.clone() + 0 * draw(2, 20)).masked_fill(torch.arange(20) == 7, torch.nan)
    with pytest.raises(gramjd.NotFiniteError, match=re.escape("(shape [2, 20]) of sample 7:")):
        engine.compute_gramian(out)
    with pytest.raises(gramjd.NotFiniteError, match="of samples 0, 1, 2, 3, 4, 5, 6, 8 and 11 more"):
        engine.compute_gramian(model(draw(20, 3)).T.masked_fill(torch.arange(20) != 7, torch.inf))
    with pytest.raises(gramjd.NotFiniteError, match="of every sample"):
        engine.compute_gramian(model(draw(20, 3)).T * torch.inf)
    with pytest.raises(gramjd.NotFiniteError, match=re.escape("entries (shape []): ")):
        Engine(model, batch_dim=None).compute_gramian(model(draw(20, 3)).sum() * torch.nan)


def test_losses_of_derivatives_name_the_transforms() -> None:
    """Where no formula says how the gradient of an op uses its parameter."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = draw(5, 3).requires_grad_()
    engine = Engine(model, batch_dim=0)
    slope = torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]
    with pytest.warns(gramjd.SlowPathWarning, match=r"create_graph=True.*gramjd.jacobian.*torch.func.grad"):
        found = engine.compute_gramian(slope.square().sum(1))

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.grad(lambda z: torch.func.functional_call(model, params, z).sum())(x).square().sum()

    params = {name: p.detach() for name, p in model.named_parameters()}
    jacobian = gramjd.jacobian(loss)(params, x.detach())
    assert torch.allclose(jacobian.gramian(), found)
