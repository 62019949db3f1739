"""ConFIG: the direction that is as similar to every gradient, as long as the gradients agree on it."""

from __future__ import annotations

from typing import ClassVar, Literal, overload

import torch
from torch import Tensor

from gramjd.weighting._base import Weighting
from gramjd.weighting._certificate import Certificate, certify
from gramjd.weighting._gramian import flat_preference, nothing, prepare
from gramjd.weighting._options import optional, vector
from gramjd.weighting._small import conflict_free, easy, finish, is_fixed, np, preference_array


# fmt: off
@overload
def config(gramian: Tensor, pref_vector: Tensor | None = None, *,
           certificate: Literal[False] = False) -> Tensor: ...
@overload
def config(gramian: Tensor, pref_vector: Tensor | None = None, *,
           certificate: Literal[True]) -> tuple[Tensor, Certificate]: ...
# fmt: on


def config(
    gramian: Tensor, pref_vector: Tensor | None = None, *, certificate: bool = False
) -> Tensor | tuple[Tensor, Certificate]:
    """Weights of ConFIG: ``(Σ_i g_i'u) u`` for the unit ``u`` along ``U⁺ p``, with unit gradients ``U``.

    Liu, Chu and Thuerey (2024), "ConFIG: Towards Conflict-free Training of Physics Informed Neural
    Networks", arXiv 2408.11104, Equation 2. With ``C = UU'``, the cosines, and the norms ``N``:
    ``U⁺p = J'N⁻¹C⁺p``, a combination of the gradients, so that weights exist. Where the gradients are
    independent, the cosine of each with the step is proportional to its preference.

    Args:
        gramian: ``[*shape, *reversed(shape)]``, or a batch of these along one leading dimension.
        pref_vector: ``p``, of the objectives' shape; ones by default. Its length has no effect.
        certificate: also return the largest entry of ``C (Cv - p)``, the normal equations of the least
            squares that ``v = C⁺p`` solves, relative to ``m`` times that of ``|C||v| + |p|``; and do not
            raise if it is large.

    Returns:
        Weights of the objectives' shape and the Gramian's dtype; computed in float64, with eigenvalues
        of ``C`` below the rounding of the Gramian's own dtype taken for zero. All are zero where ``U⁺p``
        vanishes. Differentiable where the rank is locally constant.

    Raises:
        ValueError: not a Gramian (shape, NaN, asymmetry), or a wrong preference.
        NotConvergedError: the residual is above 1e-9, for double-precision Gramians.
    """
    small = None if certificate or not is_fixed(pref_vector) else easy(gramian)
    if small is not None:
        p = np.ones(len(small)) if pref_vector is None else preference_array(pref_vector, gramian)
        found = conflict_free(small, p, torch.finfo(gramian.dtype).eps)
        if found is not None:
            return finish(found, gramian)
    matrix, restore = prepare(gramian)
    if not matrix.numel():
        return nothing(matrix, restore, certificate)
    preference = torch.ones_like(matrix[..., 0], requires_grad=False)
    if pref_vector is not None:
        preference = flat_preference(pref_vector, matrix, gramian).expand(matrix.shape[:-1])
    size = matrix.shape[-1]
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    inverse = torch.where(diagonal > 0, torch.where(diagonal > 0, diagonal, 1).rsqrt(), 0)
    cosines = matrix * inverse.unsqueeze(-1) * inverse.unsqueeze(-2)
    tolerance = size * torch.finfo(gramian.dtype).eps
    v = (torch.linalg.pinv(cosines, rtol=tolerance, hermitian=True) @ preference.unsqueeze(-1)).squeeze(-1)
    image = (cosines @ v.unsqueeze(-1)).squeeze(-1)
    residual = _residual(cosines.detach(), v.detach(), image.detach(), preference, tolerance)
    evidence = certify(residual, not certificate, "The Gramian may be too ill-conditioned.")
    square = (v * image).sum(-1, keepdim=True)
    usable = square > 1e-24
    slope = (matrix @ (inverse * v).unsqueeze(-1)).squeeze(-1).sum(-1, keepdim=True)
    length = torch.where(usable, slope / torch.where(usable, square, 1), 0)
    result = restore(length * inverse * v)
    return (result, evidence) if certificate else result


def _residual(cosines: Tensor, v: Tensor, image: Tensor, preference: Tensor, tolerance: float) -> Tensor:
    """The residual of the normal equations, without the part of eigenvalues that count as zero."""
    miss = (cosines @ (image - preference).unsqueeze(-1)).squeeze(-1).abs().amax(-1)
    size = (cosines.abs() @ v.abs().unsqueeze(-1)).squeeze(-1) + preference.abs()
    relative = miss / (v.shape[-1] * size.amax(-1)).clamp(min=torch.finfo(v.dtype).tiny)
    return (relative - tolerance).clamp(min=0)


class ConFIGWeighting(Weighting):
    """:func:`config` as an object; TorchJD has it as an aggregator, ``ConFIG``.

    Args:
        pref_vector: ``p``, of the objectives' shape; ones by default.
    """

    _options: ClassVar = {"pref_vector": optional(vector)}

    def __init__(self, pref_vector: Tensor | None = None) -> None:
        super().__init__()
        self.pref_vector = pref_vector

    def forward(self, gramian: Tensor, /) -> Tensor:
        """Weights of the objectives, of their shape."""
        return config(gramian, self.pref_vector)
