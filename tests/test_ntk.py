"""The empirical NTK against its definition by dense Jacobians, and the functions of modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, assert_symmetric, dense_gramian
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import gramjd


def fcn() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def cnn() -> nn.Module:
    """An image again, at the end: an output with several axes."""
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 3)).double()


MODELS = {"fcn": (fcn, (5,)), "cnn": (cnn, (2, 6, 5))}


def definition(model: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
    """``[B1, *S, B2, *S]``, axes in the order of two outputs."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    left, right = (jacrev(lambda p: functional_call(model, p, (x,)))(params) for x in (x1, x2))  # noqa: B023
    shapes = [model(x).shape for x in (x1, x2)]
    flat = [
        torch.cat([j[n].reshape(s.numel(), -1) for n in params], 1)
        for j, s in zip((left, right), shapes, strict=True)
    ]
    return (flat[0] @ flat[1].T).reshape(*shapes[0], *shapes[1])


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("name", list(MODELS))
def test_ntk(name: str, same: bool) -> None:
    make, shape = MODELS[name]
    model, x1 = make(), torch.randn(4, *shape, dtype=torch.float64)
    x2 = x1 if same else torch.randn(3, *shape, dtype=torch.float64)
    func, params = gramjd.functional_loss(model)
    got = gramjd.ntk(func)(params, x1) if same else gramjd.ntk(func)(params, x1, x2)
    want = definition(model, x1, x2)
    n = want.ndim // 2
    assert_close(got, want.permute([*range(n), *reversed(range(n, 2 * n))]).detach())
    if same:
        assert_symmetric(got)


@pytest.mark.parametrize(
    ("trace", "diagonal"), [((-1,), ()), ((), (0,)), ((1,), (0,)), ((), (1,)), ((1,), (2,)), ((2, 3), (1, 0))]
)
def test_traces_and_diagonals(trace: tuple[int, ...], diagonal: tuple[int, ...]) -> None:
    model, x = cnn(), torch.randn(4, 2, 6, 5, dtype=torch.float64)
    func, params = gramjd.functional_loss(model)
    got = gramjd.ntk(func, trace_axes=trace, diagonal_axes=diagonal)(params, x, x.flip(0))
    want = definition(model, x, x.flip(0)).detach()
    ndim, done = 4, []
    traced, kept = [a % ndim for a in trace], [a % ndim for a in diagonal]
    sides = [list(range(ndim)), list(range(ndim, 2 * ndim))]
    size = 1
    for axis in sorted(range(ndim)):  # one axis after the other, by definition
        where = sides[0][axis], sides[1][axis]
        if axis in traced or axis in kept:
            size *= want.shape[where[0]] if axis in traced else 1
            moved = torch.diagonal(want, dim1=where[0], dim2=where[1])
            want = moved.sum(-1) if axis in traced else moved.movedim(-1, where[0])
            taken = where if axis in traced else where[1:]
            sides = [[a - sum(a > t for t in taken) for a in side] for side in sides]
            done.append(axis)
    rights = [sides[1][a] for a in range(ndim) if a not in done]
    lefts = [a for a in range(want.ndim) if a not in rights]
    assert_close(got, want.permute([*lefts, *reversed(rights)]) / size)


def test_axes_that_make_no_sense() -> None:
    func, params = gramjd.functional_loss(fcn())
    x = torch.randn(4, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="none of the 2 axes"):
        gramjd.ntk(func, trace_axes=[2])(params, x)
    with pytest.raises(ValueError, match="twice"):
        gramjd.ntk(func, trace_axes=[1], diagonal_axes=[-1])(params, x)
    with pytest.raises(ValueError, match="4 entries in x1 and 3 in x2"):
        gramjd.ntk(func, diagonal_axes=[0])(params, x, x[:3])


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


def test_functional_loss_refuses() -> None:
    with pytest.raises(TypeError, match="takes a module, not a int"):
        gramjd.functional_loss(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ReLU has no parameter"):
        gramjd.functional_loss(nn.ReLU())
    function, parameters = gramjd.functional_loss(fcn(), lambda out: out.flatten())
    with pytest.raises(ValueError, match="batch of one sample has shape"):
        gramjd.jacobian(function)(parameters, torch.randn(4, 5, dtype=torch.float64))
