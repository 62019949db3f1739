"""Options of the transforms: each against the same computation without it."""

from __future__ import annotations

import pytest
import torch
from oracle import assert_close
from torch import Tensor

import gramjd

W, V = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
X = torch.randn(5, 3, dtype=torch.float64)


def func(w: Tensor, x: Tensor, v: Tensor) -> Tensor:
    return (x @ w).tanh() @ v


def rows() -> Tensor:
    """``[5, 12 + 4]``, by one call of torch.autograd for each sample."""
    w, v = W.clone().requires_grad_(), V.clone().requires_grad_()
    found = [torch.autograd.grad(func(w, x, v), (w, v)) for x in X]
    return torch.stack([torch.cat([g.flatten() for g in pair]) for pair in found])


@pytest.mark.parametrize("chunk_size", [1, 2, 5, 100])
def test_chunk_size_changes_nothing(chunk_size: int) -> None:
    got = gramjd.gramian(func, in_dims=(None, 0, None), chunk_size=chunk_size)(W, X, V)
    assert_close(got, rows()[:, :12] @ rows()[:, :12].T)


def test_several_argnums() -> None:
    J = gramjd.jacobian(func, argnums=(0, 2))(W, X, V)
    assert_close(J.gramian(), rows() @ rows().T)
    assert_close(torch.cat([g.flatten() for g in J.vjp(torch.ones(5, dtype=torch.float64))]), rows().sum(0))
    assert_close(
        gramjd.gramian(func, argnums=-1, in_dims=(None, 0, None))(W, X, V), rows()[:, 12:] @ rows()[:, 12:].T
    )


def test_aux_and_values() -> None:
    def with_aux(w: Tensor, x: Tensor, v: Tensor) -> tuple[Tensor, dict[str, object]]:
        return func(w, x, v), {"hidden": x @ w, "name": "tanh"}

    lazy = gramjd.jacobian_and_value(with_aux, in_dims=(None, 0, None), has_aux=True)
    J, (value, aux) = lazy(W, X, V)
    assert_close(value, (X @ W).tanh() @ V)
    assert_close(aux["hidden"], X @ W)
    assert aux["name"] == "tanh"
    G, (again, _) = gramjd.gramian_and_value(with_aux, in_dims=(None, 0, None), has_aux=True)(W, X, V)
    assert_close(G, J.gramian())
    assert_close(again, value)


def test_keyword_arguments_and_batch_dimensions() -> None:
    want = rows()[:, :12] @ rows()[:, :12].T
    assert_close(gramjd.gramian(func, in_dims=(None, 1))(W, X.T, v=V.expand(5, 4)), want)
    whole = gramjd.gramian(lambda w: torch.stack([func(w, x, V) for x in X]), in_dims=None)(W)
    assert_close(whole, want)


def test_randomness() -> None:
    def noisy(w: Tensor, x: Tensor) -> Tensor:
        return (x @ w * torch.randn(4, dtype=torch.float64)).sum()

    with pytest.raises(RuntimeError, match="randomness"):
        gramjd.gramian(noisy)(W, X)
    torch.manual_seed(0)
    same = gramjd.gramian(noisy, randomness="same")(W, X)
    torch.manual_seed(0)
    noise = torch.randn(4, dtype=torch.float64)
    assert_close(same, X @ X.T * noise.square().sum())
    different = gramjd.gramian(noisy, randomness="different")(W, X)
    ratio = different / (X @ X.T)
    assert ratio.diagonal().unique().numel() == 5
