"""Whether a Gramian agrees with gradients of weighted objectives: ``wᵀ (J Jᵀ) w = ‖Jᵀ w‖²`` for random ``w``.

Proofs compare gradients, ``Jᵀ w``; no plan of a contraction takes part in these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite, prod

import torch
from torch import Tensor

from gramjd import contraction
from gramjd.blocks import Block, Conv, Dense, Lookup, Outer, flatten, is_zero, unflatten
from gramjd.complexes import real_block
from gramjd.contraction.options import SMALL_FLOATS, Options, rounds_float32
from gramjd.rounding import own_precision, tolerance

INCONSISTENT = (
    "The Gramian with respect to {} does not agree with the gradients of weighted objectives, though these "
    "agree with autograd's. This is an error of gramjd, or of a user's rule; please report the model. "
)
MOST = 1024  # rows: a second Gramian of more takes much time and memory
LARGEST = 2**22  # entries of a parameter, whose gradient is memory that a first call has no room for
WORK = 2**27  # multiply-adds for a parameter with one block: the plans are tested, and large layers take time


@torch.no_grad()
@own_precision
def is_consistent(each: Sequence[Sequence[Block]], w: Tensor, options: Options) -> bool:
    """Whether the Gramian of parameters agrees with their gradients of objectives weighted by ``w [K, B]``.

    ``True`` where to know that would take too much time or memory.

    Args:
        each: the blocks of each parameter, which the gradients come from, too.
        w: weights, none close to zero.
        options: of the contraction.
    """
    given = [[real_block(block) for block in mine if not is_zero(block)] for mine in each]
    given = [mine for mine in given if mine and prod(mine[0].shape) <= LARGEST]
    given = [mine for mine in given if len(mine) > 1 or _work(mine, options) <= WORK]
    largest = max([prod(mine[0].shape) for mine in given], default=0)
    budget = options.memory_budget
    if not given or w.numel() > MOST or (budget is not None and 16 * largest > budget):
        return True
    share = contraction.sum_of(contraction.gramians(given, options))
    assert share is not None
    gramian, weights = share.reshape(w.numel(), -1).double(), w.flatten().to(share.device).double()
    off = float(weights @ gramian @ weights) - sum(_squared_norm(mine, w) for mine in given)
    size, lost = float(weights.abs() @ gramian.abs() @ weights.abs()), _tolerance(given)  # of what may cancel
    if not isfinite(off) or abs(off) <= lost * size:  # NaN has an error of its own
        return True
    # uses may cancel each other, so that the Gramian is nothing but the rounding of their shares
    if abs(off) > lost * (size + sum(_size_of_shares(mine, w) for mine in given)):
        return False
    # what cancels in one parameter would hide errors of the others
    return len(given) == 1 or all(is_consistent([mine], w, options) for mine in given)


def _work(blocks: Sequence[Block], options: Options) -> int:
    """The multiply-adds of the contraction of one parameter."""
    return sum(step.multiply_adds for step in contraction.steps(blocks, options))


def _tolerance(given: Sequence[Sequence[Block]]) -> float:
    """The tolerance of contractions of some blocks."""
    tensors = flatten(given)[0]
    dtypes = {t.dtype for t in tensors if t.is_floating_point()}
    if torch.float32 in dtypes and rounds_float32(tensors[0].device):
        dtypes.add(torch.bfloat16)
    return max(map(tolerance, dtypes))


def _wide(block: Block) -> Block:
    """A block of small floats in float32: a sum of many terms in few digits would be wrong."""
    tensors, structure = flatten([[block]])
    return unflatten(structure, [t.float() if t.dtype in SMALL_FLOATS else t for t in tensors])[0][0]


def _weighted(block: Block, w: Tensor) -> Tensor:
    """``Jᵀ w``."""
    wide = _wide(block)
    return wide.vjp(w.to(flatten([[wide]])[0][0]))


def _size_of_shares(blocks: Sequence[Block], w: Tensor) -> float:
    """What ``‖Jᵀ w‖²`` of one parameter would be if the shares of its blocks' positions did not cancel.

    Of shares that are orthogonal to each other: the sum of their norms grows with the number of positions
    beside it, and would hide wrong Gramians.
    """
    return sum(_squared_shares(_wide(block), w) ** 0.5 for block in blocks) ** 2


def _squared_shares(block: Block, w: Tensor) -> float:
    """The sum of the squared norms of each position's share in ``Jᵀ w``."""
    if isinstance(block, Dense):
        squares = block.matrix().double().square().sum(1).view(block.rows)
    elif isinstance(block, Lookup):
        squares = block.c.double().square().sum((2, 3))
    else:
        # the features are summed before a convolution is unfolded, which would take their multiple of memory
        c, a = _squares(block)
        squares = (c.sum(-1) * a.sum(-1)).sum((2, 3))
    return float((squares * w.to(squares).square()).sum())


def _squares(block: Outer | Conv) -> tuple[Tensor, Tensor]:
    """The squared entries of both factors, ``[K, B, T, G, features]``."""
    if isinstance(block, Conv):
        points, windows = (x.double().square().sum(4, keepdim=True) for x in block.factors)
        unfolded = replace(block, points=points, windows=windows).outer()
        return unfolded.c, unfolded.a
    return block.c.double().square(), block.a.double().square()


def _squared_norm(blocks: Sequence[Block], w: Tensor) -> float:
    """The squared norm of ``Jᵀ w`` of one parameter."""
    first, *others = [_weighted(block, w) for block in blocks]
    gradient = sum(others, first)
    # torch adds up many float32 numbers with an error of 1e-3
    return sum(float(part.double().square().sum()) for part in gradient.flatten().split(2**18))
