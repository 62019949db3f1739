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


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called."""
    return compiled_call(module) is not None


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
        self.hooks: list[tuple[Callable[[], Any], Callable[[], Any]]] = []
        set_compiled_call(module, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module()
        if is_compiling() or module is None:
            return self.call(*args, **kwargs)
        if getattr(_REPLAY, "on", False):
            return plain_call(module, *args, **kwargs)
        hooks, out = [(before(), after()) for before, after in self.hooks], None
        for before, _ in hooks:
            if before is not None:
                before(module, sys._getframe())  # in no variable: the frame would keep itself alive
        try:
            out = self.call(*args, **kwargs)
        finally:
            for _, after in hooks:
                marked = None if after is None else after(module, args, kwargs, out, sys._getframe())
                out = out if marked is None else marked
        return out


class StandIns:
    """The compiled modules that one engine has met.

    Args:
        before: a reference to what is to be called before a call, with the module and the frame.
        after: to what is to be called afterwards, with the arguments and what they gave besides.
    """

    def __init__(self, before: Callable[[], Any], after: Callable[[], Any]) -> None:
        self.hooks = before, after
        self.modules: list[weakref.ref[nn.Module]] | None = []

    def note(self, module: nn.Module) -> None:
        """Have the hooks called around the compiled calls of a module."""
        call: Any = compiled_call(module)
        if self.modules is None or (isinstance(call, StandIn) and self.hooks in call.hooks):
            return
        call = call if isinstance(call, StandIn) else StandIn(module)
        call.hooks.append(self.hooks)
        self.modules.append(weakref.ref(module))

    def remove(self) -> None:
        """Give the modules their own calls back, unless another engine watches them."""
        modules, self.modules = self.modules or [], None
        for module in [ref() for ref in modules]:
            call: Any = None if module is None else compiled_call(module)
            if module is None or not isinstance(call, StandIn) or self.hooks not in call.hooks:
                continue
            call.hooks.remove(self.hooks)
            if not call.hooks:
                set_compiled_call(module, call.call)
