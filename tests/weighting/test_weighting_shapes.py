"""Shapes, batches, dtypes, scales, degenerate sizes and errors of every weighting."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gramian_cases import gramian, jacobian
from torch import Tensor

import gramjd.weighting as w

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "upgrad": w.upgrad,
    "dualproj": w.dualproj,
    "mgda": w.mgda,
    "cagrad": lambda g: w.cagrad(g, 0.5),
    "nash_mtl": w.nash_mtl,
    "fairgrad": lambda g: w.fairgrad(g, 2.0),
    "imtl_g": w.imtl_g,
    "aligned_mtl": w.aligned_mtl,
    "pcgrad": lambda g: w.pcgrad(g, generator=torch.Generator().manual_seed(0)),
    "gradvac": lambda g: w.gradvac(g, generator=torch.Generator().manual_seed(0))[0],
    "krum": lambda g: w.krum(g, 0, 1),
    "config": w.config,
    "pcd": lambda g: w.pcd(g)[0],
    "mean": w.mean,
    "sum": w.sum,
    "random": lambda g: w.random(g, generator=torch.Generator().manual_seed(0)),
    "constant": lambda g: w.constant(g, torch.ones(g.shape[g.ndim % 2 :][: g.ndim // 2])),
}
RANDOM = ("pcgrad", "gradvac", "random")
# the weights of a few do not depend on the Gramian's scale; UPGrad's do, by norm_eps alone
SCALE_FREE: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: FUNCTIONS[name] for name in ("mgda", "imtl_g", "aligned_mtl", "pcgrad", "krum")},
    "upgrad": lambda g: w.upgrad(g, norm_eps=0.0),
    "dualproj": lambda g: w.dualproj(g, norm_eps=0.0),
    "cagrad": lambda g: w.cagrad(g, 0.5, norm_eps=0.0),
    "nash_mtl": lambda g: w.nash_mtl(g, 0.0),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_generalized_and_batched(name: str) -> None:
    function = FUNCTIONS[name]
    rows = torch.stack([jacobian("random", 6, seed) for seed in range(4)]).reshape(4, 2, 3, -1)
    general = torch.einsum("zabn,zcdn->zabdc", rows, rows)
    flat = rows.reshape(4, 6, -1) @ rows.reshape(4, 6, -1).mT
    single = function(flat[0])
    assert single.shape == (6,)
    torch.testing.assert_close(function(general[0]).flatten(), single)
    assert function(general[0]).shape == (2, 3)
    batch = function(general)
    assert batch.shape == (4, 2, 3)
    if name not in RANDOM:
        each = torch.stack([function(matrix) for matrix in flat])
        torch.testing.assert_close(batch.reshape(4, 6), each, rtol=1e-9, atol=1e-9)
        mapped = torch.vmap(function)(general)
        torch.testing.assert_close(mapped, batch, rtol=1e-9, atol=1e-9)
        both = torch.vmap(function)(torch.stack([flat, flat]))
        torch.testing.assert_close(both[1], each, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_random_ones_under_vmap(name: str, randomness: str) -> None:
    function: Any = getattr(w, name)
    flat = torch.stack([gramian("conflicting", 5, seed) for seed in range(3)])
    result = torch.vmap(function, randomness=randomness)(flat)
    weights = result[0] if name == "gradvac" else result
    assert weights.shape == (3, 5)
    assert weights.isfinite().all()


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    matrix = gramian("random", 5)
    result, exact = FUNCTIONS[name](matrix.to(dtype)), FUNCTIONS[name](matrix)
    assert result.dtype == dtype
    if name != "random":
        tolerance = max(40 * torch.finfo(dtype).eps, 1e-12)
        scale = exact.abs().max()
        torch.testing.assert_close(result.double() / scale, exact / scale, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_objective_and_zero_gradients(name: str) -> None:
    if name != "krum":
        assert FUNCTIONS[name](torch.tensor([[4.0]])).shape == (1,)
        assert FUNCTIONS[name](torch.tensor(4.0)).shape == ()
        assert FUNCTIONS[name](torch.tensor([4.0, 0.0])).shape == (2,)
    for kept in (0, 2, 3):
        rows = jacobian("random", 4)
        rows[kept:] = 0
        assert FUNCTIONS[name](rows @ rows.T).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("name", SCALE_FREE)
def test_scales(name: str, scale: float, dtype: torch.dtype) -> None:
    matrix = gramian("conflicting", 5).to(dtype)
    want, got = SCALE_FREE[name](matrix), SCALE_FREE[name](matrix * scale)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-7
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_scales_stay_finite(name: str, scale: float) -> None:
    assert FUNCTIONS[name](gramian("conflicting", 5) * scale).isfinite().all()


def test_fairgrad_scale() -> None:
    matrix = gramian("conflicting", 5)
    got = w.fairgrad(matrix * 1e30, 2.0)
    torch.testing.assert_close(got, w.fairgrad(matrix, 2.0) * 1e30 ** (-1 / 1.5))


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_bad_gramians(name: str, mapped: bool) -> None:
    def call(matrix: Tensor) -> Tensor:
        if mapped:
            return torch.vmap(FUNCTIONS[name], randomness="same")(torch.stack([matrix, matrix]))
        return FUNCTIONS[name](matrix)

    good = gramian("random", 4)
    for value in (torch.nan, torch.inf):
        bad = good.clone()
        bad[1, 2] = bad[2, 1] = value
        with pytest.raises(ValueError, match="NaN or infinite"):
            call(bad)
    bad = good.clone()
    bad[1, 2] += 1e-3
    with pytest.raises(ValueError, match="not symmetric"):
        call(bad)
    bad = good.clone()
    bad[1, 1] *= -1
    with pytest.raises(ValueError, match="negative diagonal"):
        call(bad)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4, 2), (0, 1), (2, 3, 3, 2, 2)])
def test_bad_shapes(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        FUNCTIONS[name](torch.ones(shape))
    with pytest.raises(TypeError, match="floating-point"):
        FUNCTIONS[name](torch.eye(3, dtype=torch.long))


@pytest.mark.parametrize("name", ["upgrad", "dualproj", "mgda", "cagrad", "nash_mtl", "fairgrad"])
def test_indefinite(name: str) -> None:
    with pytest.raises(ValueError, match="positive semi-definite"):
        FUNCTIONS[name](torch.tensor([[1.0, 3.0], [3.0, 1.0]]))


def test_bad_arguments() -> None:
    matrix = gramian("random", 4)
    calls: list[Callable[[], Any]] = [
        lambda: w.upgrad(matrix, torch.ones(3)),
        lambda: w.upgrad(matrix, torch.full((4,), torch.nan)),
        lambda: w.dualproj(matrix, torch.ones(4, 1)),
        lambda: w.upgrad(matrix, reg_eps=-1.0),
        lambda: w.cagrad(matrix, -1.0),
        lambda: w.fairgrad(matrix, -1.0),
        lambda: w.krum(matrix, 2),
        lambda: w.krum(matrix, 0, 5),
        lambda: w.krum(matrix, 0, 0),
        lambda: w.aligned_mtl(matrix, scale_mode="max"),  # type: ignore[arg-type]
        lambda: w.gradvac(matrix, beta=2.0),
        lambda: w.gradvac(matrix, torch.zeros(3, 3)),
        lambda: w.cr_mogm(torch.ones(3), torch.ones(4)),
        lambda: w.cr_mogm(torch.ones(3), alpha=1.5),
        lambda: w.NashMTLWeighting(3)(matrix),
        lambda: w.NashMTLWeighting(0),
        lambda: w.ConstantWeighting(torch.ones(3))(matrix),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"."):
            call()


def test_states() -> None:
    first, second = gramian("conflicting", 5), gramian("random", 5)
    vac = w.GradVacWeighting(generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    weights, state = w.gradvac(first, generator=generator)
    torch.testing.assert_close(vac(first), weights)
    torch.testing.assert_close(vac(second), w.gradvac(second, state, generator=generator)[0])
    nash = w.NashMTLWeighting(5, update_weights_every=2)
    before = nash(first)
    torch.testing.assert_close(nash(first), before)
    torch.testing.assert_close(nash(second), w.nash_mtl(second))
    nash.reset()
    torch.testing.assert_close(nash(first), before)


STATEFUL: dict[str, Callable[[], w.StatefulWeighting]] = {
    "CR-MOGM": lambda: w.CRMOGMWeighting(w.MGDAWeighting()),
    "CR-MOGM of one with a state": lambda: w.CRMOGMWeighting(w.NashMTLWeighting(5, update_weights_every=3)),
    "GradVac": lambda: w.GradVacWeighting(),
    "NashMTL": lambda: w.NashMTLWeighting(5, update_weights_every=3),
    "MoDo": lambda: w.MoDoWeighting(0.01),
    "SDMGrad": lambda: w.SDMGradWeighting(0.1),
    "PCD": lambda: w.PCDWeighting(),
    "ExcessMTL": lambda: w.ExcessMTLWeighting(n_warmup_steps=1),
}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch 2.1's own saving
@pytest.mark.parametrize("name", list(STATEFUL))
@pytest.mark.parametrize("calls", [0, 2])
def test_states_are_saved_and_loaded(name: str, calls: int, tmp_path: Path) -> None:
    """One that goes on from a checkpoint gives what the other does."""
    gramians = [gramian("conflicting", 5), gramian("random", 5), gramian("collinear", 5)]
    first, second = STATEFUL[name](), STATEFUL[name]()
    for found in gramians[:calls]:
        first(found)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    results = []
    for weighting in (first, second):
        torch.manual_seed(1)  # GradVac takes the gradients in a random order
        results.append([weighting(found) for found in gramians])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("name", list(STATEFUL))
def test_states_of_other_weightings_are_refused(name: str) -> None:
    matrix = gramian("conflicting", 5)
    mine, fresh = STATEFUL[name](), STATEFUL[name]()
    for weighting in (mine, fresh):
        torch.manual_seed(1)
        weighting(matrix)
    for theirs in [make() for make in STATEFUL.values()]:
        if type(theirs) is type(mine):
            continue
        theirs(matrix)
        both = f"{type(mine).__name__} cannot go on from a state of {type(theirs).__name__}"
        with pytest.raises(ValueError, match=both):
            mine.load_state_dict(theirs.state_dict())
    for bad in ({}, {"state": torch.ones(5)}, {type(mine).__name__: {}}, None):
        with pytest.raises(ValueError, match="cannot go on from a state of"):
            mine.load_state_dict({"_extra_state": bad})
    for _ in range(2):  # as before what was refused
        results = []
        for weighting in (mine, fresh):
            torch.manual_seed(2)
            results.append(weighting(matrix))
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_a_subclass_takes_the_states_of_its_class() -> None:
    class Logged(w.PCDWeighting):
        pass

    first, second = w.PCDWeighting(), Logged()
    first(gramian("conflicting", 5))
    second.load_state_dict(first.state_dict())
    found = gramian("random", 5)
    torch.testing.assert_close(first(found), second(found), rtol=0, atol=0)


def test_rank_one_needs_no_more_than_reg_eps() -> None:
    ones = torch.ones(6, 6, dtype=torch.float64)
    for reg_eps in (0.0, 1e-10, 1e-4):
        weights = w.upgrad(ones, reg_eps=reg_eps)
        torch.testing.assert_close(weights.sum(), weights.new_ones(()))
