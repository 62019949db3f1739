"""Checkpoints and saved-tensor hooks: exact from the recorded ops, and what they save stays saved."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from exactness import Net, check, draw, parameter
from oracle import OLD
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import gramjd
from gramjd import Engine

B, D = 5, 4


class Block(nn.Module):
    """A residual block with dropout, a scale and something to watch."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 8), nn.Linear(8, D)
        self.dropout, self.scale = nn.Dropout(dropout), parameter(D)
        self.seen: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(self.norm(x))
        g = h.tanh()
        self.seen += [weakref.ref(h), weakref.ref(g)]
        return x + self.dropout(self.down(g)) * self.scale


class Model(nn.Module):
    """Three blocks, checkpointed one by one, all together, both, or not at all."""

    def __init__(self, how: str, dropout: float = 0.3) -> None:
        super().__init__()
        self.first, self.last, self.how = nn.Linear(D, D), nn.Linear(D, 2), how
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(3))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.how in ("together", "nested"):
            return self.last(checkpoint(self.run, h, use_reentrant=False))
        if self.how == "sequential":
            return self.last(checkpoint_sequential(self.blocks, 2, h, use_reentrant=False))
        return self.last(self.run(h))

    def run(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            apart = self.how in ("one by one", "nested")
            h = checkpoint(block, h, use_reentrant=False) if apart else block(h)
        return h


# Torch 2.1 loses track of its hooks when nested checkpoints cannot be computed again under vmap, as
# with dropout: then rows of gradients go one after the other.
NESTED = 0.0 if OLD else 0.3

HOW = ["one by one", "together", "sequential", "nested"]


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("how", HOW)
def test_checkpoints_within_the_model(how: str, several: bool) -> None:
    """Recorded a second time when they are computed a second time; several objectives, too."""
    x = draw(B, D)
    model = Model(how, NESTED if how == "nested" else 0.3)
    check(model, lambda m: m(x).square() if several else m(x).square().sum(1))


def test_a_checkpoint_around_the_model() -> None:
    x = draw(B, D)
    check(Model("one by one", NESTED), lambda m: checkpoint(m, x, use_reentrant=False).square().sum(1))


def test_a_function_of_several_modules() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = checkpoint(lambda h: m.b(m.a(h).tanh()) + m.a(h), x, use_reentrant=False)
        return m.c(h)

    parts = {"a": nn.Linear(D, D), "b": nn.Linear(D, D), "c": nn.Linear(D, 2)}
    x = draw(B, D)
    check(Net(forward, **parts), lambda m: m(x).square().sum(1))


def test_a_parameter_used_in_a_checkpoint_but_outside_its_modules() -> None:
    """Nothing runs when that is computed again that could record it: rows for it alone."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(checkpoint(lambda h: m.a(h) * m.scale, x, use_reentrant=False))

    x = draw(B, D)
    check(Net(forward, a=nn.Linear(D, D), b=nn.Linear(D, 2), scale=parameter(D)),
          lambda m: m(x).square().sum(1), rows=["scale"])  # fmt: skip


SHARED: dict[str, Any] = {
    "an argument of a module": lambda m, x: run(m.block, x, m.table),
    "an argument of a function": lambda m, x: run(lambda x, t: m.block(x, t.tanh()), x, m.table),
    "derived from a parameter": lambda m, x: run(m.block, x, m.positions.weight * 2),
    "for several modules": lambda m, x: run(lambda x, t: m.block.q(x) @ m.block.k(t).T, x, m.table),
    "made inside": lambda m, x: run(lambda x: m.block.q(x) @ m.positions(torch.arange(B)).T, x),
    "in a checkpoint inside": lambda m, x: run(lambda x: run(m.block, x, m.table.cos()), x),
}


def run(function: Any, *args: Tensor) -> Tensor:
    return checkpoint(function, *args, use_reentrant=False)


def crossed() -> nn.Module:
    return Net(lambda m, x, t: m.q(x) @ m.k(t.sin()).T, q=nn.Linear(D, D), k=nn.Linear(D, D))


@pytest.mark.parametrize("name", list(SHARED))
def test_as_many_rows_as_samples_that_no_sample_owns(name: str) -> None:
    """What a checkpoint computes again knows nothing of them, but the forward did: rows, no refusal."""
    model = Net(SHARED[name], table=draw(B, D), positions=nn.Embedding(B, D), block=crossed())
    x = draw(B, D)
    check(model, lambda m: m(x).square().sum(1), rows=["k.", "positions"])


def test_samples_that_are_mixed_inside_a_checkpoint() -> None:
    """Also by a tensor that no sample owned, until the batch was written into it."""

    def written(m: Any, x: Tensor) -> Tensor:
        return run(lambda x, t: m.block(x, t.sin().copy_(x)), x, m.table)

    for forward in (written, lambda m, x: run(m.block, x, x.cos())):
        model = Net(forward, table=draw(B, D), block=crossed())
        with pytest.raises(
            gramjd.NotSeparableError, match=r"'block.k.weight' there is cross-sample dependence"
        ):
            Engine(model, batch_dim=0).compute_gramian(model(draw(B, D)).square().sum(1))


@pytest.mark.parametrize("how", HOW)
def test_the_memory_stays_saved(how: str) -> None:
    model = Model(how)
    engine = Engine(model, batch_dim=0)
    losses = model(draw(B, D)).square().sum(1)
    for _ in range(2):
        assert len(model.blocks[0].seen) > 0
        assert all(ref() is None for block in model.blocks[:1] for ref in block.seen)
        jacobian = engine.jacobian(losses)
        del jacobian
    losses.sum().backward()
    engine.close()


@pytest.mark.parametrize("how", HOW)
def test_training_is_as_without_an_engine(how: str) -> None:
    """Gradients bit for bit, and rows of gradients under ``vmap``."""
    model, x = Model(how, dropout=0.0), draw(B, D)
    twin = copy.deepcopy(model)
    engine = Engine(model, batch_dim=0)
    for m in (model, twin):
        m(x).square().sum().backward()
    assert all(
        torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )
    if how != "nested":
        out = [m(x).square().sum(1) for m in (model, twin)]
        eye = torch.eye(B).double()
        rows = [torch.autograd.grad(losses, list(m.parameters()), eye, is_grads_batched=True)
                for m, losses in zip((model, twin), out, strict=True)]  # fmt: skip
        assert all(torch.equal(p, q) for p, q in zip(*rows, strict=True))
    engine.close()


def test_reentrant_checkpoints_are_refused() -> None:
    """Autograd cannot reach into them, and would give the other parameters without a word."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.b(checkpoint(m.a, m.first(x), use_reentrant=True))

    parts = {"first": nn.Linear(D, D), "a": nn.Linear(D, D), "b": nn.Linear(D, 2)}
    model = Net(forward, **parts)
    for engine in (Engine(model, batch_dim=0), Engine(model.b, batch_dim=None)):
        with pytest.raises(gramjd.NotCoveredError, match=r"reentrant checkpoint.*use_reentrant=False"):
            engine.compute_gramian(model(draw(B, D)).sum(1))
    model(draw(B, D)).sum().backward()  # goes on working
    assert all(p.grad is not None for p in model.parameters())


# Saved-tensor hooks of other kinds.


def on_the_cpu() -> Any:
    return save_on_cpu()


def in_half_the_bits() -> Any:
    """Lossy, as compression is: autograd's own gradients are those of what comes back."""
    return saved_tensors_hooks(lambda t: t.float() if t.is_floating_point() else t,
                               lambda t: t.double() if t.is_floating_point() else t)  # fmt: skip


def by_name() -> Any:
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> int:
        kept[len(kept)] = t
        return len(kept) - 1

    return saved_tensors_hooks(pack, kept.__getitem__)


@pytest.mark.parametrize("hooks", [on_the_cpu, by_name, in_half_the_bits])
@pytest.mark.parametrize("inside", [True, False])
def test_saved_tensor_hooks(hooks: Callable[[], Any], inside: bool) -> None:
    """Around a part of the model, or around all of it.

    Of what a layer norm saves not all is lossy, so that its rule and autograd see different inputs.
    """
    x, lossy = draw(B, D), hooks is in_half_the_bits

    def part(m: Any, x: Tensor) -> Tensor:
        with hooks():
            return m.block(x)

    def losses(m: nn.Module) -> Tensor:
        with hooks():
            return m(x).square().sum(1)

    check(Net(part, block=Block()), losses if not inside else lambda m: m(x).square().sum(1),
          tolerance=1e-6 if lossy else 1e-10, rows=["norm"] if lossy else [])  # fmt: skip


def test_a_parameter_used_directly_under_hooks() -> None:
    """Such ops are not recorded, since the hooks may be a checkpoint's: rows for it alone."""

    def forward(m: Any, x: Tensor) -> Tensor:
        with save_on_cpu():
            return m.layer(x) * m.scale

    x = draw(B, D)
    check(Net(forward, layer=nn.Linear(D, D), scale=parameter(D)), lambda m: m(x).square().sum(1),
          rows=["scale"])  # fmt: skip
