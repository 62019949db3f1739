"""CR-MOGM: smooth the weights of another weighting over the steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from gramjd.weighting._base import StatefulWeighting
from gramjd.weighting._options import function, optional, share, vector


def cr_mogm(weights: Tensor, state: Tensor | None = None, *, alpha: float = 0.9) -> Tensor:
    """Smoothed weights ``alpha * state + (1 - alpha) * weights``: they are also the next state.

    Zhou et al. (2022), "On the Convergence of Stochastic Multi-Objective Gradient Manipulation and
    Beyond", Algorithm 1.

    Args:
        weights: what a weighting returned for the current Gramian.
        state: what this function returned at the step before, or initial weights; by default the
            current weights.
        alpha: share of the state, in ``[0, 1]``. The paper increases it towards 1 as the learning
            rate decreases.

    Raises:
        ValueError: ``alpha`` is out of range, or the state has another shape than the weights.
    """
    share("alpha", alpha)
    if state is None:
        return weights
    if state.shape != weights.shape:
        raise ValueError(
            f"The state is of shape {list(state.shape)}, the weights of shape "
            f"{list(weights.shape)}: start again without a state when the objectives change."
        )
    return alpha * state.to(weights) + (1 - alpha) * weights


class CRMOGMWeighting(StatefulWeighting):
    """:func:`cr_mogm` around any weighting, keeping the state, detached, from call to call.

    Args:
        weighting: a weighting of this library or of TorchJD, or a function of the Gramian.
        alpha: see :func:`cr_mogm`; it may be changed between calls.
        initial_weights: the first state.
    """

    _options: ClassVar = {"weighting": function, "alpha": share, "initial_weights": optional(vector)}

    _remembered = ("state",)
    state: Tensor | None

    def __init__(
        self,
        weighting: Callable[[Tensor], Tensor],
        alpha: float = 0.9,
        initial_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.weighting, self.alpha, self.initial_weights = weighting, alpha, initial_weights
        self.register_buffer("state", None, persistent=False)

    def forward(self, gramian: Tensor, /) -> Tensor:
        """Weights of the objectives, of their shape."""
        state = self.initial_weights if self.state is None else self.state
        smoothed = cr_mogm(self.weighting(gramian), state, alpha=self.alpha)
        self.state = smoothed.detach()
        return smoothed

    def reset(self) -> None:
        """Forget the state, and that of the wrapped weighting if it has one."""
        self.state = None
        reset = getattr(self.weighting, "reset", None)
        if callable(reset):
            reset()
