"""The memory that a comparison needs, and the memory that is free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from gramjd.cli.load import CannotRunError
from gramjd.contraction.options import free_on_card

CGROUP = Path("/sys/fs/cgroup")
MARGIN = 1.15  # what allocators hold besides: a seventh of what GPT-2 takes


@dataclass(frozen=True)
class Need:
    """The bytes that a comparison takes beside what is there before it, in one precision."""

    copied: int  # a copy of the model
    gradient: int  # of one loss
    forward: int  # the most that a forward pass holds, its graph included

    def of_the_gramian(self) -> int:
        """The graph, the cotangents of ops that are not large, and two gradients while the Gramian is proven.

        Of large ones the proof keeps random projections: of large models this is more than they need.
        """
        return round(MARGIN * (self.copied + 2 * self.gradient + 1.75 * self.forward))

    def of_rows(self, rows: int) -> int:
        """The graph, the rows, and the two gradients that exist at once."""
        return round(MARGIN * (self.copied + (rows + 2) * self.gradient + self.forward))

    def of(self, rows: int) -> int:
        return max(self.of_the_gramian(), self.of_rows(rows))

    def fitting(self, free: int) -> int:
        """The number of rows that fit into memory; 0 if none does."""
        if self.of_the_gramian() > free:
            return 0
        return max(0, int((free - self.of_rows(0)) / (MARGIN * self.gradient)))


def refuse(rows: int, need: Need, own: Need | None, device: torch.device) -> None:
    """Refuse a comparison that does not fit into memory.

    Args:
        rows: losses that are differentiated one by one.
        need: of the comparison.
        own: of one in the model's own precision, if this is another.
        device: of the model.

    Raises:
        CannotRunError: it takes more than is free.
    """
    free = free_bytes(device)
    if free is None or need.of(rows) <= free:
        return
    remedies = []
    if fit := need.fitting(free):
        remedies.append(f"pass --rows {fit}")
    if own is not None and (fit := min(rows, own.fitting(free))):
        fewer = f" --rows {fit}" if fit < rows else ""
        remedies.append(f"pass --own-precision{fewer}, which takes about {_gib(own.of(fit))}")
    if not remedies:
        remedies.append("take a smaller batch, or check a smaller model of the same kind")
    remedy = ", or ".join(remedies)
    raise CannotRunError(
        f"The comparison takes about {_gib(need.of(rows))}, of which the gradients of {rows} losses take "
        f"{_gib(rows * need.gradient)}, and {_gib(free)} are free: {remedy}."
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"


def free_bytes(device: torch.device) -> int | None:
    """The free memory of a device; ``None`` if the system does not tell."""
    if device.type == "cuda":
        return free_on_card(device)
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
