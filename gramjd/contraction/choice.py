"""The plans of every pair of types of blocks, and the choice among them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from gramjd.blocks import Block, Conv, Dense, Lookup, Outer
from gramjd.blocks.outer import shared
from gramjd.contraction import conv, joint, lookup, pairwise
from gramjd.contraction.cost import Cost, Plan, ascending
from gramjd.contraction.rows import dense_rows, rows, rows_cost
from gramjd.internals import is_dynamo_tracing

_ROWS = Plan("rows", rows_cost, rows)  # for any pair

_PLANS: dict[tuple[type, type], Sequence[Plan]] = {
    (Outer, Outer): (
        Plan("pairwise", pairwise.pairwise_cost, pairwise.pairwise),
        Plan("joint", joint.joint_cost, joint.joint),
        _ROWS,
    ),
    (Conv, Conv): (
        Plan("pairwise", pairwise.pairwise_cost, pairwise.unfolded_pairwise),
        *(method.plan() for method in conv.METHODS),
        Plan("rows", lambda u, v: None if conv.alike(u, v) else rows_cost(u, v), rows),
    ),
    (Lookup, Lookup): (
        Plan("pairwise", lookup.pairwise_cost, lookup.pairwise),
        Plan("distinct", lookup.distinct_cost, lookup.distinct),
        Plan("rows", lambda u, v: None if u.grain == v.grain else rows_cost(u, v), rows),
    ),
    (Lookup, Outer): (Plan("picked", lookup.picked_cost, lookup.picked), _ROWS),
    (Dense, Dense): (Plan("rows", rows_cost, dense_rows),),
    (Lookup, Dense): (Plan("picked", lookup.gathered_cost, lookup.gathered), _ROWS),
}


_CHOICES: dict[Hashable, list[tuple[Plan, Cost]]] = {}  # of pairs of blocks met before, by their sizes
_MOST = 4096  # pairs remembered


def plans(u: Block, v: Block) -> list[tuple[Plan, Cost]]:
    """The plans that apply to two blocks, the cheapest first."""
    if is_dynamo_tracing():
        return _sorted(u, v)
    key = (type(u), _sizes(u), None if u is v else (type(v), _sizes(v)))
    try:
        found = _CHOICES.get(key)
    except TypeError:  # sizes that a tracer knows by name only
        return _sorted(u, v)
    if found is None:
        found = _CHOICES[key] = _sorted(u, v)
        if len(_CHOICES) > _MOST:
            _CHOICES.pop(next(iter(_CHOICES)), None)
    return found


def _sorted(u: Block, v: Block) -> list[tuple[Plan, Cost]]:
    known = _PLANS.get((type(u), type(v)), (_ROWS,))
    costs = [(plan, plan.cost(u, v)) for plan in known]
    return ascending([(p, cost) for p, cost in costs if cost is not None], lambda found: found[1].time)


def _sizes(block: Block) -> Hashable:
    """All that the costs of a block's plans depend on."""
    if isinstance(block, Dense):
        return block.values.shape
    if isinstance(block, Lookup):
        return block.c.shape, block.shape, shared(block.ids, 0).shape
    if isinstance(block, Outer):
        c, a = block.c, block.a
        # an expanded dimension is one entry of memory
        return block.shape, c.shape, a.shape, c.stride(1) == 0, a.stride(0) == 0, block.transposed
    x, y = block.factors
    sizes = block.shape, x.shape, y.shape, shared(x, 1).shape, shared(y, 1).shape
    return *sizes, block.stride, block.dilation, conv.rounded(block)


def swapped(u: Block, v: Block) -> bool:
    """Whether the plans of this pair are those of the swapped pair."""
    return isinstance(v, Lookup) and not isinstance(u, Lookup)
