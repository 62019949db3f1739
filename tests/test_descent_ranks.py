"""``Engine.backward`` over real processes of a gloo group, against one process with all samples."""

from __future__ import annotations

from typing import Any

import distributed_cases as cases
import pytest
import ranks
import torch
from descent_cases import LAYERS, gradients, task_losses
from torch import Tensor

import gramjd
from gramjd.weighting import upgrad


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    found = ranks.run(["descent_cases"], request.param, tmp_path_factory.mktemp("ranks"))
    return ranks.of(found, "step")


def close(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape
    assert (got - want).norm() <= 1e-8 * want.norm()


@pytest.mark.parametrize("name", ["averaged", "partial", "summed", "groups", "tasks", "by hand"])
def test_step(results: list[Any], name: str) -> None:
    samples = sum(cases.sizes_of(len(results)))
    model, x, y = cases.make("mlp", samples)
    of_tasks = name in ("tasks", "by hand")
    batch_dim = None if of_tasks else 0
    engine = gramjd.Engine(model[2] if name == "partial" else model, batch_dim=batch_dim)
    losses = task_losses(model, x, y, samples) if of_tasks else cases.losses_of(model, x, y)
    if name == "groups":
        J = engine.jacobian(losses)
        want = {group: upgrad(G) for group, G in J.gramian(LAYERS).items()}
        for group, w in want.items():
            J.select(LAYERS[group]).backward(w)
    else:
        want = {"": upgrad(engine.compute_gramian(losses))}
        losses.backward(want[""])
    wanted = gradients(model)
    for mine in results:
        weights, got = mine[name]
        given = weights if name == "groups" else {"": weights}
        for group in want:
            close(given[group], want[group])
        assert got.keys() == wanted.keys() == dict(model.named_parameters()).keys()
        for parameter in got:
            close(got[parameter], wanted[parameter])
    assert torch.isfinite(next(iter(want.values()))).all()
