"""Stores that several ranks write: a folder with a folder for each of them, read as one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_NAME = re.compile(r"shard-(\d+)-of-(\d+)")


def shard_folder(path: Path, shard: tuple[int, int]) -> Path:
    """The folder that a rank writes to; ``shard`` is ``(rank, ranks)``.

    Raises:
        ValueError: it is none of them.
    """
    if len(shard) != 2 or any(type(n) is not int for n in shard) or not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard must be (rank, ranks), with 0 <= rank < ranks, not {shard!r}.")
    return path / f"shard-{shard[0]:05d}-of-{shard[1]:05d}"


def is_shard(path: Path) -> bool:
    """Whether something in a folder is a shard, by its name."""
    return _NAME.fullmatch(path.name) is not None


def shards_in(folder: Path) -> list[Path]:
    """All shards of a folder, in order of ranks; none if it has none.

    Raises:
        ValueError: one is missing, or they are of different numbers of ranks.
    """
    found = {path: _NAME.fullmatch(path.name) for path in folder.iterdir()} if folder.is_dir() else {}
    ranks = {path: (int(name[1]), int(name[2])) for path, name in found.items() if name}
    if not ranks:
        return []
    counts = {count for _, count in ranks.values()}
    if len(counts) > 1:
        raise ValueError(
            f"{folder} has shards of {' and of '.join(map(str, sorted(counts)))} ranks: delete those that "
            "are not of this store."
        )
    (count,) = counts
    missing = sorted(
        set(range(count)) - {rank for path, (rank, _) in ranks.items() if (path / "journal").exists()}
    )
    if missing:
        raise ValueError(
            f"{folder} lacks the shards {', '.join(map(str, missing))} of {count}: their ranks have not "
            "begun to write. Open the folder of one shard to read that alone."
        )
    return sorted(ranks, key=lambda path: ranks[path])


@dataclass(frozen=True, eq=False)
class Joined:
    """Arrays one after the other, as one that is read in pieces; ``numpy.asarray`` copies it."""

    arrays: Sequence[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(map(len, self.arrays)), *self.arrays[0].shape[1:])

    @property
    def dtype(self) -> Any:
        return self.arrays[0].dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        """Rows by a number, a slice or an array of numbers."""
        import numpy as np

        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._between(start, max(start, stop))
            index = np.arange(start, stop, step)
        which = np.asarray(index)
        if which.dtype.kind not in "iu":
            raise TypeError(f"Rows are chosen by numbers or a slice, not by {which.dtype}.")
        if which.size and not (-len(self) <= which.min() and which.max() < len(self)):
            raise IndexError(f"There are {len(self)} rows; got the index {index!r}.")
        which = which % max(1, len(self))
        found = np.empty((*which.shape, *self.shape[1:]), self.dtype)
        begin = 0
        for array in self.arrays:
            mine = (which >= begin) & (which < begin + len(array))
            found[mine] = array[which[mine] - begin]
            begin += len(array)
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        if copy is False:
            raise ValueError("Arrays in several files cannot be joined without a copy.")
        found = self._between(0, len(self))
        return found if dtype is None else found.astype(dtype)

    def _between(self, start: int, stop: int) -> Any:
        import numpy as np

        pieces, begin = [], 0
        for array in self.arrays:
            pieces.append(array[max(0, start - begin) : max(0, stop - begin)])
            begin += len(array)
        return np.concatenate(pieces)
