"""Progress and colour on a terminal."""

from __future__ import annotations

import os
import time
from typing import TextIO

PATIENCE = 2.0  # seconds without a word
REDRAWN, REPEATED = 0.2, 15.0  # seconds between two lines of one stage: on a terminal, in a file
COLORS = {"exact": 32, "WRONG": 31, "refused": 31}  # of verdicts: green, red


class Progress:
    """Shows the stages of a command, once it has run for two seconds.

    On a terminal, a line replaces the one before and disappears at the end. Elsewhere each stage is a line.

    Args:
        stream: where to write; ``None`` shows nothing.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream, self._stage = stream, ""
        self._start = self._last = time.monotonic()

    def __call__(self, stage: str, done: int = 0, total: int = 0) -> None:
        """Enter a stage, or say how much of it is done."""
        now = time.monotonic()
        if self._stream is None or now - self._start < PATIENCE:
            return
        pause = REDRAWN if self._stream.isatty() else REPEATED
        if stage == self._stage and now - self._last < pause:
            return
        self._stage, self._last = stage, now
        text = f"gramjd: {stage}" + (f", {done} of {total}" if total else "")
        if self._stream.isatty():
            self._stream.write(f"\r\x1b[K{text}")
        else:
            self._stream.write(f"{text} ({now - self._start:.0f} s)\n")
        self._stream.flush()

    def close(self) -> None:
        """Clear the line that shows the stage."""
        if self._stream is not None and self._stage and self._stream.isatty():
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def in_color(line: str, stream: TextIO) -> str:
    """A line with its verdict in colour, if the stream is a terminal and ``NO_COLOR`` is not set."""
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return line
    verdict, colon, rest = line.partition(":")
    return f"\x1b[1;{COLORS[verdict]}m{verdict}\x1b[0m{colon}{rest}" if verdict in COLORS else line
