"""What the tests of the exactness contract share: one check, and modules from a function."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from oracle import assert_close, dense_gramian
from steps import preparing
from torch import Tensor, nn

from gramjd import Engine, SlowPathWarning


class Net(nn.Module):
    """A float64 module of children, parameters and buffers; ``function(module, *args)`` is its forward."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.function = function
        self.double()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def check(
    model: nn.Module,
    losses: Callable[[nn.Module], Tensor],
    batch_dims: Iterable[int | None] = (0, None),
    rows: Sequence[str] = (),
    times: int = 2,
    tolerance: float = 1e-10,
) -> None:
    """The Gramian of the very losses that the model gave is exact, measured first and then known, prepared.

    Only parameters of whose names a piece is in ``rows`` may go row by row.
    """
    with preparing(at_once=True):
        for batch_dim in batch_dims:
            engine = Engine(model, batch_dim=batch_dim, strategies=("ops", "functional", "rows"))
            for _ in range(times):
                out = losses(model)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", SlowPathWarning)  # told apart below, by parameter
                    jacobian = engine.jacobian(out)
                assert_close(jacobian.gramian(), dense_gramian(out, model.parameters()), tolerance)
                for name, blocks in zip(jacobian.names, jacobian.blocks, strict=True):
                    slow = any(block.origin.startswith("one row at a time") for block in blocks)
                    assert not slow or any(piece in name for piece in rows), f"{name}: {blocks[0].origin}"
            engine.close()


def objectives(out: Tensor) -> Tensor:
    """``[B, 2]`` from an output ``[B, ...]``."""
    flat = out.flatten(1)
    return torch.stack([flat.sin().sum(1), flat.square().mean(1)], 1)


def check_on(model: nn.Module, *args: Any, **options: Any) -> None:
    check(model, lambda m: objectives(m(*args)), **options)


def nodes(output: Tensor) -> set[str]:
    """The names of the types in an output's graph."""
    stack: list[Any] = [output.grad_fn]
    seen = set(stack)
    while stack:
        children = {child for child, _ in stack.pop().next_functions if child is not None} - seen
        seen |= children
        stack += children
    return {type(node).__name__ for node in seen}
