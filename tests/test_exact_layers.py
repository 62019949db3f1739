"""Layers as people write them, at several steps of one engine: each Gramian is exact, without a slow path."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, dense_gramian
from torch import Tensor, nn

from gramjd import Engine


def judge(model: nn.Module, inputs: Callable[[int], Tensor], steps: Sequence[int]) -> None:
    """Compare Gramians, losses and gradients with those of a copy without an engine, for batches so large."""
    model.double()
    plain = copy.deepcopy(model)
    parameters = [
        (a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True) if a.requires_grad
    ]
    engine = Engine(model, batch_dim=0)
    for samples in steps:
        x = inputs(samples)
        losses, wanted = (each(x).square().flatten(1).sum(1) for each in (model, plain))
        assert_close(losses, wanted)
        assert_close(engine.compute_gramian(losses), dense_gramian(wanted, [b for _, b in parameters]))
        weights = torch.randn(samples).double()
        losses.backward(weights)
        wanted.backward(weights)
        for a, b in parameters:
            assert a.grad is not None and b.grad is not None
            assert_close(a.grad, b.grad)
            a.data.mul_(0.9)
            b.data.mul_(0.9)
            a.grad = b.grad = None


class Written(nn.Module):
    """Writes into the output of a layer."""

    def __init__(
        self, layer: nn.Module, shape: Sequence[int], write: Callable[[Tensor, Tensor], object]
    ) -> None:
        super().__init__()
        self.layer, self.write = layer, write
        self.last, self.places = nn.Linear(shape[-1], 3), nn.Parameter(torch.randn(1, *shape))

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        self.write(h, self.places)
        return self.last(h + self.places)


WRITES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "relu": lambda h, p: F.relu(h, inplace=True),
    "added places": lambda h, p: h.add_(p),
    "added cut": lambda h, p: h.add_(p[:, :, : h.shape[2]]),
    "clamp": lambda h, p: h.clamp_(-0.5, 0.5),
    "an item": lambda h, p: h.__setitem__((slice(None), 0), 1.0),
    "a view": lambda h, p: h.transpose(1, 2).mul_(2),
    "a part": lambda h, p: h[..., :2].tanh_(),
    "itself": lambda h, p: h.mul_(h.detach().sigmoid()),
    "dropout": lambda h, p: F.dropout(h, 0.5, training=False, inplace=True),
}


# Of linear in more than two dimensions, and of instance norm, torch returns a view of new memory.
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("layer", ["linear", "norm"])
def test_writes_into_the_output_of_a_layer(layer: str, write: str) -> None:
    made = nn.Linear(5, 6) if layer == "linear" else nn.InstanceNorm1d(4, affine=True)
    width = 5 if layer == "linear" else 6
    model = Written(made, (4, 6), WRITES[write])
    judge(model, lambda samples: torch.randn(samples, 4, width).double(), (3, 3, 4, 3, 3, 3, 4, 3))


def test_a_value_that_is_written_in_place_and_needed_is_refused_as_without_an_engine() -> None:
    model = Written(nn.Linear(5, 6), (4, 6), lambda h, p: (h.sigmoid_(), h.add_(1))).double()
    for _ in range(2):
        losses = model(torch.randn(3, 4, 5).double()).sum((1, 2))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            losses.sum().backward()
        Engine(model, batch_dim=0)


class Latents(nn.Module):
    """Trained tokens, as many for each sample, that pass through layers before they meet it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.tokens, self.layer = nn.Parameter(torch.randn(1, 2, 8)), layer
        self.keys, self.last = nn.Linear(3, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        queries, keys = self.last(self.layer(self.tokens.expand(len(x), -1, -1))), self.keys(x)
        return ((queries @ keys.mT).softmax(-1) @ keys).mean(1)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(8, 8),
    "layer norm": lambda: nn.LayerNorm(8),
    "group norm": lambda: nn.GroupNorm(1, 2),
    "convolution": lambda: nn.Conv1d(2, 2, 3, padding=1),
    "several": lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)),
}


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_tokens_of_all_samples_through_frozen_layers(name: str, last: bool) -> None:
    model = Latents(LAYERS[name]())
    for layer in (model.layer, *([model.last] if last else [])):
        layer.requires_grad_(False)
    judge(model, lambda samples: torch.randn(samples, 4, 3).double(), (5, 5, 8, 2, 5, 8, 5, 5, 8, 1))
