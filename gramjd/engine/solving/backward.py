"""The backward passes of one ``compute_gramian``: cotangents at every node, gradients, rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gramjd import gramians, host_memory
from gramjd.engine.recording.nodes import Cotangents, taps_of
from gramjd.engine.solving.compiled_code import REMEDY
from gramjd.engine.solving.stream import Stream
from gramjd.errors import NoGraphError
from gramjd.internals import (
    batched_gradients_level,
    losses_of_stack,
    outside_batched_gradients,
    taking_gradients,
    without_batch,
    without_hooks,
)
from gramjd.rounding import tolerance

FEW = 16  # rows, up to which a backward pass for each is no slower than several cotangents at once

Sink = Callable[[Any, Sequence[Tensor | None]], Sequence[Tensor | None]]


def into_taps(node: Any, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The sink that leaves the cotangents to autograd, which returns them as gradients of the taps."""
    return grads


@contextmanager
def tapped(nodes: Sequence[Any], sink: Sink = into_taps) -> Iterator[list[list[Tensor]]]:
    """The taps of the nodes; their cotangents go to ``sink`` for as long as the context lasts."""
    for node in nodes:
        node.sink = sink
    try:
        yield [taps_of(node) for node in nodes]
    finally:
        for node in nodes:
            node.sink = None


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
    found = _at_once(output, inputs, cotangents)
    if found is not None:
        return found
    return _one_by_one(output, inputs, cotangents)


def taken_gradients(
    output: Tensor,
    taps: Sequence[Tensor],
    leaves: Sequence[Tensor],
    cotangent: Tensor,
    take: Callable[[int, Tensor], None],
) -> None:
    """A backward pass that gives the gradient of each leaf to ``take``, with its place, and goes to the taps.

    Raises:
        NoGraphError: the graph was freed by an earlier backward pass.
    """
    with without_hooks(leaves), taking_gradients(leaves, take):
        _grad(output, [*taps, *leaves], cotangent, unhooked=taps)


def _one_by_one(output: Tensor, inputs: Sequence[Tensor], cotangents: Tensor) -> list[Tensor | None]:
    """The gradients where some op has no batching rule for its backward."""
    rows = [_grad(output, inputs, cotangent) for cotangent in cotangents]
    return [None if column[0] is None else torch.stack(column) for column in zip(*rows, strict=True)]


def _at_once(output: Tensor, inputs: Sequence[Tensor], cotangents: Tensor) -> list[Tensor | None] | None:
    """The gradients by one backward pass; None where some op cannot take several cotangents."""
    if len(cotangents) == 1:
        return [g if g is None else g.unsqueeze(0) for g in _grad(output, inputs, cotangents[0])]
    try:
        return list(_grad(output, inputs, cotangents, batched=True))
    except NoGraphError:
        raise
    except RuntimeError:
        return None


def _grad(output: Any, inputs: Sequence[Tensor], cotangent: Tensor, batched: bool = False,
          unhooked: Sequence[Tensor] | None = None) -> Sequence[Tensor | None]:  # fmt: skip
    """Gradients of inputs; hooks do not run on those that are ``unhooked``, all by default."""
    if not inputs:
        return []
    try:
        # those of parameters are for what is added to .grad
        with without_hooks(inputs if unhooked is None else unhooked):
            return torch.autograd.grad(
                output, inputs, cotangent, retain_graph=True, allow_unused=True, is_grads_batched=batched
            )
    except RuntimeError as error:
        known = graph_error(error)
        if known is None:
            raise
        raise known from error


def graph_error(error: RuntimeError) -> NoGraphError | None:
    """The error to raise where torch says that a backward pass has no graph, or may not keep it."""
    if "backward through the graph a second time" in str(error):
        return NoGraphError(_FREED)
    return NoGraphError(_DONATED) if "donated buffer" in str(error) else None


_FREED = (
    "The graph of the output has been freed by an earlier backward pass. Compute its Gramian or Jacobian "
    "before backward, or keep the graph with backward(retain_graph=True)."
)
_DONATED = (
    "A compiled part of the output's graph gives its memory away in the first backward pass, and a Gramian "
    "takes more than one. " + REMEDY
)


