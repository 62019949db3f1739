"""Outer blocks all of whose rows share their activations: these are multiplied once for all."""

from __future__ import annotations

from torch import Tensor

from gramjd.blocks import Outer
from gramjd.blocks.outer import shared
from gramjd.contraction.cost import Cost
from gramjd.contraction.options import Limits
from gramjd.contraction.tiles import added, ranges

MANY = 32  # positions from which on a product for each row takes less time than copying all of them for one


def joint_cost(u: Outer, v: Outer) -> Cost | None:
    """The cost of :func:`joint`: ``T₁T₂·i + T₁T₂·n₂·o + n₁·n₂·T₁·o`` multiply-adds."""
    a, b = shared(u.a, 0), shared(v.a, 0)
    if u.transposed != v.transposed or len(a) > 1 or len(b) > 1 or u.c.shape[3:] != v.c.shape[3:]:
        return None
    (K1, B1, T1, G, o), (K2, B2, T2), i = u.c.shape, v.c.shape[:3], u.a.shape[-1]
    n1, n2 = K1 * B1, K2 * B2
    products = G * (T1 * T2 * i + T1 * T2 * n2 * o + n1 * n2 * T1 * o)
    moved = G * (T1 * T2 + T1 * o * n2 + (T1 * o * n1 + T2 * o * n2 if T1 * T2 > 1 else 0))
    return Cost(products, moved, 5, moved)


def joint(u: Outer, v: Outer, limits: Limits) -> Tensor:
    """``Σ_t c_t · (Σ_s (a_t · a_s) c_s)``, some positions of ``u`` and some features at a time."""
    (K1, B1, T1, G, o), (K2, B2, T2) = u.c.shape, v.c.shape[:3]
    n1, n2 = K1 * B1, K2 * B2
    features = max(1, limits.elements // (2 * G * (T2 * n2 + n1 + n2)))
    left = limits.elements // (2 * G * (T2 + min(o, features) * (n1 + n2)))  # positions
    a_v = v.a[0].to(limits.dtype).permute(1, 2, 0)  # [G, i, T₂]

    def tile(positions: tuple[int, int], some: tuple[int, int]) -> Tensor:
        start, stop = positions
        a = u.a[0, start:stop].to(limits.dtype).transpose(0, 1)  # [G, t, i]
        c_v = v.c[..., slice(*some)].to(limits.dtype)
        if T2 < MANY:
            mixed = a @ a_v @ c_v.permute(3, 2, 0, 1, 4).flatten(2)  # [G, t, n₂ o']
            mixed = mixed.view(G, stop - start, K2, B2, -1).permute(2, 3, 0, 1, 4)
        else:
            mixed = (a @ a_v) @ c_v.permute(0, 1, 3, 2, 4)  # [K₂, B₂, G, t, o']
        c = u.c[:, :, start:stop, :, slice(*some)].to(limits.dtype).permute(0, 1, 3, 2, 4)
        return c.flatten(2).flatten(0, 1) @ mixed.flatten(2).flatten(0, 1).mT

    found = added(tile(p, f) for p in ranges(T1, left) for f in ranges(o, features))
    return found.view(K1, B1, K2, B2)
