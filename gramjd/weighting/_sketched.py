"""The common steps of weightings of a sketched Gramian: rows in, weights out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gramjd.sketched import SketchedGramian
from gramjd.weighting._certificate import certify
from gramjd.weighting._factored_cone import Cone
from gramjd.weighting._gramian import flat_preference

REMEDY = "The sketch may be too ill-conditioned: raise reg_eps, if there is one, or take another dim."


def weigh(
    gramian: SketchedGramian,
    dense: Callable[[Tensor], Any],
    of_rows: Callable[[Tensor], tuple[Tensor, Tensor]],
    certificate: bool,
) -> Any:
    """Weights of the objectives' shape and the sketch's dtype, and a certificate of them if wanted.

    Args:
        gramian: whose rows are checked.
        dense: the weighting of the Gramian itself, for sketches with at least as many columns as rows.
        of_rows: from rows ``[m, n]`` in float64 to weights ``[m]`` and their residual, for all others.
        certificate: whether ``dense`` returns one, too.

    Raises:
        ValueError: the sketch has NaN or infinite entries.
        NotConvergedError: the residual is above 1e-9.
    """
    rows = gramian.sketch.detach().reshape(-1, gramian.dim).to(torch.float64)
    bad = int((~torch.isfinite(rows)).sum())
    if bad:
        raise ValueError(
            f"The sketch has {bad} entries that are NaN or infinite. Look for a loss or gradient that "
            "overflowed."
        )
    if len(rows) <= gramian.dim:
        found = dense(gramian.to(dtype=torch.float64).dense())
        weights, evidence = found if certificate else (found, None)
    else:
        weights, residual = of_rows(rows)
        evidence = certify(residual, not certificate, REMEDY)
    weights = weights.reshape(gramian.objectives).to(gramian.dtype)
    return (weights, evidence) if certificate else weights


def weigh_on_cone(
    gramian: SketchedGramian,
    dense: Callable[..., Any],
    solve: Callable[[Cone, Tensor], tuple[Tensor, Tensor]],
    pref_vector: Tensor | None,
    certificate: bool,
    **eps: float,
) -> Any:
    """Weights by :func:`weigh` for UPGrad and DualProj.

    Args:
        gramian: whose rows are checked.
        dense: the weighting itself, with all its options by name.
        solve: from the cone and the preference, both scaled, to weights ``[m]``, scaled, and their residual.
        pref_vector: of the objectives' shape, or ``None``.
        certificate: whether to return one.
        eps: ``norm_eps`` and ``reg_eps``.
    """
    preference = _preference_of(pref_vector, gramian)

    def of_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
        cone = Cone.of(rows, **eps)
        weights, residual = solve(cone, preference / cone.scale)
        return cone.scale * weights, residual

    whole = partial(dense, pref_vector=pref_vector, certificate=certificate, **eps)
    return weigh(gramian, whole, of_rows, certificate)


def _preference_of(preference: Tensor | None, gramian: SketchedGramian) -> Tensor:
    """The preference in float64, ``[m]``, detached; see :func:`flat_preference`."""
    column = gramian.sketch.detach().reshape(-1, gramian.dim)[:, 0].to(torch.float64)
    return flat_preference(preference, column, gramian).detach()
