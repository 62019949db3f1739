"""One case by one implementation, in this process: its time, its memory, its error."""

from __future__ import annotations

import gc
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import memory, timing
from benchmarks.cases import make
from benchmarks.implementations import IMPLEMENTATIONS, OURS
from benchmarks.oracle import Oracle
from benchmarks.problem import NotApplicable, Problem, sgd
from benchmarks.setting import setting

OUTSIDE = ("neural-tangents",)  # whose memory torch's allocator does not see
ORACLES = Path(__file__).parents[1] / "out" / "bench" / "oracles"


def measure(case: str, implementation: str, device: str = "cpu", budget: float = 4.0) -> dict[str, Any]:
    """A record of the results; what goes wrong in the implementation is its ``error``."""
    problem = make(case, device)
    beside = problem.copied()
    plain, oracle = sgd(beside), Oracle.kept(problem, ORACLES / f"{case}.pt")
    record: dict[str, Any] = {"case": case, "implementation": implementation, "setting": setting(device)}
    try:
        step = IMPLEMENTATIONS[implementation](problem)
        record |= oracle.errors(step())
        record |= coverage(problem, getattr(step, "covered", None))
    except NotApplicable as reason:
        return {**record, "not_applicable": str(reason)}
    except Exception as error:  # a peer never stops the run
        return {**record, "error": f"{type(error).__name__}: {error}"}
    del oracle
    gc.collect()
    on = torch.device(device)
    least = timing.LEAST if implementation in OURS else 0
    record |= timing.alternate(step, plain, on, budget, least=least).summary()
    for name, run in (("", step), ("sgd_", plain)):
        problem.clear()
        beside.clear()
        if name == "" and implementation in OUTSIDE:
            continue
        twice = [memory.measure(run, on) for _ in range(2)]  # one of them may be an audit
        steady = min(twice, key=lambda found: found.peak)
        record |= {f"{name}{key}_bytes": size for key, size in asdict(steady).items()}
    return record


def coverage(problem: Problem, covered: Sequence[str] | None) -> dict[str, Any]:
    """The share of the entries of these parameters, and the names of the others; nothing if it is unknown."""
    if covered is None:
        return {}
    named = {name: p for name, p in problem.model.named_parameters() if p.requires_grad}
    entries = sum(p.numel() for name, p in named.items() if name in covered)
    return {
        "covered": entries / sum(p.numel() for p in named.values()),
        "left_out": [name for name in named if name not in covered],
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of peers; what is slow shows in the numbers
    print(json.dumps(measure(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]))))
