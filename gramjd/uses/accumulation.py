"""Turns uses into the blocks of each parameter, through the tensors computed from it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from gramjd import prepared, pytree
from gramjd.blocks import Block, Structure, flatten, spread, unflatten
from gramjd.internals import is_dynamo_tracing
from gramjd.rounding import tolerance
from gramjd.rules.structure import EXPANDS, LINEAR, At, pull_back, pull_back_all
from gramjd.uses.use import Derived, Source, Use, roots

Found = dict[int, list[Block]]  # by id of the parameter
Pending = dict[int, list[list[Block]]]  # by id of a derived tensor's record, for each of its outputs


def blocks_of(
    uses: Sequence[Use],
    parameters: Sequence[Tensor],
    failed: Callable[[Source, Exception], None] | None = None,
) -> list[list[Block]]:
    """Blocks of every parameter from its uses, which come in the order of the forward.

    The call that derived a tensor is in the list without cotangents (``None``): its rows are what
    the uses of the tensor send it. Where it does have cotangents, they contain all that; what its
    uses sent is taken if it adds up to them, since it is factored. Errors of rules go to ``failed``
    with what the block would have been of, if that is given.
    """
    derived = [use for use in uses if not use.record.plain]
    plain, rest = _apart(uses, derived) if derived else (uses, ())
    known = None if not plain or failed is not None or is_dynamo_tracing() else _prepared(plain, parameters)
    found: Found = {id(parameter): [] for parameter in parameters}
    if known is None:
        _of_parameters(plain, found, failed)
    elif not rest:
        return known
    else:
        found = dict(zip(found, known, strict=True))
    _through_derived(rest, found, failed)
    return [found[id(parameter)] for parameter in parameters]


def _apart(uses: Sequence[Use], derived: Sequence[Use]) -> tuple[Sequence[Use], Sequence[Use]]:
    """The uses of parameters of which nothing is derived, and all others."""
    sources: dict[int, set[int]] = {}  # ids of the parameters behind each record, by its id
    for use in uses:
        mine = sources[id(use.record)] = set()
        for slot in use.record.slots:
            if isinstance(slot.source, Derived):
                mine |= sources.get(id(slot.source.record)) or roots(slot.source)
            else:
                mine.add(id(slot.source))
    reached = set().union(*[sources[id(use.record)] for use in derived])
    before = 0
    while before < len(reached):  # a use may have slots of both kinds of parameters
        before = len(reached)
        for mine in sources.values():
            if not mine.isdisjoint(reached):
                reached |= mine
    plain = [use for use in uses if sources[id(use.record)].isdisjoint(reached)]
    return plain, [use for use in uses if not sources[id(use.record)].isdisjoint(reached)]


def _through_derived(
    uses: Sequence[Use], found: Found, failed: Callable[[Source, Exception], None] | None
) -> None:
    """Blocks of uses some of which are of derived tensors, into ``found``."""
    pending: Pending = {id(use.record): [[] for _ in use.cs] for use in uses if _is_pending(use)}
    repeated = {id(use.record) for use in uses if _is_repeated(use)}
    for use in reversed(uses):
        received = pending.pop(id(use.record), None)
        if received is not None and not (any(received) and _is_all(use, received)):
            if _is_unresolved(use):
                continue
            received = None
        for which, slot in enumerate(use.record.slots):
            if not _is_wanted(use, slot.source, found, pending, repeated):
                continue
            try:
                blocks = [use.block(which)] if received is None else _pulled(use, which, received)
            except Exception as error:
                if failed is None:
                    raise
                failed(slot.source, error)
                continue
            _deliver(slot.source, blocks, found, pending)


def _prepared(uses: Sequence[Use], parameters: Sequence[Tensor]) -> list[list[Block]] | None:
    """Blocks by prepared ops; ``None`` where those of a rule may depend on more than it is given."""
    places = {id(p): n for n, p in enumerate(parameters)}
    key: list[Hashable] = ["uses", len(parameters)]  # those without uses get a list, too
    tensors: list[Tensor | None] = []
    for use in uses:
        record = use.record
        if record.key is None:
            return None
        key += [record.key, len(use.cs), *[places.get(id(slot.source)) for slot in record.slots]]
        tensors += [*use.cs, *use.tracked, *[use.leaves[i] for i in record.saved]]

    def blocks(tensors: Sequence[Any]) -> tuple[list[Tensor], Structure]:
        rest = iter(tensors)
        same: list[Use] = []
        for use in uses:
            cs, tracked = [*islice(rest, len(use.cs))], [*islice(rest, len(use.tracked))]
            same.append(Use.of(use.record, [*islice(rest, len(use.record.saved))], cs, tracked))
        found: Found = {id(parameter): [] for parameter in parameters}
        _of_parameters(same, found, None)
        return flatten([found[id(parameter)] for parameter in parameters], origins=True)

    found, structure = prepared.call(blocks, tuple(key), tensors)
    return unflatten(structure, found)


def _of_parameters(
    uses: Sequence[Use], found: Found, failed: Callable[[Source, Exception], None] | None
) -> None:
    """Blocks of uses of parameters themselves, into ``found``."""
    for use in reversed(uses):
        for which, slot in enumerate(use.record.slots):
            mine = found.get(id(slot.source))
            if mine is None:
                continue
            try:
                mine.append(use.block(which))
            except Exception as error:
                if failed is None:
                    raise
                failed(slot.source, error)


def _is_unresolved(use: Use) -> bool:
    return all(c is None for c in use.cs)


def _samples(use: Use) -> int:
    return next(c.shape[1] for c in use.cs if c is not None)


def _is_pending(use: Use) -> bool:
    """Whether a derived tensor waits for blocks of its uses. Not if it has samples that differ."""
    return _is_unresolved(use) or (use.record.derived and (_samples(use) == 1 or _is_repeated(use)))


def _is_repeated(use: Use) -> bool:
    """Whether a tensor is repeated for every sample."""
    op = use.record.call.op
    return use.record.derived and op in EXPANDS and not _is_unresolved(use) and _samples(use) > 1


def _is_wanted(use: Use, source: Source, found: Found, pending: Pending, repeated: set[int]) -> bool:
    """Whether a parameter or a derived tensor takes the blocks of this use."""
    if not isinstance(source, Derived):
        return id(source) in found
    # rows of a repeated tensor are its cotangents: only what is factored is of interest
    key = id(source.record)
    return key in pending and (key not in repeated or use.record.call.op in LINEAR)


def _is_all(use: Use, received: Sequence[Sequence[Block]]) -> bool:
    """Whether the blocks of a derived tensor add up to its cotangents, where these are known."""
    for c, blocks in zip(use.cs, received, strict=True):
        if c is None:
            continue
        K, B = c.shape[:2]
        weights = torch.linspace(1, 2, K * B, dtype=c.dtype, device=c.device).view(K, B)
        got = torch.stack([block.vjp(weights) for block in blocks]).sum(0) if blocks else c.new_zeros(())
        want = torch.tensordot(weights, c, 2)
        if (got - want).norm() > tolerance(c.dtype) * want.norm():
            return False
    return True


def _pulled(use: Use, which: int, received: Sequence[Sequence[Block]]) -> list[Block]:
    """Blocks of a slot of a derived tensor's call from those that its outputs received.

    Each is pulled back by its structure where that is possible; the others by their rows.
    """
    bare = use if _is_unresolved(use) else _without_samples(use)
    whole = _pulled_together(bare, which, received)
    if whole is not None:
        return [whole]
    kept: list[Block] = []
    rest: list[list[Block]] = [[] for _ in received]
    for output, blocks in enumerate(received):
        for block in blocks:
            found = _pulled_by_structure(bare, which, output, block)
            if found is None:
                rest[output].append(block)
            else:
                kept.append(found)
    if not any(rest):
        return kept
    if _is_repeated(use):
        return [use.block(which)]
    samples = next(block.rows[1] for blocks in rest for block in blocks)
    return [*kept, spread(_as_objectives(bare, rest).block(which), samples)]


def _pulled_by_structure(use: Use, which: int, output: int, block: Block) -> Block | None:
    args, kwargs = _arguments(use)
    at = At(output, use.record.slots[which].index, use.tracked[which])
    return pull_back(use.record.call.op, block, at, args, kwargs)


def _pulled_together(use: Use, which: int, received: Sequence[Sequence[Block]]) -> Block | None:
    """One block from those of all outputs of a call that has several."""
    if len(received) == 1:
        return None
    args, kwargs = _arguments(use)
    at = At(0, use.record.slots[which].index, use.tracked[which])
    return pull_back_all(use.record.call.op, received, at, args, kwargs)


def _arguments(use: Use) -> tuple[Sequence[Any], dict[str, Any]]:
    """The positional and the named arguments of a call, with the tensors that it tracks."""
    call, leaves = use.record.call, list(use.leaves)
    for slot, value in zip(use.record.slots, use.tracked, strict=True):
        leaves[slot.index] = value
    values = pytree.unflatten(pytree.flatten(call.values)[1], leaves)
    names = map(str, call.names[call.positional :])
    return values[: call.positional], dict(zip(names, values[call.positional :], strict=True))


def _deliver(source: Source, blocks: Iterable[Block], found: Found, pending: Pending) -> None:
    """Add blocks to the parameter or to the derived tensor that they are of."""
    if isinstance(source, Derived):
        if id(source.record) in pending:
            pending[id(source.record)][source.output].extend(blocks)
    elif id(source) in found:
        found[id(source)].extend(blocks)


def _without_samples(use: Use) -> Use:
    """A use with its arguments as one sample's call would have received them."""
    leaves = [leaf[0] if isinstance(leaf, Tensor) else leaf for leaf in use.leaves]
    return replace(use, leaves=leaves)


def _as_objectives(use: Use, received: Sequence[Sequence[Block]]) -> Use:
    """The use of a derived tensor with the rows it received as ``K·B`` objectives of one sample."""
    cs: list[Tensor | None] = []
    for blocks in received:
        rows = [block.dense() for block in blocks]
        cs.append(torch.stack(rows).sum(0).flatten(0, 1).unsqueeze(1) if rows else None)
    leaves = [leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf for leaf in use.leaves]
    return Use(use.record, leaves, cs, use.tracked)
