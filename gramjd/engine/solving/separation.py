"""Proves that samples cannot depend on each other in a graph, even by derivatives that are zero now.

What one batch shows need not hold for the next: a gate that starts at zero, a saturated softmax, a dead
ReLU hide that samples depend on each other. NaN times zero is NaN. So the derivatives of some samples'
objectives are made NaN: where NaN comes to a place of another sample, the two can depend on each other.
Nodes that choose by value pass NaN on to all that they choose from
(:mod:`gramjd.engine.analysis.node_types`).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations, islice
from typing import Any

import torch
from torch import Tensor
from torch.autograd import set_detect_anomaly

from gramjd import gramians
from gramjd.engine.analysis.indexing import before, sources
from gramjd.engine.analysis.layouts import ZERO, Layout, candidates
from gramjd.engine.analysis.node_types import Nan, NodeType, Sizes, dims_of, facts_of, first_spatial
from gramjd.engine.recording.nodes import forget
from gramjd.engine.solving import backward
from gramjd.engine.solving.problem import Problem, is_fused
from gramjd.engine.solving.program import Layouts, Program
from gramjd.internals import name_of, saved_value

_PRODUCTS = ("Addmm", "Bmm", "Mm", "Mv")


@dataclass(frozen=True)
class Reached:
    """The entries of a cotangent that NaN reaches, for each dimension that samples may lie in."""

    shape: tuple[int, ...]
    along: Mapping[int, Tensor]  # by dimension, bool

    @staticmethod
    def of(cotangent: Tensor, samples: int) -> Reached:
        """Reduce a mask to its lines: the masks of a whole forward take as much memory as its cotangents."""
        mask, shape = cotangent.isnan(), tuple(cotangent.shape)
        dims = [dim for dim, size in enumerate(shape) if samples and size % samples == 0]
        return Reached(shape, {dim: mask.movedim(dim, 0).unsqueeze(1).flatten(1).any(1) for dim in dims})

    def samples(self, layout: Layout, number: int) -> Tensor:
        """The samples that NaN reaches in a layout."""
        return replace(layout, dim=0).split(self.along[layout.dim], 0, number).flatten(1).any(1)


@dataclass(frozen=True)
class Masks:
    """Where NaN comes from some samples."""

    nodes: Mapping[Any, list[Reached | None]]  # at the outputs of each node of a use
    displaced: bool  # does a node slice, join or pad a tensor where samples are?
    everywhere: frozenset[Hashable]  # outputs of such nodes that NaN fills: of no sample, or of these alone


Gradients = Sequence[Tensor | None]


def patterns_for(samples: int) -> int:
    """The number of passes that tell all samples apart (Sperner 1928): about ``log2(B) + 1``."""
    n = 2
    while math.comb(n, n // 2) < samples:
        n += 1
    return n


def patterns(samples: int, number: int) -> list[Tensor]:
    """``number`` sets of samples; for any two samples, one set has the first and not the second.

    With ``number`` from :func:`patterns_for`: each sample is in half of the sets, in no two the same half.
    """
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(samples)).tolist()
    found = torch.zeros(number, samples, dtype=torch.bool)
    for sample, sets in zip(order, islice(combinations(range(number), number // 2), samples), strict=True):
        found[list(sets), sample] = True
    return list(found)


def spread(problem: Problem, chosen: Sequence[Tensor], first: bool = True) -> list[Masks] | None:
    """The entries that NaN reaches from each set of samples; ``None`` if nothing follows from them.

    The types of all nodes must be listed. In the ``first`` pass, each is watched for NaN that it drops, as
    nodes without samples do. Ranks in step run every pass, whatever they find.
    """
    masks: list[Masks] = []
    for number, each in enumerate(chosen):
        watched = first and not number
        moves = _Moves(problem)
        with _passed_on(problem.graph.order, watched) as dropped, moves.watched(), set_detect_anomaly(False):
            found = _run(problem, each, moves)
        if found is not None and not dropped:
            masks.append(found)
        elif problem.lockstep is None:
            return None
    return masks if len(masks) == len(chosen) else None


def stays_within(problem: Problem, program: Program, layouts: Mapping[int, Sequence[Layouts]],
                 chosen: Sequence[Tensor], masks: Sequence[Masks]) -> bool:  # fmt: skip
    """Whether NaN reaches only entries of the chosen samples, by the layouts of the nodes of each region."""
    graph = problem.graph
    unpacked = any(node.hooked for node in graph.nodes)  # or a checkpoint runs again for each
    if not unpacked and any(map(_is_sparse, graph.order)):
        return False  # the next batch may have its zeros elsewhere
    by_node = list(_by_node(problem, program, layouts))
    return all(_is_within(each, mask, by_node) for each, mask in zip(chosen, masks, strict=True))


def _is_within(chosen: Tensor, masks: Masks, by_node: Iterable[tuple[Any, Layouts | None]]) -> bool:
    """Whether the masks of all nodes stay within some samples, in a known layout or any that fits."""
    return all(
        any(
            _fits(reached, each, chosen)
            for each in (candidates(reached.shape, len(chosen)) if layouts is None else [layouts[n]])
        )
        for node, layouts in by_node
        for n, reached in enumerate(masks.nodes.get(node, ()))
        if reached is not None
    )


def _fits(found: Reached, layout: Layout | None, chosen: Tensor) -> bool:
    if layout is None or layout is ZERO:  # of no sample, or nothing comes
        return True
    reached = found.samples(layout, len(chosen))
    return not bool((reached & ~chosen.to(reached.device)).any())


def _by_node(problem: Problem, program: Program, layouts: Mapping[int, Sequence[Layouts]]
             ) -> Iterator[tuple[Any, Layouts | None]]:  # fmt: skip
    """All nodes with the layouts of their outputs, where these are not those of a replay."""
    for number, region in enumerate(program.regions):
        nodes = [problem.graph.nodes[index] for index in region.nodes]
        if any(map(is_fused, nodes)):
            yield from ((node, None) for node in nodes)
        else:
            yield from zip(nodes, layouts[number], strict=True)


def _run(problem: Problem, chosen: Tensor, moves: _Moves) -> Masks | None:
    """A backward pass of the objectives of some samples, NaN each; ``None`` if a hook on a tensor raises."""
    found: dict[Any, list[Reached | None]] = {}
    own: list[Exception] = []  # errors that are none of a hook's

    def note(node: Any, grads: Gradients) -> Sequence[None]:
        try:
            found[node] = [g if g is None else Reached.of(g, problem.samples) for g in grads]
        except Exception as error:
            own.append(error)
            raise
        forget([node])
        return (None,) * len(grads)

    weights = torch.zeros(problem.objectives, problem.samples).to(problem.output)
    weights[:, chosen.to(weights.device)] = math.nan
    rows = gramians.from_rows(weights, problem.output.shape, problem.batch_dim).unsqueeze(0)
    with backward.tapped(problem.graph.nodes, note) as taps:
        try:
            backward.gradients(problem.output, backward.flattened(taps), rows)
        except Exception:
            if own:
                raise
            return None
    return Masks(found, moves.displaced, frozenset(moves.everywhere))


class _Moves:
    """Whether nodes slice, join or pad tensors in dimensions in which samples lie.

    Behind such a node samples need not lie in whole dimensions, so that other sizes are another case.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.displaced = False
        self.everywhere: set[Hashable] = set()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A context in which backward passes are watched."""
        handles = []
        for number, node in enumerate(self.problem.graph.order if self.problem.samples > 1 else ()):
            kind: Any = type(node)
            facts = facts_of(kind)
            if facts is not None and facts.sizes in _MOVING:
                handles.append(node.register_hook(partial(self._note, number, node, facts)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, number: int, node: Any, facts: NodeType, found: Gradients, given: Gradients) -> None:
        for place, g in enumerate(given):
            if g is None or not g.numel():
                continue
            mask = g.isnan()
            if bool(mask.all()):
                self.everywhere.add((number, place))
            elif not bool(mask.any()) or _varies(mask, _moved(node, facts, found, g)):
                self.displaced = True


_MOVING = (Sizes.ALONG, Sizes.EXACT, Sizes.WINDOW)


def _moved(node: Any, facts: NodeType, found: Gradients, gradient: Tensor) -> Sequence[int]:
    """The dimensions of an output along which a node may have moved entries."""
    inputs = [g for g in found if g is not None]
    if facts.sizes is Sizes.ALONG:
        rank = max([g.ndim for g in inputs], default=0)
        if rank > gradient.ndim:  # one entry of the dimension is left
            return ()
        return dims_of(type(node), getattr(node, facts.dims) if facts.dims else None, gradient.ndim)
    alike = all(g.shape[:1] == gradient.shape[:1] for g in inputs)  # samples come first, as many as before
    return range(int(alike), gradient.ndim)


def _varies(mask: Tensor, dims: Sequence[int]) -> bool:
    """Whether a mask is not the same along some dimensions."""
    along = tuple(dims)
    return bool(along) and not torch.equal(mask.amax(along), mask.amin(along))


def _is_sparse(node: Any) -> bool:
    """Whether a node is that of a product with a sparse tensor."""
    if not name_of(node).startswith(_PRODUCTS):
        return False
    factors = (saved_value(node, factor) for factor in ("self", "mat1", "mat2"))
    return any(isinstance(t, Tensor) and t.layout is not torch.strided for t in factors)


@contextmanager
def _passed_on(nodes: Iterable[Any], watched: bool) -> Iterator[list[str]]:
    """A context in which NaN passes through nodes that choose by value, whatever the data are.

    The names of others that drop it all the same are collected, if they are watched.
    """
    dropped: list[str] = []

    def note(name: str, found: Gradients, given: Gradients) -> None:
        asked = any(g is not None for g in found)
        if asked and any(map(_has_nan, given)) and not any(map(_has_nan, found)):
            dropped.append(name)

    handles = []
    for node in nodes:
        kind: Any = type(node)
        facts = facts_of(kind)
        if facts is None or facts.nan is Nan.CONSTANT:  # a recorded use, a leaf; or it has no derivative
            continue
        if facts.nan is not Nan.MULTIPLIED:
            handles.append(node.register_hook(partial(_spread, node, facts)))
        elif watched:
            handles.append(node.register_hook(partial(note, name_of(node))))
    try:
        yield dropped
    finally:
        for handle in handles:
            handle.remove()


def _has_nan(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.sum().isnan())


def _spread(node: Any, facts: NodeType, found: Gradients, given: Gradients) -> Gradients:
    """The gradients that a node returned, NaN wherever other data could have sent NaN that it was given."""
    lost = [g.isnan() for g in given if g is not None]
    if facts.nan is Nan.INDEXED:
        return tuple([g if g is None else _with_nan_before_index(node, g, lost) for g in found])
    return tuple([g if g is None else _with_nan(g, lost, _reach(node, facts, g)) for g in found])


def _reach(node: Any, facts: NodeType, gradient: Tensor) -> Sequence[int]:
    """The dimensions of an input along which the data of a node choose."""
    rank = gradient.ndim
    if facts.nan is Nan.SELECTED:
        return ()
    if facts.nan is Nan.CHOSEN:
        return dims_of(type(node), getattr(node, facts.dims) if facts.dims else None, rank)
    first = (
        first_spatial(type(node), rank) if facts.nan is Nan.WINDOWED else int(facts.nan is Nan.WITHIN_FIRST)
    )
    return range(first, rank)


def _nan_like(gradient: Tensor) -> complex | float:
    """NaN; in complex numbers in both parts, of which either may be what goes on."""
    return complex(math.nan, math.nan) if gradient.is_complex() else math.nan


def _with_nan(gradient: Tensor, lost: Sequence[Tensor], along: Sequence[int]) -> Tensor:
    """A gradient with NaN where masks of outputs lead, along some dimensions everywhere."""
    lines = [1 if dim in along else size for dim, size in enumerate(gradient.shape)]
    for mask in lost:
        gradient = gradient.masked_fill(_aligned(mask, lines, along), _nan_like(gradient))
    return gradient


def _with_nan_before_index(node: Any, gradient: Tensor, lost: Sequence[Tensor]) -> Tensor:
    """The gradient of an indexed tensor with NaN wherever other indices could have taken it from."""
    for mask in lost:
        gradient = gradient.masked_fill(before(mask, sources(node, mask.ndim)), _nan_like(gradient))
    return gradient


def _aligned(mask: Tensor, lines: Sequence[int], along: Sequence[int]) -> Tensor:
    """A mask of an output as one of an input, by lines: sizes of 1 along some dimensions."""
    if not along:  # entry by entry, after broadcasting
        return (mask.to(torch.float32).sum_to_size(lines) if mask.ndim else mask) > 0
    if mask.ndim == len(lines):
        mask = mask.amax(tuple(along), keepdim=True)
    elif mask.ndim == len(lines) - len(along):  # reduced without keepdim
        for dim in sorted(along):
            mask = mask.unsqueeze(dim)
    else:
        return mask.any()
    if shared := [dim for dim, size in enumerate(lines) if size == 1 < mask.shape[dim]]:  # broadcast
        mask = mask.amax(shared, keepdim=True)
    if any(n not in (1, size) for n, size in zip(mask.shape, lines, strict=True)):
        whole = mask.new_zeros(lines)  # gather and scatter may use a part of their inputs
        parts = tuple([slice(min(n, size)) for n, size in zip(mask.shape, lines, strict=True)])
        whole[parts] = mask[parts]
        return whole
    return mask
