"""The part of a problem in one region: nodes with their cotangents, fused ops as the nodes of a replay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gramjd.engine.analysis.layouts import ZERO, Layout, measure
from gramjd.engine.recording.nodes import Cotangents
from gramjd.engine.recording.recorded import OpMark
from gramjd.engine.solving.passes import Passes, rounding_of
from gramjd.engine.solving.problem import Problem, is_fused, is_opaque
from gramjd.engine.solving.program import Layouts, Pattern
from gramjd.engine.solving.projected import Probed
from gramjd.engine.solving.replay import Replayed, replay
from gramjd.rounding import tolerance
from gramjd.uses.use import roots

NOISE = 0.2  # relative differences above it are no rounding


@dataclass(frozen=True)
class Part:
    """The nodes of one region, in the order of the forward."""

    problem: Problem
    region: Sequence[int]  # indices of its nodes in the graph
    parameters: Mapping[str, Tensor]  # by name
    nodes: Sequence[Any]
    places: Sequence[int]  # of each node among those of the region; of a replay's node that of the op
    cotangents: Sequence[Cotangents]  # of each node
    probed: Sequence[Sequence[Probed | None]] = ()  # by the first weighted pass, where layouts are measured
    precisions: Sequence[torch.dtype | None] = ()  # of ops replayed, which autocast may have rounded for
    causes: Mapping[int, str] = field(default_factory=dict)  # why ops could not be replayed, by parameter id
    replays: Sequence[Tensor] = ()  # kept alive
    values: Sequence[Sequence[Tensor]] = ()  # that the nodes saved, where others are taken in their place

    @property
    def is_replayed(self) -> bool:
        """Whether some nodes are those of replays."""
        return any(precision is not None for precision in self.precisions)

    @property
    def is_opaque(self) -> bool:
        """Whether there is a node of which nothing can be proven for the next step."""
        return True in [is_opaque(node, self.problem.batch_dim) for node in self.nodes]

    def precision(self, node: int) -> torch.dtype | None:
        """The precision of the replayed op of a node; ``None`` for a node of the user's forward."""
        return self.precisions[node] if self.precisions else None

    def is_batch_independent(self, node: int) -> bool:
        """Whether all arguments of a use are batch-independent."""
        mark = self.nodes[node].record
        return isinstance(mark, OpMark) and mark.batch_independent

    def is_among(self, node: int, opened: frozenset[int]) -> bool:
        """Whether a node is one of some of the graph's."""
        return self.precision(node) is None and self.region[self.places[node]] in opened

    def pattern(self, layouts: Sequence[Layouts]) -> Pattern:
        """The layouts of all outputs with samples; besides the recorded uses, blocks depend only on these.

        A single sample is a kind of its own: wherever samples lie among the arguments, one is right.
        """
        alone = ["alone"] if self.problem.batch_dim is not None and self.problem.samples == 1 else []
        kinds = [(*alone, *[_kind(layout) for layout in mine]) for mine in layouts]
        marks = [node.record for node in self.nodes]
        ops = [mark.record.call.op if isinstance(mark, OpMark) else mark.names for mark in marks]
        return frozenset(zip(self.places, ops, kinds, strict=True))

    def canonical(self, node: int, layouts: Layouts) -> Cotangents:
        """Cotangents of the outputs of a node as ``[K, B, ...]``, where they have a layout."""
        samples, batched = self.problem.samples, self.problem.batch_dim is not None
        return [
            None if c is None or layout is None or layout is ZERO else
            layout.cotangents(c, samples) if batched else c.unsqueeze(1)
            for c, layout in zip(self.cotangents[node], layouts, strict=True)
        ]  # fmt: skip


def _kind(layout: Layout | None) -> str:
    return "none" if layout is None else "zero" if layout is ZERO else type(layout).__name__


