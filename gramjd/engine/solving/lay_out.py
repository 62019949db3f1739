"""Assigns the entries of a region's cotangents to samples, by measurement or by a proof.

What is equal in exact arithmetic differs by rounding, and by how much depends on what computed it (a
float32 normalisation inside a float64 model, autocast). So where a difference is small but not
negligible, the rounding itself is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import inf, prod

import torch
from torch import Tensor

from gramjd.engine.analysis.layouts import ZERO, Layout, Scattered, follows_samples, measure, owned
from gramjd.engine.recording.recorded import OpMark
from gramjd.engine.solving.part import NOISE, Part, rounding_at
from gramjd.engine.solving.passes import Passes
from gramjd.engine.solving.problem import is_fused
from gramjd.engine.solving.program import Layouts
from gramjd.engine.solving.projected import Probed
from gramjd.rounding import tolerance
from gramjd.uses.use import roots

ROUNDINGS = 8  # times the rounding of one pass that a difference, of several of them, may be
_FAR = 100  # the same, above which a difference is cross-sample dependence
_CLOSE = 6  # the same for a regular layout: what is above it takes per-row backward passes, exact anyhow

Sizes = Mapping[int, frozenset[int]]  # by id of a parameter


@dataclass(frozen=True)
class Finding:
    """The findings about the layouts of one or more outputs of uses."""

    met: frozenset[Layout | None] = frozenset()  # layouts; None for one that samples depend on each other in
    mixed: frozenset[int] = frozenset()  # ids of parameters whose uses have cross-sample dependence
    flattened: Sizes = field(default_factory=dict)  # sizes that say so, too, if samples elsewhere have them
    sizes: frozenset[int] = frozenset()  # of samples and their positions, in one dimension

    @staticmethod
    def of(all_of: Sequence[Finding]) -> Finding:
        """Combine several findings."""
        flattened: dict[int, frozenset[int]] = {}
        for each in all_of:
            for root, sizes in each.flattened.items():
                flattened[root] = flattened.get(root, frozenset()) | sizes
        return Finding(
            frozenset().union(*(each.met for each in all_of)),
            frozenset().union(*(each.mixed for each in all_of)),
            flattened,
            frozenset().union(*(each.sizes for each in all_of)),
        )


@dataclass(frozen=True)
class Laid:
    """The layouts of the nodes of a region, and what they are good for beyond this call."""

    layouts: Sequence[Layouts]
    finding: Finding
    seen: bool = True  # did every recorded use take part, with a cotangent that is not zero?
    lasts: bool = True  # would the layouts be the same in another graph of the separation key?
    scattered: bool = False  # did a sample's entries show by its weight alone?


_NOTHING = Finding()


def lay_out(part: Part, passes: Passes, known: Sequence[Layouts] | None) -> Laid:
    """The layouts of a region's nodes: those that are proven, or what the weighted passes show."""
    if part.problem.batch_dim is None:
        return _without_samples(part, passes)
    if known is not None:  # what was found of them did not make the call fail that proved them
        return Laid(known, _NOTHING)
    return _measured(part, passes)


def _measured(part: Part, passes: Passes) -> Laid:
    """The layouts that the weighted passes show."""
    found = [
        [_layout(part, passes, index, which) for which in range(len(cs))]
        for index, cs in enumerate(part.cotangents)
    ]
    layouts = [[layout for layout, _ in mine] for mine in found]
    finding = Finding.of([Finding(_met(part, layouts)), *(each for mine in found for _, each in mine)])
    return Laid(layouts, finding, *_use_beyond(part, layouts))


def _without_samples(part: Part, passes: Passes) -> Laid:
    """The layouts where there is no batch dimension: one sample."""
    given = passes.first.of(part.region) if passes.checking else []
    seen = all(c is None or bool(c.values.any()) for cs in given for c in cs)
    return Laid([[Layout(0)] * len(cs) for cs in part.cotangents], _NOTHING, seen)


def _use_beyond(part: Part, layouts: Sequence[Layouts]) -> tuple[bool, bool, bool]:
    """The validity of measured layouts: ``seen``, ``lasts`` and ``scattered`` of :class:`Laid`."""
    found, given = list(chain(*layouts)), chain(*part.cotangents)
    scattered = any(isinstance(layout, Scattered) for layout in found)
    seen = not any(layout is ZERO and c is not None for layout, c in zip(found, given, strict=True))
    # a single sample fits everywhere; the next batch may be scattered otherwise, and a replay succeed
    lasts = part.problem.samples > 1 and not scattered and not any(map(is_fused, part.nodes))
    return seen, seen and lasts, scattered


def _met(part: Part, layouts: Sequence[Layouts]) -> frozenset[Layout | None]:
    """The layouts of nodes; None for those that have none, though their arguments are of samples."""
    return frozenset(
        layout
        for node, mine in enumerate(layouts)
        for layout in mine
        if layout is not None or not part.is_batch_independent(node)
    )


