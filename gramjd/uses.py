"""Uses: calls of ops that received a tracked parameter, and the blocks that follow from them.

Both captures (:mod:`gramjd.capture` under ``vmap``, :mod:`gramjd.engine` in the user's own forward)
watch ops through a :class:`gramjd.tracker.Tracker` and end in a list of :class:`Use`; from there on
they are one.

A tensor is *derived* when it was computed from tracked parameters and un-batched tensors alone (a
transposed or normalised weight, position embeddings looked up once). It is tracked like a parameter;
the use is recorded where it meets the batch, and its rows are pulled back through the ops that
produced it, one after the other, as objectives that share their inputs (``B = 1``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gramjd import pytree
from gramjd.blocks import Block, fits, spread
from gramjd.rules import Call, dense_rows
from gramjd.rules.registry import Entry, op_name
from gramjd.rules.structure import At, pull_back


@dataclass(frozen=True)
class Slot:
    """One tracked tensor among the arguments of a call."""

    index: int  # its place among the leaves of the arguments
    name: str | int | None  # of the argument; None inside a container
    source: Source  # the parameter, or where the tensor was derived


@dataclass(frozen=True)
class Derived:
    """A tensor computed from tracked and un-batched tensors alone: one output of one call."""

    record: Record
    output: int


Source = Tensor | Derived


@dataclass(frozen=True, eq=False)
class Record:
    """What is known of a tracked call while the forward runs; ``call`` holds no tensors."""

    call: Call
    leaves: tuple[Any, ...]  # of the arguments, in place of tensors their position in ``saved``
    slots: tuple[Slot, ...]
    entries: tuple[Entry | None, ...]  # the rule of each slot
    derived: bool
    saved: tuple[int, ...]  # the leaves, besides the slots, whose values the rules read


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
        leaves = [None if leaf is pytree.PLACEHOLDER else leaf for leaf in record.leaves]
        for i, value in zip(record.saved, saved, strict=True):
            leaves[i] = value
        for i, value in (split or {}).items():
            leaves[i] = value
        return Use(record, leaves, cs, tracked)

    def block(self, which: int) -> Block:
        """The block of slot number ``which``."""
        slot, entry, tensor = (
            self.record.slots[which],
            self.record.entries[which],
            self.tracked[which],
        )
        leaves = [_as_computed(leaf, self.cs, tensor) for leaf in self.leaves]
        samples = next(c.shape[1] for c in self.cs if c is not None)
        for other, value in zip(self.record.slots, self.tracked, strict=True):
            if leaves[other.index] is None:
                leaves[other.index] = value.expand(samples, *value.shape)
        leaves[slot.index] = tensor
        call = self.record.call
        cs = [c if c is None else c.to(tensor.dtype) for c in self.cs]
        (c, *others) = cs
        origin = op_name(call.op)
        if entry is None or others or c is None:
            return replace(dense_rows(call, slot.index, leaves, cs), origin=f"{origin} (no rule covers it)")
        _, spec = pytree.flatten(call.values)
        values = pytree.unflatten(spec, leaves)
        n = call.positional
        named = dict(zip(map(str, call.names[n:]), values[n:], strict=True))
        block = entry.rule(c, *values[:n], **named)
        if not fits(block, tensor.shape):
            raise ValueError(f"the rule of {slot.name} returned a block of another shape")
        return replace(block, origin=origin)


def _as_computed(leaf: Any, cs: Sequence[Tensor | None], parameter: Tensor) -> Any:
    """An argument as autocast rounded it for the op, in the parameter's own dtype."""
    computed = next(c.dtype for c in cs if c is not None)
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or computed == parameter.dtype:
        return leaf
    return leaf.to(computed).to(parameter.dtype)


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
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            static[i] = pytree.PLACEHOLDER
            source = sources.get(id(leaf))
            if source is None:
                others.append(i)
            else:
                slots.append(Slot(i, names[i], source))
    entries = tuple([call.entry(slot.name) if slot.name is not None else None for slot in slots])
    if others and None not in entries:
        needs = [entry.needs for entry in entries if entry]
        others = [i for i in others if any(names[i] in needed for needed in needs)]
    values = tuple(static) if spec is None else pytree.unflatten(spec, static)
    template = Call(call.op, call.names, values, call.positional)
    return Record(template, tuple(static), tuple(slots), entries, derived, tuple(others)), leaves


def names_of_leaves(call: Call) -> list[str | int | None]:
    """The argument that each leaf is; ``None`` for those inside a container."""
    names: list[str | int | None] = []
    for name, value in zip(call.names, call.values, strict=True):
        nested = not isinstance(value, Tensor) and isinstance(value, (list, tuple, dict))
        names += [None] * len(pytree.leaves(value)) if nested else [name]
    return names


Found = dict[int, list[Block]]  # by id of the parameter
Pending = dict[Record, list[list[Block]]]  # for each output of a derived tensor's call


