"""What backward passes of weighted objectives prove: where the samples are, and that blocks are right.

What is equal in exact arithmetic differs by rounding, and by how much depends on what computed it (a
float32 normalisation inside a float64 model, autocast). So where a difference is small but not
negligible, the rounding itself is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf, prod

import torch
from torch import Tensor

from gramjd.blocks import Block, Dense
from gramjd.engine.analysis.layouts import ZERO, Layout, Scattered, follows_samples, measure, owned
from gramjd.engine.recording.nodes import Cotangents
from gramjd.engine.recording.recorded import OpMark
from gramjd.engine.solving.passes import Pass, Passes, rounding_of
from gramjd.engine.solving.task import Task, is_fused
from gramjd.internals import dtypes_of
from gramjd.rounding import tolerance
from gramjd.uses.use import roots

_SMALL = 0.2  # relative differences above it are no rounding
_VECTORS = 8  # at random, that gradients are multiplied by
_NOISE = 8  # times the rounding of one pass that a difference, of several of them, may be
_FAR = 100  # the same, above which a difference is cross-sample dependence
_CLOSE = 6  # the same for a regular layout: what is above it takes per-row backward passes, exact anyhow


@dataclass
class Probe:
    """What the passes tell of one region."""

    passes: Passes
    nodes: Sequence[int]
    scattered: bool = False  # did a sample's entries show by its weight alone?

    @property
    def v(self) -> Tensor:
        return self.passes.v

    @cached_property
    def first(self) -> Pass:
        return self.passes.first.of(self.nodes)

    @property
    def again(self) -> Pass:
        return self.passes.again.of(self.nodes)

    def verifying(self) -> Probe:
        """The same of passes that also gave the gradients of parameters."""
        return self if self.passes.checking else Probe(self.passes.full, self.nodes, self.scattered)

    def by_others(self) -> Probe:
        """The same, which compares totals by other weights."""
        return replace(self, scattered=True)

    @property
    def total(self) -> tuple[Tensor, Pass]:
        """What the total is compared with: weights that no layout was found by, if these told too much."""
        if self.scattered:
            return self.passes.others, self.passes.independent
        return self.v, self.passes.first


def find_layouts(task: Task, probe: Probe) -> None:
    """Find the layouts of a region's nodes, and note what they are good for beyond this call."""
    plan = task.plan
    if task.batch_dim is None:
        task.layouts = [[Layout(0)] * len(cs) for cs in task.cotangents]
        given = probe.first.cotangents if probe.passes.checking else []
        plan.seen = plan.seen and all(c is None or bool(c.any()) for cs in given for c in cs)
        return
    assert task.region is not None
    if task.region in plan.layouts:
        task.layouts = plan.layouts[task.region]
        return
    for index, cs in enumerate(task.cotangents):
        task.layouts.append([_layout(task, probe, index, which) for which in range(len(cs))])
    pairs = [(layout, c) for mine, cs in zip(task.layouts, task.cotangents, strict=True)
             for layout, c in zip(mine, cs, strict=True)]  # fmt: skip
    probe.scattered = any(isinstance(layout, Scattered) for layout, _ in pairs)
    plan.seen = plan.seen and not any(layout is ZERO and c is not None for layout, c in pairs)
    # a single sample fits everywhere; the next batch may be scattered otherwise, and a replay succeed
    lasts = task.samples > 1 and not probe.scattered and not any(map(is_fused, task.graph.nodes))
    plan.lasting = plan.lasting and plan.seen and lasts
    plan.layouts[task.region] = task.layouts


def _layout(task: Task, probe: Probe, index: int, which: int) -> Layout | None:
    """The layout of one output of a node, by weights of which two may be close: proven by others."""
    layout = _first_fit(task, probe, index, which)
    if isinstance(layout, Scattered) and not probe.passes.checking and not task.places:
        c = task.cotangents[index][which]
        other = probe.passes.independent.of(probe.nodes).cotangents[index][which]
        if c is None or other is None:
            return None
        off = layout.misfit(c, other[0], probe.passes.others)
        if off > _NOISE * tolerance(c.dtype) and not _is_rounding(off, _NOISE, task, probe, index, which):
            return None
    return layout


