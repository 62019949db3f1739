"""Tiles of an array, dealt out over the ranks of a process group and sent to those that keep them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any

import torch
from torch import Tensor

from gramjd.datasets.journal import Tile
from gramjd.distributed.agreement import Statement, agree
from gramjd.distributed.gramian import taking_part
from gramjd.distributed.ranks import Ranks
from gramjd.errors import RanksDisagreeError

_REMEDY = (
    "Give all ranks the same function, parameters and loaders, without a DistributedSampler: the work is "
    "dealt out tile by tile."
)


@dataclass(frozen=True)
class Team:
    """The processes that share out tiles: the ranks of a group, or this one alone."""

    ranks: Ranks | None
    device: torch.device

    @staticmethod
    def of(group: Any, device: torch.device) -> Team:
        return Team(None if group is None else Ranks.of(group, device), device)

    @property
    def rank(self) -> int:
        return 0 if self.ranks is None else self.ranks.rank

    @property
    def size(self) -> int:
        return 1 if self.ranks is None else self.ranks.size

    @contextmanager
    def together(self) -> Iterator[None]:
        """A context that all ranks leave at once: where one raises, the others raise RankFailedError."""
        if self.ranks is None:
            yield
            return
        with taking_part(self.ranks.group, self.device):
            yield
        agree(self.ranks, Statement({}))

    def agree(self, settings: Mapping[str, Any], number: Tensor) -> None:
        """Raise on every rank if ranks have other settings, or numbers that are not about the same."""
        if self.ranks is None:
            return
        agree(self.ranks, Statement(settings), _REMEDY)
        for rank, other in enumerate(numbers := self.ranks.gather(number)):
            if not torch.allclose(numbers[0], other, rtol=1e-2, atol=0.0, equal_nan=True):
                raise RanksDisagreeError(
                    f"The function has other derivatives on rank {rank} than on rank 0. {_REMEDY}"
                )

    def missing(self, tiles: Sequence[Tile], done: set[Tile], keepers: Callable[[Tile], Sequence[int]]
                ) -> list[Tile]:  # fmt: skip
        """The tiles that one of their keepers does not have yet; ``done`` are those that this rank has."""
        every = [done] if self.ranks is None else self.ranks.gather_objects(done)
        return [tile for tile in tiles if not all(tile in every[rank] for rank in keepers(tile))]

    def deal(self, tiles: Sequence[Tile]) -> list[Sequence[Tile]]:
        """About as many for each rank, in stretches: tiles of one row share a Jacobian."""
        cuts = [len(tiles) * rank // self.size for rank in range(self.size + 1)]
        return [tiles[start:stop] for start, stop in pairwise(cuts)]

    def exchange(self, dealt: Sequence[Tile | None], mine: Tensor | None,
                 keepers: Callable[[Tile], Sequence[int]], empty: Callable[[Tile], Tensor]
                 ) -> list[tuple[Tile, Tensor]]:  # fmt: skip
        """Each rank has computed a tile, like an ``empty`` one: those of them that this rank keeps."""
        if self.ranks is None:
            return [(tile, mine) for tile in dealt if tile is not None and mine is not None]
        kept, sent, received = [], [], []
        for rank, tile in enumerate(dealt):
            if tile is None:
                continue
            others = [keeper for keeper in keepers(tile) if keeper != rank]
            if rank == self.rank:
                assert mine is not None
                found = mine.to(self.ranks.device).contiguous()
                sent = [(other, found) for other in others]
            elif self.rank in others:
                found = empty(tile).to(self.ranks.device)
                received.append((rank, found))
            if self.rank in keepers(tile):
                kept.append((tile, found))
        self.ranks.start(sent, received).wait()
        return kept


def rounds(hands: Sequence[Sequence[Tile]]) -> Iterator[tuple[Tile | None, ...]]:
    """One tile of each rank at a time, ``None`` of those that have no more."""
    return zip_longest(*hands)
