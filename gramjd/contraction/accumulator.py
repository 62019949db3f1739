"""The Gramian as a running sum, for blocks that are not kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

import torch
from torch import Tensor

from gramjd import contraction, pytree
from gramjd.blocks import Block, is_zero
from gramjd.complexes import as_real, real_block, real_dtype
from gramjd.contraction import Groups, Options, products
from gramjd.contraction.outputs import Output, Outputs
from gramjd.gramians import symmetric

_MOST = 2**14  # elements of short rows that wait for others


class GramianSum:
    """Adds up the shares of parameters in the Gramian of one output."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.total: Tensor | None = None  # [K, B, K, B]
        self.like: Tensor | None = None  # the last parameter
        self.waiting: list[Sequence[Block]] = []  # of parameters with short rows
        self.elements = 0  # of these rows

    def add(self, blocks: Iterable[tuple[Tensor, Sequence[Block]]]) -> None:
        """Add the share of some parameters, given each with its blocks."""
        used = [(p, found) for p, mine in blocks if (found := _real(mine))]
        if not used:
            return
        self.like = as_real(used[0][0])
        each = [mine for _, mine in used]
        groups = contraction.groups_of(each, self.options)
        if groups.short:
            self.waiting += [each[n] for n in groups.short]
            self.elements += sum(prod(each[n][0].rows) * prod(each[n][0].shape) for n in groups.short)
            rest, groups = groups.without_short(len(each))
            each = [each[n] for n in rest]
        self._add(each, groups)
        if self.elements > _MOST:
            self._add_waiting()

    def _add_waiting(self) -> None:
        self._add(self.waiting, contraction.Groups({}, range(len(self.waiting))))
        self.waiting, self.elements = [], 0

    def _add(self, each: Sequence[Sequence[Block]], groups: Groups) -> None:
        if not each:
            return
        K, samples = each[0][0].rows
        if self.options.memory_budget is None:  # one tile
            for share in contraction.gramians(each, self.options, groups):
                self._add_tile(share, slice(0, samples), slice(0, samples), K, samples)
            return
        assert self.like is not None
        part = products.Part(each, samples)
        for mine, others, tile in products.tiles(part, K, self.options, self.like):
            self._add_tile(tile, mine, others, K, samples)

    def _add_tile(self, tile: Tensor, mine: slice, others: slice, K: int, samples: int) -> None:
        if self.total is None and tile.shape[1] == tile.shape[3] == samples:
            self.total = tile  # it is new memory
            return
        if self.total is None:
            self.total = tile.new_zeros(K, samples, K, samples)
        if tile.dtype != self.total.dtype:
            self.total = self.total.to(torch.promote_types(self.total.dtype, tile.dtype))
        if tile.shape == self.total.shape:
            self.total.add_(tile)
            return
        self.total[:, mine, :, others].add_(tile)  # with += the sum would be copied onto itself
        if mine != others:
            self.total[:, others, :, mine].add_(tile.permute(2, 3, 0, 1))

    def gramian(self, output: Output, like: Tensor) -> Tensor:
        """The sum of all shares, ``[*shape, *reversed(shape)]``; without any, zeros ``like`` a parameter."""
        self._add_waiting()
        outputs = Outputs([output], pytree.LEAF, output.samples)
        if self.total is not None:
            total = symmetric(self.total)
        else:
            size = 2 * (outputs.objectives, outputs.samples)
            total = torch.zeros(size, dtype=real_dtype(like.dtype), device=like.device)
        found = outputs.square(total, outputs)
        assert isinstance(found, Tensor)
        return found


def _real(blocks: Sequence[Block]) -> list[Block]:
    """Blocks of real rows, less those that are zero for want of positions."""
    return [real_block(block) for block in blocks if not is_zero(block)]
