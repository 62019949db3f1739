"""GradDrop and TrimmedMean, one parameter's rows at a time: TorchJD's numbers, and plain formulas."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import OLD
from torch import Tensor, nn

import gramjd
from gramjd.aggregation import graddrop, parameter_rows, trimmed_mean
from gramjd.contraction import products
from gramjd.jacobian import Jacobian
from gramjd.weighting import ExcessMTLWeighting


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 2)).double()


def jacobian(samples: int = 7) -> tuple[Jacobian, Tensor]:
    """Of losses ``[samples, 2]``; and the same dense, ``[2 samples, n]``, by ordinary autograd."""
    net, x = model(), torch.randn(samples, 4, dtype=torch.float64)
    engine = gramjd.Engine(net, batch_dim=0)
    lazy = engine.jacobian(net(x).square())
    order = list(lazy.parameters)  # by name
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, order, retain_graph=True)])
        for loss in net(x).square().flatten()
    ]
    return lazy, torch.stack(rows)


def flat(tree: Any) -> Tensor:
    return torch.cat([leaf.flatten() for leaf in gramjd.pytree.leaves(tree)])


def test_rows_are_those_of_autograd() -> None:
    lazy, dense = jacobian()
    rows = torch.cat([some.flatten(1) for some in parameter_rows(lazy)], 1)
    torch.testing.assert_close(rows, dense, rtol=1e-10, atol=1e-12)


def plain_graddrop(
    dense: Tensor, leak: Tensor, f: Callable[[Tensor], Tensor], uniform: list[float]
) -> Tensor:
    """Algorithm 1 of arXiv 2010.06808, lines 10 to 15, entry by entry."""
    result = torch.zeros_like(dense[0])
    for k in range(dense.shape[1]):
        column = dense[:, k].tolist()
        size = sum(abs(entry) for entry in column)
        if size == 0:
            continue
        threshold = float(f(torch.tensor(0.5 * (1 + sum(column) / size), dtype=dense.dtype)))
        for entry, through in zip(column, leak.tolist(), strict=True):
            mask = (threshold > uniform[k] and entry > 0) or (threshold < uniform[k] and entry < 0)
            result[k] += (through + (1 - through) * mask) * entry
    return result


@pytest.mark.parametrize("leaking", [False, True])
def test_graddrop(leaking: bool) -> None:
    lazy, dense = jacobian()
    leak = torch.linspace(0, 1, len(dense), dtype=torch.float64) if leaking else None
    f = torch.square if leaking else None
    found = flat(graddrop(lazy, f, leak, generator=torch.Generator().manual_seed(3)))
    source = torch.Generator().manual_seed(3)
    uniform = torch.rand(dense.shape[1], generator=source, dtype=torch.float64)
    through = torch.zeros(len(dense)) if leak is None else leak
    want = plain_graddrop(dense, through, f or (lambda purity: purity), uniform.tolist())
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("leaking", [False, True])
def test_graddrop_equals_torchjd(leaking: bool) -> None:
    theirs = pytest.importorskip("torchjd.aggregation")
    lazy, dense = jacobian()
    leak = torch.linspace(0, 1, len(dense), dtype=torch.float64) if leaking else None
    torch.manual_seed(5)
    want = theirs.GradDrop(leak=leak)(dense)
    torch.manual_seed(5)
    torch.testing.assert_close(flat(graddrop(lazy, leak=leak)), want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("trimmed", [0, 2, 6])
def test_trimmed_mean(trimmed: int) -> None:
    lazy, dense = jacobian()
    want = torch.stack([torch.tensor(sorted(c.tolist())[trimmed : 14 - trimmed]).mean() for c in dense.T])
    found = flat(trimmed_mean(lazy, trimmed))
    torch.testing.assert_close(found, want.to(found), rtol=1e-6, atol=1e-7)
    theirs = pytest.importorskip("torchjd.aggregation")
    torch.testing.assert_close(found, theirs.TrimmedMean(trimmed)(dense), rtol=1e-6, atol=1e-9)


class Rows(torch.autograd.Function):
    """Whose derivative is a matrix of our choice."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return weight.new_zeros(len(rows))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        return torch.where(cotangents[0][:, None] == 1, rows, 0).sum(0), None  # no product of 0 and NaN


