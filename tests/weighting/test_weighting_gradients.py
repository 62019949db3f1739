"""Derivatives of the weightings, by finite differences, away from active-set changes."""

from collections.abc import Callable

import pytest
import torch
from gramian_cases import gramian
from torch import Tensor

import gramjd.weighting as w

# torch's own forward mode is written in TorchScript, which it has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "upgrad": w.upgrad,
    "dualproj": w.dualproj,
    "mgda": w.mgda,
    "cagrad": lambda g: w.cagrad(g, 0.5),
    "cagrad_wide": lambda g: w.cagrad(g, 2.0),
    "nash_mtl": lambda g: w.nash_mtl(g, 1.0),
    "fairgrad": lambda g: w.fairgrad(g, 2.0),
    "imtl_g": w.imtl_g,
    "config": w.config,
    "modo": lambda g: w.modo(g, gamma=0.01)[0],
    "sdmgrad": lambda g: w.sdmgrad(g, lr=0.01)[0],
    "aligned_min": lambda g: w.aligned_mtl(g, scale_mode="min"),
    "aligned_median": lambda g: w.aligned_mtl(g, scale_mode="median"),
    "aligned_rmse": lambda g: w.aligned_mtl(g, scale_mode="rmse"),
    "pcgrad": lambda g: w.pcgrad(g, generator=torch.Generator().manual_seed(0)),
    "gradvac": lambda g: w.gradvac(g, generator=torch.Generator().manual_seed(0))[0],
}
FIRST_ONLY = ("aligned_min", "aligned_median", "aligned_rmse")


def case(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    return rows + (seed % 2) * 0.7


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradcheck(name: str, seed: int) -> None:
    def function(rows: Tensor) -> Tensor:
        return FUNCTIONS[name](rows @ rows.mT)

    rows = case(seed).requires_grad_()
    assert torch.autograd.gradcheck(function, (rows,), check_forward_ad=True)
    if name not in FIRST_ONLY:
        assert torch.autograd.gradgradcheck(function, (rows,))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_transforms_agree(name: str) -> None:
    def function(rows: Tensor) -> Tensor:
        return FUNCTIONS[name](rows @ rows.mT)

    rows = torch.stack([case(seed) for seed in range(3)])
    reverse = torch.func.jacrev(function)(rows[0])
    torch.testing.assert_close(torch.func.jacfwd(function, randomness="same")(rows[0]), reverse)
    if name not in ("pcgrad", "gradvac"):  # their random orders depend on the batch
        batch = torch.vmap(torch.func.jacrev(function))(rows)
        torch.testing.assert_close(batch[0], reverse)


@pytest.mark.parametrize("name", FIRST_ONLY)
def test_no_silent_second_derivative(name: str) -> None:
    rows = case(0).requires_grad_()
    weights = FUNCTIONS[name](rows @ rows.T)
    (first,) = torch.autograd.grad(weights[0], rows, create_graph=True)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        first.sum().backward()


def test_repeated_eigenvalues() -> None:
    matrix = torch.eye(4, dtype=torch.float64, requires_grad=True)
    w.aligned_mtl(matrix, scale_mode="rmse").sum().backward()
    assert matrix.grad is not None
    assert matrix.grad.isfinite().all()


def test_large_by_direction() -> None:
    """The path by matrix products, in one direction."""
    rows, direction = torch.randn(60, 70, dtype=torch.float64), torch.randn(60, 70).double()
    for function in (w.upgrad, w.dualproj, w.mgda):

        def value(x: Tensor, function: Callable[[Tensor], Tensor] = function) -> Tensor:
            return function(x @ x.T).square().sum()

        slope = torch.func.jvp(value, (rows,), (direction,))[1]
        step = 1e-6 * direction
        difference = (value(rows + step) - value(rows - step)) / 2e-6
        torch.testing.assert_close(slope, difference, rtol=1e-4, atol=1e-8)
        gradient = torch.func.grad(value)(rows)
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-7, atol=1e-10)


def test_no_derivative_is_an_error() -> None:
    rows = torch.tensor([[1.0, 2.0], [1.0, 2.0], [2.0, -1.0]], dtype=torch.float64)
    matrix = (rows @ rows.T).requires_grad_()
    weights = w.mgda(matrix)
    with pytest.raises(w.NotConvergedError, match="no derivative"):
        weights.square().sum().backward()


def test_constants_have_no_graph() -> None:
    matrix = gramian("random", 4).requires_grad_()
    for function in (w.mean, w.sum, w.random, lambda g: w.krum(g, 0)):
        assert not function(matrix).requires_grad
    with torch.no_grad():
        assert not w.upgrad(matrix).requires_grad
