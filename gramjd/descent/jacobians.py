"""``jac``: the Jacobian of any tensors with respect to any tensors."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn

from gramjd import gramians, pytree
from gramjd.blocks import Block, Dense
from gramjd.descent.rows import gradients, rows
from gramjd.distributed import is_sharded
from gramjd.engine import Engine
from gramjd.engine.analysis.reach import reach
from gramjd.engine.solving.compiled_code import refuse_unrepeatable
from gramjd.errors import NoGraphError, NotCoveredError, NotFiniteError, SlowPathWarning
from gramjd.jacobian import Jacobian, Output
from gramjd.objectives import Losses, combined, joined
from gramjd.pytree import PyTree

Inputs = Any  # a tensor, a module, or a mapping or iterable of these


# fmt: off
@overload
def jac(outputs: Losses, inputs: Tensor, *, jac_outputs: Losses | None = ..., batch_dim: int | None = ...,
        chunk_size: int | None = ...) -> Jacobian[Tensor, Tensor]: ...
@overload
def jac(outputs: Losses, inputs: nn.Module | Mapping[str, Tensor], *, jac_outputs: Losses | None = ...,
        batch_dim: int | None = ..., chunk_size: int | None = ...
        ) -> Jacobian[Tensor, dict[str, Tensor]]: ...
@overload
def jac(outputs: Losses, inputs: Iterable[Tensor], *, jac_outputs: Losses | None = ...,
        batch_dim: int | None = ..., chunk_size: int | None = ...
        ) -> Jacobian[Tensor, tuple[Tensor, ...]]: ...
@overload
def jac(outputs: Losses, inputs: Inputs, *, jac_outputs: Losses | None = ..., batch_dim: int | None = ...,
        chunk_size: int | None = ...) -> Jacobian: ...
# fmt: on


def jac(outputs: Losses, inputs: Inputs, *, jac_outputs: Losses | None = None, batch_dim: int | None = None,
        chunk_size: int | None = None) -> Jacobian[Tensor, Any]:  # fmt: skip
    """The Jacobian of any tensors with respect to any tensors of their graph: leaves or intermediate ones.

    For parameters of modules that the forward pass recorded (by an ``Engine``, or within
    ``with gramjd.record(...)``), it stores only factors. For all other tensors it stores the rows, ``[m, n]``
    numbers, and takes one backward pass for each of the ``m`` rows. ``J.gramian()``, ``J.vjp(w)`` and
    ``J.dense()`` work for both. ``J.backward(w)`` needs leaves.

    Args:
        outputs: the tensor to differentiate, or a list or tuple, as in :meth:`gramjd.Engine.compute_gramian`.
            The graph is kept.
        inputs: what to differentiate with respect to: a tensor, a module (its trainable parameters, by name),
            or a mapping or an iterable of these, each tensor once. Complex ones count as pairs of real ones.
        jac_outputs: cotangents ``[m, *output.shape]`` for each output, with the same ``m``. The rows of the
            Jacobian are then their products with that of the outputs, summed over the outputs. With the
            dense Jacobian of a later part of the graph, this is the chain rule.
        batch_dim: the dimension of the outputs that counts independent samples, as of ``Engine``. Pass it
            for many recorded losses: it saves a backward pass for each of them.
        chunk_size: how many rows one backward pass computes at once, where there are no factors. The default
            is one for up to 16 rows, and 64 for more, or one if an op has no batching rule.

    Returns:
        A :class:`gramjd.Jacobian` of the outputs, joined, whose parameters are structured like ``inputs``.

    Raises:
        NoGraphError: the outputs have no graph, or it was freed.
        NotCoveredError: they depend on no input.
        NotFiniteError: they have NaN or infinite entries.
        ValueError: an input does not require gradients, or is there twice; ``jac_outputs`` do not fit; the
            outputs are empty, or have no dimension ``batch_dim``.
        TypeError: outputs or inputs hold something else than tensors; an output is complex.

    Examples:
        >>> jac([y1, y2], params).dense()  # of each parameter [m, *p.shape], as torchjd.autojac.jac
        >>> h_rows = jac([y1, y2], h).dense()  # [m, *h.shape]
        >>> jac(h, params, jac_outputs=h_rows).gramian()  # [m, m]
    """
    tree = tree_of(inputs)
    tensors, spec = pytree.tensor_leaves(tree, "inputs")
    if jac_outputs is None:
        output = joined(outputs, batch_dim)
    elif batch_dim is None:
        output = combined(outputs, jac_outputs)
    else:
        raise ValueError("jac_outputs have cross-sample dependence: leave batch_dim out.")
    return jacobian_of(output, tensors, pytree.paths(tree), spec, batch_dim, chunk_size)


def tree_of(inputs: Inputs) -> PyTree:
    """The tensors of ``inputs``, in its structure; trainable parameters of modules by name."""
    if isinstance(inputs, nn.Module):
        return {name: p for name, p in inputs.named_parameters() if p.requires_grad}
    if isinstance(inputs, Mapping):
        return {key: tree_of(value) for key, value in inputs.items()}
    if isinstance(inputs, Iterable) and not isinstance(inputs, (Tensor, str)):
        return tuple(map(tree_of, inputs))
    return inputs


def unique(inputs: Inputs) -> dict[str, Tensor]:
    """The tensors of ``inputs``, each once, by name."""
    tree = tree_of(inputs)
    tensors, _ = pytree.tensor_leaves(tree, "The inputs")
    found: dict[int, tuple[str, Tensor]] = {}
    for name, t in zip(pytree.paths(tree), tensors, strict=True):
        found.setdefault(id(t), (name, t))
    return dict(found.values())


def jacobian_of(output: Tensor, tensors: Sequence[Tensor], names: Sequence[str], spec: Any,
                batch_dim: int | None, chunk_size: int | None = None) -> Jacobian:  # fmt: skip
    """The Jacobian of one output: of factors where there are some, of rows elsewhere."""
    _check_inputs(tensors, names)
    _check_output(output, batch_dim)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be positive, not {chunk_size}.")
    batch_dim = None if batch_dim is None else batch_dim % output.ndim
    found = reach([output])
    factored = {name: t for name, t in zip(names, tensors, strict=True) if id(t) in found.recorded}
    blocks = _factors(output, factored, batch_dim) if factored else {}
    rest = {name: t for name, t in zip(names, tensors, strict=True) if id(t) not in blocks}
    slow = [name for name, t in rest.items() if id(t) in found.leaves]
    if slow and batch_dim is not None and output.shape[batch_dim] > 1:
        _warn_of_rows(output, slow)
    inputs = list(rest.values())
    if inputs:
        refuse_unrepeatable(found.compiled, output, rest, partial(gradients, output, inputs))
    for t, values in zip(inputs, rows(output, inputs, chunk_size), strict=True):
        row = None if values is None else gramians.rows_first(values, batch_dim, output.ndim)
        blocks[id(t)] = [] if row is None else [Dense(row, origin="rows by autograd")]
    if not any(blocks.values()):
        raise NotCoveredError(
            f"The outputs depend on none of the inputs ({', '.join(names[:3]) or 'there are none'}). Compute "
            "them from these very tensors, with gradients enabled."
        )
    shape = Output(0, tuple(output.shape), batch_dim)
    mine = [blocks[id(t)] for t in tensors]
    return Jacobian.of(mine, tensors, spec, [shape], pytree.LEAF, shape.samples)


class _Holder(nn.Module):
    """Leaf tensors as the parameters of a module, which an engine takes."""

    def __init__(self, leaves: Mapping[str, Tensor]) -> None:
        super().__init__()
        held: dict[str, Any] = self._parameters  # as it is: names have dots, leaves need no nn.Parameter
        held.update(leaves)


def _factors(output: Tensor, leaves: Mapping[str, Tensor], batch_dim: int | None) -> dict[int, list[Block]]:
    """The blocks of recorded leaves, by id."""
    engine = Engine(_Holder(leaves), batch_dim=batch_dim)
    try:
        found = engine.jacobian(output)
    finally:
        engine.close()
    return {id(p): mine for p, mine in zip(found.parameters, found.blocks, strict=True)}


def _check_inputs(tensors: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raise unless these can be differentiated with respect to, each once."""
    seen: dict[int, str] = {}
    for name, t in zip(names, tensors, strict=True):
        name = name or "the input"
        if id(t) in seen:
            raise ValueError(f"{name} is the same tensor as {seen[id(t)]}: give each input once.")
        seen[id(t)] = name
        if not t.requires_grad:
            raise ValueError(
                f"{name}, of shape {list(t.shape)}, does not require gradients. Leave it out, or call "
                "requires_grad_() before the forward pass."
            )
        if is_sharded(t):
            raise TypeError(f"{name} is sharded over ranks: create an Engine after sharding, and keep it.")


