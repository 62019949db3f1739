"""Evidence that an answer is right, and the error when it is not."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from gramjd.weighting._opaque import opaque

CERTIFIED = 1e-9  # residual up to which an answer is returned


class NotConvergedError(RuntimeError):
    """A weighting's optimization problem could not be solved to the promised accuracy."""


class Certificate(NamedTuple):
    """Evidence that weights are right, for each Gramian of a batch.

    Attributes:
        residual: largest violation of the optimality conditions that the weighting documents,
            relative to the problem's own scale, in float64.
        converged: whether it is at most 1e-9.
    """

    residual: Tensor
    converged: Tensor


def certify(residual: Tensor, strict: bool, remedy: str) -> Certificate:
    """The certificate of residuals ``[...]``.

    Raises:
        NotConvergedError: one is above 1e-9, unless ``strict`` is false.
    """

    def demand(residual: Tensor) -> Tensor:
        converged = residual <= CERTIFIED
        if strict and not bool(converged.all()):
            raise NotConvergedError(
                f"The weights are known only to a residual of {float(residual.max()):.1e}; wanted: "
                f"{CERTIFIED:.0e}. {remedy}"
            )
        return converged

    return Certificate(residual.detach(), opaque(demand, residual))