def part_of(
    problem: Problem,
    region: Sequence[int],
    parameters: Mapping[str, Tensor],
    nodes: Sequence[Any],
    cotangents: Sequence[Cotangents],
    passes: Passes,
    measuring: bool,
    replayed: bool,
) -> Part:
    """The part of a region.

    Args:
        problem: all of it.
        region: indices of its nodes.
        parameters: of the region, by name.
        nodes: of the region.
        cotangents: at these nodes.
        passes: weighted backward passes.
        measuring: whether the layouts of the nodes are not known.
        replayed: whether some nodes are of ops that only a replay shows the inside of.
    """
    probed = passes.first.of(region) if measuring else ()
    part = Part(problem, region, parameters, nodes, range(len(nodes)), cotangents, probed)
    return _replayed(part, passes) if replayed else part


def _replayed(part: Part, passes: Passes) -> Part:
    """The part with the nodes of its replay in the place of every fused op."""
    nodes: list[Any] = []
    cotangents: list[Cotangents] = []
    probed: list[Sequence[Probed | None]] = []
    places: list[int] = []
    precisions: list[torch.dtype | None] = []
    replays: list[Tensor] = []
    causes: dict[int, str] = {}
    for index, (node, cs) in enumerate(zip(part.nodes, part.cotangents, strict=True)):
        try:
            found = _inside(part, passes, index)
        except (ValueError, RuntimeError) as error:  # a slower strategy is left
            found = _as_it_is(part, index)
            for slot in node.record.record.slots:
                causes = {**dict.fromkeys(roots(slot.source), str(error)), **causes}
        nodes += found.nodes
        cotangents += found.cotangents
        probed += found.probed
        precision = None
        if found.graph is not None:
            # under autocast the op computed with fewer digits than its replay does
            precision = next(c.dtype for c in cs if c is not None)
            replays.append(found.graph)
        places += [index] * len(found.nodes)
        precisions += [precision] * len(found.nodes)
    return Part(part.problem, part.region, part.parameters, nodes, places, cotangents,
                probed if part.probed else (), precisions, causes, replays)  # fmt: skip


def _as_it_is(part: Part, index: int) -> Replayed:
    """A node of a part in the form of a replay."""
    probed = part.probed[index] if part.probed else []
    return Replayed([part.nodes[index]], [part.cotangents[index]], [probed])


def _inside(part: Part, passes: Passes, index: int) -> Replayed:
    """The replay of a node of a fused op that cotangents come to; any other node as it is.

    Raises:
        ValueError, RuntimeError: the op cannot be replayed.
    """
    node, cs = part.nodes[index], part.cotangents[index]
    given = part.probed[index] if part.probed else None
    if not is_fused(node):
        return _as_it_is(part, index)
    if given is not None and _is_noise(part, passes, index):
        return Replayed([node], [[None] * len(cs)], [given])
    return _as_it_is(part, index) if all(c is None for c in cs) else replay(node, cs, given)


def _is_noise(part: Part, passes: Passes, index: int) -> bool:
    """Whether all cotangents of a node are mere rounding."""
    pairs = zip(part.cotangents[index], part.probed[index], strict=True)
    return all(
        c is None
        or first is None
        or (
            measure(first.alike(c), first.values, passes.v)[1] > tolerance(c.dtype)
            and rounding_at(part, passes, index, which) > NOISE
        )
        for which, (c, first) in enumerate(pairs)
    )


def rounding_at(part: Part, passes: Passes, index: int, which: int) -> float:
    """The rounding of a cotangent, relative to it; inside a replay, that of what the op replayed got."""
    place = part.places[index]
    again = passes.again.of(part.region)[place]
    if part.precision(index) is not None:
        first = passes.first.of(part.region)[place]
        return rounding_of(*(_joined(cs) for cs in (first, again)))
    one, other = part.probed[index][which], again[which]
    return 0.0 if one is None or other is None else rounding_of(one.values, other.values)


def _joined(cs: Sequence[Probed | None]) -> Tensor:
    return torch.cat([c.values.flatten() for c in cs if c is not None])