def _check_output(output: Any, batch_dim: int | None) -> None:
    """Raise unless it has real, finite entries and a graph."""
    if not isinstance(output, Tensor):
        raise TypeError(f"Expected a tensor or a list of tensors, got a {type(output).__name__}.")
    if batch_dim is not None and not -output.ndim <= batch_dim < output.ndim:
        raise ValueError(
            f"batch_dim={batch_dim} is not a dimension of an output of shape {list(output.shape)}. Pass "
            "losses that still have their batch dimension (reduction='none'), or batch_dim=None."
        )
    if output.numel() == 0:
        raise ValueError(f"The output is empty (shape {list(output.shape)}): there is no objective.")
    if not output.is_floating_point():
        raise TypeError(f"The output must be of real floating-point numbers, not {output.dtype}.")
    if not output.requires_grad:
        raise NoGraphError(
            "The output has no autograd graph, so it has no Jacobian. Compute it with gradients enabled "
            "(not under torch.no_grad(), not detached)."
        )
    if not bool(torch.isfinite(output.detach()).all()):
        raise NotFiniteError(
            f"The output has NaN or infinite entries (shape {list(output.shape)}): their gradients are "
            "meaningless. Look for overflow, or for a division by zero, in the forward."
        )


def _warn_of_rows(output: Tensor, names: Sequence[str]) -> None:
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    warnings.warn(
        f"The Jacobian of parameter {names[0]!r}{more} is computed by {output.numel()} backward passes, "
        "which is exact but slow, because the forward pass was not recorded. Run it within "
        "`with gramjd.record(model):`, or keep an Engine.",
        SlowPathWarning,
        stacklevel=4,
    )