def blocks_of(
    uses: Sequence[Use],
    parameters: Sequence[Tensor],
    failed: Callable[[Source, Exception], None] | None = None,
) -> list[list[Block]]:
    """Blocks of every parameter from its uses, which come in the order of the forward.

    The call that derived a tensor is in the list without cotangents (``None``): its rows are what
    the uses of the tensor send it. Where it does have cotangents, they contain all that. Errors of
    rules go to ``failed`` with what the block would have been of, if that is given.
    """
    found: Found = {id(parameter): [] for parameter in parameters}
    pending: Pending = {use.record: [[] for _ in use.cs] for use in uses if _is_pending(use)}
    for use in reversed(uses):
        received = pending.pop(use.record, None)
        if received is not None and not (any(received) and _is_all(use, received)):
            if _is_unresolved(use):
                continue
            received = None
        if received is not None and not _is_unresolved(use):
            use = _without_samples(use)
        for which, slot in enumerate(use.record.slots):
            source = slot.source
            if id(source) in found or (isinstance(source, Derived) and source.record in pending):
                try:
                    blocks = [use.block(which)] if received is None else pulled(use, which, received)
                except Exception as error:
                    if failed is None:
                        raise
                    failed(source, error)
                    continue
                _deliver(source, blocks, found, pending)
    return [found[id(parameter)] for parameter in parameters]


def pulled(use: Use, which: int, received: Sequence[Sequence[Block]]) -> list[Block]:
    """Blocks of a slot of a derived tensor's call from those that its outputs received.

    Each is pulled back by its structure where that is possible; the others by their rows.
    """
    call, slot = use.record.call, use.record.slots[which]
    leaves = list(use.leaves)
    for other, value in zip(use.record.slots, use.tracked, strict=True):
        leaves[other.index] = value
    values = pytree.unflatten(pytree.flatten(call.values)[1], leaves)
    args, names = values[: call.positional], map(str, call.names[call.positional :])
    kwargs = dict(zip(names, values[call.positional :], strict=True))
    kept: list[Block] = []
    rest: list[list[Block]] = [[] for _ in received]
    for output, blocks in enumerate(received):
        for block in blocks:
            at = At(output, slot.index, use.tracked[which])
            found = pull_back(call.op, block, at, args, kwargs)
            if found is None:
                rest[output].append(block)
            else:
                kept.append(found)
    if any(rest):
        samples = next(block.rows[1] for blocks in rest for block in blocks)
        kept.append(spread(_as_objectives(use, rest).block(which), samples))
    return kept


def roots(source: Source) -> set[int]:
    """Ids of the parameters that a tracked tensor was computed from."""
    if isinstance(source, Tensor):
        return {id(source)}
    return set().union(*(roots(slot.source) for slot in source.record.slots))


def _is_unresolved(use: Use) -> bool:
    return all(c is None for c in use.cs)


def _is_pending(use: Use) -> bool:
    """Does a derived tensor wait for what its uses send it? Not if it has samples of its own."""
    return _is_unresolved(use) or (
        use.record.derived and next(c.shape[1] for c in use.cs if c is not None) == 1
    )


def _is_all(use: Use, received: Sequence[Sequence[Block]]) -> bool:
    """Do the blocks that a derived tensor received add up to its cotangents, where these are known?"""
    for c, blocks in zip(use.cs, received, strict=True):
        if c is None:
            continue
        weights = torch.linspace(1, 2, len(c), dtype=c.dtype, device=c.device)[:, None]
        got = torch.stack([block.vjp(weights) for block in blocks]).sum(0) if blocks else c.new_zeros(())
        want = torch.tensordot(weights, c, 2)
        if (got - want).norm() > 10 * torch.finfo(c.dtype).eps ** (2 / 3) * want.norm():
            return False
    return True


def _deliver(source: Source, blocks: Iterable[Block], found: Found, pending: Pending) -> None:
    """Add blocks to the parameter or to the derived tensor that they are of."""
    if isinstance(source, Derived):
        if source.record in pending:
            pending[source.record][source.output].extend(blocks)
    elif id(source) in found:
        found[id(source)].extend(blocks)


def _without_samples(use: Use) -> Use:
    """A use of one sample with its arguments as the call received them."""
    leaves = [leaf.squeeze(0) if isinstance(leaf, Tensor) else leaf for leaf in use.leaves]
    return replace(use, leaves=leaves)


def _as_objectives(use: Use, received: Sequence[Sequence[Block]]) -> Use:
    """The use of a derived tensor with the rows it received as ``K·B`` objectives of one sample."""
    cs: list[Tensor | None] = []
    for blocks in received:
        rows = [block.dense() for block in blocks]
        cs.append(torch.stack(rows).sum(0).flatten(0, 1).unsqueeze(1) if rows else None)
    leaves = [leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf for leaf in use.leaves]
    return Use(use.record, leaves, cs, use.tracked)
