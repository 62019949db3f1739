"""Which random matrix ``Ω`` a sketch multiplies a Jacobian with: a function of a seed and of names alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isqrt

import torch
from torch import Tensor

from gramjd.jacobian.philox import key_of, normals, signs

_KINDS = {"rademacher": signs, "gaussian": normals, "factored": signs}


@dataclass(frozen=True)
class Projection:
    """Which random matrix ``Ω`` a sketch ``J Ω`` is made with; see :meth:`gramjd.Jacobian.sketch`.

    Its entries have variance 1, and sketches are divided by ``√dim``.

    Args:
        dim: its columns.
        seed: any integer.
        kind: ``"rademacher"``, ``"gaussian"`` or ``"factored"``.

    Raises:
        ValueError: an option is none of those that there are; a factored sketch has no two sides of about
            the same length.
    """

    dim: int
    seed: int = 0
    kind: str = "rademacher"

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, _KINDS))}, not {self.kind!r}.")
        if type(self.dim) is not int or self.dim < 1:
            raise ValueError(f"dim must be a positive integer, not {self.dim!r}.")
        if type(self.seed) is not int:
            raise ValueError(f"seed must be an integer, not {self.seed!r}.")
        short, long = self.sides
        if self.kind == "factored" and 2 * short < long:
            raise ValueError(
                f"A factored sketch has two sides, here {short} and {long}, whose product is dim={self.dim}. "
                f"Take a dim of similar factors, such as the square {max(1, isqrt(self.dim)) ** 2}."
            )

    @staticmethod
    def of(given: int | Projection) -> Projection:
        """A projection, or one of so many columns."""
        return given if isinstance(given, Projection) else Projection(given)

    @property
    def error(self) -> float:
        """A bound on the standard deviation of ``⟨xΩ, yΩ⟩`` over seeds, relative to ``‖x‖ ‖y‖``.

        ``√(2 / dim)`` for random signs and normal numbers, ``√(4 / √dim + 4 / dim)`` for a factored sketch
        with a square for its ``dim``: the bounds of :meth:`gramjd.Jacobian.sketch`, by Cauchy and Schwarz.
        """
        if self.kind != "factored":
            return (2 / self.dim) ** 0.5
        left, right = self.sides
        return (2 / left + 2 / right + 4 / self.dim) ** 0.5

    @property
    def sides(self) -> tuple[int, int]:
        """The two factors of ``dim`` that differ the least, the smaller one first."""
        short = next(n for n in range(isqrt(self.dim), 0, -1) if self.dim % n == 0)
        return short, self.dim // short

    def span(self, name: str, start: int, stop: int, like: Tensor, dtype: torch.dtype, keep: bool) -> Tensor:
        """Rows of ``Ω`` for the entries from ``start`` to ``stop``; ``keep`` them for later calls."""

        def make() -> Tensor:
            return self.rows(name, torch.arange(start, stop, device=like.device), dtype)

        return _kept_of(self).get((name, start, stop, dtype, like.device), make) if keep else make()

    def rows(self, name: str, entries: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of ``Ω`` for these entries of a parameter, ``[len(entries), dim]``."""
        return _KINDS[self.kind](entries, self.dim, key_of(self.seed, name), dtype)

    def working(self, dtype: torch.dtype) -> int:
        """Numbers of this dtype whose memory making an entry of ``Ω`` takes, itself included."""
        return (72 if self.kind == "gaussian" else 16) // dtype.itemsize

    def factors(self, name: str, sizes: tuple[int, int], like: Tensor, dtype: torch.dtype, keep: bool
                ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """``L [sizes[0], l]`` and ``R [sizes[1], r]``: of a matrix ``X``, the sketch is ``LᵀXR``."""

        def make(side: int) -> Tensor:
            entries = torch.arange(sizes[side], device=like.device)
            return _KINDS[self.kind](entries, self.sides[side], key_of(self.seed, name, side), dtype)

        if not keep:
            return make(0), make(1)
        kept, key = _kept_of(self), (name, sizes, dtype, like.device)
        return kept.get((0, *key), partial(make, 0)), kept.get((1, *key), partial(make, 1))


class _Kept:
    """Parts of the random matrix of one projection, as many as fit.

    They are asked for in turn, so that dropping the oldest for a new one would leave none that is used again.
    """

    most = 2**25  # bytes

    def __init__(self, projection: Projection) -> None:
        self.projection, self.held = projection, 0
        self.parts: dict[tuple[object, ...], Tensor] = {}

    def get(self, key: tuple[object, ...], make: Callable[[], Tensor]) -> Tensor:
        """A part, made if it is not there."""
        found = self.parts.get(key)
        if found is None:
            found = make()
            if self.held + found.nbytes <= self.most:
                self.parts[key] = found
                self.held += found.nbytes
        return found


_kept: _Kept | None = None  # of the projection that was used last


def _kept_of(projection: Projection) -> _Kept:
    """Those of this projection."""
    global _kept
    kept = _kept  # read once: other threads may take another projection
    if kept is None or kept.projection != projection:
        kept = _kept = _Kept(projection)
    return kept
