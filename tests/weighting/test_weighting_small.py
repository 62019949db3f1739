"""The short way for one small Gramian agrees with the general solvers, or leaves the Gramian to them."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gramian_cases import FAMILIES, degenerate, gramian
from torch import Tensor

import gramjd.weighting as w
from gramjd.weighting import _small, _small_cone

PREFERENCE = torch.arange(_small.LARGEST + 1, dtype=torch.float64).cos()


def _state(matrix: Tensor) -> Tensor:
    """Weights on the simplex, of the objectives' shape."""
    share = PREFERENCE[: matrix.shape[-1]].abs()
    return (share / share.sum()).expand(matrix.shape[:-1]).clone()


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "dualproj": w.dualproj,
    "dualproj_by_preference": lambda g: w.dualproj(g, PREFERENCE[: g.shape[-1]]),
    "imtl_g": w.imtl_g,
    "cagrad": lambda g: w.cagrad(g, 0.5),
    "upgrad": w.upgrad,
    "upgrad_by_preference": lambda g: w.upgrad(g, PREFERENCE[: g.shape[-1]]),
    "modo": lambda g: w.modo(g, gamma=0.1, rho=0.2)[0],
    "modo_state": lambda g: w.modo(g.triu(), _state(g), gamma=0.01)[1].to(g),
    "sdmgrad": lambda g: w.sdmgrad(g, n_iter=3)[0],
    "sdmgrad_state": lambda g: w.sdmgrad(
        g.triu(), _state(g), lr=0.1, lambda_=0.5, pref_vector=PREFERENCE[: g.shape[-1]]
    )[1].to(g),
    "cagrad_wide": lambda g: w.cagrad(g, 1.5),
    "aligned_min": lambda g: w.aligned_mtl(g, PREFERENCE[: g.shape[-1]], "min"),
    "aligned_median": lambda g: w.aligned_mtl(g, PREFERENCE[: g.shape[-1]], "median"),
    "aligned_rmse": lambda g: w.aligned_mtl(g, PREFERENCE[: g.shape[-1]], "rmse"),
    "config": w.config,
    "config_by_preference": lambda g: w.config(g, PREFERENCE[: g.shape[-1]]),
}
EIGEN = ("imtl", "aligned", "config")  # whose rank hangs on eigenvalues


def symmetric(matrix: Tensor) -> Tensor:
    """As an engine's Gramians are; a plain product is so on some CPUs alone."""
    return (matrix + matrix.mT) / 2


def general(function: Callable[[Tensor], Tensor], matrix: Tensor) -> Tensor:
    """A batch of one does not take the short way."""
    return function(matrix.unsqueeze(0)).squeeze(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 3, 8, 33])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_agrees_with_the_general_way(name: str, family: str, size: int, dtype: torch.dtype) -> None:
    matrix = symmetric(gramian(family, size)).to(dtype)
    short, want = FUNCTIONS[name](matrix), general(FUNCTIONS[name], matrix)
    assert short.dtype == dtype
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    if name.startswith(EIGEN):  # two eigensolvers differ by their rounding
        tolerance = max(tolerance, 1e-15 * min(float(torch.linalg.cond(matrix.double())), 1e12))
    scale = want.abs().max().clamp(min=1e-9)
    torch.testing.assert_close(short / scale, want / scale, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if not name.startswith(EIGEN)])
def test_degenerate(name: str) -> None:
    for size in (2, 5, 12):
        for matrix in symmetric(degenerate(size, 60, seed=size)):
            want = general(FUNCTIONS[name], matrix)
            torch.testing.assert_close(
                FUNCTIONS[name](matrix), want, rtol=1e-6, atol=1e-7 * max(1.0, float(want.abs().max()))
            )


