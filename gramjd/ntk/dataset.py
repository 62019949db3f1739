"""The empirical NTK over whole datasets: tile by tile, in memory or in a file, resumable."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gramjd import pytree
from gramjd.datasets.batches import Batches, digest
from gramjd.datasets.journal import InMemory, Journal, Tile, checked
from gramjd.datasets.progress import progress_bar
from gramjd.distributed import Team, rounds
from gramjd.functional.transforms import jacobian
from gramjd.jacobian import Jacobian
from gramjd.ntk.kernel import Axes, check_finite, jacobian_of, output_shape
from gramjd.pytree import PyTree
from gramjd.verification.schedule import Check


@torch.no_grad()
def ntk_dataset(
    func: Callable[..., Tensor],
    params: PyTree,
    loader1: Iterable[PyTree],
    loader2: Iterable[PyTree] | None = None,
    in_dims: PyTree = 0,
    *,
    trace_axes: int | Sequence[int] = (),
    diagonal_axes: int | Sequence[int] = (),
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
    chunk_size: int | None = None,
    group: Any = None,
    sharded: bool = False,
    check: Check = "first",
    audit: int | None = 256,
) -> Tensor:
    """The empirical neural tangent kernel over whole datasets, one pair of batches (a *tile*) at a time.

    Beside the result, memory holds only the factors of one pair of batches. The Jacobians of ``loader2``'s
    batches are computed again for every batch of ``loader1``. Larger batches take more memory and less time.

    With a ``group``, each process calls this function with the same arguments, and computes some of the
    tiles. It sends them to the rank that keeps them.

    Args:
        func: a pure function of one sample, ``func(params, x) -> output``, as in :func:`gramjd.ntk`.
        params: a PyTree of tensors. Batches are moved to its device.
        loader1: a ``DataLoader`` that does not shuffle, a list, or any other iterable that gives the same
            batches in every pass. ``func`` gets samples in the structure of the batches. To leave out labels,
            pass ``lambda params, batch: func(params, batch[0])``.
        loader2: the batches of the second argument. Without it, the kernel is that of ``loader1`` with
            itself, exactly symmetric.
        in_dims, chunk_size: as in :func:`gramjd.ntk`.
        trace_axes, diagonal_axes: as in :func:`gramjd.ntk`, but without the axis of the samples.
        out: path of a ``.npy`` file for the result (needs numpy). After an interruption, the same call
            computes the missing tiles. A small file beside it, ``out + ".journal"``, lists the tiles on disk.
            Only one process, or one group, may use the path at a time. With a group, only rank 0 writes, so
            ranks need no common file system, and another number of ranks can continue.
        progress: show a bar on rank 0 after two seconds, if tqdm is installed.
        group: a ``torch.distributed`` process group, or a device mesh of one dimension.
        sharded: with a group, each rank keeps the rows of some consecutive batches of ``loader1``, the first
            batches on rank 0. For ``out="kernel.npy"``, rank 1 of 4 writes ``kernel-1-of-4.npy``; the same
            number of ranks can continue.
        check, audit: as in :func:`gramjd.jacobian`, over the batches.

    Returns:
        A CPU tensor ``[B1, *S, *reversed(S), B2]``, without the axes that the options remove; with ``out``,
        the file, mapped into memory. With a group, the rows that this rank keeps. Unless ``sharded``, these
        are all rows on rank 0, and none (a first dimension of size 0) on the others.

    Raises:
        ValueError: a loader is empty, shuffles, or gives other batches in another pass; an axis does
            not exist, is named twice or is that of the samples; ``out`` holds tiles of another kernel;
            ``sharded`` without a group.
        FileExistsError: ``out`` exists and was not written by this function.
        FileNotFoundError: the folder of ``out`` does not exist.
        TypeError: a loader is no iterable of batches, or can be read only once; the output is not a
            tensor; the function fails on batches and parameters of different dtypes.
        NotFiniteError: a tile has NaN or infinite entries. Tiles before it are kept in ``out``.
        RanksDisagreeError: ranks have other parameters, batches, options or functions.
        RankFailedError: another rank has raised an error: the message repeats it.

    Examples:
        >>> func, params = gramjd.functional_loss(model)
        >>> kernel = gramjd.ntk_dataset(func, params, x.split(64), trace_axes=[-1], out="kernel.npy")
    """
    device = next((x.device for x in pytree.leaves(params)), torch.device("cpu"))
    team = Team.of(group, device)
    lazy = jacobian(func, 0, (None, in_dims), chunk_size=chunk_size, check=check, audit=audit)

    def jac(batch: PyTree) -> Jacobian:
        moved = pytree.map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch)
        return jacobian_of(lazy, params, moved, "batch")

    with team.together():
        path = _path(out, team, group, sharded)
        left = Batches.of(loader1, "loader1", in_dims, params)
        right = left
        if loader2 is not None and loader2 is not loader1:
            right = Batches.of(loader2, "loader2", in_dims, params)
        shape, norms = _probe(jac(next(left.read([0]))))
        kept = _kept(len(left.sizes), team.size, sharded)
        axes = _axes(shape, trace_axes, diagonal_axes)
        work = _Tiles(jac, left, right, axes, shape[1:], norms.dtype, kept, team.rank)
        settings = {
            "shape": work.sizes(left.samples, right.samples),
            "dtype": str(norms.dtype),
            "options": repr((in_dims, work.axes)),
            "parameters": digest(params),
            "batches of loader1": left.digest,
            "batches of loader2": right.digest,
        }
    mine = {name: str(value) for name, value in settings.items()}
    team.agree({"option sharded": sharded, "symmetry": work.symmetric, **mine}, norms)
    with ExitStack() as stack:
        with team.together():
            store = _store(path, work, {**settings, "function": float(norms)})
            stack.enter_context(closing(store))
        tiles = team.missing(work.tiles, store.done, work.keepers)
        hands = team.deal(tiles)
        found = work.found(hands[team.rank], params)
        count = len(work.tiles)
        bar = stack.enter_context(
            progress_bar(progress and team.rank == 0, "NTK", "tile", count, count - len(tiles))
        )
        for dealt in rounds(hands):
            with team.together():
                own = next(found, None)
            given = team.exchange(dealt, own, work.keepers, work.empty)
            with team.together():
                for tile, values in given:
                    if tile not in store.done:
                        work.write(store.values, tile, values)
                        store.finish(tile)
            bar.update(len(dealt) - dealt.count(None))
    return store.values


def _path(out: str | os.PathLike[str] | None, team: Team, group: Any, sharded: bool) -> Path | None:
    """The file of this rank's rows, if it has one."""
    if sharded and group is None:
        raise ValueError("sharded=True needs group=...: one process has all rows. Leave it out.")
    if out is None or (team.rank > 0 and not sharded):
        return None
    path = Path(out)
    return checked(path.with_stem(f"{path.stem}-{team.rank}-of-{team.size}") if sharded else path)


