"""Every module of torch's own test database, with its sample inputs: no Gramian is wrong.

Each float input is scaled by a parameter first, so that modules without parameters count, too. Data change in
each step.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from op_database import assert_right, rows, weights
from torch import Tensor, nn
from torch.utils import _pytree

import gramjd
from gramjd import Engine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_modules import module_db

pytestmark = pytest.mark.filterwarnings("ignore")

INPUTS = 8  # of each module and mode
STEPS = 4


class Scaled(nn.Module):
    """A module behind inputs that are scaled by parameters."""

    def __init__(self, module: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.module = module
        floats = [t for t in _pytree.tree_leaves(inputs) if isinstance(t, Tensor) and t.is_floating_point()]
        self.scales = nn.ParameterList([nn.Parameter(1 + 0.1 * torch.rand_like(t)) for t in floats])

    def forward(self, inputs: Any) -> list[Tensor]:
        leaves, spec = _pytree.tree_flatten(inputs)
        scales = iter(self.scales)
        for n, t in enumerate(leaves):
            if isinstance(t, Tensor) and t.is_floating_point():
                leaves[n] = t * next(scales)
        args, kwargs = _pytree.tree_unflatten(leaves, spec)
        outs = [t for t in _pytree.tree_leaves(self.module(*args, **kwargs)) if isinstance(t, Tensor)]
        return [torch.view_as_real(t) if t.is_complex() else t for t in outs if t.requires_grad]


def models(info: Any) -> Iterator[tuple[Scaled, Any]]:
    """Modules in both modes, with what they are called with."""
    for training in (True, False):
        torch.manual_seed(0)
        found = info.module_inputs_func(
            info, device="cpu", dtype=torch.float64, requires_grad=False, training=training
        )
        for given in found[:INPUTS]:
            made, called = given.constructor_input, given.forward_input
            if called is None or not _floats(inputs := (called.args, called.kwargs)):
                continue
            module = info.module_cls(*made.args, **made.kwargs).double().train(training)
            yield Scaled(module, inputs).double(), inputs


def _floats(inputs: Any) -> list[Tensor]:
    return [t for t in _pytree.tree_leaves(inputs) if isinstance(t, Tensor) and t.dtype == torch.float64]


def moved(inputs: Any) -> Any:
    """Other data of the same signs."""
    leaves, spec = _pytree.tree_flatten(inputs)
    for n, t in enumerate(leaves):
        if isinstance(t, Tensor) and t.dtype == torch.float64:
            leaves[n] = t.detach() * (1 + 0.1 * torch.rand_like(t))
    return _pytree.tree_unflatten(leaves, spec)


def losses_of(outs: list[Tensor], batch_dim: int | None) -> Tensor | None:
    """Losses of samples, or two of the whole; ``None`` where there are none."""
    if not outs:
        return None
    if batch_dim is None:
        return torch.stack([(outs[0] * weights(outs[0])).sum(), outs[0].square().sum()])
    if 0 in {t.ndim for t in outs} or len({len(t) for t in outs}) > 1 or 0 in {len(t) for t in outs}:
        return None
    found = [(t * weights(t[0])).flatten(1).sum(1) if t.ndim > 1 else t for t in outs]
    return torch.stack(found).sum(0)


def mixes_samples(model: Scaled, inputs: Any) -> bool:
    """Whether the loss of the first sample depends on what others were given."""
    leaves, spec = _pytree.tree_flatten(inputs)
    floats = [n for n, t in enumerate(leaves) if isinstance(t, Tensor) and t.dtype == torch.float64]
    for n in floats:
        leaves[n] = leaves[n].detach().requires_grad_()
    losses = losses_of(model(_pytree.tree_unflatten(leaves, spec)), 0)
    assert losses is not None
    given = [leaves[n] for n in floats]
    found = torch.autograd.grad(losses[0], given, allow_unused=True)
    pairs = zip(given, found, strict=True)
    return any(g is not None and (t.shape[:1] != losses.shape or g[1:].any()) for t, g in pairs)


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("info", module_db, ids=lambda info: info.name)
def test_no_gramian_is_wrong(info: Any, batch_dim: int | None) -> None:
    for model, inputs in models(info):
        parameters = [p for p in model.parameters() if p.requires_grad]
        engine = Engine(model, batch_dim=batch_dim, strategies=["ops", "functional", "rows"])
        with engine:
            for step in range(STEPS):
                given = moved(inputs)
                try:
                    losses = losses_of(model(given), batch_dim)
                except RuntimeError:  # of a target that must not be scaled
                    break
                J = None if losses is None else rows(list(losses), parameters)
                if losses is None or J is None or not bool(losses.isfinite().all()):
                    break
                try:
                    got = engine.compute_gramian(losses)
                except gramjd.NotSeparableError:
                    assert batch_dim == 0 and mixes_samples(model, given)
                    break
                assert_right(got, J, f"step {step}")
