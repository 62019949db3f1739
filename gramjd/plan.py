"""Contractions of two blocks into their share of the Gramian, by the cheapest exact plan.

Multiply-adds of ``Outer × Outer`` (see :mod:`gramjd.blocks` for the letters):

    pairwise   (a aᵀ) ∘ (c cᵀ), summed over positions    (BT)²·i + (KBT)²·o
    rows       build Σ_t c_t ⊗ a_t, then rows @ rowsᵀ     KBT·i·o + (KB)²·i·o

Both run in tiles, so that no temporary is larger than ``TILE`` elements where it can be avoided.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gramjd.blocks import Block, Dense, Lookup, Outer, merge
from gramjd.gramians import symmetrize

TILE = 2**22  # elements of the largest temporary of a contraction (16 MiB in float32)


def gramian(blocks: Sequence[Block]) -> Tensor:
    """``J Jᵀ [K, B, K, B]`` of one parameter, ``J`` the sum of its ``blocks``; exactly symmetric."""
    blocks = merge(blocks)
    K, B = blocks[0].rows
    total: Tensor | float = 0.0
    for index, u in enumerate(blocks):
        total = total + contract(u, u)
        for v in blocks[index + 1 :]:
            share = contract(u, v).reshape(K * B, K * B)
            total = total + (share + share.mT).view(K, B, K, B)
    assert isinstance(total, Tensor)
    return symmetrize(total.reshape(K * B, K * B)).view(K, B, K, B)


def contract(u: Block, v: Block) -> Tensor:
    """Inner products of all rows of two blocks of one parameter, ``[K₁, B₁, K₂, B₂]``."""
    if _groups(u) != _groups(v):  # the same weight in other groups, or not in a convolution
        u, v = (Dense(x.dense()) if _groups(x) > 1 else x for x in (u, v))
    if isinstance(u, Outer) and isinstance(v, Outer):
        if u.transposed != v.transposed or pairwise_cost(u, v) <= rows_cost(u, v):
            return outer_pairwise(u, v)
        return outer_rows(u, v)
    if isinstance(u, Lookup):
        if isinstance(v, Lookup):
            return lookup_lookup(u, v)
        return lookup_outer(u, v) if isinstance(v, Outer) else lookup_dense(u, v)
    if isinstance(v, Lookup) or (isinstance(u, Dense) and isinstance(v, Outer)):
        return contract(v, u).permute(2, 3, 0, 1)
    assert isinstance(v, Dense)
    return outer_dense(u, v) if isinstance(u, Outer) else dense_dense(u, v)


def _groups(block: Block) -> int:
    return block.c.shape[3] if isinstance(block, Outer) else 1


def pairwise_cost(u: Outer, v: Outer) -> int:
    """Multiply-adds of :func:`outer_pairwise`."""
    (K1, B1, T1, G, o), (K2, B2, T2), i = u.c.shape, v.c.shape[:3], u.a.shape[-1]
    return G * B1 * T1 * B2 * T2 * (i + K1 * K2 * (o + 1))


def rows_cost(u: Outer, v: Outer) -> int:
    """Multiply-adds of :func:`outer_rows`."""
    (K1, B1, T1, G, o), (K2, B2, T2), i = u.c.shape, v.c.shape[:3], u.a.shape[-1]
    build = K1 * B1 * T1 + (0 if u is v else K2 * B2 * T2)
    return G * o * i * (build + K1 * B1 * K2 * B2)


def outer_pairwise(u: Outer, v: Outer) -> Tensor:
    """``Σ_{t,s} (a_t · a_s)(c_t · c_s)``, in tiles of samples of ``u``."""
    (K1, B1, T1, G), (K2, B2, T2) = u.c.shape[:4], v.c.shape[:3]
    if u.transposed != v.transposed:  # one weight used as itself and as its transpose
        return _crossed_pairwise(u, v)
    step = max(1, TILE // max(1, K1 * T1 * K2 * B2 * T2 * G))
    a_v = v.a.permute(2, 3, 0, 1).flatten(2)  # [G, i, B2 T2]
    c_v = v.c.permute(3, 4, 0, 1, 2).flatten(2)  # [G, o, K2 B2 T2]
    tiles = []
    for start in range(0, B1, step):
        a = u.a[start : start + step].permute(2, 0, 1, 3)  # [G, b, T1, i]
        c = u.c[:, start : start + step].permute(3, 0, 1, 2, 4)  # [G, K1, b, T1, o]
        b = a.shape[1]
        aa = (a.flatten(1, 2) @ a_v).view(G, 1, b, T1, 1, B2, T2)
        cc = (c.flatten(1, 3) @ c_v).view(G, K1, b, T1, K2, B2, T2)
        tiles.append((aa * cc).sum((0, 3, 6)))
    return torch.cat(tiles, 1)


def _crossed_pairwise(u: Outer, v: Outer) -> Tensor:
    """Pairwise for blocks of which one is transposed: ``Σ_{t,s} (a_t · c_s)(c_t · a_s)``; ``G = 1``."""
    tiles = []
    step = max(1, TILE // max(1, u.c.shape[0] * u.c.shape[2] * v.c[..., 0].numel()))
    for start in range(0, u.c.shape[1], step):
        a, c = u.a[start : start + step, :, 0], u.c[:, start : start + step, :, 0]
        ac = torch.einsum("bti,ldsi->btlds", a, v.c[:, :, :, 0])
        ca = torch.einsum("kbto,dso->kbtds", c, v.a[:, :, 0])
        tiles.append(torch.einsum("btlds,kbtds->kbld", ac, ca))
    return torch.cat(tiles, 1)


def outer_rows(u: Outer, v: Outer) -> Tensor:
    """Rows of both blocks for a slab of output features at a time, multiplied and added up."""
    o, i, G = u.c.shape[-1], u.a.shape[-1], u.c.shape[3]
    (K1, B1), (K2, B2) = u.rows, v.rows
    step = max(1, TILE // max(1, max(K1 * B1, K2 * B2) * G * i))
    total: Tensor | float = 0.0
    for start in range(0, o, step):
        left = u.slab(start, start + step).flatten(2).flatten(0, 1)
        right = left if u is v else v.slab(start, start + step).flatten(2).flatten(0, 1)
        total = total + left @ right.mT
    assert isinstance(total, Tensor)
    return total.view(K1, B1, K2, B2)


def lookup_lookup(u: Lookup, v: Lookup) -> Tensor:
    """``Σ_{t,s} [id_t = id_s] (c_t · c_s)``, in tiles of samples of ``u``; no row as long as V."""
    (K1, B1, T1, _), (K2, B2, T2, _) = u.c.shape, v.c.shape
    step = max(1, TILE // max(1, K1 * T1 * K2 * B2 * T2))
    c_v = v.c.flatten(0, 2).mT
    tiles = []
    for start in range(0, B1, step):
        c, ids = u.c[:, start : start + step], u.ids[start : start + step]
        same = ids[None, :, :, None, None, None] == v.ids[None, None, None, None]  # [1,b,T1,1,B2,T2]
        cc = (c.flatten(0, 2) @ c_v).view(K1, ids.shape[0], T1, K2, B2, T2)
        tiles.append((same * cc).sum((2, 5)))
    return torch.cat(tiles, 1)


def lookup_outer(u: Lookup, v: Outer) -> Tensor:
    """``Σ_{t,s} c'_s[id_t] (c_t · a_s)``: a tied weight, looked up and multiplied by; ``G = 1``."""
    (K1, B1, T1, _), (K2, B2, T2) = u.c.shape, v.c.shape[:3]
    left, right = v.c[:, :, :, 0], v.a[:, :, 0]  # [K2, B2, T2, V], [B2, T2, d]
    step = max(1, TILE // max(1, (K1 + K2) * T1 * B2 * T2))
    tiles = []
    for start in range(0, B1, step):
        c, ids = u.c[:, start : start + step], u.ids[start : start + step]
        if v.transposed:  # the parameter is [V, d] = aᵀ c: the ids pick activations
            cc = torch.einsum("kbtd,lesd->kbtles", c, left)
            picked = right[:, :, ids]  # [B2, T2, b, T1]
            tiles.append(torch.einsum("kbtles,esbt->kble", cc, picked))
        else:
            ca = torch.einsum("kbtd,esd->kbtes", c, right)
            picked = left[..., ids]  # [K2, B2, T2, b, T1]
            tiles.append(torch.einsum("kbtes,lesbt->kble", ca, picked))
    return torch.cat(tiles, 1)


def lookup_dense(u: Lookup, v: Dense) -> Tensor:
    """Each looked-up cotangent against the dense rows at its id."""
    K2, B2 = v.rows
    tiles = []
    for c, ids in zip(u.c.unbind(1), u.ids, strict=True):  # one sample of u at a time
        picked = v.values[:, :, ids].flatten(2).flatten(0, 1)  # [K2 B2, T d]
        tiles.append((c.flatten(1) @ picked.mT).view(-1, 1, K2, B2))
    return torch.cat(tiles, 1)


def outer_dense(u: Outer, v: Dense) -> Tensor:
    """Rows of ``u`` for a slab of output features at a time, against the dense rows."""
    (K, B, _, G, o), i, (K2, B2) = u.c.shape, u.a.shape[-1], v.rows
    shape = (i, o) if u.transposed else (o, i)
    dense = v.values.reshape(K2, B2, G, *shape)
    dense = dense.mT if u.transposed else dense
    step = max(1, TILE // max(1, K * B * G * i))
    total: Tensor | float = 0.0
    for start in range(0, o, step):
        left = u.slab(start, start + step).flatten(2).flatten(0, 1)
        right = dense[:, :, :, start : start + step].flatten(2).flatten(0, 1)
        total = total + left @ right.mT
    assert isinstance(total, Tensor)
    return total.view(K, B, K2, B2)


def dense_dense(u: Dense, v: Dense) -> Tensor:
    """``rows @ rowsᵀ``."""
    return (u.matrix() @ v.matrix().mT).view(*u.rows, *v.rows)
