"""How the time and memory of a step grow with one size of a case, beside what the cost model predicts."""

from __future__ import annotations

import gc
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

import gramjd
from benchmarks import memory, timing
from benchmarks.cases import make
from benchmarks.implementations import ours
from benchmarks.problem import Problem, sgd
from benchmarks.setting import setting

BATCHES, OBJECTIVES = (8, 32, 128, 512, 1024), (1, 3, 10, 30, 100)
SMALL_ENCODER = {"width": 64, "depth": 2, "length": 32, "vocabulary": 500}
# case:axis → the sizes along the axis, and the others where they are not the case's own
AXES: dict[str, tuple[Sequence[int], Mapping[str, int]]] = {
    "A:batch": (BATCHES, {}),
    "A:width": ((128, 256, 512, 1024, 2048), {}),
    "A:depth": ((1, 2, 4, 8, 16), {}),
    "A:objectives": (OBJECTIVES, {"batch": 32, "width": 512}),
    "C:batch": (BATCHES, SMALL_ENCODER),
    "C:width": ((64, 128, 256, 512), {"depth": 2}),
    "C:depth": ((1, 2, 4, 8), {}),
    "C:length": ((16, 32, 64, 128, 256), {"depth": 2, "batch": 8}),
    "C:objectives": (OBJECTIVES, {**SMALL_ENCODER, "batch": 8}),
    "D:batch": ((8, 32, 128, 512), {}),
    "D:width": ((128, 256, 512, 1024, 2048), {}),
    "D:depth": ((1, 2, 4, 8), {}),
    "D:objectives": (OBJECTIVES, {"batch": 32}),
}


def measure(axis: str, device: str) -> dict[str, Any]:
    """A point for each size."""
    case, name = axis.split(":")
    sizes, others = AXES[axis]
    points = [{"size": size, **_point(make(case, device, **{**others, name: size}))} for size in sizes]
    return {"others": dict(others), "points": points, "setting": setting(device)}


def _point(problem: Problem) -> dict[str, float]:
    """The functional step beside a plain one, and its contraction by itself."""
    gc.collect()
    device = problem.inputs[0].device
    step, plain = ours.functional(problem), sgd(problem.copied())
    found = timing.alternate(step, plain, device, budget=1.5).summary()
    for name, run in (("", step), ("sgd_", plain)):
        found |= {f"{name}{key}_bytes": size for key, size in asdict(memory.measure(run, device)).items()}
    J = ours.lazy_jacobian(problem)
    found["contraction_seconds"] = _median(J.gramian, device)
    explained = gramjd.explain(J)
    return {**found, "multiply_adds": explained.multiply_adds, "predicted_bytes": explained.bytes}


def _median(run: Callable[[], object], device: torch.device) -> float:
    return statistics.median(timing.seconds(run, device) for _ in range(5))


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Of ``log value`` over ``log size``, between the two largest sizes: where constants matter least."""
    return math.log(values[-1] / values[-2]) / math.log(sizes[-1] / sizes[-2])


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
