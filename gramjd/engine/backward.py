"""The backward passes of one ``compute_gramian``: cotangents at every node, gradients, rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gramjd import gramians
from gramjd.engine.nodes import taps_of
from gramjd.errors import NoGraphError


@contextmanager
def tapped(nodes: Sequence[Any]) -> Iterator[list[list[Tensor]]]:
    """The taps of the nodes, with gradients flowing into them for as long as the context lasts."""
    for node in nodes:
        node.tapped = True
    try:
        yield [taps_of(node) for node in nodes]
    finally:
        for node in nodes:
            node.tapped = False


def basis(output: Tensor, batch_dim: int | None) -> Tensor:
    """Cotangents of the objectives summed over samples, ``[K, *output.shape]``."""
    K, B = gramians.rows_first(output, batch_dim).shape
    eye = torch.eye(K, device=output.device).to(output.dtype)[:, None].expand(K, B, K)
    return gramians.from_rows(eye, output.shape, batch_dim).movedim(-1, 0)


def gradients(output: Tensor, inputs: Sequence[Tensor], cotangents: Tensor) -> list[Tensor | None]:
    """Gradients of each input for each of the cotangents ``[K, *output.shape]``, ``[K, ...]``.

    Raises:
        NoGraphError: the graph was freed by an earlier backward pass.
    """

    def grad(cotangent: Tensor, batched: bool) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(
            output,
            inputs,
            cotangent,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )

    if not inputs:
        return []
    try:
        if len(cotangents) == 1:
            return [g if g is None else g.unsqueeze(0) for g in grad(cotangents[0], False)]
        try:
            return list(grad(cotangents, True))
        except RuntimeError as error:
            if _is_freed(error):
                raise
            # some op has no batching rule for its backward: one objective after the other
            rows = [grad(cotangent, False) for cotangent in cotangents]
            return [None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)]
    except RuntimeError as error:
        if _is_freed(error):
            raise NoGraphError(
                "The graph of the output has been freed by an earlier backward pass. Call "
                "compute_gramian before backward, or keep the graph with backward(retain_graph=True)."
            ) from error
        raise


def grouped(flat: Sequence[Tensor | None], counts: Sequence[int]) -> list[list[Tensor | None]]:
    """A list for each node from one list for all."""
    rest = iter(flat)
    return [[next(rest) for _ in range(count)] for count in counts]


def _is_freed(error: RuntimeError) -> bool:
    return "backward through the graph a second time" in str(error)


def row_gradients(output: Tensor, inputs: Sequence[Tensor], batch_dim: int | None) -> list[Tensor | None]:
    """Way 3: rows ``[K, B, *p.shape]`` of each parameter, one objective of one sample at a time."""
    eye = torch.eye(output.numel(), device=output.device).to(output.dtype)
    rows = gradients(output, inputs, eye.view(-1, *output.shape))
    shaped = (row if row is None else row.view(*output.shape, *row.shape[1:]) for row in rows)
    return [row if row is None else _rows_first(row, output.ndim, batch_dim) for row in shaped]


def _rows_first(row: Tensor, ndim: int, batch_dim: int | None) -> Tensor:
    """``[*output.shape, *p.shape]`` → ``[K, B, *p.shape]``."""
    if batch_dim is None:
        return row.reshape(-1, 1, *row.shape[ndim:])
    row = row.movedim(batch_dim, ndim - 1)
    return row.reshape(-1, *row.shape[ndim - 1 :])
