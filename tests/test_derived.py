"""Weights that are functions of parameters alone: parametrizations, low-rank updates, mixtures."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, dense_gramian
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

import gramjd
from gramjd import Engine
from gramjd.blocks import Dense, Outer


class LoRA(nn.Module):
    """``W + B @ A``, scaled; ``W`` may be frozen."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(4, 5), nn.Parameter(torch.randn(2, 4)), None
        self.up = nn.Parameter(torch.randn(5, 2))
        self.base.weight.requires_grad_(not frozen)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base.weight + self.up @ self.down * 0.5, self.base.bias)


class Mixture(nn.Module):
    """Layers mixed by softmax weights; weights mixed by a gate; a bias table that is looked up once."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.scores = (
            nn.ModuleList(nn.Linear(4, 4) for _ in range(3)),
            nn.Parameter(torch.randn(3)),
        )
        self.table = nn.Parameter(torch.randn(7, 1))

    def forward(self, x: Tensor) -> Tensor:
        mix = self.scores.softmax(0)
        h = sum(weight * layer(x) for weight, layer in zip(mix.unbind(), self.layers, strict=True))
        weight = torch.stack([layer.weight for layer in self.layers]).mul(mix[:, None, None]).sum(0)
        places = (torch.arange(4)[:, None] - torch.arange(4)) + 3
        return h @ (weight + F.embedding(places, self.table).squeeze(-1))


class FusedQKV(nn.Module):
    """One weight in three pieces, each for another input, transposed and reshaped into heads."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.weight.chunk(3)
        heads = k.view(2, 2, 4).transpose(0, 1).reshape(4, 4)
        return x.sin() @ q.T + F.linear(x.cos(), heads) + torch.einsum("bi,oi->bo", x, v)


def spectral() -> nn.Module:
    layer = parametrizations.spectral_norm(nn.Linear(4, 5))
    return layer.eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 5)), False),
    "weight norm of a convolution": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (2, 2)), parametrizations.weight_norm(nn.Conv1d(2, 3, 2)), nn.Flatten()
        ),
        False,
    ),
    "spectral norm": (spectral, False),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 5)), False),
    "cayley": (lambda: parametrizations.orthogonal(nn.Linear(4, 4), orthogonal_map="cayley"), False),
    "lora": (lambda: LoRA(True), True),
    "lora, all trained": (lambda: LoRA(False), True),
    "mixture": (Mixture, False),
    "fused qkv": (FusedQKV, True),
}


def losses(out: Tensor, several: bool) -> Tensor:
    return torch.stack([out.sin().sum(1), out.square().mean(1)], 1) if several else out.sin().sum(1)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, of householder products
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("name", list(MODELS))
def test_derived_weights(name: str, several: bool) -> None:
    build, structured = MODELS[name]
    model, x = build().double(), torch.randn(3, 4, dtype=torch.float64)
    want = dense_gramian(losses(model(x), several), model.parameters())
    for batch_dim in (0, None):
        engine = Engine(model, batch_dim=batch_dim, strategies=["ops"])
        for _ in range(2):
            got = engine.jacobian(losses(model(x), several))
            assert_close(got.gramian(), want)
        for blocks, parameter in zip(got.blocks, got.parameters, strict=True):
            if structured and parameter.ndim > 1:
                assert {type(block) for block in blocks} == {Outer}
        engine.close()

    def f(params: dict[str, Tensor], sample: Tensor) -> Tensor:
        return losses(functional_call(model, params, (sample[None],)), several)[0]

    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    got = gramjd.jacobian(f)(params, x)
    assert_close(got.gramian(), want)
    if structured:
        assert not any(isinstance(b, Dense) for blocks, p in zip(got.blocks, got.parameters, strict=True)
                       for b in blocks if p.ndim > 1)  # fmt: skip


class Masked(nn.Module):
    """A pruned layer: its mask is a buffer, or any other attribute."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = nn.Linear(6, 6), kind
        self.weight, mask = nn.Parameter(torch.randn(6, 6)), torch.rand(6, 6).gt(0.5).double()
        if kind == "buffer":
            self.register_buffer("mask", mask)
        else:
            self.mask = {"attribute": mask, "list": [mask], "dictionary": {"first": mask}}[kind]

    def forward(self, x: Tensor) -> Tensor:
        mask = self.mask[0] if self.kind == "list" else self.mask
        mask = mask["first"] if isinstance(mask, dict) else mask
        return self.inner(x) @ (self.weight * mask) @ (self.weight @ mask + mask)


@pytest.mark.filterwarnings("error::gramjd.SlowPathWarning")
@pytest.mark.parametrize("kind", ["buffer", "attribute", "list", "dictionary"])
def test_constants_of_a_module(kind: str) -> None:
    """They are the same for all samples, also where they have as many entries in a dimension."""
    model = Masked(kind).double()
    with Engine(model, batch_dim=0) as engine:
        for samples in (4, 6, 6, 3, 1, 6):
            losses = model(torch.randn(samples, 6).double()).square().sum(1)
            assert_close(engine.compute_gramian(losses), dense_gramian(losses, model.parameters()))


class Stateful(nn.Module):
    """Carries a hidden state of each sample from step to step, in an attribute that begins as zeros."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.input, self.how = nn.Linear(6, 6), how
        self.weight, self.gain = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(1, 6))
        self.state = torch.zeros(4, 6).double()

    def forward(self, x: Tensor) -> Tensor:
        state = self.state.clone() if self.how == "written" else self.state
        out = torch.tanh(self.input(x) + state @ self.weight + self.gain.expand_as(state) * state)
        if self.how == "written":
            self.state.copy_(out.detach())
        else:
            self.state = out.detach()
        return out @ self.weight


@pytest.mark.parametrize("how", ["written", "replaced"])
def test_attributes_that_are_of_samples(how: str) -> None:
    model = Stateful(how).double()
    with Engine(model, batch_dim=0) as engine:
        for _ in range(10):
            losses = model(torch.randn(4, 6).double()).square().sum(1)
            assert_close(engine.compute_gramian(losses), dense_gramian(losses, model.parameters()))
