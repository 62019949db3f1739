"""DualProj: project the preferred combination of the gradients onto their dual cone."""

from __future__ import annotations

from typing import Any, Literal, overload

from torch import Tensor

from gramjd.weighting._base import Weighting
from gramjd.weighting._certificate import Certificate, certify
from gramjd.weighting._dual_cone import REMEDY, project, projector_eps, regularize
from gramjd.weighting._gramian import flat_preference, prepare, rounding


# fmt: off
@overload
def dualproj(gramian: Tensor, preference: Tensor | None = None, *, norm_eps: float = ...,
             reg_eps: float = ..., certificate: Literal[False] = False) -> Tensor: ...
@overload
def dualproj(gramian: Tensor, preference: Tensor | None = None, *, norm_eps: float = ...,
             reg_eps: float = ..., certificate: Literal[True]) -> tuple[Tensor, Certificate]: ...
# fmt: on


def dualproj(
    gramian: Tensor,
    preference: Tensor | None = None,
    *,
    norm_eps: float = 1e-4,
    reg_eps: float = 1e-4,
    certificate: bool = False,
) -> Tensor | tuple[Tensor, Certificate]:
    """Weights of DualProj: the nearest step to the mean gradient that conflicts with no gradient.

    They are the ``v >= p`` that minimizes ``v'Gv``: Equation 11 of Lopez-Paz and Ranzato (2017),
    "Gradient Episodic Memory for Continual Learning".

    Args:
        gramian: ``[*shape, *reversed(shape)]``, or a batch of these along one leading dimension.
        preference: ``p``, of the objectives' shape; ``1 / m`` each by default.
        norm_eps: a Gramian whose trace is below it counts as zero; the others are divided by it.
        reg_eps: multiple of the identity added to the normalized Gramian.
        certificate: also return the KKT residual, and do not raise if it is large.

    Returns:
        Weights of the objectives' shape and the Gramian's dtype; computed in float64.

    Raises:
        ValueError: not a Gramian (shape, NaN, asymmetry, not positive semi-definite), or a wrong
            preference.
        NotConvergedError: the KKT residual is above 1e-9.
    """
    matrix, restore = prepare(gramian)
    weights = flat_preference(preference, matrix, gramian)
    scaled, scale = regularize(matrix, norm_eps, reg_eps, rounding(gramian.dtype))
    projection, residual = project(scaled, weights / scale, reg_eps * scale**2 if reg_eps else None)
    evidence = certify(residual, not certificate, REMEDY)
    result = restore(scale * projection)
    return (result, evidence) if certificate else result


class DualProjWeighting(Weighting):
    """:func:`dualproj` as an object.

    Args:
        pref_vector: the preference, of the objectives' shape; ``1 / m`` each by default.
        projector: accepted as TorchJD's: its ``norm_eps`` and ``reg_eps`` take the place of the next two,
            and its solver is not needed.
        norm_eps: see :func:`dualproj`.
        reg_eps: see :func:`dualproj`.

    Raises:
        TypeError: the projector has no ``norm_eps`` and ``reg_eps``.
    """

    def __init__(
        self,
        pref_vector: Tensor | None = None,
        projector: Any = None,
        *,
        norm_eps: float = 1e-4,
        reg_eps: float = 1e-4,
    ) -> None:
        super().__init__()
        self.pref_vector = pref_vector
        self.norm_eps, self.reg_eps = projector_eps(projector, norm_eps, reg_eps)

    def forward(self, gramian: Tensor, /) -> Tensor:
        """Weights of the objectives, of their shape."""
        return dualproj(gramian, self.pref_vector, norm_eps=self.norm_eps, reg_eps=self.reg_eps)
