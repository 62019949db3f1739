"""The benchmark of several processes, on small cases: it counts what is planned; never time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # of the benchmarks, which are not installed

from benchmarks import distributed  # noqa: E402
from benchmarks.cases import SMALL  # noqa: E402


def test_what_is_sent_is_what_was_planned() -> None:
    names = ("A", "C")
    found = distributed.measure({name: SMALL[name] for name in names}, (1, 2), 0.0)
    records = {(record["case"], record["ranks"]): record for record in found["records"]}
    assert list(records) == [(name, size) for name in names for size in (1, 2)]
    for (_, size), record in records.items():
        assert record["sent"] == record["planned"]
        for name in ("sent", "agreement", "all_reduce"):
            assert (record[name] > 0) == (size > 1)
        assert record["step_seconds"] > 0
        assert (f"| {record['sent'] / 1e6:.3f} |" in distributed.page(found)) == (size > 1)


def test_the_page_shows_the_kept_results() -> None:
    found = json.loads((distributed.RESULTS / "distributed.json").read_text())
    assert (distributed.RESULTS / "distributed.md").read_text() == distributed.page(found)
    assert {(r["case"], r["ranks"]) for r in found["records"]} == {
        (case, ranks) for case in distributed.MEASURED for ranks in distributed.RANKS
    }
