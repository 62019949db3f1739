"""Memory on the CPU for rows, which later steps use again.

An allocator returns large blocks to the operating system when they are freed, so that every step would wait
for the same pages anew: 0.1 to 0.3 SGD steps for transformers. Here a freed block is offered to the system
instead (``MADV_FREE``). The system takes its pages where memory is scarce; otherwise the next step finds them
in place. On a GPU, torch's own allocator keeps memory.

Of what else a step frees, glibc returns the end of its heap if that is more than twice the size of the
largest block that it was given back before. Rows would have been such blocks; it is given one in their place,
also for gradients, which are freed at once when the next ones are about to be computed.
"""

from __future__ import annotations

import mmap
import weakref
from contextlib import suppress
from functools import cache
from math import prod

import torch
from torch import Tensor

from gramjd.internals import is_ours, is_profiled, is_watched, runs_plainly

LEAST = 2**21  # bytes, a large page: below, an allocator keeps the pages itself
MOST = 256  # freed blocks that are held
ADAPTED = 2**25 - 2**13  # bytes: the largest block that glibc adapts to, less what it adds

_AVAILABLE = hasattr(mmap, "MADV_FREE") and hasattr(mmap, "MAP_ANONYMOUS")  # not on Windows
_freed: list[mmap.mmap] = []  # the block freed last comes last
_used: dict[int, tuple[weakref.ref[memoryview], mmap.mmap]] = {}  # by the id of the reference to a view of it


def empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An uninitialised tensor of the dtype and on the device of ``like``.

    Where something may look for what torch allocates, it is torch's memory.
    """
    size = prod(shape) * like.dtype.itemsize
    if size < LEAST or like.device.type != "cpu" or not runs_plainly([like]):
        return like.new_empty(shape)
    return again(shape, like)


def again(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """:func:`empty` for large tensors on the CPU that nothing traces or transforms."""
    size = prod(shape) * like.dtype.itemsize
    if not _AVAILABLE or is_profiled() or is_watched():
        return like.new_empty(shape)
    block = _taken(size) or _mapped(size)
    if block is None:
        return like.new_empty(shape)
    view = memoryview(block)  # the tensor's storage keeps it alive
    reference = weakref.ref(view, _free)
    _used[id(reference)] = reference, block
    return torch.frombuffer(view, dtype=like.dtype, count=prod(shape)).view(shape)


def bmm(left: Tensor, right: Tensor) -> Tensor:
    """``torch.bmm(left, right)``, in such memory where nothing differentiates or traces it."""
    shape = left.shape[0], left.shape[1], right.shape[2]
    if is_ours(left) and is_ours(right) and prod(shape) * left.dtype.itemsize >= LEAST:
        return torch.bmm(left, right, out=empty(shape, left))
    return left.bmm(right)


def _taken(size: int) -> mmap.mmap | None:
    """The smallest freed block of at least this size, if it is not more than twice as large."""
    fitting = [b for b in reversed(_freed) if size <= len(b) <= 2 * size]
    for block in sorted(fitting, key=len) if len(fitting) > 1 else fitting:
        try:
            _freed.remove(block)
        except ValueError:  # another thread has taken it
            continue
        return block
    return None


def _mapped(size: int) -> mmap.mmap | None:
    """A new block, of large pages where the system has some, as fewer are mapped; ``None`` if it refuses."""
    let_malloc_adapt()
    try:
        block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError:  # a limit that torch's allocator may not meet, or has an error of its own for
        _freed.clear()
        return None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # the system has pages of one size
            block.madvise(mmap.MADV_HUGEPAGE)
    return block


@cache
def let_malloc_adapt() -> None:
    """Give back a block that nobody wrote to, so that glibc keeps up to 64 MiB of what steps free."""
    torch.empty(ADAPTED, dtype=torch.uint8, device="cpu")


def _free(reference: weakref.ref[memoryview]) -> None:
    """Hold a block whose last tensor is gone. Only after the system was told may another tensor use it."""
    block = _used.pop(id(reference))[1]
    try:
        block.madvise(mmap.MADV_FREE)
    except OSError:  # the system cannot take the pages back: the block is unmapped with its last reference
        return
    _freed.append(block)
    del _freed[:-MOST]
