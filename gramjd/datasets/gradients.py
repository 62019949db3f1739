"""Sketches and norms of the gradients of a whole dataset, in files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence, Sized
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gramjd.datasets.batches import REMEDY, check_loader, digest
from gramjd.datasets.progress import progress_bar
from gramjd.datasets.shards import shard_folder
from gramjd.datasets.store import GradientStore, Writer, new_folder, storable
from gramjd.errors import NotFiniteError
from gramjd.internals import version_of
from gramjd.jacobian import Jacobian
from gramjd.jacobian.projection import Projection
from gramjd.pytree import PyTree

_CLOSE = 1e-2  # relative difference of norms computed twice, in any precision and on any device


def gradients_dataset(
    jacobian: Callable[[PyTree], Jacobian],
    loader: Iterable[PyTree],
    path: str | os.PathLike[str],
    dim: int,
    *,
    seed: int = 0,
    kind: str = "rademacher",
    dtype: torch.dtype = torch.float32,
    ids: Callable[[PyTree], Sequence[int] | Tensor] | None = None,
    shard: tuple[int, int] | None = None,
    progress: bool = True,
) -> GradientStore:
    """Sketches and norms of the gradients of all samples of a dataset, in a folder of ``.npy`` files.

    It reads the loader once; memory holds the factors of one batch. After an interruption, even ``kill -9``,
    the same call continues with the batch where it stopped. The files are then the same as without the
    interruption. If the loader has more batches than before, the call appends the new ones. Batches that are
    stored are read and compared, but not computed again.

    Args:
        jacobian: a function from a batch of the loader to its Jacobian, such as
            ``lambda batch: jac(params, *batch)`` with ``jac = gramjd.jacobian(func)``, or
            ``lambda batch: engine.jacobian(criterion(model(batch[0]), batch[1]))``. It moves the batch to a
            device, if needed. The parameters must not change between batches.
        loader: a ``DataLoader`` that does not shuffle, a list, or any other iterable of batches that gives
            the same ones in every pass.
        path: a folder; it is created if it does not exist. Only one process may use it at a time, unless
            ``shard`` is given.
        dim, seed, kind: as in :meth:`gramjd.Jacobian.sketch`.
        dtype: the dtype of the stored sketches: float32, float64, bfloat16, or float16 with a power of two
            for each row.
        ids: a function from a batch to an integer for each sample; by default its position in the dataset.
        shard: ``(rank, ranks)``, for several processes at once. Each calls this function with the same path
            and its own part of the dataset. :meth:`gramjd.GradientStore.open` joins the parts in order of
            ranks.
        progress: show a bar after two seconds, if tqdm is installed.

    Returns:
        The store, open for reading; with ``shard``, the samples of this rank.

    Raises:
        ValueError: the loader is empty, shuffles, or gives other batches than those in the store; the store
            is of other parameters, another function or other options; the parameters changed on the way;
            outputs have no batch dimension, or another shape per sample than those before; ``shard`` is not
            ``(rank, ranks)``.
        NotFiniteError: gradients are NaN or infinite. Batches before them are kept.
        TypeError: the loader can be read only once; ``jacobian`` gives no Jacobian; ids are no integers.
        FileExistsError: there is something else at ``path``.
        FileNotFoundError: the folder that ``path`` is in does not exist.

    Examples:
        >>> func, params = gramjd.functional_loss(model, nn.CrossEntropyLoss(reduction="none"))
        >>> jac = gramjd.jacobian(func)
        >>> store = gramjd.gradients_dataset(lambda batch: jac(params, *batch), loader, "gradients", 1024)
        >>> scores, which = gramjd.similarity(queries, store, cosine=True, topk=5)
    """
    projection, dtype, folder = (
        Projection(dim, seed, kind),
        storable(dtype),
        new_folder(path, shard is not None),
    )
    if shard is not None:
        whole, folder = folder, shard_folder(folder, shard)
        if whole.exists():
            new_folder(folder)
    check_loader(loader, "loader")
    gradients = _Gradients(jacobian, projection, ids, dtype)
    writer: Writer | None = None
    with ExitStack() as stack:
        total = len(loader) if isinstance(loader, Sized) else None
        bar = stack.enter_context(progress_bar(progress, "gradients", "batch", total))
        for number, batch in enumerate(loader):
            mark = digest(batch)
            if writer is None:
                first = gradients.of(batch, number)
                settings = {**first.settings, "stored in": str(dtype).removeprefix("torch.")}
                if shard is not None:
                    whole.mkdir(exist_ok=True)
                writer = Writer.open(folder, first.per_sample, dim, dtype, first.norms.dtype, settings)
                stack.enter_context(closing(writer))
                known = len(writer.done)
                if known:
                    first.check_function(folder)
            if number < known:
                if writer.done[number][1] != mark:
                    raise ValueError(f"Batch {number} of the loader is not the one in {folder}. {REMEDY}")
            else:
                found = first if number == 0 else gradients.of(batch, number)
                writer.add(mark, found.ids_from(writer.samples), found.norms, found.sketches)
            bar.update(1)
        if writer is None:
            raise ValueError("The loader gave no batch.")
        if len(writer.done) > number + 1:
            raise ValueError(
                f"The loader gave {number + 1} batches, and {folder} has {len(writer.done)} of it. {REMEDY}"
            )
    return GradientStore.open(folder)


@dataclass
class _Found:
    """The stored numbers of one batch, and a description of the function."""

    settings: dict[str, Any]
    ids: Tensor | None
    norms: Tensor  # [n, *S]
    sketches: Tensor  # [n, *S, dim]

    @property
    def per_sample(self) -> list[int]:
        return list(self.norms.shape[1:])

    def ids_from(self, start: int) -> Tensor:
        return torch.arange(start, start + len(self.norms)) if self.ids is None else self.ids

    def check_function(self, folder: Any) -> None:
        """Raise unless the gradients of the first batch are those that are stored."""
        old = torch.from_numpy(GradientStore.open(folder).norms[: len(self.norms)].copy())
        new = self.norms.cpu()
        if old.shape != new.shape or float((old - new).norm()) > _CLOSE * float(old.norm()):
            raise ValueError(
                f"{folder} holds gradients of another function: norms of the first batch differ. Choose "
                "another path, or delete it to start anew."
            )


@dataclass
class _Gradients:
    """Computes what is stored of a batch."""

    jacobian: Callable[[PyTree], Jacobian]
    projection: Projection
    ids: Callable[[PyTree], Sequence[int] | Tensor] | None
    dtype: torch.dtype
    first: dict[str, Any] | None = None
    seen: list[tuple[int, int]] | None = None  # which parameters, and how often written

    def of(self, batch: PyTree, number: int) -> _Found:
        jac = self.jacobian(batch)
        if not isinstance(jac, Jacobian):
            raise TypeError(f"jacobian must return a gramjd.Jacobian, not a {type(jac).__name__}.")
        settings = self._settings(jac, number)
        with torch.no_grad():
            p, axis = self.projection, jac.outputs.each[0].batch_dim
            assert axis is not None  # the settings see to it
            sketches = jac.sketch(p.dim, seed=p.seed, kind=p.kind).movedim(axis, 0)
            if self.dtype != torch.float16:  # to that, they are scaled
                sketches = sketches.to(self.dtype)
            norms = jac.norms().movedim(axis, 0)
        for what in (norms, sketches):
            if not bool(torch.isfinite(what).all()):
                raise NotFiniteError(
                    f"Gradients of batch {number} are NaN or infinite. Clean or scale its data: the same "
                    "call goes on from there."
                )
        ids = None if self.ids is None else _integers(self.ids(batch), len(norms), number)
        return _Found(settings, ids, norms.detach(), sketches.detach())

    def _settings(self, jac: Jacobian, number: int) -> dict[str, Any]:
        """The fingerprint; that of the first batch, or an error."""
        seen = [(id(p), version_of(p)) for p in jac.parameters]
        if self.first is not None and seen == self.seen and self._shape(jac, number) == self.first["shape"]:
            return self.first
        found = {
            "projection": self.projection.fingerprint,
            "shape": self._shape(jac, number),
            "shapes of parameters": {
                n: list(q.shape) for n, q in zip(jac.names, jac.parameters, strict=True)
            },
            "parameters": digest([p.detach() for p in jac.parameters]),
            "dtype": str(jac.dtype),
            "ids": self.ids is not None,
        }
        self.first, self.seen = self.first or found, seen
        differ = [key for key, value in found.items() if self.first[key] != value]
        if differ:
            raise ValueError(
                f"In batch {number} of the loader, {', '.join(differ)} of the Jacobian is not as in batch 0. "
                "All samples of a store must be of one function at fixed parameters."
            )
        return self.first

    @staticmethod
    def _shape(jac: Jacobian, number: int) -> list[int]:
        """The shape of the output for one sample."""
        out = jac.outputs.each[0]
        if len(jac.outputs.each) > 1 or out.batch_dim is None:
            raise ValueError(f"The Jacobian of batch {number} must be of one tensor with a batch dimension.")
        return [n for d, n in enumerate(out.shape) if d != out.batch_dim]


def _integers(given: Sequence[int] | Tensor, samples: int, number: int) -> Tensor:
    found = torch.as_tensor(given)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise TypeError(f"ids of batch {number} must be integers, not {found.dtype}.")
    if found.shape != (samples,):
        raise ValueError(f"ids of batch {number} must be {samples}, got a shape of {list(found.shape)}.")
    return found.to("cpu", torch.int64)
