"""Aligned-MTL: make the principal components of the gradients equally long."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from gramjd.weighting._base import Weighting
from gramjd.weighting._gramian import flat_preference, nothing, prepare
from gramjd.weighting._opaque import opaque
from gramjd.weighting._options import one_of, optional, vector
from gramjd.weighting._small import aligned, easy, finish, is_fixed, preference_array

ScaleMode = Literal["min", "median", "rmse"]
_scale_mode = one_of("min", "median", "rmse")


def aligned_mtl(gramian: Tensor, pref_vector: Tensor | None = None, scale_mode: ScaleMode = "min") -> Tensor:
    """Weights of Aligned-MTL: ``sqrt(σ) (G⁺)^(1/2) p``, with ``σ`` from the eigenvalues of ``G``.

    Senushkin et al. (2023), "Independent Component Alignment for Multi-Task Learning", Algorithm 1.

    Args:
        gramian: ``[*shape, *reversed(shape)]``, or a batch of these along one leading dimension.
        pref_vector: ``p``, of the objectives' shape; ``1 / m`` each by default.
        scale_mode: ``σ`` is the smallest (``"min"``, as in the paper), the lower median or, for
            ``"rmse"``, the mean of the eigenvalues that are not zero.

    Returns:
        Weights of the objectives' shape and the Gramian's dtype; computed in float64, with
        eigenvalues below the rounding of the Gramian's own dtype taken for zero. A zero Gramian
        gives the preference. Differentiable where the rank is locally constant and, unless the mode
        is ``"rmse"``, the eigenvalue ``σ`` is simple.

    Raises:
        ValueError: not a Gramian (shape, NaN, asymmetry), a wrong preference, or another mode.
    """
    _scale_mode("scale_mode", scale_mode)
    small = easy(gramian) if is_fixed(pref_vector) else None
    if small is not None:
        own = preference_array(pref_vector, gramian)
        return finish(aligned(small, own, scale_mode, torch.finfo(gramian.dtype).eps), gramian)
    matrix, restore = prepare(gramian)
    if not matrix.numel():
        return nothing(matrix, restore, False)
    weights = flat_preference(pref_vector, matrix, gramian)
    values, vectors = opaque(lambda stack: tuple(torch.linalg.eigh(stack)), matrix)
    tolerance = values[..., -1:] * matrix.shape[-1] * torch.finfo(gramian.dtype).eps
    kept = values > tolerance.clamp(min=0)
    rank = kept.sum(-1, keepdim=True)
    # eigh's own derivative divides by differences of eigenvalues, which here need not be simple
    moving = torch.einsum("...ji,...jk,...ki->...i", vectors, matrix, vectors)
    if scale_mode == "rmse":
        scale = (moving * kept).sum(-1, keepdim=True) / rank.clamp(min=1)
    else:
        above = rank if scale_mode == "min" else rank - (rank - 1) // 2
        scale = moving.gather(-1, (matrix.shape[-1] - above).clamp(max=matrix.shape[-1] - 1))
    root = _InverseRoot.apply(matrix, values, vectors, kept)
    result = scale.clamp(min=0).sqrt() * (root @ weights.unsqueeze(-1)).squeeze(-1)
    return restore(torch.where(rank > 0, result, weights))


class _InverseRoot(torch.autograd.Function):
    """``(G⁺)^(1/2)`` from the eigendecomposition, with the derivative of a matrix function.

    Higham (2008), "Functions of Matrices", Theorem 3.9 (Daleckii-Krein): in the eigenbasis, the
    derivative multiplies by the divided differences of ``λ^(-1/2)``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, values: Tensor, vectors: Tensor, kept: Tensor) -> Tensor:
        inverse = kept * torch.where(kept, values, 1).rsqrt()
        return (vectors * inverse.unsqueeze(-2)) @ vectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return _Derivative.apply(cotangent, *ctx.saved_tensors), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        return _Derivative.apply(tangent, *ctx.saved_tensors)


class _Derivative(torch.autograd.Function):
    """The derivative of ``(G⁺)^(1/2)`` in a direction, which is its own adjoint; only the first."""

    generate_vmap_rule = True

    @staticmethod
    def forward(change: Tensor, values: Tensor, vectors: Tensor, kept: Tensor) -> Tensor:
        root = torch.where(kept, values, 1).sqrt()
        left, right = root.unsqueeze(-1), root.unsqueeze(-2)
        both = -1 / (left * right * (left + right))
        one = 1 / torch.where(kept.unsqueeze(-1), left, right) ** 3
        first, second = kept.unsqueeze(-1), kept.unsqueeze(-2)
        factor = torch.where(first & second, both, torch.where(first | second, one, 0))
        return vectors @ (factor * (vectors.mT @ change @ vectors)) @ vectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        raise NotImplementedError("Aligned-MTL's weights have first derivatives only.")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError("Aligned-MTL's weights have first derivatives only.")


class AlignedMTLWeighting(Weighting):
    """:func:`aligned_mtl` as an object.

    Args:
        pref_vector: ``p``, of the objectives' shape; ``1 / m`` each by default.
        scale_mode: see :func:`aligned_mtl`.
    """

    _options: ClassVar = {"pref_vector": optional(vector), "scale_mode": _scale_mode}

    def __init__(self, pref_vector: Tensor | None = None, scale_mode: ScaleMode = "min") -> None:
        super().__init__()
        self.pref_vector, self.scale_mode = pref_vector, scale_mode

    def forward(self, gramian: Tensor, /) -> Tensor:
        """Weights of the objectives, of their shape."""
        return aligned_mtl(gramian, self.pref_vector, self.scale_mode)
