"""What becomes of the blocks of an output: a Gramian as a running sum, or factors that are kept."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from gramjd import contraction, prepared, pytree
from gramjd.blocks import Block, Structure, flatten, is_zero, unflatten
from gramjd.complexes import real_block, real_dtype
from gramjd.contraction import Options, products
from gramjd.contraction.outputs import Output, Outputs
from gramjd.gramians import symmetric

_MOST = 2**15  # elements of short rows that wait for others


class Sink:
    """Takes the blocks of the parameters, some at a time.

    :meth:`add` takes blocks. Where the same come again, prepared ops build and reduce them together, and
    :meth:`take` takes the result.
    """

    key: Hashable = "factors"  # of all that the ops of `reduce` depend on besides the blocks
    by_name = False  # whether they depend on the names of the parameters, too

    def add(self, blocks: Mapping[str, Sequence[Block]]) -> None:
        """Take the blocks of some parameters, by name."""
        raise NotImplementedError

    def reduce(self, blocks: Mapping[str, Sequence[Block]]) -> tuple[list[Tensor], Any]:
        """What is left of the blocks of some parameters: tensors, and the rest. It takes nothing yet."""
        return flatten([*blocks.values()], origins=True)

    def add_prepared(self, blocks: Mapping[str, Sequence[Block]]) -> None:
        """Take the blocks of some parameters, reduced by prepared ops."""
        tensors, structure = flatten([*blocks.values()])
        if not tensors:
            return
        names = [*blocks]

        def reduce(tensors: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
            return self.reduce(dict(zip(names, unflatten(structure, tensors), strict=True)))

        key = structure, self.key, *(names if self.by_name else ())
        self.take(names, *prepared.call(reduce, key, tensors))

    def take(self, names: Sequence[str], tensors: Sequence[Tensor], rest: Any) -> None:
        """Take what is left of the blocks of these parameters."""
        self.add(dict(zip(names, unflatten(rest, tensors), strict=True)))


class Factors(Sink):
    """Keeps all blocks."""

    def __init__(self) -> None:
        self.blocks: dict[str, Sequence[Block]] = {}

    def add(self, blocks: Mapping[str, Sequence[Block]]) -> None:
        self.blocks.update(blocks)


class GramianSum(Sink):
    """Adds up the shares of parameters in the Gramian of one output, on a device."""

    def __init__(self, options: Options, device: torch.device) -> None:
        self.options, self.key = options, ("share", *options.on(device))
        self.total: Tensor | None = None  # [K, B, K, B]
        self.waiting: list[tuple[Sequence[Tensor], Structure]] = []  # blocks of short rows
        self.elements = 0  # of these rows

    def add(self, blocks: Mapping[str, Sequence[Block]]) -> None:
        self.add_prepared(blocks)

    def reduce(self, blocks: Mapping[str, Sequence[Block]]) -> tuple[list[Tensor], Any]:
        """The share as one tile, if there is memory for it, or the blocks, and the blocks of short rows."""
        given = [mine for mine in blocks.values() if mine]
        if not given:
            return [], None
        real = [_real(mine) for mine in given]
        groups = contraction.groups_of(real, self.options)
        short = [real[n] for n in groups.short]
        elements = sum(prod(block.rows) * prod(block.shape) for (block,) in short)
        places, groups = groups.without_short(len(real)) if short else (range(len(real)), groups)
        rest, tile = [real[n] for n in places], None
        if self.options.memory_budget is None:
            rest, tile = [], contraction.sum_of(contraction.gramians(rest, self.options, groups))
        tiles = [] if tile is None else [tile]
        (left, of_left), (waiting, of_waiting) = flatten(rest), flatten(short)
        counts = len(tiles), len(tiles) + len(left)
        return [*tiles, *left, *waiting], (given[0][0].rows, counts, of_left, of_waiting, elements)

    def take(self, names: Sequence[str], tensors: Sequence[Tensor], rest: Any) -> None:
        if rest is None:
            return
        (K, samples), (tiles, start), left, short, elements = rest
        for tile in tensors[:tiles]:
            self._add_tile(tile, slice(0, samples), slice(0, samples), K, samples)
        if left:
            self._add_tiles(unflatten(left, tensors[tiles:start]), K, samples)
        if short:
            self.waiting.append((tensors[start:], short))
            self.elements += elements
            if self.elements > _MOST:
                self._add_waiting()

    def _add_waiting(self) -> None:
        waiting, self.waiting, self.elements = self.waiting, [], 0
        tensors = [tensor for mine, _ in waiting for tensor in mine]
        if not tensors:
            return
        structure = tuple([block for _, mine in waiting for block in mine])
        options, (K, samples) = self.options, tensors[0].shape[:2]
        if options.memory_budget is not None:
            self._add_tiles(unflatten(structure, tensors), K, samples)
            return

        def contract(tensors: Sequence[Tensor]) -> tuple[list[Tensor], None]:
            blocks = [block for (block,) in unflatten(structure, tensors)]
            return [contraction.short_rows(blocks, options)], None

        (tile,), _ = prepared.call(contract, ("short rows", structure, self.key), tensors)
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
        if tile.device != self.total.device:  # of a parameter elsewhere
            tile = tile.to(self.total.device)
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


class FactorsOrSum(Sink):
    """Keeps the blocks of all parameters, or, where these are more than a budget, adds up their Gramian."""

    def __init__(self, options: Options, device: torch.device, budget: int) -> None:
        self.total, self.budget = GramianSum(options, device), budget  # in bytes
        self.blocks: dict[str, Sequence[Block]] | None = {} if budget else None
        self.key = Sink.key if budget else self.total.key
        self.storages: dict[int, int] = {}  # the bytes of each, by its address: blocks share some

    def add(self, blocks: Mapping[str, Sequence[Block]]) -> None:
        if self.blocks is None:
            self.total.add(blocks)
            return
        self.blocks.update(blocks)
        storages = [tensor.untyped_storage() for tensor in flatten(list(blocks.values()))[0]]
        self.storages.update((storage.data_ptr(), storage.nbytes()) for storage in storages)
        if sum(self.storages.values()) > self.budget:
            kept, self.blocks, self.key = self.blocks, None, self.total.key
            self.total.add(kept)

    def reduce(self, blocks: Mapping[str, Sequence[Block]]) -> tuple[list[Tensor], Any]:
        return super().reduce(blocks) if self.blocks is not None else self.total.reduce(blocks)

    def take(self, names: Sequence[str], tensors: Sequence[Tensor], rest: Any) -> None:
        if self.blocks is not None:
            super().take(names, tensors, rest)
        else:
            self.total.take(names, tensors, rest)


def _real(blocks: Sequence[Block]) -> list[Block]:
    """Blocks of real rows, less those that are zero for want of positions."""
    return [real_block(block) for block in blocks if not is_zero(block)]