def _kept(batches: int, ranks: int, sharded: bool) -> list[range]:
    """The batches of loader1 whose rows each rank keeps."""
    if not sharded:
        return [range(batches)] + [range(0)] * (ranks - 1)
    return [range(batches * r // ranks, batches * (r + 1) // ranks) for r in range(ranks)]


def _store(path: Path | None, work: _Tiles, fingerprint: Mapping[str, Any]) -> InMemory | Journal:
    """Open the storage of this rank's rows, in memory or in a file."""
    sizes = work.sizes(work.samples, work.right.samples)
    if path is None or not work.samples:
        return InMemory(torch.empty(sizes, dtype=work.dtype))
    return Journal.open(path, sizes, work.dtype, fingerprint)


@dataclass(frozen=True)
class _Tiles:
    """The pairs of batches of two loaders; of one with itself, no pair both ways round."""

    jac: Callable[[PyTree], Jacobian]
    left: Batches
    right: Batches
    axes: Axes
    output: Sequence[int]  # S
    dtype: torch.dtype
    kept: Sequence[range]  # the batches of loader1 whose rows each rank keeps
    rank: int

    @property
    def symmetric(self) -> bool:
        return self.left is self.right

    @cached_property
    def tiles(self) -> list[Tile]:
        """All tiles, in order of rows."""
        n, m = len(self.left.sizes), len(self.right.sizes)
        return [(i, j) for i in range(n) for j in range(i if self.symmetric else 0, m)]

    @property
    def samples(self) -> int:
        """The samples whose rows this rank keeps."""
        return sum(self.left.sizes[i] for i in self.kept[self.rank])

    def sizes(self, rows: int, columns: int) -> list[int]:
        """The shape of a kernel of ``rows`` and ``columns`` samples."""
        full = (rows, *self.output, *reversed(self.output), columns)
        return [full[a] for a in self.axes.order]

    def empty(self, tile: Tile) -> Tensor:
        sizes = self.sizes(self.left.sizes[tile[0]], self.right.sizes[tile[1]])
        return torch.empty(sizes, dtype=self.dtype)

    def keepers(self, tile: Tile) -> list[int]:
        """The ranks that keep a tile, or its mirror."""
        rows = tile if self.symmetric else tile[:1]
        return [rank for rank, mine in enumerate(self.kept) if any(i in mine for i in rows)]

    def found(self, tiles: Sequence[Tile], params: PyTree) -> Iterator[Tensor]:
        """The values of these tiles, in order of rows."""
        todo = {i: [j for _, j in row] for i, row in groupby(tiles, key=itemgetter(0))}
        rows = self.left.read(list(todo))
        for i, columns in todo.items():
            if self.symmetric:  # one pass at a time: not every loader bears two
                batches = self.right.read(sorted({i, *columns}))
                first = next(batches)
            else:
                first, batches = next(rows), self.right.read(columns)
            for values in self._row(i, columns, first, batches):
                check_finite(values, params=params)
                yield values.to(self.dtype)

    def _row(self, i: int, columns: Sequence[int], first: PyTree, batches: Iterator[PyTree]
             ) -> Iterator[Tensor]:  # fmt: skip
        """The tiles of one row."""
        jac = self.jac(first)
        if self.symmetric and columns[0] == i:
            yield self.axes.kernel(jac)
            columns = columns[1:]
        for _, batch in zip(columns, batches, strict=True):
            yield self.axes.kernel(jac, self.jac(batch))

    def write(self, values: Tensor, tile: Tile, found: Tensor) -> None:
        """Put a tile in its place, and in the mirrored one, as far as this rank keeps them."""
        self._put(values, tile, found)
        if self.symmetric and tile[0] != tile[1]:
            self._put(values, (tile[1], tile[0]), self.axes.mirrored(found))

    def _put(self, values: Tensor, tile: Tile, found: Tensor) -> None:
        mine = self.kept[self.rank]
        if tile[0] in mine:
            first = self.left.rows(mine[0]).start
            rows, columns = self.left.rows(tile[0]), self.right.rows(tile[1])
            values[rows.start - first : rows.stop - first, ..., columns] = found


def _probe(jac: Jacobian) -> tuple[tuple[int, ...], Tensor]:
    """``[B, *S]`` of some samples, and a number that depends on the function and all its derivatives."""
    return output_shape(jac), jac.squared_norms().sum()


def _axes(shape: Sequence[int], trace_axes: int | Sequence[int], diagonal_axes: int | Sequence[int]) -> Axes:
    axes = Axes.of(shape, trace_axes, diagonal_axes)
    if 0 in (*axes.trace, *axes.diagonal):
        raise ValueError(
            "Axis 0, that of the samples, has no tiles on its diagonal. Take it batch by batch: "
            "torch.cat([gramjd.ntk(func, diagonal_axes=[0])(params, x) for x in loader])."
        )
    return axes
