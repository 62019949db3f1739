"""One output to differentiate, and what is remembered of its like."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gramjd import gramians
from gramjd.engine.analysis.graph import Graph
from gramjd.engine.analysis.layouts import ZERO, Layout
from gramjd.engine.analysis.regions import Region
from gramjd.engine.recording.nodes import Cotangents
from gramjd.engine.recording.recorded import OpMark
from gramjd.engine.sharded import Lockstep
from gramjd.engine.solving.replay import Replayed

# Of the nodes of a region: the place of each in the user's forward, its op, and the kind of its layouts.
Pattern = frozenset[tuple[int, Hashable, tuple[str, ...]]]
Layouts = Sequence[Layout | None]  # of the outputs of a node; None: cross-sample dependence, or it has none


@dataclass(frozen=True)
class Separation:
    """How far it is proven that samples are apart in graphs of one separation key, in these layouts."""

    layouts: dict[int, list[Layouts]]  # of the nodes of each region, but for fused ops
    samples: int
    passed: int  # patterns of samples
    needed: int

    @property
    def is_whole(self) -> bool:
        return self.passed >= self.needed


@dataclass
class Plan:
    """What is known of a graph from earlier ones of its structure, and what this call finds out."""

    regions: list[Region] = field(default_factory=list)
    layouts: dict[int, list[Layouts]] = field(default_factory=dict)  # of the nodes of each region
    late: set[int] = field(default_factory=set)  # regions that wait for the end of the backward pass
    mixed: set[int] = field(default_factory=set)  # ids of parameters whose uses have cross-sample dependence
    flattened: dict[int, set[int]] = field(default_factory=dict)  # sizes that say so if samples have them
    sizes: set[int] = field(default_factory=set)  # of samples and their positions, in one dimension
    strategies: dict[int, str] = field(default_factory=dict)  # of each parameter, by id
    causes: dict[int, str] = field(default_factory=dict)  # why an earlier strategy failed
    outside: set[int] | None = None  # ids of leaves that are used outside of recorded ops; None: not known
    opened: set[int] = field(default_factory=set)  # nodes of derived tensors that are, too
    patterns: dict[int, set[Pattern]] = field(default_factory=dict)  # of layouts, verified, of each region
    complete: bool = False  # is it proven that blocks in right layouts add up to the gradients?
    separation: Separation | None = None  # what is proven of the layouts
    calls: int = 0  # of this structure since it was proven, before this one
    audit: str = ""  # is this call an audit of what is trusted? What its error says, then
    seen: bool = True  # did every recorded use take part, with a cotangent that is not zero?
    lasting: bool = True  # would the layouts found be the same in another graph of the separation key?
    unlisted: str = ""  # why the graph has no separation key

    def is_steady(self, batch_dim: int | None) -> bool:
        """Whether nothing is left to prove or to audit in this call."""
        apart = batch_dim is None or (self.separation is not None and self.separation.is_whole)
        return self.complete and apart and not self.audit

    def trusted(self) -> Plan:
        """What of it may be taken over to the next call, as a copy."""
        patterns = {region: set(each) for region, each in self.patterns.items()}
        return Plan(self.regions, {}, set(self.late), strategies=dict(self.strategies),
                    causes=dict(self.causes), outside=self.outside, opened=self.opened, patterns=patterns,
                    complete=self.complete)  # fmt: skip


def is_fused(node: Any) -> bool:
    """Whether a node is of an op whose uses come from a replay."""
    return isinstance(node.record, OpMark) and node.record.replay is not None


def _kind(layout: Layout | None) -> str:
    return "none" if layout is None else "zero" if layout is ZERO else type(layout).__name__


@dataclass
class Task:
    """One output to differentiate, with respect to ``parameters``; or what one region has of it."""

    output: Tensor
    batch_dim: int | None
    graph: Graph
    parameters: dict[str, Tensor]  # by name
    plan: Plan
    lockstep: Lockstep | None = None  # where parameters are sharded over ranks
    region: int | None = None
    cotangents: list[Cotangents] = field(default_factory=list)  # of each node
    layouts: list[Layouts] = field(default_factory=list)
    precisions: list[torch.dtype | None] = field(default_factory=list)  # of a node's op, if replayed
    places: list[int] = field(default_factory=list)  # of a node, or of the op replayed, in the user's forward
    met: set[Layout | None] = field(default_factory=set)  # see layouts_met; also those that may be rounding
    replays: list[Replayed] = field(default_factory=list)  # kept alive

    @property
    def samples(self) -> int:
        """``B``, 1 without a batch dimension."""
        return 1 if self.batch_dim is None else self.output.shape[self.batch_dim]

    @property
    def objectives(self) -> int:
        """``K``, per sample."""
        return gramians.rows_first(self.output, self.batch_dim).shape[0]

    def of_region(self, number: int, cotangents: list[Cotangents]) -> Task:
        """The part of a region, given the cotangents at its nodes."""
        region, all_nodes = self.plan.regions[number], self.graph.nodes
        graph = self.graph.of_nodes([all_nodes[i] for i in region.nodes])
        mine = {name: p for name, p in self.parameters.items() if id(p) in region.parameters}
        return Task(self.output, self.batch_dim, graph, mine, self.plan, self.lockstep, number, cotangents)

    def is_batch_independent(self, node: int) -> bool:
        """Whether all arguments of a use are batch-independent."""
        mark = self.graph.nodes[node].record
        return isinstance(mark, OpMark) and mark.batch_independent

    def pattern(self) -> Pattern:
        """What blocks depend on besides the recorded uses: which outputs have samples, and in what layout."""
        kinds = [tuple([_kind(layout) for layout in mine]) for mine in self.layouts]
        marks = [node.record for node in self.graph.nodes]
        ops = [mark.record.call.op if isinstance(mark, OpMark) else mark.names for mark in marks]
        return frozenset(zip(self.places or range(len(ops)), ops, kinds, strict=True))

    def is_open(self, node: int) -> bool:
        """Whether an op that was not recorded used a derived tensor."""
        assert self.region is not None
        if self.precisions and self.precisions[node] is not None:  # of a replay
            return False
        place = self.places[node] if self.places else node
        return self.plan.regions[self.region].nodes[place] in self.plan.opened

    def layouts_met(self) -> set[Layout | None]:
        """The layouts of nodes; None for those that have none, though their arguments are of samples."""
        return {
            layout
            for node, mine in enumerate(self.layouts)
            for layout in mine
            if layout is not None or not self.is_batch_independent(node)
        }

    def canonical(self, node: int) -> Cotangents:
        """Cotangents of the outputs of a node as ``[K, B, ...]``, where they have a layout."""
        return [
            None if c is None or layout is None or layout is ZERO else
            c.unsqueeze(1) if self.batch_dim is None else layout.cotangents(c, self.samples)
            for c, layout in zip(self.cotangents[node], self.layouts[node], strict=True)
        ]  # fmt: skip
