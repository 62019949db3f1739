"""Journals of long computations, and a large array in a file that is filled tile by tile."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
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
class Log:
    """A file with a line for each piece of work that is on disk.

    Its first line is a fingerprint of what is computed. No line is written before the bytes that it tells of.
    """

    file: BinaryIO
    sync: Callable[[], object]  # brings the bytes to disk
    pending: list[bytes] = field(default_factory=list)  # lines of bytes that are perhaps not on disk
    flushed: float = field(default_factory=time.monotonic)

    @staticmethod
    def open(path: Path, sync: Callable[[], object]) -> Log:
        """Open a journal that :func:`begin` has made."""
        return Log(path.open("ab", buffering=0), sync)

    def add(self, line: bytes) -> None:
        """The bytes that a line tells of are written, but perhaps not on disk."""
        self.pending.append(line + b"\n")
        if time.monotonic() - self.flushed >= FLUSH_SECONDS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self.file.close()

    def _flush(self) -> None:
        self.sync()
        self.file.write(b"".join(self.pending))
        self.pending.clear()
        self.flushed = time.monotonic()


@dataclass
class Journal:
    """A ``.npy`` file, mapped into memory, with the numbers of the tiles that are on disk."""

    values: Tensor  # the memory map
    done: set[Tile]
    log: Log

    @staticmethod
    def open(path: Path, shape: Sequence[int], dtype: torch.dtype, fingerprint: Mapping[str, Any]) -> Journal:
        """A new file, or one that holds some tiles of the same computation; see ``checked``."""
        done: set[Tile] = set()
        journal = _beside(path)
        if journal.exists():
            found = resume(
                journal, fingerprint, _tile, "kernel", f"{path} holds tiles of another kernel", path
            )
            done = set(found) if path.exists() else set()
        if not done:
            begin(journal, fingerprint)
        array = _map(path, shape, dtype, new=not done)
        return Journal(torch.from_numpy(array), done, Log.open(journal, array.flush))

    def finish(self, tile: Tile) -> None:
        """A tile is complete in memory."""
        self.log.add(b"%d %d" % tile)

    def close(self) -> None:
        self.log.close()


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


def begin(journal: Path, fingerprint: Mapping[str, Any]) -> None:
    """A journal without lines of work, in one piece or not at all."""
    new = journal.with_name(journal.name + ".new")
    with new.open("wb") as file:
        file.write(json.dumps(fingerprint).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, journal)


def settings(journal: Path, what: str) -> dict[str, Any]:
    """The fingerprint in a journal."""
    with journal.open("rb") as file:
        try:
            return dict(json.loads(file.readline()))
        except (ValueError, TypeError):
            raise ValueError(
                f"{journal} is no journal of a {what}, or is damaged. Choose another path."
            ) from None


def resume(journal: Path, fingerprint: Mapping[str, Any], parse: Callable[[list[bytes]], T | None], what: str,
           other: str, path: Path) -> list[T]:  # fmt: skip
    """Read the lines of a journal, each by ``parse``; ignore everything after a torn line.

    Raises:
        ValueError: this is no journal, or one of a computation with another fingerprint.
    """
    found = settings(journal, what)
    differ = [key for key in fingerprint if not _same(found.get(key), fingerprint[key])]
    if differ:
        raise ValueError(
            f"{other}: {', '.join(differ)} differ. Choose another path, or delete {path} and {journal} to "
            "start anew."
        )
    first, *rest = journal.read_bytes().split(b"\n")
    done, end = [], len(first) + 1
    for line in rest[:-1]:  # the last ends without a newline, or is empty
        entry = parse(line.split())
        if entry is None:
            break
        done.append(entry)
        end += len(line) + 1
    os.truncate(journal, end)
    return done


def _tile(words: list[bytes]) -> Tile | None:
    if len(words) != 2 or not all(word.isdigit() for word in words):
        return None
    return int(words[0]), int(words[1])


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
        raise ImportError("A kernel in a file needs numpy: pip install numpy.") from error
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
