"""Layers as people write them, at several steps of one engine: each Gramian is exact, without a slow path."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from oracle import OLD, assert_close, dense_gramian
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


class Masked(nn.Module):
    """Writes a trained vector, or what is computed from one, into entries of an activation."""

    def __init__(self, write: Callable[[Tensor, Tensor, Tensor], object], derived: bool) -> None:
        super().__init__()
        self.write, self.derived = write, derived
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 6)
        self.token = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        self.write(h, 2 * self.token if self.derived else self.token, x[..., 0] > 0)
        return torch.tanh(self.last(h))


PLACES: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
    "mask": lambda h, t, mask: h.__setitem__(mask, t),
    "no entry": lambda h, t, mask: h.__setitem__(mask & ~mask, t),
    "all entries": lambda h, t, mask: h.__setitem__(mask | ~mask, t),
    "first position": lambda h, t, mask: h.__setitem__((slice(None), 0), t),
    "positions": lambda h, t, mask: h.__setitem__((slice(None), [0, 2]), t),
    "ids": lambda h, t, mask: h.__setitem__(torch.nonzero(mask, as_tuple=True), t),
    "a part": lambda h, t, mask: h.__setitem__((Ellipsis, slice(0, 2)), t[:2]),
    "one sample": lambda h, t, mask: h.__setitem__(-1, t),
    "a view": lambda h, t, mask: h.flatten(0, 1).__setitem__(mask.flatten(), t),
    "twice": lambda h, t, mask: (h.__setitem__(mask, t), h.__setitem__(~mask, t.tanh())),
}


@pytest.mark.skipif(OLD, reason="the modes of torch 2.1 do not see these writes: rows")
@pytest.mark.parametrize("derived", [False, True])
@pytest.mark.parametrize("name", PLACES)
def test_vectors_that_are_written_into_an_activation(name: str, derived: bool) -> None:
    model = Masked(PLACES[name], derived)
    judge(model, lambda samples: torch.randn(samples, 4, 3).double(), (3, 3, 4, 6, 3, 1, 4, 3, 3))


@pytest.mark.filterwarnings("ignore::gramjd.SlowPathWarning")
@pytest.mark.parametrize("samples", [2, 3, 4, 8])
def test_a_weight_that_is_put_together_by_writes(samples: int) -> None:
    class Lower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.diagonal, self.below = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            weight, at = x.new_zeros(4, 4), torch.tril_indices(4, 4, -1)
            weight[at[0], at[1]] = self.below
            weight[range(4), range(4)] = F.softplus(self.diagonal)
            return F.linear(x, weight)

    judge(Lower(), lambda samples: torch.randn(samples, 4).double(), [samples] * 5)
