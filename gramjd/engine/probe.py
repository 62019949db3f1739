"""Proof that blocks are right: where the samples are, and whether the total is autograd's own.

All of it follows from backward passes of the objectives weighted at random, beside those of the
objectives themselves. What is equal in exact arithmetic differs by rounding, and by how much depends
on what computed it (a float32 normalisation inside a float64 model, autocast). So where a difference
is small but not negligible, the rounding itself is measured, by one more pass with all weights scaled
by a number that is no power of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite, prod

import torch
from torch import Tensor

from gramjd import gramians
from gramjd.blocks import Block, Dense
from gramjd.engine import backward
from gramjd.engine.layouts import ZERO, Layout, Scattered, follows_samples, measure, owned
from gramjd.engine.marks import OpMark
from gramjd.engine.nodes import Cotangents
from gramjd.engine.regions import Later
from gramjd.engine.task import Task, is_fused
from gramjd.rounding import tolerance
from gramjd.uses import roots

_SCALE = 1.37
_SMALL = 0.2  # relative differences above it are no rounding
_VECTORS = 8  # at random, that gradients are multiplied by
_NOISE = 4  # times the rounding measured that a difference may be


@dataclass
class Pass:
    """One backward pass of weighted objectives."""

    cotangents: list[Cotangents]  # of each node, [1, *y]
    gradients: dict[str, Tensor | None]  # of each parameter, [1, *p.shape]
    sizes: dict[str, float]  # norms of the gradients that there are

    def of(self, nodes: Sequence[int]) -> Pass:
        """The same with the cotangents of some nodes alone."""
        return replace(self, cotangents=[self.cotangents[n] for n in nodes])

    @property
    def is_finite(self) -> bool:
        """Is there neither NaN nor infinity in it? A norm is many times as fast as ``isfinite``."""
        found = [(c, float(c.norm())) for cs in self.cotangents for c in cs if c is not None]
        found += [(g, self.sizes[name]) for name, g in self.gradients.items() if g is not None]
        return all(isfinite(size) or bool(torch.isfinite(t).all()) for t, size in found)


class Passes:
    """Backward passes of the objectives weighted at random, each run when it is first asked for.

    While another one is in progress (``busy``), asking for one that was not run raises ``Later``.
    """

    def __init__(self, task: Task, checking: bool) -> None:
        self.task, self.checking, self.busy = task, checking, False
        # weights [K, B], and others like them
        self.v, self.others = (
            _random_weights(task.objectives, task.samples, task.output, seed) for seed in (0, 1)
        )

    @cached_property
    def first(self) -> Pass:
        return self._run(self.v)

    @cached_property
    def again(self) -> Pass:
        """The same but for rounding."""
        return self._run(_SCALE * self.v)

    @cached_property
    def independent(self) -> Pass:
        """With the other weights."""
        return self._run(self.others)

    def run_all(self) -> None:
        """Every pass that may be asked for, now."""
        _ = self.first, self.again, self.independent

    @cached_property
    def rounding(self) -> float:
        """The rounding of all gradients together, relative to their norm.

        Not the largest one: a gradient that is nothing but rounding would excuse any other.
        """
        found = [(g, self.again.gradients[name]) for name, g in self.first.gradients.items()]
        pairs = [(g.double(), again.double()) for g, again in found if g is not None and again is not None]
        off = sum(float((again / _SCALE - g).square().sum()) for g, again in pairs)
        return float((off / sum(float(g.square().sum()) for g, _ in pairs)) ** 0.5)

    @property
    def conclusive(self) -> bool:
        """Would every gradient that is missing have been missed?"""
        return all(size > 0 for size in self.first.sizes.values())

    def forget(self, nodes: Sequence[int]) -> None:
        """Let go of what was found at some nodes."""
        for name in {"first", "again", "independent"} & vars(self).keys():
            for n in nodes:
                getattr(self, name).cotangents[n] = []

    def _run(self, weights: Tensor) -> Pass:
        if self.busy:
            raise Later
        task, named = self.task, self.task.parameters if self.checking else {}
        rows = gramians.from_rows(weights, task.output.shape, task.batch_dim).unsqueeze(0)
        with backward.tapped(task.graph.nodes) as taps:
            flat = [tap for mine in taps for tap in mine]
            found = backward.gradients(task.output, [*flat, *named.values()], rows)
        cotangents = backward.grouped(found, [len(mine) for mine in taps])
        # those of Embedding(sparse=True) are written out
        dense = [g.to_dense() if g is not None and g.is_sparse else g for g in found[len(flat) :]]
        gradients = dict(zip(named, dense, strict=True))
        sizes = {name: float(g.norm()) for name, g in gradients.items() if g is not None}
        return Pass(cotangents, gradients, sizes)


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

    @property
    def total(self) -> tuple[Tensor, Pass]:
        """What the total is compared with: weights that no layout was found by, if these told too much."""
        if self.scattered:
            return self.passes.others, self.passes.independent
        return self.v, self.passes.first


def find_layouts(task: Task, probe: Probe) -> bool:
    """Find the layouts of a region's nodes; could the same be said of the next graph of this signature?"""
    if task.batch_dim is None:
        task.layouts = [[Layout(0)] * len(cs) for cs in task.cotangents]
        return True
    assert task.region is not None
    known = task.plan.layouts.get(task.region)
    if known is not None:
        task.layouts = known
        return True
    lasting = task.samples > 1  # a single sample fits everywhere
    for index, cs in enumerate(task.cotangents):
        mine = [_layout(task, probe, index, which) for which in range(len(cs))]
        lasting = lasting and ZERO not in [m for m, c in zip(mine, cs, strict=True) if c is not None]
        task.layouts.append(mine)
    lasting = lasting and not any(map(is_fused, task.graph.nodes))  # the next may be replayed
    probe.scattered = any(isinstance(layout, Scattered) for mine in task.layouts for layout in mine)
    lasting = lasting and not probe.scattered  # the next batch may be scattered otherwise
    if lasting:
        task.plan.layouts[task.region] = task.layouts
    return lasting


