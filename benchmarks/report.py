"""Tables of the results, and the README's section; pictures are drawn by ``pictures.py``.

``README`` shows what :func:`section` makes of ``results/steps.json``; a test compares the two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import median

from benchmarks import cases, pictures
from benchmarks.implementations import IMPLEMENTATIONS, OURS, PEERS, TITLES
from benchmarks.runner import RESULTS, ROOT, Record, load
from benchmarks.scaling import AXES, slope

README = ROOT / "README.md"
BEGIN, END = "<!-- benchmarks: written by python -m benchmarks -->\n", "<!-- end of benchmarks -->\n"
MiB = 2**20
SHORT = {
    "recipe-kept": "recipe, kept",
    "recipe-dropped": "recipe, dropped",
    "torchjd-autogram": "autogram",
    "torchjd-autojac": "autojac",
    "vmap-grad": "`vmap`",
    "layer-vjp": "per layer",
    "opacus": "Opacus",
    "backpack": "BackPACK",
    "dattri-llm": "dattri-llm",
    "neural-tangents": "neural-tangents",
}  # of peers, in cells
# The README's rows: of several implementations, the fastest that is right on each case.
HEADLINE = {
    "**gramjd**, `J.backward(w)`": ("engine-backward",),
    "TorchJD, the faster of two": ("torchjd-autogram", "torchjd-autojac"),
    "`torch.func`, the fastest of four recipes": ("recipe-kept", "recipe-dropped", "vmap-grad", "layer-vjp"),
    "Opacus, BackPACK, dattri-llm or neural-tangents": (
        "opacus",
        "backpack",
        "dattri-llm",
        "neural-tangents",
    ),
}
COUNTED = """\
A ratio is the median over rounds of the time of a step, forward pass included, to that of a plain SGD step
(forward, backward of the mean loss) that takes turns with it in the same process, after up to 14 calls
that are not measured: in the first ones an engine proves what later ones rely on. Memory is the most that
torch's allocator had given out at once during the step, beyond parameters, data and what the step returns
(gradients, Gramian); memory that MKL, oneDNN or JAX take by themselves is not in it."""


def write() -> None:
    """All tables and pictures."""
    steps, real, scaling = _ordered(load("steps.json")), _ordered(load("real.json")), load("scaling.json")
    if steps:
        (RESULTS / "steps.md").write_text(_steps_page(steps))
        pictures.draw_steps(steps, RESULTS)
        _into_readme(section(steps, real))
    if real:
        (RESULTS / "real.md").write_text(_steps_page(real, "Models of real sizes", "--real"))
    if scaling:
        scaling.sort(key=lambda record: list(AXES).index(record["axis"]))
        (RESULTS / "scaling.md").write_text(_scaling_page(scaling))
        pictures.draw_scaling(scaling, RESULTS)


def section(steps: Sequence[Record], real: Sequence[Record] = ()) -> str:
    """The README's: a table of the cases, and one of the models of real sizes."""
    tables = [_headline(_ordered(some)) for some in (steps, real) if some]
    return "\n".join([*[line for table in tables for line in [*table, ""]], _setting([*steps, *real]), ""])


def _headline(steps: Sequence[Record]) -> list[str]:
    """The plain step, ours, TorchJD, the best recipe and the best other peer on every case."""
    rows = {
        title: names for title, names in HEADLINE.items() if any(r["implementation"] in names for r in steps)
    }
    each = {case: [r for r in steps if r["case"] == case] for case in dict.fromkeys(r["case"] for r in steps)}
    opponents = _row(["**strongest opponent**", *map(_strongest_cell, each.values())])
    return [*_table(steps, rows), opponents, "", _cases(steps)]


def _table(steps: Sequence[Record], rows: Mapping[str, Sequence[str]]) -> list[str]:
    """Ratio and memory on every case; of a row's implementations, those of the fastest right one."""
    columns = list(dict.fromkeys(r["case"] for r in steps))
    known = {(r["case"], r["implementation"]): r for r in steps}
    sgd = [_sgd_cell([r for r in steps if r["case"] == case]) for case in columns]
    lines = [
        _row(["ratio to an SGD step (MiB)", *columns]),
        "|---" * (1 + len(columns)) + "|",
        _row(["*SGD step*", *sgd]),
    ]
    for title, names in rows.items():
        found = [[known[case, name] for name in names if (case, name) in known] for case in columns]
        lines.append(_row([title, *(_cell(_best(records)) for records in found)]))
    return lines