def stream(
    output: Tensor, nodes: Sequence[Any], cotangents: Tensor, sink: Stream, batched: bool = True
) -> None:
    """One backward pass, the cotangents ``[K, *y]`` of whose nodes go to ``sink`` as they are reached.

    One after the other, as many as there are objectives, unless they may be ``batched``.

    Raises:
        NoGraphError: the graph was freed by an earlier backward pass.
    """
    K, level = len(cotangents), batched_gradients_level()

    def receive(node: Any, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        if K == 1:
            sink.receive(node, [g if g is None else g.unsqueeze(0) for g in grads])
        else:
            with outside_batched_gradients():
                sink.receive(node, [g if g is None else without_batch(g, level, K) for g in grads])
        return (None,) * len(grads)

    with tapped(nodes, receive) as taps:
        whole = (batched or K == 1) and _at_once(output, flattened(taps), cotangents) is not None
    left = sink.missing()
    if whole:  # no cotangents come where the output does not depend on a node's outputs
        missing: list[Cotangents] = [[None] * len(taps_of(node)) for node in left]
    else:
        with tapped(left) as taps:
            flat = _one_by_one(output, flattened(taps), cotangents)
        missing = grouped(flat, list(map(len, taps)))
    for node, found in zip(left, missing, strict=True):
        sink.receive(node, found)


def flattened(taps: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """One list from one for each node."""
    return [tap for mine in taps for tap in mine]


def grouped(flat: Sequence[Tensor | None], counts: Sequence[int]) -> list[list[Tensor | None]]:
    """A list for each node from one list for all."""
    rest = iter(flat)
    return [[next(rest) for _ in range(count)] for count in counts]


def row_gradients(output: Tensor, inputs: Sequence[Tensor], batch_dim: int | None) -> list[Tensor | None]:
    """Rows ``[K, B, *p.shape]`` of each parameter, one objective of one sample at a time."""
    eye = torch.eye(output.numel(), device=output.device).to(output.dtype)
    cotangents = eye.view(-1, *output.shape)
    rows = gradients(output, inputs, cotangents) if len(cotangents) > FEW else None
    if rows is None or not _add_up(output, inputs, cotangents, rows):
        rows = _one_by_one(output, inputs, cotangents)
    shaped = (row if row is None else row.view(*output.shape, *row.shape[1:]) for row in rows)
    return [row if row is None else gramians.rows_first(row, batch_dim, output.ndim) for row in shaped]


def loss_gradients(output: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Rows ``[K, 1, *p.shape]`` of each parameter, by an ordinary backward pass for each entry of the output.

    Where the output is a stack of losses, each pass is through the graph of its own loss alone.
    """
    rows: list[Tensor | None] = [None] * len(inputs)
    missing: list[list[int]] = [[] for _ in inputs]  # rows that are zero
    for k, (start, cotangent) in enumerate(_losses(output)):
        found = [None] * len(inputs) if start is None else _grad(start, inputs, cotangent)
        for n, (p, g) in enumerate(zip(inputs, found, strict=True)):
            if g is None:
                missing[n].append(k)
                continue
            row = rows[n]
            if row is None:
                row = rows[n] = host_memory.empty((output.numel(), 1, *p.shape), p)
            row[k, 0] = g.to_dense() if g.is_sparse else g
    for row, zeros in zip(rows, missing, strict=True):
        if row is not None and zeros:
            row[zeros] = 0
    return rows


def _losses(output: Tensor) -> Iterator[tuple[Any, Tensor]]:
    """The start of each loss's backward pass (``None`` for a constant), with its cotangent."""
    edges = losses_of_stack(output)
    if edges is None:
        for cotangent in torch.eye(output.numel(), device=output.device).to(output.dtype):
            yield output, cotangent.view(output.shape)
    else:
        for edge in edges:
            yield edge, output.new_ones(())


def _add_up(
    output: Tensor, inputs: Sequence[Tensor], cotangents: Tensor, rows: Sequence[Tensor | None]
) -> bool:
    """Whether a random sum of rows equals an ordinary backward pass; some batching rules are wrong."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(len(cotangents), generator=generator, dtype=torch.float64).to(cotangents)
    wanted = _grad(output, inputs, torch.tensordot(v, cotangents, 1))
    pairs = [
        (row, want) for row, want in zip(rows, wanted, strict=True) if row is not None and want is not None
    ]
    return all(
        float((torch.tensordot(v.to(row), row, 1) - want).norm())
        <= tolerance(want.dtype) * float(want.norm())
        for row, want in pairs
    )
