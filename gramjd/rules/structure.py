"""Structural pull-backs: the block of a tensor that was made from a parameter → that of the parameter.

A weight is often reshaped, transposed, sliced, cast or multiplied by another before it meets the
batch. Its block stays an ``Outer`` or a ``Lookup``: such ops only rearrange or rescale the factors.
Where they do not (or for an op that is not here), rows are pulled back instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from gramjd import pytree
from gramjd.blocks import Block, Conv, Lookup, Outer
from gramjd.rules.elementwise import ADDS, DIVS, MULS, SUBS
from gramjd.rules.factors import (
    Structured,
    along,
    embedded,
    factor_of_dims,
    factors,
    of_product,
    permuted,
    scaled,
    sides,
)
from gramjd.rules.linear import BADDBMMS, BMMS, MATMULS
from gramjd.rules.registry import Op

P = TypeVar("P", bound=Callable[..., Block | None])


@dataclass(frozen=True)
class At:
    """The output of the op that a block belongs to, and the tracked argument that a block is wanted for."""

    output: int
    slot: int  # among the leaves of the arguments
    tensor: Tensor  # the argument


_PULLBACKS: dict[Op, Callable[..., Block | None]] = {}
# Of the arguments that a pull-back takes by name; "**": any.
_NAMES: dict[Callable[..., Any], frozenset[str]] = {}


def register_pullback(*ops: Op) -> Callable[[P], P]:
    """Decorator: register ``pull(block, at, *arguments)``, which may return ``None``: no structure.

    ``arguments`` are those of the call; batch-independent tensors that no rule of the op needs are ``None``.
    """

    def register(pull: P) -> P:
        arguments = inspect.signature(pull).parameters.values()
        named = {x.name for x in arguments if x.kind is x.POSITIONAL_OR_KEYWORD}
        _NAMES[pull] = frozenset({*named, *("**" for x in arguments if x.kind is x.VAR_KEYWORD)})
        for op in ops:
            _PULLBACKS[op] = pull
        return pull

    return register


def pull_back(op: Op, block: Block, at: At, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Block | None:
    """The block of one argument of an op from that of one of its outputs; ``None``: take rows."""
    try:
        pull = _PULLBACKS.get(op)
    except TypeError:  # an unhashable callable
        return None
    if pull is None or not (isinstance(block, (Outer, Lookup)) or _is_copied(block, pull, at)):
        return None
    if 0 in (*block.shape, *at.tensor.shape) or not _names_options(pull, kwargs):
        return None
    found = pull(block, at, *args, **kwargs)
    return None if found is None else replace(found, origin=block.origin)


def _names_options(pull: Callable[..., Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the named arguments are those of a pull-back, and no tensors: these have a place by position.

    Other names are aliases (``axis`` for ``dim``), or give the tensors in another order.
    """
    if not kwargs:
        return True
    tensors = any(isinstance(leaf, Tensor) for leaf in pytree.leaves(dict(kwargs)))
    return not tensors and ("**" in _NAMES[pull] or kwargs.keys() <= _NAMES[pull])


def _is_copied(block: Block, pull: Callable[..., Any], at: At) -> bool:
    """Whether a block is that of a convolution kernel that was only cast."""
    return isinstance(block, Conv) and pull is same_order and block.shape == at.tensor.shape


def pulled_back() -> list[Op]:
    """Every op with a structural pull-back; the tests go through all of them."""
    return list(_PULLBACKS)


SAME_ORDER: list[Op] = [
    Tensor.view, Tensor.reshape, torch.reshape, Tensor.view_as, Tensor.reshape_as, Tensor.flatten,
    torch.flatten, Tensor.ravel, torch.ravel, Tensor.unflatten, torch.unflatten, Tensor.squeeze,
    torch.squeeze, Tensor.unsqueeze, torch.unsqueeze, Tensor.contiguous, Tensor.clone, torch.clone,
    Tensor.to, Tensor.type, Tensor.type_as, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16,
]  # fmt: skip


