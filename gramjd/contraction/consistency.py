"""Whether a Gramian agrees with gradients of weighted objectives: ``wᵀ (J Jᵀ) w = ‖Jᵀ w‖²`` for random ``w``.

Proofs compare gradients, ``Jᵀ w``; no plan of a contraction takes part in these.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, prod

import torch
from torch import Tensor

from gramjd import contraction
from gramjd.blocks import Block, flatten, is_zero
from gramjd.complexes import real_block
from gramjd.contraction.options import Options
from gramjd.rounding import own_precision, tolerance

INCONSISTENT = (
    "The Gramian with respect to {} does not agree with the gradients of weighted objectives, though these "
    "agree with autograd's. This is an error of gramjd, or of a user's rule; please report the model. "
)
MOST = 1024  # rows; with more, the Gramian would take as long as all other proofs


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
    given = [mine for mine in given if mine]
    largest = max([prod(mine[0].shape) for mine in given], default=0)
    budget = options.memory_budget
    if not given or w.numel() > MOST or (budget is not None and 16 * largest > budget):
        return True
    share = contraction.sum_of(contraction.gramians(given, options))
    assert share is not None
    gramian, weights = share.reshape(w.numel(), -1).double(), w.flatten().double()
    off = float(weights @ gramian @ weights) - sum(_squared_norm(mine, w) for mine in given)
    size = float(weights.abs() @ gramian.abs() @ weights.abs())  # of what may cancel
    dtypes = [t.dtype for t in flatten(given)[0] if t.is_floating_point()]
    return not isfinite(off) or abs(off) <= max(map(tolerance, dtypes)) * size  # NaN has an error of its own


def _squared_norm(blocks: Sequence[Block], w: Tensor) -> float:
    """The squared norm of ``Jᵀ w`` of one parameter."""
    first, *others = blocks
    gradient = first.vjp(w.to(flatten([[first]])[0][0].dtype))
    for block in others:
        gradient = gradient + block.vjp(w.to(flatten([[block]])[0][0].dtype))
    # torch adds up many float32 numbers with an error of 1e-3
    return sum(float(part.double().square().sum()) for part in gradient.flatten().split(2**18))
