"""ConFIG, PCD, ExcessMTL, MoDo and SDMGrad: TorchJD's own numbers, and what defines each of them."""

import copy
from typing import Any

import pytest
import torch
from gramian_cases import FAMILIES, gramian, jacobian
from torch import Tensor

import gramjd.weighting as w

TIGHT: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-9}


def theirs(name: str) -> Any:
    aggregation = pytest.importorskip("torchjd.aggregation")
    if not hasattr(aggregation, name):
        pytest.skip(f"this TorchJD has no {name}")
    return getattr(aggregation, name)


def cross(size: int, seed: int) -> Tensor:
    """Inner products of the rows of two batches."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(size, 12, generator=generator, dtype=torch.float64)
    other = common + torch.randn(size, 12, generator=generator, dtype=torch.float64)
    return common @ other.T


INDEPENDENT = [name for name in FAMILIES if name not in ("low_rank", "duplicated", "decaying")]


@pytest.mark.parametrize("size", [1, 2, 5, 12])
@pytest.mark.parametrize("family", INDEPENDENT)
def test_config_equals_torchjd(family: str, size: int) -> None:
    rows = jacobian(family, size)
    preference = torch.linspace(0.5, 2, size, dtype=torch.float64)
    for given in (None, preference):
        want = theirs("ConFIG")(given)(rows)
        got = w.ConFIGWeighting(given)(rows @ rows.T) @ rows
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))


def test_config_of_dependent_gradients_equals_torchjd() -> None:
    rows = jacobian("duplicated", 6)
    rows = torch.cat([rows, rows[:1] + rows[1:2], 0 * rows[:1]])
    want = theirs("ConFIG")()(rows)
    torch.testing.assert_close(w.config(rows @ rows.T) @ rows, want, **TIGHT)


@pytest.mark.parametrize("family", ["random", "shifted", "collinear", "digits"])
def test_config_by_its_definition(family: str) -> None:
    """All cosines proportional to the preferences, and as long as the sum of the projections."""
    rows, preference = jacobian(family, 6), torch.linspace(1, 2, 6, dtype=torch.float64)
    step = w.config(rows @ rows.T, preference) @ rows
    share = (rows @ step) / rows.norm(dim=1) / preference
    torch.testing.assert_close(share, share.mean().expand(6), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(step.norm(), (rows @ step).sum() / step.norm(), rtol=1e-8, atol=0.0)
    _, certificate = w.config(rows @ rows.T, preference, certificate=True)
    assert certificate.residual < 1e-11


@pytest.mark.parametrize("tau", [0.02, 0.7])
@pytest.mark.parametrize("size", [1, 2, 5, 12])
@pytest.mark.parametrize("family", FAMILIES)
def test_pcd_equals_torchjd(family: str, size: int, tau: float) -> None:
    mine, other = w.PCDWeighting(tau, beta=0.9), theirs("PCDWeighting")(tau, beta=0.9)
    for seed in range(3):  # a moving average
        matrix = gramian(family, size, seed)
        want, got = other(matrix), mine(matrix)
        image = matrix @ want  # where gradients are dependent, the step alone is determined
        torch.testing.assert_close(matrix @ got, image, rtol=1e-6, atol=1e-6 * float(image.abs().max()))
        if family in INDEPENDENT:
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))


@pytest.mark.parametrize("family", INDEPENDENT)
def test_pcd_by_its_definition(family: str) -> None:
    """At the first call the averages are the squares: unit gradients, the nearest step with progress."""
    rows, tau = jacobian(family, 7), 0.3
    units = rows / rows.norm(dim=1, keepdim=True)
    weights, state = w.pcd(rows @ rows.T, tau=tau, eps=0.0)
    step = weights @ rows
    torch.testing.assert_close(step.norm(), rows[0].norm())
    weights, state, certificate = w.pcd(rows @ rows.T, tau=tau, eps=0.0, certificate=True)
    assert certificate.residual < 1e-10
    nearest = step / (weights[0] * rows[0].norm())  # d, whose first weight is one
    slack = units[1:] @ nearest - tau
    multipliers = (weights * rows.norm(dim=1))[1:] / (weights[0] * rows[0].norm())
    assert (slack >= -1e-8).all()
    assert (multipliers >= 0).all()
    assert (slack * multipliers).abs().max() <= 1e-8 * (1 + float(multipliers.max()) ** 2)
    torch.testing.assert_close(nearest, units[0] + multipliers @ units[1:], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(state[:-1], 0.001 * rows.square().sum(1))
    assert state[-1] == 1


def test_pcd_where_no_step_exists() -> None:
    rows = torch.tensor([[1.0, 2.0], [1.0, 0.0], [-2.0, 0.0]], dtype=torch.float64)
    weights, _, certificate = w.pcd(rows @ rows.T, certificate=True)
    torch.testing.assert_close(weights, torch.tensor([1.0, 0, 0], dtype=torch.float64))
    assert bool(certificate.converged)
    torch.testing.assert_close(theirs("PCDWeighting")()(rows @ rows.T), weights)
    rows[0] = 0
    assert not w.pcd(rows @ rows.T)[0].any()


@pytest.mark.parametrize("warmup", [0, 2])
def test_excess_mtl_equals_torchjd(warmup: int) -> None:
    mine, other = w.ExcessMTLWeighting(0.5, warmup), theirs("ExcessMTLWeighting")(0.5, warmup)
    for seed in range(5):
        rows = jacobian("badly_scaled", 6, seed)
        want = other(rows)
        torch.testing.assert_close(mine(rows), want, **TIGHT)
    mine.reset()
    other.reset()
    torch.testing.assert_close(mine(rows), other(rows), **TIGHT)


def test_excess_mtl_of_one_parameter_after_the_other() -> None:
    whole, split = w.ExcessMTLWeighting(), w.ExcessMTLWeighting()
    for seed in range(3):
        rows = jacobian("random", 4, seed)
        parts = (rows[:, :6].reshape(4, 2, 3), rows[:, 6:])
        torch.testing.assert_close(split(part for part in parts), whole(rows))
    before = split.state_dict()
    for bad in ([rows[:, :6]], [rows[:, :5], rows[:, 5:]], [*parts, rows], [], rows * torch.nan):
        with pytest.raises(ValueError, match=r"Rows|rows|NaN"):
            split(bad)
    torch.testing.assert_close(split.state_dict(), before)  # as before the refused calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_excess_mtl_in_half_precision(dtype: torch.dtype) -> None:
    """The squares of many calls: a sum in bfloat16 no longer grows after 256, one in float16 overflows."""
    half, double = w.ExcessMTLWeighting(0.1), w.ExcessMTLWeighting(0.1)
    rows = (20 * jacobian("random", 4)).to(dtype)
    for _ in range(300):
        got, want = half(rows), double(rows.double())
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_a_saved_state_of_excess_mtl_stays_as_it_is() -> None:
    weighting, rows = w.ExcessMTLWeighting(), jacobian("random", 4)
    weighting(rows)
    saved = weighting.state_dict()
    kept = copy.deepcopy(saved)
    want = weighting(2 * rows)
    torch.testing.assert_close(saved, kept, rtol=0, atol=0)
    weighting.load_state_dict(saved)
    torch.testing.assert_close(weighting(2 * rows), want, rtol=0, atol=0)


@pytest.mark.parametrize("size", [1, 2, 5, 12])
def test_modo_equals_torchjd(size: int) -> None:
    mine, other = w.MoDoWeighting(0.05, 0.2), theirs("MoDoWeighting")(0.05, 0.2)
    state = None
    for seed in range(5):
        matrix = cross(size, seed)
        want = other(matrix)
        torch.testing.assert_close(mine(matrix), want, **TIGHT)
        got, state, certificate = w.modo(matrix, state, gamma=0.05, rho=0.2, certificate=True)
        torch.testing.assert_close(got, want, **TIGHT)
        assert certificate.residual < 1e-13


@pytest.mark.parametrize("size", [1, 2, 5, 12])
@pytest.mark.parametrize("preferred", [False, True])
def test_sdmgrad_equals_torchjd(size: int, preferred: bool) -> None:
    preference = torch.linspace(0, 1, size, dtype=torch.float64) if preferred else None
    options: dict[str, Any] = {
        "lr": 0.3,
        "momentum": 0.4,
        "n_iter": 7,
        "lambda_": 0.5,
        "pref_vector": preference,
    }
    for given in ({"pref_vector": preference}, options):
        mine, other = w.SDMGradWeighting(**given), theirs("SDMGradWeighting")(**given)
        state = None
        for seed in range(4):
            matrix = cross(size, seed)
            want = other(matrix)
            torch.testing.assert_close(mine(matrix), want, **TIGHT)
            got, state, certificate = w.sdmgrad(matrix, state, **given, certificate=True)
            torch.testing.assert_close(got, want, **TIGHT)
            assert certificate.residual < 1e-12


@pytest.mark.parametrize("name", ["modo", "sdmgrad"])
def test_of_two_batches(name: str) -> None:
    function: Any = getattr(w, name)
    flat = cross(6, 0)
    want = function(flat)[0]
    general = flat.reshape(2, 3, 2, 3).permute(0, 1, 3, 2)
    got, state = function(general)
    torch.testing.assert_close(got, want.view(2, 3))
    torch.testing.assert_close(function(general, state)[0].flatten(), function(flat, state.flatten())[0])
    both = torch.stack([flat, cross(6, 1)])
    torch.testing.assert_close(function(both)[0], torch.stack([function(one)[0] for one in both]))
    torch.testing.assert_close(torch.vmap(lambda one: function(one)[0])(both), function(both)[0])
    assert function(flat.float())[0].dtype == torch.float32
    with pytest.raises(ValueError, match="NaN"):
        function(flat / 0)
    with pytest.raises(ValueError, match="start again"):
        function(flat, state)
    with pytest.raises(TypeError, match="floating-point"):
        function(torch.eye(3, dtype=torch.long))


def test_states_of_other_objectives_are_refused() -> None:
    for weighting in (w.PCDWeighting(), w.MoDoWeighting(), w.SDMGradWeighting()):
        weighting(gramian("random", 4))
        with pytest.raises(ValueError, match="start again"):
            weighting(gramian("random", 5))
        weighting.reset()
        assert weighting(gramian("random", 5)).shape == (5,)


NAMES = ["ConFIG", "ExcessMTLWeighting", "MoDoWeighting", "PCDWeighting", "SDMGradWeighting"]


@pytest.mark.parametrize("name", NAMES)
def test_constructors_are_torchjds(name: str) -> None:
    import inspect

    other = theirs(name)
    mine = getattr(w, "ConFIGWeighting" if name == "ConFIG" else name)
    got, want = (inspect.signature(kind).parameters.values() for kind in (mine, other))
    assert [(p.name, p.default) for p in got] == [(p.name, p.default) for p in want]
