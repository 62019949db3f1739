"""Time the weightings against TorchJD's, in one run: a table and a log-log picture.

    python -m benchmarks.weighting [--largest 1024] [--threads 1] [--patience 60]

Both get the same float64 Gramian of ``m`` random gradients in ``m`` dimensions, which conflict a lot.
Where TorchJD's takes the rows of ``J``, those of ``m`` random gradients in 4096 dimensions: ExcessMTL gets
them in both. For ConFIG, GradDrop and TrimmedMean, which answer with the combined gradient, TorchJD's gets
``J`` as a matrix; ours gets a lazy one, and the time to build its Gramian or its rows is in.
UPGrad also gets Gramians as they occur, of one PPO loss per sample (``benchmarks/ppo.py``), of four kinds
and from several rounds of training: the median and the longest of the best times of each.
Times are the best of several calls, of both in turn. TorchJD's are not measured where a call may take
longer than ``patience`` seconds, or where a package that it needs is missing. For MGDA, TorchJD's
Frank-Wolfe steps stop early, so the gaps are shown, too: ours, TorchJD's, and TorchJD's after a hundred
times its steps.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchjd import aggregation as theirs

import gramjd
import gramjd.weighting as ours
from benchmarks import ppo
from gramjd import aggregation

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "weighting.png"
TABLE = Path(__file__).parent / "results" / "weighting.md"
CASES: dict[str, tuple[Any, ...]] = {
    "UPGrad": (),
    "DualProj": (),
    "MGDA": (),
    "CAGrad": (0.5,),
    "FairGrad": (2.0,),
    "IMTLG": (),
    "AlignedMTL": (),
    "PCGrad": (),
    "GradVac": (),
    "PCD": (),
    "MoDo": (),
    "SDMGrad": (),
}
ROWS: dict[str, tuple[Any, ...]] = {"ConFIG": (), "ExcessMTL": (), "GradDrop": (), "TrimmedMean": (2,)}
COLUMNS = 4096  # of the rows
Call = Callable[[], Any]


def main() -> None:
    """Measure, print the table, draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--largest", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--patience", type=float, default=60.0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    sizes = [size for size in (8, 16, 32, 64, 128, 256, 512, 1024) if size <= options.largest]
    times: dict[str, dict[str, list[float]]] = {}
    rows = []
    for name in (*CASES, *ROWS):
        times[name] = {"gramjd": [], "TorchJD": []}
        for size in sizes:
            rows.append(measure(name, size, times[name], options.patience))
            print("".join(f"{cell:>14s}" for cell in rows[-1]), flush=True)
    for size in [size for size in (64, 128, 256, 512, 768) if size <= options.largest]:
        rows.append(measure_ppo(size, options.patience))
        print("".join(f"{cell:>14s}" for cell in rows[-1]), flush=True)
    write(rows, f"torch {torch.__version__}, {options.threads} thread(s), float64")
    draw(sizes, times)


def gramian(size: int) -> Tensor:
    """The Gramian of random gradients."""
    generator = torch.Generator().manual_seed(size)
    rows = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return rows @ rows.T


def jacobian(size: int) -> gramjd.Jacobian:
    """Of a linear function, whose rows are random gradients."""
    generator = torch.Generator().manual_seed(size)
    rows = torch.randn(size, COLUMNS, generator=generator, dtype=torch.float64)
    weight = torch.zeros(COLUMNS, 1, dtype=torch.float64)
    return gramjd.jacobian(lambda p, row: (row @ p).squeeze(-1), in_dims=(None, 0))(weight, rows)


def calls(name: str, size: int) -> tuple[Call, Call | None]:
    """Ours and TorchJD's, ready to be timed; ``None`` if a package that theirs needs is missing."""
    if name in ROWS:
        return _of_rows(name, size)
    matrix = gramian(size)
    mine, other = (_weighting(module, name) for module in (ours, theirs))
    return partial(mine, matrix), other and partial(other, matrix)


def _weighting(module: Any, name: str) -> Any:
    with suppress(ImportError):  # TorchJD's CAGrad needs cvxpy and clarabel
        return getattr(module, f"{name}Weighting")(*CASES[name])