def _best(records: Sequence[Record]) -> Record | None:
    """The fastest of those that are right; else the fastest, or one that says why there is no number."""
    timed = [r for r in records if "ratio" in r]
    right = [r for r in timed if pictures.error_of(r) < pictures.WRONG]
    failed = [r for r in records if "error" in r]
    return min(right or timed, key=lambda r: r["ratio"], default=next(iter([*failed, *records]), None))


def _cases(steps: Sequence[Record]) -> str:
    """What each letter is."""
    return (
        "; ".join(f"{case}: {cases.TITLES[case]}" for case in dict.fromkeys(r["case"] for r in steps)) + "."
    )


def strongest(records: Sequence[Record], kernel: bool) -> Record | None:
    """Of one case, the fastest peer that is right and computes all that is asked for."""
    asked = ("gramian_error",) if kernel else ("gramian_error", "gradient_error")
    right = [
        r for r in records
        if r["implementation"] in PEERS and "ratio" in r and all(key in r for key in asked)
        and pictures.error_of(r) < pictures.WRONG
    ]  # fmt: skip
    return min(right, key=lambda r: float(r["ratio"]), default=None)


def _strongest_cell(records: Sequence[Record]) -> str:
    """What the README says of it; whether the case is a kernel is told by what ours computes."""
    kernel = not any("gradient_error" in r for r in records if r["implementation"] in OURS)
    found = strongest(records, kernel)
    return "–" if found is None else f"{_cell(found)} {SHORT[found['implementation']]}"


def _cell(record: Record | None) -> str:
    """What a table says of one measurement."""
    if record is None or "not_applicable" in record:
        return "–"
    if "error" in record:
        return "slow" if record["error"].startswith("took more") else "fails"
    wrong = pictures.error_of(record)
    cell = _short(record["ratio"])
    if "own_bytes" in record:
        cell += f" ({_short(record['own_bytes'] / MiB)})"
    return f"{cell}, wrong by {wrong:.1g}" if not wrong < pictures.WRONG else cell


def _sgd_cell(records: Sequence[Record]) -> str:
    """The plain step's own time and memory: medians over the processes of a case."""
    found = [r for r in records if "ratio" in r]
    if not found:
        return "–"
    seconds, size = (median(r[key] for r in found) for key in ("sgd_seconds", "sgd_own_bytes"))
    return f"{_short(1e3 * seconds)} ms ({_short(size / MiB)})"


