"""The eager front end: Gramians of the forward that the user's own modules ran."""

from gramjd.engine.engine import Engine

__all__ = ["Engine"]
