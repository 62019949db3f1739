"""Tiles of a Gramian between ranks, from factors that travel around a ring.

In step ``s`` rank ``r`` holds the factors of rank ``r - s``, its visitor, which rank ``r - 1`` had in the
step before, while it sends on what it had itself. No rank holds more than its own factors, its visitor's,
and those that are arriving. After half a round all pairs of ranks have met once. Of an even number of
ranks, each meets its opposite twice, in the last step: then each of the two takes some of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gramjd.contraction import Options, products
from gramjd.contraction.options import Limits, limits
from gramjd.contraction.products import Part
from gramjd.distributed.factors import Manifest, pack, unpack
from gramjd.distributed.ranks import Ranks


@dataclass(frozen=True)
class Round:
    """The parameters whose factors are sent around the ring, and the ranks that get them."""

    manifests: Sequence[Manifest]  # of all ranks
    lower: Sequence[int]  # parameters that the lower one of two opposite ranks takes
    upper: Sequence[int]  # and those that the upper one takes

    @property
    def which(self) -> list[int]:
        """All parameters that are contracted by factors."""
        return sorted([*self.lower, *self.upper])

    @property
    def steps(self) -> range:
        return range(1, len(self.manifests) // 2 + 1)

    def is_opposite(self, step: int) -> bool:
        """Whether each rank meets the opposite one in this step: such pairs meet twice."""
        return 2 * step == len(self.manifests)

    def wanted(self, rank: int, step: int) -> Sequence[int]:
        """Parameters whose factors a rank needs of its visitor in a step."""
        if not self.is_opposite(step):
            return self.which
        return self.lower if rank < step else self.upper

    def bytes(self, rank: int, step: int) -> int:
        """The number of bytes that a rank receives in a step."""
        return self.manifests[rank - step].bytes(self.wanted(rank, step))


@dataclass(frozen=True)
class Own:
    """The parts, tensors and options of this rank."""

    parts: Sequence[Part]
    tensors: Mapping[int, Tensor]  # of its manifest
    objectives: int
    options: Options
    like: Tensor
    dtype: torch.dtype  # of all ranks' products

    @property
    def limits(self) -> Limits:
        """The limits for rows that are built to be multiplied in ``dtype``."""
        return limits(replace(self.options, accumulate_dtype=self.dtype), self.like, self.dtype)


def meetings(ranks: Ranks, plan: Round, own: Own) -> Iterator[tuple[int, int, Tensor]]:
    """Step, visitor and the tile ``[K, B, K, B']`` of this rank's samples with the visitor's."""
    r, K, held = ranks.rank, own.objectives, own.tensors
    square = (own.options, own.like)
    coming = _pass_on(ranks, plan, 1, held, own) if plan.steps else None
    yield 0, r, products.gramian(own.parts, plan.which, K, *square).to(own.dtype)
    for step in plan.steps:
        assert coming is not None
        held = coming()
        if step + 1 in plan.steps:
            coming = _pass_on(ranks, plan, step + 1, held, own)
        visitor, which = (r - step) % ranks.size, plan.wanted(r, step)
        visiting = plan.manifests[visitor].parts(held, which)
        yield step, visitor, products.cross(own.parts, visiting, which, (K, K), *square).to(own.dtype)


def rows(ranks: Ranks, plan: Round, own: Own) -> Tensor:
    """The rows ``[K, B, K, ΣB]`` of this rank's samples; each tile is computed on one rank, or in shares."""
    found: dict[int, Tensor] = {}
    K, sizes = own.objectives, [manifest.samples_in_all for manifest in plan.manifests]
    for step, visitor, tile in meetings(ranks, plan, own):
        host = (ranks.rank + step) % ranks.size  # of which this rank is the visitor
        found[visitor] = tile
        if step == 0:
            continue
        given = ranks.swap(visitor, tile.permute(2, 3, 0, 1), host, (K, sizes[ranks.rank], K, sizes[host]))
        if not plan.is_opposite(step):
            found[host] = given
        else:  # added up in one order on both ranks
            found[visitor] = tile + given if ranks.rank < visitor else given + tile
    return torch.cat([found[rank] for rank in range(ranks.size)], 3)


def total(ranks: Ranks, plan: Round, own: Own) -> Tensor:
    """This rank's share ``[K, 1, K, 1]`` of the Gramian of objectives that are sums over ranks.

    Of two ranks' Jacobians ``J`` and ``J'``, that of the sum has ``J J'ᵀ`` and its transpose.
    """
    found: Tensor | float = 0.0
    for step, _, tile in meetings(ranks, plan, own):
        found = found + (tile if step == 0 else tile + tile.permute(2, 3, 0, 1))
    assert isinstance(found, Tensor)
    return found


def _pass_on(ranks: Ranks, plan: Round, step: int, held: Mapping[int, Tensor], own: Own
             ) -> Callable[[], dict[int, Tensor]]:  # fmt: skip
    """Begin a step: send what this rank holds to the next one, and receive what the one before has."""
    r, after, before = ranks.rank, (ranks.rank + 1) % ranks.size, (ranks.rank - 1) % ranks.size
    sent = pack(held, plan.manifests[r - step + 1], plan.wanted(after, step), ranks.device)
    buffer = torch.empty(plan.bytes(r, step), dtype=torch.uint8, device=ranks.device)
    transfer = ranks.start([(after, sent)], [(before, buffer)])

    def arrived() -> dict[int, Tensor]:
        transfer.wait()
        return unpack(buffer, plan.manifests[r - step], plan.wanted(r, step), own.like.device)

    return arrived