@pytest.mark.parametrize("by_numpy", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_trimmed_mean_of_extremes(
    dtype: torch.dtype, by_numpy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Byzantine workers send: infinities, numbers that swallow the others, NaN, ties."""
    if not by_numpy:
        monkeypatch.setattr("gramjd.weighting._small.np", None)
    rows = torch.randn(7, 5, generator=torch.Generator().manual_seed(2)).to(dtype)
    rows[1, 0], rows[2, 1], rows[3, 2], rows[:4, 3] = torch.inf, 1e30, torch.nan, 2.0
    rows[[4, 5], 4] = torch.tensor([torch.nan, -torch.inf], dtype=dtype)
    weight = torch.zeros(5, dtype=dtype, requires_grad=True)
    lazy = gramjd.jac(Rows.apply(weight, rows), weight)
    kept = rows.clone()
    want = rows.sort(0).values[2:5].mean(0)
    assert want.isfinite().all()
    for _ in range(2):  # J is as it was
        torch.testing.assert_close(trimmed_mean(lazy, 2), want)
    torch.testing.assert_close(rows, kept, equal_nan=True)
    torch.testing.assert_close(lazy.dense(), kept, equal_nan=True)
    assert trimmed_mean(lazy, 0).isnan().tolist() == [False, False, True, False, True]


def test_a_trimmed_mean_is_differentiable() -> None:
    x, point = torch.randn(5, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)

    def norm(w: Tensor) -> Tensor:
        lazy = gramjd.jacobian(lambda p, row: (row * p).sum().square())(w, x)
        found: Tensor = trimmed_mean(lazy, 1)
        return found.square().sum()

    def plain(w: Tensor) -> Tensor:
        rows = torch.func.jacrev(lambda p: (x @ p).square())(w)
        return rows.sort(0).values[1:4].mean(0).square().sum()

    torch.testing.assert_close(torch.func.grad(norm)(point), torch.func.grad(plain)(point))


def test_rows_of_several_outputs() -> None:
    """In the order of ``J.T @ w``, as those of one are."""

    def func(p: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return (p * x).square().sum(), torch.stack([(p * x).sum(), p.sin().sum() * x[0]])

    weight, x = torch.randn(3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    lazy = gramjd.jacobian(func)(weight, x)
    (rows,) = parameter_rows(lazy)
    w = torch.randn(12, dtype=torch.float64)
    torch.testing.assert_close(w @ rows, lazy.T @ w)


def test_complex_parameters_and_scalars() -> None:
    """The former count as pairs of real ones; rows of the latter have one entry."""
    weight = torch.randn(3, dtype=torch.complex128, requires_grad=True)
    factor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    losses = (factor * (torch.randn(5, 3, dtype=torch.complex128) @ weight)).abs().square()
    lazy = gramjd.jac(losses, [weight, factor])
    dense = lazy.dense()
    real = torch.view_as_real(dense[0])
    assert [rows.shape for rows in parameter_rows(lazy)] == [(5, 3, 2), (5,)]
    got = trimmed_mean(lazy, 1)
    torch.testing.assert_close(got[0], torch.view_as_complex(real.sort(0).values[1:4].mean(0).contiguous()))
    torch.testing.assert_close(got[1], dense[1].sort().values[1:4].mean())
    dropped = graddrop(lazy, leak=torch.ones(5, dtype=torch.float64))  # which is the sum
    torch.testing.assert_close(list(dropped), [dense[0].sum(0), dense[1].sum()])
    rows = torch.cat([real.flatten(1), dense[1][:, None]], 1)
    one, other = ExcessMTLWeighting(), ExcessMTLWeighting()
    torch.testing.assert_close(one(parameter_rows(lazy)), other(rows))


def test_excess_mtl_of_what_are_no_rows() -> None:
    lazy, dense = jacobian(3)
    weighting = ExcessMTLWeighting()
    for wrong in (lazy, dense.long(), dense.to(torch.complex128), [[1.0]], torch.tensor(1.0), dense.tolist()):
        with pytest.raises(TypeError, match=r"parameter_rows\(J\)|Rows are real"):
            weighting(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Rows 1 are 5, and there are 6"):
        weighting([dense, dense[1:]])
    assert weighting.sums is None


def test_excess_mtl_of_the_rows() -> None:
    theirs = pytest.importorskip("torchjd.aggregation")
    mine, other = ExcessMTLWeighting(0.5), theirs.ExcessMTLWeighting(0.5)
    for _ in range(3):
        lazy, dense = jacobian()
        torch.testing.assert_close(mine(parameter_rows(lazy)), other(dense), rtol=1e-6, atol=1e-9)


def test_a_pytree_like_the_parameters() -> None:
    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return (x @ params["w"]).tanh().square().sum() + params["b"].sum() * x.sum()

    params = {"w": torch.randn(4, 3), "b": torch.randn(2)}
    lazy = gramjd.jacobian(loss)(params, torch.randn(5, 4))
    for found in (graddrop(lazy), trimmed_mean(lazy, 1)):
        assert {name: leaf.shape for name, leaf in found.items()} == {"w": (4, 3), "b": (2,)}
        assert found["w"].dtype == torch.float32


@pytest.mark.skipif(OLD, reason="torch 2.1 crashes on weak references to storages")
def test_one_parameter_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of a parameter are gone when those of the next are built."""
    lazy, _ = jacobian()
    built: list[Any] = []
    dense = products.dense

    def watched(*arguments: Any) -> Tensor:
        assert all(each() is None for each in built[:-1])  # the last may still be a loop variable
        found = dense(*arguments)
        built.append(weakref.ref(found.untyped_storage()))
        return found

    monkeypatch.setattr(products, "dense", watched)
    graddrop(lazy)
    assert len(built) == 6
    built.clear()
    trimmed_mean(lazy, 1)
    assert len(built) == 6


def test_what_is_wrong_is_refused() -> None:
    lazy, _ = jacobian(3)
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match="trim_number"):
            trimmed_mean(lazy, wrong)
    for leak in (torch.zeros(5), torch.full((6,), 1.5), torch.full((6,), torch.nan)):
        with pytest.raises(ValueError, match="leak"):
            graddrop(lazy, leak=leak)
    calls: list[Callable[[], Any]] = [
        lambda: trimmed_mean(lazy, 1.0),  # type: ignore[arg-type]
        lambda: graddrop(lazy, leak=0.5),  # type: ignore[arg-type]
        lambda: graddrop(lazy, generator=0),  # type: ignore[arg-type]
    ]
    for call in calls:
        with pytest.raises(TypeError, match=r"must be"):
            call()
