"""Two steps timed in alternation, so that a busy moment does not fall on one of them alone."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Times:
    """Seconds of each round of a step, and of the plain step beside it."""

    step: Sequence[float]
    plain: Sequence[float]

    def summary(self) -> dict[str, float]:
        """The ratio's median and quartiles over the rounds, and the two medians in seconds."""
        ratios = [mine / plain for mine, plain in zip(self.step, self.plain, strict=True)]
        low, middle, high = statistics.quantiles(
            ratios if ratios[1:] else ratios * 2, n=4, method="inclusive"
        )
        return {
            "ratio": middle,
            "low": low,
            "high": high,
            "seconds": statistics.median(self.step),
            "sgd_seconds": statistics.median(self.plain),
            "rounds": len(ratios),
        }


PROOFS = 14  # calls of a step that are not measured
LEAST = 9  # of them, of a step of ours: its proofs, audits and recording of ops are in the first eight
PATIENCE = 20.0  # seconds for the others: a step of some peers takes as long


def alternate(step: Callable[[], object], plain: Callable[[], object], device: torch.device,
              budget: float = 4.0, most: int = 100, least: int = 0) -> Times:  # fmt: skip
    """For about ``budget`` seconds, in random order in each round; three rounds at least, or a minute.

    Before that, calls in which an engine proves what later ones rely on, and ops are recorded: up to
    fourteen, in twenty seconds, but no less than ``least``.
    """
    start = time.perf_counter()
    for call in range(PROOFS):
        for run in (plain, step):
            seconds(run, device)
        if time.perf_counter() - start > PATIENCE and call + 1 >= least:
            break
    times: dict[Callable[[], object], list[float]] = {step: [], plain: []}
    start = time.perf_counter()
    while (rounds := len(times[step])) < most:
        elapsed = time.perf_counter() - start
        if rounds and elapsed > (60.0 if rounds < 3 else budget):
            break
        for run in random.sample([step, plain], 2):
            times[run].append(seconds(run, device))
    return Times(times[step], times[plain])


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one run; what it returns is dropped after the clock has stopped."""
    if device.type != "cuda":
        start = time.perf_counter()
        kept = run()
        elapsed = time.perf_counter() - start
        del kept
        return elapsed
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    kept = run()
    end.record()
    torch.cuda.synchronize(device)
    del kept
    return 1e-3 * float(begin.elapsed_time(end))
