"""Stock models against per-loss autograd, in both modes, with a batch dimension and without."""

from __future__ import annotations

import pytest
from exactness import check
from models import MODELS


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", list(MODELS))
def test_model(name: str, mode: str, batch_dim: int | None) -> None:
    """Exact to 1e-8 when measured and when known, by the recorded ops but where the model says why."""
    given = MODELS[name]
    model = given.make().double().train(mode == "train")
    check(model, given.losses, batch_dims=[batch_dim], rows=given.rows, tolerance=1e-8, times=3)
