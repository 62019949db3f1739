"""Batches that can be read again and again, and are proved to be the same every time."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.utils.data import RandomSampler

from gramjd import pytree
from gramjd.functional.arguments import Arguments
from gramjd.pytree import PyTree

REMEDY = (
    "All passes must give the same batches: no shuffling and no random augmentation. "
    "Read them once, if they fit into memory: list(loader)."
)


@dataclass(frozen=True)
class Batches:
    """The sizes and digests of a loader's batches, found in a first pass."""

    loader: Iterable[PyTree]
    name: str  # in errors
    sizes: Sequence[int]  # samples of each batch
    digests: Sequence[str]

    @staticmethod
    def of(loader: Iterable[PyTree], name: str, in_dims: PyTree, params: PyTree) -> Batches:
        """Read a loader once."""
        check_loader(loader, name)
        sizes, digests = [], []
        for batch in loader:
            given = Arguments.of((params, batch), {}, (0,), (None, in_dims), single=True)
            sizes.append(len(given.batch[0]))
            digests.append(digest(batch))
        if not sizes:
            raise ValueError(f"{name} gave no batch.")
        return Batches(loader, name, sizes, digests)

    @property
    def samples(self) -> int:
        return sum(self.sizes)

    @property
    def digest(self) -> str:
        """The digest of all batches and their sizes."""
        return digest(list(self.digests))

    def rows(self, number: int) -> slice:
        """The places of a batch's samples among all samples."""
        start = sum(self.sizes[:number])
        return slice(start, start + self.sizes[number])

    def read(self, wanted: Sequence[int]) -> Iterator[PyTree]:
        """The batches of these numbers, in increasing order."""
        left = set(wanted)
        for number, batch in enumerate(self.loader):
            if number in left:
                if digest(batch) != self.digests[number]:
                    raise ValueError(f"Batch {number} of {self.name} changed since the first pass. {REMEDY}")
                yield batch
                left.remove(number)
            if not left:
                return
        raise ValueError(
            f"{self.name} gave {len(self.sizes)} batches in its first pass and fewer in another. {REMEDY}"
        )


def check_loader(loader: Iterable[PyTree], name: str) -> None:
    """Raise for what cannot be read twice in the same order."""
    if isinstance(loader, Tensor) or not isinstance(loader, Iterable):
        raise TypeError(
            f"{name} must be an iterable of batches, such as a DataLoader or x.split(64) of a tensor x, not "
            f"a {type(loader).__name__}."
        )
    if isinstance(loader, Iterator):
        raise TypeError(f"{name} is an iterator, which can be read only once. Pass list({name}) instead.")
    if isinstance(getattr(loader, "sampler", None), RandomSampler):
        raise ValueError(f"{name} shuffles its samples. {REMEDY}")


def digest(tree: PyTree) -> str:
    """A digest of values, dtypes, shapes and structure."""
    leaves, spec = pytree.flatten(tree)
    found = hashlib.blake2b(str(spec).encode(), digest_size=16)
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            found.update(repr(leaf).encode())
            if hasattr(leaf, "tobytes"):  # an array, whose repr leaves out most of a large one
                found.update(leaf.tobytes())
            continue
        values = leaf.detach().cpu().contiguous()
        found.update(f"{values.dtype} {list(values.shape)}".encode())
        if values.numel():
            found.update((ctypes.c_char * values.nbytes).from_address(values.data_ptr()))
    return found.hexdigest()
