"""``gramjd.jac``: any tensors with respect to any tensors, lazily where a forward pass was recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, dense_gramian
from torch import Tensor, nn

import gramjd
from gramjd import Engine
from gramjd.blocks import Dense, Outer


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def data(samples: int = 6) -> Tensor:
    return torch.randn(samples, 3).double()


def rows_of(output: Tensor, tensor: Tensor) -> Tensor:
    """``[*output.shape, *tensor.shape]``, one entry after the other."""
    found = []
    for entry in output.flatten():
        (g,) = torch.autograd.grad(entry, tensor, retain_graph=True, allow_unused=True)
        found.append(torch.zeros_like(tensor) if g is None else g)
    return torch.stack(found).view(*output.shape, *tensor.shape)


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 100])
def test_any_tensors_with_respect_to_any(chunk_size: int | None) -> None:
    """Leaves, intermediate tensors, inputs, and what the outputs do not depend on, in their structure."""
    x = data().requires_grad_()
    model, unused = mlp(), torch.zeros(4, dtype=torch.float64, requires_grad=True)
    hidden = model[:2](x)
    out = model[2](hidden).square()
    inputs = {"x": x, "hidden": [hidden, unused], "layer": model[2]}
    J = gramjd.jac(out, inputs, chunk_size=chunk_size)
    dense = J.dense()
    assert_close(dense["x"], rows_of(out, x))
    assert_close(dense["hidden"][0], rows_of(out, hidden))
    assert torch.equal(dense["hidden"][1], torch.zeros(6, 2, 4, dtype=torch.float64))
    assert_close(dense["layer"]["weight"], rows_of(out, model[2].weight))
    tensors = [x, hidden, unused, *model[2].parameters()]
    flat = torch.cat([rows_of(out, t).flatten(2) for t in tensors], 2)
    assert_close(J.gramian(), torch.einsum("abn,cdn->abdc", flat, flat))
    w = torch.randn_like(out)
    assert_close(J.vjp(w)["hidden"][0], torch.autograd.grad(out, hidden, w, retain_graph=True)[0])


def test_one_input() -> None:
    x = data().requires_grad_()
    y = x.sin().sum(1)
    assert_close(gramjd.jac(y, x).dense(), rows_of(y, x))
    assert_close(gramjd.jac(y, [x]).dense()[0], rows_of(y, x))
    assert_close(gramjd.jac([y[0], y[1:]], x).dense(), rows_of(y, x))
    assert_close(gramjd.jac(x, x).gramian(), torch.eye(18).double().view(6, 3, 6, 3).permute(0, 1, 3, 2))


def test_the_chain_rule() -> None:
    """In two steps through intermediate tensors, recorded or not, as at once."""
    model, x = mlp(), data()
    for record in (False, True):
        if record:
            with gramjd.record(model):
                hidden = model[:2](x)
                left, right = hidden.chunk(2, 0)
                losses = [model[2](left).square().mean(), model[2](right).square().mean(), left.sum()]
        else:
            hidden = model[:2](x)
            left, right = hidden.chunk(2, 0)
            losses = [model[2](left).square().mean(), model[2](right).square().mean(), left.sum()]
        rows = gramjd.jac(losses, [left, right]).dense()
        J = gramjd.jac([left, right], model[0], jac_outputs=rows)
        want = rows_of(torch.stack(losses), model[0].weight)
        assert_close(J.dense()["weight"], want)
        assert_close(J.gramian(), dense_gramian(torch.stack(losses), model[0].parameters()))
        J.backward(torch.tensor([1.0, 2.0, 3.0]).double())
        assert model[0].weight.grad is not None
        assert_close(model[0].weight.grad, torch.tensordot(torch.tensor([1.0, 2, 3]).double(), want, 1))
        model.zero_grad()
        cotangents = torch.randn(20, 6, 5).double()
        J = gramjd.jac(hidden, model[0].weight, jac_outputs=cotangents)
        assert isinstance(J.blocks[0][0], Outer if record else Dense)
        assert_close(J.dense(), torch.tensordot(cotangents, rows_of(hidden, model[0].weight), 2))


def test_under_autocast() -> None:
    """The chain rule has the precision of its tensors, not that of the context."""
    x = torch.randn(6, 3, requires_grad=True)
    hidden = x.sin()
    cotangents = torch.randn(2, 6, 3)
    want = gramjd.jac(hidden, x, jac_outputs=cotangents).dense()
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(gramjd.jac(hidden, x, jac_outputs=cotangents).dense(), want, 1e-6)


def test_factors_of_samples() -> None:
    model = mlp()
    engine = Engine(model, batch_dim=0)
    losses = model(data()).square().sum(1)
    J = gramjd.jac(losses, list(model.parameters()), batch_dim=0)
    assert {type(b) for mine in J.blocks for b in mine} == {Outer, Dense}
    assert_close(J.gramian(), engine.compute_gramian(losses))
    assert_close(J.dense()[0], rows_of(losses, model[0].weight))
    whole = gramjd.jac(losses, [model[0].weight, model[:2](data())[:0].sum() + losses], batch_dim=0)
    assert isinstance(whole.blocks[0][0], Outer)


@pytest.mark.parametrize("chunk_size", [1, 100])
def test_complex_inputs(chunk_size: int) -> None:
    """As pairs of real ones: the Gramian is ``Re(J Jᴴ)``, gradients are in torch's convention."""
    z = torch.randn(3, 2, dtype=torch.complex128, requires_grad=True)
    x = data().requires_grad_()
    hidden = x.to(z.dtype) @ z
    losses = hidden.abs().square().sum(1) + hidden.real.sum(1)
    J = gramjd.jac(losses, [z, x, hidden], chunk_size=chunk_size)
    rows = [rows_of(losses, t) for t in (z, x, hidden)]
    for got, want in zip(J.dense(), rows, strict=True):
        assert_close(got, want)
    assert_close(J.gramian(), sum((r.flatten(1) @ r.flatten(1).mH).real for r in rows))  # type: ignore[arg-type]
    chained = gramjd.jac(hidden, z, jac_outputs=rows[2])
    assert_close(chained.dense(), rows[0])
    w = torch.randn(6).double()
    J = gramjd.jac(losses, z)
    J.backward(w)
    assert z.grad is not None
    assert_close(z.grad, torch.autograd.grad(losses, z, w)[0])


