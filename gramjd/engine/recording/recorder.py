"""Recording the forward that the user runs: which ops received a parameter.

Forward hooks switch a :class:`~gramjd.uses.tracker.Tracker` on for the outermost call of a registered module.
Engines that see the same forward share one tracker. It lives in this thread, during a forward only.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from types import FrameType, MethodWrapperType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gramjd.engine.recording.aliases import Aliases, may_write, replaced, written
from gramjd.engine.recording.recorded import (
    HOOK,
    computed_by,
    is_markable,
    lose,
    mark_fused,
    mark_op,
)
from gramjd.internals import (
    below_transforms,
    has_plain_layout,
    hides_ops,
    hooks_of,
    innermost_mode,
    innermost_transform,
    is_dynamo_tracing,
    is_elsewhere,
    is_view,
    memory_of,
    saved_tensors_hook,
    sees_item_writes,
    transform_level,
    unseen_by_modes,
)
from gramjd.rules import DECOMPOSITIONS, tensors_of
from gramjd.rules.registry import rules_of
from gramjd.uses.known_calls import KnownCalls
from gramjd.uses.tracker import QUESTIONS, Tracker, first_argument, is_inplace
from gramjd.uses.use import Derived, Record, describe, roots

# Of a module; ids of the parameters whose uses it hides, see `Recorder.hide`; does it hide all ops inside?
Call = tuple[nn.Module, set[int], bool]

_SEES_ITEM_WRITES = sees_item_writes()
_THREAD = threading.local()  # .recorder: the one switched on in this thread


class Recorder(Tracker):
    """Puts a node behind the output of every tracked op; remembers which parameters it has seen.

    What a checkpoint saves must be the same when it is computed again. So a call inside one has a recorder
    of its own, which knows nothing of what happened outside; ops there, but outside such calls, are let be.
    """

    def __init__(self, frame: FrameType, known_calls: KnownCalls, outer: Recorder | None = None) -> None:
        super().__init__(())
        self.known_calls = known_calls
        self.outer = outer  # that of the call around the checkpoint
        self.hook = saved_tensors_hook()  # of the innermost checkpoint around
        self.frame: FrameType | None = frame  # of the module call that switched it on
        self.opaque: FrameType | None = None  # of a call whose inside is out of sight
        self.watchers: set[int] = set()  # ids of those whose parameters it tracks
        self.seen: set[int] = set()
        self.level = transform_level()  # not 0 where a checkpoint is computed again under vmap
        self.aliases, self.writing = Aliases(), False
        self.hooks: list[str] = []  # on tensors that the forward computed; shared with its nodes
        self.calls: list[Call] = []  # in progress
        self.assembled: dict[int, Tensor] = {}  # that tracked tensors were written into, by id

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_dynamo_tracing():  # a compiled function inside a module: its graph is to be as without us
            return func(*args, **kwargs)
        if (type(func) is MethodWrapperType or func in QUESTIONS) and not self.aliases.stale:
            out = func(*args, **kwargs)  # here, as a call more takes as long
            if not isinstance(out, Tensor):
                return out
        innermost = innermost_transform()  # every op comes by here: no call that can be spared
        if (innermost is not None or self.level) and is_elsewhere(self.level):
            return self._stand_aside(func, args, kwargs)  # a node would be differentiated, or escape
        if self.aliases.stale or ((kwargs or may_write(func)) and self.aliases.groups):
            args, kwargs, target, group = self._through_aliases(func, args, kwargs)
            if target is not None:
                return self._write(func, types, args, kwargs, target, group)
        if func in _PREPARED:
            func, args, kwargs = _PREPARED[func](self, func, args, kwargs)
        out = super().__torch_function__(func, types, args, kwargs)
        if self.outer is not None and self.active:
            self._know_inside(args, kwargs, out)
        return out

    def _know_inside(self, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """Note what is batch-independent inside a checkpoint because of what is so around it."""
        if self._are_batch_independent((args, kwargs)):
            self.known_around.update((id(t), t) for t in tensors_of(out))

    def _through_aliases(self, func: Any, args: Any, kwargs: dict[str, Any]
                         ) -> tuple[Any, dict[str, Any], Tensor | None, list[Any]]:  # fmt: skip
        """The arguments as they are now, what the op writes into, and the tensors with nodes of that memory.

        Where there are none of these, it is no matter what the op writes into: ``None``.
        """
        if not self.active:
            return args, kwargs, None, []
        if self.aliases.stale:
            args, kwargs = replaced(args, self.aliases.stale), replaced(kwargs, self.aliases.stale)
        if self.writing:
            return args, kwargs, None, []
        target = written(func, args, kwargs)
        group = self.aliases.of(target) if target is not None and has_plain_layout(target) else []
        return args, kwargs, target if group else None, group

    def _as_product(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
        """A dropout of what is derived, as a product with its mask, which is derived like any other."""
        if not self.active or not args or _writes(args, kwargs):
            return func, args, kwargs
        tracked, batch_independent = self._classify(args)
        if not tracked or not batch_independent:
            return func, args, kwargs
        with torch.no_grad():
            mask = func(torch.ones_like(args[0]), *args[1:], **kwargs)
        self._remember(mask)
        return torch.mul, (args[0], mask), {}

    def _note_hook(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
        """A hook on a tensor that the forward computed may change gradients in some steps only."""
        if args[0].grad_fn is not None:
            self.hooks.append(HOOK)
        is_derived = isinstance(self.sources.get(id(args[0])), Derived)
        if is_derived and not _is_of_fully_shard(args[-1]):  # its gradient need not be that of its uses
            lose(args[0], "has a hook")
        return func, args, kwargs

    def _write(self, func: Any, types: Any, args: Any, kwargs: dict[str, Any], target: Tensor,
               group: list[tuple[Tensor, Tensor]]) -> Any:  # fmt: skip
        """Call an op that writes into memory that tensors with nodes share."""
        self.aliases.refuse_unseen_writes(target)
        batch_independent = self._classify([*args, *kwargs.values()])[1]
        for marked, _ in group:  # what is known of them is no longer so
            lose(marked, "was written into later")
            self.sources.pop(id(marked), None)
            if id(marked) in self.aliases.originals:
                self.aliases.stale[id(marked)] = self.aliases.originals[id(marked)]
            if not batch_independent:
                self.known.pop(id(marked), None)
        original = next((t for marked, t in group if marked is target), target)
        mine = tuple([original if arg is target else arg for arg in args])
        named = {name: original if arg is target else arg for name, arg in kwargs.items()}
        self.writing = True
        try:
            out = self.__torch_function__(func, types, mine, named)
        finally:
            self.writing = False
        self.aliases.renew(group)
        return target if out is original else out

    def _stand_aside(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Call an op inside a transform of the forward's own as it is; note the tracked tensors it takes."""
        out = func(*args, **kwargs)
        if self.active and tensors_of(out):
            self.hide(map(below_transforms, tensors_of((args, kwargs))))
        return out

    def hide(self, tensors: Iterable[Tensor]) -> None:
        """Note that those tracked were used by what no node can be put behind.

        Parameters whose uses are hidden are left to a replay of the call in progress. What was derived of
        them has a node that would pass for one of every use.
        """
        for tensor in tensors:
            source = self.sources.get(id(tensor))
            if source is None:
                continue
            if self.calls:
                self.calls[-1][1].update(roots(source))
            if isinstance(source, Derived):
                lose(tensor, "is used where no op shows")

    def leave(self, module: nn.Module) -> Call:
        """A call of a module ends; with what it hides."""
        if self.calls and self.calls[-1][0] is module:
            return self.calls.pop()
        hidden: set[int] = set()
        while any(call[0] is module for call in self.calls):  # hooks of others may have raised in between
            found = self.calls.pop()
            hidden |= found[1]
            if found[0] is module:
                break
        return module, hidden, hides_ops(module)

    def _are_batch_independent(self, arguments: Any) -> bool:
        """Whether all these tensors are known, here or around the checkpoint, to be batch-independent.

        Nothing of what a checkpoint saves may follow from the answer.
        """
        leaves_alone = isinstance(arguments, list)  # no containers among them
        if self.outer is None and not self.known_around and leaves_alone:
            for leaf in arguments:  # noqa: SIM110 - a generator takes a call for each
                if isinstance(leaf, Tensor) and id(leaf) not in self.known:
                    return False
            return True
        return all(map(self._is_batch_independent, tensors_of(arguments)))

    def _is_batch_independent(self, tensor: Tensor) -> bool:
        known = id(tensor) in self.known or id(tensor) in self.known_around
        return known or (self.outer is not None and self.outer._is_batch_independent(tensor))

    def record(self, op: Any, args: Any, kwargs: dict[str, Any], derived: bool) -> tuple[Any, Record | None]:
        if may_write(op) and self._cannot_mark(op, args, kwargs):
            return self._without_node(op, args, kwargs), None
        before = torch.default_generator.get_state()
        arguments = computed_by((*args, *kwargs.values()))
        for value in args:  # one is enough
            if isinstance(value, Tensor) and hooks_of(value) and value.grad_fn is not None:
                self.hooks.append(HOOK)
                break
        out = op(*args, **kwargs)
        live = out.requires_grad if type(out) is Tensor else _is_live(out)
        if not live or saved_tensors_hook() != self.hook:
            return out, None
        # after the call: if the op refuses its arguments, the error is the op's own
        return self._mark(op, args, kwargs, out, derived, before, arguments)

    def _mark(self, op: Any, args: Any, kwargs: dict[str, Any], out: Any, derived: bool, before: Tensor,
              arguments: tuple[Any, ...]) -> tuple[Any, Record | None]:  # fmt: skip
        """Put a node behind the output of an op, and describe the call.

        ``before`` is the state of the random generator, ``arguments`` are the nodes behind the arguments.
        """
        inplace = may_write(op) and is_inplace(op)
        if inplace and out is not first_argument(args, kwargs):
            return out, None
        record, leaves = self.known_calls.describe(op, args, kwargs, self.sources, derived)
        plain = type(out) is Tensor and out.layout is torch.strided and not out.is_nested  # most
        if not plain and not is_markable(out):
            self.hide(leaves[slot.index] for slot in record.slots)
            return out, None
        for slot in record.slots:
            self.seen.add(id(slot.source))
        if not derived and op in DECOMPOSITIONS and rules_of(op) is None:
            return mark_fused(record, leaves, out, before, arguments), record
        # an op that has a rule draws no random numbers
        lost = _drew(before, record) if None in record.entries else ""
        marked = mark_op(record, leaves, out, arguments, inplace,
                         derived or self._are_batch_independent(leaves), lost, self.hooks)  # fmt: skip
        if not inplace:
            self._note_aliases(record, leaves, out, marked, None if lost else (op, args, kwargs))
        return marked, record

    def _without_node(self, op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Call an op that writes where no node can be; what it wrote says that this use is not known."""
        target = first_argument(args, kwargs)
        spread = self._spread(*args) if op is Tensor.__setitem__ else None
        if spread is not None:
            return op(*args[:2], spread)
        self.assembled[id(target)] = target
        others = [arg if arg is target else self._lost(arg, _WRITTEN) for arg in args]
        named = {name: arg if arg is target else self._lost(arg, _WRITTEN) for name, arg in kwargs.items()}
        return op(*others, **named)

    def _note_aliases(
        self,
        record: Record,
        leaves: Sequence[Any],
        out: Any,
        marked: Any,
        call: tuple[Any, Any, Any] | None,
    ) -> None:
        """Remember the outputs of an op that share memory with what they were made of, or are derived.

        ``call`` is ``None`` for an op that drew random numbers: it must not draw again, and what it returns
        views of is its own.
        """
        if type(out) is Tensor and not record.derived:
            if not is_view(out):  # most: new memory, or as given
                for leaf in leaves:
                    if leaf is out:
                        self.aliases.add(marked, self.aliases.originals.get(id(out), out))
                return
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and has_plain_layout(leaf)]
            if memory_of(out) not in map(memory_of, tensors):
                return  # a view of new memory, of which nobody has another: linear in three dimensions
        if call is not None and any(map(is_view, tensors_of(out))):
            out = self.aliases.call(*call, out)
        for original, mine in zip(tensors_of(out), tensors_of(marked), strict=True):
            if original is not mine and (is_view(original) or any(original is leaf for leaf in leaves)):
                self.aliases.add(mine, self.aliases.originals.get(id(original), original))
            elif record.derived:
                self.aliases.add(mine, mine)

    def _cannot_mark(self, op: Any, args: Any, kwargs: dict[str, Any]) -> bool:
        """Whether no node can mark an op: it writes into a view, or cannot be called again."""
        if not (op is Tensor.__setitem__ or is_inplace(op)) or saved_tensors_hook() != self.hook:
            return False
        if not torch.is_grad_enabled() or not isinstance(first_argument(args, kwargs), Tensor):
            return False
        if op is Tensor.__setitem__ or is_view(first_argument(args, kwargs)):
            return True
        return None in describe(op, args, kwargs, self.sources, False)[0].entries

    def _spread(self, target: Tensor, index: Any, value: Any) -> Tensor | None:
        """A tracked value in the shape of the items of an activation that it is written into, as a use of it.

        ``None`` where the target may be a weight that is put together.
        """
        if id(value) not in self.sources or not value.requires_grad or not has_plain_layout(value):
            return None
        if not target.requires_grad or id(target) in self.sources or id(target) in self.assembled:
            return None
        if not _SEES_ITEM_WRITES:  # others may have put the target together
            return None
        try:
            with torch.no_grad(), unseen_by_modes():
                shape = target.detach()[index].shape
                value.detach().expand(shape)
        except Exception:  # the op's own words say what is wrong with its arguments
            return None
        record, leaves = describe(Tensor.expand, (value, *shape), {}, self.sources, False)
        self.seen.update(id(slot.source) for slot in record.slots)
        out = Tensor.expand(value, *shape)
        return mark_op(record, leaves, out, computed_by([value]), False, False, "", self.hooks)

    def _lost(self, arg: Any, cause: str) -> Any:
        """An argument; if it is tracked, with a node that says that this use of it is not known."""
        if id(arg) not in self.sources or not arg.requires_grad or not has_plain_layout(arg):
            return arg
        record, leaves = describe(torch.clone, (arg,), {}, self.sources, True)
        return mark_op(record, leaves, arg, computed_by([arg]), False, True, cause)

    def watch(self, watcher: int, known_calls: KnownCalls, parameters: Sequence[Tensor]) -> None:
        """Record for one more watcher; alone, it may share records with its earlier forwards."""
        self.watchers.add(watcher)
        self.known_calls = known_calls.of(parameters, alone=len(self.watchers) == 1)

    def takes_part(self, frame: FrameType) -> bool:
        """Whether the call of a module, in this frame or the one around it, is one that is recorded."""
        if self.opaque not in (None, frame, frame.f_back):
            return False
        inside = innermost_transform() is not None or self.level
        return self.hook == saved_tensors_hook() and not (inside and is_elsewhere(self.level))

    def end(self, hidden: set[int], outermost: bool) -> None:
        """A call has ended, and hides uses of some parameters from the call around it."""
        if hidden and self.calls:
            self.calls[-1][1].update(hidden)
        if outermost:
            self.switch_off()
            self.aliases.refuse_unseen_writes()
        elif self.opaque is not None:
            self.resume()

    def pause(self, frame: FrameType) -> None:
        """Let the ops of an opaque call alone: what compiles it would trace the recording, too."""
        self.opaque, self.active = frame, innermost_mode() is not self
        if not self.active:
            self.__exit__(None, None, None)

    def resume(self) -> None:
        """The opaque call is over."""
        self.opaque = None
        if not self.active:
            self.active = True
            self.__enter__()

    def switch_off(self) -> None:
        """Switch this recorder off."""
        self.calls.clear()
        _THREAD.recorder = self.outer
        if self.outer is not None:
            self.outer.active = True
        self.frame, self.active = None, False  # an interrupted one may stay behind, below another mode
        if innermost_mode() is self:
            self.__exit__(None, None, None)


# What is done before an op runs: what runs then, with which arguments.
_PREPARED: dict[Any, Callable[..., tuple[Any, Any, dict[str, Any]]]] = {
    Tensor.register_hook: Recorder._note_hook,
    **dict.fromkeys([F.dropout, F.dropout1d, F.dropout2d, F.dropout3d], Recorder._as_product),
}


def start_recorder(recorder: Recorder) -> Recorder:
    """Make it the recorder of this thread; the one around it waits."""
    if recorder.outer is not None:
        recorder.outer.active = False
    _THREAD.recorder = recorder
    return recorder


def active_recorder() -> Recorder | None:
    """The recorder that is switched on, unless an interrupt (Ctrl-C) skipped its switching off."""
    recorder: Recorder | None = getattr(_THREAD, "recorder", None)
    while recorder is not None:
        # never the frame of this function itself: holding that would keep the callers' locals alive
        caller: FrameType | None = sys._getframe(1)
        while caller is not None and caller is not recorder.frame:
            caller = caller.f_back
        if caller is not None:
            return recorder
        recorder.switch_off()
        recorder = getattr(_THREAD, "recorder", None)
    return None


def _writes(args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a dropout works in place."""
    return args[3] if len(args) > 3 else kwargs.get("inplace", False)


_WRITTEN = "it was written into a part of another tensor"


def _is_of_fully_shard(hook: Any) -> bool:
    """Whether a hook is one by which ``fully_shard`` gathers parameters; these return no other gradients."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp.")


def _drew(before: Tensor, record: Record) -> str:
    """The reason not to record an op, if it drew random numbers since the generator had this state."""
    drew = not torch.equal(before, torch.default_generator.get_state())
    return f"{record.origin} drew random numbers when it used it" if drew else ""


def _is_live(out: Any) -> bool:
    """Whether something of an op's output requires gradients."""
    return out.requires_grad if isinstance(out, Tensor) else any(t.requires_grad for t in tensors_of(out))
