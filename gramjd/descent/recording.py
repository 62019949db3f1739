"""``record``: a forward pass that Gramians can be computed of afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from gramjd.engine import Engine


@contextmanager
def record(*modules: nn.Module) -> Iterator[None]:
    """A context in which forward passes are recorded, for :func:`gramjd.backward` and the like.

    The record lives in the graph of what the forward returns, as long as that does. What an ``Engine`` does
    besides, to remember what it measured of a model, is done anew for every backward: in a training loop
    that counts milliseconds, keep one.

    Args:
        modules: whose calls are recorded, each with its whole subtree. They are as they were afterwards.

    Raises:
        TypeError: an argument is no module.
        ValueError: there is none.

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
