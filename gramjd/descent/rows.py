"""Rows of a Jacobian by ordinary autograd: of any tensors with respect to any tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from gramjd.complexes import as_real
from gramjd.engine.solving.backward import FEW, graph_error
from gramjd.errors import NoGraphError
from gramjd.internals import without_hooks
from gramjd.rounding import own_precision, tolerance

_CHUNK = 64  # of more rows, those that one backward pass takes at once by default

Gradients = Sequence[Tensor | None]


@own_precision
def rows(output: Tensor, inputs: Sequence[Tensor], chunk_size: int | None = None) -> list[Tensor | None]:
    """``[*output.shape, *input.shape]`` for each input; None where the output does not depend on it.

    Args:
        output: with a graph, which is kept.
        inputs: leaves, or tensors on the way from them to the output.
        chunk_size: how many rows a backward pass takes at once; 1 asks for nothing but ordinary ones.
    """
    m = output.numel()
    chunk = chunk_size or (1 if m <= FEW else _CHUNK)
    found: list[Tensor | None] | None = None
    if chunk > 1 and m > 1:
        found = _batched(output, inputs, chunk)
        if found is not None and not _add_up(output, inputs, found):
            found = None
    if found is None:
        each = [gradients(output, inputs, cotangents[0]) for cotangents in _one_hot(output, 1)]
        found = [_stack(column) for column in zip(*each, strict=True)]
    return [x if x is None else x.view(*output.shape, *x.shape[1:]) for x in found]


def gradients(
    output: Tensor, inputs: Sequence[Tensor], cotangent: Tensor, batched: bool = False
) -> Gradients:
    """Gradients of an output, which keeps its graph; with ``batched``, for several cotangents at once.

    Hooks of leaves do not run: they are for what is added to ``.grad``.

    Raises:
        NoGraphError: the graph was freed by an earlier backward pass.
    """
    if not inputs:
        return []
    with without_hooks([t for t in inputs if t.is_leaf]), keeping_grads(inputs):
        try:
            found = torch.autograd.grad(
                output,
                list(inputs),
                cotangent,
                retain_graph=True,
                allow_unused=True,
                is_grads_batched=batched,
            )
        except RuntimeError as error:
            known = graph_error(error)
            if known is None:
                raise
            raise known from error
    return [g if g is None else g.to_dense() if g.is_sparse else g for g in found]


@contextmanager
def keeping_grads(tensors: Sequence[Tensor]) -> Iterator[None]:
    """A context that leaves ``.grad`` of tensors with ``retain_grad()`` as it was."""
    held = [(t, t.grad) for t in tensors if t.retains_grad]
    for t, _ in held:
        t.grad = None
    try:
        yield
    finally:
        for t, grad in held:
            t.grad = grad


def _batched(output: Tensor, inputs: Sequence[Tensor], chunk: int) -> list[Tensor | None] | None:
    """Rows by several cotangents at once; None where some op cannot take them."""
    try:
        each = [gradients(output, inputs, cotangents, batched=True) for cotangents in _one_hot(output, chunk)]
    except NoGraphError:
        raise
    except RuntimeError:
        return None
    return [
        None if column[0] is None else torch.cat([x for x in column if x is not None])
        for column in zip(*each, strict=True)
    ]


def _add_up(output: Tensor, inputs: Sequence[Tensor], found: Gradients) -> bool:
    """Whether a random sum of rows equals an ordinary backward pass; some batching rules are wrong."""
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(output.numel(), generator=generator, dtype=torch.float64).to(output)
    wanted = gradients(output, inputs, v.view_as(output))
    return all(
        float((torch.tensordot(v.to(x), x, 1) - want).norm())
        <= tolerance(as_real(x).dtype) * float(want.norm())
        for x, want in zip(found, wanted, strict=True)
        if x is not None and want is not None
    )


def _one_hot(output: Tensor, chunk: int) -> Iterator[Tensor]:
    """Cotangents that select one entry each, ``[n, *output.shape]``, ``n`` at most ``chunk``."""
    m = output.numel()
    for start in range(0, m, chunk):
        n = min(chunk, m - start)
        cotangents = torch.zeros(n, m, dtype=output.dtype, device=output.device)
        cotangents.view(-1)[start :: m + 1][:n] = 1
        yield cotangents.view(n, *output.shape)


def _stack(column: Gradients) -> Tensor | None:
    """``[m, ...]``; autograd leaves out an input for every entry of an output or for none."""
    return torch.stack([x for x in column if x is not None]) if column[0] is not None else None
