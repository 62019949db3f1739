"""Every plan of every pair of blocks, measured; the plan chosen, and its regret against the best.

    python -m benchmarks.plans [KIND ...]     # all kinds, or some; results are kept for the others
    python -m benchmarks.plans --above 1.2    # prints those pairs once more that have a larger regret

Writes ``benchmarks/results/plans.json`` and ``plans.md``; with ``--above`` nothing, as that would choose
the luckier of two runs. A plan predicted to be 20 times dearer than the chosen one is not run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gramjd.blocks import Block, Conv, Dense, Lookup, Outer
from gramjd.contraction import Options
from gramjd.contraction.choice import plans
from gramjd.contraction.options import limits

RESULTS = Path(__file__).parent / "results"
PATH = RESULTS / "plans.json"
SKIP = 20  # times the predicted time of the chosen plan
Pairs = Iterator[tuple[str, Block, Block]]
randn = torch.randn


def outer(K: int, B: int, T: int, i: int, o: int, shared: bool = False) -> Outer:
    a = randn(1, T, 1, i).expand(B, -1, -1, -1) if shared else randn(B, T, 1, i)
    return Outer(randn(K, B, T, 1, o), a, (o, i))


def lookup(K: int, B: int, T: int, V: int, d: int) -> Lookup:
    return Lookup(randn(K, B, T, d), torch.randint(0, V, (B, T)), (V, d))


def conv(K: int, B: int, C: int, O: int, H: int, k: int, s: int, G: int) -> Conv:  # noqa: E741
    out = (H - 1) // s + 1
    points = randn(K, B, 1, G, O // G, out, out)
    windows = randn(1, B, 1, G, C // G, (out - 1) * s + k, (out - 1) * s + k)
    return Conv(points, windows, (O, C // G, k, k), (s, s), (1, 1))


def outers() -> Pairs:
    for K, B, T, i, o in itertools.product((1, 4), (8, 64), (1, 8, 64), (64, 512), (16, 512)):
        if K * B * T * max(i, o) <= 2**22:
            block = outer(K, B, T, i, o)
            yield f"K={K} B={B} T={T} i={i} o={o}", block, block


def long_outers() -> Pairs:
    for K, B, T, i, o in [
        (1, 16, 64, 256, 1024), (1, 16, 64, 1024, 256), (1, 16, 64, 256, 1000), (1, 8, 128, 256, 5000),
        (10, 128, 1, 784, 512), (1, 64, 1, 1024, 1024), (1, 4, 512, 128, 128), (1, 2, 2048, 64, 64),
        (1, 256, 4, 256, 256), (2, 32, 16, 768, 768), (1, 8, 32, 512, 20000),
    ]:  # fmt: skip
        block = outer(K, B, T, i, o)
        yield f"K={K} B={B} T={T} i={i} o={o}", block, block


def shared_outers() -> Pairs:
    for (K, B), T, (i, o) in itertools.product(
        ((4, 1), (32, 1), (1, 64)), (1, 32, 512), ((64, 64), (512, 512), (32, 512))
    ):
        block = outer(K, B, T, i, o, shared=True)
        yield f"K={K} B={B} T={T} i={i} o={o}", block, block


def crossed_outers() -> Pairs:
    for B, T, i, o in itertools.product((8, 32), (4, 64), (64, 512), (64, 512)):
        u, v = outer(1, B, T, i, o), outer(1, B, T, o, i)
        yield f"B={B} T={T} i={i} o={o}", u, Outer(v.c, v.a, (o, i), transposed=True)


def convs() -> Pairs:
    for K, B, C, O, H, k, s, G in [  # noqa: E741
        (1, 64, 3, 32, 32, 3, 1, 1), (1, 64, 32, 64, 32, 3, 1, 32), (1, 64, 64, 64, 16, 3, 1, 64),
        (1, 32, 3, 32, 32, 3, 1, 1), (1, 32, 32, 32, 32, 3, 1, 1), (1, 32, 32, 64, 32, 3, 2, 1),
        (1, 32, 32, 64, 32, 1, 2, 1), (1, 32, 64, 64, 16, 3, 1, 1), (1, 32, 64, 128, 16, 3, 2, 1),
        (1, 32, 128, 128, 8, 3, 1, 1), (1, 32, 128, 256, 8, 3, 2, 1), (1, 32, 256, 256, 4, 3, 1, 1),
        (1, 8, 3, 192, 224, 16, 16, 1), (1, 8, 64, 64, 56, 3, 1, 1), (1, 32, 64, 64, 16, 3, 1, 4),
        (4, 16, 16, 32, 16, 3, 1, 1), (4, 16, 64, 64, 8, 3, 1, 1), (1, 16, 96, 96, 28, 7, 1, 96),
        (1, 16, 32, 32, 32, 5, 1, 1), (1, 128, 8, 16, 14, 3, 1, 1), (1, 8, 512, 512, 4, 3, 1, 1),
        (1, 16, 128, 64, 14, 1, 1, 1), (1, 64, 64, 128, 8, 3, 1, 2), (1, 16, 96, 96, 28, 5, 1, 96),
        (1, 16, 96, 96, 14, 7, 1, 96), (1, 16, 384, 384, 7, 7, 1, 384),
    ]:  # fmt: skip
        block = conv(K, B, C, O, H, k, s, G)
        yield f"K={K} B={B} {C}→{O} at {H} kernel={k} stride={s} groups={G}", block, block


def lookups() -> Pairs:
    for K, B, T, V, d in itertools.product((1, 4), (8, 32), (8, 128), (500, 50_000), (64, 512)):
        if K * B * T * d <= 2**22:
            block = lookup(K, B, T, V, d)
            yield f"K={K} B={B} T={T} V={V} d={d}", block, block


def tied() -> Pairs:
    for B, T, V, d in itertools.product((4, 16), (8, 64), (500, 10_000), (64, 256)):
        yield f"B={B} T={T} V={V} d={d}", lookup(1, B, T, V, d), outer(1, B, T, d, V)


def lookups_and_dense() -> Pairs:
    for B, T, V, d in itertools.product((4, 16), (8, 256), (100, 2000), (64, 256)):
        yield f"B={B} T={T} V={V} d={d}", lookup(1, B, T, V, d), Dense(randn(1, B, V, d))


def outers_and_dense() -> Pairs:
    for B, T, i, o in itertools.product((4, 32), (1, 64), (64, 512), (64, 512)):
        yield f"B={B} T={T} i={i} o={o}", outer(1, B, T, i, o), Dense(randn(1, B, o, i))


KINDS: dict[str, Callable[[], Pairs]] = {
    f.__name__: f
    for f in (outers, long_outers, shared_outers, crossed_outers, convs, lookups, tied, lookups_and_dense,
              outers_and_dense)
}  # fmt: skip


def seconds(runs: Sequence[Callable[[], object]]) -> list[float]:
    """The least of several rounds of all of them in random order: what disturbs a run only adds to it.

    A tenth of a second for each after the first round, five rounds at least and 100 at most.
    """
    times: list[list[float]] = [[] for _ in runs]
    order, total = list(range(len(runs))), 0.0
    for run in runs:
        run()
    while len(times[0]) < 5 or (total < 0.1 * len(runs) and len(times[0]) < 100):
        random.shuffle(order)
        for n in order:
            start = time.perf_counter()
            runs[n]()
            times[n].append(time.perf_counter() - start)
            total += times[n][-1]
    return [min(found) for found in times]


def measure(kind: str, only: Callable[[str], bool] = lambda case: True) -> list[dict[str, Any]]:
    """All plans of all pairs of a kind, or of some of them, the chosen one first."""
    torch.manual_seed(0)
    random.seed(0)
    found, most = [], limits(Options(), torch.zeros(()), torch.float32)
    for name, u, v in KINDS[kind]():
        if not only(name):
            continue
        known = plans(u, v)
        tried = [(plan, cost) for plan, cost in known if cost.time <= SKIP * known[0][1].time]
        times = seconds([partial(plan.run, u, v, most) for plan, _ in tried])
        entries: list[dict[str, Any]] = [
            {
                "plan": plan.name,
                "seconds": measured,
                "multiply_adds": cost.multiply_adds,
                "moved": cost.moved,
                "calls": cost.calls,
            }
            for (plan, cost), measured in zip(tried, times, strict=True)
        ]
        best = min(entries, key=lambda entry: entry["seconds"])
        regret = entries[0]["seconds"] / best["seconds"]
        found.append({"kind": kind, "case": name, "best": best["plan"], "regret": regret, "plans": entries})
        shown = {e["plan"]: f"{1e3 * e['seconds']:.3g}" for e in entries}
        print(f"{kind} {name}: {regret:.2f}", shown, flush=True)
    return found


def table(results: list[dict[str, Any]]) -> str:
    """Regrets by kind, then every case."""
    lines = ["| pair | cases | median regret | worst |", "|---|---|---|---|"]
    for kind, cases in itertools.groupby(results, key=lambda case: case["kind"]):
        regrets = [case["regret"] for case in cases]
        lines.append(f"| {kind} | {len(regrets)} | {statistics.median(regrets):.2f} | {max(regrets):.2f} |")
    every = [case["regret"] for case in results]
    lines.append(f"| all | {len(every)} | {statistics.median(every):.2f} | {max(every):.2f} |")
    lines += ["", "Milliseconds of every plan, the chosen one first.", "", "| pair | case | plans | regret |"]
    lines.append("|---|---|---|---|")
    for case in results:
        times = ", ".join(f"{entry['plan']} {1e3 * entry['seconds']:.3g}" for entry in case["plans"])
        lines.append(f"| {case['kind']} | {case['case']} | {times} | {case['regret']:.2f} |")
    return "\n".join(lines) + "\n"


def main(kinds: list[str]) -> None:
    """Measure, and write the results."""
    results = [case for case in kept() if kinds and case["kind"] not in kinds]
    for kind in kinds or KINDS:
        results += measure(kind)
    results.sort(key=lambda case: list(KINDS).index(case["kind"]))
    RESULTS.mkdir(exist_ok=True)
    setting = {"torch": torch.__version__, "threads": torch.get_num_threads(), "dtype": "float32"}
    PATH.write_text(json.dumps({"setting": setting, "results": results}, indent=1) + "\n")
    (RESULTS / "plans.md").write_text("# Plans\n\n" + table(results))


def kept() -> list[dict[str, Any]]:
    """The results of the last run."""
    return json.loads(PATH.read_text())["results"] if PATH.exists() else []


def again(kinds: list[str], above: float) -> None:
    """Print those pairs once more whose regret was larger."""
    worst = {(case["kind"], case["case"]) for case in kept() if case["regret"] > above}
    for kind in kinds or KINDS:
        measure(kind, lambda case, kind=kind: (kind, case) in worst)  # type: ignore[misc]


if __name__ == "__main__":
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--above", type=float, help="only pairs with a larger regret; keeps nothing")
    given = parser.parse_args()
    if given.above is None:
        main(given.kinds)
    else:
        again(given.kinds, given.above)
