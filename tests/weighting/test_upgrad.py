"""UPGrad: TorchJD's own weights, and no conflict with any objective."""

import pytest
import torch
from gramian_cases import FAMILIES, degenerate, gramian

from gramjd.weighting import UPGradWeighting, upgrad
from gramjd.weighting._small_cone import LARGEST, small_projections


@pytest.mark.parametrize("m", [1, 2, 5, 16, 40])
@pytest.mark.parametrize("rank", [1, 3, 60])
def test_agrees_with_torchjd(m: int, rank: int) -> None:
    pytest.importorskip("quadprog")
    torchjd = pytest.importorskip("torchjd.aggregation")
    jacobian = torch.randn(m, rank, dtype=torch.float64)
    gramian = jacobian @ jacobian.T
    want = torchjd.UPGradWeighting()(gramian)
    for got in (upgrad(gramian), UPGradWeighting()(gramian)):
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5 / m)
    preference = torch.rand(m, dtype=torch.float64)
    want = torchjd.UPGradWeighting(preference)(gramian)
    assert torch.allclose(UPGradWeighting(preference)(gramian), want, rtol=1e-5, atol=1e-5 / m)


def test_no_objective_gets_worse() -> None:
    jacobian = torch.randn(12, 30, dtype=torch.float64)
    gramian = jacobian @ jacobian.T
    weights = upgrad(gramian, reg_eps=1e-9)
    assert bool((gramian @ weights >= -1e-6).all())


def test_a_generalized_gramian_gives_weights_of_the_outputs_shape() -> None:
    jacobian = torch.randn(6, 30, dtype=torch.float64)
    gramian = jacobian @ jacobian.T
    general = gramian.reshape(2, 3, 2, 3).permute(0, 1, 3, 2)
    assert torch.allclose(upgrad(general), upgrad(gramian).view(2, 3), rtol=1e-9)


@pytest.mark.parametrize("size", [1, 2, 3, 8, LARGEST])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_short_way_agrees_with_the_general_one(family: str, size: int) -> None:
    matrix = gramian(family, size)
    preference = torch.rand(size, dtype=torch.float64) - 0.2
    short, (general, _) = upgrad(matrix, preference), upgrad(matrix, preference, certificate=True)
    torch.testing.assert_close(short, general, rtol=1e-10, atol=1e-12)


def symmetric(matrix: torch.Tensor) -> torch.Tensor:
    """As an engine's Gramians are; a plain product is so on some CPUs alone."""
    return (matrix + matrix.mT) / 2


def test_the_short_way_on_degenerate_gramians() -> None:
    taken = 0
    for size in (2, 5, 8, 12, LARGEST):
        for matrix in symmetric(degenerate(size, 60, seed=size)):
            taken += small_projections(matrix, 1e-4, 1e-4) is not None
            general, _ = upgrad(matrix, certificate=True)
            torch.testing.assert_close(upgrad(matrix), general, rtol=1e-9, atol=1e-10)
    assert taken > 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_short_way_on_gramians_with_rounding(dtype: torch.dtype) -> None:
    """As plain products leave it on some CPUs from 16 objectives on."""
    matrix = symmetric(gramian("random", 16)).to(dtype)
    rounded = matrix.clone()
    rounded[0, 1] *= 1 + 8 * torch.finfo(dtype).eps
    assert not torch.equal(rounded, rounded.mT)
    assert small_projections(rounded, 1e-4, 1e-4) is not None
    general, _ = upgrad(rounded, certificate=True)
    torch.testing.assert_close(
        upgrad(rounded), general, rtol=1e-6 if dtype == torch.float32 else 1e-10, atol=0
    )


def test_the_short_way_leaves_what_is_not_easy() -> None:
    matrix = symmetric(gramian("random", 4))
    assert small_projections(matrix, 1e-4, 1e-4) is not None
    asymmetric, infinite, negative, missing = (matrix.clone() for _ in range(4))
    asymmetric[0, 1] *= 1 + 1e-6
    infinite[0, 1] = infinite[1, 0] = torch.inf
    negative[0, 0] = -1e-9
    missing[2, 3] = missing[3, 2] = torch.nan
    indefinite = torch.tensor([[1.0, 3.0], [3.0, 1.0]])
    large, batch = symmetric(gramian("random", LARGEST + 1)), torch.stack([matrix, matrix])
    cases = [
        asymmetric,
        infinite,
        negative,
        missing,
        indefinite,
        large,
        batch,
        matrix.clone().requires_grad_(),
    ]
    for case in [*cases, matrix[:2], torch.zeros(3, 3), matrix.long()]:
        assert small_projections(case, 1e-4, 1e-4) is None
