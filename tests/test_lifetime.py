"""Nothing of an engine outlives what it belongs to."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from zoo import make

from gramjd import Engine


class Watched(nn.Module):
    """Keeps weak references to its activations."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(3, 4), nn.Linear(4, 2), nn.Parameter(torch.ones(4))
        self.alive: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x * 1)
        g = h.tanh() * self.scale
        out = self.b(g)
        self.alive = [weakref.ref(t) for t in (h, g, out)]
        return out


def activations(model: Watched) -> int:
    return sum(ref() is not None for ref in model.alive)


@pytest.fixture(autouse=True)
def _no_collector() -> object:
    """Everything must go by reference counts alone."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_activations_go_with_the_output() -> None:
    model = Watched()
    engine = Engine(model, batch_dim=0)
    out = model(torch.randn(5, 3)).sum(1)
    gramian = engine.compute_gramian(out)
    assert activations(model) > 0
    del out
    assert activations(model) == 0
    out = model(torch.randn(5, 3)).sum(1)  # never differentiated
    del out
    assert activations(model) == 0
    out = model(torch.randn(5, 3)).sum(1)
    out.backward(engine.compute_gramian(out).sum(0))
    del out
    assert activations(model) == 0
    assert gramian.grad_fn is None


def test_nothing_is_recorded_without_gradients() -> None:
    model = Watched()
    engine = Engine(model, batch_dim=0)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            out = model(torch.randn(5, 3))
        assert activations(model) == 1 and out.grad_fn is None
        del out
        assert activations(model) == 0
    engine.close()


def test_saved_tensors_go_with_backward() -> None:
    """After an ordinary backward the activations are free, though the output is kept."""
    model = Watched()
    engine = Engine(model, batch_dim=0)
    out = model(torch.randn(5, 3)).sum(1)
    out.sum().backward()
    assert activations(model) == 0
    engine.close()


def test_close_removes_the_hooks() -> None:
    model, _ = make("nested")
    engine = Engine(model, batch_dim=0)
    assert any(m._forward_hooks for m in model.modules())
    engine.close()
    engine.close()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_engine_that_is_dropped_removes_its_hooks() -> None:
    model, inputs = make("tied")
    engine = Engine(model, batch_dim=0)
    gone = weakref.ref(engine)
    engine.compute_gramian(model(*inputs(3)).square().mean((1, 2)))
    del engine
    assert gone() is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_that_is_dropped_goes() -> None:
    model = Watched()
    engine = Engine(model, batch_dim=0)
    out = model(torch.randn(5, 3)).sum(1)
    engine.compute_gramian(out)
    gone = weakref.ref(model)
    del engine, out, model
    assert gone() is None


def test_nothing_is_attached_to_modules_and_parameters() -> None:
    model, inputs = make("tied")
    before = [set(vars(m)) for m in model.modules()], [set(vars(p)) for p in model.parameters()]
    engine = Engine(model, batch_dim=0)
    out = model(*inputs(3)).square().mean((1, 2))
    engine.compute_gramian(out)
    assert before == (
        [set(vars(m)) for m in model.modules()],
        [set(vars(p)) for p in model.parameters()],
    )
    assert not vars(out)
    assert torch.overrides._get_current_function_mode() is None
    engine.close()