def _short(number: float) -> str:
    """Two or three digits."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}" if number >= 10 else f"{number:.2f}"


def _setting(records: Sequence[Record]) -> str:
    """Under which the numbers were taken; more than one line if they differ."""
    lines = []
    for given in (r["setting"] for r in records if "setting" in r):
        versions = ", ".join(f"{name} {version}" for name, version in given["versions"].items())
        lines.append(
            f"{given['date']}, {given['device']}, {given['threads']} threads, GOMP_SPINCOUNT="
            f"{given['GOMP_SPINCOUNT']}, {given['dtype']}, Python {given['python']}, {versions}."
        )
    return "\n\n".join(dict.fromkeys(lines))


def _into_readme(text: str) -> None:
    """Replace what is between the marks."""
    before, found, rest = README.read_text().partition(BEGIN)
    if not found:
        raise ValueError(f"README.md has no line {BEGIN!r}")
    README.write_text(before + BEGIN + "\n" + text + "\n" + END + rest.partition(END)[2])


def _steps_page(steps: Sequence[Record], title: str = "Steps", flag: str = "") -> str:
    """Every number."""
    titles = (
        "case", "implementation", "ratio", "quartiles", "ms", "SGD, ms", "MiB", "SGD, MiB", "returned, MiB",
        "error of G", "error of Jᵀw",
    )  # fmt: skip
    command = f"python -m benchmarks {flag}".strip()
    names = [name for name in IMPLEMENTATIONS if any(r["implementation"] == name for r in steps)]
    lines = [f"# {title}", "", f"`{command}`, {_minutes(steps)}.", "", COUNTED, "", _setting(steps), ""]
    lines += [
        *_table(steps, {TITLES[name]: (name,) for name in names}),
        "",
        _cases(steps),
        "",
        *_coverage(steps),
    ]
    lines.append(_row(titles))
    lines.append("|---" * len(titles) + "|")
    for r in steps:
        head = r["case"], TITLES[r["implementation"]]
        if "ratio" not in r:
            reason = r.get("not_applicable") or r["error"]
            lines.append(_row([*head, *"–" * 8, " ".join(reason.split()).replace("|", "/")[:160]]))
            continue
        keys = "own_bytes", "sgd_own_bytes", "returned_bytes"
        sizes = [_short(r[key] / MiB) if key in r else "–" for key in keys]
        quartiles = f"{_short(r['low'])}–{_short(r['high'])}"
        times = [_short(1e3 * r[key]) for key in ("seconds", "sgd_seconds")]
        errors = [f"{r[key]:.0e}" if key in r else "–" for key in ("gramian_error", "gradient_error")]
        lines.append(_row([*head, _short(r["ratio"]), quartiles, *times, *sizes, *errors]))
    return "\n".join([*lines, "", *_frugal(steps)])


def _coverage(steps: Sequence[Record]) -> list[str]:
    """Of an implementation whose Gramian is of some parameters alone: of which, on each case."""
    lines = []
    for name in IMPLEMENTATIONS:
        known = {r["case"]: r for r in steps if r["implementation"] == name and "covered" in r}
        cells = []
        for case, r in known.items():
            left_out = dict.fromkeys(re.sub(r"\d+", "*", each) for each in r["left_out"])
            cells.append(
                f"{case} {100 * r['covered']:.3g} %" + "".join(f", not `{each}`" for each in left_out)
            )
        if cells:
            lines += [f"Of the entries of the parameters, {TITLES[name]} cover: {'; '.join(cells)}.", ""]
    return lines


def _frugal(steps: Sequence[Record]) -> list[str]:
    """Memory at the smallest budget, beside one and a half times the plain step's."""
    lines = ["## Memory at the smallest `memory_budget` (64 KiB)", "", "MiB beyond what is returned.", ""]
    lines += [_row(["case", "implementation", "step", "1.5 × SGD", "default budget"]), "|---" * 5 + "|"]
    known = {(r["case"], r["implementation"]): r for r in steps}
    for (case, name), r in known.items():
        if name.endswith("-frugal") and "own_bytes" in r:
            usual = known.get((case, name.removesuffix("-frugal")), {}).get("own_bytes", float("nan"))
            sizes = r["own_bytes"], 1.5 * r["sgd_own_bytes"], usual
            lines.append(_row([case, TITLES[name], *(_short(size / MiB) for size in sizes)]))
    return [*lines, ""]


def _scaling_page(scaling: Sequence[Record]) -> str:
    """A row for each axis."""
    lines = ["# Scaling", "", f"`python -m benchmarks --scaling`, {_minutes(scaling)}.", ""]
    lines += [
        "The functional step. Slopes are those of log time over log size between the two largest sizes:"
    ]
    lines += [
        "of the contraction `J.gramian()` as measured, of the cost model's multiply-adds for it, and of"
    ]
    lines += ["the SGD step.", "", _setting(scaling), ""]
    titles = (
        "axis",
        "sizes",
        "ratio to SGD",
        "MiB",
        "SGD, MiB",
        "contraction, ms",
        "slope",
        "model's",
        "SGD's",
    )
    lines += [_row(titles), "|---" * len(titles) + "|"]
    for record in scaling:
        if "points" not in record:
            lines.append(_row([record["axis"], record["error"], *"–" * 7]))
            continue
        points, sizes = record["points"], [p["size"] for p in record["points"]]
        columns = [
            [p["ratio"] for p in points],
            [p["own_bytes"] / MiB for p in points],
            [p["sgd_own_bytes"] / MiB for p in points],
            [1e3 * p["contraction_seconds"] for p in points],
        ]
        slopes = [
            slope(sizes, [p[key] for p in points])
            for key in ("contraction_seconds", "multiply_adds", "sgd_seconds")
        ]
        shown = [", ".join(map(_short, column)) for column in columns]
        axis = f"{record['axis']} {record['others'] or ''}"
        lines.append(_row([axis, ", ".join(map(str, sizes)), *shown, *(f"{x:.2f}" for x in slopes)]))
    return "\n".join(lines) + "\n"


def _minutes(records: Sequence[Record]) -> str:
    """How long all their processes took."""
    return f"{sum(r.get('took', 0.0) for r in records) / 60:.0f} minutes"


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _ordered(steps: Sequence[Record]) -> list[Record]:
    """By case, then by implementation, as they are listed."""
    names = list(IMPLEMENTATIONS)
    return sorted(steps, key=lambda r: (r["case"], names.index(r["implementation"])))
