"""Compares the settings of all ranks, before any rank waits for another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gramjd.distributed.factors import Manifest
from gramjd.distributed.ranks import Ranks
from gramjd.errors import RankFailedError, RanksDisagreeError


@dataclass(frozen=True)
class Statement:
    """The settings of a rank before a computation; ranks with different settings raise an error."""

    settings: Mapping[str, Any]  # by what they are called in an error
    manifest: Manifest | None = None
    budget: int = 0  # bytes of a message
    error: str | None = None  # of a rank that cannot take part


_REMEDY = "Give all ranks the same model and settings; only samples may differ."


def agree(ranks: Ranks, mine: Statement, remedy: str = _REMEDY) -> list[Statement]:
    """The statements of all ranks. Only digests are sent where all say the same.

    Raises:
        RankFailedError: a rank cannot take part.
        RanksDisagreeError: ranks have other settings. Every rank raises the same.
    """
    digest = hashlib.sha256(repr(mine).encode()).digest()
    digests = ranks.gather(torch.frombuffer(bytearray(digest), dtype=torch.uint8))
    if all(bool((other == digests[0]).all()) for other in digests[1:]) and mine.error is None:
        return [mine] * ranks.size
    said: list[Statement] = ranks.gather_objects(mine)
    failed = [(rank, s.error) for rank, s in enumerate(said) if s.error is not None]
    if failed:
        others = f", and so are {len(failed) - 1} more" if len(failed) > 1 else ""
        raise RankFailedError(f"Rank {failed[0][0]} cannot take part{others}. There: {failed[0][1]}")
    for rank, other in enumerate(said):
        for name, value in said[0].settings.items():
            if other.settings[name] != value:
                difference = _difference(name, rank, value, other.settings[name])
                raise RanksDisagreeError(f"{difference} {remedy}")
    return said


def _difference(name: str, rank: int, first: Any, second: Any) -> str:
    """Describe the difference between two ranks' settings."""
    if isinstance(first, Sequence) and isinstance(second, Sequence) and not isinstance(first, str):
        if len(first) != len(second):
            missing = [x for x in first if x not in second] + [x for x in second if x not in first]
            first, second = (f"{len(some)} of them" for some in (first, second))
            name += f" (on one rank only: {missing[:3]})" if missing else ""
        else:
            first, second = next((x, y) for x, y in zip(first, second, strict=True) if x != y)
    return f"The ranks disagree about the {name}: rank 0 has {first}, rank {rank} has {second}."
