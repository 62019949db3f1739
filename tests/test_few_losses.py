"""Few losses without a batch dimension: one ordinary backward pass for each, and no other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from oracle import assert_close, dense_gramian, needs_shapes
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gramjd
from gramjd import Engine, SlowPathWarning
from gramjd.engine.analysis.graph import walk


class Calls(TorchDispatchMode):
    """Counts calls of ops by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 10)
    ).double()


def stacked(model: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([column.square().mean() for column in model(x).unbind(1)])


def reduced(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean(0)


@pytest.mark.parametrize("losses", [stacked, reduced])
@pytest.mark.parametrize("strategies", [("losses",), ("rows",), None])
def test_a_backward_pass_for_each_loss_and_no_more(
    losses: Callable[[nn.Module, Tensor], Tensor], strategies: tuple[str, ...] | None
) -> None:
    model, x = network(), torch.randn(5, 2, 6, 6, dtype=torch.float64)
    engine = (
        Engine(model, batch_dim=None)
        if strategies is None
        else Engine(model, batch_dim=None, strategies=strategies)
    )
    for _ in range(2):
        out = losses(model, x)
        with Calls() as calls:
            gramian = engine.compute_gramian(out)
        assert_close(gramian, dense_gramian(out, model.parameters()))
        assert calls.counts["convolution_backward"] == 20


@needs_shapes
def test_a_loss_of_a_stack_takes_the_pass_of_its_own_branch() -> None:
    heads = nn.ModuleList(nn.Linear(3, 3) for _ in range(4)).double()
    engine, x = Engine(heads, batch_dim=None), torch.randn(5, 3, dtype=torch.float64)
    out = torch.stack([*(head(x).square().sum() for head in heads), torch.tensor(1.0).double()])
    with Calls() as calls:
        gramian = engine.compute_gramian(out)
    assert_close(gramian, dense_gramian(out, heads.parameters()))
    assert calls.counts["pow"] == 4 and bool((gramian[4] == 0).all())


def test_rows_that_the_budget_does_not_hold_are_not_kept() -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 4))
    x = torch.randn(8, 256)
    rows = sum(p.numel() for p in model.parameters()) * 4 * 4
    for budget, losses in [(rows, True), (rows - 1, False)]:
        engine = Engine(model, batch_dim=None, memory_budget=budget)
        origins = {row.op for row in engine.explain(reduced(model, x))}
        assert any("losses" in origin for origin in origins) == losses


def test_more_losses_and_samples_go_other_ways() -> None:
    model, x = network(), torch.randn(20, 2, 6, 6, dtype=torch.float64)
    engine = Engine(model.eval(), batch_dim=None)
    assert all("losses" not in row.op for row in engine.explain(model(x)[:, 0]))
    assert all("losses" not in row.op for row in Engine(model, batch_dim=0).explain(model(x[:3])[:, 0]))


def test_gradients_that_are_not_finite() -> None:
    model = nn.Linear(2, 2)
    engine = Engine(model, batch_dim=None)
    with pytest.raises(gramjd.NotFiniteError):
        engine.jacobian((model(torch.zeros(3, 2)) * 0).sqrt().sum(0))


def test_the_gradient_follows_from_the_rows() -> None:
    model, x = network(), torch.randn(5, 2, 6, 6, dtype=torch.float64)
    weights = torch.rand(10, dtype=torch.float64)
    jacobian = Engine(model, batch_dim=None).jacobian(reduced(model, x))
    jacobian.backward(weights)
    want = torch.autograd.grad(reduced(model, x) @ weights, list(model.parameters()))
    found = [p.grad for p in model.parameters()]
    assert_close(torch.cat([g.flatten() for g in found]), torch.cat([g.flatten() for g in want]))


def recorded(out: Tensor) -> bool:
    return bool(walk(out).nodes)


def test_an_engine_that_has_met_few_losses_alone_records_nothing() -> None:
    model = network()
    engine, other = Engine(model, batch_dim=None), Engine(model, batch_dim=None)
    for step in range(4):
        x = torch.randn(5, 2, 6, 6, dtype=torch.float64)
        out = reduced(model, x)
        assert recorded(out) == (step == 0)
        for each in (engine, other):
            each.backward(out, lambda gramian: torch.ones(10).double(), retain_graph=True)
            assert_close(each.compute_gramian(out), dense_gramian(out, model.parameters()))


def test_more_losses_than_few_are_exact_without_records_once_and_recorded_from_then_on() -> None:
    model = network().eval()
    engine = Engine(model, batch_dim=None)
    for step in range(6):
        x = torch.randn(20, 2, 6, 6, dtype=torch.float64)
        out = reduced(model, x) if step in (0, 4) else model(x)[:, 0]
        assert recorded(out) == (step != 1)
        with pytest.warns(SlowPathWarning, match="this engine records all") if step == 1 else nullcontext():
            assert_close(engine.compute_gramian(out), dense_gramian(out, model.parameters()))


def test_an_engine_that_records_nothing_leaves_the_records_of_others() -> None:
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 4)), nn.Linear(4, 2)
    ).double()
    tasks, samples, part = (
        Engine(model, batch_dim=None), Engine(model, batch_dim=0), Engine(model[1], batch_dim=0)
    )  # fmt: skip
    for step in range(8):
        x = torch.randn(5 + step % 2, 3, dtype=torch.float64)
        y = model(x)
        each, few = y.square().sum(1), y.square().mean(0)
        assert recorded(each)
        assert_close(tasks.compute_gramian(few), dense_gramian(few, model.parameters()))
        if step < 5:
            assert_close(samples.compute_gramian(each), dense_gramian(each, model.parameters()))
        assert_close(part.compute_gramian(each), dense_gramian(each, model[1].parameters()))
        if step == 4:
            samples.close()  # from then on, calls of a part of the model alone are recorded


def test_strategies_that_need_records_get_them() -> None:
    model = network().eval()
    engine = Engine(model, batch_dim=None, strategies=("losses", "ops"))
    for step in range(4):
        out = (reduced if step % 2 == 0 else lambda m, x: m(x)[:, 0])(
            model, torch.randn(20, 2, 6, 6, dtype=torch.float64)
        )
        assert_close(engine.compute_gramian(out), dense_gramian(out, model.parameters()))


@pytest.mark.parametrize("first", [0, 2])
def test_what_a_checkpoint_computes_again_is_recorded_like_the_first_time(first: int) -> None:
    layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)).double()
    model = nn.Sequential(nn.Linear(3, 4), *layers, nn.Linear(4, 20)).double()
    engine = Engine(model, batch_dim=None)
    for step in range(6):
        h = model[0](torch.randn(5, 3).double())
        for layer in layers:
            h = checkpoint(layer, h, use_reentrant=False) if step >= first else layer(h)
        y = model[4](h)
        out = y.square().mean(0) if step == 4 else y[:, :2].square().mean(0)
        assert_close(engine.compute_gramian(out), dense_gramian(out, model.parameters()))
        out.sum().backward()
