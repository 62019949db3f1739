"""Sequences of steps on one engine: what moves values between samples changes, ops and shapes mostly do not.

A family is a function that builds a model and a function from a setting to the losses of a step; it lists the
settings, of which at least some give the same ops on the same shapes. :func:`judge` runs them on one engine.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from oracle import assert_close, dense_gramian
from torch import Tensor, nn

from gramjd import Engine, GramjdError, SlowPathWarning, prepared
from gramjd.engine.solving import projected

At = Callable[[Any], Tensor]
Build = Callable[[], tuple[nn.Module, At]]
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Family:
    """A model, the settings of its steps, and in which of them an error is right."""

    build: Build
    settings: tuple[Any, ...]
    batch_dims: tuple[int | None, ...]
    mixed: Callable[[Any], bool]  # with a batch dimension, may a step in this setting be refused?
    why: str  # it may


FAMILIES: dict[str, Family] = {}


def family(
    *settings: Any,
    batch_dims: Iterable[int | None] = (0,),
    mixed: Callable[[Any], bool] = lambda setting: False,
    why: str = "",
    name: str = "",
) -> Callable[[Build], Build]:
    """Put a function that builds a model and its steps into :data:`FAMILIES`, by its name."""
    assert len(settings) >= 4 or len(set(map(repr, settings))) >= 2
    assert any(map(mixed, settings)) == bool(why), "say why a step may be refused"

    def register(build: Build) -> Build:
        key = name or build.__name__.replace("_", " ")
        assert key not in FAMILIES, f"two families are named {key!r}"
        FAMILIES[key] = Family(build, settings, tuple(batch_dims), mixed, why)
        return build

    return register


def _around(settings: Sequence[Any]) -> list[Any]:
    return [*settings, *settings]


ORDERS: dict[str, Callable[[Sequence[Any]], list[Any]]] = {
    "in order": _around,
    "backwards": lambda settings: _around(settings[::-1]),
    "each twice": lambda settings: [each for s in settings for each in (s, s)] + [settings[0]],
}


@contextmanager
def projecting(is_on: bool) -> Iterator[None]:
    """A context in which, if it is on, proofs keep projections of small gradients and cotangents, too."""
    names = ("_SMALL_COTANGENT", "_FEATURES", "_SMALL_GRADIENT")
    before = {name: getattr(projected, name) for name in names}
    if is_on:
        vars(projected).update(dict(zip(names, (0, 2, 0), strict=True)))
    try:
        yield
    finally:
        vars(projected).update(before)


@contextmanager
def preparing(at_once: bool) -> Iterator[None]:
    """A context in which programs are prepared in the first call, if asked for, and have to be right."""
    before = prepared.OFTEN
    prepared.OFTEN = 0 if at_once else before
    try:
        yield
    finally:
        prepared.OFTEN = before
    assert "its first run gave other numbers" not in prepared._known.values()


def judge(this: Family, order: Callable[[Sequence[Any]], list[Any]], batch_dim: int | None) -> list[str]:
    """What became of each step: ``"exact"`` or the name of an error; anything else is a failure.

    Nothing is audited: what is trusted must be right by itself.
    """
    model, at = this.build()
    engine = Engine(model, batch_dim=batch_dim, audit=None)
    found = []
    for step, setting in enumerate(order(this.settings)):
        losses = at(setting)
        told = f"step {step}, setting {setting!r}, after {found}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SlowPathWarning)
                got = engine.compute_gramian(losses)
        except GramjdError as error:
            if batch_dim is None or not this.mixed(setting):
                raise AssertionError(f"{told}: refused: {type(error).__name__}: {error}") from error
            found.append(type(error).__name__)
            continue
        try:
            assert_close(got, dense_gramian(losses, model.parameters()), TOLERANCE)
        except AssertionError as error:
            raise AssertionError(f"{told}: {error}") from None
        found.append("exact")
    engine.close()
    return found
