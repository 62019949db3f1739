"""From where the results of advanced indexing come, beside torch's own indexing of coordinates."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from gramjd.engine.analysis.indexing import before, sources
from gramjd.internals import name_of


def drawn(rng: random.Random, shape: tuple[int, ...]) -> tuple[Any, ...]:
    """A random index for each dimension: whole, counting, any entries, or a mask of one or two."""
    found: list[Any] = []
    length, dim = rng.choice([n for n in shape if n > 1]), 0
    while dim < len(shape):
        size, kind = shape[dim], rng.choice(["whole", "whole", "any", "any", "counts", "mask"])
        if kind == "counts" and size == length:
            found.append(torch.arange(size).view(rng.choice([(size,), (size, 1)])))
        elif kind == "any":
            found.append(torch.randint(size, rng.choice([(length,), (1,), (length, 1), (length, 3)])))
        elif kind == "mask" and dim + 1 < len(shape) and size * shape[dim + 1] >= length:
            mask = torch.zeros(size * shape[dim + 1], dtype=torch.bool)
            mask[torch.randperm(len(mask))[:length]] = True
            found.append(mask.view(size, shape[dim + 1]))
            dim += 1
        else:
            found.append(slice(None))
        dim += 1
    return tuple(found)


def indexed(x: Tensor, index: tuple[Any, ...]) -> tuple[Tensor, Any] | None:
    """The result and its node; ``None`` where there is no such index, or it is none of this kind."""
    try:
        out = x[index]
    except IndexError:
        return None
    return (out, out.grad_fn) if name_of(out.grad_fn) == "IndexBackward0" else None


@pytest.mark.parametrize("seed", range(300))
def test_against_coordinates(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    shape = tuple(rng.choice([1, 2, 3, 4, 4, 4]) for _ in range(rng.randint(2, 4)))
    if max(shape) == 1:
        return
    x = torch.zeros(shape, requires_grad=True)
    found = indexed(x, index := drawn(rng, shape))
    if found is None:
        return
    out, node = found
    places = sources(node, out.ndim)
    coordinates = torch.stack(torch.meshgrid(*map(torch.arange, shape), indexing="ij"), -1)[index]
    for dim, place in enumerate(places):
        if place is not None:  # the entries along it are in order
            counted = torch.arange(out.shape[place]).view([-1 if d == place else 1 for d in range(out.ndim)])
            assert out.shape[place] == shape[dim]
            assert torch.equal(coordinates[..., dim], counted.expand(out.shape))
    mask = torch.rand(out.shape) < 0.3
    (taken,) = torch.autograd.grad(out, x, mask.float())
    assert not ((taken > 0) & ~before(mask, places)).any()


def test_most_samples_stay_in_place() -> None:
    """The idioms of training loops, for which the claims above are not empty."""
    logits, tokens = torch.zeros(4, 5, requires_grad=True), torch.zeros(4, 6, 3, requires_grad=True)
    rows, which = torch.arange(4), torch.randint(5, (4,))
    cases = [
        (logits[rows, which], (0, None)),
        (tokens[rows, which], (0, None, 1)),
        (tokens[rows[:, None], which[:, None]], (0, None, 2)),
        (tokens[:, which], (0, None, 2)),
        (tokens[rows, :, which % 3], (0, 1, None)),
        (tokens[which.flip(0) % 4], (None, 1, 2)),
        (tokens[rows, rows], (0, None, 1)),
        (tokens[torch.ones(4, 6, dtype=torch.bool)], (None, None, 1)),
    ]
    for out, places in cases:
        assert sources(out.grad_fn, out.ndim) == places


def test_indices_that_were_written_in_place() -> None:
    x, index = torch.zeros(3, 2, requires_grad=True), torch.arange(3)
    out = x[index]
    index[0] = 2
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sources(out.grad_fn, 2)
