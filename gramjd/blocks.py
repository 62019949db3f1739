"""Blocks: one use's share of the Jacobian of a parameter, kept in factored form.

Legend of letters, the same in every file:

    K  objectives per sample          B  samples; a row of J is (k, b)
    T  positions at which one sample uses the weight: tokens, pixels, time steps, reuses
    G  groups of a grouped convolution (1 otherwise)
    o  output features per group      i  input features per group
    c  cotangents of a use's output   a  activations, the use's input

The sum of a parameter's blocks is its Jacobian. Blocks never detach: they are plain tensor code and
compose with ``vmap``, ``grad`` and ``jvp``. Each names the op that it comes from, its ``origin``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Outer:
    """Row ``Σ_t c_t ⊗ a_t``: linear, matmul, addmm; a convolution after unfolding."""

    c: Tensor  # [K, B, T, G, o]
    a: Tensor  # [B, T, G, i]
    shape: tuple[int, ...]  # of the parameter
    transposed: bool = False  # the parameter is [i, o] instead of [G * o, i]
    origin: str = field(default="", kw_only=True, compare=False)

    @property
    def rows(self) -> tuple[int, int]:
        return self.c.shape[0], self.c.shape[1]

    def slab(self, start: int, stop: int) -> Tensor:
        """Rows of the outputs ``start:stop`` of each group, ``[K, B, G, o', i]``."""
        c = self.c[..., start:stop].permute(0, 1, 3, 4, 2)  # [K, B, G, o', T]
        return c @ self.a.transpose(1, 2)

    def dense(self) -> Tensor:
        """``[K, B, *shape]``."""
        rows = self.slab(0, self.c.shape[-1])
        return (rows.mT if self.transposed else rows).reshape(*self.rows, *self.shape)

    def vjp(self, w: Tensor) -> Tensor:
        """``Jᵀ w`` for ``w [K, B]``: an ordinary weight-gradient product."""
        c = (
            (self.c * w[:, :, None, None, None]).sum(0)
            if len(w) > 1
            else self.c[0] * w[0, :, None, None, None]
        )
        total = c.flatten(0, 1).permute(1, 2, 0) @ self.a.flatten(0, 1).transpose(0, 1)  # [G, o, i]
        return (total.mT if self.transposed else total).reshape(self.shape)

    def bound(self, w: Tensor) -> Tensor:
        """An upper bound of the norm of ``Jᵀ w`` that no cancellation lowers: the scale of rounding."""
        c = self.c.square().sum((-1, -2)).sqrt() * w.abs()[:, :, None]
        return (c.sum(0) * self.a.square().sum((-1, -2)).sqrt()).sum()


@dataclass(frozen=True)
class Lookup:
    """Row ``Σ_t onehot(id_t) ⊗ c_t``: embedding."""

    c: Tensor  # [K, B, T, d]
    ids: Tensor  # [B, T]
    shape: tuple[int, ...]  # [V, d]
    origin: str = field(default="", kw_only=True, compare=False)

    @property
    def rows(self) -> tuple[int, int]:
        return self.c.shape[0], self.c.shape[1]

    def dense(self) -> Tensor:
        """``[K, B, *shape]``."""
        K, B = self.rows
        row = torch.arange(K * B, device=self.c.device).view(K, B, 1) * self.shape[0]
        zero = self.c.new_zeros(K * B * self.shape[0], self.shape[1])
        found = zero.index_add(0, (row + self.ids).flatten(), self.c.flatten(0, 2))
        return found.view(K, B, *self.shape)

    def vjp(self, w: Tensor) -> Tensor:
        """``Jᵀ w`` for ``w [K, B]``."""
        c = (self.c * w[:, :, None, None]).sum(0).flatten(0, 1)
        return c.new_zeros(self.shape).index_add(0, self.ids.flatten(), c)

    def bound(self, w: Tensor) -> Tensor:
        """An upper bound of the norm of ``Jᵀ w`` that no cancellation lowers."""
        return (self.c.square().sum(-1).sqrt() * w.abs()[:, :, None]).sum()


@dataclass(frozen=True)
class Dense:
    """The rows themselves: biases, norm scales, and whatever has no structure."""

    values: Tensor  # [K, B, *shape]
    origin: str = field(default="", kw_only=True, compare=False)

    @property
    def rows(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape[2:])

    def dense(self) -> Tensor:
        """``[K, B, *shape]``."""
        return self.values

    def matrix(self) -> Tensor:
        """``[K B, n]``, also for a parameter without dimensions."""
        return self.values.reshape(prod(self.values.shape[:2]), -1)

    def vjp(self, w: Tensor) -> Tensor:
        """``Jᵀ w`` for ``w [K, B]``."""
        return torch.tensordot(w, self.values, 2)

    def bound(self, w: Tensor) -> Tensor:
        """An upper bound of the norm of ``Jᵀ w`` that no cancellation lowers."""
        return (self.matrix().norm(dim=1) * w.abs().flatten()).sum()


Block = Outer | Lookup | Dense


def transpose(block: Block) -> Block:
    """The block of a matrix, given that of its transpose."""
    if isinstance(block, Outer) and block.c.shape[3] == 1:
        return replace(block, shape=block.shape[::-1], transposed=not block.transposed)
    return Dense(block.dense().mT, origin=block.origin)


def spread(block: Block, samples: int) -> Block:
    """A block of ``K·B`` objectives over shared inputs (``B = 1``) → the same rows as ``[K, B]``."""
    if isinstance(block, Outer):
        a = block.a.expand(samples, *block.a.shape[1:])
        return replace(block, c=block.c.unflatten(0, (-1, samples)).squeeze(2), a=a)
    if isinstance(block, Lookup):
        ids = block.ids.expand(samples, -1)
        return replace(block, c=block.c.unflatten(0, (-1, samples)).squeeze(2), ids=ids)
    return replace(block, values=block.values.unflatten(0, (-1, samples)).squeeze(2))


def merge(blocks: Sequence[Block]) -> list[Block]:
    """The same sum in fewer blocks: several uses of a weight are one use at more positions."""
    outers: dict[tuple[object, ...], list[Outer]] = {}
    lookups: list[Lookup] = []
    dense: list[Dense] = []
    for block in blocks:
        if isinstance(block, Outer):
            key = (
                block.transposed,
                block.c.shape[3:],
                block.a.shape[2:],
                block.c.dtype,
                block.a.dtype,
            )
            outers.setdefault(key, []).append(block)
        elif isinstance(block, Lookup):
            lookups.append(block)
        else:
            dense.append(block)
    merged: list[Block] = []
    for same in outers.values():
        first = same[0]
        if len(same) > 1:
            c, a = torch.cat([u.c for u in same], 2), torch.cat([u.a for u in same], 1)
            first = replace(first, c=c, a=a, origin=_origins(same))
        merged.append(first)
    if len(lookups) > 1:
        c, ids = torch.cat([u.c for u in lookups], 2), torch.cat([u.ids for u in lookups], 1)
        lookups = [replace(lookups[0], c=c, ids=ids, origin=_origins(lookups))]
    if len(dense) > 1:
        dense = [Dense(torch.stack([u.values for u in dense]).sum(0), origin=_origins(dense))]
    return [*merged, *lookups, *dense]


def _origins(blocks: Iterable[Block]) -> str:
    """The ops that several blocks come from, each once."""
    return " + ".join(dict.fromkeys(block.origin for block in blocks))


def fits(block: Block, shape: Sequence[int]) -> bool:
    """Do the factors of a block make up rows of this shape?"""
    if tuple(block.shape) != tuple(shape):
        return False
    if isinstance(block, Outer):
        return block.c.shape[3] * block.c.shape[4] * block.a.shape[3] == prod(shape)
    return not isinstance(block, Lookup) or block.c.shape[3] == shape[1]
