"""Bars of tqdm, where it is installed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

T = TypeVar("T")
PATIENCE = 2  # seconds without a bar


class NoBar:
    """A progress bar that shows nothing, with the methods of tqdm's."""

    def __enter__(self) -> NoBar:
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def update(self, count: int) -> None:
        pass


def progress_bar(wanted: bool, what: str, unit: str, total: int | None, initial: int = 0) -> Any:
    """A bar that appears after two seconds, if one is wanted and tqdm is installed."""
    if wanted:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            return NoBar()
        return tqdm(total=total, initial=initial, desc=what, unit=unit, delay=PATIENCE)
    return NoBar()


def batches_of(loader: Iterable[T], wanted: bool, what: str) -> Iterator[T]:
    """The batches of a loader, with a bar."""
    with progress_bar(wanted, what, "batch", len(loader) if isinstance(loader, Sized) else None) as bar:
        for batch in loader:
            yield batch
            bar.update(1)
