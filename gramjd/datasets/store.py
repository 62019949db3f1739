"""Gradients of a dataset in a folder: arrays in ``.npy`` files that grow by rows, and a journal."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gramjd.datasets.decoded import Decoded
from gramjd.datasets.journal import Log, begin, resume, settings
from gramjd.datasets.shards import Joined, is_shard, shards_in

_HEADER = 256  # bytes, a multiple of 64, with room for any number of rows
_WHAT = "store of gradients"
_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_HALVES = ("float16", "bfloat16")
_IN_FILES = {"bfloat16": "uint16"}  # numpy has none: the bits


@dataclass(frozen=True, eq=False)
class GradientStore:
    """Sketches and norms of the gradients of a dataset, as :func:`gramjd.gradients_dataset` writes them.

    Attributes:
        path: the folder.
        sketches: an array ``[N, *S, dim]``, for outputs of shape ``S`` per sample: ``sketches.npy``, mapped
            into memory. In half precision, it is a ``Decoded`` array, which returns float32 when you index
            it: the file has either float16 without the powers of two in ``scales.npy`` (``[N, *S]``), or the
            bits of bfloat16. The arrays of several shards are joined.
        norms: ``norms.npy``, the norms ``[N, *S]`` of the gradients themselves.
        ids: ``ids.npy``, ``[N]``.
        settings: the options and a description of the parameters.
    """

    path: Path
    sketches: Any
    norms: Any
    ids: Any
    settings: Mapping[str, Any]

    @staticmethod
    def open(path: str | os.PathLike[str]) -> GradientStore:
        """A store on disk, for reading; of several shards, all of them, in order of ranks.

        Raises:
            FileNotFoundError: there is none.
            ValueError: its journal is damaged; a shard is missing, or is of other gradients than the first.
        """
        np, folder = _numpy(), Path(path)
        shards = [] if (folder / "journal").exists() else shards_in(folder)
        if shards:
            return _joined(folder, [GradientStore.open(shard) for shard in shards])
        if not (folder / "journal").exists():
            raise FileNotFoundError(f"There is no {_WHAT} at {folder}. gramjd.gradients_dataset writes one.")
        found = settings(folder / "journal", _WHAT)
        arrays: dict[str, Any] = {
            name: np.load(folder / f"{name}.npy", mmap_mode="r")
            for name in ("sketches", "norms", "ids", "scales")
            if name != "scales" or found["stored in"] == "float16"
        }
        count = min(map(len, arrays.values()))  # of one that is being written, they may differ
        arrays = {name: array[:count] for name, array in arrays.items()}
        scales = arrays.pop("scales", None)
        if found["stored in"] in _HALVES:
            arrays["sketches"] = Decoded(arrays["sketches"], scales)
        return GradientStore(folder, settings=found, **arrays)

    def __len__(self) -> int:
        return len(self.sketches)

    def __repr__(self) -> str:
        known = self.settings["projection"]
        projection = ", ".join(f"{name}={known[name]!r}" for name in ("dim", "seed", "kind"))
        return f"GradientStore({str(self.path)!r}, samples={len(self)}, {projection})"

    def rows(self, start: int, stop: int) -> Tensor:
        """The sketches of some samples, in float32 or float64; a copy."""
        some = self.sketches[start:stop]
        return torch.from_numpy(some if self.settings["stored in"] in _HALVES else some.copy())


def _joined(folder: Path, stores: Sequence[GradientStore]) -> GradientStore:
    """Shards one after the other; without ids of their own, samples are numbered through."""
    np, first = _numpy(), stores[0]
    for store in stores[1:]:
        differ = [key for key, value in first.settings.items() if store.settings.get(key) != value]
        if differ:
            raise ValueError(f"{store.path} and {first.path} differ in {', '.join(differ)}: not one store.")
    norms, ids = (np.concatenate([getattr(s, name) for s in stores]) for name in ("norms", "ids"))
    if not first.settings["ids"]:
        ids = np.arange(len(ids))
    return GradientStore(folder, Joined([s.sketches for s in stores]), norms, ids, first.settings)


class Rows:
    """A ``.npy`` file that grows by rows. Its header lags behind its bytes."""

    def __init__(self, path: Path, shape: Sequence[int], dtype: Any, count: int) -> None:
        self.shape, self.dtype, self.count = tuple(shape), _numpy().dtype(dtype), count
        self.path = path
        if count and (not path.exists() or path.stat().st_size < self._end):
            raise ValueError(f"{path} is damaged: it has less than the {count} rows of its journal.")

    @property
    def _end(self) -> int:
        """The number of bytes up to the last row of the journal."""
        return _HEADER + self.count * prod(self.shape) * self.dtype.itemsize

    def open(self) -> None:
        """Open the file, and cut off bytes after the last row of the journal."""
        self.file = self.path.open("r+b" if self.count else "w+b", buffering=0)
        self.file.truncate(self._end)
        self._write_header()

    def append(self, values: Tensor) -> None:
        """Append rows ``[n, *shape]``."""
        given = values.detach().cpu().numpy()
        if given.dtype.kind == "i" and self.dtype.kind == "u":
            given = given.view(self.dtype)
        array = _numpy().ascontiguousarray(given, dtype=self.dtype)
        assert array.shape[1:] == self.shape
        left = memoryview(array).cast("B") if array.size else memoryview(b"")
        while left:  # a full disk takes less than all of it, and raises at the next
            left = left[self.file.write(left) :]
        self.count += len(array)

    def sync(self) -> None:
        """Write the bytes to disk, and then their number into the header."""
        os.fsync(self.file.fileno())
        self._write_header()
        os.fsync(self.file.fileno())

    def _write_header(self) -> None:
        shape = (self.count, *self.shape)
        entries = f"{{'descr': '{self.dtype.str}', 'fortran_order': False, 'shape': {shape}, }}"
        text = entries.encode().ljust(_HEADER - 11) + b"\n"
        self.file.seek(0)
        self.file.write(b"\x93NUMPY\x01\x00" + (_HEADER - 10).to_bytes(2, "little") + text)
        self.file.seek(self._end)


Batch = tuple[int, str]  # its samples and its digest


@dataclass
class Writer:
    """A store that grows by batches."""

    done: list[Batch]
    arrays: Mapping[str, Rows]
    log: Log

    @staticmethod
    def open(folder: Path, per_sample: Sequence[int], dim: int, stored: torch.dtype, norms: torch.dtype,
             fingerprint: Mapping[str, Any]) -> Writer:  # fmt: skip
        """A new store, or one of the same computation, less what its journal does not tell of."""
        folder.mkdir(exist_ok=True)
        journal, done = folder / "journal", list[Batch]()
        if journal.exists():
            done = resume(journal, fingerprint, _batch, _WHAT, f"{folder} holds other gradients", folder)
        else:
            begin(journal, fingerprint)
        count, shape = sum(samples for samples, _ in done), tuple(per_sample)
        kinds: dict[str, tuple[Sequence[int], Any]] = {
            "sketches": ((*shape, dim), _IN_FILES.get(_named(stored), _named(stored))),
            "norms": (shape, _named(norms)),
            "ids": ((), "int64"),
        }
        if stored == torch.float16:
            kinds["scales"] = shape, "float64"
        arrays = {name: Rows(folder / f"{name}.npy", *kind, count) for name, kind in kinds.items()}
        for rows in arrays.values():
            rows.open()

        def sync() -> None:
            for rows in arrays.values():
                rows.sync()

        return Writer(done, arrays, Log.open(journal, sync))

    @property
    def samples(self) -> int:
        return self.arrays["ids"].count

    def add(self, digest: str, ids: Tensor, norms: Tensor, sketches: Tensor) -> None:
        """Append a batch: ids ``[n]``, norms ``[n, *S]`` and sketches ``[n, *S, dim]``."""
        if "scales" in self.arrays:
            scales = _powers_of_two(sketches)
            self.arrays["scales"].append(scales)
            sketches = (sketches / scales[..., None]).to(torch.float16)
        if sketches.dtype == torch.bfloat16:
            sketches = sketches.view(torch.int16)  # which numpy has, with the same bits
        for name, values in (("sketches", sketches), ("norms", norms), ("ids", ids)):
            self.arrays[name].append(values)
        self.done.append((len(ids), digest))
        self.log.add(b"%d %s" % (len(ids), digest.encode()))

    def close(self) -> None:
        self.log.close()
        for rows in self.arrays.values():
            rows.file.close()


def new_folder(path: str | os.PathLike[str], of_shards: bool = False) -> Path:
    """Raise for a path that cannot be used, before anything is computed."""
    _numpy()
    folder = Path(path)
    if of_shards and (folder / "journal").exists():
        raise FileExistsError(f"{folder} is a {_WHAT} of one process. Choose another path for shards.")
    if of_shards and folder.is_dir() and all(map(is_shard, folder.iterdir())):
        return folder
    if not folder.parent.is_dir():
        raise FileNotFoundError(
            f"There is no folder {folder.parent} to make {folder.name} in. Create it first."
        )
    if folder.exists() and not (folder / "journal").exists() and not (folder.is_dir() and _is_empty(folder)):
        raise FileExistsError(f"{folder} exists, and is no {_WHAT}. Choose another path.")
    return folder


def storable(dtype: torch.dtype) -> torch.dtype:
    """Raise for a dtype that there is no place for in files."""
    if dtype not in _DTYPES.values():
        raise ValueError(f"Sketches can be stored in {', '.join(map(str, _DTYPES.values()))}, not {dtype}.")
    return dtype


def _is_empty(folder: Path) -> bool:
    return all(inside.name == "journal.new" for inside in folder.iterdir())  # a journal that was cut off


def _named(dtype: torch.dtype) -> str:
    return next(name for name, known in _DTYPES.items() if known == dtype)


def _powers_of_two(rows: Tensor) -> Tensor:
    """``[...]``: what brings the largest entries of ``rows [..., n]`` to between a half and one."""
    largest = rows.double().abs().amax(-1)
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)


def _batch(words: list[bytes]) -> Batch | None:
    if len(words) != 2 or not words[0].isdigit() or len(words[1]) != 32:
        return None
    return int(words[0]), words[1].decode("ascii", "replace")


def _numpy() -> Any:
    try:
        import numpy
    except ImportError as error:
        raise ImportError("A store of gradients needs numpy: pip install numpy.") from error
    return numpy
