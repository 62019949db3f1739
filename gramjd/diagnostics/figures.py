"""Pictures of what Gramians say, on matplotlib axes.

Every function draws on the ``ax`` that it is given, or on one of a new figure (``ax.figure``, which
needs no display), and returns it. Blue agrees, vermillion conflicts: colours of Okabe and Ito, which
colour-blind readers tell apart. Needs matplotlib: ``pip install 'gramjd[plot]'``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gramjd.diagnostics import numbers
from gramjd.diagnostics.numbers import Labels, Source
from gramjd.jacobian import Jacobian

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap

# Okabe and Ito 2008, less yellow, which is too light for lines
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
AGREES, CONFLICTS = COLORS[:2]
GREY = "#999999"


def plot_similarity(source: Source, *, labels: Labels | None = None, cluster: bool = False,
                    ax: Axes | None = None) -> Axes:  # fmt: skip
    """Cosine similarities of all pairs of gradients as a heat map.

    Args:
        source: a Gramian, or a Jacobian of one output.
        labels: of each objective: its class, its task. Objectives are sorted by them.
        cluster: sort by similarity instead; needs scipy.
        ax: where to draw.

    Raises:
        ValueError: there is not one label for each objective, or ``cluster`` is asked for with labels.
    """
    if cluster and labels is not None:
        raise ValueError("Objectives are sorted by labels or by cluster, not by both.")
    gramian = numbers.matrix(source)
    m = len(gramian)
    order = numbers.ordering(gramian, labels) if cluster or labels is not None else torch.arange(m)
    similar = numbers.cosines(gramian)[order][:, order]
    ax = _axes(ax, (4.8, 4))
    image = ax.imshow(similar.numpy(), cmap=_diverging(), vmin=-1, vmax=1, interpolation="nearest")
    assert ax.figure is not None
    ax.figure.colorbar(image, ax=ax, label="cosine similarity of two gradients")
    if labels is None:
        ax.set(xlabel="objective", ylabel="objective")
        ax.locator_params(integer=True)
        if cluster:
            ax.set(xticks=[], yticks=[], xlabel="objective, clustered", ylabel="objective, clustered")
    else:
        _mark_labels(ax, labels, order)
    if m > 1:
        ax.set_title(f"{numbers.conflict_rate(gramian):.0%} of pairs conflict")
    return ax


def plot_layers(jacobian: Jacobian, *, labels: Labels | None = None, per: Any = None,
                ax: Axes | None = None) -> Axes:  # fmt: skip
    """Draw in which layers gradients conflict: a map of layers and pairs of labels (or of objectives).

    Args:
        jacobian, labels, per: as for :func:`gramjd.diagnostics.layers`.
        ax: where to draw.
    """
    values, names, pairs = numbers.layers(jacobian, labels, per)
    ax = _axes(ax, (1.8 + 0.45 * min(len(pairs), 20), 1.6 + 0.25 * min(len(names), 30)))
    image = ax.imshow(
        values.numpy(), cmap=_diverging(), vmin=-1, vmax=1, aspect="auto", interpolation="nearest"
    )
    assert ax.figure is not None
    ax.figure.colorbar(image, ax=ax, label="cosine similarity")
    ax.set_yticks(range(len(names)), labels=names)
    shown = [f"{a}, {b}" for a, b in pairs]
    if len(pairs) <= 60:
        small = "medium" if len(pairs) <= 20 else "x-small"
        ax.set_xticks(range(len(pairs)), labels=shown, rotation=90, fontsize=small)
    else:
        ax.set(xticks=[], xlabel=f"{len(pairs)} pairs, from {shown[0]} to {shown[-1]}")
    if bool(values.isnan().any()):
        ax.set_title("grey: no gradient", fontsize="small")
    return ax


def plot_norms(source: Source, *, labels: Labels | None = None, whisker: float = 1.5,
               ax: Axes | None = None) -> Axes:  # fmt: skip
    """The distribution of the gradients' norms, and which objectives are outliers.

    Args:
        source: a Gramian, or a Jacobian of one output.
        labels: of each objective, shown beside the number of an outlier.
        whisker: as for :func:`gramjd.diagnostics.outliers`.
        ax: where to draw.
    """
    found, far = numbers.norms(source), numbers.outliers(source, whisker)
    ax = _axes(ax, (5, 3.2))
    usual = torch.ones(len(found), dtype=torch.bool).index_fill(0, far, False)
    shown = found.clamp(min=1e-4 * float(found.max()))  # what is shorter counts as of that length
    wide = bool(found.max() > 20 * shown.min())  # a logarithmic axis, then
    bins = min(40, 5 + 2 * int(len(found) ** 0.5))
    edges: int | list[float] = bins
    if wide:
        low, high = (shown.min() * 0.999).log10(), (shown.max() * 1.001).log10()  # both ends are inside
        edges = torch.logspace(float(low), float(high), bins, dtype=found.dtype).tolist()
    ax.hist([shown[usual].tolist(), shown[far].tolist()], edges, stacked=True, color=[AGREES, CONFLICTS],
            label=[f"{int(usual.sum())} others", _listed(far, labels, len(found))])  # fmt: skip
    cut = " (left bar: and shorter)" if bool((found < shown).any()) else ""
    ax.set(xlabel=f"norm of the gradient{cut}", ylabel="objectives", xscale="log" if wide else "linear")
    ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0)  # above the bars
    return ax


def plot_spectrum(source: Source, *, ax: Axes | None = None) -> Axes:
    """Eigenvalues of the Gramian and its effective rank; what is zero but for rounding is left out."""
    values, rank = numbers.spectrum(source), numbers.effective_rank(source)
    shown = values[values > 1e-12 * values[0]] if values[0] > 0 else values[:0]
    ax = _axes(ax, (5, 3.2))
    ax.plot(range(1, len(shown) + 1), shown.tolist(), ".-", color=AGREES)
    ax.axvline(rank, color=CONFLICTS, linestyle="--", label=f"effective rank {rank:.1f} of {len(values)}")
    scale = "log" if len(shown) else "linear"
    ax.set(xlabel="number, the largest first", ylabel="eigenvalue of the Gramian", yscale=scale)
    ax.legend(frameon=False)
    ax.grid(alpha=0.3)
    return ax


def plot_descent(source: Source, weights: Tensor, *, ax: Axes | None = None) -> Axes:
    """Cosines of each gradient with the chosen direction and with the mean gradient, sorted.

    What is below zero is raised by a step, to first order. UPGrad leaves nothing there but what its
    regularization (``reg_eps``) lets through: objectives whose gradients are short beside the others'.

    Args:
        source: a Gramian, or a Jacobian of one output.
        weights: of the chosen direction, shaped like the objectives.
        ax: where to draw.
    """
    gramian = numbers.matrix(source)
    ax = _axes(ax, (5, 3.2))
    degrees = numbers.angle(gramian, weights)
    for name, w, color in (("mean gradient", torch.ones(len(gramian)), CONFLICTS), ("step", weights, AGREES)):
        found = numbers.descent(gramian, w).sort().values
        ax.plot(range(1, len(found) + 1), found.tolist(), ".-", color=color,
                label=f"{name}: raises {int((found < 0).sum())}")  # fmt: skip
    ax.axhline(0, color="black", linewidth=0.8)
    ax.set(xlabel="objective, sorted", ylabel="cosine of gradient and step")
    ax.set_title(f"{degrees:.0f}° between the step and the mean gradient")
    ax.legend(frameon=False)
    ax.grid(alpha=0.3)
    return ax


def plot_weights(steps: Sequence[int], weights: Sequence[Tensor] | Tensor, *,
                 names: Sequence[Any] | None = None, ax: Axes | None = None) -> Axes:  # fmt: skip
    """Histories of the objectives' weights: a line each if they are few, else their quantiles.

    Args:
        steps: the numbers of the steps.
        weights: at each of them, of the same shape; multiplied by their number, so that the mean
            gradient's are 1.
        names: of the objectives.
        ax: where to draw.
    """
    rows = torch.stack([w.detach().flatten().to("cpu", torch.float64) for w in weights])
    rows = rows * rows.shape[1]
    ax = _axes(ax, (5, 3.2))
    if rows.shape[1] <= len(COLORS):
        for n, (column, color) in enumerate(zip(rows.T.tolist(), COLORS, strict=False)):
            ax.plot(steps, column, color=color, label=str(n if names is None else names[n]))
    else:
        levels = torch.quantile(rows, torch.tensor([0, 0.25, 0.5, 0.75, 1], dtype=rows.dtype), 1).tolist()
        ax.fill_between(steps, levels[0], levels[4], color=AGREES, alpha=0.15, linewidth=0, label="all")
        ax.fill_between(
            steps, levels[1], levels[3], color=AGREES, alpha=0.35, linewidth=0, label="half of them"
        )
        ax.plot(steps, levels[2], color=AGREES, label="median")
    ax.axhline(1, color=GREY, linewidth=0.8, linestyle="--")
    ax.set(xlabel="step", ylabel="weight × number of objectives")
    ax.legend(frameon=False)
    ax.grid(alpha=0.3)
    return ax


def plot_history(steps: Sequence[int], values: Sequence[float] | dict[str, Sequence[float]], *,
                 ylabel: str = "", ax: Axes | None = None) -> Axes:  # fmt: skip
    """Draw a number over training: a conflict rate, an angle, an effective rank.

    Args:
        steps: the numbers of the steps.
        values: one for each; or several such series by name.
        ylabel: what they are.
        ax: where to draw.
    """
    series = values if isinstance(values, dict) else {"": values}
    ax = _axes(ax, (5, 3.2))
    for n, (name, mine) in enumerate(series.items()):
        ax.plot(steps, list(mine), color=COLORS[n % len(COLORS)], label=name)
    if isinstance(values, dict):
        ax.legend(frameon=False)
    ax.set(xlabel="step", ylabel=ylabel)
    ax.grid(alpha=0.3)
    return ax


def _listed(far: Tensor, labels: Labels | None, m: int, most: int = 4) -> str:
    """Outliers by number and label, the longest gradients first."""
    names = [str(n) for n in far[:most].tolist()]
    if labels is not None:
        kinds, which = numbers.numbered(labels, m)
        names = [f"{n} ({kinds[which[int(n)]]})" for n in names]
    more = ", …" if len(far) > most else ""
    kind = "outlier" if len(far) == 1 else "outliers"
    return f"{len(far)} {kind}" + (": " if names else "") + ", ".join(names) + more


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The axes to draw on; on a new figure, which no window and no global state knows, if there are none."""
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install 'gramjd[plot]'.") from error
    return Figure(figsize=size, layout="constrained").add_subplot()


def _diverging() -> Colormap:
    """A colormap from conflict over white to agreement; unknown values are grey."""
    from matplotlib.colors import LinearSegmentedColormap

    found = LinearSegmentedColormap.from_list("conflict", [CONFLICTS, "white", AGREES])
    return found.with_extremes(bad=GREY)


def _mark_labels(ax: Axes, labels: Labels, order: Tensor) -> None:
    """A tick in the middle of each label's objectives, and lines between labels."""
    names, which = numbers.numbered(labels, len(order))
    runs = [(names[n], len(list(run))) for n, run in groupby(which[order].tolist())]
    start, middles = 0, []
    for _, size in runs:
        if start and len(runs) < len(order):
            ax.axhline(start - 0.5, color=GREY, linewidth=0.5)
            ax.axvline(start - 0.5, color=GREY, linewidth=0.5)
        middles.append(start + (size - 1) / 2)
        start += size
    ax.set_xticks(middles, labels=[str(name) for name, _ in runs], rotation=90 if len(runs) > 10 else 0)
    ax.set_yticks(middles, labels=[str(name) for name, _ in runs])
