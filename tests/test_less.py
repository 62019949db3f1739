"""LESS against the steps that torch's own Adam takes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from oracle import assert_close, dense_jacobian
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

import gramjd
from gramjd import Engine, Jacobian, TopK, less


class Work:
    """A model, some steps into its training."""

    def __init__(self, make: Any = Adam, steps: int = 3, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 1)
        )
        self.model.double()
        self.optimizer: Optimizer = make(self.model.parameters(), **{"lr": 0.01, **options})
        self.engine = Engine(self.model, batch_dim=0)
        self.x = torch.randint(0, 9, (7, 3))
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.losses(torch.randint(0, 9, (8, 3))).mean().backward()
            self.optimizer.step()
        self.optimizer.zero_grad()

    def losses(self, x: Tensor, model: nn.Module | None = None) -> Tensor:
        return ((model or self.model)(x).squeeze(1) - x.sum(1)).square()

    def jacobian(self, x: Tensor) -> Jacobian:
        return self.engine.jacobian(self.losses(x))

    def run(self, **changes: Any) -> Tensor | TopK:
        given = {"queries": self.jacobian(self.x[:2]), "jacobian": self.jacobian, "loader": self.x.split(3)}
        named = dict(self.model.named_parameters())
        return less(**{**given, "optimizer": self.optimizer, "parameters": named, **changes})

    def step(self, sample: Tensor) -> Tensor:
        """What the optimizer's own next step changes, if this sample gives its gradient."""
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        assert optimizer.param_groups[0]["params"][0] is next(model.parameters())
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        self.losses(sample, model).sum().backward()
        optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()]) - before


@pytest.mark.parametrize("make", [Adam, AdamW])
@pytest.mark.parametrize("steps", [1, 5])
def test_steps_of_the_optimizer(make: Any, steps: int) -> None:
    work = Work(make, steps, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.0)
    before = copy.deepcopy(work.optimizer.state_dict())
    got = work.run()
    queries = dense_jacobian(work.losses(work.x[:2]), work.model.parameters())
    directions = -torch.stack([work.step(x[None]) for x in work.x])
    want = nn.functional.normalize(queries) @ nn.functional.normalize(directions).T
    assert isinstance(got, Tensor)
    assert_close(got, want)
    best = work.run(topk=3)
    assert isinstance(best, TopK) and torch.equal(best.values, got.topk(3).values)
    after = work.optimizer.state_dict()
    assert str(after) == str(before) and all(p.grad is None for p in work.model.parameters())


def test_transforms_and_decoupled_decay() -> None:
    """AdamW's decay is no part of the direction; a mean loss as the query."""
    plain, decayed = Work(AdamW, weight_decay=0.0), Work(AdamW, weight_decay=0.0)
    decayed.optimizer.param_groups[0]["weight_decay"] = 0.5
    assert torch.equal(torch.as_tensor(plain.run()), torch.as_tensor(decayed.run()))
    func, params = gramjd.functional_loss(plain.model, lambda out, x: (out.squeeze(1) - x.sum(1)).square())
    jac = gramjd.jacobian(func)
    got = plain.run(queries=jac(params, plain.x[:2], plain.x[:2]), jacobian=lambda x: jac(params, x, x))
    assert_close(torch.as_tensor(got), torch.as_tensor(plain.run()))
    mean = plain.run(queries=Engine(plain.model, batch_dim=None).jacobian(plain.losses(plain.x[:2]).mean()))
    assert torch.as_tensor(mean).shape == (7,)


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"SGD has no moments of parameter '0.weight': take the Adam"):
        Work(SGD).run()
    with pytest.raises(ValueError, match=r"Adam has no moments of parameter"):
        Work(steps=0).run()
    with pytest.raises(ValueError, match="Adam with amsgrad=True steps otherwise"):
        Work(amsgrad=True).run()
    with pytest.raises(ValueError, match=r"Adam with weight_decay=0.1 steps otherwise.*, or AdamW"):
        Work(weight_decay=0.1).run()
    work = Work()
    with pytest.raises(ValueError, match=r"parameters has no '0.weight'"):
        work.run(parameters={})
    with pytest.raises(ValueError, match="different parameters"):
        work.run(queries=work.jacobian(work.x[:2]).select(["2.bias"]))
    with pytest.raises(ValueError, match="no samples"):
        work.run(loader=[])
