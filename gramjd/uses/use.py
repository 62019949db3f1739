"""Uses: calls of ops that received a tracked parameter, and the blocks that follow from them.

Both captures (:mod:`gramjd.functional.capture` under ``vmap``, :mod:`gramjd.engine` in the user's own
forward) watch ops through a :class:`gramjd.uses.tracker.Tracker` and end in a list of :class:`Use`; from
there on they are one.

A tensor is *derived* when it was computed from tracked parameters and batch-independent tensors alone (a
transposed or normalised weight, position embeddings looked up once). It is tracked like a parameter;
the use is recorded where it meets the batch, and its rows are pulled back through the ops that
produced it, one after the other, as objectives that share their inputs (``B = 1``).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import NoneType
from typing import Any

import torch
from torch import Tensor

from gramjd import pytree
from gramjd.blocks import Block, Dense, fits, with_origin
from gramjd.rules import SEPARABLE, Call, dense_rows
from gramjd.rules.registry import Entry, op_name


@dataclass(frozen=True)
class Slot:
    """One tracked tensor among the arguments of a call."""

    index: int  # its place among the leaves of the arguments
    name: str | int | None  # of the argument; None inside a container
    source: Source  # the parameter, or where the tensor was derived


@dataclass(frozen=True)
class Derived:
    """A tensor computed from tracked and batch-independent tensors alone: one output of one call."""

    record: Record
    output: int


Source = Tensor | Derived
_SETTINGS = (bool, int, str, NoneType)


@dataclass(frozen=True, eq=False)
class Record:
    """The record of a tracked call while the forward runs; ``call`` holds no tensors."""

    call: Call
    leaves: tuple[Any, ...]  # of the arguments, in place of tensors their position in ``saved``
    spec: pytree.PyTreeSpec | None  # of the arguments, where some are nested
    slots: tuple[Slot, ...]
    entries: tuple[Entry | None, ...]  # the rule of each slot
    derived: bool
    saved: tuple[int, ...]  # the leaves, besides the slots, whose values the rules read
    blank: tuple[Any, ...]  # the leaves with None in place of tensors
    plain: bool  # is it a use of parameters themselves, not of tensors derived from them?
    origin: str  # the op as people write it

    @cached_property
    def key(self) -> Hashable | None:
        """A key that is equal for uses by the same op with the same settings, whatever the parameters are.

        ``None`` where the ops of its blocks may depend on more: on a user's code, or on what has no hash.
        """
        call, slots = self.call, [(slot.index, slot.name) for slot in self.slots]
        settings = [(type(leaf), leaf) for leaf in self.leaves]
        key = (call.op, call.names, call.positional, self.spec, self.entries, self.saved, self.derived,
               tuple(slots), tuple(settings))  # fmt: skip
        for entry in self.entries:
            if entry is None or not entry.is_ours:
                return None
        try:
            hash(key)
        except TypeError:
            return None
        return key

    @cached_property
    def signature(self) -> Hashable:
        """A key that is equal for the same op with the same settings and sources in the same places."""
        slots = [(slot.index, id(s) if isinstance(s := slot.source, Tensor) else s.output)
                 for slot in self.slots]  # fmt: skip
        # without numbers that only scale: steps may change them
        settings = [leaf if isinstance(leaf, _SETTINGS) else type(leaf) for leaf in self.leaves]
        return self.call.op, tuple(slots), self.entries, self.saved, () if self.derived else tuple(settings)

    @cached_property
    def is_opaque(self) -> bool:
        """Whether it depends on the data if a sample's gradient follows from that sample's values alone."""
        return None in self.entries and not self.derived and self.call.op not in SEPARABLE

    @cached_property
    def needed(self) -> tuple[int, ...]:
        """The leaves whose values a node saves: those that rules read, and the slots."""
        return (*self.saved, *[slot.index for slot in self.slots])

    @cached_property
    def kind(self) -> Hashable:
        """Equal for uses by the same op with arguments of the same kinds; see :func:`kind`."""
        slots = [(slot.index, entry is None) for slot, entry in zip(self.slots, self.entries, strict=True)]
        return op_name(self.call.op), self.derived, tuple(slots), tuple(map(kind, self.leaves))

    def arguments(self, leaves: Sequence[Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        """The positional and the named arguments that have these leaves."""
        values = leaves if self.spec is None else pytree.unflatten(self.spec, list(leaves))
        call, n = self.call, self.call.positional
        if len(values) == n:
            return values, {}
        return values[:n], dict(zip(map(str, call.names[n:]), values[n:], strict=True))


def kind(leaf: Any) -> Hashable:
    """The properties of arguments that decide on rules: dtypes, dimensions, sizes of one, flags, integers."""
    if isinstance(leaf, Tensor):
        return leaf.dtype, *[min(size, 2) for size in leaf.shape]
    if isinstance(leaf, slice):
        return leaf.start, leaf.stop, leaf.step
    if leaf is None or isinstance(leaf, (bool, int, str, torch.dtype)):
        return leaf
    return type(leaf).__name__


@dataclass(frozen=True)
class Use:
    """A tracked call with everything that its blocks follow from, in canonical layout."""

    record: Record
    leaves: Sequence[Any]  # of the arguments, [B, ...] for tensors that are needed, None for others
    cs: Sequence[Tensor | None]  # cotangents of its outputs, [K, B, ...]
    tracked: Sequence[Tensor]  # the tensors of its slots

    @staticmethod
    def of(record: Record, saved: Sequence[Any], cs: Sequence[Tensor | None], tracked: Sequence[Tensor],
           split: Mapping[int, Tensor] | None = None) -> Use:  # fmt: skip
        """A use from the canonical values of the leaves that its record names in ``saved``.

        ``split`` are those of slots, by leaf, that have samples: derived tensors of the batch's size.
        """
        leaves = list(record.blank)
        for i, value in zip(record.saved, saved, strict=True):
            leaves[i] = value
        for i, value in (split or {}).items():
            leaves[i] = value
        return Use(record, leaves, cs, tracked)

    def block(self, which: int) -> Block:
        """The block of slot number ``which``."""
        record = self.record
        slot, entry = record.slots[which], record.entries[which]
        own = self.leaves[slot.index]  # if it has samples, all are alike
        tensor = self.tracked[which] if own is None else own[0]
        c = self.cs[0]
        given = c if c is not None else next(other for other in self.cs if other is not None)
        leaves, samples = _as_computed(self.leaves, given.dtype, tensor.dtype), given.shape[1]
        if len(record.slots) > 1:
            for other, value in zip(record.slots, self.tracked, strict=True):
                needed = entry is None or other.name in entry.needs
                if needed and other is not slot and leaves[other.index] is None:
                    leaves[other.index] = value.expand(samples, *value.shape)
        leaves[slot.index] = tensor
        if entry is None or c is None or len(self.cs) > 1:
            cs = [c if c is None else _of_kind(c, tensor) for c in self.cs]
            block: Block = dense_rows(record.call, slot.index, leaves, cs)
            return with_origin(block, f"{record.origin} (no rule covers it)")
        c = _of_kind(c, tensor)
        values, named = record.arguments(leaves)
        block = entry.rule(c, *values, **named)
        if not fits(block, tensor.shape):
            raise ValueError(f"the rule of {slot.name} returned a block of another shape")
        if c.is_complex() and not tensor.is_complex():
            return Dense(block.dense().real, origin=record.origin)
        return with_origin(block, record.origin)


def _of_kind(c: Tensor, tensor: Tensor) -> Tensor:
    """Cotangents in a tensor's dtype; complex ones of a real tensor as they are."""
    return c if c.is_complex() != tensor.is_complex() else c.to(tensor.dtype)


