"""Bars of tqdm, where it is installed."""

from __future__ import annotations

from typing import Any


class NoBar:
    """A progress bar that shows nothing, with the methods of tqdm's."""

    def __enter__(self) -> NoBar:
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def update(self, count: int) -> None:
        pass


def progress_bar(wanted: bool, what: str, unit: str, total: int | None, initial: int = 0) -> Any:
    """A bar, if one is wanted and there is tqdm."""
    if wanted:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            return NoBar()
        return tqdm(total=total, initial=initial, desc=what, unit=unit)
    return NoBar()
