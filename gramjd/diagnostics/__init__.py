"""Gradients to look at: what a Gramian or a Jacobian says about a training run.

Numbers need nothing but torch; figures need matplotlib (``pip install 'gramjd[plot]'``).
"""

from gramjd.diagnostics.figures import (
    plot_descent,
    plot_history,
    plot_layers,
    plot_norms,
    plot_similarity,
    plot_spectrum,
    plot_weights,
)
from gramjd.diagnostics.monitor import Monitor
from gramjd.diagnostics.numbers import (
    angle,
    conflict_rate,
    conflicts,
    cosines,
    descent,
    effective_rank,
    layers,
    merged,
    norms,
    ordering,
    outliers,
    spectrum,
)

__all__ = [
    "Monitor",
    "angle",
    "conflict_rate",
    "conflicts",
    "cosines",
    "descent",
    "effective_rank",
    "layers",
    "merged",
    "norms",
    "ordering",
    "outliers",
    "plot_descent",
    "plot_history",
    "plot_layers",
    "plot_norms",
    "plot_similarity",
    "plot_spectrum",
    "plot_weights",
    "spectrum",
]
