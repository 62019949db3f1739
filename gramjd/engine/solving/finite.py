"""Errors about NaN and infinity: they name the samples and the op that they come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gramjd.errors import NotFiniteError
from gramjd.internals import LEAF_TYPE, leaf_of, name_of, saved_value, sparse_values

# Ops whose derivatives are infinite, or undefined, where something is zero (or one, of inverse sines).
_POLES = ("Acos", "Acosh", "Asin", "Atan2", "Atanh", "Cdist", "CumprodBackward", "Digamma", "Div", "Erfinv",
          "LinalgVectorNorm", "Log", "Logit", "Norm", "Pow", "Prod", "Reciprocal", "Rsqrt", "Sqrt",
          "Std", "Xlogy")  # fmt: skip
_AT_ONE = ("Acos", "Acosh", "Asin", "Atanh", "Erfinv", "Logit")
_SHOWN = 8  # samples that an error lists


def of_output(output: Tensor, batch_dim: int | None) -> NotFiniteError:
    """The error for an output with entries that are not finite."""
    where = _samples(~torch.isfinite(output.detach()), batch_dim)
    return NotFiniteError(
        f"The output has NaN or infinite entries (shape {list(output.shape)}){where}: their gradients are "
        "meaningless. Look for overflow, or for a division by zero, in the forward."
    )


def of_gradient(output: Tensor, batch_dim: int | None) -> NotFiniteError:
    """The error for an output whose gradients are not finite; runs a backward pass to find the cause."""
    return NotFiniteError(
        f"The gradient of the output has NaN or infinite entries: {_cause(output, batch_dim)}"
    )


def of_gramian(gramian: Tensor, output: Tensor, batch_dim: int | None) -> NotFiniteError:
    """The error for a Gramian ``[*output.shape, *reversed(output.shape)]`` that is not finite."""
    order = [*range(output.ndim), *reversed(range(output.ndim, 2 * output.ndim))]
    norms = gramian.permute(order).reshape(output.numel(), output.numel()).diagonal().view(output.shape)
    where = _samples(~torch.isfinite(norms), batch_dim)
    return NotFiniteError(
        f"The Gramian of the output has NaN or infinite entries{where}: {_cause(output, batch_dim)}"
    )


def unexplained(what: str) -> NotFiniteError:
    """The error where ranks are in step, and none may run a backward pass of its own."""
    return NotFiniteError(f"The {what} of the output has NaN or infinite entries: {_OVERFLOW}")


_OVERFLOW = (
    "something overflowed in the backward pass, or it divides by zero. Under a GradScaler overflow happens "
    "in ordinary training: skip the step and lower the scale, scaler.update(scaler.get_scale() / 2)."
)


def _cause(output: Tensor, batch_dim: int | None) -> str:
    """The op where NaN or infinity came up first in a backward pass of the sum, and what to do."""
    found = _first(output)
    if found is None:
        return _OVERFLOW.replace("something", "a product of gradients, or something").replace(
            ", or it divides by zero", ""
        )
    node, bad, dtype = found
    op = name_of(node).partition("Backward")[0]
    samples = None if batch_dim is None else output.shape[batch_dim]
    dims = [dim for dim, n in enumerate(bad.shape) if n == samples]
    where = _samples(bad, dims[0]) if dims else ""
    if op.startswith(_POLES) and _has_pole(node):
        return (
            f"the backward pass of {op}{where} divides by zero: its derivative is infinite, or undefined, "
            "there. Keep its argument away from that point, for instance (x + eps).sqrt(), or choose "
            "another value for it by torch.where before the op (after it, zero times infinity is NaN)."
        )
    return (
        f"the backward pass of {op}{where} overflowed {str(dtype).removeprefix('torch.')}. Under a GradScaler"
        " that happens in ordinary training: skip the step and lower the scale, "
        "scaler.update(scaler.get_scale() / 2). Otherwise lower the scale of the loss, or use a wider dtype."
    )


def _first(output: Tensor) -> tuple[Any, Tensor, torch.dtype] | None:
    """The first node that made finite gradients infinite, where it did, and in which dtype."""
    found: list[tuple[Any, Tensor, torch.dtype]] = []
    nodes = list(_nodes(output))

    def note(node: Any, grads: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> None:
        bad = _not_finite(grads)
        if not found and bad and not _not_finite(given):
            found.append((node, ~torch.isfinite(bad[0].detach()), bad[0].dtype))

    leaves = [leaf_of(node) for node in nodes if type(node) is LEAF_TYPE]
    handles = [node.register_hook(partial(note, node)) for node in nodes if type(node) is not LEAF_TYPE]
    try:
        torch.autograd.grad(output, leaves, torch.ones_like(output), retain_graph=True, allow_unused=True)
    except RuntimeError:  # a hook of the user's may refuse them
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _not_finite(gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """Those with entries that are not finite."""
    return [g for g in gradients if g is not None and not _is_finite(g)]


def _is_finite(gradient: Tensor) -> bool:
    values = sparse_values(gradient) if gradient.is_sparse else gradient
    return bool(torch.isfinite(values).all())


def _has_pole(node: Any) -> bool:
    """Whether a node saved a zero (an inverse sine and the like: a one) or an infinite result."""
    name = name_of(node)
    for attribute in ("self", "other", "result", "exponent", "x1"):
        try:
            saved = saved_value(node, attribute)
        except RuntimeError:  # freed
            return True
        if isinstance(saved, Tensor):
            poles = (saved == 0) | (saved.isinf() if attribute == "result" else saved.isnan())
            if bool((poles | (saved.abs() == 1) if name.startswith(_AT_ONE) else poles).any()):
                return True
    return name.startswith(("Cdist", "Std"))


def _nodes(output: Tensor) -> Iterator[Any]:
    stack: list[Any] = [output.grad_fn]
    seen = set(stack)
    while stack:
        node = stack.pop()
        yield node
        children = {child for child, _ in node.next_functions if child is not None} - seen
        seen |= children
        stack += children


def _samples(bad: Tensor, dim: int | None) -> str:
    """`` of samples 1, 5``: those that have a bad entry."""
    if dim is None or bad.ndim == 0:
        return ""
    which = bad.movedim(dim, 0).reshape(bad.shape[dim], -1).any(1).nonzero().flatten().tolist()
    if len(which) == bad.shape[dim]:
        return " of every sample"
    more = f" and {len(which) - _SHOWN} more" if len(which) > _SHOWN else ""
    listed = ", ".join(map(str, which[:_SHOWN])) + more
    return f" of sample{'s' if len(which) > 1 else ''} {listed}" if which else ""