def _layout(part: Part, passes: Passes, index: int, which: int) -> tuple[Layout | None, Finding]:
    """The layout of one output of a node, by weights of which two may be close: proven by others."""
    c, first = part.cotangents[index][which], part.probed[index][which]
    if c is None or first is None:
        return ZERO, Finding()
    shape = c.shape[1:]
    found = _regular(first.alike(c), first, shape, part, passes, index, which)
    if found is None and first.features:  # samples may lie in the dimension of the products
        first = passes.unprojected.first.of(part.region)[part.places[index]][which]
        assert first is not None
        found = _regular(c, first, shape, part, passes, index, which)
    layout, finding = found or _irregular(c, first.values, part, passes, index, which)
    if not isinstance(layout, Scattered) or passes.checking or part.is_replayed:
        return layout, finding
    other = passes.unprojected.independent.of(part.region)[index][which]
    if other is None:
        return None, finding
    off = layout.misfit(c, other.values, passes.others)
    if off > ROUNDINGS * tolerance(c.dtype) and not _is_rounding(off, ROUNDINGS, part, passes, index, which):
        return None, finding
    return layout, finding


def _regular(
    c: Tensor, first: Probed, shape: Sequence[int], part: Part, passes: Passes, index: int, which: int
) -> tuple[Layout, Finding] | None:
    """The layout of one output of a node that fits by the first weights, if samples lie in one dimension."""
    layout, off = measure(c, first.values, passes.v, last=not first.features)
    if layout is None or not _fits(off, c, part, passes, index, which):
        return None
    return layout, _sizes_of(layout, shape)


def _fits(off: float, c: Tensor, part: Part, passes: Passes, index: int, which: int) -> bool:
    """Whether a relative difference is no larger than the rounding of a right layout."""
    # in a mixed-precision subgraph, a weak dependence would hide behind the tolerance of few digits
    finest = min(c.dtype, part.problem.output.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    precision = part.precision(index) or finest
    return off <= tolerance(precision) or _is_rounding(off, _CLOSE, part, passes, index, which)


def _irregular(
    c: Tensor, first: Tensor, part: Part, passes: Passes, index: int, which: int
) -> tuple[Layout | None, Finding]:
    """The layout, if any, of an output that no regular one fits."""
    nearest, off = measure(c, first, passes.v)
    doubtful = off <= tolerance(part.problem.fewest_digits) or _is_rounding(
        off, _FAR, part, passes, index, which
    )
    # rounding, or a weak dependence between samples: per-row backward passes are exact for both
    finding = Finding(frozenset([nearest])) if doubtful else Finding()
    if part.is_batch_independent(index):
        return None, finding
    layout = None if doubtful else owned(c, first, passes.v)
    if layout is not None:
        return layout, finding
    noise = rounding_at(part, passes, index, which)
    mixed = _mixes(part, index, c, first, passes.v)
    if mixed and noise > NOISE:
        return ZERO, finding  # nothing but rounding: a running maximum, subtracted and added again
    if doubtful or _is_negligible(first, passes):
        return None, finding
    layout = owned(c, first, passes.v, min(NOISE, ROUNDINGS * noise))
    if layout is None and mixed:
        loosely = owned(c, first, passes.v, tolerance(part.problem.fewest_digits))
        return None, _dependence(part, index, first.shape) if loosely is None else finding
    return layout, finding


def _is_negligible(cotangent: Tensor, passes: Passes) -> bool:
    """Whether a cotangent can be rounding of larger ones (a derivative that is exactly zero)."""
    rounding = ROUNDINGS * torch.finfo(cotangent.dtype).eps * passes.first.largest
    return float(cotangent.norm()) <= rounding < inf


def _is_rounding(off: float, most: float, part: Part, passes: Passes, index: int, which: int) -> bool:
    """Whether a relative difference is at most ``most`` times the measured rounding of a cotangent."""
    return off <= NOISE and off <= most * rounding_at(part, passes, index, which)


def _dependence(part: Part, index: int, shape: Sequence[int]) -> Finding:
    """A use of no sample has cross-sample dependence, or it has if ``[B·n]`` elsewhere has samples."""
    dims = shape[:-1] or shape
    slots = part.nodes[index].record.record.slots
    found = frozenset().union(*(roots(slot.source) for slot in slots))
    if part.problem.samples in dims:
        return Finding(mixed=found)
    return Finding(flattened=dict.fromkeys(found, frozenset(dims)))


def _sizes_of(layout: Layout, shape: Sequence[int]) -> Finding:
    """The numbers of entries of the samples in one dimension, and with another one flattened into it."""
    if layout.dim < 0 or isinstance(layout, Scattered):
        return Finding()
    size, dims = shape[layout.dim], shape[:-1] or shape
    others = [n for dim, n in enumerate(dims) if dim != layout.dim]
    return Finding(sizes=frozenset([size, *(size * n for n in others), prod(dims)]))


def _mixes(part: Part, index: int, c: Tensor, probed: Tensor, v: Tensor) -> bool:
    """Whether a use without a layout has cross-sample dependence; its output may belong to no sample."""
    if not isinstance(part.nodes[index].record, OpMark):
        return False
    broadcast = probed.ndim > 0 and probed.shape[0] == 1  # position_ids [1, T] and their like
    regular = any(n % part.problem.samples == 0 for n in probed.shape[:-1] or probed.shape)
    return regular and not broadcast and not follows_samples(c, probed, v)
