"""``gramjd.mtl_backward`` over real processes of a gloo group, against dense Jacobians of all samples."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import tasks_cases as cases
import torch
from distributed_cases import sizes_of
from oracle import assert_close, dense_jacobian


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return ranks.run(["tasks_cases"], request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("kind", ["summed", "recorded", "averaged"])
@pytest.mark.parametrize("wrt", ["shared", "features"])
def test_step(results: Any, wrt: str, kind: str) -> None:
    samples = sum(sizes_of(len(results)))
    model = cases.Net()
    features, outputs = model(cases.data(samples))
    losses = torch.stack(cases.losses_of(outputs, samples))
    trunk = [*model.first.parameters(), *model.second.parameters()]
    rows = dense_jacobian(losses, trunk if wrt == "shared" else features)
    weights = cases.WEIGHTING[wrt](rows @ rows.T)
    assert float(weights.std()) > 0.01  # in conflict
    heads = list(model.heads.parameters())
    torch.autograd.backward(losses.sum(), inputs=heads, retain_graph=True)
    torch.autograd.backward(losses, weights, inputs=trunk)
    want = cases.gradients(model)
    for mine in ranks.of(results, "tasks"):
        got_weights, got = mine[wrt, kind]
        assert_close(got_weights, weights, 1e-9)
        assert got.keys() == want.keys() == dict(model.named_parameters()).keys()
        for name in want:
            assert_close(got[name], want[name], 1e-9)


def test_mistakes(results: Any) -> None:
    first, *others = ranks.of(results, "mistakes")
    for mine in (first, *others):
        assert mine["fewer tasks"] == mine["wrt"] == "RanksDisagreeError"
        assert mine["unknown"] in ("ValueError", "RankFailedError")
    assert first["infinite"] == "NotFiniteError"
    assert {mine["infinite"] for mine in others} == {"RankFailedError"}
