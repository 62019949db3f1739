"""What is never allocated, seen by a dispatch mode; tests do not look at time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gramjd import Engine, pytree


class Allocations(TorchDispatchMode):
    """Remembers the storage of the largest tensor that any op returned."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [x for x in pytree.leaves((args, kwargs)) if isinstance(x, Tensor)]
        known = {x.untyped_storage().data_ptr() for x in inputs}  # views allocate nothing
        for leaf in pytree.leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, leaf.untyped_storage().nbytes() // leaf.element_size())
        return out


def test_no_tensor_of_batch_times_weight() -> None:
    """A 1024-wide MLP of four hidden layers, batch 64: not even one weight's worth of entries more."""
    width, batch = 1024, 64
    layers: list[nn.Module] = [nn.Linear(width, width), nn.ReLU()] * 1
    for _ in range(3):
        layers += [nn.Linear(width, width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(width, 10))
    engine = Engine(model, batch_dim=0, ways=["ops"])
    for checked in (True, False):
        losses = model(torch.randn(batch, width)).logsumexp(1)
        with Allocations() as allocations:
            gramian = engine.compute_gramian(losses)
        assert gramian.shape == (batch, batch)
        # the check multiplies out one weighted gradient, as large as the weight itself
        assert allocations.largest <= (width * width if checked else 2 * batch * width)
