"""Equality with TorchJD's weightings where those are exact, and use of each library in the other."""

import inspect
from typing import Any

import pytest
import torch
from gramian_cases import FAMILIES, gramian, jacobian

import gramjd.weighting as ours

theirs: Any = pytest.importorskip("torchjd.aggregation")

# TorchJD solves these exactly; the others are compared by their optimality conditions
EXACT: dict[str, tuple[Any, ...]] = {
    "UPGradWeighting": (),
    "DualProjWeighting": (),
    "IMTLGWeighting": (),
    "AlignedMTLWeighting": (),
    "PCGradWeighting": (),
    "GradVacWeighting": (),
    "KrumWeighting": (1, 2),
    "RandomWeighting": (),
    "MeanWeighting": (),
    "SumWeighting": (),
}


@pytest.mark.parametrize("size", [4, 9, 30])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", EXACT)
def test_equals_torchjd(name: str, family: str, size: int) -> None:
    if name in ("UPGradWeighting", "DualProjWeighting"):
        pytest.importorskip("quadprog")
    matrix = gramian(family, size)
    if name == "IMTLGWeighting" and family in ("low_rank", "duplicated", "decaying"):
        # scaled as ours, since TorchJD's test for a zero sum depends on the scale
        matrix = matrix / matrix.diagonal().mean()
    results = []
    for module in (ours, theirs):
        torch.manual_seed(1)
        weighting = getattr(module, name)(*EXACT[name])
        results.append(weighting(matrix))
        results[-1] = weighting(matrix + 0)  # again: GradVac has a state
    scale, tolerance = results[1].abs().max(), 1e-6
    if name in ("IMTLGWeighting", "AlignedMTLWeighting") and family == "badly_scaled":
        tolerance = 1e-16 * float(torch.linalg.cond(matrix))  # two eigensolvers differ by this much
    torch.testing.assert_close(results[0] / scale, results[1] / scale, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", ["min", "median", "rmse"])
def test_options(mode: str) -> None:
    pytest.importorskip("quadprog")
    matrix, preference = gramian("random", 7), torch.rand(7, dtype=torch.float64)
    cases: dict[str, tuple[Any, ...]] = {
        "AlignedMTLWeighting": (preference, mode),
        "UPGradWeighting": (preference - 0.3,),
        "DualProjWeighting": (preference - 0.3,),
        "ConstantWeighting": (preference,),
    }
    for name, arguments in cases.items():
        got, want = (getattr(m, name)(*arguments)(matrix) for m in (ours, theirs))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_cr_mogm() -> None:
    initial = torch.rand(5, dtype=torch.float64)
    for arguments in ((0.8,), (0.7, initial)):
        mine = ours.CRMOGMWeighting(ours.IMTLGWeighting(), *arguments)
        other = theirs.CRMOGMWeighting(theirs.IMTLGWeighting(), *arguments)
        for seed in range(4):
            matrix = gramian("random", 5, seed)
            torch.testing.assert_close(mine(matrix), other(matrix), rtol=1e-9, atol=1e-12)
        mine.reset()
        other.reset()
        torch.testing.assert_close(mine(matrix), other(matrix), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_mgda_no_worse(family: str) -> None:
    matrix = gramian(family, 12)
    mine, other = ours.MGDAWeighting()(matrix), theirs.MGDAWeighting()(matrix)
    assert mine @ matrix @ mine <= (other @ matrix @ other) * (1 + 1e-9) + 1e-15 * matrix.trace()


@pytest.mark.parametrize("family", FAMILIES)
def test_cagrad_no_worse(family: str) -> None:
    pytest.importorskip("cvxpy")
    pytest.importorskip("clarabel")
    matrix = gramian(family, 12)
    matrix = matrix / matrix.trace()
    mine, other = ours.CAGradWeighting(0.5)(matrix), theirs.CAGradWeighting(0.5)(matrix)
    worst = [(matrix @ w).min() for w in (mine, other)]
    mean = torch.full_like(mine, 1 / 12)
    radius = 0.25 * (mean @ matrix @ mean)
    if mine.any():  # both inside the ball; ours at least as good for the worst objective
        assert (mine - mean) @ matrix @ (mine - mean) <= radius * (1 + 1e-9)
        assert worst[0] >= worst[1] - 1e-6 * matrix.diagonal().max()


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("family", ["random", "shifted", "digits"])
def test_fairgrad(family: str, alpha: float) -> None:
    pytest.importorskip("scipy")
    matrix = gramian(family, 6)
    matrix = matrix / matrix.diagonal().mean()
    mine, other = ours.FairGradWeighting(alpha)(matrix), theirs.FairGradWeighting(alpha)(matrix)
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_nash_mtl() -> None:
    pytest.importorskip("ecos")
    pytest.importorskip("cvxpy")
    rows = jacobian("random", 4)
    mine = ours.NashMTLWeighting(4, max_norm=1.0)(rows @ rows.T)
    with pytest.MonkeyPatch.context() as patch:
        import warnings

        patch.setattr(warnings, "warn", lambda *args, **kwargs: None)
        other = theirs.NashMTL(4, max_norm=1.0, optim_niter=100).weighting(rows)
    torch.testing.assert_close(mine, other, rtol=2e-3, atol=1e-4)  # TorchJD stops at 1e-3


def test_ours_in_their_aggregator() -> None:
    rows = jacobian("conflicting", 6)
    aggregator = theirs.GramianWeightedAggregator(ours.UPGradWeighting())
    torch.testing.assert_close(aggregator(rows), ours.upgrad(rows @ rows.T) @ rows)
    smoothed = theirs.CRMOGMWeighting(ours.MGDAWeighting())
    torch.testing.assert_close(smoothed(rows @ rows.T), ours.mgda(rows @ rows.T))
    mine = ours.CRMOGMWeighting(theirs.MeanWeighting())
    torch.testing.assert_close(mine(rows @ rows.T), torch.full((6,), 1 / 6, dtype=rows.dtype))


def test_hooks_see_the_weights() -> None:
    seen = []
    weighting = ours.UPGradWeighting()
    weighting.register_forward_hook(lambda module, inputs, output: seen.append(output))
    weights = weighting(gramian("random", 3))
    assert seen[0] is weights


SHARED = sorted(
    name for name in dir(theirs) if name.endswith("Weighting") and hasattr(ours, name) and name != "Weighting"
)


@pytest.mark.parametrize("name", [*SHARED, "NashMTLWeighting"])
def test_constructors_take_torchjds_arguments(name: str) -> None:
    """The same names, order and defaults; what is ours alone can be passed by name only."""
    other = getattr(theirs, "NashMTL" if name == "NashMTLWeighting" else name)
    mine, wanted = (
        list(inspect.signature(kind).parameters.values()) for kind in (getattr(ours, name), other)
    )
    if not wanted:  # TorchJD's takes none; nn.Module's own signature is *args, **kwargs
        getattr(ours, name)()
    for got, want in zip(mine, wanted, strict=False):
        assert (got.name, got.default, got.kind) == (want.name, want.default, want.kind)
    if wanted:
        assert all(extra.kind is extra.KEYWORD_ONLY for extra in mine[len(wanted) :])


def test_every_gramian_weighting_has_its_counterpart() -> None:
    documented = (
        "UPGrad DualProj MGDA CAGrad FairGrad IMTLG AlignedMTL PCGrad GradVac Krum Random Mean Sum "
        "Constant CRMOGM ExcessMTL MoDo PCD SDMGrad"
    )
    assert {f"{name}Weighting" for name in documented.split()} == set(SHARED)


@pytest.mark.parametrize("name", ["UPGradWeighting", "DualProjWeighting"])
def test_projector(name: str) -> None:
    pytest.importorskip("quadprog")
    linalg = pytest.importorskip("torchjd.linalg")
    matrix, projector = gramian("conflicting", 6), linalg.QuadprogProjector(norm_eps=1e-6, reg_eps=1e-2)
    got, want = (getattr(m, name)(None, projector)(matrix) for m in (ours, theirs))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    with pytest.raises(TypeError, match="norm_eps and reg_eps"):
        getattr(ours, name)(projector=object())


THEIRS = {name: EXACT[name] for name in EXACT} | {"MGDAWeighting": ()}


@pytest.mark.parametrize("name", THEIRS)
def test_theirs_accept_our_gramian(name: str) -> None:
    """A flattened Gramian of an engine, as it is, in each of TorchJD's weightings."""
    pytest.importorskip("quadprog")
    import gramjd

    model, x = torch.nn.Linear(5, 2).double(), torch.randn(6, 5, dtype=torch.float64)
    engine = gramjd.Engine(model, batch_dim=0)
    found = engine.compute_gramian(model(x).square().sum(1))
    torch.manual_seed(0)
    want = getattr(theirs, name)(*THEIRS[name])(found)
    torch.manual_seed(0)
    got = getattr(ours, name)(*THEIRS[name])(found)
    tolerance = 0.05 if name == "MGDAWeighting" else 1e-6  # theirs stops early
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["UPGradWeighting", "MGDAWeighting", "MeanWeighting", "KrumWeighting"])
def test_ours_accept_their_gramian(name: str) -> None:
    engines = pytest.importorskip("torchjd.autogram")
    model, x = torch.nn.Linear(5, 2).double(), torch.randn(6, 5, dtype=torch.float64)
    engine = engines.Engine(model, batch_dim=0)
    found = engine.compute_gramian(model(x).square().sum(1))
    rows = torch.stack(
        [
            torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])
            for loss in (model(one).square().sum() for one in x)
        ]
    )
    arguments = EXACT.get(name, ())
    got, want = (getattr(ours, name)(*arguments)(g) for g in (found, rows @ rows.T))
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)
