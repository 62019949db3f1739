"""Blocks of one parameter together: the same sum in fewer blocks, and other views of a block."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import replace
from math import lcm, prod
from typing import Any

from torch import Tensor

from gramjd.blocks.conv import Conv
from gramjd.blocks.dense import Dense
from gramjd.blocks.lookup import Lookup
from gramjd.blocks.outer import Outer
from gramjd.internals import is_dynamo_tracing

Block = Outer | Lookup | Dense | Conv


def transpose(block: Block) -> Block:
    """The block of a matrix, given that of its transpose."""
    if isinstance(block, Outer) and block.c.shape[3] == 1:
        return replace(block, shape=block.shape[::-1], transposed=not block.transposed)
    return Dense(block.dense().mT, origin=block.origin)


def spread(block: Block, samples: int) -> Block:
    """A block of ``K·B`` objectives over shared inputs (``B = 1``) → the same rows as ``[K, B]``."""

    def split(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, samples)).squeeze(2)

    def share(x: Tensor) -> Tensor:
        return x.expand(samples, *x.shape[1:])

    if isinstance(block, Outer):
        return replace(block, c=split(block.c), a=share(block.a))
    if isinstance(block, Lookup):
        return replace(block, c=split(block.c), ids=share(block.ids))
    if isinstance(block, Dense):
        return replace(block, values=split(block.values))
    if block.windows.shape[0] > 1:
        return replace(block, windows=split(block.windows), points=share(block.points[0])[None])
    return replace(block, points=split(block.points), windows=share(block.windows[0])[None])


def merge(blocks: Sequence[Block]) -> list[Block]:
    """Join blocks of one parameter into fewer: several uses of a weight become one use at more positions."""
    if len(blocks) < 2:
        return [*blocks]
    alike: dict[Hashable, list[Any]] = {}
    for block in blocks:
        alike.setdefault((type(block), block.kind), []).append(block)
    return [
        replace(same[0].join(same), origin=_origins(same)) if len(same) > 1 else same[0]
        for same in alike.values()
    ]


def common_grain(u: Block, v: Block) -> int:
    """The least number of entries that is a multiple of both blocks' ``grain``."""
    first, second = u.grain, v.grain
    return first if first == second else lcm(first, second)  # torch.compile knows no lcm of symbols


def _origins(blocks: Iterable[Block]) -> str:
    """The ops that several blocks come from, each once."""
    return " + ".join(dict.fromkeys(block.origin for block in blocks))


def with_origin(block: Block, origin: str) -> Block:
    """Name the op that a block comes from; return the block with this name."""
    if is_dynamo_tracing():
        return replace(block, origin=origin)
    found: Block = object.__new__(type(block))  # the same with a tenth of the calls
    found.__dict__.update(block.__dict__, origin=origin)
    return found


def is_zero(block: Block) -> bool:
    """Whether a block has no positions, as in a sum over no samples."""
    if isinstance(block, Conv):
        return block.T == 0
    return not isinstance(block, Dense) and block.c.shape[2] == 0


def fits(block: Block, shape: Sequence[int]) -> bool:
    """Whether the factors of a block give rows of this shape."""
    if tuple(block.shape) != tuple(shape):
        return False
    if isinstance(block, Outer):
        return block.c.shape[3] * block.c.shape[4] * block.a.shape[3] == prod(shape)
    if isinstance(block, Conv):
        (G, p), q = block.points.shape[3:5], block.windows.shape[4]
        return (G * p, q) == tuple(shape[:2])
    return not isinstance(block, Lookup) or prod(shape) % block.grain == 0
