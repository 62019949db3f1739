"""The empirical NTK over whole datasets: tile by tile, in memory or in a file, resumable."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gramjd import pytree
from gramjd.batches import Batches, digest
from gramjd.jacobian import Jacobian
from gramjd.journal import InMemory, Journal, Tile, checked
from gramjd.ntk import Axes, check_finite, jacobian_of, output_shape
from gramjd.pytree import PyTree
from gramjd.transforms import jacobian


@torch.no_grad()
def ntk_dataset(
    func: Callable[..., Tensor],
    params: PyTree,
    loader1: Iterable[PyTree],
    loader2: Iterable[PyTree] | None = None,
    in_dims: PyTree = 0,
    *,
    trace_axes: Sequence[int] = (),
    diagonal_axes: Sequence[int] = (),
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
    chunk_size: int | None = None,
) -> Tensor:
    """The empirical neural tangent kernel over whole datasets, one pair of batches (a *tile*) at a time.

    Beside the result, memory holds the factors of one pair of batches, however large the datasets: the
    Jacobians of ``loader2``'s batches are found again for every batch of ``loader1``. Larger batches take
    more memory and less time.

    Args:
        func: a pure function of one sample, ``func(params, x) -> output``, as in :func:`gramjd.ntk`.
        params: a PyTree of tensors. Batches are moved to its device.
        loader1: a ``DataLoader`` that does not shuffle, a list, or any other iterable of batches of any
            sizes that gives the same ones in every pass. They reach ``func`` in the structure that they
            have; to leave out labels: ``lambda params, batch: func(params, batch[0])``.
        loader2: of the second argument; without it the kernel is that of ``loader1`` with itself: exactly
            symmetric, with each tile below the diagonal the mirror of one above it.
        in_dims, chunk_size: as in :func:`gramjd.ntk`.
        trace_axes, diagonal_axes: as in :func:`gramjd.ntk`, but not of the axis of the samples.
        out: path of a ``.npy`` file for the result (needs numpy). After an interruption, the same call
            computes the tiles that are missing. A small file beside it, ``out + ".journal"``, says which
            tiles are on disk. For one process at a time.
        progress: show a bar, if tqdm is installed.

    Returns:
        A CPU tensor ``[B1, *S, *reversed(S), B2]`` less the axes that the options take away; with
        ``out``, the file itself, mapped into memory.

    Raises:
        ValueError: a loader is empty, shuffles, or gives other batches in another pass; an axis does
            not exist, is named twice or is that of the samples; ``out`` holds tiles of another kernel.
        FileExistsError: ``out`` exists and was not written by this function.
        FileNotFoundError: the folder of ``out`` does not exist.
        TypeError: a loader is no iterable of batches, or can be read only once; the output is not a
            tensor; the function fails on batches and parameters of different dtypes.
        NotFiniteError: a tile has NaN or infinite entries. Tiles before it are kept in ``out``.

    Examples:
        >>> func, params = gramjd.functional_loss(model)
        >>> kernel = gramjd.ntk_dataset(func, params, x.split(64), trace_axes=[-1], out="kernel.npy")
    """
    path = None if out is None else checked(Path(out))
    left = Batches.of(loader1, "loader1", in_dims, params)
    right = left
    if loader2 is not None and loader2 is not loader1:
        right = Batches.of(loader2, "loader2", in_dims, params)
    device = pytree.leaves(params)[0].device
    lazy = jacobian(func, 0, (None, in_dims), chunk_size=chunk_size)

    def jac(batch: PyTree) -> Jacobian:
        moved = pytree.map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch)
        return jacobian_of(lazy, params, moved, "batch")

    shape, norms = _probe(jac(next(left.read([0]))))
    work = _Tiles(jac, left, right, _axes(shape, trace_axes, diagonal_axes))
    sizes, dtype = work.sizes(shape[1:]), norms.dtype
    store: InMemory | Journal
    if path is None:
        store = InMemory(torch.empty(sizes, dtype=dtype))
    else:
        fingerprint = {
            "shape": sizes,
            "dtype": str(dtype),
            "options": repr((in_dims, work.axes)),
            "parameters": digest(params),
            "batches of loader1": left.digest,
            "batches of loader2": right.digest,
            "function": float(norms),
        }
        store = Journal.open(path, sizes, dtype, fingerprint)
    with closing(store), _bar(progress, work.count, len(store.done)) as bar:
        for tile, found in work.missing(store.done):
            check_finite(found, params=params)
            work.write(store.values, tile, found)
            store.finish(tile)
            bar.update()
    return store.values


@dataclass(frozen=True)
class _Tiles:
    """The pairs of batches of two loaders; of one with itself, no pair both ways round."""

    jac: Callable[[PyTree], Jacobian]
    left: Batches
    right: Batches
    axes: Axes

    @property
    def symmetric(self) -> bool:
        return self.left is self.right

    @property
    def count(self) -> int:
        n = len(self.left.sizes)
        return n * (n + 1) // 2 if self.symmetric else n * len(self.right.sizes)

    def sizes(self, output: Sequence[int]) -> list[int]:
        """Of the whole kernel, for an output ``S``."""
        full = (self.left.samples, *output, *reversed(output), self.right.samples)
        return [full[a] for a in self.axes.order]

    def missing(self, done: Collection[Tile]) -> Iterator[tuple[Tile, Tensor]]:
        """All tiles but these, row by row."""
        todo = {}
        for i in range(len(self.left.sizes)):
            every = range(i if self.symmetric else 0, len(self.right.sizes))
            if columns := [j for j in every if (i, j) not in done]:
                todo[i] = columns
        rows = self.left.read(list(todo))
        for i, columns in todo.items():
            if self.symmetric:  # one pass at a time: not every loader bears two
                batches = self.right.read(sorted({i, *columns}))
                yield from self._row(i, columns, next(batches), batches)
            else:
                yield from self._row(i, columns, next(rows), self.right.read(columns))

    def _row(self, i: int, columns: Sequence[int], first: PyTree, batches: Iterator[PyTree]
             ) -> Iterator[tuple[Tile, Tensor]]:  # fmt: skip
        """The tiles of one row."""
        jac = self.jac(first)
        if self.symmetric and columns[0] == i:
            yield (i, i), self.axes.kernel(jac)
            columns = columns[1:]
        for j, batch in zip(columns, batches, strict=True):
            yield (i, j), self.axes.kernel(jac, self.jac(batch))

    def write(self, values: Tensor, tile: Tile, found: Tensor) -> None:
        """Put a tile in its place, and in the mirrored one."""
        rows, columns = self.left.rows(tile[0]), self.right.rows(tile[1])
        values[rows, ..., columns] = found
        if self.symmetric and tile[0] != tile[1]:
            values[columns, ..., rows] = self.axes.mirrored(found)


def _probe(jac: Jacobian) -> tuple[tuple[int, ...], Tensor]:
    """``[B, *S]`` of some samples, and a number that depends on the function and all its derivatives."""
    return output_shape(jac), jac.squared_norms().sum()


def _axes(shape: Sequence[int], trace_axes: Sequence[int], diagonal_axes: Sequence[int]) -> Axes:
    axes = Axes.of(shape, trace_axes, diagonal_axes)
    if 0 in (*axes.trace, *axes.diagonal):
        raise ValueError(
            "Axis 0, that of the samples, has no tiles on its diagonal. Take it batch by batch: "
            "torch.cat([gramjd.ntk(func, diagonal_axes=[0])(params, x) for x in loader])."
        )
    return axes


class _NoBar:
    """In place of tqdm's."""

    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def update(self) -> None:
        pass


def _bar(wanted: bool, total: int, initial: int) -> Any:
    """A progress bar of tiles."""
    if wanted:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            return _NoBar()
        return tqdm(total=total, initial=initial, desc="NTK", unit="tile")
    return _NoBar()
