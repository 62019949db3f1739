"""What is allocated, seen by a dispatch mode; tests do not look at time."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from oracle import OLD
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gramjd import pytree


class Allocations(TorchDispatchMode):
    """Follows the bytes of all storages that ops return and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.finalizers: list[weakref.finalize[Any, Any]] = []
        self.live = self.peak = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in _tensors((args, kwargs))}  # views allocate nothing
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in known | self.sizes.keys():
                self._add(storage)
        return out

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.largest = max(self.largest, size)
        if OLD:
            return
        self.sizes[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        self.finalizers.append(weakref.finalize(storage, self._drop, key))

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        for finalizer in self.finalizers:
            finalizer.detach()

    def _drop(self, key: int) -> None:
        self.live -= self.sizes.pop(key)


def _tensors(tree: object) -> Iterable[Tensor]:
    return (leaf for leaf in pytree.leaves(tree) if isinstance(leaf, Tensor))
