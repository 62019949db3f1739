"""Compares gradients: sketches that are stored, or exactly, a few queries with a whole dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from gramjd.contraction import ranges
from gramjd.datasets.progress import batches_of
from gramjd.datasets.store import GradientStore
from gramjd.errors import NotFiniteError
from gramjd.jacobian import Jacobian
from gramjd.pytree import PyTree

_TILE = 2**22  # scores that are computed at once


class TopK(NamedTuple):
    """The largest scores of each query, in descending order, and where they are in the dataset."""

    values: Tensor
    indices: Tensor


# fmt: off
@overload
def similarity(
    left: Any, right: Any, *, cosine: bool = ..., topk: None = None, damping: float | None = ...,
) -> Tensor: ...
@overload
def similarity(
    left: Any, right: Any, *, cosine: bool = ..., topk: int, damping: float | None = ...,
) -> TopK: ...
# fmt: on


def similarity(
    left: Any, right: Any, *, cosine: bool = False, topk: int | None = None, damping: float | None = None
) -> Tensor | TopK:
    """Inner products of the rows of two stores or matrices, some at a time.

    Args:
        left, right: stores of one output for each sample that share their projection, or arrays or tensors
            of rows, ``[m, dim]`` and ``[n, dim]``, such as a store's ``sketches``; half precision is
            multiplied in float32.
        cosine: return cosines of the angles between the rows. A row of zeros has cosine 0.
        topk: return only so many largest scores for each row of ``left``. The order of equal scores is not
            defined.
        damping: ``λ > 0``: return ``L Rᵀ (R Rᵀ + λI)⁻¹`` in place of ``L Rᵀ``, the influence of samples as in
            :func:`gramjd.influence`, from sketches (TRAK, Park et al., arXiv 2303.14186). It factorizes
            ``RᵀR + λI``, ``[dim, dim]``, in float64.

    Returns:
        ``[m, n]`` on the CPU; with ``topk``, values and indices ``[m, topk]``.

    Raises:
        TypeError: rows are not of floating-point numbers.
        ValueError: rows differ in length; stores differ in dim, seed, kind or parameters; there are fewer
            rows than ``topk``; the damping is not positive, or given with ``cosine``; an array is the file
            of a store in float16, mapped into memory: without its scales.
        NotFiniteError: a score is NaN or infinite.
    """
    _check_projections(left, right)
    first, second = _Rows(left, "left"), _Rows(right, "right")
    if first.dim != second.dim:
        raise ValueError(f"Rows of left have {first.dim} entries, those of right {second.dim}.")
    step = max(1, int(_TILE**0.5))
    wide = torch.promote_types(first.dtype, second.dtype)
    factor = None if damping is None else _damped(second, damping, cosine, step)
    found = []
    for start, stop in ranges(len(first), step):
        mine = _unit(first.rows(start, stop).to(wide), cosine)
        if factor is not None:
            mine = torch.cholesky_solve(mine.double().mT, factor).mT.to(wide)

        def tiles(mine: Tensor = mine) -> Iterator[Tensor]:
            for begin, end in ranges(len(second), step):
                yield mine @ _unit(second.rows(begin, end).to(wide), cosine).mT

        found.append(collected(tiles(), topk))
    if topk is None:
        return torch.cat([part for part in found if isinstance(part, Tensor)])
    best = [part for part in found if isinstance(part, TopK)]
    return TopK(torch.cat([b.values for b in best]), torch.cat([b.indices for b in best]))


# fmt: off
@overload
def dataset_similarity(
    queries: Jacobian, jacobian: Callable[[PyTree], Jacobian], loader: Iterable[PyTree], *,
    cosine: bool = ..., topk: None = None, progress: bool = ...,
) -> Tensor: ...
@overload
def dataset_similarity(
    queries: Jacobian, jacobian: Callable[[PyTree], Jacobian], loader: Iterable[PyTree], *,
    cosine: bool = ..., topk: int, progress: bool = ...,
) -> TopK: ...
# fmt: on


def dataset_similarity(
    queries: Jacobian,
    jacobian: Callable[[PyTree], Jacobian],
    loader: Iterable[PyTree],
    *,
    cosine: bool = False,
    topk: int | None = None,
    progress: bool = True,
) -> Tensor | TopK:
    """Exact inner products of the gradients of a few queries with those of a dataset, in one pass over it.

    The Jacobian of the queries is kept in factors, and crossed with that of each batch.

    Args:
        queries: the Jacobian of one tensor of losses, of any shape ``Q``: of some samples, or of a mean.
        jacobian: from a batch to its Jacobian, of one loss for each sample, as in
            :func:`gramjd.gradients_dataset`.
        loader: an iterable of batches.
        cosine: return cosines of the angles between gradients. A zero gradient has cosine 0.
        topk: return only so many largest scores for each query.
        progress: show a bar after two seconds, if tqdm is installed.

    Returns:
        ``[*Q, N]`` on the CPU; with ``topk``, values and indices ``[*Q, topk]``.

    Raises:
        ValueError: the Jacobians are of different parameters or of outputs of other shapes; the dataset has
            no samples, or fewer than ``topk``.
        NotFiniteError: a score is NaN or infinite.
    """
    batches = batches_of(loader, progress, "similarity")
    return collected(_crossed([queries], [jacobian], batches, [1.0], cosine), topk)


# fmt: off
@overload
def tracin(
    queries: Sequence[Jacobian], jacobians: Sequence[Callable[[PyTree], Jacobian]],
    loader: Iterable[PyTree], rates: Sequence[float], *, topk: None = None, progress: bool = ...,
) -> Tensor: ...
@overload
def tracin(
    queries: Sequence[Jacobian], jacobians: Sequence[Callable[[PyTree], Jacobian]],
    loader: Iterable[PyTree], rates: Sequence[float], *, topk: int, progress: bool = ...,
) -> TopK: ...
# fmt: on


def tracin(
    queries: Sequence[Jacobian],
    jacobians: Sequence[Callable[[PyTree], Jacobian]],
    loader: Iterable[PyTree],
    rates: Sequence[float],
    *,
    topk: int | None = None,
    progress: bool = True,
) -> Tensor | TopK:
    """Influence of training samples by TracInCP (Pruthi et al., arXiv 2002.08484), in one pass over them.

    ``Σ_c rate_c ⟨∇ℓ(query; θ_c), ∇ℓ(sample; θ_c)⟩`` over checkpoints ``θ_c``, exactly.

    Args:
        queries: the Jacobian of the same losses at each checkpoint.
        jacobians: for each checkpoint, from a batch to its Jacobian there:
            ``[lambda batch, p=p: jac(p, *batch) for p in checkpoints]``.
        loader: an iterable of batches.
        rates: the learning rate at each checkpoint.
        topk, progress: as in :func:`gramjd.dataset_similarity`.

    Returns:
        ``[*Q, N]`` on the CPU; with ``topk``, values and indices ``[*Q, topk]``.

    Raises:
        ValueError: as :func:`gramjd.dataset_similarity`; there is no checkpoint, or the numbers of queries,
            functions and rates differ.
        NotFiniteError: a score is NaN or infinite.
    """
    if not queries or not len(queries) == len(jacobians) == len(rates):
        raise ValueError(
            f"tracin needs as many queries, jacobians and rates as checkpoints: got {len(queries)}, "
            f"{len(jacobians)} and {len(rates)}."
        )
    batches = batches_of(loader, progress, "TracIn")
    return collected(_crossed(queries, jacobians, batches, rates, False), topk)


def _crossed(queries: Sequence[Jacobian], jacobians: Sequence[Callable[[PyTree], Jacobian]],
             loader: Iterable[PyTree], rates: Sequence[float], cosine: bool) -> Iterator[Tensor]:  # fmt: skip
    """Scores ``[*Q, n]`` of each batch."""
    for query in queries:
        if len(query.outputs.each) > 1:
            raise ValueError(f"The queries must be one tensor of losses, got {query!r}.")
    norms = [query.norms() for query in queries] if cosine else []
    for batch in loader:
        total: Tensor | None = None
        for n, (query, jacobian, rate) in enumerate(zip(queries, jacobians, rates, strict=True)):
            jac = one_loss(jacobian(batch))
            with torch.no_grad():
                scores = rate * query.cross(jac).detach()
                if cosine:
                    scores = divided(scores, norms[n][..., None].detach() * jac.norms().detach())
            total = scores if total is None else total + scores
        assert total is not None
        yield total.cpu()


def one_loss(jac: Jacobian) -> Jacobian:
    """Raise for a Jacobian of something else than one loss for each sample."""
    if not isinstance(jac, Jacobian) or [len(out.shape) for out in jac.outputs.each] != [1]:
        raise ValueError(f"jacobian must give the Jacobian of one loss for each sample, got {jac!r}.")
    return jac


def divided(scores: Tensor, norms: Tensor) -> Tensor:
    """Zero where a norm is zero."""
    return torch.where(norms == 0, 0, scores / torch.where(norms == 0, 1, norms))


def collected(tiles: Iterable[Tensor], topk: int | None) -> Tensor | TopK:
    """Scores ``[*Q, n]`` side by side, or the best of them, of which no more than a tile is kept."""
    if topk is not None and (type(topk) is not int or topk < 1):
        raise ValueError(f"topk must be a positive integer, not {topk!r}.")
    kept: list[Tensor] = []
    best: TopK | None = None
    start = 0
    for scores in tiles:
        if not bool(torch.isfinite(scores).all()):
            bad = int((~torch.isfinite(scores)).flatten(0, -2).any(0).nonzero()[0]) if scores.ndim > 1 else 0
            raise NotFiniteError(f"A score is NaN or infinite, of sample {start + bad} or of a query.")
        if topk is None:
            kept.append(scores)
        else:
            best = _better(best, scores, start, topk)
        start += scores.shape[-1]
    if topk is None and kept:
        return torch.cat(kept, -1)
    if best is None or topk is None:
        raise ValueError("The dataset has no samples.")
    if best.values.shape[-1] < topk:
        raise ValueError(f"topk={topk} of {start} samples: ask for fewer.")
    return best


def _better(best: TopK | None, scores: Tensor, start: int, k: int) -> TopK:
    """The best of what there was and of new scores."""
    values, places = scores.topk(min(k, scores.shape[-1]), -1)
    places = places + start
    if best is None:
        return TopK(values, places)
    values, places = torch.cat([best.values, values], -1), torch.cat([best.indices, places], -1)
    values, order = values.topk(min(k, values.shape[-1]), -1)
    return TopK(values, places.gather(-1, order))


class _Rows:
    """Rows of a store, an array or a tensor, in float32 or float64."""

    def __init__(self, given: Any, name: str) -> None:
        _refuse_undecoded(given, name)
        self.given = given
        shape = tuple(given.sketches.shape if isinstance(given, GradientStore) else given.shape)
        if len(shape) != 2:
            raise ValueError(f"{name} must be rows of numbers, [n, dim], got the shape {list(shape)}.")
        self.length, self.dim = shape
        self.dtype = self.rows(0, 0).dtype

    def __len__(self) -> int:
        return self.length

    def rows(self, start: int, stop: int) -> Tensor:
        if isinstance(self.given, GradientStore):
            return self.given.rows(start, stop)
        some = self.given[start:stop]
        if not (some.is_floating_point() if isinstance(some, Tensor) else some.dtype.kind == "f"):
            raise TypeError(
                f"Rows must be floating-point numbers, not {some.dtype}. Of a store in bfloat16, whose file "
                "holds bits, pass the store itself, or its sketches."
            )
        found = some.detach().cpu() if isinstance(some, Tensor) else torch.from_numpy(some.copy())
        return found if found.dtype == torch.float64 else found.float()


def _refuse_undecoded(given: Any, name: str) -> None:
    """Raise for a mapped file of a store in float16, which lacks the scales of its rows."""
    file = Path(getattr(given, "filename", None) or "")
    if isinstance(given, Tensor) or file.name != "sketches.npy" or not (file.parent / "scales.npy").exists():
        return
    raise ValueError(
        f"{name} is the file of a store in float16, which lacks a factor for each row: pass the store "
        f"itself, gramjd.GradientStore.open({str(file.parent)!r}), or its sketches."
    )


def _damped(rows: _Rows, damping: float, cosine: bool, step: int) -> Tensor:
    """The Cholesky factor of ``RᵀR + λI``."""
    if not (isfinite(damping) and damping > 0) or cosine:
        raise ValueError(f"damping must be positive, and without cosine; got {damping!r}.")
    total = damping * torch.eye(rows.dim, dtype=torch.float64)
    for start, stop in ranges(len(rows), step):
        some = rows.rows(start, stop).double()
        total = total + some.mT @ some
    if not bool(torch.isfinite(total).all()):
        raise NotFiniteError("A row of right is NaN or infinite.")
    return torch.linalg.cholesky(total)


def _unit(rows: Tensor, wanted: bool) -> Tensor:
    return divided(rows, rows.norm(dim=-1, keepdim=True).expand_as(rows)) if wanted else rows


def _check_projections(left: Any, right: Any) -> None:
    """Raise for stores whose sketches have nothing to do with each other."""
    if isinstance(left, GradientStore) and isinstance(right, GradientStore):
        keys = ("projection", "shapes of parameters")
        differ = [key for key in keys if left.settings[key] != right.settings[key]]
        if differ:
            raise ValueError(
                f"{left!r} and {right!r} differ in {' and '.join(differ)}: their sketches have "
                "nothing to do with each other."
            )
