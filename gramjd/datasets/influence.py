"""Influence of the samples of a dataset by their damped kernel, without forming it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import isfinite
from typing import Any, overload

import torch
from torch import Tensor

from gramjd.datasets.batches import check_loader
from gramjd.datasets.progress import progress_bar
from gramjd.datasets.similarity import TopK, collected, one_loss
from gramjd.errors import NotFiniteError
from gramjd.jacobian import Jacobian
from gramjd.jacobian.lazy import check_parameters
from gramjd.pytree import PyTree
from gramjd.weighting import NotConvergedError


# fmt: off
@overload
def influence(
    queries: Jacobian, jacobian: Callable[[PyTree], Jacobian], loader: Iterable[PyTree], damping: float, *,
    tol: float = ..., max_passes: int = ..., topk: None = None, progress: bool = ...,
) -> Tensor: ...
@overload
def influence(
    queries: Jacobian, jacobian: Callable[[PyTree], Jacobian], loader: Iterable[PyTree], damping: float, *,
    tol: float = ..., max_passes: int = ..., topk: int, progress: bool = ...,
) -> TopK: ...
# fmt: on


def influence(
    queries: Jacobian,
    jacobian: Callable[[PyTree], Jacobian],
    loader: Iterable[PyTree],
    damping: float,
    *,
    tol: float = 1e-5,
    max_passes: int = 100,
    topk: int | None = None,
    progress: bool = True,
) -> Tensor | TopK:
    """``(G + λI)⁻¹ v`` of the kernel ``G = J Jᵀ`` of a whole dataset, for ``v = J g`` of queries' gradients.

    It tells how much each training sample matters for each query, without what many samples have in common.
    These are the dual weights of kernel regression with ridge ``λ``; for losses, they are influence functions
    with the damped empirical Fisher matrix (Koh and Liang, arXiv 1703.04730). Because
    ``(G + λI)⁻¹ J = J (JᵀJ + λI)⁻¹``, conjugate gradients run in the space of the parameters, for all queries
    at once. Each iteration is one pass over the dataset. Memory holds the factors of one batch and five
    gradients for each query.

    Args:
        queries: the Jacobian of one tensor of losses, of any shape ``Q``.
        jacobian: from a batch to its Jacobian, of one loss for each sample, as in
            :func:`gramjd.gradients_dataset`. To keep all factors, let it look them up.
        loader: an iterable that gives the same batches in every pass.
        damping: ``λ``, positive. The larger it is beside the eigenvalues of ``G``, the fewer passes it takes.
        tol: norm of the residual ``g - (JᵀJ + λI) u`` of each query, relative to that of ``g``, that the
            result is proved to be within; by the products of the last pass, not by a recurrence.
        max_passes: over the dataset, at most.
        topk: return only so many largest entries for each query.
        progress: show a bar that counts passes, after two seconds, if tqdm is installed.

    Returns:
        ``[*Q, N]`` on the CPU; with ``topk``, values and indices ``[*Q, topk]``.

    Raises:
        ValueError: the damping or another number is out of range; the Jacobians are of different parameters
            or of outputs of other shapes; the loader shuffles, or gives other numbers of samples in another
            pass; there are fewer samples than ``topk``.
        TypeError: the loader can be read only once.
        NotConvergedError: the residual is larger after ``max_passes``.
        NotFiniteError: a product is NaN or infinite.
    """
    if not (isfinite(damping) and damping > 0):
        raise ValueError(f"damping must be positive and finite, not {damping!r}.")
    if not 0 < tol < 1 or type(max_passes) is not int or max_passes < 1:
        raise ValueError(f"tol must be in (0, 1) and max_passes positive, not {tol!r} and {max_passes!r}.")
    if len(queries.outputs.each) > 1:
        raise ValueError(f"The queries must be one tensor of losses, got {queries!r}.")
    check_loader(loader, "loader")
    units = torch.eye(queries.shape[0], dtype=queries.dtype, device=queries.parameters[0].device)
    with torch.no_grad():
        gradients = queries.T @ units
    with progress_bar(progress, "influence", "pass", None) as bar:
        kernel = _Kernel(queries, jacobian, loader, damping, bar)
        scores = _solved(kernel, gradients.detach(), tol, max_passes)  # [N, rows]
    return collected([scores.mT.cpu().reshape(*queries.outputs.each[0].shape, -1)], topk)


class _Kernel:
    """Products with ``J`` and ``JᵀJ + λI`` of a dataset."""

    def __init__(self, queries: Jacobian, jacobian: Callable[[PyTree], Jacobian],
                 loader: Iterable[PyTree], damping: float, bar: Any) -> None:  # fmt: skip
        self.queries, self.jacobian, self.loader, self.damping = queries, jacobian, loader, damping
        self.bar = bar
        self.sizes: list[int] | None = None
        self.passes = 0

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """``(JᵀJ + λI) u`` for ``u [P, n]``, and ``J u [N, n]``, in one pass."""
        total, outputs = self.damping * u, []
        for batch in self.loader:
            jac = one_loss(self.jacobian(batch))
            check_parameters(self.queries, jac)
            with torch.no_grad():  # but not for the function, which may need a graph
                out = (jac @ u).detach()
                total = total + (jac.T @ out).detach()
            outputs.append(out)
        sizes = list(map(len, outputs))
        if not sizes:
            raise ValueError("The dataset has no samples.")
        self.sizes = self.sizes or sizes
        if sizes != self.sizes:
            raise ValueError("The loader gave batches of other sizes than in its first pass.")
        if not bool(torch.isfinite(total).all()):
            raise NotFiniteError("A product with the gradients of the dataset is NaN or infinite.")
        self.passes += 1
        self.bar.update(1)
        return total, torch.cat(outputs)


def _solved(kernel: _Kernel, gradients: Tensor, tol: float, passes: int) -> Tensor:
    """``J u`` for ``(JᵀJ + λI) u = g``, by conjugate gradients, started anew from true residuals."""
    sizes = gradients.norm(dim=0)
    wanted = tol * sizes
    u, left = torch.zeros_like(gradients), gradients
    while True:
        budget = passes - kernel.passes - 1  # the last pass tells what is left
        u = u + _conjugate_gradients(kernel, left, wanted / 2, budget)
        image, outputs = kernel(u)
        left = gradients - image
        if bool((left.norm(dim=0) <= wanted).all()):
            return outputs
        if kernel.passes >= passes:
            worst = float((left.norm(dim=0) / sizes.clamp(min=torch.finfo(sizes.dtype).tiny)).max())
            raise NotConvergedError(
                f"After {passes} passes over the dataset the residual is {worst:.1e}; wanted: {tol:.0e}. "
                "Raise damping, max_passes or tol, or use float64."
            )


def _conjugate_gradients(kernel: _Kernel, target: Tensor, wanted: Tensor, passes: int) -> Tensor:
    """Solve for all columns ``[P, n]`` together; a column stops when its residual is small enough."""
    u, residual, direction = torch.zeros_like(target), target, target
    square = residual.square().sum(0)
    for _ in range(passes):
        active = square.sqrt() > wanted
        if not bool(active.any()):
            break
        image, _ = kernel(direction)
        curvature = (direction * image).sum(0)
        length = torch.where(active, square / torch.where(curvature > 0, curvature, 1), 0)
        u, residual = u + length * direction, residual - length * image
        following = residual.square().sum(0)
        ratio = torch.where(active, following / torch.where(square > 0, square, 1), 0)
        direction = residual + ratio * direction
        square = torch.where(active, following, square)
    return u
