"""Weightings of sketched Gramians against those of ``S Sᵀ`` itself, and what they take."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from gramian_cases import FAMILIES, jacobian
from torch import Tensor

from gramjd import SketchedGramian
from gramjd import weighting as w
from gramjd.weighting import _factored_cone, _hull

WEIGHTINGS: dict[str, Callable[..., Any]] = {
    "upgrad": w.upgrad,
    "dualproj": w.dualproj,
    "mgda": w.mgda,
    "cagrad": partial(w.cagrad, c=0.4),
    "cagrad, wide": partial(w.cagrad, c=2.0),
}


def rows(family: str, size: int, dim: int = 24) -> Tensor:
    matrix = jacobian(family, size)
    generator = torch.Generator().manual_seed(7)
    return matrix @ torch.randn(matrix.shape[1], dim, generator=generator, dtype=torch.float64) / dim**0.5


def small_steps(weights: Tensor, given: Tensor) -> Tensor:
    """What rounding of the step ``Sᵀw`` is relative to."""
    return given.norm(dim=-1) @ weights.abs()


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_as_of_the_gramian(name: str, family: str) -> None:
    """Steps are equal, and weights where only one answer is right (MGDA and CAGrad of dependent rows)."""
    if family == "digits":
        pytest.importorskip("sklearn")
    given = rows(family, 90)
    found, evidence = WEIGHTINGS[name](SketchedGramian(given), certificate=True)
    want, other = WEIGHTINGS[name](given @ given.T, certificate=True)
    assert bool(evidence.converged) and float(evidence.residual) <= 1e-9
    if not bool(other.converged):  # the sketch is easier to solve for
        return
    assert float((given.T @ (found - want)).norm()) <= 1e-6 * float(small_steps(want, given)) + 1e-15
    if name in ("upgrad", "dualproj"):
        assert float((found - want).abs().max()) <= 1e-6 * float(want.abs().max())


@pytest.mark.parametrize("name", ["upgrad", "dualproj"])
def test_preferences(name: str) -> None:
    """Of the objectives' shape, some zero or negative; other regularization."""
    given = rows("conflicting", 60).reshape(12, 5, 24)
    preference = torch.linspace(-1, 2, 60, dtype=torch.float64).reshape(12, 5)
    preference[3] = 0
    sketched = SketchedGramian(given)
    assert sketched.shape == (12, 5, 5, 12)
    options: dict[str, Any] = {"pref_vector": preference, "reg_eps": 1e-3, "norm_eps": 1e-2}
    found = WEIGHTINGS[name](sketched, **options)
    want = WEIGHTINGS[name](sketched.dense(), **options)
    assert found.shape == (12, 5)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-7 * float(want.abs().max()))


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_scales_and_dtypes(name: str) -> None:
    """Gradients of any length; weights of the sketch's dtype; none that is smaller than ``norm_eps``."""
    given = rows("random", 40)
    given = given / given.norm()
    for scale in (1e-120, 1.0, 1e120):
        norm_eps = {} if name == "mgda" else {"norm_eps": 0.0}
        found = WEIGHTINGS[name](SketchedGramian(given * scale), **norm_eps)
        want = WEIGHTINGS[name](given @ given.T, **norm_eps)
        assert float((given.T @ (found - want)).norm()) <= 1e-6 * float(small_steps(want, given)) + 1e-15
    single = WEIGHTINGS[name](SketchedGramian(given.to(torch.float32)))
    assert single.dtype == torch.float32
    if name != "mgda":
        tiny = given * 1e-6
        found, want = WEIGHTINGS[name](SketchedGramian(tiny)), WEIGHTINGS[name](tiny @ tiny.T)
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("size", [0, 1, 7, 24, 25])
def test_few_objectives(name: str, size: int) -> None:
    """Up to as many as the sketch has columns, and no special case at the border."""
    given = rows("random", 30)[:size]
    found = WEIGHTINGS[name](SketchedGramian(given))
    want = WEIGHTINGS[name](given @ given.T)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_zeros(name: str) -> None:
    """Objectives without a gradient, one or all."""
    given = rows("random", 50)
    given[[4, 9]] = 0
    for case in (given, torch.zeros_like(given)):
        found, want = WEIGHTINGS[name](SketchedGramian(case)), WEIGHTINGS[name](case @ case.T)
        torch.testing.assert_close(case.T @ found, case.T @ want, rtol=0, atol=1e-8)
        if name in ("upgrad", "dualproj", "mgda"):
            torch.testing.assert_close(found, want, rtol=0, atol=1e-8)


