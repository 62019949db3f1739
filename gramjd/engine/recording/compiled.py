"""Modules compiled in place, by ``module.compile()``: their hooks are compiled with them, and see nothing.

What such a module calls is stood in for, as long as an engine watches it, so that the call is seen from
outside, like that of a module that ``torch.compile(module)`` made.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from gramjd.internals import compiled_call, is_compiling, plain_call, set_compiled_call

_REPLAY = threading.local()  # .on: are calls to run as they were before they were compiled?


@contextmanager
def uncompiled() -> Iterator[None]:
    """A context in which compiled modules that an engine watches run the code that was compiled."""
    before, _REPLAY.on = getattr(_REPLAY, "on", False), True
    try:
        yield
    finally:
        _REPLAY.on = before


class StandIn:
    """Replaces a module's compiled call, for all engines that watch the module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = weakref.ref(module)
        self.call: Any = compiled_call(module)
        self.watchers: list[Callable[[], Any]] = []
        set_compiled_call(module, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module()
        if is_compiling() or module is None:
            return self.call(*args, **kwargs)
        if getattr(_REPLAY, "on", False):
            return plain_call(module, *args, **kwargs)
        watchers, out = [*filter(None, [each() for each in self.watchers])], None
        for watcher in watchers:
            watcher.before(module, sys._getframe())  # in no variable: the frame would keep itself alive
        try:
            out = self.call(*args, **kwargs)
        finally:
            for watcher in watchers:
                marked = watcher.after(module, args, kwargs, out, sys._getframe())
                out = out if marked is None else marked
        return out


class StandIns:
    """The compiled modules that one engine has met.

    Args:
        watcher: a reference to the engine's watcher, whose ``before`` and ``after`` are called around a call.
    """

    def __init__(self, watcher: Callable[[], Any]) -> None:
        self.watcher = watcher
        self.modules: list[weakref.ref[nn.Module]] | None = []

    def note(self, module: nn.Module) -> None:
        """Have the watcher called around the compiled calls of a module."""
        call: Any = compiled_call(module)
        if self.modules is None or (isinstance(call, StandIn) and self.watcher in call.watchers):
            return
        call = call if isinstance(call, StandIn) else StandIn(module)
        call.watchers.append(self.watcher)
        self.modules.append(weakref.ref(module))

    def remove(self) -> None:
        """Give the modules their own calls back, unless another engine watches them."""
        modules, self.modules = self.modules or [], None
        for module in [module for ref in modules if (module := ref()) is not None]:
            call: Any = compiled_call(module)
            if not isinstance(call, StandIn) or self.watcher not in call.watchers:
                continue
            call.watchers.remove(self.watcher)
            if not call.watchers:
                set_compiled_call(module, call.call)
