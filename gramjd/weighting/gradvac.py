"""GradVac: pull each gradient towards those it is less similar to than usual."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from gramjd.weighting._base import StatefulWeighting
from gramjd.weighting._gramian import prepare
from gramjd.weighting._options import not_negative, share, source
from gramjd.weighting._orders import random_orders


def gradvac(
    gramian: Tensor,
    state: Tensor | None = None,
    *,
    beta: float = 0.5,
    eps: float = 1e-8,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights of GradVac, and its next state: the usual cosine similarity of each pair.

    Wang et al. (2021), "Gradient Vaccine", arXiv 2010.05874, Equations 2 and 3. Each gradient
    visits the others in random order and, where the cosine is below the usual one, adds the
    multiple of the other that makes it usual. All gradients take their k-th step together.

    Args:
        gramian: ``[*shape, *reversed(shape)]``, or a batch of these along one leading dimension.
            Under ``torch.vmap``, set its ``randomness``.
        state: the state that the last call returned; none at first: the usual cosines are zero.
        beta: share of the new cosine in the next usual one.
        eps: added to denominators.
        generator: source of the orders; the global one of the Gramian's device by default. On the
            CPU the same seed gives the orders of TorchJD.

    Returns:
        Weights of the objectives' shape and the Gramian's dtype, computed in float64 and
        differentiable for given orders; and the state, ``[..., m, m]`` in float64, detached.

    Raises:
        ValueError: not a Gramian (shape, NaN, asymmetry), a state of another shape, or ``beta`` or
            ``eps`` out of range.
    """
    share("beta", beta)
    not_negative("eps", eps)
    matrix, restore = prepare(gramian)
    size = matrix.shape[-1]
    usual = torch.zeros_like(matrix) if state is None else state
    if not matrix.numel() and usual.shape == matrix.shape:
        return restore(matrix[..., 0:0].sum(-1)), usual.detach()
    if usual.shape != matrix.shape:
        raise ValueError(
            f"The state is of shape {list(usual.shape)}, but the Gramian, flattened, of shape "
            f"{list(matrix.shape)}: start again without a state."
        )
    others = random_orders(matrix, generator, size - 1)
    others = others + (others >= torch.arange(size, device=matrix.device).unsqueeze(-1))
    lengths = matrix.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    coefficients = identity.expand(matrix.shape)
    for other in others.unbind(-1):
        product = coefficients @ matrix
        index = other.unsqueeze(-1)
        own = _root((coefficients * product).sum(-1))
        length = lengths.gather(-1, other)
        cosine = product.gather(-1, index).squeeze(-1) / (own * length + eps)
        target = usual.gather(-1, index).squeeze(-1)
        step = _vaccine(own, length, cosine, target, eps)
        coefficients = coefficients + step.unsqueeze(-1) * identity[other]
        moved = (1 - beta) * target + beta * cosine.detach()
        usual = usual.scatter(-1, index, moved.unsqueeze(-1))
    return restore(coefficients.sum(-2)), usual


def _vaccine(own: Tensor, length: Tensor, cosine: Tensor, target: Tensor, eps: float) -> Tensor:
    """The factor of the other gradient that is added (Equation 3); zero if it is similar enough."""
    sine, target_sine = _root(1 - cosine**2), _root(1 - target**2)
    step = own * (target * sine - cosine * target_sine) / (length * target_sine + eps)
    return torch.where(cosine < target, step, 0)


def _root(square: Tensor) -> Tensor:
    """The root, and zero with a zero derivative where rounding left nothing positive."""
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1).sqrt(), 0)


class GradVacWeighting(StatefulWeighting):
    """:func:`gradvac` as an object that keeps the state.

    Args:
        beta: see :func:`gradvac`.
        eps: see :func:`gradvac`.
        generator: see :func:`gradvac`.
    """

    _options: ClassVar = {"beta": share, "eps": not_negative, "generator": source}

    _remembered = ("state",)
    state: Tensor | None

    def __init__(
        self, beta: float = 0.5, eps: float = 1e-8, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.beta, self.eps, self.generator = beta, eps, generator
        self.register_buffer("state", None, persistent=False)

    def forward(self, gramian: Tensor, /) -> Tensor:
        """Weights of the objectives, of their shape."""
        weights, self.state = gradvac(
            gramian, self.state, beta=self.beta, eps=self.eps, generator=self.generator
        )
        return weights

    def reset(self) -> None:
        """Start again from usual cosines of zero."""
        self.state = None
