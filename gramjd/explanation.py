"""Explains the cost of a Gramian: every block, the op that it comes from, and its plan."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from torch import Tensor

from gramjd import contraction
from gramjd.blocks import Block, Conv, Dense, Lookup, Outer
from gramjd.contraction import Options
from gramjd.jacobian import Jacobian


@dataclass(frozen=True)
class Row:
    """The product of two blocks of one parameter, mostly of a block with itself.

    Attributes:
        parameter: the name of the parameter.
        shape: the shape of the parameter.
        op: the op that uses it.
        block: the type and the sizes of the block.
        plan: the method by which the blocks are contracted.
        multiply_adds: the number of multiply-adds.
        bytes: the working memory, in bytes.
        reason: the reason for a ``Dense`` block of a parameter with several dimensions; empty otherwise.
    """

    parameter: str
    shape: tuple[int, ...]
    op: str
    block: str
    plan: str
    multiply_adds: int
    bytes: int
    reason: str

    @property
    def cells(self) -> tuple[str, ...]:
        """The cells of this row in the printed table."""
        numbers = _short(self.multiply_adds), _short(self.bytes)
        return self.parameter, str(list(self.shape)), self.op, self.block, self.plan, *numbers, self.reason


_NUMBER = re.compile(r"\d+")
_FEWEST = 3  # rows that are worth one line
_TITLES = ("parameter", "shape", "op", "block", "plan", "multiply-adds", "bytes", "why dense")


@dataclass(frozen=True)
class Explanation:
    """Rows to iterate over; ``str()`` of it is a table with totals.

    Three or more rows that differ only in the numbers of the parameter's name are one line of the table:
    ``h.{0-11}.weight``.

    Attributes:
        rows: one row for each pair of blocks of each parameter.
        proof: the evidence for the blocks of an :class:`gramjd.Engine`; empty for other Jacobians.
        program: the strategies of the engine, and the parts of the graph that it solves one by one; likewise.
    """

    rows: Sequence[Row]
    proof: str = ""
    program: str = ""

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def multiply_adds(self) -> int:
        """The multiply-adds of all rows together."""
        return sum(row.multiply_adds for row in self.rows)

    @property
    def bytes(self) -> int:
        """The most working memory, in bytes: parameters are contracted one after the other."""
        return max((row.bytes for row in self.rows), default=0)

    def __repr__(self) -> str:
        parameters = len({row.parameter for row in self.rows})
        without = len({row.parameter for row in self.rows if row.reason})
        return (
            f"Explanation(parameters={parameters}, rows={len(self.rows)}, without_rule={without}, "
            f"multiply_adds={self.multiply_adds}, bytes={self.bytes})"
        )

    def __str__(self) -> str:
        table = self._table()
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]
        return "\n".join([*lines, *self._told()])

    def _repr_html_(self) -> str:
        """The table of ``str()`` for notebooks."""
        head, *rows = self._table()
        lines = [f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>"]
        lines += [f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
        told = [f"<p>{html.escape(line)}</p>" for line in self._told()]
        return f"<table>{''.join(lines)}</table>{''.join(told)}"

    def _told(self) -> list[str]:
        return [line for line in (self.program, self.proof) if line]

    def _table(self) -> list[tuple[str, ...]]:
        total = ("total", "", "", "", "", _short(self.multiply_adds), f"max {_short(self.bytes)}", "")
        return [_TITLES, *_grouped(self.rows), total]


def _grouped(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """The cells of all rows; rows that differ at most in the numbers of the name are one line."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        key = (_NUMBER.sub("#", row.parameter), replace(row, parameter=""))
        groups.setdefault(key, []).append(row)
    for mine in groups.values():
        name = _common_name([row.parameter for row in mine]) if len(mine) >= _FEWEST else None
        if name is None:
            yield from (row.cells for row in mine)
            continue
        cells = replace(mine[0], parameter=name).cells
        yield *cells[:5], f"{len(mine)} × {cells[5]}", *cells[6:]


def _common_name(names: Sequence[str]) -> str | None:
    """One name for several: ``h.{0-3}.norm{1,2}.bias``; ``None`` if not all combinations of numbers occur."""
    numbers = [tuple(map(int, _NUMBER.findall(name))) for name in names]
    places = [sorted(set(found)) for found in zip(*numbers, strict=True)]
    if set(numbers) != set(product(*places)):
        return None
    parts = _NUMBER.split(names[0])
    return "".join(part + number for part, number in zip(parts, [*map(_range, places), ""], strict=True))


def _range(numbers: Sequence[int]) -> str:
    """Sorted numbers as text: ``3``, ``{0-3}`` or ``{0,2}``."""
    if len(numbers) == 1:
        return str(numbers[0])
    whole = len(numbers) > 2 and list(numbers) == list(range(numbers[0], numbers[-1] + 1))
    return f"{{{numbers[0]}-{numbers[-1]}}}" if whole else f"{{{','.join(map(str, numbers))}}}"


def explanation(
    jacobian: Jacobian[Any], options: Options | None = None, proof: str = "", program: str = ""
) -> Explanation:
    """Every pair of blocks that the Gramian of a Jacobian is made of."""
    rows: list[Row] = []
    for part in jacobian.parts:
        live = [part.live(n) for n in range(len(part.blocks))]
        steps = contraction.steps_of_all(live, options or Options())
        for name, parameter, mine in zip(jacobian.names, jacobian.parameters, steps, strict=True):
            rows += [_row(name, parameter, step) for step in mine]
    return Explanation(rows, proof, program)


def _row(name: str, parameter: Tensor, step: contraction.Step) -> Row:
    blocks = [step.u] if step.u is step.v else [step.u, step.v]
    ops = " × ".join(block.origin.partition(" (")[0] for block in blocks)
    shown = " × ".join(map(_shown, blocks))
    reasons = dict.fromkeys(_reason(block) for block in blocks if isinstance(block, Dense))
    reason = "; ".join(reasons) if parameter.ndim > 1 else ""
    return Row(name, tuple(parameter.shape), ops, shown, step.plan, step.multiply_adds, step.bytes, reason)


def _shown(block: Block) -> str:
    """Type and sizes, in the letters of :mod:`gramjd.blocks`."""
    K, B = block.rows
    sizes = {"K": K, "B": B}
    if isinstance(block, Outer):
        sizes |= {"T": block.c.shape[2], "G": block.c.shape[3], "o": block.c.shape[4], "i": block.a.shape[3]}
    elif isinstance(block, Lookup):
        sizes |= {"T": block.c.shape[2], "V": block.entries, "d": block.grain}
    elif isinstance(block, Conv):
        (G, p), q = block.points.shape[3:5], block.windows.shape[4]
        sizes |= {"T": block.T, "G": G, "p": p, "q": q}
    shown = [f"{letter}={size}" for letter, size in sizes.items() if letter != "G" or size > 1]
    return f"{type(block).__name__}({', '.join(shown)})"


def _reason(block: Dense) -> str:
    """The reason why a parameter has a ``Dense`` block."""
    _, given, cause = block.origin.partition(" (")
    return cause.rstrip(")") if given else f"{block.origin} takes it entry by entry: no smaller form"


def _short(number: int) -> str:
    """Three digits and a prefix."""
    power = 0
    while number >= 1000 ** (power + 1) and power < 4:
        power += 1
    return f"{number / 1000**power:.3g} {' kMGT'[power]}".rstrip()
