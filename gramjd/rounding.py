"""The tolerances of comparisons, and the precision of our own computations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


def tolerance(dtype: torch.dtype) -> float:
    """The tolerance for sums in two orders, relative to the norm of the result."""
    return min(10 * torch.finfo(dtype).eps ** (2 / 3), 0.02)


def own_precision(function: F) -> F:
    """Decorator: compute in the precision of the arguments, also where the caller is under autocast."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        cuda = torch.autocast("cuda", enabled=False) if torch.cuda.is_available() else nullcontext()
        with torch.autocast("cpu", enabled=False), cuda:
            return function(*args, **kwargs)

    return cast(F, wrapped)
