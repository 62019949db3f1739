"""``record``: a forward pass that Gramians can be computed of afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from gramjd.engine import Engine


@contextmanager
def record(*modules: nn.Module) -> Iterator[None]:
    """A context in which forward passes are recorded, for :func:`gramjd.backward` and the like.

    The record is part of the graph, and is freed with it. Each backward pass proves its result anew. In a
    training loop, an ``Engine`` is faster, because it remembers what it has proven.

    Args:
        modules: the modules to record, each with its whole subtree. The context leaves them unchanged.

    Raises:
        TypeError: an argument is not a module.
        ValueError: there is no module.

    Examples:
        >>> with gramjd.record(model):
        ...     losses = criterion(model(input), target)  # [m]
        >>> weights = gramjd.backward(losses, UPGradWeighting(), model, batch_dim=0)
    """
    engine = Engine(*modules, batch_dim=None)
    try:
        yield
    finally:
        engine.close()