def _first_fit(task: Task, probe: Probe, index: int, which: int) -> Layout | None:
    """The layout of one output of a node; cross-sample dependence there goes to the plan."""
    c, first = task.cotangents[index][which], probe.first.cotangents[index][which]
    if c is None or first is None:
        return ZERO
    layout, off = measure(c, first[0], probe.v)
    doubtful = False
    precision = task.precisions[index] if task.precisions else None
    # in a mixed-precision subgraph, a weak dependence would hide behind the tolerance of few digits
    finest = min(c.dtype, task.output.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    if off > tolerance(precision or finest) and not _is_rounding(off, _CLOSE, task, probe, index, which):
        # rounding, or a weak dependence between samples: per-row backward passes are exact for both
        doubtful = off <= tolerance(fewest_digits(task)) or _is_rounding(off, _FAR, task, probe, index, which)
        if doubtful:
            task.met.add(layout)
        layout = None if doubtful or task.is_batch_independent(index) else owned(c, first[0], probe.v)
    if layout is None and not task.is_batch_independent(index):
        noise = _noise(task, probe, index, which)
        mixed = _mixes(task, index, c, first[0], probe.v)
        if mixed and noise > _SMALL:
            return ZERO  # nothing but rounding: a running maximum, subtracted and added again
        if doubtful or _is_negligible(first, probe):
            return None
        layout = owned(c, first[0], probe.v, min(_SMALL, _NOISE * noise))
        if layout is None and mixed and owned(c, first[0], probe.v, tolerance(fewest_digits(task))) is None:
            _note_mixed(task, index, first[0].shape)
    elif layout is not None:
        _note_sizes(task, layout, first[0].shape)
    return layout


def fewest_digits(task: Task) -> torch.dtype:
    """The dtype of the fewest digits that anything in the graph was computed in."""
    dtypes = {task.output.dtype, *dtypes_of(task.graph.order)}
    return max(
        (dtype for dtype in dtypes if dtype.is_floating_point), key=lambda dtype: torch.finfo(dtype).eps
    )


def _is_negligible(cotangent: Tensor, probe: Probe) -> bool:
    """Whether a cotangent can be rounding of larger ones (a derivative that is exactly zero)."""
    largest = max(probe.passes.first.norms, default=0.0)
    rounding = _NOISE * torch.finfo(cotangent.dtype).eps * largest
    return float(cotangent.norm()) <= rounding < inf


def _is_rounding(off: float, most: float, task: Task, probe: Probe, index: int, which: int) -> bool:
    """Whether a relative difference is at most ``most`` times the measured rounding of a cotangent."""
    return off <= min(_SMALL, most * _noise(task, probe, index, which))


def _note_mixed(task: Task, index: int, shape: Sequence[int]) -> None:
    """Remember that a use of no sample mixes them, or that it does if ``[B·n]`` elsewhere has samples."""
    dims, plan = shape[:-1] or shape, task.plan
    for slot in task.graph.nodes[index].record.record.slots:
        for root in roots(slot.source):
            if task.samples in dims:
                plan.mixed.add(root)
            else:
                plan.flattened.setdefault(root, set()).update(dims)


def _note_sizes(task: Task, layout: Layout, shape: Sequence[int]) -> None:
    """Remember how many entries the samples have in one dimension, and with another flattened into it."""
    if layout.dim < 0 or isinstance(layout, Scattered):
        return
    size, dims = shape[layout.dim], shape[:-1] or shape
    others = [n for dim, n in enumerate(dims) if dim != layout.dim]
    task.plan.sizes.update([size, *(size * n for n in others), prod(dims)])


def _noise(task: Task, probe: Probe, index: int, which: int) -> float:
    """The rounding of a cotangent, relative to it; inside a replay, that of what the op replayed got."""
    place = task.places[index] if task.places else index
    if task.precisions and task.precisions[index] is not None:
        given = probe.passes.first.of(probe.nodes).cotangents[place]
        return rounding_of(*(_joined(cs) for cs in (given, probe.again.cotangents[place])))
    return rounding_of(probe.first.cotangents[index][which], probe.again.cotangents[place][which])


def _joined(cs: Cotangents) -> Tensor:
    return torch.cat([c.flatten() for c in cs if c is not None])


def is_noise(task: Task, probe: Probe, index: int) -> bool:
    """Whether all cotangents of a node are mere rounding."""
    pairs = list(enumerate(zip(task.cotangents[index], probe.first.cotangents[index], strict=True)))
    return all(
        c is None
        or first is None
        or (
            measure(c, first[0], probe.v)[1] > tolerance(c.dtype)
            and _noise(task, probe, index, which) > _SMALL
        )
        for which, (c, first) in pairs
    )


def _mixes(task: Task, index: int, c: Tensor, probed: Tensor, v: Tensor) -> bool:
    """Whether a use without a layout has cross-sample dependence; its output may belong to no sample."""
    if task.is_batch_independent(index) or not isinstance(task.graph.nodes[index].record, OpMark):
        return False
    broadcast = probed.ndim > 0 and probed.shape[0] == 1  # position_ids [1, T] and their like
    regular = any(n % task.samples == 0 for n in probed.shape[:-1] or probed.shape)
    return regular and not broadcast and not follows_samples(c, probed, v)


def agrees(probe: Probe, name: str, blocks: Sequence[Block], precision: torch.dtype | None = None) -> bool:
    """Verify the total: whether ``Jᵀ v`` from the blocks is autograd's own, up to rounding.

    Rounding to ``precision``, the gradient's own by default.
    """
    v, weighted = probe.total
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
    if off > _SMALL * size:
        return False
    # its own may be small by chance where it has few entries
    alone = probe.first.gradients[name], probe.again.gradients[name]
    rounding = max(rounding_of(*alone), probe.passes.rounding)
    return off <= _NOISE * rounding * size + slack


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
