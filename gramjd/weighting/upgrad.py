"""UPGrad: project each objective's gradient onto the dual cone of all, and combine."""

from __future__ import annotations

from typing import ClassVar, Literal, overload

from torch import Tensor

from gramjd.sketched import SketchedGramian
from gramjd.weighting._certificate import Certificate, certify
from gramjd.weighting._dual_cone import REMEDY, project_units, regularize
from gramjd.weighting._dual_cone_weighting import DUAL_CONE, DualConeWeighting
from gramjd.weighting._factored_cone import Cone, combined_units
from gramjd.weighting._gramian import flat_preference, nothing, prepare, rounding
from gramjd.weighting._options import not_negative
from gramjd.weighting._sketched import weigh_on_cone
from gramjd.weighting._small import finish, is_fixed, np, preference_array
from gramjd.weighting._small_cone import small_projections


# fmt: off
@overload
def upgrad(gramian: Tensor | SketchedGramian, pref_vector: Tensor | None = None, *, norm_eps: float = ...,
           reg_eps: float = ..., certificate: Literal[False] = False) -> Tensor: ...
@overload
def upgrad(gramian: Tensor | SketchedGramian, pref_vector: Tensor | None = None, *, norm_eps: float = ...,
           reg_eps: float = ..., certificate: Literal[True]) -> tuple[Tensor, Certificate]: ...
# fmt: on


def upgrad(
    gramian: Tensor | SketchedGramian,
    pref_vector: Tensor | None = None,
    *,
    norm_eps: float = 1e-4,
    reg_eps: float = 1e-4,
    certificate: bool = False,
) -> Tensor | tuple[Tensor, Certificate]:
    """Weights of UPGrad: no objective's gradient conflicts with the resulting step.

    Each gradient ``p_i g_i`` is projected onto the cone of the directions that conflict with no
    gradient; the step is the sum. By Proposition 1 of Quinton and Rey, arXiv 2406.16232, the
    projection's weights are the ``v >= p_i e_i`` that minimizes ``v'Gv``, and the result is the sum
    of these (Equation 4 and Section 3.2).

    Args:
        gramian: ``[*shape, *reversed(shape)]``, or a batch of these along one leading dimension; or a
            :class:`~gramjd.SketchedGramian`, which needs a positive ``reg_eps``.
        pref_vector: ``p``, of the objectives' shape; ``1 / m`` each by default. Negative entries
            count as zero: the projection of the opposite of a gradient is then zero.
        norm_eps: a Gramian whose trace is below it counts as zero; the others are divided by it.
        reg_eps: multiple of the identity added to the normalized Gramian. It makes the solution
            unique; with zero it may not be.
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
        return weigh_on_cone(gramian, upgrad, _solve_units, pref_vector, certificate, **eps)
    quick = not certificate and is_fixed(pref_vector)
    small = small_projections(gramian, norm_eps, reg_eps) if quick else None
    if small is not None:
        projections, scale = small
        share = np.maximum(preference_array(pref_vector, gramian), 0) / scale
        return finish(scale * (share @ projections), gramian)
    matrix, restore = prepare(gramian)
    if not matrix.numel():
        return nothing(matrix, restore, certificate)
    weights = flat_preference(pref_vector, matrix, gramian)
    scaled, scale = regularize(matrix, norm_eps, reg_eps, rounding(gramian.dtype))
    projections, residual = project_units(scaled, reg_eps * scale**2 if reg_eps else None)
    evidence = certify(residual.amax(-1), not certificate, REMEDY)
    result = restore(_combine(projections, scale, weights))
    return (result, evidence) if certificate else result


def _solve_units(cone: Cone, preference: Tensor) -> tuple[Tensor, Tensor]:
    """The scaled weights ``[m]`` and their residual, for a scaled preference."""
    return combined_units(cone, preference.clamp(min=0))


def _combine(projections: Tensor, scale: Tensor, preference: Tensor) -> Tensor:
    """The weights, from the projections of the unit vectors in scaled coordinates."""
    share = preference.clamp(min=0) / scale
    return scale * (share.unsqueeze(-2) @ projections).squeeze(-2)


class UPGradWeighting(DualConeWeighting):
    """:func:`upgrad` as an object.

    Args:
        pref_vector: ``p``, of the objectives' shape; ``1 / m`` each by default.
        projector: one of TorchJD's: its ``norm_eps`` and ``reg_eps``, as they are at each call, take the
            place of the next two; its solver is not needed. ``None`` afterwards keeps these values.
        norm_eps: see :func:`upgrad`. Assigning it later takes the place of the projector's.
        reg_eps: likewise.

    Raises:
        TypeError: the projector has no ``norm_eps`` and ``reg_eps``, or an option is of another type.
        ValueError: an option is out of range.
    """

    _options: ClassVar = DUAL_CONE

    def forward(self, gramian: Tensor | SketchedGramian, /) -> Tensor:
        """Weights of the objectives, of their shape."""
        return upgrad(gramian, self.pref_vector, norm_eps=self.norm_eps, reg_eps=self.reg_eps)
