"""One output to differentiate, and what is remembered of its like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gramjd.engine.graph import Graph
from gramjd.engine.layouts import ZERO, Layout
from gramjd.engine.marks import OpMark
from gramjd.engine.replay import Cotangents, Replayed
from gramjd.engine.sharded import Lockstep

Layouts = Sequence[Layout | None]  # of the outputs of a node; None: samples are mixed, or it has none


@dataclass
class Plan:
    """What was measured on the first graph of a signature, and holds for the next ones."""

    layouts: list[Layouts] | None = None  # of each node
    mixed: set[int] = field(default_factory=set)  # ids of parameters whose uses mix samples
    ways: dict[int, str] = field(default_factory=dict)  # of each parameter, by id
    causes: dict[int, str] = field(default_factory=dict)  # why it did not go an earlier way
    checked: bool = False


def is_fused(node: Any) -> bool:
    """Is it of an op whose uses come from a replay?"""
    return isinstance(node.record, OpMark) and node.record.replay is not None


@dataclass
class Task:
    """One output to differentiate, with respect to ``parameters``."""

    output: Tensor
    batch_dim: int | None
    graph: Graph
    parameters: dict[str, Tensor]  # by name
    plan: Plan
    lockstep: Lockstep | None = None  # where parameters are sharded over ranks
    cotangents: list[Cotangents] = field(default_factory=list)  # of each node
    layouts: list[Layouts] = field(default_factory=list)
    precisions: list[torch.dtype | None] = field(default_factory=list)  # of a node's op, if replayed
    places: list[int | None] = field(default_factory=list)  # of a node in the user's forward, likewise
    replays: list[Replayed] = field(default_factory=list)  # kept alive

    @property
    def samples(self) -> int:
        """``B``, 1 without a batch dimension."""
        return 1 if self.batch_dim is None else self.output.shape[self.batch_dim]

    def is_unbatched(self, node: int) -> bool:
        """Are all arguments of a use the same for all samples?"""
        mark = self.graph.nodes[node].record
        return isinstance(mark, OpMark) and mark.unbatched

    def canonical(self, node: int) -> Cotangents:
        """Cotangents of the outputs of a node as ``[K, B, ...]``, where they have a layout."""
        return [
            None if c is None or layout is None or layout is ZERO else
            c.unsqueeze(1) if self.batch_dim is None else layout.cotangents(c, self.samples)
            for c, layout in zip(self.cotangents[node], self.layouts[node], strict=True)
        ]  # fmt: skip
