"""Draws the figures of the concept pages, of some guides and of the README: ``python docs/figures.py``."""

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle, Wedge
from torch import nn
from torch.nn.functional import cross_entropy

from gramjd import Engine, weighting
from gramjd.diagnostics import Monitor, plot_similarity

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "examples"))
from watch_gradients import load_data, make_model, train  # noqa: E402

OUT = DOCS / "images" / "concepts"
BLUE, RED, GREEN, BLACK = "#0072b2", "#d55e00", "#009e73", "#000000"  # Okabe and Ito


def arrow(ax: Axes, v: np.ndarray, color: str, name: str, shift: tuple[float, float]) -> None:
    ax.annotate(
        "", v, (0, 0), arrowprops={"arrowstyle": "-|>", "color": color, "lw": 2, "shrinkA": 0, "shrinkB": 0}
    )
    ax.text(v[0] + shift[0], v[1] + shift[1], name, color=color, ha="center", va="center")


def conflict() -> Figure:
    figure = Figure(figsize=(5.2, 3), layout="constrained")
    draw_conflict(figure.add_subplot())
    return figure


def draw_conflict(ax: Axes) -> None:
    """Two gradients, the sector of common descent, the mean and UPGrad."""
    g1, g2 = np.array([2.0, 0.3]), np.array([-1.0, 0.5])
    # the edges of the sector are orthogonal to a gradient each
    edge1, edge2 = np.array([-g1[1], g1[0]]), np.array([g2[1], -g2[0]])
    p1, p2 = (edge2 * (g1 @ edge2) / (edge2 @ edge2), edge1 * (g2 @ edge1) / (edge1 @ edge1))
    angles = sorted(np.degrees(np.arctan2(e[1], e[0])) for e in (edge1, edge2))
    ax.add_patch(Wedge((0, 0), 3, *angles, color=BLUE, alpha=0.12, lw=0))
    ax.text(0.3, 1.75, "both losses fall", color=BLUE, ha="center")
    arrow(ax, g1, BLACK, "$g_1$", (0.1, 0.1))
    arrow(ax, g2, BLACK, "$g_2$", (-0.12, 0.08))
    arrow(ax, (g1 + g2) / 2, RED, "mean", (0.24, 0.06))
    arrow(ax, (p1 + p2) / 2, GREEN, "UPGrad", (0.08, 0.1))
    for g, p in ((g1, p1), (g2, p2)):
        ax.plot(*zip(g, p, strict=True), color="#999999", ls=":")
        ax.plot(*p, "o", color="#999999", ms=4)
    ax.set(xlim=(-1.3, 2.3), ylim=(-0.1, 2), aspect="equal")
    ax.axis("off")


def overview() -> Figure:
    """What Jacobian descent does about a conflict, and the conflicts of a batch."""
    torch.manual_seed(0)
    (x, y), model = load_data(), make_model()
    engine = Engine(model, batch_dim=0)
    train(model, engine, x, y, 200, Monitor())
    batch = torch.randint(0, len(y), (100,))
    losses = cross_entropy(model(x[batch]), y[batch], reduction="none")
    figure = Figure(figsize=(9.6, 3.7), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.2, 1))
    draw_conflict(left)
    left.set_title("two gradients, their mean, and UPGrad's step")
    plot_similarity(engine.compute_gramian(losses), labels=y[batch], ax=right)
    right.set_title("100 gradients of handwritten digits")
    return figure


def blocks() -> Figure:
    """A sample's gradient as a sum of outer products over its positions."""
    figure = Figure(figsize=(5.6, 1.9), layout="constrained")
    ax = figure.add_subplot()

    def box(x: float, y: float, width: float, height: float, color: str, name: str) -> None:
        ax.add_patch(Rectangle((x, y), width, height, facecolor=color, alpha=0.25, edgecolor=color))
        ax.text(x + width / 2, y + height / 2, name, ha="center", va="center")

    box(0, 0, 2.4, 2, "#666666", "$J_b$\n$o × i$")
    ax.text(2.85, 1, "=", ha="center", va="center", fontsize=16)
    for t, x in enumerate((3.3, 6.9)):
        box(x, 0, 0.3, 2, RED, "")
        ax.text(x + 0.15, -0.35, f"$c_{{b{t + 1}}}$", ha="center", color=RED)
        box(x + 0.55, 1.7, 2.4, 0.3, BLUE, "")
        ax.text(x + 1.75, 1.35, f"$a_{{b{t + 1}}}$", ha="center", color=BLUE)
        ax.text(x + 3.25, 1, "+", ha="center", va="center", fontsize=16)
    ax.text(10.75, 1, "… ($T$ positions)", va="center")
    ax.set(xlim=(-0.1, 13.2), ylim=(-0.6, 2.1), aspect="equal")
    ax.axis("off")
    return figure


def plans() -> Figure:
    """Multiply-adds of the two plans for a linear layer."""
    B, i, o = 16, 512, 512
    T = np.logspace(0, 3, 100)
    figure = Figure(figsize=(5.2, 3.2), layout="constrained")
    ax = figure.add_subplot()
    ax.plot(T, (B * T) ** 2 * (i + o), color=BLUE, label="pairwise")
    ax.plot(T, B * T * i * o + B**2 * i * o, color=RED, label="rows")
    ax.plot(T, 3 * B * T * i * o, color="#999999", ls="--", label="an SGD step of the layer")
    ax.set(xscale="log", yscale="log", xlabel="positions T", ylabel="multiply-adds",
           title=f"Linear({i}, {o}), {B} samples")  # fmt: skip
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)
    return figure


