"""What an engine has proven, and how far it trusts it.

Two things are proven of the graph of an output, each with a key of its own:

- *Completeness*, for graphs of one structure (the same nodes over the same parameters, recorded in the same
  order): the blocks of the recorded uses, in the right layouts, add up to autograd's gradients.
- *Separation*, for graphs of one separation key (:mod:`gramjd.engine.analysis.signature`): no sample can
  reach a place that the layouts give to another one, whatever the data are.

Where the second is not proven, the layouts are measured in every call. Both are audited as they are used.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from gramjd.engine.analysis.graph import Graph
from gramjd.engine.analysis.signature import Unlisted, separation_key
from gramjd.engine.recording.recorded import HOOK
from gramjd.engine.solving.task import Plan, Separation

_STRUCTURES = 64  # that an engine remembers
_SEPARATIONS = 64  # of each

_FAILED = (
    "An audit failed: in call {calls} of a graph of this structure the blocks no longer add up to autograd's "
    "gradient for {{!r}}, though they did {proven}. The Gramians of {since} may be wrong. Something that the "
    "graph does not show decides on what it computes: a hook, a custom autograd.Function, a compiled part. "
    "Use Engine(..., check='always'), and please report the model."
)


@dataclass
class Proof:
    """What is proven of graphs of one structure."""

    plan: Plan
    separations: dict[Hashable, Separation] = field(default_factory=dict)
    calls: int = 1  # since it was proven, that call included
    audited: int = 1  # the last of them that was verified


class Proofs:
    """What an engine has proven.

    Args:
        audit: the most calls between two audits of a structure; ``None`` for no audits.
    """

    def __init__(self, audit: int | None) -> None:
        self.audit = audit
        self.known: dict[Hashable, Proof] = {}

    def recall(
        self, graph: Graph, held: tuple[int, ...], shape: tuple[int, ...], samples: int | None
    ) -> Case:
        """What is known of a graph; ``samples`` is ``None`` without a batch dimension."""
        structure = graph.structure, held
        proof = self.known.get(structure)
        plan = proof.plan.trusted() if proof is not None else Plan()
        key: Hashable = None
        if samples:  # a rank may have none
            try:
                if graph.hooked:
                    raise Unlisted(HOOK)
                key = separation_key(graph.order, graph.numbers, shape, samples)
            except Unlisted as error:
                plan.unlisted = str(error)
        if proof is not None:
            plan.calls = proof.calls
            plan.separation = proof.separations.get(key)
            if plan.separation is not None and plan.separation.is_whole:
                plan.layouts = dict(plan.separation.layouts)
            if self._is_due(proof.calls + 1):
                plan.audit = _message(proof)
        return Case(plan, structure, key)

    def keep(self, case: Case) -> None:
        """Remember what a call that succeeded has proven."""
        plan, proof = case.plan, self.known.get(case.structure)
        if not plan.complete:
            return
        if proof is None:
            proof = self.known[case.structure] = Proof(plan.trusted())
            if len(self.known) > _STRUCTURES:
                self.known.pop(next(iter(self.known)))
        else:
            proof.plan = plan.trusted()
            proof.calls += 1
            if plan.audit:
                proof.audited = proof.calls
        if plan.separation is not None and case.key is not None:
            proof.separations[case.key] = plan.separation
            if len(proof.separations) > _SEPARATIONS:
                proof.separations.pop(next(iter(proof.separations)))

    def _is_due(self, call: int) -> bool:
        """Whether a call since a proof is audited: the second, fourth, eighth …, and each ``audit``-th."""
        if self.audit is None:
            return False
        return call % self.audit == 0 or (call < self.audit and call & (call - 1) == 0)


@dataclass(frozen=True)
class Case:
    """A graph's plan, and the keys under which it may be remembered."""

    plan: Plan
    structure: Hashable
    key: Hashable


def describe(plan: Plan, check: str, samples: int | None, opaque: bool) -> str:
    """What the result of a call rests on; ``samples`` is ``None`` without a batch dimension.

    ``opaque``: whether the graph has replayed calls of modules, which are verified in every call.
    """
    if "losses" in plan.strategies.values():
        return "The rows are those of ordinary backward passes, one for each loss."
    if check == "never":
        return "Nothing was verified: check='never'."
    if plan.audit or check == "always" or opaque:
        first = "Verified against autograd's gradients in this call"
    elif plan.calls:
        first = (
            f"Verified against autograd's gradients in an earlier call of this structure, {plan.calls} ago"
        )
    elif plan.complete:
        first = "Proven against autograd's gradients in this call, the first one of its structure"
    else:
        first = "Verified against autograd's gradients in this call, as in each until every use takes part"
    if samples is None or samples == 1:
        return f"{first}."
    separation = plan.separation
    if plan.unlisted:
        second = f"every call measures where the samples are: nothing is proven of {plan.unlisted}"
    elif separation is None:
        second = "every call measures where the samples are: other data could let them reach each other"
    elif separation.is_whole:
        second = "it is proven that no data let one sample reach another"
    else:
        passed = f"{separation.passed} of {separation.needed}"
        second = (
            f"this call measured where the samples are, until it is proven ({passed} patterns of samples)"
        )
    return f"{first}; {second}."


def _message(proof: Proof) -> str:
    calls, last = proof.calls + 1, proof.audited
    proven = "when it was proven" if last == 1 else f"in call {last}"
    since = f"this call and of calls {last + 1} to {calls - 1}" if calls > last + 1 else "this call"
    return _FAILED.format(calls=calls, proven=proven, since=since)
