"""The condition that defines each weighting, on every family of Gramians."""

import pytest
import torch
from gramian_cases import FAMILIES, gramian

from gramjd.weighting import cagrad, dualproj, fairgrad, imtl_g, mgda, nash_mtl, upgrad

SIZES = [2, 10, 40, 70]  # factorizations from the start, with a warm start, and matrix products


def regularized(matrix: torch.Tensor) -> torch.Tensor:
    return matrix / matrix.trace() + 1e-4 * torch.eye(len(matrix), dtype=matrix.dtype)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_upgrad_never_conflicts(family: str, size: int) -> None:
    matrix = gramian(family, size)
    weights, certificate = upgrad(matrix, certificate=True)
    assert certificate.residual < 1e-11
    norms = regularized(matrix).diagonal().sqrt()
    slope = regularized(matrix) @ weights
    assert (slope >= -1e-10 * norms * (weights * norms).sum()).all()
    assert (weights >= 1 / size - 1e-12).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_dualproj_kkt(family: str, size: int) -> None:
    matrix = gramian(family, size)
    weights, certificate = dualproj(matrix, certificate=True)
    assert certificate.residual < 1e-11
    norms = regularized(matrix).diagonal().sqrt()
    slope = regularized(matrix) @ weights
    scale = (weights * norms).sum()
    added = weights - 1 / size
    assert (added >= -1e-14).all()
    assert (slope / norms >= -1e-10 * scale).all()
    assert ((added * slope).abs() <= 1e-10 * scale**2).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_mgda_min_norm(family: str, size: int) -> None:
    matrix = gramian(family, size)
    weights, certificate = mgda(matrix, certificate=True)
    assert certificate.residual < 1e-10
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(), weights.new_ones(()))
    slope = matrix @ weights
    gap = weights @ slope - slope.min()
    assert gap <= 1e-8 * matrix.diagonal().min()  # the squared norm to find is at most this


@pytest.mark.parametrize("c", [0.0, 0.4, 0.9, 3.0])
@pytest.mark.parametrize("size", [2, 10, 40])
@pytest.mark.parametrize("family", FAMILIES)
def test_cagrad_primal_equals_dual(family: str, size: int, c: float) -> None:
    matrix = gramian(family, size)
    matrix = matrix / matrix.trace()
    weights, certificate = cagrad(matrix, c, certificate=True)
    assert certificate.residual < 1e-10
    mean = torch.full_like(weights, 1 / size)
    length = (mean @ matrix @ mean).sqrt()
    extra = weights - mean
    if not weights.any():
        return
    norm = (extra @ matrix @ extra).clamp(min=0).sqrt()
    assert norm <= c * length * (1 + 1e-9)  # inside the ball
    if c > 0:
        on_simplex = extra / extra.sum()
        dual = mean @ matrix @ on_simplex + c * length * (norm / extra.sum())
        primal = (matrix @ weights).min()
        assert abs(dual - primal) <= 1e-9 * matrix.diagonal().max()


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("size", [2, 10, 70])
@pytest.mark.parametrize("family", FAMILIES)
def test_fairgrad_equation(family: str, size: int, alpha: float) -> None:
    matrix = gramian(family, size)
    weights, certificate = fairgrad(matrix, alpha, certificate=True)
    assert certificate.residual < 1e-12
    assert (weights > 0).all()
    enlarged = matrix + 1e-8 * matrix.diagonal().diag()
    product = weights ** (1 / alpha) * (enlarged @ weights)
    size_of_terms = weights ** (1 / alpha) * (enlarged.abs() @ weights)
    assert ((product - 1).abs() <= 1e-10 * size_of_terms.clamp(min=1)).all()


@pytest.mark.parametrize("size", [2, 10, 70])
@pytest.mark.parametrize("family", FAMILIES)
def test_nash_mtl_equation(family: str, size: int) -> None:
    matrix = gramian(family, size)
    free = nash_mtl(matrix, 0.0)
    unit = matrix / torch.linalg.matrix_norm(matrix)
    enlarged = unit + 1e-8 * unit.diagonal().diag()
    size_of_terms = (free * (enlarged.abs() @ free)).clamp(min=1)
    assert ((free * (enlarged @ free) - 1).abs() <= 1e-10 * size_of_terms).all()
    limited = nash_mtl(matrix, 0.5)
    assert (limited @ matrix @ limited).clamp(min=0).sqrt() <= 0.5 * (1 + 1e-9)
    torch.testing.assert_close(limited / limited.sum(), free / free.sum())


@pytest.mark.parametrize("family", ["random", "collinear", "shifted", "digits"])
def test_imtl_g_is_impartial(family: str) -> None:
    matrix = gramian(family, 8)
    cosine = (matrix @ imtl_g(matrix)) / matrix.diagonal().sqrt()
    torch.testing.assert_close(cosine, cosine.mean().expand(8), rtol=1e-6, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_large(family: str) -> None:
    matrix = gramian(family, 256)
    for weighting in (upgrad, dualproj, mgda):
        _, certificate = weighting(matrix, certificate=True)
        assert certificate.residual < 1e-10
