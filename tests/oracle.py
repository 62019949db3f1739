"""The one oracle: the dense Jacobian by ordinary autograd, one entry of the output at a time."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from gramjd.internals import shapes_of

OLD = torch.__version__.startswith("2.1.")  # whose modes do not see all indexing

_NODE = torch.zeros(1, requires_grad=True).sum().grad_fn
needs_shapes = pytest.mark.skipif(
    shapes_of([_NODE]) is None,
    reason="torch 2.1 shows no shapes of nodes: layouts are measured in every call",
)


def dense_jacobian(output: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """``[m, n]``: gradients of every entry of ``output`` with respect to all trainable parameters."""
    trainable = [p for p in parameters if p.requires_grad]
    rows = []
    for entry in output.flatten():
        found = torch.autograd.grad(entry, trainable, retain_graph=True, allow_unused=True)
        pairs = zip(found, trainable, strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in pairs]))
    return torch.stack(rows)


def dense_gramian(output: Tensor, parameters: Iterable[Tensor]) -> Tensor:
    """``[*shape, *reversed(shape)]``, by definition: entry ``[i, j]`` mirrored in its second half."""
    jacobian = dense_jacobian(output, parameters)
    matrix = jacobian @ jacobian.T
    n = output.ndim
    both = matrix.reshape((*output.shape, *output.shape))
    return both.permute([*range(n), *reversed(range(n, 2 * n))])


def assert_close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    """Same shape and dtype, and equal to ``tolerance`` times the largest entry."""
    assert got.shape == want.shape and got.dtype == want.dtype
    scale = float(want.detach().abs().max()) or 1.0
    error = float((got.detach() - want.detach()).abs().max()) / scale
    assert error <= tolerance, f"relative error {error:.2e}"


def assert_symmetric(gramian: Tensor) -> None:
    """Exactly, in the generalized sense."""
    assert torch.equal(gramian, gramian.permute([*reversed(range(gramian.ndim))]))
