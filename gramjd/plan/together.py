"""Parameters contracted together: a weight and a bias whose rows are made of the same cotangents."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gramjd.blocks import Block, Dense, Outer
from gramjd.internals import is_compiling, is_plain


def biased(each: Sequence[Sequence[Block]]) -> dict[int, int]:
    """Positions of weights, and of the biases of the same calls at one position a sample."""
    if is_compiling():
        return {}
    biases: dict[object, int] = {}
    for n, blocks in enumerate(each):
        if len(blocks) == 1 and isinstance(blocks[0], Dense) and (key := _memory(blocks[0].values)):
            biases.setdefault((key, blocks[0].rows), n)
    found = {}
    for n, blocks in enumerate(each):
        if len(blocks) == 1 and isinstance(blocks[0], Outer) and (key := _memory(blocks[0].c)):
            bias = biases.pop((key, blocks[0].rows), None)
            if bias is not None:
                found[n] = bias
    return found


def _memory(c: Tensor) -> tuple[object, ...] | None:
    """What two tensors of the same entries in the same order have in common, if that can be told."""
    if not is_plain(c):
        return None
    layout = [(size, step) for size, step in zip(c.shape, c.stride(), strict=True) if size > 1]
    return c.data_ptr(), c.dtype, c.device, *layout
