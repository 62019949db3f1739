"""ExcessMTL: more weight for the objectives that are farthest from their optimum."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from gramjd.weighting._base import StatefulWeighting
from gramjd.weighting._options import count, positive


class ExcessMTLWeighting(StatefulWeighting):
    """Weights of ExcessMTL, ``w_i ∝ w_i exp(η E_i)``, with ``E_i`` the excess risk of an objective.

    He et al. (2024), "Robust Multi-Task Learning with Excess Risks", arXiv 2402.02009, Equations 6, 7
    and 9: ``E_i = Σ_k J_ik² / (S_ik + 1e-7)^(1/2)``, with ``S`` the sum of the squares ``J_ik²`` over
    the calls, relative to what it was at first. It needs the squares of the entries of ``J``, which a
    Gramian does not tell, and keeps as many numbers as ``J`` has. Called with the rows of one parameter
    after the other, as ``gramjd.aggregation.parameter_rows(J)`` gives them, it holds no more than those.

    Args:
        robust_step_size: ``η``.
        n_warmup_steps: calls at first that only collect squares and return equal weights; what the
            excess risks are relative to is their mean over these calls. Without any, it is those of the
            first call, which themselves count as they are, as in the authors' code.

    Raises:
        TypeError: in a call, something else than tensors of real floating-point numbers.
        ValueError: an option is out of range; in a call, rows of other shapes than before, or NaN.
    """

    _options: ClassVar = {"robust_step_size": positive, "n_warmup_steps": count(0)}
    _remembered = ("weights", "sums", "baseline", "calls")
    weights: Tensor | None
    sums: list[Tensor] | None = None  # of the squares, and 1e-7
    baseline: Tensor | None = None
    calls: int = 0

    if TYPE_CHECKING:

        def __call__(self, rows: Tensor | Iterable[Tensor], /) -> Tensor: ...

    def __init__(self, robust_step_size: float = 1.0, n_warmup_steps: int = 0) -> None:
        super().__init__()
        self.robust_step_size, self.n_warmup_steps = robust_step_size, n_warmup_steps
        self.register_buffer("weights", None, persistent=False)

    def forward(self, rows: Tensor | Iterable[Tensor], /) -> Tensor:
        """Weights ``[m]`` for ``J [m, n]``, or for the ``[m, *shape]`` of one parameter after the other."""
        if isinstance(rows, Tensor):
            rows = [rows]
        elif not isinstance(rows, Iterable):
            raise TypeError(
                f"ExcessMTL needs the entries of the gradients, not a {type(rows).__name__}: of a Jacobian, "
                "pass gramjd.aggregation.parameter_rows(J)."
            )
        risk, sums, dtype = self._excess_risk(rows)
        if len(risk) and not isfinite(float(risk.max())):  # no risk is negative
            raise ValueError("The Jacobian has entries that are NaN or infinite, or overflow when squared.")
        self.sums, weights = sums, self.weights
        if weights is None:
            weights = torch.full_like(risk, 1 / max(len(risk), 1))
        self.calls += 1
        if self.calls <= self.n_warmup_steps:
            share = risk / self.n_warmup_steps
            self.baseline = share if self.baseline is None else self.baseline + share
        else:
            if self.baseline is None:
                self.baseline = risk
            else:
                risk = risk / (self.baseline + 1e-7)
            weights = torch.add(weights.log(), risk, alpha=self.robust_step_size).softmax(0)
        self._buffers["weights"] = weights  # as an assignment does, at a tenth of the time
        return weights.to(dtype)

    def _excess_risk(self, rows: Iterable[Tensor]) -> tuple[Tensor, list[Tensor], torch.dtype]:
        """The risks ``E [m]`` in float64, the new sums of squares, and the dtype of the rows."""
        kept, sums, total, dtype = self.sums, list[Tensor](), None, torch.float64
        for number, some in enumerate(rows):
            flat, dtype = _matrix(some), some.dtype
            square = (flat if dtype.itemsize >= 4 else flat.float()).square()
            old = None if kept is None else kept[number] if number < len(kept) else square[:0]
            if old is not None and old.shape != square.shape:
                raise ValueError(
                    f"Rows {number} are of shape {list(square.shape)}, and were of shape {list(old.shape)} "
                    "before: call reset() when the objectives or the parameters change."
                )
            sums.append(square + (1e-7 if old is None else old))  # what is kept stays if a row is wrong
            share = square.div_(sums[-1].sqrt()).sum(1, dtype=torch.float64)
            if total is not None and len(total) != len(share):
                raise ValueError(f"Rows {number} are {len(share)}, and there are {len(total)} of others.")
            total = share if total is None else total.add_(share)
        if total is None or (kept is not None and len(kept) != len(sums)):
            wanted = len(kept or [1])
            raise ValueError(f"Expected the rows of {wanted} parameters or more; got {len(sums)}.")
        return total, sums, dtype

    def reset(self) -> None:
        """Forget the squares, the weights and the warm-up."""
        self.weights = self.sums = self.baseline = None
        self.calls = 0

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Load a saved state; its sums are copied."""
        super().set_extra_state(state)
        self.sums = _copied(self.sums)


def _matrix(rows: Any) -> Tensor:
    """Flatten rows ``[m, *shape]`` to ``[m, n]``, detached."""
    if not isinstance(rows, Tensor) or not rows.is_floating_point() or not rows.ndim:
        got = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise TypeError(f"Rows are real floating-point tensors of shape [m, *shape]; got {got}.")
    return rows.detach().flatten(1) if rows.ndim > 1 else rows.detach().unsqueeze(1)


def _copied(sums: list[Tensor] | None) -> list[Tensor] | None:
    return None if sums is None else [each.clone() for each in sums]
