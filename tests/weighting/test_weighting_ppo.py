"""UPGrad on Gramians as they occur: a PPO loss per sample. Nearly of low rank, many positive entries."""

import functools

import pytest
import torch
from torch import Tensor

from benchmarks.ppo import LOSSES, gramians
from gramjd.weighting import dualproj, upgrad
from gramjd.weighting._dual_cone import regularize
from gramjd.weighting._gramian import prepare, rounding
from gramjd.weighting._precondition import low_rank
from gramjd.weighting._shared_hessian import solve_rows

EPS = 1e-4  # the weightings' own


@functools.cache
def cases(size: int, kind: str) -> list[Tensor]:
    return gramians(size, kind, rounds=2)[1:]


def program(gramian: Tensor) -> tuple[Tensor, Tensor]:
    """The Hessian, and the ridge in it."""
    hessian, scale = regularize(prepare(gramian)[0], EPS, EPS, rounding(gramian.dtype))
    return hessian, EPS * scale**2


@pytest.mark.parametrize("kind", LOSSES)
def test_few_rounds_solve_all_rows(kind: str) -> None:
    """Loosely solved faces took sixty, and left some of the rows to be solved one by one."""
    for gramian in cases(256, kind):
        hessian, ridge = program(gramian)
        x, done = solve_rows(hessian, hessian, ridge, rounds=15)
        assert done.all()
        assert torch.minimum(x, x @ hessian + hessian).abs().max() < 1e-10


def test_it_is_the_preconditioner_that_saves_rounds() -> None:
    programs = [program(gramian)[0] for gramian in cases(256, "policy")]
    assert not all(bool(solve_rows(hessian, hessian, rounds=15)[1].all()) for hessian in programs)


@pytest.mark.parametrize("kind", LOSSES)
def test_equals_torchjd(kind: str) -> None:
    pytest.importorskip("quadprog")
    theirs = pytest.importorskip("torchjd.aggregation")
    for gramian in cases(96, kind):
        for ours, name in ((upgrad, "UPGradWeighting"), (dualproj, "DualProjWeighting")):
            got, want = ours(gramian.double()), getattr(theirs, name)()(gramian.double())
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 * float(want.max()))


@pytest.mark.parametrize("kind", LOSSES)
def test_certified(kind: str) -> None:
    for gramian in cases(256, kind):
        _, certificate = upgrad(gramian, certificate=True)
        assert certificate.residual < 1e-11


def test_the_preconditioner_is_the_inverse_on_each_face() -> None:
    """Against a dense inverse, for a Hessian that is a ridge plus exactly rank three."""
    generator = torch.Generator().manual_seed(0)
    ridge = 0.01 + torch.rand(64, generator=generator, dtype=torch.float64)
    factor = torch.randn(64, 3, generator=generator, dtype=torch.float64)
    hessian = factor @ factor.T + ridge.diag()
    found = low_rank(hessian, ridge)
    assert found is not None
    assert found.factor.shape == (64, 3)
    free = torch.rand(5, 64, generator=generator) < 0.4
    target = torch.randn(5, 64, generator=generator) * free
    got = found.on_faces(free)(target) * free
    for row in range(5):
        face = hessian[free[row]][:, free[row]]
        want = torch.linalg.solve(face, target[row, free[row]].double())
        torch.testing.assert_close(got[row, free[row]].double(), want, rtol=1e-3, atol=1e-3)


def test_no_preconditioner_where_it_is_of_no_use() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 64, generator=generator, dtype=torch.float64)
    hessian, ridge = program(rows @ rows.T)
    assert low_rank(hessian, ridge) is None  # of full rank
    assert low_rank(hessian, None) is None  # not regularized
    assert low_rank(torch.eye(64, dtype=torch.float64), torch.ones(64)) is None  # nothing but the ridge
