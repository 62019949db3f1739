"""Options of the transforms: each against the same computation without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import assert_close, dense_gramian
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import gramjd

W, V = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
X = torch.randn(5, 3, dtype=torch.float64)


def tree_leaves(tree: Any) -> list[Tensor]:
    return tree_flatten(tree)[0]


def tree_structure(tree: Any) -> Any:
    return tree_flatten(tree)[1]


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


def of_dictionaries(w: Tensor, batch: dict[str, Any], scale: Tensor) -> Tensor:
    return ((w * batch["a"][0]).sin().sum() + (w * batch["a"][1]).cos().sum()) * batch["b"].sum() * scale


@pytest.mark.parametrize(
    "in_dims",
    [
        (None, {"a": [1, 1], "b": 0}, 0),
        (None, {"a": 1, "b": 0}, 0),  # a prefix
        (None, {"a": -1, "b": -2}, -1),
        [None, {"a": [1, 1], "b": None}, None],
    ],
    ids=str,
)
def test_in_dims_as_of_vmap(in_dims: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    w, one, two, b, scale = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in (3, (3, 5), (3, 5), (5, 2), 5)
    )
    args = w, {"a": [one, two], "b": b}, scale if in_dims[2] is not None else scale[0]
    rows = torch.vmap(torch.func.grad(of_dictionaries), tuple(in_dims))(*args)
    assert_close(gramjd.gramian(of_dictionaries, in_dims=in_dims)(*args), rows @ rows.T)


@pytest.mark.parametrize("dims", [{"b": 1, "x": 0}, {"a": [1], "b": 0}, (1, 0), {"a": (1, 1), "b": 0}])
def test_in_dims_of_another_structure(dims: Any) -> None:
    """Also where there are as many as tensors."""
    args = W[:, 0], {"a": [X.T, X.T], "b": X}, V[0]
    with pytest.raises(ValueError, match="does not match the structure of its argument"):
        gramjd.gramian(of_dictionaries, in_dims=(None, dims, None))(*args)


@pytest.mark.parametrize("argnums", [(0, 0), (0, -3)])
def test_argnums_once_each(argnums: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="name an argument twice"):
        gramjd.gramian(func, argnums, in_dims=(None, 0, None))(W, X, V)


def test_outputs_without_entries() -> None:
    with pytest.raises(ValueError, match="returned no tensor"):
        gramjd.gramian(lambda w, x: {})(W, X)
    with pytest.raises(ValueError, match=r"a tensor without entries, \[0\]"):
        gramjd.gramian(lambda w, x: (x @ w)[:0])(W, X)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, by jvp
def test_trees_as_of_hessian() -> None:
    """The same containers inside one another, and every block of the dense matrix in its place."""

    def tree(w: Tensor, x: Tensor) -> Any:
        h = (x @ w).tanh()
        return h, [h[:2].exp(), {"sum": h.sum()}, h.view(2, 2).T]

    values = torch.vmap(tree, (None, 0))(W, X)
    like = torch.func.hessian(lambda t: sum(x.square().sum() for x in tree_leaves(t)))(values)
    got = gramjd.gramian(tree)(W, X)
    assert tree_structure(got) == tree_structure(like)
    rows = tree_leaves(torch.vmap(torch.func.jacrev(tree), (None, 0))(W, X))
    wanted = [torch.tensordot(a.flatten(-2), b.flatten(-2), ([-1], [-1])) for a in rows for b in rows]
    ndims = [(a.ndim - 2, b.ndim - 2) for a in rows for b in rows]
    for G, want, (m, n) in zip(tree_leaves(got), wanted, ndims, strict=True):
        assert_close(G, want.permute(*range(m), *reversed(range(m, m + n))))


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_random_numbers_are_those_of_vmap(randomness: str, chunk_size: int | None) -> None:
    def noisy(w: Tensor, x: Tensor) -> Tensor:
        return (x @ w * torch.randn(4, dtype=torch.float64)).sum()

    torch.manual_seed(0)
    got = gramjd.gramian(noisy, randomness=randomness, chunk_size=chunk_size)(W, X)
    torch.manual_seed(0)
    rows = torch.vmap(
        torch.func.grad(noisy), (None, 0), randomness=randomness, chunk_size=chunk_size
    )(W, X).flatten(1)  # fmt: skip
    assert_close(got, rows @ rows.T)


def test_auxiliary_tensors_are_a_batch() -> None:
    """As under vmap: also those that are the same for all samples, or of integers."""

    def with_aux(w: Tensor, x: Tensor) -> Any:
        return func(w, x, V), {"shared": w.square(), "index": x.argmax()}

    _, aux = gramjd.gramian(with_aux, has_aux=True)(W, X)
    want = torch.vmap(with_aux, (None, 0))(W, X)[1]
    assert torch.equal(aux["index"], want["index"])
    assert_close(aux["shared"], want["shared"])
    got = torch.func.grad(lambda w: gramjd.gramian(with_aux, has_aux=True)(w, X)[1]["shared"].sum())(W)
    assert_close(got, 10 * W)
    with pytest.raises(TypeError, match=r"a tuple \(output, aux\)"):
        gramjd.gramian(lambda w, x: func(w, x, V), has_aux=True)(W, X)


def test_tied_weights_of_a_model_that_names_its_parameters_itself() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
            return super().named_parameters(*args, **kwargs)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).tanh())

    model, x = Named().double(), torch.randn(5, 4, dtype=torch.float64)
    f, params = gramjd.functional_loss(model, lambda out: out.square().sum(1))
    want = dense_gramian(model(x).square().sum(1), model.parameters())
    assert_close(gramjd.gramian(f)(params, x), want)