@pytest.mark.parametrize("size", [8, 32, 96])
def test_it_is_taken(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For ordinary Gramians: the general way is not even prepared."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("the general way was taken")

    modules = dict.fromkeys(("aligned_mtl", "cagrad", "config", "dualproj", "imtl_g", "upgrad"), "prepare")
    for module, prepare in {**modules, "modo": "prepare_cross", "sdmgrad": "prepare_cross"}.items():
        monkeypatch.setattr(sys.modules[f"gramjd.weighting.{module}"], prepare, refuse)
    matrix = symmetric(gramian("random", size))
    for name, function in FUNCTIONS.items():
        if name.startswith("upgrad") and size > _small_cone.LARGEST:
            continue
        function(matrix)
        with pytest.raises(AssertionError, match="general"):
            general(function, matrix)


def test_what_is_not_easy_is_left() -> None:
    matrix = symmetric(gramian("random", 4))
    assert _small.easy(matrix) is not None
    asymmetric, infinite, negative, missing = (matrix.clone() for _ in range(4))
    asymmetric[0, 1] += 1.0
    infinite[0, 1] = infinite[1, 0] = torch.inf
    negative[0, 0] = -1e-9
    missing[2, 3] = missing[3, 2] = torch.nan
    large = symmetric(gramian("random", _small.LARGEST + 1))
    cases = [asymmetric, infinite, negative, missing, large, torch.stack([matrix, matrix]), matrix[:2]]
    for case in [*cases, matrix.clone().requires_grad_(), matrix.long(), torch.zeros(0, 0)]:
        assert _small.easy(case) is None


def test_without_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = symmetric(gramian("conflicting", 6))
    by_numpy = w.pcd(matrix, tau=0.5)[0]
    monkeypatch.setattr(_small, "np", None)
    torch.testing.assert_close(w.pcd(matrix, tau=0.5)[0], by_numpy, rtol=1e-9, atol=1e-10)
    for function in FUNCTIONS.values():
        torch.testing.assert_close(function(matrix), general(function, matrix), rtol=1e-9, atol=1e-10)


def test_a_trace_has_no_constants() -> None:
    """The short way would put the weights of the first Gramian into the graph, for all others."""
    from torch.fx.experimental.proxy_tensor import make_fx

    first, second = (symmetric(gramian("random", 4, seed)) for seed in (0, 1))
    for function in FUNCTIONS.values():
        try:
            traced = make_fx(function)(first)
        except RuntimeError:
            continue  # an error, as the general way asks for values
        torch.testing.assert_close(traced(second), function(second))


def test_the_result_is_not_the_input() -> None:
    """Nothing shares memory with what the caller has."""
    preference, zero = torch.ones(3, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)
    weights = w.aligned_mtl(zero, preference)
    weights.zero_()
    assert preference.tolist() == [1, 1, 1]
    matrix = symmetric(gramian("random", 3))
    kept = matrix.clone()
    for function in FUNCTIONS.values():
        function(matrix)
    assert torch.equal(matrix, kept)


@pytest.mark.skipif(_small.np is None, reason="numpy is not here")
def test_gramians_that_are_symmetric_up_to_rounding() -> None:
    rows = torch.randn(40, 40, dtype=torch.float64)
    exact = (rows @ rows.T + (rows @ rows.T).T) / 2
    rounded = exact + 1e-15 * exact.abs().max() * torch.rand(40, 40, dtype=torch.float64).triu(1)
    assert not torch.equal(rounded, rounded.T)
    found = _small.easy(rounded)
    assert found is not None and bool((found == found.T).all())
    got, want = w.DualProjWeighting()(rounded), w.DualProjWeighting()(exact)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_asymmetry_that_is_no_rounding_is_refused() -> None:
    with pytest.raises(ValueError, match="not symmetric"):
        w.DualProjWeighting()(torch.tensor([[1.0, 0.5], [0.1, 1.0]]))


@pytest.mark.parametrize("step", [w.modo, w.sdmgrad])
@pytest.mark.parametrize("size", [3, _small.LARGEST + 1])
def test_weights_and_state_share_no_memory(step: Callable[..., tuple[Tensor, Tensor]], size: int) -> None:
    matrix = symmetric(gramian("random", size))
    _, state = step(matrix)
    for given in (None, state):
        weights, following = step(matrix, given)
        kept = following.clone()
        weights.zero_()
        assert torch.equal(following, kept) and not torch.equal(following, weights)


@pytest.mark.parametrize("step", [w.modo, w.sdmgrad])
@pytest.mark.parametrize("size", [3, _small.LARGEST + 1])
def test_what_is_no_finite_matrix_is_refused(step: Callable[..., Any], size: int) -> None:
    for bad in (torch.inf, torch.nan):
        matrix = gramian("random", size)
        matrix[0, 1], matrix[1, 0] = bad, -bad
        with pytest.raises(ValueError, match="2 entries that are NaN or infinite"):
            step(matrix)
    with pytest.raises(ValueError, match="state is of shape"):
        step(gramian("random", size), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("step", [w.modo, w.sdmgrad])
def test_a_state_that_is_differentiated(step: Callable[..., Any]) -> None:
    """Is left to the general way, whose derivative it has."""
    state = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64, requires_grad=True)
    step(1e-3 * gramian("random", 3), state)[0][0].backward()
    assert state.grad is not None and bool(state.grad.any())
