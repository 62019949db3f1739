"""Products with the blocks of some samples, for rows ``(k, b)`` and parameters in a flat list.

A Jacobian over micro-batches has several parts; each holds, for every parameter, the blocks of its
own samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from gramjd import contraction, host_memory, prepared
from gramjd.blocks import Block, Dense, flatten, is_zero, unflatten
from gramjd.contraction import Options
from gramjd.contraction.tiles import root
from gramjd.gramians import symmetric
from gramjd.internals import is_dynamo_tracing, is_ours, is_watched, versions_of
from gramjd.rounding import own_precision


@dataclass(frozen=True)
class Part:
    """Some samples of a Jacobian."""

    blocks: Sequence[Sequence[Block]]  # of each parameter; none if the outputs do not depend on it
    samples: int
    kept: dict[int, Tensor] = field(default_factory=dict)  # rows [B K, P] that the Gramian was made of
    versions: tuple[int, ...] = ()  # of all factors at first; of none: not watched

    @staticmethod
    def watched(blocks: Sequence[Sequence[Block]], samples: int) -> Part:
        """A part that can tell when somebody writes into its factors."""
        return Part(blocks, samples, versions=versions_of(_factors(blocks)))

    def written(self) -> int | None:
        """A parameter into whose factors somebody has written since, if there is one."""
        if not self.versions or versions_of(_factors(self.blocks)) == self.versions:
            return None
        rest = iter(self.versions)
        for n, mine in enumerate(self.blocks):
            if any(version != next(rest) for version in versions_of(_factors([mine]))):
                return n
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "versions": ()}  # those of copied tensors are others

    def of_parameters(self, which: Sequence[int]) -> Part:
        """Return the part with some of its parameters."""
        if list(which) == list(range(len(self.blocks))):
            return self
        kept = {n: self.kept[p] for n, p in enumerate(which) if p in self.kept}
        rest = iter(self.versions)
        each = [[next(rest) for _ in _factors([mine])] for mine in self.blocks] if self.versions else []
        versions = tuple([version for p in which for version in each[p]]) if each else ()
        return Part([self.blocks[p] for p in which], self.samples, kept, versions)

    def split(self, most: int) -> list[Part]:
        """Parts of at most so many samples."""
        if self.samples <= most:
            return [self]
        return [
            Part([[block.samples(*some) for block in mine] for mine in self.blocks], some[1] - some[0])
            for some in contraction.ranges(self.samples, most)
        ]

    def live(self, number: int) -> list[Block]:
        """The blocks of a parameter, less those that are zero for want of positions."""
        return [block for block in self.blocks[number] if not is_zero(block)]

    def moved(self, device: torch.device | str | None, dtype: torch.dtype | None) -> Part:
        """Move the part to another device, and its floating-point numbers to another dtype."""
        blocks = [[_moved(block, device, dtype) for block in mine] for mine in self.blocks]
        return Part.watched(blocks, self.samples)

    def objectives(self, which: Tensor) -> Part:
        """Return the part with some objectives of each sample."""
        return Part([[block.objectives(which) for block in mine] for mine in self.blocks], self.samples)

    def memory(self) -> int:
        """Bytes of the factors and of kept rows, each storage once."""
        factors = [t for mine in self.blocks for b in mine for t in _tensors(b).values()]
        storages = {t.untyped_storage() for t in [*factors, *self.kept.values()]}
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@own_precision
def gramian(parts: Sequence[Part], which: Sequence[int], K: int, options: Options, like: Tensor) -> Tensor:
    """``Σ J_p J_pᵀ`` over the parameters ``which``, ``[K, B, K, B]``, exactly symmetric."""
    return symmetric(_gramian(parts, which, K, options, like))


def _gramian(parts: Sequence[Part], which: Sequence[int], K: int, options: Options, like: Tensor) -> Tensor:
    """The Gramian of :func:`gramian`, symmetric up to rounding."""
    pieces = _pieces(parts, K, options, like)
    tiles: list[list[Tensor]] = []
    for i, piece in enumerate(pieces):
        mirrored = [tiles[j][i].permute(2, 3, 0, 1) for j in range(i)]
        tiles.append([*mirrored, *(_tile(piece, v, which, K, options, like) for v in pieces[i:])])
    return _assemble(tiles)


def tiles(part: Part, K: int, options: Options, like: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield the whole Gramian in tiles ``[K, b, K, b']`` with their samples, none below the diagonal.

    Those on the diagonal are symmetric but for rounding.
    """
    pieces, which = _pieces([part], K, options, like), range(len(part.blocks))
    ends = accumulate(piece.samples for piece in pieces)
    samples = [slice(end - piece.samples, end) for end, piece in zip(ends, pieces, strict=True)]
    for i, u in enumerate(pieces):
        for j, v in enumerate(pieces[i:], i):
            yield samples[i], samples[j], _tile(u, v, which, K, options, like)


