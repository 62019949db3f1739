"""The exceptions that gramjd raises by name, and the warning for its slowest path.

Errors about a computation derive from ``GramjdError``, a ``RuntimeError``. Wrong arguments raise
``TypeError`` or ``ValueError``, as usual.
"""

from __future__ import annotations


class GramjdError(RuntimeError):
    """Base class of the errors that gramjd raises about a computation."""


class NoGraphError(GramjdError):
    """The output has no autograd graph, or its graph has already been freed."""


class NotCoveredError(GramjdError):
    """No registered parameter takes part in the output."""


class NotSeparableError(GramjdError):
    """An objective depends on more than its own sample, although there is a ``batch_dim``."""


class CheckFailedError(GramjdError):
    """A Gramian could not be proved equal to autograd's own gradients."""


class NotFiniteError(GramjdError, ValueError):
    """Outputs or their gradients have NaN or infinite entries: they overflowed, for instance."""


class RanksDisagreeError(GramjdError, ValueError):
    """The processes of a group have different models or settings."""


class RankFailedError(GramjdError):
    """Another process of the group cannot take part in a computation: the message says why."""


class SlowPathWarning(UserWarning):
    """Some parameters were differentiated one row at a time: exact, but slow."""
