"""Whether the blocks of a parameter add up to autograd's own gradient of a weighted objective."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gramjd.blocks import Block
from gramjd.engine.solving.lay_out import ROUNDINGS
from gramjd.engine.solving.part import NOISE
from gramjd.engine.solving.passes import Pass, Passes, rounding_of
from gramjd.rounding import tolerance


def agrees(
    passes: Passes,
    name: str,
    blocks: Sequence[Block],
    others: bool = False,
    precision: torch.dtype | None = None,
) -> bool:
    """Whether ``Jᵀ v`` from the blocks is autograd's own, up to rounding.

    Args:
        passes: weighted passes that gave the gradients of parameters.
        name: of the parameter.
        blocks: its blocks.
        others: whether the weights are others than those that layouts were measured by, which tell too
            much where layouts follow from them entry by entry.
        precision: what is rounded to; the gradient's own by default.
    """
    v, weighted = (passes.others, passes.independent) if others else (passes.v, passes.first)
    wanted = weighted.gradients.get(name)
    if wanted is None:
        return not blocks
    weights, size = v.to(wanted.values), wanted.size
    precision = precision or wanted.values.dtype
    most = tolerance(precision) * size
    off = wanted.norm(wanted.less(blocks, weights))
    if off <= most:
        return True
    slack = 64 * torch.finfo(precision).eps * _size_of_rounding(blocks, weights, weighted)
    if off <= most + slack:
        return True
    if off > NOISE * size:
        return False
    # its own may be small by chance where it has few entries
    alone = [each.gradients[name].values for each in (passes.first, passes.again)]
    rounding = max(rounding_of(*alone), passes.rounding)
    return off <= ROUNDINGS * rounding * size + slack


def _size_of_rounding(blocks: Sequence[Block], weights: Tensor, weighted: Pass) -> float:
    """The size of a gradient that is nothing but rounding (an attention's key bias): that of the whole."""
    bound = sum(float(block.bound(weights.abs())) for block in blocks)
    return bound + max(gradient.size for gradient in weighted.gradients.values())