def directions() -> Figure:
    """Directions of the steps of several weightings, before and after one loss is multiplied."""
    J = torch.tensor([[2.0, 0.3], [-1.0, 0.5]], dtype=torch.float64)
    chosen = {
        "mean": (weighting.mean, "#999999"),
        "UPGrad": (weighting.upgrad, GREEN),
        "MGDA": (weighting.mgda, "#cc79a7"),
        "NashMTL": (weighting.nash_mtl, BLUE),
    }
    figure = Figure(figsize=(9, 2.9), layout="constrained")
    for ax, scale in zip(figure.subplots(1, 2), (1.0, 10.0), strict=True):
        scaled = J * torch.tensor([[scale], [1.0]], dtype=torch.float64)
        first, second = ((g / g.norm()).numpy() for g in scaled)
        angles = (
            np.degrees(np.arctan2(second[1], second[0])) - 90,
            np.degrees(np.arctan2(first[1], first[0])) + 90,
        )
        ax.add_patch(Wedge((0, 0), 1.5, *sorted(float(a) for a in angles), color=BLUE, alpha=0.12, lw=0))
        for name, g in (("$g_1$", first), ("$g_2$", second)):
            arrow(ax, 1.15 * g, BLACK, name, (0.1 * float(g[0]), 0.12))
        for name, (weigh, color) in chosen.items():
            step = scaled.T @ weigh(scaled @ scaled.T)
            direction = (step / step.norm()).numpy()
            arrow(ax, direction, color, "", (0, 0))
            ax.plot([], [], color=color, lw=2, label=name)
        ax.set(xlim=(-1.3, 1.6), ylim=(-0.05, 1.4), aspect="equal")
        ax.set_title("both losses in one unit" if scale == 1 else f"the first loss times {scale:.0f}")
        ax.axis("off")
    figure.axes[0].legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.6))
    return figure


def proofs() -> Figure:
    """The samples that NaN reaches from the loss of each sample, in two models."""
    torch.manual_seed(0)
    figure = Figure(figsize=(7, 3), layout="constrained")
    norms = {"layer normalisation": nn.LayerNorm(8), "batch normalisation": nn.BatchNorm1d(8)}
    for ax, (name, norm) in zip(figure.subplots(1, 2), norms.items(), strict=True):
        model = nn.Sequential(nn.Linear(4, 8), norm, nn.ReLU(), nn.Linear(8, 1))
        x = torch.randn(6, 4, requires_grad=True)
        losses = model(x).square().sum(1)
        reached = np.zeros((6, 6))
        for sample in range(6):
            weights = torch.zeros(6).index_fill(0, torch.tensor(sample), torch.nan)
            (found,) = torch.autograd.grad(losses, x, weights, retain_graph=True)
            reached[sample] = found.isnan().any(1)
        ax.imshow(reached, cmap="Blues", vmin=0, vmax=1.4)
        ax.set(xlabel="NaN in the gradient of sample", xticks=range(6), yticks=range(6), title=name)
        ax.set_xticks(np.arange(-0.5, 6), minor=True)
        ax.set_yticks(np.arange(-0.5, 6), minor=True)
        ax.grid(which="minor", color="white", lw=2)
        ax.tick_params(which="both", length=0)
    figure.axes[0].set_ylabel("NaN sent from the loss of sample")
    return figure


def remedies() -> Figure:
    """The way from a refusal to a remedy."""
    figure = Figure(figsize=(7.6, 3.3), layout="constrained")
    ax = figure.add_subplot()

    def box(x: float, y: float, text: str, color: str) -> None:
        style = "round,pad=0.1"
        ax.add_patch(
            FancyBboxPatch((x, y), 4.2, 1, boxstyle=style, facecolor=color, alpha=0.2, edgecolor=color)
        )
        ax.text(x + 2.1, y + 0.5, text, ha="center", va="center", fontsize=9)

    def to(start: tuple[float, float], end: tuple[float, float], text: str) -> None:
        ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "#666666"})
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        down = start[0] == end[0]
        x, y, side = (x + 0.1, y, "left") if down else (x, y + 0.15, "center")
        ax.text(x, y, text, ha=side, va="center", fontsize=9, color="#666666")

    questions = (
        "Must samples depend\non each other?",
        "Can you replace the layer\nthat the error names?",
        "Do the losses contain\nderivatives of the model?",
    )
    answers = (
        "1. Pass batch_dim=None.",
        "2. Change the layer: GroupNorm,\nuse_reentrant=False, …",
        "3. Use a function transform.",
    )
    for row, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        y = 4.4 - 2 * row
        box(0, y, question, BLUE)
        box(6.4, y, answer, GREEN)
        to((4.4, y + 0.5), (6.2, y + 0.5), "yes")
        if row < 2:
            to((2.1, y - 0.15), (2.1, y - 0.85), "no")
    ax.set(xlim=(-0.3, 10.9), ylim=(0.1, 5.7))
    ax.axis("off")
    return figure


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    for draw in (directions, proofs, remedies):
        draw().savefig(OUT.parent / f"{draw.__name__}.png", dpi=160, bbox_inches="tight")
    for draw in (conflict, blocks, plans):
        draw().savefig(OUT / f"{draw.__name__}.png", dpi=160, bbox_inches="tight")
    overview().savefig(OUT.parent / "overview.png", dpi=130)