def _as_computed(leaves: Sequence[Any], computed: torch.dtype, own: torch.dtype) -> list[Any]:
    """Arguments as autocast rounded them for the op, in the parameter's own dtype."""
    found = list(leaves)
    if computed.is_complex or own.is_complex:  # autocast lets these be
        return found
    for i, leaf in enumerate(found):
        # a gradient of what autocast rounded takes that as it is: in its dtype although computed is own
        if isinstance(leaf, Tensor) and (leaf.dtype != own or computed != own) and leaf.is_floating_point():
            found[i] = leaf.to(computed).to(own)
    return found


def describe(op: Any, args: Sequence[Any], kwargs: dict[str, Any], sources: dict[int, Any], derived: bool
             ) -> tuple[Record, list[Any]]:  # fmt: skip
    """The record of a call and the leaves of its arguments; ``sources`` by ``id`` of the tensor."""
    call = Call.of(op, args, kwargs)
    names: Sequence[str | int | None] = call.names
    leaves, spec = list(call.values), None
    if any(isinstance(value, (list, tuple, dict)) for value in leaves):
        leaves, spec = pytree.flatten(call.values)
        names = names_of_leaves(call)
    slots: list[Slot] = []
    others: list[int] = []
    static: list[Any] = list(leaves)
    blank: list[Any] = list(leaves)
    real, plain = True, not derived
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            real = real and not leaf.is_complex()
            static[i], blank[i] = pytree.PLACEHOLDER, None
            source = sources.get(id(leaf))
            if source is None:
                others.append(i)
            else:
                slots.append(Slot(i, names[i], source))
                plain = plain and isinstance(source, Tensor)
        elif isinstance(leaf, complex):
            real = False
    if not real:  # rules are those of real numbers
        entries: tuple[Entry | None, ...] = (None,) * len(slots)
    else:
        entries = tuple([call.entry(slot.name) if slot.name is not None else None for slot in slots])
    if others and None not in entries:
        needs = [entry.needs for entry in entries if entry]
        others = [i for i in others if any(names[i] in needed for needed in needs)]
    values = tuple(static) if spec is None else pytree.unflatten(spec, static)
    template = Call(call.op, call.names, values, call.positional)
    record = Record(template, tuple(static), spec, tuple(slots), entries, derived, tuple(others),
                    tuple(blank), plain, op_name(op))  # fmt: skip
    return record, leaves


def names_of_leaves(call: Call) -> list[str | int | None]:
    """The argument that each leaf is; ``None`` for those inside a container."""
    names: list[str | int | None] = []
    for name, value in zip(call.names, call.values, strict=True):
        nested = not isinstance(value, Tensor) and isinstance(value, (list, tuple, dict))
        names += [None] * len(pytree.leaves(value)) if nested else [name]
    return names


def roots(source: Source) -> set[int]:
    """Ids of the parameters that a tracked tensor was computed from."""
    if isinstance(source, Tensor):
        return {id(source)}
    return set().union(*(roots(slot.source) for slot in source.record.slots))
