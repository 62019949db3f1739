"""Which dimensions of arguments meet those of the output, for ops without a rule that reduce one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gramjd.decompositions.solve import solves_vectors
from gramjd.rules.registry import register_alignment

Arguments = Mapping[Any, Any]


def before_reduction(rank: int, along: int, kept: bool, size: int, dim: int) -> int | None:
    """The dimension of an argument that meets ``dim`` of the output.

    Args:
        rank: of the arguments after broadcasting.
        along: the dimension of them that is reduced.
        kept: whether the output has it, with one entry.
        size: the argument's own number of dimensions.
        dim: of the output.
    """
    along %= rank
    if kept and dim == along:
        return None
    if not kept and dim >= along:
        dim += 1
    return dim - rank + size if dim >= rank - size else None


def _cosine_similarity(arguments: Arguments, name: str, dim: int) -> int | None:
    rank = max(len(arguments["x1"]), len(arguments["x2"]))
    return before_reduction(rank, arguments.get("dim", 1), False, len(arguments[name]), dim)


def _pairwise_distance(arguments: Arguments, name: str, dim: int) -> int | None:
    rank = max(len(arguments["x1"]), len(arguments["x2"]))
    return before_reduction(rank, -1, arguments.get("keepdim", False), len(arguments[name]), dim)


def _solve(arguments: Arguments, name: str, dim: int) -> int | None:
    A, B = arguments["A"], arguments["B"]
    own = 1 if solves_vectors(A, B) else 2  # the last dimensions of the output, which are no batch's
    batch = len(arguments["output"]) - own
    if dim < batch:
        first = len(arguments[name]) - (2 if name == "A" else own) - batch
        return dim + first if dim + first >= 0 else None
    free = batch + 1 if arguments.get("left", True) else batch  # each of these right-hand sides is its own
    return dim - batch + len(B) - own if name == "B" and own == 2 and dim == free else None


register_alignment(torch.cosine_similarity, names=("x1", "x2", "dim", "eps"), align=_cosine_similarity)
register_alignment(
    torch.pairwise_distance, names=("x1", "x2", "p", "eps", "keepdim"), align=_pairwise_distance
)
register_alignment(torch.linalg.solve, names=("A", "B", "left"), align=_solve)
