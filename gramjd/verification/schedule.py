"""Decides which results of a transform are verified."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from gramjd.errors import CheckFailedError
from gramjd.functional.arguments import Arguments
from gramjd.functional.capture import Captured
from gramjd.internals import runs_plainly
from gramjd.verification.comparison import Call
from gramjd.verification.functions import identity
from gramjd.verification.structures import structure

Check = Literal["first", "always", "never"]
_STRUCTURES = 64  # that are remembered of a function
_FUNCTIONS = 256  # that are remembered


@dataclass
class Seen:
    """The number of calls of one structure, and the last one that was verified."""

    calls: int = 0
    verified: int = 0  # the call of the function, counted from 1, whose result was verified last
    refuted: bool = False  # has an audit failed? Then each result is verified


@dataclass
class Memory:
    """The calls of one function with one set of options, by whichever transforms, and what they verified."""

    calls: int = 0
    verifications: int = 0
    seen: dict[Hashable, Seen] = field(default_factory=dict)  # by structure, the latest last


_MEMORIES: dict[Hashable, Memory] = {}  # by function and options, the latest last


def forget() -> None:
    """Forget what is verified of all functions, but for transforms that verified something themselves."""
    _MEMORIES.clear()


class Verifier:
    """Decides when a transform verifies its results.

    What is verified is remembered for the function: another transform of it with the same options trusts it.

    Args:
        function: what is transformed.
        options: what else decides on the results, hashable.
        check: ``"first"``, ``"always"`` or ``"never"``.
        audit: the greatest distance, in calls, between two verifications of a structure under ``"first"``;
            ``None``: its first result alone.

    Raises:
        ValueError: an option is none of these.
    """

    def __init__(self, function: Callable[..., Any], options: Hashable, check: Check, audit: int | None
                 ) -> None:  # fmt: skip
        if check not in ("first", "always", "never"):
            raise ValueError(f"check must be 'first', 'always' or 'never', not {check!r}.")
        if audit is not None and not (type(audit) is int and audit > 0):
            raise ValueError(f"audit must be a positive number of calls, or None, not {audit!r}.")
        self.check, self.audit = check, audit
        self._function, self._options = function, options
        self._memory: Memory | None = None

    def applies(self, given: Arguments) -> bool:
        """Whether results can be verified here: not if something else traces or transforms them."""
        return self.check != "never" and runs_plainly(
            [*given.parameters, *given.batch, *given.batch_independent]
        )

    def verify(self, call: Call, found: Captured) -> None:
        """Verify a result, if its structure says so.

        Raises:
            CheckFailedError: it is wrong, or could not be computed a second time.
        """
        memory = self._memory = self._memory or self._of_function()
        memory.calls += 1
        key = structure(call.given, found)
        seen = memory.seen[key] = memory.seen.pop(key, Seen())
        seen.calls += 1
        if self.check == "always" or not seen.verified or is_due(seen.calls, self.audit):
            memory.verifications += 1
            try:
                proven = self._prove(replace(call, seed=memory.verifications), found, seen, memory.calls)
            except CheckFailedError:
                seen.refuted, seen.verified = seen.refuted or seen.verified > 0, 0
                raise
            if proven and not seen.refuted:
                seen.verified = memory.calls
        if len(memory.seen) > _STRUCTURES:
            del memory.seen[next(iter(memory.seen))]

    def _of_function(self) -> Memory:
        """Look up what is verified of the function, by other transforms of it, too."""
        function = identity(self._function)
        if function is None:
            return Memory()
        key = function, self._options, self.check, self.audit
        memory = _MEMORIES.pop(key, None)
        memory = _MEMORIES[key] = memory or Memory()
        if len(_MEMORIES) > _FUNCTIONS:
            del _MEMORIES[next(iter(_MEMORIES))]
        return memory

    def _prove(self, call: Call, found: Captured, seen: Seen, number: int) -> bool:
        """Raise an error if a result is wrong; return whether it could be compared."""
        first, difference = not seen.verified, call.difference(found)
        if difference == "" and first and call.hides_uses(found):
            elsewhere = call.moved()
            again = elsewhere.capture_or_none()
            moved = again and elsewhere.difference(again)
            difference = moved + _MOVED if moved else ""
        if not difference:
            return difference is not None
        since = ""
        if not first and self.check == "first":
            since = (
                f" Results since call {seen.verified + 1} of this function may be wrong, too (this is call "
                f"{number}): the last one of this structure that was proved is that of the call before."
            )
        raise CheckFailedError(f"{difference}.{since} {_REMEDY}")


_MOVED = " (at parameters moved a little, where what is zero now is not)"
_REMEDY = (
    "Correct the rule, if it is your own (gramjd.register_rule), and report it otherwise. Until then, take "
    "gramjd.Engine, which falls back on autograd; check='never' turns this check off."
)


def is_due(call: int, audit: int | None) -> bool:
    """Whether a call is due: the first, second, fourth, … of a structure, and every ``audit``-th."""
    if audit is None or call == 1:
        return call == 1
    return call % audit == 0 or (call < audit and call & (call - 1) == 0)