@register_pullback(*SAME_ORDER)
def same_order(block: Structured | Conv, at: At, *args: Any, **kwargs: Any) -> Block:
    """Reshaped, copied or cast: the entries keep their order."""
    if isinstance(block, Conv):
        return replace(block, points=block.points.to(at.tensor), windows=block.windows.to(at.tensor))
    block = replace(block, shape=tuple(at.tensor.shape), c=block.c.to(at.tensor))
    if isinstance(block, Outer):
        return replace(block, a=block.a.to(at.tensor))
    return replace(block, ids=block.ids.to(at.tensor.device))


_PROPERTIES: Any = Tensor  # as an untyped class, for its property getters
REVERSALS: list[Op] = [_PROPERTIES.T.__get__, _PROPERTIES.mT.__get__, Tensor.t, torch.t]
SWAPS: list[Op] = [Tensor.transpose, torch.transpose, Tensor.swapaxes, torch.swapaxes]
SWAPS += [Tensor.swapdims, torch.swapdims]


@register_pullback(*REVERSALS)
def reversal(block: Structured, at: At, *args: Any) -> Block | None:
    """The last two dimensions swapped (``T`` of more than two is deprecated)."""
    n = at.tensor.ndim
    return None if n < 2 else permuted(block, [*range(n - 2), n - 1, n - 2], at.tensor.shape)