def _of_rows(name: str, size: int) -> tuple[Call, Call]:
    """The same of what needs rows in TorchJD."""
    J = jacobian(size)
    rows = torch.cat([some.flatten(1) for some in aggregation.parameter_rows(J)], 1)
    if name == "ExcessMTL":
        mine, other = ours.ExcessMTLWeighting(), theirs.ExcessMTLWeighting()
        return partial(mine, rows), partial(other, rows)
    aggregator = partial(getattr(theirs, name)(*ROWS[name]), rows)
    if name == "ConFIG":
        weighting = ours.ConFIGWeighting()
        return lambda: J.vjp(weighting(J.gramian())), aggregator
    function: Any = {"GradDrop": aggregation.graddrop, "TrimmedMean": aggregation.trimmed_mean}[name]
    return partial(function, J, *ROWS[name]), aggregator


def measure(name: str, size: int, times: dict[str, list[float]], patience: float) -> list[str]:
    """Time both libraries on one size; the cells of a row."""
    growth = 16  # a quadratic program per objective: time grows like m^4
    wanted = [
        None if done and not done[-1] * growth < patience else call
        for done, call in zip(times.values(), calls(name, size), strict=True)
    ]
    for done, best in zip(times.values(), best_times(wanted), strict=True):
        done.append(best)
    mine, other = times["gramjd"][-1], times["TorchJD"][-1]
    cells = ["", ""] if isnan(other) else [f"{other * 1e3:.2f}", f"{other / mine:.1f}"]
    note = mgda_gaps(gramian(size)) if name == "MGDA" else ""
    return [name, str(size), f"{mine * 1e3:.2f}", *cells, note]


def measure_ppo(size: int, patience: float) -> list[str]:
    """UPGrad on Gramians as they occur; TorchJD on one of each kind, while that takes no longer."""
    found = [[g.double() for g in ppo.gramians(size, kind)] for kind in ppo.LOSSES]
    mine = sorted(best_time(partial(ours.upgrad, matrix)) for kind in found for matrix in kind)
    median, note = mine[len(mine) // 2], f"longest {mine[-1] * 1e3:.2f}"
    if 3e-9 * size**4 > patience:  # roughly what one call takes
        return ["UPGrad, PPO", str(size), f"{median * 1e3:.2f}", "", "", note]
    other = sorted(best_time(partial(theirs.UPGradWeighting(), kind[-1])) for kind in found)
    taken = other[len(other) // 2]
    cells = [f"{median * 1e3:.2f}", f"{taken * 1e3:.2f}", f"{taken / median:.1f}"]
    return ["UPGrad, PPO", str(size), *cells, note]


def best_times(given: Sequence[Call | None], budget: float = 1.0) -> list[float]:
    """The shortest of one to fifty calls of each, in turn, within about a second for each; NaN for none."""
    found: list[list[float]] = [[] for _ in given]
    for _ in range(50):
        for call, taken in zip(given, found, strict=True):
            if call is not None and sum(taken) < budget:
                start = time.perf_counter()
                call()
                taken.append(time.perf_counter() - start)
    return [min(taken, default=float("nan")) for taken in found]


def best_time(call: Call) -> float:
    """Of one alone."""
    return best_times([call])[0]


def mgda_gaps(matrix: Tensor) -> str:
    """How far each squared norm may be from the smallest, relative to it."""
    gaps = []
    long = theirs.MGDAWeighting(epsilon=1e-15, max_iters=10_000)
    for weighting in (ours.MGDAWeighting(), theirs.MGDAWeighting(), long):
        weights = weighting(matrix)
        slope = matrix @ weights
        gaps.append(float(1 - slope.min() / (weights @ slope)))
    return f"gaps {gaps[0]:.0e}, {gaps[1]:.0e}, {gaps[2]:.0e}"


def write(rows: list[list[str]], setting: str) -> None:
    """The table, as Markdown."""
    head = ["weighting", "objectives", "gramjd, ms", "TorchJD, ms", "times faster", ""]
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    TABLE.write_text("\n".join(["# Weightings", "", f"Best times; {setting}.", "", *lines, ""]))


def draw(sizes: list[int], times: dict[str, dict[str, list[float]]]) -> None:
    """One panel a weighting."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(4, 4, figsize=(12, 12), sharex=True, sharey=True)
    for axis, (name, series) in zip(axes.flat, times.items(), strict=True):
        for (label, values), marker in zip(series.items(), "os", strict=True):
            axis.loglog(sizes, values, marker=marker, markersize=4, label=label)
        axis.set_title(name)
        axis.grid(alpha=0.3)
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.minorticks_off()
    axes[0, 0].legend()
    figure.supxlabel("objectives")
    figure.supylabel("seconds per call")
    figure.tight_layout()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=100)
    print(f"{PICTURE.relative_to(PICTURE.parent.parent.parent)} written")


if __name__ == "__main__":
    main()
