"""UPGrad: project each objective's gradient onto the dual cone of all, and combine."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor, nn

from gramjd.weighting._certificate import Certificate, certify
from gramjd.weighting._dual_cone import project_units, regularize
from gramjd.weighting._gramian import flat_preference, prepare, rounding


def upgrad(
    gramian: Tensor,
    preference: Tensor | None = None,
    *,
    norm_eps: float = 1e-4,
    reg_eps: float = 1e-4,
) -> Tensor:
    """Weights of UPGrad (Quinton and Rey, arXiv 2406.16232, Proposition 1 and Equation 4)."""
    matrix, restore = prepare(gramian)
    weights = flat_preference(preference, matrix, gramian).clamp(min=0)
    scaled, scale = regularize(matrix, norm_eps, reg_eps)
    projections, residual = project_units(scaled, rounding(gramian.dtype))
    certify(residual, True, "")
    return restore(scale * ((weights / scale).unsqueeze(-2) @ projections).squeeze(-2))


class UPGradWeighting(nn.Module):
    """:func:`upgrad` as an object, with TorchJD's name and arguments."""

    def __init__(self, pref_vector: Tensor | None = None) -> None:
        super().__init__()
        self.pref_vector = pref_vector

    def forward(self, gramian: Tensor, /) -> Tensor:
        """Weights of the objectives, with their shape."""
        return upgrad(gramian, self.pref_vector)