@register_pullback(*SWAPS)
def swap(block: Structured, at: At, input: Tensor, dim0: int, dim1: int) -> Block | None:
    order = list(range(input.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return permuted(block, order, input.shape)


@register_pullback(Tensor.permute, torch.permute)
def permute(block: Structured, at: At, input: Tensor, *dims: Any) -> Block | None:
    order = dims[0] if isinstance(dims[0], (tuple, list)) else dims
    return permuted(block, [d % input.ndim for d in order], input.shape)


@register_pullback(Tensor.movedim, torch.movedim, Tensor.moveaxis, torch.moveaxis)
def movedim(block: Structured, at: At, input: Tensor, source: Any, destination: Any) -> Block | None:
    sources = [source] if isinstance(source, int) else list(source)
    targets = [destination] if isinstance(destination, int) else list(destination)
    order_of: list[int | None] = [None] * input.ndim
    for s, t in zip(sources, targets, strict=True):
        order_of[t % input.ndim] = s % input.ndim
    rest = iter(d for d in range(input.ndim) if d not in order_of)
    return permuted(block, [next(rest) if d is None else d for d in order_of], input.shape)


EXPANDS: tuple[Op, ...] = (Tensor.expand, Tensor.expand_as, torch.broadcast_to, Tensor.broadcast_to)
LINEAR: tuple[Op, ...] = (*MATMULS, *BMMS, *BADDBMMS)  # what weights are repeated for


@register_pullback(*EXPANDS)
def expand(block: Structured, at: At, *args: Any) -> Block | None:
    """Repeated along some dimensions: summed over them, or, of groups, at more positions."""
    shape = (*[1] * (len(block.shape) - at.tensor.ndim), *at.tensor.shape)
    found: Structured | None = block
    for dim, size in enumerate(shape):
        if found is None or found.shape[dim] == size:
            continue
        where = factor_of_dims(found)
        if isinstance(found, Outer) and where and where[dim] == "groups" and (
            found.shape[dim] == found.c.shape[3]
        ):  # fmt: skip
            c, a = found.c.flatten(2, 3).unsqueeze(3), found.a.flatten(1, 2).unsqueeze(2)
            found = replace(found, c=c, a=a, shape=(*found.shape[:dim], 1, *found.shape[dim + 1 :]))
        else:
            found = along(found, dim, lambda x, d: x.sum(d, keepdim=True), 1)
    return None if found is None else replace(found, shape=tuple(at.tensor.shape))


@register_pullback(Tensor.narrow, torch.narrow)
def narrow(block: Structured, at: At, input: Tensor, dim: int, start: int, length: int) -> Block | None:
    start = int(start) % input.shape[dim] if length else 0
    return embedded(block, dim % input.ndim, range(start, start + length), input.shape[dim])


@register_pullback(Tensor.select, torch.select)
def select(block: Structured, at: At, input: Tensor, dim: int, index: int) -> Block | None:
    return _one_of(block, input, dim % input.ndim, index % input.shape[dim])


@register_pullback(Tensor.unbind, torch.unbind)
def unbind(block: Structured, at: At, input: Tensor, dim: int = 0) -> Block | None:
    return _one_of(block, input, dim % input.ndim, at.output)


def pull_back_all(op: Op, received: Sequence[Sequence[Block]], at: At, args: Sequence[Any],
                  kwargs: Mapping[str, Any]) -> Block | None:  # fmt: skip
    """The block of a stack of matrices from those that it was unbound into; ``None``: pull back one by one.

    Each matrix is a group of the block, and has as many positions as the one with the most.
    """
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    if op not in (Tensor.unbind, torch.unbind) or dim not in (0, -at.tensor.ndim):
        return None
    blocks = [block for mine in received for block in mine]
    if not blocks or any(len(mine) > 1 for mine in received) or not _are_alike(blocks):
        return None
    first = cast(Outer, blocks[0])
    none = replace(first, c=first.c[:, :, :0], a=first.a[:, :0])
    each = [cast(Outer, mine[0]) if mine else none for mine in received]
    T = max(x.c.shape[2] for x in each)
    c = torch.stack([F.pad(x.c[:, :, :, 0], (0, 0, 0, T - x.c.shape[2])) for x in each], 3)
    a = torch.stack([F.pad(x.a[:, :, 0], (0, 0, 0, T - x.a.shape[1])) for x in each], 2)
    return replace(first, c=c, a=a, shape=tuple(at.tensor.shape))


def _are_alike(blocks: Sequence[Block]) -> bool:
    """Whether all are outer products without groups that differ in their positions alone."""
    kinds = {block.kind if isinstance(block, Outer) and block.c.shape[3] == 1 else None for block in blocks}
    return len(kinds) == 1 and None not in kinds


def _one_of(block: Structured, input: Tensor, dim: int, index: int) -> Block | None:
    shape = (*input.shape[:dim], 1, *input.shape[dim + 1 :])
    return embedded(replace(block, shape=shape), dim, range(index, index + 1), input.shape[dim])


@register_pullback(Tensor.chunk, torch.chunk)
def chunk(block: Structured, at: At, input: Tensor, chunks: int, dim: int = 0) -> Block | None:
    return split(block, at, input, -(-input.shape[dim] // chunks), dim)


@register_pullback(Tensor.split, torch.split)
def split(block: Structured, at: At, tensor: Tensor, split_size: Any, dim: int = 0) -> Block | None:
    size = split_size * at.output if isinstance(split_size, int) else sum(split_size[: at.output])
    dim %= tensor.ndim
    return embedded(block, dim, range(size, size + block.shape[dim]), tensor.shape[dim])


@register_pullback(Tensor.__getitem__)
def getitem(block: Structured, at: At, input: Tensor, index: Any) -> Block | None:
    """Indexed by numbers, slices, ``None`` and ``...``."""
    items = list(index) if isinstance(index, tuple) else [index]
    if not all(x is None or x is Ellipsis or type(x) in (int, slice) for x in items):
        return None
    given = sum(x is not None and x is not Ellipsis for x in items)
    if Ellipsis not in items:
        items.append(Ellipsis)
    where = items.index(Ellipsis)
    items[where : where + 1] = [slice(None)] * (input.ndim - given)
    sizes = zip((x for x in items if x is not None), input.shape, strict=True)
    places = [range(x % n, x % n + 1) if isinstance(x, int) else range(n)[x] for x, n in sizes]
    found: Structured | None = replace(block, shape=tuple(map(len, places)))
    for dim, (taken, size) in enumerate(zip(places, input.shape, strict=True)):
        found = found and embedded(found, dim, taken, size)
    return found


@register_pullback(torch.cat, torch.concat, torch.concatenate)
def cat(block: Structured, at: At, tensors: Sequence[Tensor], dim: int = 0) -> Block | None:
    if any(t is None for t in tensors):
        return None
    dim %= at.tensor.ndim
    before = [t for t in tensors[: at.slot] if t.shape != (0,)]  # cat skips these, whatever the others are
    start = sum(t.shape[dim] for t in before)
    size = at.tensor.shape[dim]
    if isinstance(block, Lookup):
        where = factor_of_dims(block)
        if where and where[dim] == "ids" and prod(block.shape[:dim]) == 1 and (
            block.shape[dim] == factors(block)[0][1]
        ):  # fmt: skip
            mine = (block.ids >= start) & (block.ids < start + size)
            ids = torch.where(mine, block.ids - start, 0)
            return replace(block, ids=ids, c=block.c * mine[None, :, :, None], shape=tuple(at.tensor.shape))
    return along(block, dim, lambda x, d: x.narrow(d, start, size), size)


@register_pullback(torch.stack)
def stack(block: Structured, at: At, tensors: Sequence[Tensor], dim: int = 0) -> Block | None:
    dim %= at.tensor.ndim + 1
    found = along(block, dim, lambda x, d: x.narrow(d, at.slot, 1), 1)
    where = factor_of_dims(block)
    groups = where is not None and where[dim] == "groups"
    if groups and isinstance(block, Outer) and block.shape[dim] == block.c.shape[3]:
        c, a = block.c[:, :, :, at.slot : at.slot + 1], block.a[:, :, at.slot : at.slot + 1]
        found = replace(block, c=c, a=a)
    return None if found is None else replace(found, shape=tuple(at.tensor.shape))


@register_pullback(Tensor.__neg__, Tensor.neg, torch.neg)
def negation(block: Structured, at: At, input: Tensor) -> Block:
    return replace(block, c=-block.c)


@register_pullback(*ADDS)
def add(block: Structured, at: At, input: Any, other: Any, alpha: float = 1) -> Block | None:
    """The block of a term of a sum, as in LoRA; a term that is broadcast gets rows."""
    if block.shape != at.tensor.shape:
        return None
    return replace(block, c=block.c * alpha) if at.slot == 1 and alpha != 1 else block


@register_pullback(*SUBS)
def sub(block: Structured, at: At, input: Any, other: Any, alpha: float = 1) -> Block | None:
    if block.shape != at.tensor.shape:
        return None
    return replace(block, c=-alpha * block.c) if at.slot == 1 else block


@register_pullback(*MULS)
def mul(block: Structured, at: At, input: Any, other: Any) -> Block | None:
    return None if block.shape != at.tensor.shape else scaled(block, input if at.slot == 1 else other)


@register_pullback(*DIVS)
def div(block: Structured, at: At, input: Any, other: Any, rounding_mode: Any = None) -> Block | None:
    if at.slot == 1 or rounding_mode is not None or block.shape != at.tensor.shape:
        return None
    return scaled(block, 1 / other)


@register_pullback(*MATMULS)
def matmul(block: Structured, at: At, left: Tensor, right: Tensor) -> Block | None:
    """One matrix times another, as in low-rank updates."""
    if left.ndim != 2 or right.ndim != 2:
        return None
    if sides(block) != (len(left), right.shape[1]):  # reshaped in between
        return of_product(block, at.slot == 0, left, right) if isinstance(block, Outer) else None
    shape = tuple(at.tensor.shape)
    if isinstance(block, Lookup):
        if at.slot == 0:
            return replace(block, c=block.c @ right.mT, shape=shape)
        return Outer(block.c.unsqueeze(3), left[block.ids].unsqueeze(2), shape, transposed=True)
    if (at.slot == 0) == block.transposed:
        return replace(block, c=block.c @ (right.mT if at.slot == 0 else left), shape=shape)
    return replace(block, a=block.a @ (right.mT if at.slot == 0 else left), shape=shape)
