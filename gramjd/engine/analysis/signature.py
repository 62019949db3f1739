"""The separation key of a graph: equal keys, equal ways in which samples could reach each other.

A proof that samples are kept apart (:mod:`gramjd.engine.solving.separation`) holds for every graph in which
the same entries could reach the same entries. That picture is decided by the types of the nodes, by the
numbers that they save and by shapes. Numbers stand in the key as they are. Of shapes, only what matters does,
so that a proof for one batch size, or length, holds for others:

- sizes are replaced by the order in which they first appear, so that equal ones stay equal and different
  ones different, together with whether they are 1, and a multiple of the number of samples ``B``;
- reshapes say which dimensions they merge or split; if samples may be in one of these, ``B`` must be its
  first or last factor, or all its factors and ``B`` stand in the key. (Where some reshapes of one size have
  it first and others last, as ``[B·T]`` and ``[T·B]``, and one has more than two factors, all shapes do: what
  is a run of one sample in the first could be cut otherwise in the second);
- windows have the sizes in the dimensions that they move along in the key, and ``B`` if samples may be there.
  So have slices and concatenations, if the proof finds samples in what is sliced, joined or padded. They need
  not lie in runs of whole samples behind that: the key has all sizes, then. If it finds none, these sizes
  are no part of the key.

A graph with a node that is not listed in :mod:`gramjd.engine.analysis.node_types` has no key, unless the node
is over leaves alone.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from itertools import accumulate, pairwise
from math import prod
from operator import mul
from typing import Any

from gramjd.engine.analysis.indexing import sources
from gramjd.engine.analysis.node_types import NodeType, Sizes, dims_of, facts_of, first_spatial
from gramjd.engine.recording.nodes import NODE_TYPE
from gramjd.internals import LEAF_TYPE, name_of_type, saved_value, shapes_of

Shape = tuple[int, ...]
_NESTED = frozenset({list, tuple})  # attributes of nodes that may contain lists


class Unlisted(Exception):
    """A graph has a node that nothing is known of; its name is the message."""


def separation_keys(order: Sequence[Any], numbers: dict[Any, int], output: Shape, samples: int
                    ) -> tuple[Hashable, Hashable]:  # fmt: skip
    """The key of a graph: for graphs that keep samples in whole dimensions, and for any graph.

    The first is equal for more graphs: sizes that cannot move a sample are left out.

    Args:
        order: its nodes, in the order of a walk.
        numbers: the place of each in that order.
        output: the shape of the output, which has a batch dimension.
        samples: ``B``.

    Raises:
        Unlisted: there is none.
    """
    found = shapes_of(order)
    if found is None:
        raise Unlisted("a node whose shapes this version of torch does not show")
    shapes: dict[Shape, int] = {(samples,): 0, output: 1}  # in order of appearance
    forms: dict[int, set[str]] = {}  # of each size that is reshaped: the places of B among its factors
    parts: list[Hashable] = []
    moving: list[int] = []  # parts that are sizes in dimensions that are sliced or joined
    for node, mine in zip(order, found, strict=True):
        for shape in mine:
            parts.append(shapes.setdefault(shape, len(shapes)))
        kind: Any = type(node)
        if kind is LEAF_TYPE:
            continue
        if kind is NODE_TYPE:
            replay = getattr(node.record, "replay", None)
            parts.append(replay and replay.sizes)
            continue
        facts = facts_of(kind)
        if facts is None:
            _refuse_unlisted(node)
            continue
        for name in facts.attributes:
            value = getattr(node, name)
            parts.append(_hashable(value) if type(value) in _NESTED else value)
        if facts.sizes is Sizes.ANY:
            continue
        inputs = []
        for child, n in node.next_functions:  # no comprehension: that is a call for each node
            if child is not None:
                inputs.append(found[numbers[child]][n])
        if facts.sizes is Sizes.RESHAPE:
            token, those = _reshape(inputs[0], mine[0], samples)
            for size, form in those:
                forms.setdefault(size, set()).add(form)
        else:
            token = _sizes_of(node, facts, tuple(inputs), tuple(mine), samples)
            if facts.sizes is Sizes.ALONG:
                moving.append(len(parts))
        parts.append(token)
    exact = any({"first", "last", "several"} <= form for form in forms.values())
    whole = tuple(parts), tuple(shapes)
    for place in moving:
        parts[place] = None
    return (tuple(parts), whole[1] if exact else _canonical(whole[1], samples)), whole


def _refuse_unlisted(node: Any) -> None:
    """Raise for a node that nothing is known of, but where it can let no sample reach another.

    Raises:
        Unlisted: there are others than leaves behind it.
    """
    if not all(child is None or type(child) is LEAF_TYPE for child, _ in node.next_functions):
        raise Unlisted(name_of_type(type(node)))


def _sizes_of(node: Any, facts: NodeType, inputs: tuple[Shape, ...], outputs: tuple[Shape, ...],
              samples: int) -> Hashable:  # fmt: skip
    """The sizes at a node that belong to the key."""
    if facts.sizes is Sizes.INDEXED:
        try:
            return sources(node, len(outputs[0]))
        except RuntimeError as error:
            raise Unlisted("IndexBackward0, whose indices were written in place") from error
    kind: Any = type(node)
    named = _hashable(getattr(node, facts.dims)) if facts.dims else None
    grouped = facts.sizes is Sizes.WINDOW and (saved_value(node, "groups") or 1) > 1
    unknown = len(node.next_functions) - len(inputs)
    return _sizes_token(kind, facts.sizes, named, grouped, inputs, outputs, samples, unknown)


@functools.lru_cache(maxsize=4096)  # every step asks for every node
def _sizes_token(kind: Any, sizes: Sizes, named: Hashable, grouped: bool, inputs: tuple[Shape, ...],
                 outputs: tuple[Shape, ...], samples: int, unknown: int) -> Hashable:  # fmt: skip
    """The sizes at a node that belong to the key.

    Args:
        kind: its type.
        sizes: what is known of that.
        named: the dimensions that it names.
        grouped: whether its channels are in groups.
        inputs, outputs: shapes.
        samples: ``B``.
        unknown: how many inputs have no gradients, so that their shapes are not known.
    """
    if sizes is Sizes.ALONG:
        if name_of_type(kind).startswith("Cat") and unknown > 1:
            raise Unlisted("CatBackward0 of several tensors without gradients, whose sizes it does not show")
        rank = max(map(len, (*inputs, *outputs)))
        return tuple([_along(dim, inputs, outputs, rank, samples) for dim in dims_of(kind, named, rank)])
    if sizes is Sizes.WINDOW:  # samples may be groups of channels
        firsts = [max(0, first_spatial(kind, len(shape)) - grouped) for shape in (*inputs, *outputs)]
        spatial = [shape[n:] for n, shape in zip(firsts, (*inputs, *outputs), strict=True)]
        return tuple(spatial), _if_there(spatial, samples)
    return inputs, outputs, samples


def _along(dim: int, inputs: Sequence[Shape], outputs: Sequence[Shape], rank: int, samples: int) -> Hashable:
    """The sizes in one dimension, where it is there: selecting takes it away."""
    sizes = [shape[dim : dim + 1] if len(shape) == rank else () for shape in (*inputs, *outputs)]
    return tuple(sizes), _if_there(sizes, samples)


def _if_there(sizes: Sequence[Shape], samples: int) -> int:
    """``B`` if samples could be in one of these dimensions, else 0."""
    return samples if any(n % samples == 0 for shape in sizes for n in shape) else 0


@functools.lru_cache(maxsize=4096)
def _reshape(before: Shape, after: Shape, samples: int) -> tuple[Hashable, tuple[tuple[int, str], ...]]:
    """The part of a reshape in the key, and the place of ``B`` among the factors of sample dimensions."""
    groups = _groups(before, after)
    if groups is None:
        return (before, after, samples), ()
    token: list[Hashable] = []
    forms: list[tuple[int, str]] = []
    for ins, outs in groups:
        size, digits = prod(ins), _digits(ins, outs)
        token.append((len(ins), len(outs), digits and len(digits)))
        if size % samples or size == 1 or (len(ins) == len(outs) == 1):
            if digits is None:
                token.append((ins, outs))
        elif digits is not None and samples in (digits[0], digits[-1]):
            places = [p for p, n in (("first", digits[0]), ("last", digits[-1])) if n == samples]
            token.append(tuple(places))
            forms += [(size, place) for place in (places if len(digits) == 2 else [*places, "several"])]
        else:
            token.append((ins, outs, samples))
    return tuple(token), tuple(forms)


def _groups(before: Shape, after: Shape) -> list[tuple[Shape, Shape]] | None:
    """The runs of dimensions that become runs of others, as short as can be; sizes of 1 go anywhere."""
    if prod(before) != prod(after) or 0 in before:
        return None
    groups: list[tuple[Shape, Shape]] = []
    i = j = 0  # where the next group begins
    while i < len(before) or j < len(after):
        k, n = min(i + 1, len(before)), min(j + 1, len(after))
        while (difference := prod(before[i:k]) - prod(after[j:n])) != 0:
            k, n = k + (difference < 0), n + (difference > 0)
        groups.append((before[i:k], after[j:n]))
        i, j = k, n
    return groups


def _digits(ins: Shape, outs: Shape) -> Shape | None:
    """The common factors that both sides are products of neighbours of; ``None`` where there are none."""
    ends = sorted({*accumulate(ins, mul), *accumulate(outs, mul)} - {1})
    if any(b % a for a, b in pairwise(ends)):
        return None
    return tuple([b // a for a, b in zip([1, *ends], ends, strict=False)])


@functools.lru_cache(maxsize=256)
def _canonical(shapes: tuple[Shape, ...], samples: int) -> Hashable:
    """Shapes with sizes in the order in which they first appear, 1 and multiples of ``B`` told apart."""
    names: dict[int, int] = {}
    return tuple([
        tuple([1 if n == 1 else (names.setdefault(n, len(names)), n % samples == 0) for n in shape])
        for shape in shapes
    ])  # fmt: skip


def _hashable(value: Any) -> Hashable:
    if not isinstance(value, (list, tuple)):
        return value
    return tuple(value if _NESTED.isdisjoint(map(type, value)) else map(_hashable, value))
