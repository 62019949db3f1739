"""Bad input: a named error with a remedy, and nothing changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import assert_close, dense_gramian
from torch import Tensor, nn

import gramjd
from gramjd import Engine, NoGraphError, NotCoveredError, NotSeparableError

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double()


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


@pytest.fixture
def engine(model: nn.Sequential) -> Engine:
    return Engine(model, batch_dim=0)


def still_works(engine: Engine, model: nn.Module) -> None:
    """After an error the model, its gradients and the engine are as before."""
    assert all(p.grad is None for p in model.parameters())
    assert torch.overrides._get_current_function_mode() is None
    out = model(X).square().sum(1)
    assert_close(engine.compute_gramian(out), dense_gramian(out, model.parameters()))


def test_no_graph(engine: Engine, model: nn.Module) -> None:
    with torch.no_grad():
        out = model(X).sum(1)
    for bad in (out, model(X).sum(1).detach(), torch.ones(6)):
        with pytest.raises(NoGraphError, match="with gradients enabled"):
            engine.compute_gramian(bad)
    still_works(engine, model)


def test_freed_graph(engine: Engine, model: nn.Module) -> None:
    out = model(X).square().sum(1)
    out.sum().backward()
    model.zero_grad(set_to_none=True)
    with pytest.raises(NoGraphError, match=r"before backward, or keep the graph with backward\(retain_graph"):
        engine.compute_gramian(out)
    still_works(engine, model)


def test_output_of_other_modules(engine: Engine, model: nn.Module) -> None:
    with pytest.raises(NotCoveredError, match=r"No parameter of the registered modules \(Sequential\)"):
        engine.compute_gramian(nn.Linear(3, 1).double()(X).sum(1))
    still_works(engine, model)


def test_nothing_to_train(model: nn.Module) -> None:
    model.requires_grad_(False)
    engine = Engine(model, batch_dim=0)
    x = X.clone().requires_grad_()
    with pytest.raises(NotCoveredError, match=r"no parameter that requires gradients.*requires_grad_\(\)"):
        engine.compute_gramian(model(x).sum(1))
    with pytest.raises(NotCoveredError, match="no parameter that requires gradients"):
        Engine(nn.ReLU(), batch_dim=0).compute_gramian(x.relu().sum(1))


@pytest.mark.parametrize("batch_dim", [1, -2])
def test_batch_dim_out_of_range(model: nn.Module, batch_dim: int) -> None:
    engine = Engine(model, batch_dim=batch_dim)
    with pytest.raises(ValueError, match=f"batch_dim={batch_dim} is not a dimension.*reduction='none'"):
        engine.compute_gramian(model(X).sum(1))


def test_wrong_batch_dim(engine: Engine, model: nn.Module) -> None:
    wrong = Engine(model, batch_dim=1)
    with pytest.raises(NotSeparableError, match=r"dimension 1 as independent samples.*batch_dim=None"):
        wrong.compute_gramian(model(X).softmax(1))
    still_works(engine, model)


def test_losses_that_mix_samples(engine: Engine, model: nn.Module) -> None:
    for mix in (
        lambda out: out - out.mean(),
        lambda out: out.softmax(0),
        lambda out: out.flip(0) * out,
    ):
        out = mix(model(X).square().sum(1))
        with pytest.raises(NotSeparableError, match="makes samples depend on each other"):
            engine.compute_gramian(out)
        exact = Engine(model, batch_dim=None)
        out = mix(model(X).square().sum(1))
        assert_close(exact.compute_gramian(out), dense_gramian(out, model.parameters()))
        exact.close()
    still_works(engine, model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(engine: Engine, model: nn.Module, value: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        engine.compute_gramian(model(X).sum(1) * value)
    still_works(engine, model)


def test_empty_batch(engine: Engine, model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"output is empty \(shape \[0\]\)"):
        engine.compute_gramian(model(X[:0]).sum(1))
    still_works(engine, model)


def test_not_a_tensor(engine: Engine) -> None:
    with pytest.raises(TypeError, match="expects a tensor or a list of tensors, got a dict"):
        engine.compute_gramian({"loss": 1.0})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a tensor or a list of tensors, got a float in a list"):
        engine.compute_gramian([1.0])  # type: ignore[list-item]


def test_an_exception_in_the_forward(engine: Engine, model: nn.Module) -> None:
    with pytest.raises(RuntimeError):
        model(X[:, :2])
    still_works(engine, model)


def test_an_interrupt_in_the_forward() -> None:
    class Interrupted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.interrupt = nn.Linear(3, 2), True

        def forward(self, x: Tensor) -> Tensor:
            if self.interrupt:
                raise KeyboardInterrupt
            return self.layer(x)

    model = Interrupted().double()
    engine = Engine(model, batch_dim=0, strategies=["ops"])
    with pytest.raises(KeyboardInterrupt):
        model(X)
    model.interrupt = False
    model(X)  # the next forward ends the recording that was cut off
    still_works(engine, model)


def test_constructor_arguments(model: nn.Module) -> None:
    with pytest.raises(TypeError, match="needs a batch_dim"):
        Engine(model)
    with pytest.raises(TypeError, match="batch_dim must be an int or None"):
        Engine(model, batch_dim="first")
    with pytest.raises(TypeError, match="got a Tensor"):
        Engine([X], batch_dim=0)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="at least one module"):
        Engine([], batch_dim=0)
    with pytest.raises(ValueError, match="check must be"):
        Engine(model, batch_dim=0, check="often")
    with pytest.raises(ValueError, match="strategies must be"):
        Engine(model, batch_dim=0, strategies=["magic"])


def test_no_way_left(model: nn.Module) -> None:
    engine = Engine(model, batch_dim=0, strategies=["ops"])
    out = model(X).sum(1) + model[0].bias.sum()
    with pytest.raises(gramjd.CheckFailedError, match=r"'0.bias'.*outside of the calls.*tries all"):
        engine.compute_gramian(out)
    still_works(engine, model)


def test_transforms() -> None:
    def func(p: Tensor, x: Tensor) -> Tensor:
        return (p * x).sum()

    p = torch.ones(3).double()
    with pytest.raises(ValueError, match="No argument is batched"):
        gramjd.gramian(func, in_dims=(None, None))(p, X)
    with pytest.raises(ValueError, match=r"disagree on the number of samples: \[2, 6\]"):
        gramjd.gramian(lambda p, x, y: func(p, x))(p, X, X[:2])
    with pytest.raises(ValueError, match="batch is empty"):
        gramjd.gramian(func)(p, X[:0])
    with pytest.raises(ValueError, match="no batch dimension 2"):
        gramjd.gramian(func, in_dims=2)(p, X)
    with pytest.raises(ValueError, match="in_dims has 3 entries for 2 positional arguments"):
        gramjd.gramian(func, in_dims=(None, 0, 0))(p, X)
    with pytest.raises(ValueError, match="in_dims is 0 for argument 0, which is differentiated"):
        gramjd.gramian(func, in_dims=(0, 0))(p, X)
    with pytest.raises(TypeError, match=r"output must be a tensor.*'name' there is a str.*has_aux"):
        gramjd.gramian(lambda p, x: {"loss": func(p, x), "name": "n"})(p, X)
    with pytest.raises(TypeError, match=r"Argument 0 must be a tensor.*int"):
        gramjd.gramian(func)({"a": 1}, X)

    def writes(p: Tensor, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[0] = p[0]
        return (out * x).sum()

    # writing a parameter into another tensor is exact; writing into one cannot be followed
    assert_close(gramjd.gramian(writes)(p, X), X[:, :1] @ X[:, :1].T)
    with pytest.raises(NotImplementedError, match=r"writes into a parameter.*mul_.*out-of-place"):
        gramjd.gramian(lambda p, x: (p * 2).mul_(3) @ x)(p, X)

    def hooked(p: Tensor, x: Tensor) -> Tensor:
        w = p * 2
        w.register_hook(lambda gradient: 3 * gradient)
        return w @ x

    for check in ("first", "never"):
        with pytest.raises(NotImplementedError, match=r"puts a hook on a parameter.*weight \* mask.*Engine"):
            gramjd.gramian(hooked, check=check)(p, X)
    jacobian = gramjd.jacobian(func)(p, X)
    with pytest.raises(ValueError, match=r"weights of shape \[6\].*got \[5\]"):
        jacobian.vjp(torch.ones(5))


@pytest.mark.parametrize("transform", [gramjd.gramian, gramjd.jacobian, gramjd.gramian_and_value, gramjd.ntk])
def test_a_transform_of_no_function(transform: Any) -> None:
    with pytest.raises(TypeError, match="A transform takes a function of one sample, not 3"):
        transform(3)
