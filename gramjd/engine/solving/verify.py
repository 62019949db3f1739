"""Whether the blocks of a parameter add up to autograd's own gradient of a weighted objective."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gramjd.blocks import Block, Dense
from gramjd.engine.solving.lay_out import ROUNDINGS
from gramjd.engine.solving.part import NOISE
from gramjd.engine.solving.passes import Passes, rounding_of
from gramjd.rounding import tolerance

_VECTORS = 8  # at random, that gradients are multiplied by


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
    wanted = weighted.gradients[name]
    if wanted is None:
        return not blocks
    weights, left, size = v.to(wanted.dtype), wanted[0], weighted.sizes[name]
    precision = precision or wanted.dtype
    most = tolerance(precision) * size
    if _looks_equal(blocks, weights, left):
        return True
    for block in blocks:
        left = left - block.vjp(weights)
    off = float(left.norm())
    if off <= most:
        return True
    # A gradient that is nothing but rounding (an attention's key bias) is noise of the whole's size.
    bound = sum(float(block.bound(weights.abs())) for block in blocks)
    slack = 64 * torch.finfo(precision).eps * (bound + max(weighted.sizes.values()))
    if off <= most + slack:
        return True
    if off > NOISE * size:
        return False
    # its own may be small by chance where it has few entries
    alone = passes.first.gradients[name], passes.again.gradients[name]
    rounding = max(rounding_of(*alone), passes.rounding)
    return off <= ROUNDINGS * rounding * size + slack


def _looks_equal(blocks: Sequence[Block], weights: Tensor, gradient: Tensor) -> bool:
    """Whether products of ``Jᵀ w`` and of the gradient with random vectors are equal.

    That the difference is much larger than its products has a probability of about 1e-7 to be a tenth
    of what they say, and none to be nothing. Costs a fraction of the weight gradient that ``vjp`` is.
    """
    grains = {block.grain for block in blocks if not isinstance(block, Dense)}
    if len(grains) != 1 or max(grains) < 2 * _VECTORS:
        return False
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(max(grains), _VECTORS, generator=generator).to(gradient)
    wanted = gradient.reshape(-1, len(y)) @ y
    left = wanted - sum(block.sketch(weights, y) for block in blocks)
    return float(left.norm()) <= tolerance(gradient.dtype) * float(wanted.norm())
