"""Decides which rank sends what, from the manifests alone, so that all ranks decide the same.

For each parameter there are two exact methods, and the one that sends fewer bytes is taken:

    factors   every rank's factors pass (n - 1) / 2 others of n ranks, and inner products travel back
    slices    every rank gets the rows of all at 1 / n of the parameter's entries: all but 1 / n of the
              rows travel once, and what the ranks' slices give is added up

Of ``F`` bytes of factors and ``R`` of rows, ``n·F`` is compared with ``2·R``. All pairs of blocks of a
parameter take the same method, as they share their factors and their rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from itertools import accumulate
from math import lcm, prod

from gramjd.contraction import steps
from gramjd.distributed.factors import Manifest
from gramjd.distributed.ring import Round
from gramjd.distributed.slices import Message, Rows, messages


@dataclass(frozen=True)
class Problem:
    """The problem of all ranks: sizes, options and the wanted result."""

    manifests: tuple[Manifest, ...]  # of each
    objectives: int  # K
    itemsize: int  # bytes of a number in products and rows
    elements: int  # of a message, at most
    summed: bool  # are objectives sums over ranks? Else each rank has samples of its own
    whole: bool  # does each rank want all rows of the Gramian?

    @property
    def samples(self) -> list[int]:
        """The number of samples of each rank."""
        return [manifest.samples_in_all for manifest in self.manifests]


@dataclass(frozen=True)
class Traffic:
    """Bytes that all ranks together send for one Gramian."""

    factors: int = 0
    tiles: int = 0  # inner products between two ranks, on their way back around the ring
    slices: int = 0
    sums: int = 0  # shares of the Gramian, to where they are added up
    gathered: int = 0  # the rows of the Gramian, to all ranks

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Plan:
    """A plan of messages: factors around the ring, and slices of rows to all ranks."""

    round: Round
    messages: Sequence[Message]
    traffic: Traffic

    @property
    def sliced(self) -> list[int]:
        """The parameters whose rows are sliced."""
        return sorted({piece.parameter for message in self.messages for piece in message})


@lru_cache(maxsize=64)
def plan_of(problem: Problem, which: tuple[int, ...]) -> Plan:
    """The plan of some parameters that sends the fewest bytes; by factors, if several do."""
    known = _rows(problem, which)
    times = _times(problem.manifests, which)
    mixed = _by_factors(problem, known)
    choices = dict.fromkeys([tuple(which), tuple(p for p in which if p in mixed), ()])
    plans = [_plan(problem, known, times, factors) for factors in choices]
    return min(plans, key=lambda plan: plan.traffic.total)


def _plan(problem: Problem, known: Mapping[int, Rows], times: Mapping[int, int], factors: Sequence[int]
          ) -> Plan:  # fmt: skip
    """The plan that sends the factors of some parameters and the rows of all others."""
    round = _round(problem.manifests, factors, times)
    sliced = {p: rows for p, rows in known.items() if p not in set(factors) and rows.entries}
    sent = messages(sliced, len(problem.manifests), problem.elements)
    return Plan(round, sent, _traffic(problem, round, sliced, sent))


def _round(manifests: tuple[Manifest, ...], which: Sequence[int], times: Mapping[int, int]) -> Round:
    """The round of some parameters, which two opposite ranks share out by the time they take."""
    if len(manifests) % 2 or not which:
        return Round(manifests, tuple(which), ())
    until = list(accumulate(times[p] for p in which))
    middle = sum(2 * total - times[p] < until[-1] for total, p in zip(until, which, strict=True))
    return Round(manifests, tuple(which[:middle]), tuple(which[middle:]))


def _times(manifests: Sequence[Manifest], which: Iterable[int]) -> dict[int, int]:
    """The multiply-adds to contract the blocks of each parameter."""
    largest = max(manifests, key=lambda manifest: manifest.samples_in_all)
    meta = largest.meta()

    def time(p: int) -> int:
        found = largest.parts(meta, [p])
        return sum(step.multiply_adds for part in found for step in steps(part.blocks[p]))

    return {p: time(p) for p in which}


def _rows(problem: Problem, which: Iterable[int]) -> dict[int, Rows]:
    """The rows of each parameter as they are spread over the ranks."""
    alike = {manifest: manifest.meta() for manifest in set(problem.manifests)}

    def rows(p: int) -> Rows:
        blocks = {
            manifest: [block for part in manifest.parts(meta, [p]) for block in part.blocks[p]]
            for manifest, meta in alike.items()
        }
        every = [block for mine in blocks.values() for block in mine]
        spread = [
            problem.objectives * manifest.samples_in_all if blocks[manifest] else 0
            for manifest in problem.manifests
        ]
        entries = prod(every[0].shape) if every else 0
        return Rows(entries, lcm(1, *(block.grain for block in every)), tuple(spread))

    return {p: rows(p) for p in which}


def _by_factors(problem: Problem, known: Mapping[int, Rows]) -> set[int]:
    """Parameters whose own factors are cheaper than their rows.

    What several parameters share is sent once for all of them, and so is saved only with the last: first
    those go whose factors no other one needs, then whole families of parameters that share some.
    """
    n, chosen = len(problem.manifests), set(known)
    alike = Counter(problem.manifests)
    users: dict[tuple[Manifest, int], set[int]] = {}
    for manifest in alike:
        for p in known:
            for number in manifest.needed([p]):
                users.setdefault((manifest, number), set()).add(p)

    def factors(some: set[int]) -> int:
        """Bytes that only these still need."""
        only = (key for key, mine in users.items() if mine & chosen and mine & chosen <= some)
        return n * sum(alike[manifest] * manifest.tensors[number].bytes for manifest, number in only)

    def rows(some: set[int]) -> int:
        return 2 * problem.itemsize * sum(sum(known[p].rows) * known[p].entries for p in some)

    for families in ([{p} for p in known], list(_families(users.values()))):
        for family in families:
            if family <= chosen and factors(family) > rows(family):
                chosen -= family
    return chosen


def _families(users: Iterable[set[int]]) -> Iterator[set[int]]:
    """Parameters that share tensors, and those that share others with these, and so on."""
    found: list[set[int]] = []
    for mine in users:
        joined = set(mine).union(*(family for family in found if family & mine))
        found = [family for family in found if not family & mine] + [joined]
    yield from found


def _around(round: Round) -> int:
    """The bytes of the factors on their way around the ring."""
    n, opposite = len(round.manifests), 1 - len(round.manifests) % 2
    full = sum(count * m.bytes(round.which) for m, count in Counter(round.manifests).items())
    last = round.steps[-1] if round.steps else 0
    return full * (len(round.steps) - opposite) + opposite * sum(round.bytes(r, last) for r in range(n))


def _traffic(problem: Problem, round: Round, sliced: Mapping[int, Rows], sent: Sequence[Message]) -> Traffic:
    """The bytes of a plan."""
    n, K, sizes, item = len(problem.manifests), problem.objectives, problem.samples, problem.itemsize
    ranks, ringing = range(n), bool(round.which)
    factors = _around(round) if ringing else 0
    away = sum(piece.away(r) for message in sent for piece in message for r in ranks)
    if problem.summed:
        return Traffic(factors, 0, item * away, 0, item * n * (n - 1) * K**2)
    met = sum(sizes[r] * sizes[r - step] for step in round.steps for r in ranks) if ringing else 0
    tiles = item * K**2 * met
    sums = item * (n - 1) * K**2 * sum(sizes) ** 2 if sliced else 0
    gathered = item * n * (n - 1) * K**2 * max(sizes) * sum(sizes) if problem.whole else 0
    return Traffic(factors, tiles, item * away, sums, gathered)