def _tile(u: Part, v: Part, which: Sequence[int], K: int, options: Options, like: Tensor) -> Tensor:
    """Rows of one part by those of another, or by themselves."""
    if u is not v:
        return _cross(u, v, which, (K, K), options, like)
    live = [u.live(p) for p in which]
    shares = contraction.gramians([blocks for blocks in live if blocks], options)
    return _sum(shares, (K, u.samples, K, u.samples), like)


def _pieces(parts: Sequence[Part], K: int, options: Options, like: Tensor) -> Sequence[Part]:
    """Parts of so few samples that three tiles of the result keep to the budget, if one was given."""
    if options.memory_budget is None:
        return parts
    entries = options.budget(like.device) // options.accumulated(like.dtype).itemsize
    most = max(1, root(entries // 3) // K)
    return [piece for part in parts for piece in part.split(most)]


@own_precision
def keeping(part: Part, which: Sequence[int], K: int, options: Options, like: Tensor) -> Tensor:
    """Compute the Gramian of one part, and keep some of the rows that are built for it."""
    if part.kept or is_dynamo_tracing():
        total, used = _keeping(part, which, K, options, like)
    else:
        tensors, structure = flatten([part.blocks[p] for p in which])

        def contract(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[int]]:
            given = Part(unflatten(structure, tensors), part.samples)
            total, rows = _keeping(given, range(len(given.blocks)), K, options, like)
            return [total, *rows.values()], [*rows]

        key = "Gramian", structure, part.samples, K, options.on(like.device), like.dtype
        (total, *rows), places = prepared.call(contract, key, tensors)
        used = {which[place]: each for place, each in zip(places, rows, strict=True)}
    part.kept.update(used)
    return total


def _keeping(part: Part, which: Sequence[int], K: int, options: Options, like: Tensor
             ) -> tuple[Tensor, dict[int, Tensor]]:  # fmt: skip
    """The Gramian of some parameters, and the rows among those that were built for it that may be kept."""
    shares, used = [], {}
    for p, rows in contraction.kept_rows({p: part.live(p) for p in which}, options, part.kept):
        used[p] = rows
        shares.append(contraction.of_rows(rows, K))
    rest = [p for p in which if p not in used]
    if rest or not shares:
        less = options
        if options.memory_budget is not None and used:
            taken = sum(rows.nbytes for rows in used.values())
            less = replace(options, memory_budget=max(1, options.budget(like.device) - taken))
        shares.append(_gramian([part], rest, K, less, like))
    return symmetric(_sum(shares, (), like)), used


@own_precision
def cross(left: Sequence[Part], right: Sequence[Part], which: Sequence[int], objectives: tuple[int, int],
          options: Options, like: Tensor) -> Tensor:  # fmt: skip
    """``Σ J_p J'_pᵀ`` for two Jacobians, ``[K₁, B₁, K₂, B₂]``."""
    left, right = (_pieces(p, max(objectives), options, like) for p in (left, right))
    return _assemble([[_cross(u, v, which, objectives, options, like) for v in right] for u in left])


@own_precision
def squared_norms(parts: Sequence[Part], K: int, options: Options, like: Tensor) -> Tensor:
    """Squared norms of the rows, ``[K, B]``."""
    return torch.cat(
        [
            _sum(
                [contraction.squared_norms(b, options) for b in map(part.live, range(len(part.blocks))) if b],
                (K, part.samples),
                like,
            )
            for part in parts
        ],
        1,
    )


@own_precision
def diagonal(parts: Sequence[Part], K: int, options: Options, like: Tensor) -> Tensor:
    """The Gramian of each sample by itself, ``[K, B, K]``."""
    found = [
        _sum(
            [
                contraction.gramian([b.samples(n, n + 1) for b in blocks], options)
                for blocks in map(part.live, range(len(part.blocks)))
                if blocks
            ],
            (K, 1, K, 1),
            like,
        )
        for part in parts
        for n in range(part.samples)
    ]
    return torch.cat(found, 1).squeeze(3)


@own_precision
def vjp(parts: Sequence[Part], parameters: Sequence[Tensor], w: Tensor) -> list[Tensor]:
    """``Jᵀ w`` for ``w [K, B]``, of each parameter's shape and dtype."""
    if len(parts) > 1 or is_dynamo_tracing():
        return _vjp(parts, parameters, w)
    (part,) = parts
    kept = [n for n in range(len(parameters)) if n in part.kept]
    factors, structure = flatten([() if n in part.kept else blocks for n, blocks in enumerate(part.blocks)])

    def pull(tensors: Sequence[Tensor]) -> tuple[list[Tensor], None]:
        w, *rest = tensors
        if (
            w.device.type == "cpu"
            and not is_watched()
            and any(p.nbytes >= host_memory.LEAST for p in parameters)
        ):
            host_memory.let_malloc_adapt()
        rows = dict(zip(kept, rest, strict=False))
        given = Part(unflatten(structure, rest[len(rows) :]), part.samples, rows)
        return _vjp([given], parameters, w), None

    key = "Jᵀ w", structure, part.samples, *kept, *[(p.shape, p.dtype, p.device) for p in parameters]
    found, _ = prepared.call(pull, key, [w, *[part.kept[n] for n in kept], *factors])
    return [*found]


def _vjp(parts: Sequence[Part], parameters: Sequence[Tensor], w: Tensor) -> list[Tensor]:
    weights = w.split([part.samples for part in parts], 1) if len(parts) > 1 else [w]
    short = _short_vjp(parts[0], w) if len(parts) == 1 else {}
    found = []
    for number, p in enumerate(parameters):
        shares = []
        for part, mine in zip(parts, weights, strict=True):
            if number in short:
                shares.append(short[number].view(p.shape))
            elif number in part.kept:
                flat = mine.to(p).T.reshape(1, -1).mm(part.kept[number])
                shares.append(flat.view(p.shape))
            else:
                shares += [block.vjp(mine.to(p)) for block in part.blocks[number]]
        found.append(_sum(shares, p.shape, p).to(p))
    return found


def _short_vjp(part: Part, w: Tensor) -> dict[int, Tensor]:
    """``Jᵀ w`` of the parameters with short rows, by one product for all."""
    rows = {
        number: block.matrix()
        for number, blocks in enumerate(part.blocks)
        if contraction.is_short(blocks)
        for block in blocks
        if isinstance(block, Dense) and (block.values.dtype, block.values.device) == (w.dtype, w.device)
    }
    if len(rows) < 2:
        return {}
    joined = (w.reshape(1, -1) @ torch.cat(list(rows.values()), 1)).squeeze(0)
    sizes = [each.shape[1] for each in rows.values()]
    # gradients with memory of their own, where that takes no call for each
    split: Any = torch.split_with_sizes_copy if is_ours(joined) else torch.split
    shares = split(joined, sizes)
    return dict(zip(rows, shares, strict=True))


@own_precision
def jvp(parts: Sequence[Part], tangents: Sequence[Tensor], K: int, like: Tensor) -> Tensor:
    """``J v``, ``[K, B]``: ``block.vjp`` is linear in its weights, so its transpose applies the block."""
    found = []
    for part in parts:
        zero = torch.zeros(K, part.samples, dtype=like.dtype, device=like.device)
        shares = [
            torch.func.vjp(block.vjp, zero.to(v))[1](v)[0]
            for v, blocks in zip(tangents, part.blocks, strict=True)
            for block in blocks
        ]
        found.append(_sum(shares, (K, part.samples), like))
    return torch.cat(found, 1)


@own_precision
def dense(parts: Sequence[Part], number: int, K: int, parameter: Tensor) -> Tensor:
    """The rows of one parameter, ``[K, B, *shape]``."""
    rows = [
        _sum([b.dense() for b in part.blocks[number]], (K, part.samples, *parameter.shape), parameter)
        for part in parts
    ]
    return torch.cat(rows, 1)


def _cross(u: Part, v: Part, which: Sequence[int], objectives: tuple[int, int], options: Options, like: Tensor
           ) -> Tensor:  # fmt: skip
    live = ((u.live(p), v.live(p)) for p in which)
    shares = (contraction.cross(left, right, options) for left, right in live if left and right)
    return _sum(shares, (objectives[0], u.samples, objectives[1], v.samples), like)


def _sum(shares: Iterable[Tensor], shape: Sequence[int], like: Tensor) -> Tensor:
    """The sum of some tensors, zero if there is none, on the device of ``like``."""
    total = contraction.sum_of(shares)
    if total is None:
        return torch.zeros(tuple(shape), dtype=like.dtype, device=like.device)
    return total if total.device == like.device else total.to(like.device)


def _assemble(tiles: Sequence[Sequence[Tensor]]) -> Tensor:
    """``[K₁, b₁, K₂, b₂]`` tiles in rows and columns → ``[K₁, B₁, K₂, B₂]``."""
    if len(tiles) == len(tiles[0]) == 1:
        return tiles[0][0]
    return torch.cat([torch.cat(list(row), 3) for row in tiles], 1)


def _tensors(block: Block) -> dict[str, Tensor]:
    """The factors of a block by name."""
    return {name: value for name, value in vars(block).items() if isinstance(value, Tensor)}


def _factors(blocks: Sequence[Sequence[Block]]) -> list[Tensor]:
    """The factors of the blocks of several parameters, in order."""
    return [t for mine in blocks for block in mine for t in vars(block).values() if isinstance(t, Tensor)]


def _moved(block: Block, device: torch.device | str | None, dtype: torch.dtype | None) -> Block:
    moved = {
        name: t.to(device=device, dtype=dtype if t.is_floating_point() else None)
        for name, t in _tensors(block).items()
    }
    return replace(block, **moved)  # type: ignore[arg-type]
