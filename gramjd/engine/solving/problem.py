"""The problem that an engine solves: one output to differentiate with respect to parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gramjd import gramians
from gramjd.engine.analysis.graph import Graph
from gramjd.engine.recording.recorded import CallMark, OpMark
from gramjd.engine.sharded import Lockstep
from gramjd.internals import dtypes_of


@dataclass(frozen=True)
class Problem:
    """An output, its graph, and the parameters whose blocks are wanted."""

    output: Tensor
    batch_dim: int | None
    graph: Graph
    parameters: Mapping[str, Tensor]  # by name
    lockstep: Lockstep | None = None  # where parameters are sharded over ranks

    @cached_property
    def samples(self) -> int:
        """``B``, 1 without a batch dimension."""
        return 1 if self.batch_dim is None else self.output.shape[self.batch_dim]

    @cached_property
    def objectives(self) -> int:
        """The number ``K`` of objectives per sample."""
        return gramians.rows_first(self.output, self.batch_dim).shape[0]

    @cached_property
    def is_opaque(self) -> bool:
        """Whether the graph has nodes of which nothing can be proven for the next step: :func:`is_opaque`."""
        return True in [is_opaque(node, self.batch_dim) for node in self.graph.nodes]

    @cached_property
    def fewest_digits(self) -> torch.dtype:
        """The dtype of the fewest digits that anything in the graph was computed in."""
        dtypes = {self.output.dtype, *dtypes_of(self.graph.order)}
        floating = [dtype for dtype in dtypes if dtype.is_floating_point]
        return max(floating, key=lambda dtype: torch.finfo(dtype).eps)


def is_opaque(node: Any, batch_dim: int | None) -> bool:
    """Whether a node's blocks are exact depends on the data, so that they are verified in each step.

    Those of a call that is replayed as a whole, or of an op without a rule that may take all samples at once.
    """
    mark = node.record
    if isinstance(mark, CallMark):
        return True
    return batch_dim is not None and mark.record.is_opaque and mark.replay is None


def is_fused(node: Any) -> bool:
    """Whether a node is of an op whose uses come from a replay."""
    return isinstance(node.record, OpMark) and node.record.replay is not None
