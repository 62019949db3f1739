"""Watching the ops of a pure per-sample function: which use a parameter, and which tensors are derived.

Inside, every parameter exists twice: *wrapped*, as a tensor that requires gradients at a level of
differentiation of our own, and bare, as levels outside of it see it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from types import MethodWrapperType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gramjd import pytree
from gramjd.functional.guard import COUNTED, Guard
from gramjd.functional.losses import cross_entropy
from gramjd.functional.strides import with_usual_strides
from gramjd.internals import (
    below_transform,
    innermost_level,
    unfused_attention,
    version_of,
    versions_of,
    vmaps_in_progress,
)
from gramjd.rules import DECOMPOSITIONS, tensors_of
from gramjd.uses.known_calls import KnownCalls
from gramjd.uses.tracker import QUESTIONS, Tracker, first_argument, is_inplace
from gramjd.uses.use import Record, describe

Function = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Sequence[Tensor], Sequence[Tensor]]]

# Their derivatives are wrong, or fail, under two levels of vmap: torch's own defects.
_ONE_LEVEL = {"cdist", "pdist", "prelu", "rrelu"}
_SPECIAL = (F.group_norm, F.scaled_dot_product_attention, F.cross_entropy)


@dataclass
class Trace:
    """The record of one run of the function, besides the values of single samples."""

    records: list[Record] = field(default_factory=list)
    tracked: list[list[Tensor]] = field(default_factory=list)  # tensors of the slots of each record
    constants: list[list[Tensor]] = field(default_factory=list)  # values saved by derived records
    outputs: list[int] = field(default_factory=list)  # how many each record has
    reached: list[bool] = field(default_factory=list)  # does the output depend on each edge, parameter?
    one_objective: bool = False  # the cotangents that were had have no dimension of objectives
    one_level: bool = False  # is there an op that tolerates one level of vmap alone?


@dataclass(frozen=True)
class Run:
    """The result of a run of the function for one sample."""

    trace: Trace
    cs: list[Tensor]  # [K, ...], or [...] of one objective, of the uses and parameters that were reached
    saved: list[Tensor]  # arguments of the uses that their rules need, one use after the other
    outputs: list[Tensor]
    aux: list[Tensor]


class PerSampleMode(Tracker):
    """Runs ops with rules on bare parameters and marks their outputs; all others go their way, wrapped."""

    def __init__(self, wrapped: Sequence[Tensor], raw: Sequence[Tensor], shared: bool,
                 batch_independent: Sequence[Tensor], known_calls: KnownCalls | None = None
                 ) -> None:  # fmt: skip
        super().__init__(wrapped, batch_independent)
        self.known_calls = known_calls
        self.below: dict[int, Tensor] = {}  # bare tensors, by the id of the wrapped one
        sources = raw if known_calls is None else known_calls.sources(len(raw))
        for parameter, tensor, source in zip(wrapped, raw, sources, strict=True):
            self.sources[id(parameter)] = source
            self.below[id(parameter)] = tensor
        self.derives = not shared  # without a batch every tensor is "the sample"
        self.level = innermost_level()
        self.guard: Guard | None = None
        self.trace = Trace()
        self.saved: list[Tensor] = []
        self.versions: list[int] = []  # of what the records save, as it was then
        self.kept: list[Tensor] = []  # what the records save, derived ones too

    def mark(self, out: Tensor) -> Tensor:
        """Make the output of a use something that cotangents can be had of."""
        raise NotImplementedError

    def bare_outputs(self, op: Any, args: Any, kwargs: dict[str, Any], outs: Sequence[Tensor]
                     ) -> list[Tensor] | None:  # fmt: skip
        """The bare outputs of an op for tracked and batch-independent arguments; ``None``: not tracked."""
        raise NotImplementedError

    @contextmanager
    def guarded(self, guard: Guard) -> Iterator[None]:
        """A context in which a guard is shown each op: a mode of its own would cost each op more calls."""
        before, self.guard = self.guard, guard
        try:
            yield
        finally:
            self.guard = before

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if type(func) is MethodWrapperType or func in QUESTIONS:  # here, as a call more takes as long
            out = func(*args, **(kwargs or {}))
            if not isinstance(out, Tensor):
                return out
        guard = self.guard
        if guard is not None and func in COUNTED:
            guard.before(func, args, kwargs or {})
        self.guard = None  # what an op is made of is none of the module's own
        try:
            if func in _SPECIAL or func in DECOMPOSITIONS or getattr(func, "__name__", "") in _ONE_LEVEL:
                out = self._run_special(func, types, args, kwargs)
            else:
                out = super().__torch_function__(func, types, args, kwargs)
        finally:
            self.guard = guard
        if guard is not None:
            guard.after(func, args, kwargs or {}, out)
        return out

    def _run_special(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """Run an op that cannot go its way as it is."""
        if getattr(func, "__name__", "") in _ONE_LEVEL:
            self._refuse_nesting(func.__name__)
        if func is F.group_norm:
            args, kwargs = with_usual_strides(args, kwargs or {}, self)
        if func is F.scaled_dot_product_attention and args and args[0].device.type == "cpu":
            with unfused_attention():  # the fused kernel has no batching rule there
                return super().__torch_function__(func, types, args, kwargs)
        if func is F.cross_entropy:
            func = cross_entropy
        decomposition = DECOMPOSITIONS.get(func)
        if decomposition is None:
            return super().__torch_function__(func, types, args, kwargs)
        with self:
            return decomposition(*args, **(kwargs or {}))

    def record(self, op: Any, args: Any, kwargs: dict[str, Any], derived: bool) -> tuple[Any, Record | None]:
        if innermost_level() != self.level:  # inside a transform of the function's own
            return op(*args, **kwargs), None
        if op is Tensor.register_hook:
            raise NotImplementedError(_HOOKED)
        if is_inplace(op) or op is Tensor.__setitem__ or kwargs.get("inplace"):
            if id(first_argument(args, kwargs)) in self.sources:
                raise NotImplementedError(_INPLACE.format(op=getattr(op, "__name__", op)))
            return op(*args, **kwargs), None
        known = describe if self.known_calls is None else self.known_calls.describe
        record, leaves = known(op, args, kwargs, self.sources, derived and self.derives)
        if record.derived:
            return self._derive(op, args, kwargs, record, leaves)
        out = None
        if None not in record.entries and torch.is_grad_enabled():
            out = self.call_bare(op, args, kwargs)
        if not isinstance(out, Tensor):
            return op(*args, **kwargs), None
        self.saved += [self.held(leaves[i]) for i in record.saved]
        self._keep(record, leaves, [], 1)
        return self.mark(out), record

    def _derive(self, op: Any, args: Any, kwargs: dict[str, Any], record: Record, leaves: Sequence[Any]
                ) -> tuple[Any, Record | None]:  # fmt: skip
        """Call an op on tracked and batch-independent tensors alone: what it returns is tracked in turn."""
        out = op(*args, **kwargs)
        outs = tensors_of(out)
        below = self.bare_outputs(op, args, kwargs, outs)
        if below is None:
            return out, None
        self.below.update((id(t), value) for t, value in zip(outs, below, strict=True))
        constants = below_transform([self.held(leaves[i]) for i in record.saved], self.level)
        self._keep(record, leaves, constants, len(outs))
        return out, record

    def held(self, leaf: Tensor) -> Tensor:
        """A tensor whose values a rule will read when the function has ended."""
        return leaf

    def check_versions(self) -> None:
        """Raise, as autograd would, if the function wrote into what the rules of its uses are to read."""
        written = [now != then for now, then in zip(versions_of(self.kept), self.versions, strict=True)]
        if True not in written:
            return
        reached, rest = iter(self.trace.reached), iter(written)
        for record in self.trace.records:
            mine = [*islice(rest, len(record.saved))]
            if (record.derived or next(reached)) and True in mine:
                raise RuntimeError(_WRITTEN.format(op=record.origin))

    def _keep(self, record: Record, leaves: Sequence[Any], constants: list[Tensor], outputs: int) -> None:
        self.trace.records.append(record)
        self.trace.tracked.append([self.below[id(leaves[slot.index])] for slot in record.slots])
        self.trace.constants.append(constants)
        self.trace.outputs.append(outputs)
        for i in record.saved:
            self.kept.append(leaves[i])
            self.versions.append(version_of(leaves[i]))

    def _refuse_nesting(self, op: str) -> None:
        """Raise if torch would differentiate the op wrongly here; note that one more level would be."""
        self.trace.one_level = True
        if vmaps_in_progress() > 1:
            raise NotImplementedError(
                f"torch's own derivative of {op} is wrong, or fails, under nested vmap. Call the "
                "transform in a loop instead of inside torch.vmap."
            )

    def call_bare(self, op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Call an op on tracked tensors as levels outside see them, without gradients here."""
        return op(*self._bare(args), **dict(zip(kwargs, self._bare(kwargs.values()), strict=True)))

    def _bare(self, values: Iterable[Any]) -> list[Any]:
        found = list(values)
        for i, value in enumerate(found):  # a map over a tree calls a function for each leaf
            if isinstance(value, Tensor):
                found[i] = self.below.get(id(value), value)
            elif isinstance(value, dict) or (
                isinstance(value, (list, tuple)) and [x for x in value if type(x) is not int]
            ):
                found[i] = pytree.map(lambda leaf: self.below.get(id(leaf), leaf), value)
        return found


_WRITTEN = (
    "A tensor that {op} received with a parameter, and that its gradient needs, was modified by an inplace "
    "operation afterwards. Use the out-of-place form, or write into a clone."
)
_HOOKED = (
    "The function puts a hook on a parameter, or on a tensor made of parameters alone, whose gradients "
    "transforms do not compute. Change the values in place of the gradients (weight * mask), or use "
    "gramjd.Engine."
)
_INPLACE = (
    "The function writes into a parameter, or into a tensor made of parameters alone, in place ({op}), "
    "which cannot be followed under a transform. Use the out-of-place form (w = w * s) instead."
)


def basis(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Cotangents that pick one entry of one output after the other, ``[K, *S]`` each."""
    sizes = [out.numel() for out in outputs]
    parts = []
    for n, out in enumerate(outputs):
        eye = torch.eye(sum(sizes), device=out.device).to(out.dtype)
        start = sum(sizes[:n])
        parts.append(eye[:, start : start + sizes[n]].reshape(-1, *out.shape))
    return parts
