"""Factored blocks as arrays of the parameter's dimensions: sliced, permuted, scaled, summed.

Every dimension of a block's shape belongs to the groups, to ``c`` or to ``a`` (of a ``Lookup``: to the
ids or to ``c``), so that what an op does along it can be done to that factor alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from gramjd.blocks import Lookup, Outer

Structured = Outer | Lookup


def factors(block: Structured) -> list[tuple[str, int]]:
    """Names and sizes of the factors, in the order of the parameter's entries."""
    if isinstance(block, Lookup):
        return [("ids", prod(block.shape) // block.c.shape[-1]), ("c", block.c.shape[-1])]
    groups, o, i = block.c.shape[3], block.c.shape[4], block.a.shape[3]
    return [("groups", groups), *([("a", i), ("c", o)] if block.transposed else [("c", o), ("a", i)])]


def sides(block: Structured) -> tuple[int, int] | None:
    """The sizes of the matrix that a block's two factors are the sides of; ``None`` if it has groups.

    A reshape in between may have made the block's shape another matrix with as many entries.
    """
    sizes = [size for name, size in factors(block) if name != "groups" or size > 1]
    return (sizes[0], sizes[1]) if len(sizes) == 2 else None


def factor_of_dims(block: Structured) -> list[str] | None:
    """The factor that each dimension of the shape belongs to; ``None`` if one belongs to two."""
    parts = [(name, size) for name, size in factors(block) if size > 1] or [("c", 1)]
    name, left = parts.pop(0)
    found = []
    for size in block.shape:
        if left == 1 and size > 1:
            name, left = parts.pop(0)
        if left % size:
            return None
        found.append(name)  # a dimension of size 1 goes with what is before it
        left //= size
    return found


def along(block: Structured, dim: int, change: Callable[[Tensor, int], Tensor], size: int
           ) -> Structured | None:  # fmt: skip
    """``change(factor, dim)`` applied to the dimension of the factor that ``dim`` of the shape is."""
    where = factor_of_dims(block)
    if where is None or where[dim] not in ("c", "a"):
        return None
    name = where[dim]
    dims = [d for d, each in enumerate(where) if each == name]
    factor: Tensor = getattr(block, name)
    sizes = [block.shape[d] for d in dims]
    lead = factor.ndim - 1
    changed = change(factor.reshape(*factor.shape[:-1], *sizes), lead + dims.index(dim)).flatten(lead)
    shape = (*block.shape[:dim], size, *block.shape[dim + 1 :])
    return replace(block, **{name: changed}, shape=shape)  # type: ignore[arg-type]


def embedded(block: Structured, dim: int, places: range, size: int) -> Structured | None:
    """The block of a tensor of which ``places`` of dimension ``dim`` were taken, ``size`` long."""
    if len(places) == size and places.step == 1:
        return block
    if isinstance(block, Lookup):
        where = factor_of_dims(block)
        if where and where[dim] == "ids" and prod(block.shape[: dim + 1]) == factors(block)[0][1] and (
            prod(block.shape[:dim]) == 1
        ):  # fmt: skip
            shape = (*block.shape[:dim], size, *block.shape[dim + 1 :])
            return replace(block, ids=places.start + places.step * block.ids, shape=shape)

    def embed(factor: Tensor, d: int) -> Tensor:
        index = torch.arange(places.start, places.stop, places.step, device=factor.device)
        zeros = factor.new_zeros(*factor.shape[:d], size, *factor.shape[d + 1 :])
        return zeros.index_copy(d, index, factor)

    return along(block, dim, embed, size)


def permuted(block: Structured, order: Sequence[int], shape: Sequence[int]) -> Structured | None:
    """The block of ``x`` from that of ``x.permute(order)``; every factor stays in one piece."""
    where = factor_of_dims(block)
    if where is None:
        return None
    inverse = [list(order).index(d) for d in range(len(order))]
    wide = [d for d in inverse if block.shape[d] > 1]  # dimensions of the block in the order of x
    names = list(dict.fromkeys(where[d] for d in wide))
    together = [d for name in names for d in wide if where[d] == name]
    before = [name for name, size in factors(block) if size > 1 and name in names]
    if together != wide or ("groups" in names and names[0] != "groups"):
        return None
    if isinstance(block, Lookup) and names != before:
        return None
    found: Structured = block
    for name in names:
        dims = [d for d in wide if where[d] == name]
        if dims != sorted(dims):
            if name in ("groups", "ids"):
                return None
            factor: Tensor = getattr(block, name)
            lead = factor.ndim - 1
            sizes = [block.shape[d] for d in sorted(dims)]
            moved = factor.reshape(*factor.shape[:-1], *sizes).permute(
                [*range(lead), *(lead + sorted(dims).index(d) for d in dims)]
            )
            found = replace(found, **{name: moved.flatten(lead)})  # type: ignore[arg-type]
    if isinstance(found, Outer) and names != before:
        found = replace(found, transposed=not found.transposed)
    return replace(found, shape=tuple(shape))


def scaled(block: Structured, factor: Tensor | float) -> Structured | None:
    """The block of ``x`` from that of ``x * factor``, which varies along one dimension at most."""
    if not isinstance(factor, Tensor) or factor.numel() == 1:
        one = factor.reshape(()) if isinstance(factor, Tensor) else factor
        return replace(block, c=block.c * one)
    sizes = [1] * (len(block.shape) - factor.ndim) + list(factor.shape)
    wide = [d for d, size in enumerate(sizes) if size > 1]
    if len(sizes) > len(block.shape) or len(wide) > 1:
        return None
    (dim,) = wide
    values = factor.flatten()

    def scale(x: Tensor, d: int) -> Tensor:
        return x * values.reshape(-1, *[1] * (x.ndim - d - 1))

    return along(block, dim, scale, block.shape[dim])


def of_product(block: Outer, wrt_left: bool, left: Tensor, right: Tensor) -> Outer | None:
    """The block of a factor of ``left @ right`` from that of the product, which a reshape has regrouped.

    The product is ``[m, n]``, and the factors of the block are ``x [..., T, p]`` and ``y [..., T, q]``. Where
    ``p = m s``, each ``x_t`` is ``[m, s]``; where ``m = p s``, each ``y_t`` is ``[s, n]``.
    """
    found, (m, r) = sides(block), left.shape
    if found is None:
        return None
    p, q = found
    x, y = (f.squeeze(-2) for f in ((block.a, block.c) if block.transposed else (block.c, block.a)))
    if p % m == 0:
        x = x.unflatten(-1, (m, p // m))
        if not wrt_left:  # [r s, q]
            x = torch.einsum("...ms,mr->...rs", x, left).flatten(-2)
        else:  # each of s is a position
            x, y = x.mT.flatten(-3, -2), torch.einsum("...q,rsq->...sr", y, right.reshape(r, -1, q))
            y = y.flatten(-3, -2)
    elif m % p == 0:
        y = y.unflatten(-1, (m // p, -1))
        if wrt_left:  # [p, s r]
            y = torch.einsum("...sn,rn->...sr", y, right).flatten(-2)
        else:
            x, y = torch.einsum("...p,psr->...sr", x, left.reshape(p, -1, r)), y.flatten(-3, -2)
            x = x.flatten(-3, -2)
    else:
        return None
    c, a = (y, x) if block.transposed else (x, y)
    shape = tuple((left if wrt_left else right).shape)
    return replace(block, c=c.unsqueeze(-2), a=a.unsqueeze(-2), shape=shape)
