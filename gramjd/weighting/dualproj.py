"""DualProj: project the preferred combination of the gradients onto their dual cone."""

from __future__ import annotations

from typing import ClassVar, Literal, overload

from torch import Tensor

from gramjd.sketched import SketchedGramian
from gramjd.weighting._certificate import Certificate, certify
from gramjd.weighting._dual_cone import REMEDY, project, regularize
from gramjd.weighting._dual_cone_weighting import DUAL_CONE, DualConeWeighting
from gramjd.weighting._factored_cone import project_onto
from gramjd.weighting._gramian import flat_preference, nothing, prepare, rounding
from gramjd.weighting._options import not_negative
from gramjd.weighting._sketched import weigh_on_cone
from gramjd.weighting._small import dual_cone, easy, finish, is_fixed, preference_array


# fmt: off
@overload
def dualproj(gramian: Tensor | SketchedGramian, pref_vector: Tensor | None = None, *, norm_eps: float = ...,
             reg_eps: float = ..., certificate: Literal[False] = False) -> Tensor: ...
@overload
def dualproj(gramian: Tensor | SketchedGramian, pref_vector: Tensor | None = None, *, norm_eps: float = ...,
             reg_eps: float = ..., certificate: Literal[True]) -> tuple[Tensor, Certificate]: ...
# fmt: on


def dualproj(
    gramian: Tensor | SketchedGramian,
    pref_vector: Tensor | None = None,
    *,
    norm_eps: float = 1e-4,
    reg_eps: float = 1e-4,
    certificate: bool = False,
) -> Tensor | tuple[Tensor, Certificate]:
    """Weights of DualProj: the nearest step to the mean gradient that conflicts with no gradient.

    They are the ``v >= p`` that minimizes ``v'Gv``: Equation 11 of Lopez-Paz and Ranzato (2017),
    "Gradient Episodic Memory for Continual Learning".

    Args:
        gramian: ``[*shape, *reversed(shape)]``, or a batch of these along one leading dimension; or a
            :class:`~gramjd.SketchedGramian`, which needs a positive ``reg_eps``.
        pref_vector: ``p``, of the objectives' shape; ``1 / m`` each by default.
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
    not_negative("norm_eps", norm_eps)
    not_negative("reg_eps", reg_eps)
    if isinstance(gramian, SketchedGramian):
        eps = {"norm_eps": norm_eps, "reg_eps": reg_eps}
        return weigh_on_cone(gramian, dualproj, project_onto, pref_vector, certificate, **eps)
    small = None if certificate or not is_fixed(pref_vector) else easy(gramian)
    if small is not None:
        found = dual_cone(small, preference_array(pref_vector, gramian), norm_eps, reg_eps)
        if found is not None:
            return finish(found, gramian)
    matrix, restore = prepare(gramian)
    if not matrix.numel():
        return nothing(matrix, restore, certificate)
    weights = flat_preference(pref_vector, matrix, gramian)
    scaled, scale = regularize(matrix, norm_eps, reg_eps, rounding(gramian.dtype))
    projection, residual = project(scaled, weights / scale, reg_eps * scale**2 if reg_eps else None)
    evidence = certify(residual, not certificate, REMEDY)
    result = restore(scale * projection)
    return (result, evidence) if certificate else result


class DualProjWeighting(DualConeWeighting):
    """:func:`dualproj` as an object.

    Args:
        pref_vector: ``p``, of the objectives' shape; ``1 / m`` each by default.
        projector: one of TorchJD's: its ``norm_eps`` and ``reg_eps``, as they are at each call, take the
            place of the next two; its solver is not needed. ``None`` afterwards keeps these values.
        norm_eps: see :func:`dualproj`. Assigning it later takes the place of the projector's.
        reg_eps: likewise.

    Raises:
        TypeError: the projector has no ``norm_eps`` and ``reg_eps``, or an option is of another type.
        ValueError: an option is out of range.
    """

    _options: ClassVar = DUAL_CONE

    def forward(self, gramian: Tensor | SketchedGramian, /) -> Tensor:
        """Weights of the objectives, of their shape."""
        return dualproj(gramian, self.pref_vector, norm_eps=self.norm_eps, reg_eps=self.reg_eps)
