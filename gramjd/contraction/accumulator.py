"""The Gramian as a running sum, for blocks that are not kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from gramjd import contraction, prepared, pytree
from gramjd.blocks import Block, flatten, is_zero, unflatten
from gramjd.complexes import real_block, real_dtype
from gramjd.contraction import Options, products
from gramjd.contraction.outputs import Output, Outputs
from gramjd.gramians import symmetric

_MOST = 2**14  # elements of short rows that wait for others


class GramianSum:
    """Adds up the shares of parameters in the Gramian of one output."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.total: Tensor | None = None  # [K, B, K, B]
        self.waiting: list[Sequence[Block]] = []  # of parameters with short rows
        self.elements = 0  # of these rows

    def add(self, blocks: Mapping[str, Sequence[Block]]) -> None:
        """Add the share of some parameters."""
        each = [mine for mine in blocks.values() if mine]
        tensors, structure = flatten(each)
        if not tensors:
            return
        options, (K, samples) = self.options, each[0][0].rows
        whole = options.memory_budget is None  # one tile

        def contract(tensors: Sequence[Tensor]) -> tuple[list[Tensor], tuple[Sequence[int], int]]:
            return _share(unflatten(structure, tensors), options, whole)

        key = "share", structure, options.on(tensors[0].device)
        share, (short, elements) = prepared.call(contract, key, tensors)
        for tile in share:
            self._add_tile(tile, slice(0, samples), slice(0, samples), K, samples)
        if not whole:
            self._add_tiles([_real(mine) for n, mine in enumerate(each) if n not in short], K, samples)
        self.waiting += [each[n] for n in short]
        self.elements += elements
        if self.elements > _MOST:
            self._add_waiting()

    def _add_waiting(self) -> None:
        waiting, self.waiting, self.elements = self.waiting, [], 0
        if not waiting:
            return
        options, (K, samples) = self.options, waiting[0][0].rows
        if options.memory_budget is not None:
            self._add_tiles([_real(mine) for mine in waiting], K, samples)
            return
        tensors, structure = flatten(waiting)

        def contract(tensors: Sequence[Tensor]) -> tuple[list[Tensor], None]:
            blocks = [block for mine in unflatten(structure, tensors) for block in _real(mine)]
            return [contraction.short_rows(blocks, options)], None

        (tile,), _ = prepared.call(
            contract, ("short rows", structure, options.on(tensors[0].device)), tensors
        )
        self._add_tile(tile, slice(0, samples), slice(0, samples), K, samples)

    def _add_tiles(self, each: Sequence[Sequence[Block]], K: int, samples: int) -> None:
        """Add a share tile by tile, within the memory budget."""
        if any(each):
            like = flatten(each)[0][0]
            part = products.Part(each, samples)
            for mine, others, tile in products.tiles(part, K, self.options, like):
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

    def result(self, output: Output, like: Tensor) -> Tensor:
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


class FactorsOrSum:
    """Keeps the blocks of all parameters, or, where these are more than a budget, adds up their Gramian."""

    def __init__(self, options: Options, budget: int) -> None:
        self.total, self.budget = GramianSum(options), budget  # in bytes
        self.blocks: dict[str, Sequence[Block]] | None = {} if budget else None
        self.storages: dict[int, int] = {}  # the bytes of each, by its address: blocks share some

    def add(self, blocks: Mapping[str, Sequence[Block]]) -> None:
        """Add the blocks of some parameters."""
        if self.blocks is None:
            self.total.add(blocks)
            return
        self.blocks.update(blocks)
        storages = [tensor.untyped_storage() for tensor in flatten(list(blocks.values()))[0]]
        self.storages.update((storage.data_ptr(), storage.nbytes()) for storage in storages)
        if sum(self.storages.values()) > self.budget:
            kept, self.blocks = self.blocks, None
            self.total.add(kept)


def _share(given: Sequence[Sequence[Block]], options: Options, whole: bool
           ) -> tuple[list[Tensor], tuple[Sequence[int], int]]:  # fmt: skip
    """The share of some parameters, if it is asked for as a ``whole``, without those with short rows.

    Of these, the places and the number of elements.
    """
    each = [_real(mine) for mine in given]
    groups = contraction.groups_of(each, options)
    rest, groups_of_rest = groups.without_short(len(each)) if groups.short else (range(len(each)), groups)
    short = [each[n][0] for n in groups.short]
    elements = sum(prod(block.rows) * prod(block.shape) for block in short)
    if not whole:
        return [], (groups.short, elements)
    found = contraction.sum_of(contraction.gramians([each[n] for n in rest], options, groups_of_rest))
    return [] if found is None else [found], (groups.short, elements)


def _real(blocks: Sequence[Block]) -> list[Block]:
    """Blocks of real rows, less those that are zero for want of positions."""
    return [real_block(block) for block in blocks if not is_zero(block)]
