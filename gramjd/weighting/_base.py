"""The base class of the weighting objects."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from gramjd.weighting._options import Check


class Weighting(nn.Module):
    """A weighting as an object: call it with a Gramian, get one weight per objective.

    A module, as TorchJD's weightings are, so hooks, ``state_dict`` and ``to`` work on it. Its options
    are attributes, checked when they are assigned as when they are given; an attribute that it does
    not have cannot be assigned, so that a misspelt option is an error.
    """

    _options: ClassVar[Mapping[str, Check]] = {}

    if TYPE_CHECKING:  # a module's own call has no type

        def __call__(self, gramian: Tensor, /) -> Tensor: ...

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._options:
            self._options[name](name, value)
        elif name not in vars(self) and not self._has_room_for(name):
            known = ", ".join(self._options) or "none"
            raise AttributeError(
                f"{type(self).__name__} has no option {name!r}; it has {known}. For attributes of your "
                "own, make a subclass."
            )
        super().__setattr__(name, value)

    def _has_room_for(self, name: str) -> bool:
        """Whether an attribute may be assigned: any in a subclass by a user, else those that exist."""
        return "_options" not in vars(type(self)) or name.startswith("_") or hasattr(self, name)

    def __lshift__(self, function: Callable[[Any], Tensor]) -> _Composition:
        """``(weighting << f)(x)`` is ``weighting(f(x))``; TorchJD's aggregators need it."""
        return _Composition(self, function)

    def extra_repr(self) -> str:
        """The options, as they are now; modules among them are printed below."""
        given = ((name, getattr(self, name)) for name in self._options)
        return ", ".join(f"{name}={value!r}" for name, value in given if not isinstance(value, nn.Module))


class StatefulWeighting(Weighting):
    """A weighting that remembers earlier calls; its ``state_dict`` holds what, for another to go on."""

    _remembered: tuple[str, ...] = ()  # attributes; those that are tensors later may be None at first

    if not TYPE_CHECKING:

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            _be_stateful_for_torchjd()
            return super().__call__(*args, **kwargs)

    def get_extra_state(self) -> dict[str, Any]:
        return {self._kind(): {name: getattr(self, name) for name in self._remembered}}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Load a saved state.

        Raises:
            ValueError: it is the state of another weighting, or none.
        """
        _be_stateful_for_torchjd()
        mine = state.get(self._kind()) if isinstance(state, dict) else None
        if not isinstance(mine, dict) or mine.keys() != set(self._remembered):
            kinds = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
            raise ValueError(
                f"{type(self).__name__} cannot go on from a state of {kinds or 'nothing'}: load the "
                f"state_dict of a {self._kind()}, or start again without one."
            )
        for name in self._remembered:
            setattr(self, name, mine[name])

    @classmethod
    def _kind(cls) -> str:
        """The class that defines the saved state; its subclasses accept the state, too."""
        return next(each.__name__ for each in cls.__mro__ if "_remembered" in vars(each))

    def reset(self) -> None:
        """Forget all earlier calls."""
        raise NotImplementedError


def _be_stateful_for_torchjd() -> None:
    """Let TorchJD, if it is in use, reset ours that it wraps: it asks for instances of a class of its."""
    kind = getattr(sys.modules.get("torchjd"), "Stateful", None)
    if kind is not None and not issubclass(StatefulWeighting, kind):
        kind.register(StatefulWeighting)


class _Composition(Weighting):
    def __init__(self, weighting: Weighting, function: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.weighting, self.function = weighting, function

    if TYPE_CHECKING:

        def __call__(self, statistic: Any, /) -> Tensor: ...

    def forward(self, statistic: Any, /) -> Tensor:
        return self.weighting(self.function(statistic))
