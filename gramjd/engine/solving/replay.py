"""Fused ops that no rule sees inside: their uses come from a replay of what they are made of."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from gramjd import pytree
from gramjd.engine.recording.nodes import Cotangents, values_of
from gramjd.engine.recording.recorded import OpMark
from gramjd.engine.recording.recorder import Recorder
from gramjd.engine.solving import backward
from gramjd.engine.solving.projected import Probed
from gramjd.rounding import tolerance
from gramjd.rules import decomposition_of, tensors_of
from gramjd.uses.known_calls import KnownCalls
from gramjd.uses.use import Record


class _Collector(Recorder):
    """A recorder that keeps its nodes in a list: there is no need to walk the graph for them."""

    def __init__(self, frame: FrameType) -> None:
        super().__init__(frame, KnownCalls())
        self.nodes: list[Any] = []

    def record(self, op: Any, args: Any, kwargs: dict[str, Any], derived: bool) -> tuple[Any, Record | None]:
        out, record = super().record(op, args, kwargs, derived)
        if record is not None:
            self.nodes.append(next(t.grad_fn for t in tensors_of(out) if t.requires_grad))
        return out, record


@dataclass(frozen=True)
class Replayed:
    """The nodes of a replay, in order, with the cotangents of each that follow from the op's own."""

    nodes: list[Any]
    cotangents: list[Cotangents]
    probed: Sequence[Sequence[Probed | None]]
    graph: Tensor | None = None  # whose life is that of the nodes


def replay(node: Any, cotangents: Cotangents, probed: Sequence[Probed | None] | None) -> Replayed:
    """Run the decomposition of a node's op on the arguments that it received, under a recorder.

    Raises:
        ValueError: the outputs differ from those of the op.
    """
    mark: OpMark = node.record
    record, saved = mark.record, values_of(node)
    assert mark.replay is not None
    outs = sum(mark.live)
    recorded = saved[len(saved) - outs :]
    with torch.random.fork_rng(devices=[], enabled=mark.replay.rng_state is not None), torch.enable_grad():
        if mark.replay.rng_state is not None:
            torch.set_rng_state(mark.replay.rng_state)
        out, nodes = _run(record, saved)
    live = [*compress(tensors_of(out), mark.live)]
    for got, want in zip(live, recorded, strict=True):
        if got.shape != want.shape or (got - want).norm() > tolerance(want.dtype) * want.norm():
            raise ValueError(f"a replay of {record.call.op.__name__} step by step gave other outputs")
    with torch.enable_grad():
        total = torch.cat([t.flatten() for t in live])
    with backward.tapped(nodes) as taps:
        flat, counts = backward.flattened(taps), [len(mine) for mine in taps]

        def pull(given: Cotangents) -> list[Cotangents]:
            return backward.grouped(backward.gradients(total, flat, _flat(given, live)), counts)

        found = pull(cotangents)
        ours = [] if probed is None else pull([c if c is None else c.values.unsqueeze(0) for c in probed])
    return Replayed(nodes, found, [[c if c is None else Probed(c[0]) for c in cs] for cs in ours], total)


def _run(record: Record, saved: Sequence[Tensor]) -> tuple[Any, list[Any]]:
    """The outputs of an op's decomposition on what its node saved, and the nodes of the uses inside."""
    recorder, leaves = _Collector(sys._getframe()), list(record.leaves)
    for index, value in zip(record.saved, saved, strict=False):
        leaves[index] = value
    for slot, value in zip(record.slots, saved[len(record.saved) :], strict=False):
        leaves[slot.index] = value.requires_grad_()
        recorder.add([value], [])
        recorder.sources[id(value)] = slot.source
    values = pytree.unflatten(pytree.flatten(record.call.values)[1], leaves)
    decomposition = decomposition_of(record.call.op)
    assert decomposition is not None
    with recorder:
        out = record.call.with_op(decomposition)(values)
    recorder.frame = None  # this one, which would keep all that is here alive until it is collected
    return out, recorder.nodes


def _flat(cotangents: Cotangents, outputs: Sequence[Tensor]) -> Tensor:
    """The cotangents of all outputs side by side, ``[K, entries of all outputs]``."""
    K = next(len(c) for c in cotangents if c is not None)
    parts = [
        t.new_zeros(K, t.numel()) if c is None else c.flatten(1)
        for c, t in zip(cotangents, outputs, strict=True)
    ]
    return torch.cat(parts, 1)
