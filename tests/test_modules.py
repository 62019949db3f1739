"""Torch's own layers and ops, with every option that changes how a parameter is used, in ordinary models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import OLD, assert_close, dense_gramian
from torch import Tensor, nn
from torch.func import functional_call

import gramjd
from gramjd import Engine

CONVS, TRANSPOSED = (
    (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
PADDINGS: list[dict[str, Any]] = [
    {"padding_mode": "reflect", "padding": 1, "stride": 2}, {"padding_mode": "replicate", "padding": "same"},
    {"padding_mode": "circular", "padding": 1, "dilation": 2, "groups": 4, "bias": False},
    {"padding": "valid", "groups": 4}, {"padding": "same", "dilation": 2, "groups": 2},
]  # fmt: skip
SPREADS: list[dict[str, Any]] = [
    {"stride": 2, "padding": 1, "output_padding": 1}, {"groups": 4, "dilation": 2, "bias": False},
]  # fmt: skip


class Used(nn.Module):
    """A parameter, and what is done with it and the input."""

    def __init__(self, shape: tuple[int, ...], call: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.p, self.call = nn.Parameter(torch.randn(shape)), call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.p, x)


def used(shape: tuple[int, ...], call: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Used(shape, call)


class Twice(nn.Module):
    """``nn.Bilinear`` of an input and a function of it."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.layer = nn.Bilinear(4, 4, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.sin())


def moved(norm: nn.Module) -> nn.Module:
    """With statistics that are not those of a fresh layer, in evaluation."""
    for name, buffer in norm.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand_like(buffer) + (0.5 if "var" in name else 0))
    return norm.eval()


def convolutions() -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]]:
    """Layers from 4 to 8 channels in one to three dimensions."""
    found = {}
    for kinds, options in ((CONVS, PADDINGS), (TRANSPOSED, SPREADS)):
        for n, kind in enumerate(kinds, start=1):
            for kw in options:
                name = f"{kind.__name__} {kw}"
                found[name] = (lambda kind=kind, kw=kw: kind(4, 8, 3, **kw)), (4, *(5, 4, 4)[:n])
    return found


TOKENS, IMAGE, IDS = (3, 4), (4, 3, 3), (5,)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **convolutions(),
    "linear, no bias": (lambda: nn.Linear(4, 3, bias=False), TOKENS),
    "bilinear": (lambda: Twice(True), TOKENS),
    "bilinear, no bias": (lambda: Twice(False), (4,)),
    "addmm, weight on the left": (used((3, 4), lambda p, x: torch.addmm(x.new_ones(1), p, x.T).T), (4,)),
    "mv": (used((4,), lambda p, x: torch.mv(x, p)[:, None]), (4,)),
    "mv, derived": (used((4, 3), lambda p, x: x * torch.mv(p, torch.mv(p.T, p[:, 0]))), (4,)),
    "matmul of a vector": (used((4, 3), lambda p, x: x * (p @ (p.T @ p.sin()[:, 0]))), (4,)),
    "tensordot": (used((4, 3), lambda p, x: torch.tensordot(x, p, 1)), TOKENS),
    "einsum of three": (used((4, 3), lambda p, x: torch.einsum("nti,io,nti->no", x, p, x.sin())), TOKENS),
    "einsum by numbers": (used((4, 3), lambda p, x: torch.einsum(x, [0, 1], p, [1, 2], [0, 2])), (4,)),
    "embedding": (lambda: nn.Embedding(7, 4), IDS),
    "embedding, padding": (lambda: nn.Embedding(7, 4, padding_idx=3), IDS),
    "bag, sum": (lambda: nn.EmbeddingBag(7, 4, mode="sum"), IDS),
    "bag, mean": (lambda: nn.EmbeddingBag(7, 4, mode="mean", padding_idx=1), IDS),
    "layer norm": (lambda: nn.LayerNorm(4), TOKENS),
    "layer norm, no bias": (lambda: nn.LayerNorm((3, 4), bias=False), TOKENS),
    "layer norm, not affine": (lambda: nn.LayerNorm(4, elementwise_affine=False), TOKENS),
    "group norm": (lambda: nn.GroupNorm(2, 4), IMAGE),
    "group norm, not affine": (lambda: nn.GroupNorm(2, 4, affine=False), IMAGE),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), IMAGE),
    "instance norm, not affine": (lambda: nn.InstanceNorm2d(4), IMAGE),
    "instance norm, statistics": (
        lambda: moved(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)), IMAGE
    ),
    "instance norm of signals": (lambda: nn.InstanceNorm1d(4, affine=True), (4, 5)),
    "batch norm": (lambda: moved(nn.BatchNorm2d(4)), IMAGE),
    "batch norm, not affine": (lambda: moved(nn.BatchNorm2d(4, affine=False)), IMAGE),
    "batch norm of vectors": (lambda: moved(nn.BatchNorm1d(4)), (4,)),
    "prelu": (lambda: nn.PReLU(4, 0.3), IMAGE),
    "prelu, one slope": (lambda: nn.PReLU(1, 0.3), IMAGE),
    "class token": (used((1, 1, 4), lambda p, x: torch.cat([p.expand(len(x), -1, -1), x], 1)), TOKENS),
    "stacked": (used((4,), lambda p, x: torch.stack([p.expand_as(x), x], 1)), (4,)),
}  # fmt: skip
if OLD:
    del CASES["instance norm, statistics"]  # its own op writes into what it saved
else:
    CASES["rms norm"] = (lambda: nn.RMSNorm(4), TOKENS)
    CASES["rms norm, not affine"] = (lambda: nn.RMSNorm(4, elementwise_affine=False), TOKENS)


class Model(nn.Module):
    """The layer between two others, which have parameters as well."""

    def __init__(self, layer: nn.Module, sample: Tensor) -> None:
        super().__init__()
        size = sample.shape[-1]
        self.first = nn.Linear(size, size) if sample.is_floating_point() else nn.Identity()
        self.layer = layer
        self.last = nn.LazyLinear(3)
        self(sample)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(self.first(x)).tanh().flatten(1)).sin()


def losses(out: Tensor, several: bool) -> Tensor:
    """``[B]`` or ``[B, 2]``."""
    return torch.stack([out.sum(1), out.square().mean(1)], 1) if several else out.square().sum(1)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("name", CASES)
def test_layer(name: str, several: bool) -> None:
    build, shape = CASES[name]
    x = torch.randint(0, 7, (3, *shape)) if shape == IDS else torch.randn(3, *shape).double()
    model = Model(build(), x if shape == IDS else x.float()).double()
    want = dense_gramian(losses(model(x), several), model.parameters())
    for batch_dim in (0, None):
        engine = Engine(model, batch_dim=batch_dim, strategies=["ops"])
        for _ in range(2):  # measured and checked first, then from what is known
            assert_close(engine.compute_gramian(losses(model(x), several)), want)
        engine.close()

    def per_sample(params: dict[str, Tensor], sample: Tensor) -> Tensor:
        return losses(functional_call(model, params, (sample[None],)), several)[0]

    params = {name: p.detach() for name, p in model.named_parameters()}
    assert_close(gramjd.gramian(per_sample)(params, x), want)