def _layout(task: Task, probe: Probe, index: int, which: int) -> Layout | None:
    """The layout of one output of a node; whether samples are mixed there goes to the plan."""
    c, first = task.cotangents[index][which], probe.first.cotangents[index][which]
    if c is None or first is None:
        return ZERO
    layout, off = measure(c, first[0], probe.v)
    precision = task.precisions[index] if task.precisions else None
    if off > tolerance(precision or c.dtype) and (
        off > _SMALL or off > _NOISE * _noise(task, probe, index, which)
    ):
        layout = None if task.is_unbatched(index) else owned(c, first[0], probe.v)
    if layout is None and _mixes(task, index, c, first[0], probe.v):
        noise = _noise(task, probe, index, which)
        if noise > _SMALL:
            return ZERO  # nothing but rounding: a running maximum, subtracted and added again
        layout = owned(c, first[0], probe.v, min(_SMALL, _NOISE * noise))
        if layout is not None:
            return layout
        _note_mixed(task, index, first[0].shape)
    elif layout is not None:
        _note_sizes(task, layout, first[0].shape)
    return layout


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
        return _rounding(*(_joined(cs) for cs in (given, probe.again.cotangents[place])))
    return _rounding(probe.first.cotangents[index][which], probe.again.cotangents[place][which])


def _joined(cs: Cotangents) -> Tensor:
    return torch.cat([c.flatten() for c in cs if c is not None])


def is_noise(task: Task, probe: Probe, index: int) -> bool:
    """Is all that a node of the forward has for cotangents mere rounding?"""
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
    """Does a use without a layout mix samples, or does its output just not belong to any?"""
    if task.is_unbatched(index) or not isinstance(task.graph.nodes[index].record, OpMark):
        return False
    broadcast = probed.ndim > 0 and probed.shape[0] == 1  # position_ids [1, T] and their like
    regular = any(n % task.samples == 0 for n in probed.shape[:-1] or probed.shape)
    return regular and not broadcast and not follows_samples(c, probed, v)


def _rounding(first: Tensor | None, again: Tensor | None) -> float:
    """The relative difference of two passes that differ by rounding alone."""
    if first is None or again is None:
        return 0.0
    return float((again.double() / _SCALE - first.double()).norm() / first.double().norm())


def agrees(probe: Probe, name: str, blocks: Sequence[Block]) -> bool:
    """The check of the total: is ``Jᵀ v`` from the blocks autograd's own?"""
    v, weighted = probe.total
    wanted = weighted.gradients[name]
    if wanted is None:
        return not blocks
    weights, left, size = v.to(wanted.dtype), wanted[0], weighted.sizes[name]
    most = tolerance(wanted.dtype) * size
    if _looks_equal(blocks, weights, left):
        return True
    for block in blocks:
        left = left - block.vjp(weights)
    off = float(left.norm())
    if off <= most:
        return True
    # A gradient that is nothing but rounding (an attention's key bias) is noise of the whole's size.
    bound = sum(float(block.bound(weights.abs())) for block in blocks)
    slack = 64 * torch.finfo(wanted.dtype).eps * (bound + max(weighted.sizes.values()))
    if off <= most + slack:
        return True
    if off > _SMALL * size:
        return False
    # its own may be small by chance where it has few entries
    alone = probe.first.gradients[name], probe.again.gradients[name]
    rounding = max(_rounding(*alone), probe.passes.rounding)
    return off <= _NOISE * rounding * size + slack


def _looks_equal(blocks: Sequence[Block], weights: Tensor, gradient: Tensor) -> bool:
    """Are ``Jᵀ w`` and the gradient equal as far as products of both with random vectors tell?

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


def _random_weights(objectives: int, samples: int, like: Tensor, seed: int) -> Tensor:
    """Row weights ``[K, B]``, the same on every call, none close to zero."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(2, objectives, samples, generator=generator, dtype=torch.float64)
    signs = 1 - 2 * (uniform[1] < 0.5).double()
    return ((0.5 + uniform[0]) * signs).to(like.device, like.dtype)