def test_ops_without_a_batching_rule() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            if not torch.is_nonzero(g.abs().sum()):  # branches on values: not under vmap
                return torch.zeros_like(x)
            return 3 * x**2 * g

    x = data().requires_grad_()
    y = Cube.apply(x).sum(1)
    assert_close(gramjd.jac(y, x, chunk_size=100).dense(), rows_of(y, x))


@pytest.mark.parametrize("sizes", [(2, 2), (2, 3), (3, 2), (4, 2)])
def test_ops_whose_batching_rule_is_wrong(sizes: tuple[int, int]) -> None:
    """Gradient penalties through group normalisation: rows must add up to an ordinary backward pass."""
    samples, steps = sizes
    first = nn.Linear(2, 2).double()
    x = torch.randn(samples, 2, steps).double().requires_grad_()
    h = F.group_norm(first(x.mT).mT.tanh(), 1, eps=0.1)
    (gradient,) = torch.autograd.grad(h.square().sum(), x, create_graph=True)
    h = h + gradient
    losses = torch.stack([h.sin().sum((1, 2)), h.square().mean((1, 2))], 1)
    found = gramjd.jac(losses, first, chunk_size=100).dense()
    assert_close(found["weight"], rows_of(losses, first.weight), 1e-9)


def test_sparse_gradients() -> None:
    table = nn.Embedding(7, 3, sparse=True).double()
    losses = table(torch.tensor([1, 4, 1, 2, 0, 3])).square().sum(1)
    found = gramjd.jac(losses, table.weight).dense()
    table.sparse = False
    assert_close(found, rows_of(table(torch.tensor([1, 4, 1, 2, 0, 3])).square().sum(1), table.weight))


def test_hooks_of_intermediate_tensors_run_and_of_leaves_do_not() -> None:
    """As in any backward pass: those of leaves are for what is added to ``.grad``."""
    x = data().requires_grad_()
    hidden = x * 2
    hidden.register_hook(lambda g: 3 * g)
    y = hidden.sum(1)
    want = rows_of(y, x)
    x.register_hook(lambda g: 5 * g)
    assert_close(gramjd.jac(y, x).dense(), want)
    assert float(want.max()) == 6


def test_what_cannot_be() -> None:
    x = data().requires_grad_()
    y = x.square()
    for outputs, inputs, error, match in [
        (y, [x, x], ValueError, "the same tensor"),
        (y, data(), ValueError, "does not require gradients"),
        (y, [], gramjd.NotCoveredError, "there are none"),
        (y, torch.zeros(2, requires_grad=True), gramjd.NotCoveredError, "none of the inputs"),
        (y, "weight", TypeError, "a str"),
        (y[:0], x, ValueError, "empty"),
        (y.detach(), x, gramjd.NoGraphError, "no autograd graph"),
        (y * torch.nan, x, gramjd.NotFiniteError, "NaN"),
        (torch.complex(y, y), x, TypeError, "complex"),
    ]:
        with pytest.raises(error, match=match):
            gramjd.jac(outputs, inputs)  # type: ignore[arg-type]
    cotangents = torch.zeros(2, 6, 3).double()
    for given, match in [
        (torch.zeros(2, 3, 6).double(), "have shape"),
        ([cotangents, cotangents], "2 jac_outputs for 1 outputs"),
    ]:
        with pytest.raises(ValueError, match=match):
            gramjd.jac(y, x, jac_outputs=given)
    with pytest.raises(ValueError, match="same m"):
        gramjd.jac([y, y.sum()], x, jac_outputs=[cotangents, torch.zeros(3).double()])
    with pytest.raises(ValueError, match="leave batch_dim out"):
        gramjd.jac(y, x, jac_outputs=cotangents, batch_dim=0)
