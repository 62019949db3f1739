"""What ``docs/migration.md`` says stands for what, computed by both."""

import math
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from oracle import assert_close
from torch import Tensor, nn

import gramjd
from gramjd import Engine
from gramjd.weighting import UPGradWeighting, upgrad


@pytest.fixture(autouse=True)
def _needs_torchjd() -> None:
    pytest.importorskip("quadprog")
    pytest.importorskip("torchjd")


def taken(parameters: Iterable[Tensor]) -> Tensor:
    """The gradients of parameters, in one vector; they are then forgotten."""
    found = []
    for p in parameters:
        assert p.grad is not None
        found.append(p.grad.flatten())
        p.grad = None
    return torch.cat(found)


def test_autojac_backward() -> None:
    from torchjd import autojac
    from torchjd.aggregation import UPGrad

    model, x = nn.Linear(6, 1).double(), torch.randn(8, 6, dtype=torch.float64)
    engine = Engine(model, batch_dim=0)
    autojac.backward(model(x)[:, 0].square())
    autojac.jac_to_grad(model.parameters(), UPGrad())
    want = taken(model.parameters())
    losses = model(x)[:, 0].square()
    losses.backward(upgrad(engine.compute_gramian(losses)))
    assert_close(taken(model.parameters()), want, 1e-6)
    J = engine.jacobian(model(x)[:, 0].square())
    J.backward(upgrad(J.gramian()))
    assert_close(taken(model.parameters()), want, 1e-6)
    engine.backward(model(x)[:, 0].square(), UPGradWeighting())
    assert_close(taken(model.parameters()), want, 1e-6)
    gramjd.backward(model(x)[:, 0].square(), UPGradWeighting())
    assert_close(taken(model.parameters()), want, 1e-6)


def test_mtl_backward() -> None:
    """In one call, and from the Jacobian of the trunk and the sum of the heads' losses."""
    from torchjd import autojac
    from torchjd.aggregation import UPGrad

    trunk, a, b = (nn.Linear(*sizes).double() for sizes in [(6, 4), (4, 1), (4, 1)])
    x = torch.randn(8, 6, dtype=torch.float64)
    heads = [*a.parameters(), *b.parameters()]
    engine = Engine(trunk, batch_dim=None)

    def losses() -> tuple[Tensor, list[Tensor]]:
        features = trunk(x)
        return features, [a(features).square().mean(), (b(features) - 1).square().mean()]

    features, each = losses()
    autojac.mtl_backward(each, features)
    autojac.jac_to_grad(trunk.parameters(), UPGrad())
    want = taken([*trunk.parameters(), *heads])
    features, each = losses()
    gramjd.mtl_backward(each, features, UPGradWeighting())
    assert_close(taken([*trunk.parameters(), *heads]), want, 1e-6)
    _, each = losses()
    J = engine.jacobian(each)
    J.backward(upgrad(J.gramian()))
    sum(each).backward(inputs=heads)
    assert_close(taken([*trunk.parameters(), *heads]), want, 1e-6)


@pytest.mark.parametrize("shape", [(4,), (4, 2), (2, 4)])
def test_gramians_of_the_newest(shape: tuple[int, ...]) -> None:
    """They are flat, whatever the shape of the losses and wherever their samples are."""
    from torchjd.aggregation import UPGradWeighting as Weighting
    from torchjd.autogram import Engine as Theirs

    model, x = nn.Linear(6, 2 if len(shape) > 1 else 1).double(), torch.randn(4, 6).double()
    batch_dim = shape.index(4)

    def losses() -> Tensor:
        out = model(x).square()
        return out.reshape(shape) if batch_dim == 0 else out.T

    mine = Engine(model, batch_dim=batch_dim)
    ours = mine.compute_gramian(losses(), flat=True)
    assert_close(gramjd.gramians.flatten(mine.compute_gramian(losses())), ours)
    mine.close()
    theirs = Theirs(model, batch_dim=batch_dim)
    want = theirs.compute_gramian(losses())
    assert want.shape == (math.prod(shape),) * 2  # [m, m]
    assert_close(ours, want)
    generalized = gramjd.gramians.unflatten(want, shape)
    assert_close(upgrad(generalized).flatten(), Weighting()(ours), 1e-6)


OLDER = """
import torch
from torch import nn
from torchjd.aggregation import Flattening, UPGrad, UPGradWeighting
from torchjd.autogram import Engine
from torchjd.autojac import backward, jac_to_grad, mtl_backward
import gramjd
from gramjd.weighting import upgrad

torch.manual_seed(0)
model, x = nn.Linear(6, 2).double(), torch.randn(4, 6).double()
mine = gramjd.Engine(model, batch_dim=0)
ours = mine.compute_gramian(model(x).square())
flat = mine.compute_gramian(model(x).square(), flat=True)
mine.close()
theirs = Engine(model, batch_dim=0)
want = theirs.compute_gramian(model(x).square())
assert want.shape == ours.shape == (4, 2, 2, 4), want.shape
torch.testing.assert_close(ours, want, rtol=1e-10, atol=1e-10)
torch.testing.assert_close(gramjd.gramians.flatten(want), flat, rtol=1e-10, atol=1e-10)
torch.testing.assert_close(upgrad(want), Flattening(UPGradWeighting())(ours), rtol=1e-6, atol=1e-6)
torch.testing.assert_close(upgrad(flat), UPGradWeighting()(flat), rtol=1e-6, atol=1e-6)
model = nn.Linear(6, 2).double()
backward(model(x).square().mean(0))
jac_to_grad(model.parameters(), UPGrad())
want = [p.grad for p in model.parameters()]
model.zero_grad()
gramjd.backward(model(x).square().mean(0), upgrad)
torch.testing.assert_close([p.grad for p in model.parameters()], want, rtol=1e-6, atol=1e-6)
print("the same")
"""


def test_gramians_of_the_last_that_has_generalized_ones() -> None:
    """TorchJD 0.11, which ``make out/torchjd-0.11`` puts there, in a process of its own."""
    root = Path(__file__).parents[1]
    folder = root / "out" / "torchjd-0.11"
    if not folder.exists():
        pytest.skip("make out/torchjd-0.11 installs it")
    paths = {"PYTHONPATH": os.pathsep.join([str(folder), str(root)])}
    ended = subprocess.run(
        [sys.executable, "-c", OLDER],
        env={**os.environ, **paths},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ended.stdout == "the same\n", ended.stderr


def test_either_weighting_takes_either_gramian() -> None:
    from torchjd.aggregation import UPGradWeighting
    from torchjd.autogram import Engine as Theirs

    model, x = nn.Linear(6, 1).double(), torch.randn(8, 6, dtype=torch.float64)
    mine = Engine(model, batch_dim=0)
    ours = mine.compute_gramian(model(x)[:, 0].square())
    mine.close()
    theirs = Theirs(model, batch_dim=0)
    other = theirs.compute_gramian(model(x)[:, 0].square())
    assert_close(upgrad(other), UPGradWeighting()(ours), 1e-6)
