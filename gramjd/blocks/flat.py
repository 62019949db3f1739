"""Blocks as a list of their tensors and a key of everything else, and back."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

from gramjd.blocks.sums import Block

# Of each parameter, of each of its blocks: the type, the names of its tensors, and its other attributes.
Structure = tuple[tuple[tuple[Any, tuple[str, ...], tuple[tuple[str, Hashable], ...]], ...], ...]


def flatten(each: Sequence[Sequence[Block]], origins: bool = False) -> tuple[list[Tensor], Structure]:
    """The tensors of the blocks of some parameters, in order, and the rest: origins only if asked for."""
    tensors: list[Tensor] = []
    structure = []
    for blocks in each:
        mine = []
        for block in blocks:
            names, others = [], []
            for name, value in vars(block).items():
                if isinstance(value, Tensor):
                    names.append(name)
                    tensors.append(value)
                else:
                    others.append((name, value if origins or name != "origin" else ""))
            mine.append((type(block), tuple(names), tuple(others)))
        structure.append(tuple(mine))
    return tensors, tuple(structure)


def unflatten(structure: Structure, tensors: Sequence[Tensor]) -> list[list[Block]]:
    """Inverse of :func:`flatten`."""
    rest = iter(tensors)
    found = []
    for blocks in structure:
        mine = []
        for kind, names, others in blocks:
            block: Any = object.__new__(kind)  # what __init__ does, with a tenth of the calls
            block.__dict__.update(zip(names, rest), **dict(others))  # noqa: B905
            mine.append(block)
        found.append(mine)
    return found
