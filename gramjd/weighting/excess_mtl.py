"""ExcessMTL: more weight for the objectives that are farthest from their optimum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

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
        ValueError: an option is out of range; in a call, rows of other shapes than before, or NaN.
    """

    _options: ClassVar = {"robust_step_size": positive, "n_warmup_steps": count(0)}
    _remembered = ("weights", "squares", "baseline", "calls")
    weights: Tensor | None
    squares: list[Tensor] | None = None
    baseline: Tensor | None = None
    calls: int = 0

    def __init__(self, robust_step_size: float = 1.0, n_warmup_steps: int = 0) -> None:
        super().__init__()
        self.robust_step_size, self.n_warmup_steps = robust_step_size, n_warmup_steps
        self.register_buffer("weights", None, persistent=False)

    @torch.no_grad()
    def forward(self, rows: Tensor | Iterable[Tensor], /) -> Tensor:
        """Weights ``[m]`` for ``J [m, n]``, or for the ``[m, *shape]`` of one parameter after the other."""
        risk, squares = self._excess_risk([rows] if isinstance(rows, Tensor) else rows)
        if not bool(risk.isfinite().all()):
            raise ValueError("The Jacobian has entries that are NaN or infinite, or overflow when squared.")
        self.squares, dtype = squares, squares[0].dtype
        weights = torch.full_like(risk, 1 / max(len(risk), 1)) if self.weights is None else self.weights
        self.weights, self.calls = weights, self.calls + 1
        if self.calls <= self.n_warmup_steps:
            share = risk / self.n_warmup_steps
            self.baseline = share if self.baseline is None else self.baseline + share
            return weights.to(dtype)
        if self.baseline is None:
            self.baseline = risk
        else:
            risk = risk / (self.baseline + 1e-7)
        self.weights = (weights.log() + self.robust_step_size * risk).softmax(0)
        return self.weights.to(dtype)

    def _excess_risk(self, rows: Iterable[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """``E [m]`` in float64, and the sums of squares with these."""
        kept, added, shares = self.squares, [], []
        for number, some in enumerate(rows):
            square = some.detach().flatten(1).square()
            old = None if kept is None else kept[number] if number < len(kept) else square[:0]
            if old is not None and old.shape != square.shape:
                raise ValueError(
                    f"Rows {number} are of shape {list(square.shape)}, and were of shape {list(old.shape)} "
                    "before: call reset() when the objectives or the parameters change."
                )
            added.append(square if old is None else old + square)
            shares.append((square / (added[-1] + 1e-7).sqrt()).sum(1, dtype=torch.float64))
        if not shares or (kept is not None and len(kept) != len(added)):
            raise ValueError(f"Expected the rows of {len(kept or [1])} parameters or more; got {len(added)}.")
        return torch.stack(shares).sum(0), added

    def reset(self) -> None:
        """Forget the squares, the weights and the warm-up."""
        self.weights = self.squares = self.baseline = None
        self.calls = 0

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from there; the squares are not shared with who saved them."""
        squares = state["squares"]
        copied = None if squares is None else [each.clone() for each in squares]
        super().set_extra_state({**state, "squares": copied})
