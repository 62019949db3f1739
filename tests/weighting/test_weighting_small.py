"""Small Gramians take the short way, also where a product has left rounding."""

from __future__ import annotations

import pytest
import torch

from gramjd.weighting import DualProjWeighting
from gramjd.weighting._small import easy, np


@pytest.mark.skipif(np is None, reason="numpy is not here")
def test_gramians_that_are_symmetric_up_to_rounding() -> None:
    rows = torch.randn(40, 40, dtype=torch.float64)
    exact = (rows @ rows.T + (rows @ rows.T).T) / 2
    rounded = exact + 1e-15 * exact.abs().max() * torch.rand(40, 40, dtype=torch.float64).triu(1)
    assert not torch.equal(rounded, rounded.T)
    found = easy(rounded)
    assert found is not None and bool((found == found.T).all())
    torch.testing.assert_close(DualProjWeighting()(rounded), DualProjWeighting()(exact), rtol=0, atol=1e-12)


def test_asymmetry_that_is_no_rounding_is_refused() -> None:
    with pytest.raises(ValueError, match="not symmetric"):
        DualProjWeighting()(torch.tensor([[1.0, 0.5], [0.1, 1.0]]))
