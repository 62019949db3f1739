"""Who contracts what, decided from the manifests alone, so that all ranks decide the same."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate

from gramjd.distributed.factors import Manifest
from gramjd.distributed.ring import Round
from gramjd.plan import steps


@lru_cache(maxsize=64)
def round_of(manifests: tuple[Manifest, ...], which: tuple[int, ...]) -> Round:
    """The round of some parameters, which two opposite ranks share out by the time they take."""
    if len(manifests) % 2 or not which:
        return Round(manifests, which, ())
    largest = max(manifests, key=lambda manifest: manifest.samples_in_all)
    times = [_time(largest, p) for p in which]
    until = list(accumulate(times))
    middle = sum(2 * total - time < until[-1] for total, time in zip(until, times, strict=True))
    return Round(manifests, which[:middle], which[middle:])


def _time(manifest: Manifest, parameter: int) -> int:
    """Of contracting the blocks of one parameter, in multiply-adds."""
    found = manifest.parts(manifest.meta(), [parameter])
    return sum(step.multiply_adds for part in found for step in steps(part.blocks[parameter]))
