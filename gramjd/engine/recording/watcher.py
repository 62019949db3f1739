"""The hooks of an engine: what happens before and after each call of a registered module."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from gramjd.engine.recording.recorded import is_markable, is_marked, mark_call
from gramjd.engine.recording.recorder import Recorder, active_recorder, start_recorder
from gramjd.engine.sharded import shards
from gramjd.internals import (
    held_by,
    hides_ops,
    in_backward,
    innermost_transform,
    is_dynamo_tracing,
    saved_tensors_hook,
)
from gramjd.rules import tensors_of
from gramjd.uses.known_calls import KnownCalls


class Watcher:
    """The hooks of one engine: what happens before and after each call of a registered module."""

    def __init__(
        self, held: Callable[..., tuple[list[Tensor], list[Tensor]]], strategies: Sequence[str]
    ) -> None:
        self.held = held  # trainable parameters and batch-independent tensors, at the time
        self.strategies = strategies
        self.outermost = threading.local()  # .frame, .rng_state: of a call that is marked as a whole
        self.known_calls = KnownCalls()
        self.skips = False  # are calls left unrecorded?
        self.has_read = False  # has an output needed their records?

    def learn(self, has_read: bool) -> None:
        """Learn whether an output needed the records of the calls that it came of.

        As long as none did (each had few losses), the next calls are not recorded. The first output that does
        is exact without them, but slow; from then on, all calls are recorded.
        """
        self.has_read = self.has_read or has_read
        self.skips = not self.has_read and "rows" in self.strategies

    def before(self, module: nn.Module, frame: FrameType) -> None:
        """Start recording, or remember the state that the call starts from."""
        if not torch.is_grad_enabled() or (innermost_transform() is not None and not in_backward()):
            return
        if not self.has_read and saved_tensors_hook() is not None:  # a checkpoint computes the same once more
            self.learn(has_read=True)
        recorder = active_recorder()
        if self.skips and recorder is None:  # inside a call that is recorded, all are
            return
        if "ops" not in self.strategies:
            self._before_unrecorded(frame)
            return
        kind: Any = type(module)
        outermost = recorder is None or (recorder.opaque is None and recorder.hook != saved_tensors_hook())
        if recorder is None or outermost:
            recorder = start_recorder(Recorder(frame, self.known_calls, recorder))
        if id(self) not in recorder.watchers:
            held = self.held()
            recorder.add(*held)
            recorder.watch(id(self), self.known_calls, held[0])
        elif shards(kind):  # its parameters have just been gathered
            recorder.add(*self.held(module))
        hides = hides_ops(module)
        recorder.calls.append((module, set(), hides))
        if recorder.opaque is not None:
            return
        if hides:
            recorder.pause(frame)
        elif outermost:  # last: it would see all that is asked of the parameters above
            recorder.__enter__()

    def _before_unrecorded(self, frame: FrameType) -> None:
        if "functional" not in self.strategies or saved_tensors_hook() is not None:
            return
        if getattr(self.outermost, "frame", None) is None:
            self.outermost.frame, self.outermost.rng_state = frame, torch.get_rng_state()

    def after(self, module: nn.Module, args: Any, kwargs: Any, out: Any, frame: FrameType) -> Any:
        """Mark calls whose inside was not seen; stop recording with the call that started it."""
        if "ops" not in self.strategies:
            return self._after_unrecorded(module, args, kwargs, out, frame)
        recorder = active_recorder()
        if recorder is None or not recorder.takes_part(frame):
            return None
        ours = recorder.frame in (frame, frame.f_back)  # the latter where the forward raised
        _, hidden, hides = recorder.leave(module)
        unseen = _unseen(recorder, module, out, ours, hides)
        markable = bool(unseen or hidden) and out is not None and is_markable(out)
        if hidden and markable:
            found = {name: p for name, p in module.named_parameters() if id(p) in hidden}
            unseen.update(found)
            hidden = hidden.difference(map(id, found.values()))
        if hidden or ours or recorder.opaque is not None:
            recorder.end(hidden, ours)
        if not unseen or not markable or is_marked(module, out):  # another engine's hook was first
            return None
        return mark_call(module, args, kwargs, out, unseen)

    def _after_unrecorded(self, module: nn.Module, args: Any, kwargs: Any, out: Any, frame: FrameType) -> Any:
        if getattr(self.outermost, "frame", None) not in (frame, frame.f_back) or out is None:
            return None
        self.outermost.frame = None
        if not is_markable(out):
            return None
        ids = {id(p) for p in self.held()[0]}
        named = {name: p for name, p in module.named_parameters() if id(p) in ids}
        return mark_call(module, args, kwargs, out, named, self.outermost.rng_state)


def _unseen(recorder: Recorder, module: nn.Module, out: Any, ours: bool, hides: bool) -> dict[str, Tensor]:
    """The parameters of a call, by name, that no op has shown; all its inner ones, if it ``hides`` its ops.

    One that is returned as it is may be seen later, but for the outermost call.
    """
    unseen, (parameters, _, children) = {}, held_by(module)
    for name, p in _own_parameters(module, hides) if hides or children else parameters.items():
        if p is not None and id(p) in recorder.sources and id(p) not in recorder.seen:
            unseen[name] = p
    if unseen and not ours and recorder.opaque is None:
        returned = set(map(id, tensors_of(out)))
        return {name: p for name, p in unseen.items() if id(p) not in returned}
    return unseen


def _own_parameters(module: nn.Module, hides: bool) -> Iterable[tuple[str, Tensor | None]]:
    """The parameters that no call inside a call of the module answers for, by name."""
    if hides:
        return module.named_parameters()
    parameters, _, children = held_by(module)
    own: list[tuple[str, Tensor | None]] = []
    for name, child in children.items():
        if isinstance(child, torch.jit.ScriptModule):  # takes no hooks
            own += [(f"{name}.{inner}", p) for inner, p in child.named_parameters()]
    return [*parameters.items(), *own] if own else parameters.items()


class BeforeHook:
    """A forward pre-hook. It does not keep its engine alive, and copies of it do nothing."""

    def __init__(self, watcher: weakref.ref[Watcher] | None = None) -> None:
        self.watcher = watcher

    def __reduce__(self) -> Any:
        return type(self), ()

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if is_dynamo_tracing():  # first: the rest cannot be traced
            return
        watcher = None if self.watcher is None else self.watcher()
        if watcher is not None:
            watcher.before(module, sys._getframe(1))


class AfterHook(BeforeHook):
    """A forward hook, like :class:`BeforeHook`; it gets no ``kwargs`` and output if the forward raised."""

    def __call__(self, module: nn.Module, args: Any, *rest: Any) -> Any:
        if is_dynamo_tracing():
            return None
        watcher = None if self.watcher is None else self.watcher()
        if watcher is None:
            return None
        kwargs = rest[0] if len(rest) == 2 else {}
        return watcher.after(module, args, kwargs, rest[-1], sys._getframe(1))
