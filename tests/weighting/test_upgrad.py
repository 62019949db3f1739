"""UPGrad: TorchJD's own weights, and no conflict with any objective."""

import pytest
import torch

from gramjd.weighting import UPGradWeighting, upgrad


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
