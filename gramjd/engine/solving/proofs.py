"""Remembers the proofs of an engine, and decides which graphs they cover.

Two things are proven of the graph of an output, each with a key of its own:

- *Completeness*, for graphs of one structure (the same nodes over the same parameters, recorded in the same
  order): the blocks of the recorded uses, in the right layouts, add up to autograd's gradients.
- *Separation*, for graphs of one separation key (:mod:`gramjd.engine.analysis.signature`): no sample can
  reach a place that the layouts give to another one, whatever the data are. Where the proof finds samples in
  a slice, a concatenation or a pad, the key has all sizes.

Where the second is not proven, the layouts are measured in every call. Both are audited as they are used.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from gramjd.engine.analysis.graph import Graph
from gramjd.engine.analysis.signature import Unlisted, separation_keys
from gramjd.engine.recording.recorded import HOOK
from gramjd.engine.solving.program import Known, Program, Separation, Solution
from gramjd.engine.solving.solve import Request

_STRUCTURES = 64  # that an engine remembers
_SEPARATIONS = 64  # of each

_FAILED = (
    "An audit failed: in call {calls} of a graph of this structure the blocks no longer add up to autograd's "
    "gradient for {{!r}}, though they did {proven}. The Gramians of {since} may be wrong. Something that the "
    "graph does not show decides on what it computes: a hook, a custom autograd.Function, a compiled part. "
    "From now on each call of this structure is verified, as by Engine(..., check='always'). Please report "
    "the model."
)

_NO_KEYS = None, None
_REFUTED = "a graph of this structure, of which an audit failed"


@dataclass(frozen=True)
class Proof:
    """The proof for graphs of one structure."""

    program: Program
    separations: Mapping[Hashable, Separation] = field(default_factory=dict)  # by separation key
    calls: int = 1  # since it was proven, that call included
    audited: int = 1  # the last of them that was verified


class Proofs:
    """All proofs of an engine.

    Args:
        audit: the most calls between two audits of a structure; ``None`` for no audits.
    """

    def __init__(self, audit: int | None) -> None:
        self.audit = audit
        self.known: dict[Hashable, Proof] = {}
        self.refuted: dict[Hashable, None] = {}  # structures of which an audit failed, in order

    def recall(
        self, graph: Graph, held: tuple[int, ...], shape: tuple[int, ...], samples: int | None
    ) -> Known:
        """Look up what is known of a graph; ``samples`` is ``None`` without a batch dimension."""
        structure = graph.structure, held
        if structure in self.refuted:
            return Known(structure, unlisted=_REFUTED)
        (key, exact), unlisted = _separation_keys(graph, shape, samples)
        proof = self.known.get(structure)
        if proof is None:
            return Known(structure, key, exact, unlisted=unlisted)
        audit = _message(proof) if self._is_due(proof.calls + 1) else ""
        separation = proof.separations.get(key)
        if separation is not None and separation.displaced:
            separation = proof.separations.get(exact, replace(separation, passed=0, failed=False))
        return Known(structure, key, exact, proof.program, separation, proof.calls, audit, unlisted)

    def keep(self, known: Known, solution: Solution) -> None:
        """Remember what a call that succeeded has proven."""
        if not solution.program.complete or known.structure in self.refuted:
            return
        before = self.known.get(known.structure) or Proof(solution.program, calls=0)
        calls = before.calls + 1
        audited = before.audited if before.calls and not known.audit else calls
        separations = dict(before.separations)
        if solution.separation is not None and known.key is not None:
            separations[known.key] = solution.separation
            if solution.separation.displaced:  # the other key then says no more than that
                separations[known.exact] = solution.separation
            _forget_first(separations, _SEPARATIONS)
        self.known[known.structure] = Proof(solution.program, separations, calls, audited)
        _forget_first(self.known, _STRUCTURES)

    def refute(self, known: Known) -> None:
        """Trust no later graph of this structure: an audit failed."""
        self.known.pop(known.structure, None)
        self.refuted[known.structure] = None
        _forget_first(self.refuted, _STRUCTURES)

    def _is_due(self, call: int) -> bool:
        """Whether a call since a proof is audited: the second, fourth, eighth …, and each ``audit``-th."""
        if self.audit is None:
            return False
        return call % self.audit == 0 or (call < self.audit and call & (call - 1) == 0)


def _separation_keys(graph: Graph, shape: tuple[int, ...], samples: int | None
                     ) -> tuple[tuple[Hashable, Hashable], str]:  # fmt: skip
    """The separation keys, if there are any; else why not."""
    if not samples:  # a rank may have none
        return _NO_KEYS, ""
    if graph.hooked:
        return _NO_KEYS, HOOK
    try:
        return separation_keys(graph.order, graph.numbers, shape, samples), ""
    except Unlisted as error:
        return _NO_KEYS, str(error)


def _forget_first(known: dict[Hashable, Any], most: int) -> None:
    while len(known) > most:
        known.pop(next(iter(known)))


def describe(request: Request, solution: Solution, always: bool) -> str:
    """Describe the evidence for the result of a call; ``always``: whether each call is verified."""
    problem, known, program = request.problem, request.known, solution.program
    if "losses" in program.strategies.values():
        return "The rows are those of ordinary backward passes, one for each loss."
    if not request.check:
        return "Nothing was verified: check='never'."
    first = _of_gradients(known, program, always or problem.is_opaque)
    if problem.batch_dim is None or problem.samples == 1:
        return f"{first}."
    if set(program.strategies.values()) == {"rows"}:
        return f"{first}; each row is an ordinary backward pass, whichever entries belong to which sample."
    return f"{first}; {_of_separation(known, solution.separation)}."


def _of_gradients(known: Known, program: Program, each: bool) -> str:
    """Describe the evidence for the gradients; ``each``: whether each call is verified."""
    if known.audit or each:
        return "Verified against autograd's gradients in this call"
    if known.calls:
        return (
            f"Verified against autograd's gradients in an earlier call of this structure, {known.calls} ago"
        )
    if program.complete:
        return "Proven against autograd's gradients in this call, the first of its structure"
    return "Verified against autograd's gradients in this call, as in each until all uses have gradients"


def _of_separation(known: Known, separation: Separation | None) -> str:
    """Describe the evidence for the layouts."""
    measured = "which entries belong to which sample is measured"
    if known.unlisted:
        return f"{measured} in every call: nothing is proven of {known.unlisted}"
    if separation is None or separation.failed:
        return f"{measured} in every call: other data could change that"
    if separation.is_whole:
        return "it is proven that no data change which entries belong to which sample"
    passed = f"{separation.passed} of {separation.needed}"
    return f"{measured} in each call, until it is proven that no data change that ({passed} parts)"


def _message(proof: Proof) -> str:
    calls, last = proof.calls + 1, proof.audited
    proven = "when it was proven" if last == 1 else f"in call {last}"
    since = f"this call and of calls {last + 1} to {calls - 1}" if calls > last + 1 else "this call"
    return _FAILED.format(calls=calls, proven=proven, since=since)
