"""The base class of the weighting objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Weighting(nn.Module):
    """A weighting as an object: call it with a Gramian, get one weight per objective.

    A module, as TorchJD's weightings are, so hooks, ``state_dict`` and ``to`` work on it.
    """

    def __lshift__(self, function: Callable[[Any], Tensor]) -> Weighting:
        """``(weighting << f)(x)`` is ``weighting(f(x))``; TorchJD's aggregators need it."""
        return _Composition(self, function)


class StatefulWeighting(Weighting):
    """A weighting that remembers earlier calls; its ``state_dict`` holds what, for another to go on."""

    _remembered: tuple[str, ...] = ()  # attributes; those that are tensors later may be None at first

    def get_extra_state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._remembered}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        for name in self._remembered:
            setattr(self, name, state[name])

    def reset(self) -> None:
        """Forget them."""
        raise NotImplementedError


class _Composition(Weighting):
    def __init__(self, weighting: Weighting, function: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.weighting, self.function = weighting, function

    def forward(self, statistic: Any, /) -> Tensor:
        return self.weighting(self.function(statistic))
