"""The options of a contraction, and the limits that follow from them for a plan."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from gramjd.internals import is_compiling

MiB = 2**20
SMALLEST = MiB  # bytes: with less, tiles have so few entries that calls of ops take all the time
# More memory than this gains nothing: larger tiles leave the caches.
ENOUGH = {"cpu": 64 * MiB, "cuda": 1024 * MiB}
SMALL_FLOATS = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Options:
    """Options of a contraction.

    Args:
        memory_budget: bytes of working memory beyond inputs and result. Less than 1 MiB counts as
            1 MiB. None: an eighth of what is free on the device, and no more than is of use.
        accumulate_dtype: in which products are added up, and of the result. None: half and
            bfloat16 are accumulated in float32, others as they are.

    Raises:
        ValueError: the budget is not a positive number; the dtype is not a real floating dtype.
    """

    memory_budget: int | None = None
    accumulate_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        budget, dtype = self.memory_budget, self.accumulate_dtype
        if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 1):
            raise ValueError(f"memory_budget must be a positive number of bytes or None, got {budget!r}.")
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"accumulate_dtype must be a floating dtype or None, got {dtype!r}.")

    def budget(self, device: torch.device) -> int:
        """Bytes, on a device."""
        if self.memory_budget is None:
            return default_budget(device)
        return max(SMALLEST, self.memory_budget)

    def kept_budget(self, device: torch.device) -> int:
        """Bytes that rows may take that a Gramian builds and keeps, on a device."""
        return self.rows_budget(device) if self.memory_budget is None else self.budget(device) // 2

    def rows_budget(self, device: torch.device) -> int:
        """Bytes that rows may take that are kept as a whole, on a device."""
        if self.memory_budget is not None:
            return self.memory_budget
        return _free(device) // 8

    def factors_budget(self, device: torch.device) -> int:
        """Bytes that the factors of all parameters may take together, on a device."""
        return self.memory_budget or _free(device) // 4

    def on(self, device: torch.device) -> tuple[int | bool | torch.dtype | None, ...]:
        """A key of all that plans on a device depend on besides sizes, such as the memory that is free."""
        state = () if device.type == "cpu" else (_free(device), allows_tf32())
        return self.memory_budget, self.accumulate_dtype, *state

    def accumulated(self, *dtypes: torch.dtype) -> torch.dtype:
        """The dtype in which factors of these dtypes are contracted."""
        if self.accumulate_dtype is not None:
            return self.accumulate_dtype
        found = dtypes[0]
        for dtype in dtypes[1:]:
            if dtype != found:  # to ask torch is an op, dispatched like any other
                found = torch.promote_types(found, dtype)
        return torch.float32 if found in SMALL_FLOATS else found


@dataclass(frozen=True)
class Limits:
    """The memory and the dtype that a plan may use."""

    elements: int  # of working memory
    dtype: torch.dtype

    def cached(self, elements: int) -> int:
        """The limit, or these elements if they are fewer, such as those that a cache holds."""
        return max(1, min(self.elements, elements))


def limits(options: Options, like: Tensor, *dtypes: torch.dtype) -> Limits:
    """The limits of a contraction of factors on the device of ``like``."""
    dtype = options.accumulated(*dtypes)
    return Limits(max(1, options.budget(like.device) // dtype.itemsize), dtype)


def _free_host_memory() -> int:
    try:  # of Linux: also what caches of files take, which it gives up for programs
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not on every system
        return 8 * ENOUGH["cpu"]


_FREE_AT_START = _free_host_memory()  # read once: the same model gets the same plans, also compiled


def allows_tf32() -> bool:
    """Whether cuDNN may round the factors of convolutions to TF32."""
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:  # set by its newer name, for convolutions and recurrent networks apart
        return torch.backends.cudnn.conv.fp32_precision != "ieee"  # type: ignore[attr-defined]


def rounds_float32(device: torch.device) -> bool:
    """Whether products of float32 numbers may be rounded to fewer digits on a device."""
    try:
        rounded = torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # set by its newer names
        return True
    return rounded or (device.type == "cuda" and allows_tf32())


def default_budget(device: torch.device) -> int:
    """A sane budget from the memory that is free."""
    enough = ENOUGH.get(device.type, ENOUGH["cpu"])
    return max(MiB, min(enough, _free(device) // 8))


_FREE_ON_CARDS: dict[torch.device, tuple[float, int]] = {}  # when it was read, in seconds, and the bytes
_HOLDS = (
    1.0  # seconds: the driver takes microseconds to milliseconds, and each product of a step would ask it
)


def _free(device: torch.device) -> int:
    """Bytes: on the host as they were at the start, on a card as they were less than a second ago."""
    if device.type != "cuda" or is_compiling():
        return _FREE_AT_START
    now = time.monotonic()
    read, found = _FREE_ON_CARDS.get(device, (-_HOLDS, 0))
    if now - read >= _HOLDS:
        found = free_on_card(device)
        found &= -1 << max(0, found.bit_length() - 3)  # three digits: a step gets the plans of the last one
        _FREE_ON_CARDS[device] = now, found
    return found


def free_on_card(device: torch.device) -> int:
    """Bytes that torch could still allocate: those of the driver, and those that torch holds unused."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused
