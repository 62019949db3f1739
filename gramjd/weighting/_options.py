"""Options of weightings: what each may be. Checked when it is given, and when it is assigned."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

Check = Callable[[str, Any], None]  # of a name and a value; raises


def number(least: float = 0.0, most: float | None = None, *, open_end: bool = False) -> Check:
    """A finite real number from ``least`` to ``most``, without ``most`` itself if ``open_end``."""

    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be a real number; got {value!r}.")
        given, end = float(value), float("inf") if most is None else most
        if isfinite(given) and (least <= given < end or (given == end and not open_end)):
            return
        if most is None:
            raise ValueError(f"{name} cannot be negative, infinite or NaN; got {value}.")
        raise ValueError(f"{name} must be in [{least:g}, {most:g}{')' if open_end else ']'}; got {value}.")

    return check


def positive(name: str, value: Any) -> None:
    """A positive, finite real number."""
    number()(name, value)
    if value == 0:
        raise ValueError(f"{name} must be positive; got {value}.")


def count(least: int) -> Check:
    """An integer, at least ``least``."""

    def check(name: str, value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise TypeError(f"{name} must be an integer; got {value!r}.")
        if int(value) < least:
            raise ValueError(f"{name} must be at least {least}; got {value}.")

    return check


def one_of(*choices: str) -> Check:
    """A check that an option is one of some words."""

    def check(name: str, value: Any) -> None:
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}.")

    return check


def optional(kind: Check) -> Check:
    """``None``, or what another check allows."""

    def check(name: str, value: Any) -> None:
        if value is not None:
            kind(name, value)

    return check


def real_tensor(name: str, value: Any) -> None:
    """A tensor of real numbers; the call compares its shape with the objectives'."""
    if not isinstance(value, Tensor) or value.is_complex() or value.dtype == torch.bool:
        got = value.dtype if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"{name} must be a tensor of real numbers, of the objectives' shape; got {got}.")


def vector(name: str, value: Any) -> None:
    """A finite tensor of real numbers; the call compares its shape with the objectives'."""
    real_tensor(name, value)
    if not bool(value.isfinite().all()):
        raise ValueError(f"{name} has NaN or infinite entries.")


def source(name: str, value: Any) -> None:
    """A generator of random numbers, or none."""
    if value is not None and not isinstance(value, torch.Generator):
        raise TypeError(f"{name} must be a torch.Generator; got {value!r}.")


def function(name: str, value: Any) -> None:
    """A callable object."""
    if not callable(value):
        raise TypeError(f"{name} must be a weighting or a function of the Gramian; got {value!r}.")


def unused(default: Any) -> Check:
    """TorchJD's option of an approximation, of no use here: nothing but its default."""

    def check(name: str, value: Any) -> None:
        if isinstance(value, Tensor) or value != default:
            raise ValueError(
                f"{name} would have no effect, as the solution is exact; got {value!r}. Leave it out."
            )

    return check


not_negative, share = number(), number(0.0, 1.0)
