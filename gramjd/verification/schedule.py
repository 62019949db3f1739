"""Decides which results of a transform are verified."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Literal

from gramjd.errors import CheckFailedError
from gramjd.functional.arguments import Arguments
from gramjd.functional.capture import Captured
from gramjd.internals import runs_plainly
from gramjd.verification.comparison import Call
from gramjd.verification.structures import structure

Check = Literal["first", "always", "never"]
_STRUCTURES = 64  # that a transform remembers


@dataclass
class Seen:
    """The number of calls of one structure, and the last one that was verified."""

    calls: int = 0
    verified: int = 0  # the call of the transform, counted from 1, whose result was verified last


class Verifier:
    """Decides when one transform verifies its results, and remembers which are verified.

    Args:
        check: ``"first"``, ``"always"`` or ``"never"``.
        audit: the greatest distance, in calls, between two verifications of a structure under ``"first"``;
            ``None``: its first result alone.

    Raises:
        ValueError: an option is none of these.
    """

    def __init__(self, check: Check, audit: int | None) -> None:
        if check not in ("first", "always", "never"):
            raise ValueError(f"check must be 'first', 'always' or 'never', not {check!r}.")
        if audit is not None and not (type(audit) is int and audit > 0):
            raise ValueError(f"audit must be a positive number of calls, or None, not {audit!r}.")
        self.check, self.audit, self.calls, self.number = check, audit, 0, 0
        self.seen: dict[Hashable, Seen] = {}

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
        self.calls += 1
        key = structure(call.given, found)
        seen = self.seen.pop(key, None) or Seen()
        seen.calls += 1
        if self.check == "always" or not seen.verified or is_due(seen.calls, self.audit):
            self.number += 1
            if self._prove(call, found, seen):
                seen.verified = self.calls
        self.seen[key] = seen  # the latest is last
        if len(self.seen) > _STRUCTURES:
            del self.seen[next(iter(self.seen))]

    def _prove(self, call: Call, found: Captured, seen: Seen) -> bool:
        """Raise an error if a result is wrong; return whether it could be compared."""
        call = replace(call, seed=self.number)
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
                f" Results since call {seen.verified + 1} of this transform may be wrong, too (this is call "
                f"{self.calls}): the last one of this structure that was proved is that of the call before."
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
