"""The decisions for the graphs of one structure, and what is proven of them. All of it is frozen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from gramjd.engine.analysis.coverage import uncovered
from gramjd.engine.analysis.layouts import Layout
from gramjd.engine.analysis.regions import Region, regions_of
from gramjd.engine.recording.recorded import CallMark
from gramjd.engine.solving.problem import Problem, is_fused

# Of the nodes of a region: the place of each in the user's forward, its op, and the kind of its layouts.
Pattern = frozenset[tuple[int, Hashable, tuple[str, ...]]]
Layouts = Sequence[Layout | None]  # of the outputs of a node; None: cross-sample dependence, or it has none


@dataclass(frozen=True)
class Program:
    """The decisions by which each later graph of one structure is solved.

    Nothing in it depends on data: ``complete`` says that blocks of these strategies, in right layouts, add
    up to autograd's gradients.
    """

    regions: Sequence[Region] = ()
    waiting: frozenset[int] = frozenset()  # regions with nodes that are replayed, after the backward pass
    outside: frozenset[int] = frozenset()  # ids of leaves that are used outside of recorded ops
    opened: frozenset[int] = frozenset()  # nodes of derived tensors that are, too
    strategies: Mapping[int, str] = field(default_factory=dict)  # of each parameter, by id
    causes: Mapping[int, str] = field(default_factory=dict)  # why no better strategy is exact
    late: frozenset[int] = frozenset()  # regions that wait for the end of the backward pass
    patterns: Mapping[int, frozenset[Pattern]] = field(default_factory=dict)  # verified, of each region
    complete: bool = False

    def __str__(self) -> str:
        """Describe the strategy for each parameter, and the number of independent parts of the graph."""
        found = Counter(self.strategies.values())
        each = [f"{name} for {count} parameter{'s' * (count > 1)}" for name, count in found.most_common()]
        regions = f"{len(self.regions)} region{'s' * (len(self.regions) != 1)} of the graph"
        end = len(self.waiting | self.late)
        last = f", {end} of them after the backward pass" if end else ""
        return f"Strategies: {', '.join(each) or 'none'}; {regions}{last}."

    @staticmethod
    def of(problem: Problem) -> Program:
        """Make the decisions that follow from the graph alone."""
        nodes, regions = problem.graph.nodes, tuple(regions_of(problem.graph.nodes))
        outside, opened = uncovered(problem.output)
        places = frozenset(index for index, node in enumerate(nodes) if node in opened)
        waits = [isinstance(node.record, CallMark) or is_fused(node) for node in nodes]
        waiting = frozenset(n for n, region in enumerate(regions) if any(waits[i] for i in region.nodes))
        causes = dict.fromkeys(outside, "it was used outside of the calls of registered modules")
        return Program(regions, waiting, frozenset(outside), places, causes=causes)


@dataclass(frozen=True)
class Separation:
    """The progress of the proof that samples are independent, for one separation key and its layouts."""

    layouts: Mapping[int, Sequence[Layouts]]  # of the nodes of each region, but for fused ops
    samples: int
    passed: int  # patterns of samples
    needed: int
    failed: bool = False  # in the next pattern: with these layouts it would fail again
    displaced: bool = False  # are samples sliced, joined or padded? Then other sizes need another proof
    everywhere: frozenset[Hashable] = frozenset()  # outputs of such nodes that NaN from any samples fills

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left to prove."""
        return not self.failed and self.passed >= self.needed


@dataclass(frozen=True)
class Known:
    """The proofs of earlier graphs that hold for this one, and the keys under which they are kept."""

    structure: Hashable = None
    key: Hashable = None  # of the separation, for graphs that keep samples in whole dimensions
    exact: Hashable = None  # the same for any graph
    program: Program | None = None
    separation: Separation | None = None
    calls: int = 0  # of this structure since it was proven, before this one
    audit: str = ""  # is this call an audit of what is trusted? What its error says, then
    unlisted: str = ""  # why the graph has no separation key

    @cached_property
    def layouts(self) -> Mapping[int, Sequence[Layouts]] | None:
        """The layouts of the nodes of each region, if it is proven that no data could change them."""
        return self.separation.layouts if self.separation is not None and self.separation.is_whole else None

    @property
    def is_complete(self) -> bool:
        """Whether it is proven that the blocks of the program add up to the gradients."""
        return self.program is not None and self.program.complete

    def is_steady(self, batch_dim: int | None) -> bool:
        """Whether nothing is left to prove or to audit in this call."""
        return self.is_complete and (batch_dim is None or self.layouts is not None) and not self.audit


@dataclass(frozen=True)
class Solution:
    """The findings of a call, for later calls with the same structure."""

    program: Program
    separation: Separation | None = None
