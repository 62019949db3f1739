"""A large array in a file that is filled tile by tile, and the journal of its finished tiles."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

Tile = tuple[int, int]
FLUSH_SECONDS = 1.0  # at most that much work is lost; flushing each tile would cost more than a small one


@dataclass(frozen=True)
class InMemory:
    """An array in memory, which ends with the process."""

    values: Tensor
    done: set[Tile] = field(default_factory=set)

    def finish(self, tile: Tile) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass
class Journal:
    """A ``.npy`` file, mapped into memory, with the numbers of the tiles that are on disk.

    The journal's first line is a fingerprint of what the tiles are computed from; then comes a line for
    each tile, written once the tile's bytes are on disk.
    """

    values: Tensor  # the memory map
    done: set[Tile]
    array: Any
    lines: BinaryIO
    pending: list[Tile] = field(default_factory=list)  # in the memory map, but perhaps not on disk
    flushed: float = field(default_factory=time.monotonic)

    @staticmethod
    def open(path: Path, shape: Sequence[int], dtype: torch.dtype, fingerprint: Mapping[str, Any]) -> Journal:
        """A new file, or one that holds some tiles of the same computation; see ``checked``."""
        done: set[Tile] = set()
        journal = _beside(path)
        if journal.exists():
            done = _resume(path, journal, fingerprint)
        if not done:
            _begin(journal, fingerprint)
        array = _map(path, shape, dtype, new=not done)
        return Journal(torch.from_numpy(array), done, array, journal.open("ab", buffering=0))

    def finish(self, tile: Tile) -> None:
        """A tile is complete in memory."""
        self.pending.append(tile)
        if time.monotonic() - self.flushed >= FLUSH_SECONDS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self.lines.close()

    def _flush(self) -> None:
        """The bytes of the pending tiles go to disk, and only then their numbers to the journal."""
        self.array.flush()
        self.lines.write(b"".join(b"%d %d\n" % tile for tile in self.pending))
        self.pending.clear()
        self.flushed = time.monotonic()


def checked(path: Path) -> Path:
    """Raise for a path that cannot be used, before anything is computed."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} to write {path.name} in. Create it first.")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; out must be the path of a file in it.")
    journal = _beside(path)
    if path.exists() and not journal.exists():
        raise FileExistsError(
            f"{path} exists, and there is no {journal} that would say what is in it. Choose another path."
        )
    return path


def _beside(path: Path) -> Path:
    """The journal of a file."""
    return path.with_name(path.name + ".journal")


def _begin(journal: Path, fingerprint: Mapping[str, Any]) -> None:
    """A journal without tiles, in one piece or not at all."""
    new = journal.with_name(journal.name + ".new")
    with new.open("wb") as file:
        file.write(json.dumps(fingerprint).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, journal)


def _resume(path: Path, journal: Path, fingerprint: Mapping[str, Any]) -> set[Tile]:
    """The tiles that are on disk; what follows a torn line counts for nothing."""
    first, *rest = journal.read_bytes().split(b"\n")
    try:
        found = dict(json.loads(first))
    except (ValueError, TypeError):
        raise ValueError(
            f"{journal} is no journal of a kernel, or is damaged. Choose another path."
        ) from None
    other = [key for key in fingerprint if not _same(found.get(key), fingerprint[key])]
    if other:
        raise ValueError(
            f"{path} holds tiles of another kernel: {', '.join(other)} differ. Choose another path, or "
            f"delete {path} and {journal} to start anew."
        )
    done, end = set(), len(first) + 1
    for line in rest[:-1]:  # the last ends without a newline, or is empty
        numbers = line.split()
        if len(numbers) != 2 or not all(n.isdigit() for n in numbers):
            break
        done.add((int(numbers[0]), int(numbers[1])))
        end += len(line) + 1
    os.truncate(journal, end)
    return done if path.exists() else set()


def _same(old: Any, new: Any) -> bool:
    """Equal, but for the rounding of numbers."""
    if isinstance(old, float) and isinstance(new, float):
        return math.isclose(old, new, rel_tol=1e-2)
    return bool(old == new)


def _map(path: Path, shape: Sequence[int], dtype: torch.dtype, new: bool) -> Any:
    """The file as an array; a new one has all of its space on disk from the start."""
    try:
        from numpy.lib.format import open_memmap
    except ImportError as error:
        raise ImportError("A kernel in a file needs numpy: pip install 'gramjd[ntk]'.") from error
    kind = torch.empty((), dtype=dtype).numpy().dtype
    if not new:
        array = open_memmap(path, mode="r+")
        if array.shape != tuple(shape) or array.dtype != kind:
            raise ValueError(f"{path} is {array.dtype}{list(array.shape)}, not {kind}{list(shape)}.")
        return array
    array = open_memmap(path, mode="w+", dtype=kind, shape=tuple(shape))
    if hasattr(os, "posix_fallocate"):  # a full disk is an error now, not a crash later
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array
