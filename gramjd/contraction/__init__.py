"""Contractions of blocks into Gramians, by the cheapest exact plan within a budget of memory.

Multiply-adds of ``Outer × Outer`` (see :mod:`gramjd.blocks` for the letters):

    pairwise   (a aᵀ) ∘ (c cᵀ), summed over positions    (BT)²·i + (KBT)²·o
    rows       build Σ_t c_t ⊗ a_t, then rows @ rowsᵀ     KBT·i·o + (KB)²·i·o

Which of them is cheaper follows from shapes alone, so that contractions compose with ``vmap``,
``grad``, ``jvp`` and ``torch.compile``. A block against itself takes half the products where that
pays. The sum of all shares is made exactly symmetric once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from gramjd.blocks import Block, Dense, Lookup, Outer, is_zero, merge
from gramjd.contraction import diagonals
from gramjd.contraction.choice import plans, swapped
from gramjd.contraction.grouped import biased, is_short, short_rows
from gramjd.contraction.options import Limits, Options, default_budget, limits
from gramjd.contraction.pairwise import takes_bias, with_bias
from gramjd.contraction.stored_rows import kept_rows, of_rows
from gramjd.contraction.tiles import added, ranges, sum_of
from gramjd.gramians import symmetric

__all__ = [
    "Groups",
    "Options",
    "Step",
    "contract",
    "cross",
    "default_budget",
    "gramian",
    "gramians",
    "groups_of",
    "is_short",
    "kept_rows",
    "of_rows",
    "ranges",
    "short_rows",
    "squared_norms",
    "steps",
    "steps_of_all",
    "sum_of",
]

DEFAULT = Options()
WITH_WEIGHT = "with its weight"  # the plan of a bias that costs no product of its own


@dataclass(frozen=True)
class Step:
    """One pair of blocks, and how it is contracted."""

    u: Block
    v: Block
    plan: str
    multiply_adds: int
    bytes: int  # of working memory


def steps(blocks: Sequence[Block], options: Options = DEFAULT) -> list[Step]:
    """The steps by which :func:`gramian` contracts the blocks of one parameter."""
    found, blocks = [], merge([block for block in blocks if not is_zero(block)])
    for index, u in enumerate(blocks):
        for v in blocks[index:]:
            left, right = (v, u) if swapped(u, v) else (u, v)
            plan, cost = plans(left, right)[0]
            most = _limits(u, v, options)
            working = min(cost.working, most.elements) * most.dtype.itemsize
            found.append(Step(u, v, plan.name, cost.multiply_adds, working))
    return found


def steps_of_all(each: Sequence[Sequence[Block]], options: Options = DEFAULT) -> list[list[Step]]:
    """The steps by which :func:`gramians` contracts the blocks of each of several parameters."""
    found = [steps(blocks, options) for blocks in each]
    for n in groups_of(each, options).joined.values():
        found[n] = [replace(step, plan=WITH_WEIGHT, multiply_adds=0, bytes=0) for step in found[n]]
    return found


def gramian(blocks: Sequence[Block], options: Options = DEFAULT) -> Tensor:
    """``J Jᵀ [K, B, K, B]`` of one parameter, ``J`` the sum of its ``blocks``; exactly symmetric."""
    return symmetric(added(_shares(merge(blocks), options)))


def _shares(blocks: Sequence[Block], options: Options) -> Iterator[Tensor]:
    for index, u in enumerate(blocks):
        yield contract(u, u, options)
        for v in blocks[index + 1 :]:
            share = contract(u, v, options)
            yield share + share.permute(2, 3, 0, 1)


@dataclass(frozen=True)
class Groups:
    """A division of parameters into groups that are contracted together."""

    joined: Mapping[int, int]  # positions of weights, and of the biases that cost no product of their own
    short: Sequence[int]  # positions of those whose rows are so short that many are multiplied at once

    def without_short(self, count: int) -> tuple[list[int], Groups]:
        """The positions of the others among so many parameters, and their groups, by place among them."""
        short = {*self.short}
        rest = [n for n in range(count) if n not in short]
        place = {n: index for index, n in enumerate(rest)}
        return rest, Groups({place[n]: place[bias] for n, bias in self.joined.items()}, ())


def groups_of(each: Sequence[Sequence[Block]], options: Options = DEFAULT) -> Groups:
    """The parameters that :func:`gramians` contracts together."""
    joined = {
        n: bias
        for n, bias in biased(each).items()
        if plans(u := _only(each[n]), u)[0][0].name == "pairwise" and takes_bias(u, _limits(u, u, options))
    }
    short = [n for n, blocks in enumerate(each) if is_short(blocks)]
    if short and joined:
        biases = {*joined.values()}
        short = [n for n in short if n not in biases]
    return Groups(joined, short)


def gramians(each: Sequence[Sequence[Block]], options: Options = DEFAULT, groups: Groups | None = None
             ) -> Iterator[Tensor]:  # fmt: skip
    """Shares ``[K, B, K, B]`` that add up to the Gramian of several parameters, symmetric but for rounding.

    A bias whose rows are the very cotangents of its weight costs no product of its own. ``groups`` are
    those of :func:`groups_of`, if they are known.
    """
    groups = groups or groups_of(each, options)
    for n in groups.joined:
        u = _only(each[n])
        yield with_bias(u, _limits(u, u, options).dtype)
    if groups.short:
        yield short_rows([block for n in groups.short for block in each[n]], options)
    done = {*groups.joined, *groups.joined.values(), *groups.short}
    for n, blocks in enumerate(each):
        if n not in done:
            yield (
                contract(blocks[0], blocks[0], options)
                if len(blocks) == 1
                else added(_shares(merge(blocks), options))
            )


def _only(blocks: Sequence[Block]) -> Outer:
    (block,) = blocks
    assert isinstance(block, Outer)
    return block


def cross(left: Sequence[Block], right: Sequence[Block], options: Options = DEFAULT) -> Tensor:
    """``J₁ J₂ᵀ [K₁, B₁, K₂, B₂]`` of one parameter, for two Jacobians of perhaps other samples."""
    right = merge(right)
    return added(contract(u, v, options) for u in merge(left) for v in right)


def contract(u: Block, v: Block, options: Options = DEFAULT) -> Tensor:
    """Inner products of all rows of two blocks of one parameter, ``[K₁, B₁, K₂, B₂]``."""
    if swapped(u, v):
        return contract(v, u, options).permute(2, 3, 0, 1)
    return plans(u, v)[0][0].run(u, v, _limits(u, v, options))


def squared_norms(blocks: Sequence[Block], options: Options = DEFAULT) -> Tensor:
    """The diagonal of :func:`gramian`, ``[K, B]``, without the rest of it."""
    total: Tensor | float = 0.0
    blocks = merge(blocks)
    for index, u in enumerate(blocks):
        for v in blocks[index:]:
            left, right = (v, u) if swapped(u, v) else (u, v)
            share = diagonals.diagonal(left, right, _limits(u, v, options))
            total = total + (share if u is v else 2 * share)
    assert isinstance(total, Tensor)
    return total


def _limits(u: Block, v: Block, options: Options) -> Limits:
    tensors = _tensors(u) if u is v else (*_tensors(u), *_tensors(v))
    return limits(options, tensors[0], *[x.dtype for x in tensors])


def _tensors(block: Block) -> tuple[Tensor, ...]:
    """The factors of a block that are not indices."""
    if isinstance(block, Outer):
        return block.c, block.a
    if isinstance(block, Dense):
        return (block.values,)
    return (block.c,) if isinstance(block, Lookup) else (block.points, block.windows)
