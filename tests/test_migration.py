"""What ``docs/migration.md`` says stands for what, computed by both."""

from collections.abc import Iterable

import pytest
import torch
from oracle import assert_close
from torch import Tensor, nn

from gramjd import Engine
from gramjd.weighting import upgrad


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


def test_mtl_backward() -> None:
    """The trunk's gradient from the Jacobian, the heads' from the sum, as in the guide of tasks."""
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
    _, each = losses()
    both = torch.stack(each)
    J = engine.jacobian(both)
    J.backward(upgrad(J.gramian()))
    both.sum().backward(inputs=heads)
    assert_close(taken([*trunk.parameters(), *heads]), want, 1e-6)


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
