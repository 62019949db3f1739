"""UPGrad against TorchJD's own, and its shapes and errors."""

import pytest
import torch

from gramjd.weighting import UPGradWeighting, upgrad


@pytest.mark.parametrize("m, n", [(1, 3), (2, 2), (8, 3), (8, 20), (40, 2), (40, 100)])
def test_equals_torchjd(m: int, n: int) -> None:
    pytest.importorskip("quadprog")
    aggregation = pytest.importorskip("torchjd.aggregation")
    torch.manual_seed(m + n)
    jacobian = torch.randn(m, n, dtype=torch.float64)
    gramian = jacobian @ jacobian.T
    expected = aggregation.UPGradWeighting()(gramian)
    torch.testing.assert_close(upgrad(gramian), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(UPGradWeighting()(gramian), expected, rtol=1e-9, atol=1e-9)
