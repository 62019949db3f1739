"""Compiled code that gives its memory away in the first backward pass: an error, no other number."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, dense_gramian
from torch import Tensor, nn

import gramjd
from gramjd import CheckFailedError, Engine, NoGraphError

GIVEN_AWAY = r"memory away.*donated_buffer = False.*TORCHINDUCTOR_CACHE_DIR"


def overwriting() -> Any:
    """A function like compiled code whose backward pass writes into what it saved, unseen by torch."""

    class CompiledFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            kept = x.detach().clone()
            ctx.save_for_backward(kept)
            return kept.sin()

        @staticmethod
        def backward(ctx: Any, c: Tensor) -> Tensor:  # type: ignore[override]
            (kept,) = ctx.saved_tensors
            found = c * kept.cos()
            kept.detach().numpy()[...] = found.detach().numpy()
            return found

    return CompiledFunction


def mean(gramian: Tensor) -> Tensor:
    return torch.full((len(gramian),), 1 / len(gramian), dtype=gramian.dtype)


def model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 4).double()


@pytest.mark.parametrize("batch_dim", [0, None])
def test_code_that_overwrites_what_it_saved(batch_dim: int | None) -> None:
    """In any call: that of the structure before does not vouch for code that is compiled anew."""
    linear = model()
    engine, x = Engine(linear, batch_dim=batch_dim), torch.randn(6, 3, dtype=torch.float64)
    for _ in range(3):
        losses = linear(x).sin().sum(1)
        assert_close(engine.compute_gramian(losses), dense_gramian(losses, linear.parameters()))
    for _ in range(2):
        with pytest.raises(
            CheckFailedError, match=r"weight.*writes into what it saved.*donated_buffer = False"
        ):
            engine.compute_gramian(overwriting().apply(linear(x)).sum(1))
    assert all(p.grad is None for p in linear.parameters())
    losses = linear(x).sin().sum(1)
    assert_close(engine.compute_gramian(losses), dense_gramian(losses, linear.parameters()))


@pytest.mark.parametrize(
    "compute",
    [
        lambda losses, linear: gramjd.backward(losses, mean),
        lambda losses, linear: gramjd.jac(losses, list(linear.parameters())),
        lambda losses, linear: Engine(linear, batch_dim=0).jacobian(losses),
    ],
    ids=["backward", "jac", "jacobian"],
)
def test_every_face(compute: Callable[[Tensor, nn.Module], Any]) -> None:
    linear = model()
    with pytest.raises(CheckFailedError, match="writes into what it saved"):
        compute(overwriting().apply(linear(torch.randn(6, 3, dtype=torch.float64))).sum(1), linear)
    assert all(p.grad is None for p in linear.parameters())


def test_code_is_run_twice_once() -> None:
    """And then no more, in any engine."""
    linear, passes = model(), [0]

    class CompiledFunction(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, c: Tensor) -> Tensor:  # type: ignore[override]
            passes[0] += 1
            return c

    counts = []
    for _ in range(2):
        before = passes[0]
        gramjd.jac(
            CompiledFunction.apply(linear(torch.randn(2, 3).double())).sum(1), list(linear.parameters())
        )
        counts.append(passes[0] - before)
    assert counts[0] == counts[1] + 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo asks for it
def test_sizes_that_vary() -> None:
    """Torch refuses the second backward pass of code for any size, unless no memory is given away."""
    config = pytest.importorskip("torch._functorch.config")
    if not hasattr(config, "donated_buffer"):
        pytest.skip("this version of torch gives no memory away")
    net = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 3)).double()

    def steps() -> None:
        loss = torch.compile(lambda out, y: F.cross_entropy(out, y, reduction="none"), backend="aot_eager")
        engine = Engine(net, batch_dim=0)
        for batch in (4, 4, 5, 6, 3):
            x, y = torch.randn(batch, 4, dtype=torch.float64), torch.randint(0, 3, (batch,))
            losses = loss(net(x), y)
            plain = F.cross_entropy(net(x), y, reduction="none")
            assert_close(engine.compute_gramian(losses), dense_gramian(plain, net.parameters()))

    torch.compiler.reset()
    with config.patch(donated_buffer=True), pytest.raises(NoGraphError, match=GIVEN_AWAY):
        steps()
    torch.compiler.reset()
    with config.patch(donated_buffer=False):
        steps()
    torch.compiler.reset()
