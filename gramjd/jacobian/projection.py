"""Which random matrix ``Ω`` a sketch multiplies a Jacobian with: a function of a seed and of names alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import isqrt, prod
from typing import Any

import torch
from torch import Tensor

from gramjd import prepared
from gramjd.jacobian.philox import SIGNS, key_of, normals, signs, word, words

_KINDS = {"rademacher": signs, "gaussian": normals, "factored": signs, "countsketch": signs}
_RATIO = 16  # of the columns of a shorter side to those of a longer one
_FEW = 4  # entries for each column, up to which a count sketch draws one for each
_VERSIONS = {"factored": 2}  # of Ω, where it was another one before

_RUNS = 8  # of entries with columns one after the other, up to which each is added as it is

Ranges = list[tuple[int, int, int]]  # entries from … to … go to columns one after the other, from … on
Places = tuple[Tensor | Ranges, Tensor]  # columns of entries, and signs


@dataclass(frozen=True)
class Projection:
    """Which random matrix ``Ω`` a sketch ``J Ω`` is made with; see :meth:`gramjd.Jacobian.sketch`.

    Its entries have variance 1, and sketches are divided by ``√dim``.

    Args:
        dim: its columns.
        seed: any integer.
        kind: ``"rademacher"``, ``"gaussian"``, ``"countsketch"`` or ``"factored"``.

    Raises:
        ValueError: an option is none of those that there are.
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

    @staticmethod
    def of(given: int | Projection) -> Projection:
        """A projection, or a count sketch of so many columns, which is cheap for thousands of rows."""
        return given if isinstance(given, Projection) else Projection(given, kind="countsketch")

    @property
    def error(self) -> float:
        """A bound on the standard deviation of ``⟨xΩ, yΩ⟩`` over seeds, relative to ``‖x‖ ‖y‖``.

        ``√(2 / dim)`` for random signs and normal numbers, ``√(8 / dim)`` for a count sketch, and for a
        factored one ``√(v + (2 + 2 v) / dim)`` with ``v = 2 / l + 2 / r + 4 / (l r)``, where ``r`` is half of
        ``√dim``, rounded up to a multiple of eight, and ``l = 16 r``: the bounds of
        :meth:`gramjd.Jacobian.sketch`, by Cauchy and Schwarz.
        """
        if self.kind != "factored":
            return ((8 if self.kind == "countsketch" else 2) / self.dim) ** 0.5
        l, r = self.sides  # noqa: E741
        v = 2 / l + 2 / r + 4 / (l * r)
        return float((v + (2 + 2 * v) / self.dim) ** 0.5)

    @property
    def sides(self) -> tuple[int, int]:
        """To how many columns a factored sketch projects the shorter and the longer side of a matrix.

        Half of ``√dim`` for the longer one, as a multiple of eight, which products are fast for, and so many
        for the other that few have more.
        """
        long = 8 * -(-(isqrt(self.dim - 1) + 1) // 16)
        return _RATIO * long, long

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What sketches that may be compared have in common."""
        known: dict[str, Any] = {"dim": self.dim, "seed": self.seed, "kind": self.kind}
        return {**known, "version": _VERSIONS[self.kind]} if self.kind in _VERSIONS else known

    def span(self, name: str, start: int, stop: int, device: torch.device, dtype: torch.dtype, keep: bool
             ) -> Tensor:  # fmt: skip
        """Rows of ``Ω`` for the entries from ``start`` to ``stop``; ``keep`` them for later calls."""

        def make() -> Tensor:
            return self.rows(name, torch.arange(start, stop, device=device), dtype)

        return self._get((name, start, stop, dtype, device), make) if keep else make()

    def rows(self, name: str, entries: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of ``Ω`` for these entries of a parameter, ``[len(entries), dim]``."""
        return _KINDS[self.kind](entries, self.dim, key_of(self.seed, name), dtype)

    def working(self, dtype: torch.dtype) -> int:
        """Numbers of this dtype whose memory making an entry of ``Ω`` takes, itself included."""
        return (72 if self.kind == "gaussian" else 16) // dtype.itemsize

    def places(self, name: str, start: int, stop: int, device: torch.device, dtype: torch.dtype, keep: bool,
               side: int = -1) -> Places:  # fmt: skip
        """To which columns the entries from ``start`` to ``stop`` of a vector go, and with which signs.

        Runs of ``dim`` entries fill the columns in turn, each run from a random one on: entries of one run
        share no column, and others do with a probability of ``1 / dim``.

        Returns:
            The columns, ``[stop - start]`` or, if these are few, ranges of entries with columns one after
            the other; and the signs ``[stop - start]``, of length ``√dim``.
        """
        of = (name, side) if side >= 0 else (name,)
        runs = range(start // self.dim, -(-stop // self.dim))

        def drawn() -> Tensor:
            begin = start // SIGNS
            calls = torch.arange(begin, -(-stop // SIGNS), device=device)
            found = signs(calls, SIGNS, key_of(self.seed, *of), dtype).flatten()
            return found[start - begin * SIGNS : stop - begin * SIGNS] * self.dim**0.5

        mine = self._get(("signs", *of, start, stop, dtype, device), drawn) if keep else drawn()
        if len(runs) > _RUNS:
            return self.columns_of(of, start, stop, device, keep), mine
        ranges = []
        for run in runs:
            first = word(run, key_of(self.seed, *of, "places")) % self.dim
            turn = (run + 1) * self.dim - first  # the entry of column 0
            for begin, end, column in ((run * self.dim, turn, first), (turn, (run + 1) * self.dim, 0)):
                a, b = max(begin, start), min(end, stop)
                if a < b:
                    ranges.append((a - start, b - start, column + a - begin))
        return ranges, mine

    def columns_of(self, of: tuple[object, ...], start: int, stop: int, device: torch.device, keep: bool
                 ) -> Tensor:  # fmt: skip
        """The columns of entries, as in ``places``."""

        def make() -> Tensor:
            runs = torch.arange(start // self.dim, -(-stop // self.dim), device=device)
            first = words(runs, key_of(self.seed, *of, "places"))
            entries = torch.arange(start, stop, device=device)
            return (first[entries // self.dim - start // self.dim] + entries) % self.dim

        return self._get(("columns", *of, start, stop, device), make) if keep else make()

    def places_of_sides(self, name: str, sizes: tuple[int, int], device: torch.device, dtype: torch.dtype,
                        keep: bool) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:  # fmt: skip
        """Columns and signs of both sides of a matrix: an entry goes to the sum of its two columns.

        Those of the first side are independent of each other.
        """

        def columns() -> Tensor:
            entries = torch.arange(sizes[0], device=device)
            return words(entries, key_of(self.seed, name, 0, "places")) % self.dim

        def drawn() -> Tensor:
            entries = torch.arange(sizes[0], device=device)
            return signs(entries, 1, key_of(self.seed, name, 0), dtype).flatten()

        columns_of_rest = self.columns_of((name, 1), 0, sizes[1], device, keep)
        rest = columns_of_rest, self.places(name, 0, sizes[1], device, dtype, keep, side=1)[1]
        if not keep:
            return (columns(), drawn()), rest
        key = (name, sizes, dtype, device)
        return (self._get(("columns", *key), columns), self._get(("signs", *key), drawn)), rest

    def by_sides(self, sizes: tuple[int, int]) -> bool:
        """Whether a count sketch has a column for each side of a matrix, and not for each entry."""
        return min(sizes) > 1 and prod(sizes) > _FEW * self.dim

    def factors(self, name: str, sizes: tuple[int, int], device: torch.device, dtype: torch.dtype, keep: bool
                ) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
        """``Lᵀ [l, sizes[0]]`` and ``Rᵀ [r, sizes[1]]`` of the ``columns``; None for a side that stays."""
        columns = self.columns(sizes)

        def make(side: int) -> Tensor:
            entries = torch.arange(sizes[side], device=device)
            drawn = signs(entries, columns[side], key_of(self.seed, name, side), dtype)
            return drawn.mT.contiguous() / columns[side] ** 0.5

        def get(side: int) -> Tensor | None:
            if columns[side] == sizes[side]:
                return None
            if not keep:
                return make(side)
            return self._get((side, name, sizes, dtype, device), partial(make, side))

        return get(0), get(1)

    def _get(self, key: tuple[object, ...], make: Callable[[], Tensor]) -> Tensor:
        """A part of ``Ω`` that is kept for later calls."""
        return prepared.fetched(lambda: _kept_of(self).get(key, make))

    def columns(self, sizes: tuple[int, int]) -> tuple[int, int]:
        """To how many columns a factored sketch projects each side of a matrix; its size, if it is not."""
        if min(sizes) == 1:
            return sizes
        first, rest = self.sides if sizes[0] <= sizes[1] else self.sides[::-1]
        return min(first, sizes[0]), min(rest, sizes[1])


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