def test_a_wrong_answer_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """The certificate is of what is returned, whatever the solver says."""
    given = SketchedGramian(rows("conflicting", 60))
    solve, nearest = _factored_cone.solve, _hull.nearest
    monkeypatch.setattr(_factored_cone, "solve", lambda *args: solve(*args) + 1e-6)
    for weighting in (w.upgrad, w.dualproj):
        with pytest.raises(w.NotConvergedError):
            weighting(given)
        assert not bool(weighting(given, certificate=True)[1].converged)

    def off(*args: Any) -> Tensor:
        return nearest(*args) * 0.999 + 0.001 / 60

    monkeypatch.setitem(w.mgda.__globals__, "nearest", off)
    with pytest.raises(w.NotConvergedError):
        w.mgda(given)
    monkeypatch.setitem(w._averse.Factored.nearest.__globals__, "nearest", off)  # type: ignore[attr-defined]
    with pytest.raises(w.NotConvergedError):
        w.cagrad(given, 0.4)


def test_hard_rows_take_exact_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that conjugate gradients leave are solved for one by one."""
    given = rows("badly_scaled", 60)
    want = w.upgrad(given @ given.T, reg_eps=1e-6)
    monkeypatch.setattr(_factored_cone, "ROUNDS", 2)
    torch.testing.assert_close(w.upgrad(SketchedGramian(given), reg_eps=1e-6), want, rtol=0, atol=1e-8)
    monkeypatch.setattr(_factored_cone, "MEMORY", 60 * 7)  # seven rows at once
    torch.testing.assert_close(w.upgrad(SketchedGramian(given), reg_eps=1e-6), want, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (w.UPGradWeighting, ()),
        (w.DualProjWeighting, ()),
        (w.MGDAWeighting, ()),
        (w.CAGradWeighting, (0.4,)),
    ],
)
def test_objects(kind: Callable[..., Any], arguments: tuple[float, ...]) -> None:
    given = rows("conflicting", 60)
    found, want = kind(*arguments)(SketchedGramian(given)), kind(*arguments)(given @ given.T)
    torch.testing.assert_close(given.T @ found, given.T @ want, rtol=0, atol=1e-7)


def test_refused() -> None:
    given = rows("random", 40)
    for weighting in (w.upgrad, w.dualproj):
        with pytest.raises(ValueError, match="reg_eps of a sketched Gramian must be positive"):
            weighting(SketchedGramian(given), reg_eps=0.0)
        with pytest.raises(ValueError, match="preference must have"):
            weighting(SketchedGramian(given), torch.ones(3))
    with pytest.raises(TypeError, match=r"upgrad, dualproj, mgda and cagrad take a SketchedGramian"):
        w.imtl_g(SketchedGramian(given))  # type: ignore[arg-type]
    bad = given.clone()
    bad[3, 2] = torch.nan
    for call in WEIGHTINGS.values():
        with pytest.raises(ValueError, match="1 entries that are NaN or infinite"):
            call(SketchedGramian(bad))
    with pytest.raises(TypeError, match="real floating-point"):
        SketchedGramian(torch.ones(3, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="scalar"):
        SketchedGramian(torch.ones(()))
    with pytest.raises(ValueError, match=r"sketch\.detach"):
        SketchedGramian(given.requires_grad_())


def test_products() -> None:
    generator = torch.Generator().manual_seed(0)
    sketched = SketchedGramian(torch.randn(4, 3, 5, generator=generator, dtype=torch.float64))
    dense = sketched.dense()
    assert dense.shape == sketched.shape == (4, 3, 3, 4) and sketched.ndim == 4
    vectors = torch.randn(4, 3, 2, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(sketched @ vectors, torch.einsum("abdc,cdn->abn", dense, vectors))
    torch.testing.assert_close(sketched @ vectors[..., 0], (sketched @ vectors)[..., 0])
    torch.testing.assert_close(sketched.diagonal(), torch.einsum("abba->ab", dense))
    flat = sketched.flatten()
    assert flat.shape == (12, 12)
    torch.testing.assert_close(flat.dense(), dense.permute(0, 1, 3, 2).reshape(12, 12))
    assert sketched.to(dtype=torch.float32).dtype == torch.float32
    assert repr(flat) == "SketchedGramian(shape=[12, 12], dim=5, error=unknown, dtype=torch.float64)"
    with pytest.raises(ValueError, match="products with weights of this shape"):
        sketched @ vectors[0]


MEASURE = """
import resource, sys, torch
from gramjd import SketchedGramian, weighting as w
torch.manual_seed(0)
preference = torch.zeros(4096)
preference[:300] = 1
S = torch.randn(4096, 256) + torch.randn(256)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
G = SketchedGramian(S)
steps = [w.mgda(G), w.cagrad(G, 0.4), w.dualproj(G), w.upgrad(G, preference)]
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
assert all(step.shape == (4096,) for step in steps)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory in other units")
def test_memory() -> None:
    """4,096 objectives: less than one matrix of them in float64 (128 MiB) beside the rows."""
    found = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert float(found.stdout) < 128


def test_nothing_is_square() -> None:
    """Weights of more objectives than a matrix of them would fit anywhere (80 TB)."""
    count = 2**20 * 3
    torch.manual_seed(0)
    given = SketchedGramian(torch.randn(count, 4) + 2)
    found = w.mgda(given)
    assert found.shape == (count,) and float((given.sketch.T @ found).norm()) > 0
    assert float((given @ found).min()) >= -1e-5
