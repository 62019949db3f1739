"""MoDo: one projected gradient step of the weights a call, from two independent batches."""

from __future__ import annotations

from typing import ClassVar, Literal, overload

from torch import Tensor

from gramjd.weighting._base import StatefulWeighting
from gramjd.weighting._certificate import Certificate, certify
from gramjd.weighting._gramian import nothing, prepare_cross, same_shape
from gramjd.weighting._options import not_negative, positive
from gramjd.weighting._simplex import project_onto_simplex, projection_residual
from gramjd.weighting._small_simplex import modo_step, shaped


# fmt: off
@overload
def modo(cross: Tensor, state: Tensor | None = None, *, gamma: float = ..., rho: float = ...,
         certificate: Literal[False] = False) -> tuple[Tensor, Tensor]: ...
@overload
def modo(cross: Tensor, state: Tensor | None = None, *, gamma: float = ..., rho: float = ...,
         certificate: Literal[True]) -> tuple[Tensor, Tensor, Certificate]: ...
# fmt: on


def modo(
    cross: Tensor,
    state: Tensor | None = None,
    *,
    gamma: float = 0.1,
    rho: float = 0.1,
    certificate: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Certificate]:
    """Weights of MoDo, ``Π(w - γ (J₁J₂' + ρ I) w)``, and its next state, the same in float64.

    ``Π`` projects onto the probability simplex.
    Chen et al. (2024), "Three-Way Trade-Off in Multi-Objective Learning: Optimization, Generalization
    and Conflict-Avoidance", JMLR 25, Equation 2.9a.

    Args:
        cross: ``J₁J₂'`` of two *independent* batches, as ``J1.cross(J2)`` gives it:
            ``[*shape, *reversed(shape)]``, or a batch of these along one leading dimension. It need not
            be symmetric. With the Gramian of one batch, the paper's guarantee is lost.
        state: ``w``, as the last call returned it; at first ``1 / m`` each.
        gamma: learning rate of the weights.
        rho: coefficient of their squared norm.
        certificate: also return by how much the projection misses what defines it.

    Returns:
        Weights of the objectives' shape and the matrix's dtype, computed in float64; and the state, of
        the objectives' shape in float64, detached.

    Raises:
        ValueError: not such a matrix (shape, NaN), a state of another shape, or an option out of range.
    """
    positive("gamma", gamma)
    not_negative("rho", rho)
    small = None if certificate else modo_step(cross, state, gamma, rho)
    if small is not None:
        return shaped(small, small, cross)
    matrix, restore = prepare_cross(cross)
    w = same_shape(state, matrix, cross)
    if not matrix.numel():
        empty = nothing(matrix, restore, certificate)
        weights, *evidence = empty if certificate else (empty,)
        return (weights, w.reshape(weights.shape), *evidence)
    start = w - gamma * ((matrix @ w.unsqueeze(-1)).squeeze(-1) + rho * w)
    found = project_onto_simplex(start)
    evidence = certify(projection_residual(start.detach(), found.detach()), not certificate, "")
    weights = restore(found)
    following = found.detach().clone().reshape(weights.shape)
    return (weights, following, evidence) if certificate else (weights, following)


class MoDoWeighting(StatefulWeighting):
    """:func:`modo` as an object that keeps the state.

    Args:
        gamma: see :func:`modo`.
        rho: see :func:`modo`.
    """

    _options: ClassVar = {"gamma": positive, "rho": not_negative}
    _remembered = ("state",)
    state: Tensor | None

    def __init__(self, gamma: float = 0.1, rho: float = 0.1) -> None:
        super().__init__()
        self.gamma, self.rho = gamma, rho
        self.register_buffer("state", None, persistent=False)

    def forward(self, cross: Tensor, /) -> Tensor:
        """Weights of the objectives, of their shape."""
        weights, self.state = modo(cross, self.state, gamma=self.gamma, rho=self.rho)
        return weights

    def reset(self) -> None:
        """Start again from equal weights."""
        self.state = None
