"""The Gramian as a running sum, for blocks that are not kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gramjd import pytree
from gramjd.blocks import Block
from gramjd.jacobian import parts
from gramjd.jacobian.outputs import Output, Outputs
from gramjd.plan import Options


class Sum:
    """Adds up the shares of parameters in the Gramian of one output."""

    def __init__(self, output: Output, options: Options) -> None:
        self.outputs = Outputs([output], pytree.LEAF, output.samples)
        self.options = options
        self.total: Tensor | None = None

    def add(self, blocks: Mapping[Tensor, Sequence[Block]]) -> None:
        """Add the share of some parameters, given the blocks of each."""
        if not blocks:
            return
        part = parts.Part(list(blocks.values()), self.outputs.samples)
        which, like = range(len(blocks)), next(iter(blocks))
        share = parts.gramian([part], which, self.outputs.objectives, self.options, like)
        self.total = share if self.total is None else self.total + share

    def gramian(self) -> Tensor:
        """What they add up to, ``[*shape, *reversed(shape)]``."""
        assert self.total is not None
        found = self.outputs.square(self.total, self.outputs)
        assert isinstance(found, torch.Tensor)
        return found
