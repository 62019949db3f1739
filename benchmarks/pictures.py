"""One picture for each question: what a step costs, what memory it takes, and how both grow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cases
from benchmarks.implementations import TITLES

Record = dict[str, Any]
MiB = 2**20
WRONG = 1e-2  # relative error that rounding does not explain: of F, the plain float32 gradient has 0.004
# name: colour and marker; complete steps, and the floor. A library has a colour (of Okabe and Ito)
STYLES = {
    "functional": ("#d55e00", "o"),
    "engine": ("#d55e00", "P"),
    "engine-backward": ("#d55e00", "X"),
    "torchjd-autogram": ("#0072b2", "s"),
    "torchjd-autojac": ("#0072b2", "D"),
    "recipe-kept": ("#009e73", "<"),
    "recipe-dropped": ("#009e73", ">"),
    "vmap-grad": ("#009e73", "^"),
    "layer-vjp": ("#009e73", "v"),
    "opacus": ("#cc79a7", "p"),
    "backpack": ("#e69f00", "h"),
    "dattri-llm": ("#999999", "d"),
    "neural-tangents": ("#56b4e9", "*"),
    "floor": ("black", "|"),
}
COST, MEMORY = "#d62728", "#1f77b4"


def draw_steps(steps: Sequence[Record], folder: Path) -> None:
    """``ratios.png`` and ``memory.png``: cases from top to bottom, a mark for each implementation."""
    right = [r for r in steps if "ratio" in r and error_of(r) < WRONG]
    timed = "time of a step, in SGD steps (log scale; bars: quartiles)"
    _marks(right, lambda r: r["ratio"], timed, folder / "ratios.png", spread=True)
    held = [r for r in right if "own_bytes" in r]
    _marks(held, lambda r: r["own_bytes"] / r["sgd_own_bytes"],
           "memory of a step, in SGD steps (log scale)", folder / "memory.png")  # fmt: skip


def error_of(record: Record) -> float:
    """The larger of the relative errors of its Gramian and its gradient."""
    return max(record.get("gramian_error", 0.0), record.get("gradient_error", 0.0))


def _marks(records: Sequence[Record], value: Callable[[Record], float], label: str, path: Path,
           spread: bool = False) -> None:  # fmt: skip
    from matplotlib import pyplot

    names = sorted({r["case"] for r in records})
    figure, axis = pyplot.subplots(figsize=(9, 1.8 + 0.55 * len(names)), layout="constrained")
    shown = [name for name in STYLES if any(r["implementation"] == name for r in records)]
    for number, name in enumerate(shown):
        mine = [r for r in records if r["implementation"] == name]
        offset = 0.6 * (number / max(1, len(shown) - 1) - 0.5)
        places = [names.index(r["case"]) + offset for r in mine]
        values = [value(r) for r in mine]
        colour, marker = STYLES[name]
        axis.plot(values, places, marker, color=colour, markersize=6, label=TITLES[name].replace("`", ""))
        if spread:
            axis.hlines(places, [r["low"] for r in mine], [r["high"] for r in mine], color=colour, lw=1)
    axis.axvline(1, color="grey", lw=1, ls="--")
    axis.set_xscale("log")
    axis.set_xlabel(label)
    axis.set_yticks(range(len(names)), [f"{name}  {cases.TITLES[name]}" for name in names])
    for edge in range(1, len(names)):
        axis.axhline(edge - 0.5, color="0.85", lw=0.8)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_scaling(scaling: Sequence[Record], folder: Path) -> None:
    """``scaling_cost.png`` and ``scaling_memory.png``: a panel for each axis of each case."""
    found = [record for record in scaling if "points" in record]
    cost = {
        "functional step": lambda p: 1e3 * p["seconds"],
        "its contraction": lambda p: 1e3 * p["contraction_seconds"],
        "SGD step": lambda p: 1e3 * p["sgd_seconds"],
    }
    memory = {
        "functional step": lambda p: p["own_bytes"] / MiB,
        "SGD step": lambda p: p["sgd_own_bytes"] / MiB,
    }
    _panels(found, cost, "milliseconds", folder / "scaling_cost.png", model="its contraction")
    _panels(found, memory, "MiB beyond what is returned", folder / "scaling_memory.png")


def _panels(records: Sequence[Record], curves: dict[str, Callable[[Record], float]], label: str, path: Path,
            model: str = "") -> None:  # fmt: skip
    """``model``: the curve that multiply-adds are drawn beside, through its last point."""
    from matplotlib import pyplot

    rows = sorted({record["axis"].split(":")[0] for record in records})
    columns = max(sum(r["axis"].startswith(f"{case}:") for r in records) for case in rows)
    figure, axes = pyplot.subplots(
        len(rows), columns, figsize=(2.9 * columns, 2.7 * len(rows)), squeeze=False, layout="constrained"
    )
    for case, line in zip(rows, axes, strict=True):
        mine = [record for record in records if record["axis"].startswith(f"{case}:")]
        for axis, record in zip(line, mine, strict=False):
            points, sizes = record["points"], [p["size"] for p in record["points"]]
            for (name, value), colour in zip(curves.items(), (COST, "#ff9896", "#1f77b4"), strict=False):
                colour = MEMORY if name == "SGD step" else colour
                axis.plot(sizes, [value(p) for p in points], "o-", ms=4, color=colour, label=name)
                if name == model:
                    scale = value(points[-1]) / points[-1]["multiply_adds"]
                    counted = [scale * p["multiply_adds"] for p in points]
                    axis.plot(sizes, counted, ":", color="black", label="its multiply-adds, scaled")
            axis.loglog()
            axis.set_xticks(sizes, map(str, sizes))
            axis.minorticks_off()
            axis.set_title(f"{case}: {record['axis'].split(':')[1]}", fontsize=10)
            axis.grid(alpha=0.3)
        for empty in line[len(mine) :]:
            empty.axis("off")
    figure.supylabel(label)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
