"""Starts a fresh process for each measurement, and keeps what they find."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.cases import REAL
from benchmarks.implementations import COMPILED
from benchmarks.setting import environment

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PATIENCE = 240  # seconds for one process
LONG = 1200  # for one that compiles, or of a model of real size, whose oracle alone takes minutes
Record = dict[str, Any]


def run(case: str, implementation: str, device: str, seconds: float) -> None:
    """Measure one case by one implementation, print it, and keep it in the place of what was known."""
    key = {"case": case, "implementation": implementation}
    start = time.monotonic()
    patience = LONG if case in REAL or implementation in COMPILED else PATIENCE
    found = child("benchmarks.measure", case, implementation, device, str(seconds), patience=patience)
    record = {**key, **found, "took": round(time.monotonic() - start, 1)}
    _keep("real.json" if case in REAL else "steps.json", key, [record])
    print(f"{case} {implementation}: {shown(record)}", flush=True)


def run_scaling(axis: str, device: str) -> None:
    """Measure one axis of one case."""
    start = time.monotonic()
    found = child("benchmarks.scaling", axis, device, patience=2 * PATIENCE)
    found["took"] = round(time.monotonic() - start, 1)
    _keep("scaling.json", {"axis": axis}, [{"axis": axis, **found}])
    print(f"{axis}: {found.get('error', 'done')} in {found['took']} s", flush=True)


def child(module: str, *arguments: str, patience: int = PATIENCE) -> Record:
    """What a module prints as JSON in its last line, or how its process ended."""
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, errors = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        return {"error": f"took more than {patience} s"}
    finally:  # nothing goes on behind a caller who has stopped waiting
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode:
        last = (errors.strip().splitlines() or [""])[-1]
        return {"error": f"process ended with {process.returncode}: {last}"}
    found: Record = json.loads(out.splitlines()[-1])
    return found


def load(name: str) -> list[Record]:
    """The results of a file, none if there is none."""
    path = RESULTS / name
    found: list[Record] = json.loads(path.read_text()) if path.exists() else []
    return found


def _keep(name: str, key: Record, records: list[Record]) -> None:
    """Replace the records that have this key."""
    keep_all(name, [*(r for r in load(name) if any(r[k] != value for k, value in key.items())), *records])


def keep_all(name: str, records: list[Record]) -> None:
    """Write the results of a file."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / name).write_text(json.dumps(records, indent=1) + "\n")


def shown(record: Record) -> str:
    """One line for a reader who waits."""
    for reason in ("not_applicable", "error"):
        if reason in record:
            return f"{reason.replace('_', ' ')}: {record[reason]}"
    ratio = "{ratio:.2f} ({low:.2f} to {high:.2f}) x SGD's {sgd:.1f} ms".format(
        **record, sgd=1e3 * record["sgd_seconds"]
    )
    mine, sgd = (record.get(key, math.nan) / 2**20 for key in ("own_bytes", "sgd_own_bytes"))
    memory = f"{mine:.1f} MiB beside SGD's {sgd:.1f}"
    errors = ", ".join(
        f"{key.replace('_', ' ')} {record[key]:.0e}" for key in record if key.endswith("_error")
    )
    return f"{ratio}; {memory}; {errors}"
