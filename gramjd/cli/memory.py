"""The memory that a comparison needs, and the memory that is free."""

from __future__ import annotations

from pathlib import Path

import torch

from gramjd.cli.load import CannotRunError

ROW = torch.float64.itemsize  # bytes of an entry of a row
CGROUP = Path("/sys/fs/cgroup")


def refuse_rows(rows: int, entries: int, device: torch.device) -> None:
    """Refuse a comparison whose rows do not fit into memory.

    Args:
        rows: losses that are differentiated one by one.
        entries: real numbers in one gradient.
        device: that holds the rows.

    Raises:
        CannotRunError: the rows, and the two gradients that exist at once, take more than is free.
    """
    free = free_bytes(device)
    needed = (rows + 2) * entries * ROW
    if free is None or needed <= free:
        return
    fit = free // (2 * entries * ROW)  # the other half is for the model and its Gramian
    remedy = (
        f"Pass --rows {fit}." if fit > 0 else "Not even one fits: check a smaller model of the same kind."
    )
    raise CannotRunError(
        f"The gradients of {rows} losses take {needed / 2**30:.1f} GiB in float64, and "
        f"{free / 2**30:.1f} GiB are free. {remedy}"
    )


def free_bytes(device: torch.device) -> int | None:
    """The free memory of a device; ``None`` if the system does not tell."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    known = [free for free in (_of_the_host(), _of_the_container()) if free is not None]
    return min(known, default=None)


def _of_the_host() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _of_the_container() -> int | None:
    """The memory below the limit of a control group; files that are only cached count as free."""
    for limit, used, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, now = ((CGROUP / name).read_text().strip() for name in (limit, used))
            stat = dict(
                line.split() for line in (CGROUP / limit).with_name("memory.stat").read_text().splitlines()
            )
        except (OSError, ValueError):
            continue
        if most.isdecimal():
            return max(0, int(most) - int(now) + int(stat.get(cached, 0)))
    return None
