"""The empirical NTK against its definition by dense Jacobians, and the functions of modules."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from allocations import Allocations
from kernels import MODELS, definition, fcn, inputs, less
from oracle import assert_close, assert_symmetric, dense_gramian, dense_jacobian
from test_products import Ops
from torch import Tensor, nn

import gramjd
from gramjd import pytree

# every axis of the batched output is kept, traced, or reduced to its diagonal
OPTIONS = [
    (
        name,
        [a for a, what in enumerate(kinds) if what == "trace"],
        [a for a, what in enumerate(kinds) if what == "diagonal"],
    )
    for name, axes in [("fcn", 2), ("cnn", 4)]
    for kinds in product(["keep", "trace", "diagonal"], repeat=axes)
]


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize(("name", "trace", "diagonal"), OPTIONS)
def test_every_option(name: str, trace: list[int], diagonal: list[int], same: bool) -> None:
    model, x1 = MODELS[name](), inputs(name, 3)
    x2 = inputs(name, 3 if 0 in trace + diagonal else 2)
    func, params = gramjd.functional_loss(model)
    kernel = gramjd.ntk(func, trace_axes=trace, diagonal_axes=diagonal)
    got = kernel(params, x1) if same else kernel(params, x1, x2)
    assert_close(got, less(definition(model, x1, x1 if same else x2), trace, diagonal))
    if same and not diagonal:
        assert_symmetric(got)


@pytest.mark.parametrize("option", ["trace_axes", "diagonal_axes"])
def test_what_options_save(option: str) -> None:
    """What lies off the diagonals, all pairs of outputs, is never computed."""
    func, params = gramjd.functional_loss(nn.Linear(20, 300))
    kernel, x = gramjd.ntk(func, **{option: [1]}), torch.randn(8, 20)
    for others in [(), (torch.randn(8, 20),)]:
        with Allocations() as allocations:
            kernel(params, x, *others)
        assert (
            allocations.largest <= 2 * 4 * 8 * 300 * 300
        )  # the cotangents, twice; the whole would be 8 times them


def test_a_symmetric_kernel_costs_about_half() -> None:
    """One run over the function, and little more than half of the products: 5 of 8 tiles' worth."""
    func, params = gramjd.functional_loss(fcn())
    x, counts = inputs("fcn", 700), []
    for others in [(), (x.clone(),)]:
        with Ops() as ops:
            gramjd.ntk(func)(params, x, *others)
        counts.append((ops.count(("tanh",)), ops.multiply_adds))
    (once, few), (twice, many) = counts
    assert twice == 2 * once > 0
    assert few < 0.65 * many


@pytest.mark.parametrize(("trace", "diagonal"), [((1,), ()), ((2,), (1, 0)), ((), (3,))])
def test_options_compose(trace: tuple[int, ...], diagonal: tuple[int, ...]) -> None:
    """Mapped over parameters, and differentiated, as the whole kernel is."""
    func, params = gramjd.functional_loss(MODELS["cnn"]())
    x = inputs("cnn", 3)
    kernel = gramjd.ntk(func, trace_axes=trace, diagonal_axes=diagonal)
    many = {name: torch.stack([p, 0.5 * p]) for name, p in params.items()}
    each = [kernel({name: p[n] for name, p in many.items()}, x) for n in range(2)]
    assert_close(torch.vmap(lambda p: kernel(p, x))(many), torch.stack(each))
    whole = gramjd.ntk(func)
    got = torch.func.grad(lambda p: kernel(p, x).square().sum())(params)
    want = torch.func.grad(lambda p: less(whole(p, x), trace, diagonal).square().sum())(params)
    for name in params:
        assert_close(got[name], want[name])


@pytest.mark.parametrize("trace", [[], [1]])
def test_alignment_by_parameters_and_inputs(trace: list[int]) -> None:
    """The gradient of a kernel's alignment with targets, by both batches, too."""
    func, params = gramjd.functional_loss(fcn())
    x1, x2 = inputs("fcn", 4), inputs("fcn", 3)
    targets = torch.randn(4, 3, dtype=torch.float64)

    def by_definition(p: dict[str, Tensor], x1: Tensor, x2: Tensor) -> Tensor:
        rows = [torch.vmap(torch.func.jacrev(func), (None, 0))(p, x) for x in (x1, x2)]
        left, right = (torch.cat([r[n].flatten(2) for n in p], 2) for r in rows)
        full = torch.einsum("bkn,cln->bklc", left, right)
        return less(full, trace, [])

    def alignment(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def value(*args: Any) -> Tensor:
            K = kernel(*args)
            return (K.flatten(1, -2).sum(1) if K.ndim > 2 else K).mul(targets).sum() / K.norm()

        return value

    found, wanted = (
        torch.func.grad(alignment(kernel), (0, 1, 2))(params, x1, x2)
        for kernel in (gramjd.ntk(func, trace_axes=trace), by_definition)
    )
    for got, want in zip(pytree.leaves(found), pytree.leaves(wanted), strict=True):
        assert_close(got, want)


def test_negative_axes() -> None:
    """They count from the last; the order in which axes are named does not matter."""
    func, params = gramjd.functional_loss(MODELS["cnn"]())
    x = inputs("cnn", 3)
    got = gramjd.ntk(func, trace_axes=[-1, 1], diagonal_axes=[-2, 0])(params, x)
    assert torch.equal(got, gramjd.ntk(func, trace_axes=(1, 3), diagonal_axes=(0, 2))(params, x))
    got = gramjd.ntk(func, trace_axes=-1, diagonal_axes=0)(params, x)  # one axis is a number
    assert torch.equal(got, gramjd.ntk(func, trace_axes=[-1], diagonal_axes=[0])(params, x))


def test_traces_are_exactly_symmetric() -> None:
    """Whatever order sums are taken in."""
    func, params = gramjd.functional_loss(nn.Linear(7, 101))
    assert_symmetric(gramjd.ntk(func, trace_axes=[1])(params, torch.randn(19, 7)))


def test_axes_that_make_no_sense() -> None:
    func, params = gramjd.functional_loss(fcn())
    x = torch.randn(4, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="none of the 2 axes"):
        gramjd.ntk(func, trace_axes=[2])(params, x)
    with pytest.raises(ValueError, match="twice"):
        gramjd.ntk(func, trace_axes=[1], diagonal_axes=[-1])(params, x)
    with pytest.raises(ValueError, match="4 entries in x1 and 3 in x2"):
        gramjd.ntk(func, diagonal_axes=[0])(params, x, x[:3])


def test_what_is_not_finite_is_an_error() -> None:
    func, params = gramjd.functional_loss(fcn())
    x = torch.randn(4, 5, dtype=torch.float64)
    bad = x.clone()
    bad[2, 1] = torch.nan
    kernel = gramjd.ntk(func, trace_axes=[1])
    linear, weights = gramjd.functional_loss(nn.Linear(5, 2).double())
    with pytest.raises(gramjd.NotFiniteError, match="x2 has them, too"):
        kernel(params, x, bad)
    with pytest.raises(gramjd.NotFiniteError, match="params and x1 has them, too"):
        kernel({name: p * torch.inf for name, p in params.items()}, bad)
    with pytest.raises(gramjd.NotFiniteError, match="a derivative overflowed"):
        gramjd.ntk(linear)(weights, x * 1e200)
    with pytest.raises(gramjd.NotFiniteError):
        gramjd.ntk_dataset(func, params, [x, bad], progress=False)
    mapped = torch.vmap(lambda x: kernel(params, x))(torch.stack([x, bad]))  # no values are known there
    assert mapped[0].isfinite().all() and mapped[1].isnan().any()


def test_other_dtypes_are_an_error() -> None:
    func, params = gramjd.functional_loss(fcn())
    x = torch.randn(4, 5, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"torch.float64 and x2 of torch.float32.*x2.to\(torch.float64\)"):
        gramjd.ntk(func)(params, x, x.float())
    with pytest.raises(TypeError, match=r"batch of torch.float32"):
        gramjd.ntk_dataset(func, params, [x.float()], progress=False)
    with pytest.raises(RuntimeError, match=r"[Ss]ize|shapes"):  # not by dtypes
        gramjd.ntk(func)(params, x[:, :3])
    cast = gramjd.ntk(lambda p, x: func(p, x.double()))  # a function may convert them
    assert_close(cast(params, x.float()), gramjd.ntk(func)(params, x.float().double()))


class Tagger(nn.Module):
    """Keyword arguments, a buffer, a frozen and a tied parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.out = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
        self.out.weight = self.tokens.weight
        self.frozen = nn.Parameter(torch.rand(4), requires_grad=False)
        self.register_buffer("shift", torch.rand(4))

    def forward(self, *, ids: Tensor, extra: dict[str, Tensor]) -> Tensor:
        return self.out((self.tokens(ids) * self.frozen + self.shift + extra["x"]).tanh())


def test_functional_loss() -> None:
    model = Tagger().double()
    ids, extra = torch.randint(0, 6, (5, 3)), torch.randn(5, 3, 4, dtype=torch.float64)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.mT, targets, reduction="none").mean(1)

    function, parameters = gramjd.functional_loss(model, loss)
    inputs = {"ids": ids, "extra": {"x": extra}}
    J, values = gramjd.jacobian_and_value(function)(parameters, inputs, ids)
    losses = loss(model(**inputs), ids)
    assert_close(values, losses.detach())
    assert_close(J.gramian(), dense_gramian(losses, model.parameters()))
    assert list(parameters) == ["tokens.weight"]


class Branches(nn.Module):
    """Two positional arguments, one of them a dictionary; a dictionary of outputs; buffers; dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.out = nn.BatchNorm1d(4), nn.Dropout(1.0), nn.Linear(4, 2)
        nn.init.normal_(self.norm.running_mean)  # type: ignore[arg-type]

    def forward(self, x: Tensor, more: dict[str, Tensor]) -> dict[str, Tensor]:
        h = self.drop(self.norm(x) * more["scale"])
        return {"one": self.out(h), "two": h.square().sum(1)}


def test_functional_loss_of_trees() -> None:
    model = Branches().double().eval()
    x, scale = torch.randn(5, 4, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64)
    function, parameters = gramjd.functional_loss(model)
    G, values = gramjd.gramian_and_value(function)(parameters, (x, {"scale": scale}))
    outputs = model(x, {"scale": scale})
    rows = {name: dense_jacobian(out, model.parameters()) for name, out in outputs.items()}
    for name, out in outputs.items():
        assert_close(values[name], out.detach())
        assert_close(G[name][name], dense_gramian(out, model.parameters()))
    assert_close(G["two"]["one"], (rows["two"] @ rows["one"].T).view(5, 5, 2).mT)
    model.drop.train()  # read at the time of the call; as are buffers
    gone = gramjd.gramian(function, randomness="different")(parameters, (x, {"scale": scale}))
    assert not gone["two"]["two"].any()


def test_functional_loss_refuses() -> None:
    with pytest.raises(TypeError, match="takes a module, not a int"):
        gramjd.functional_loss(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ReLU has no parameter"):
        gramjd.functional_loss(nn.ReLU())
    function, parameters = gramjd.functional_loss(fcn(), lambda out: out.flatten())
    with pytest.raises(ValueError, match="batch of one sample has shape"):
        gramjd.jacobian(function)(parameters, torch.randn(4, 5, dtype=torch.float64))
