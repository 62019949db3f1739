"""The Gramian as a running sum, for blocks that are not kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from gramjd import contraction, pytree
from gramjd.blocks import Block
from gramjd.complexes import as_real, real_block, real_dtype
from gramjd.contraction import Options, products
from gramjd.contraction.outputs import Output, Outputs
from gramjd.gramians import symmetric

_MOST = 2**14  # elements of short rows that wait for others


class Sum:
    """Adds up the shares of parameters in the Gramian of one output."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.total: Tensor | None = None  # [K, B, K, B]
        self.waiting: dict[Tensor, Sequence[Block]] = {}  # of parameters with short rows

    def add(self, blocks: Mapping[Tensor, Sequence[Block]]) -> None:
        """Add the share of some parameters, given the blocks of each."""
        used = {p: list(map(real_block, mine)) for p, mine in blocks.items() if mine}
        short = contraction.waiting(list(used.values()), self.options)
        self.waiting.update((p, used.pop(p)) for p in [list(used)[n] for n in short])
        self._add(used)
        if sum(prod(block.rows) * prod(block.shape) for (block,) in self.waiting.values()) > _MOST:
            self._add_waiting()

    def _add_waiting(self) -> None:
        self._add(self.waiting)
        self.waiting = {}

    def _add(self, used: Mapping[Tensor, Sequence[Block]]) -> None:
        if not used:
            return
        p, (first, *_) = next(iter(used.items()))
        like = as_real(p)
        K, samples = first.rows
        part = products.Part(list(used.values()), samples)
        for mine, others, tile in products.tiles(part, K, self.options, like):
            if self.total is None:
                self.total = tile.new_zeros(K, samples, K, samples)
            if tile.dtype != self.total.dtype:
                self.total = self.total.to(torch.promote_types(self.total.dtype, tile.dtype))
            if tile.shape == self.total.shape:
                self.total.add_(tile)
                continue
            self.total[:, mine, :, others].add_(tile)  # with += the sum would be copied onto itself
            if mine != others:
                self.total[:, others, :, mine].add_(tile.permute(2, 3, 0, 1))

    def gramian(self, output: Output, like: Tensor) -> Tensor:
        """What they add up to, ``[*shape, *reversed(shape)]``; without any, zeros ``like`` a parameter."""
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
