"""SDMGrad: the common descent direction near a preferred one, by a few stochastic steps."""

from __future__ import annotations

from typing import ClassVar, Literal, overload

import torch
from torch import Tensor

from gramjd.weighting._base import StatefulWeighting
from gramjd.weighting._certificate import Certificate, certify
from gramjd.weighting._gramian import flat_preference, nothing, prepare_cross, same_shape
from gramjd.weighting._options import count, not_negative, number, optional, positive, vector
from gramjd.weighting._simplex import project_onto_simplex, projection_residual
from gramjd.weighting._small_simplex import sdmgrad_steps, shaped

_momentum = number(0.0, 1.0, open_end=True)


# fmt: off
@overload
def sdmgrad(cross: Tensor, state: Tensor | None = None, *, lr: float = ..., momentum: float = ...,
            n_iter: int = ..., lambda_: float = ..., pref_vector: Tensor | None = ...,
            certificate: Literal[False] = False) -> tuple[Tensor, Tensor]: ...
@overload
def sdmgrad(cross: Tensor, state: Tensor | None = None, *, lr: float = ..., momentum: float = ...,
            n_iter: int = ..., lambda_: float = ..., pref_vector: Tensor | None = ...,
            certificate: Literal[True]) -> tuple[Tensor, Tensor, Certificate]: ...
# fmt: on


def sdmgrad(
    cross: Tensor,
    state: Tensor | None = None,
    *,
    lr: float = 10.0,
    momentum: float = 0.5,
    n_iter: int = 20,
    lambda_: float = 0.3,
    pref_vector: Tensor | None = None,
    certificate: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Certificate]:
    """Weights of SDMGrad, ``(w + λ p) / (1 + λ)``, and its next state ``w``.

    ``w`` takes ``n_iter`` projected steps with momentum against ``A (w + λ p)`` on the simplex. Xiao,
    Ban and Ji (2023), "Direction-oriented Multi-objective Learning: Simple and Provable Stochastic
    Algorithms", arXiv 2305.18409, Algorithm 1, with ``A = J₁J₂'`` over the square of the mean of
    ``sqrt(A_ii)`` as in their code and TorchJD.

    Args:
        cross: ``J₁J₂'`` of two *independent* batches, as ``J1.cross(J2)`` gives it; see
            :func:`gramjd.weighting.modo`.
        state: ``w``, as the last call returned it; at first ``1 / m`` each.
        lr: length of the steps.
        momentum: in ``[0, 1)``.
        n_iter: how many steps.
        lambda_: ``λ``, the pull towards the preferred direction.
        pref_vector: ``p``, of the objectives' shape; ``1 / m`` each by default.
        certificate: also return by how much the last projection misses what defines it.

    Returns:
        Weights of the objectives' shape and the matrix's dtype, computed in float64; and the state, of
        the objectives' shape in float64, detached.

    Raises:
        ValueError: not such a matrix (shape, NaN), a state or preference of another shape, or an option
            out of range.
    """
    positive("lr", lr)
    _momentum("momentum", momentum)
    count(1)("n_iter", n_iter)
    not_negative("lambda_", lambda_)
    if not certificate:
        small = sdmgrad_steps(cross, state, lr, momentum, n_iter, lambda_, pref_vector)
        if small is not None:
            return shaped(small[0], small[1], cross)
    matrix, restore = prepare_cross(cross)
    preference = flat_preference(pref_vector, matrix, cross)
    w = same_shape(state, matrix, cross)
    if not matrix.numel():
        empty = nothing(matrix, restore, certificate)
        weights, *evidence = empty if certificate else (empty,)
        return (weights, w.reshape(weights.shape), *evidence)
    scale = matrix.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt().mean(-1)[..., None, None]
    matrix = matrix / (scale**2 + 1e-8)
    velocity = start = torch.zeros_like(w)
    for _ in range(n_iter):
        slope = (matrix @ (w + lambda_ * preference).unsqueeze(-1)).squeeze(-1)
        velocity = momentum * velocity + slope
        start = w - lr * velocity
        w = project_onto_simplex(start)
    evidence = certify(projection_residual(start.detach(), w.detach()), not certificate, "")
    weights = restore((w + lambda_ * preference) / (1 + lambda_))
    following = w.detach().clone().reshape(weights.shape)
    return (weights, following, evidence) if certificate else (weights, following)


class SDMGradWeighting(StatefulWeighting):
    """:func:`sdmgrad` as an object that keeps the state.

    Args:
        lr: see :func:`sdmgrad`.
        momentum: see :func:`sdmgrad`.
        n_iter: see :func:`sdmgrad`.
        lambda_: see :func:`sdmgrad`.
        pref_vector: see :func:`sdmgrad`.
    """

    _options: ClassVar = {
        "lr": positive,
        "momentum": _momentum,
        "n_iter": count(1),
        "lambda_": not_negative,
        "pref_vector": optional(vector),
    }
    _remembered = ("state",)
    state: Tensor | None

    def __init__(
        self,
        lr: float = 10.0,
        momentum: float = 0.5,
        n_iter: int = 20,
        lambda_: float = 0.3,
        pref_vector: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.lr, self.momentum, self.n_iter = lr, momentum, n_iter
        self.lambda_, self.pref_vector = lambda_, pref_vector
        self.register_buffer("state", None, persistent=False)

    def forward(self, cross: Tensor, /) -> Tensor:
        """Weights of the objectives, of their shape."""
        weights, self.state = sdmgrad(
            cross,
            self.state,
            lr=self.lr,
            momentum=self.momentum,
            n_iter=self.n_iter,
            lambda_=self.lambda_,
            pref_vector=self.pref_vector,
        )
        return weights

    def reset(self) -> None:
        """Start again from equal weights."""
        self.state = None
