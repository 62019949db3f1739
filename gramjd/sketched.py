"""``S Sᵀ``: a Gramian known by a sketch of its rows, whose memory does not grow with their square."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SketchedGramian:
    """The Gramian ``S Sᵀ`` of a sketch ``S = J Ω``, which is never formed.

    Made by ``J.gramian(sketch=dim)``, or of rows of your own. :func:`gramjd.weighting.upgrad`,
    :func:`~gramjd.weighting.dualproj`, :func:`~gramjd.weighting.mgda` and :func:`~gramjd.weighting.cagrad`
    take it in place of a Gramian.

    Attributes:
        sketch: ``[*shape, dim]``, for objectives of this shape; detached.
        error: at most this is the standard deviation of an entry ``(x, y)`` of ``S Sᵀ``, relative to
            ``‖x‖ ‖y‖`` of the rows themselves; on average over seeds it is ``⟨x, y⟩``. ``None`` if unknown.

    Raises:
        TypeError: the sketch is not a tensor of real floating-point numbers.
        ValueError: it has a graph, or is a scalar.
    """

    sketch: Tensor
    error: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.sketch, Tensor) or not self.sketch.is_floating_point():
            got = self.sketch.dtype if isinstance(self.sketch, Tensor) else type(self.sketch).__name__
            raise TypeError(f"A sketch is a real floating-point tensor; got {got}.")
        if self.sketch.ndim < 1:
            raise ValueError("A sketch has the shape [*shape, dim]; got a scalar.")
        if self.sketch.requires_grad:
            raise ValueError(
                "The sketch requires a gradient, but weights of a sketched Gramian are constants: pass "
                "sketch.detach(), or form the Gramian, sketch @ sketch.mT."
            )

    @property
    def dim(self) -> int:
        """Columns of the sketch."""
        return self.sketch.shape[-1]

    @property
    def objectives(self) -> torch.Size:
        """The objectives' shape."""
        return self.sketch.shape[:-1]

    @property
    def shape(self) -> torch.Size:
        """``[*shape, *reversed(shape)]``."""
        return self.objectives + self.objectives[::-1]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.sketch.dtype

    @property
    def device(self) -> torch.device:
        return self.sketch.device

    def __repr__(self) -> str:
        error = "unknown" if self.error is None else f"{self.error:.2g}"
        return f"SketchedGramian(shape={list(self.shape)}, dim={self.dim}, error={error}, dtype={self.dtype})"

    def __matmul__(self, w: Tensor) -> Tensor:
        """``G w`` for weights of the objectives' shape, or ``[*shape, n]`` for several of them.

        Raises:
            ValueError: they have another shape.
        """
        objectives = self.objectives
        if w.shape[: len(objectives)] != objectives or w.ndim > len(objectives) + 1:
            raise ValueError(
                f"A Gramian of objectives of shape {list(objectives)} has products with weights of this "
                f"shape, or of several of them along one more dimension; got {list(w.shape)}."
            )
        rows = self.sketch.reshape(-1, self.dim)
        return (rows @ (rows.mT @ w.reshape(len(rows), -1))).reshape(w.shape)

    def diagonal(self) -> Tensor:
        """Squared norms of the rows of the sketch, of the objectives' shape."""
        return self.sketch.square().sum(-1)

    def dense(self) -> Tensor:
        """``S Sᵀ`` itself, ``[*shape, *reversed(shape)]``, for few objectives."""
        rows = self.sketch.reshape(-1, self.dim)
        gramian = (rows @ rows.mT).reshape(self.objectives + self.objectives)
        n = len(self.objectives)
        return gramian.permute([*range(n), *reversed(range(n, 2 * n))])

    def flatten(self) -> SketchedGramian:
        """Return the Gramian of ``m`` flat objectives, in the order of ``losses.flatten()``."""
        return SketchedGramian(self.sketch.reshape(prod(self.objectives), self.dim), self.error)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
           ) -> SketchedGramian:  # fmt: skip
        """Return this Gramian on another device or in another dtype."""
        return SketchedGramian(self.sketch.to(device=device, dtype=dtype), self.error)
