"""Function transforms in the style of ``torch.func``: a function in, a function out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from gramjd import pytree
from gramjd.capture import capture
from gramjd.jacobian import Jacobian, Output
from gramjd.pytree import PyTree

InDims = int | None | Sequence[PyTree]


def jacobian(
    func: Callable[..., PyTree],
    argnums: int = 0,
    in_dims: InDims = 0,
    *,
    randomness: str = "error",
    chunk_size: int | None = None,
) -> Callable[..., Jacobian]:
    """Transform a per-sample function into one that returns its lazy Jacobian over a batch.

    Args:
        func: a pure function of one sample, ``func(params, *sample) -> output``; parameters are any
            PyTree of tensors, the output any PyTree of tensors.
        argnums: position of the argument to differentiate with respect to. It is shared by all
            samples.
        in_dims: as in ``torch.func.vmap``, for the other arguments, in their order: which dimension
            of each is the batch; ``None`` for an argument that all samples share. A single number
            holds for all of them. ``None`` alone: there is no batch, and ``func`` is called once.
        randomness, chunk_size: as in ``torch.func.vmap``.

    Returns:
        A function of ``func``'s arguments, batched as ``in_dims`` says, that returns a
        :class:`~gramjd.jacobian.Jacobian`. An output of shape ``S`` per sample counts as an output
        ``[B, *S]`` there.

    Raises:
        TypeError: parameters or outputs hold something other than tensors.
        ValueError: batch sizes differ, or no argument is batched.
    """

    def transformed(*args: Any) -> Jacobian:
        params, params_spec = pytree.tensor_leaves(args[argnums], f"Argument {argnums}")
        others = [*args[:argnums], *args[argnums + 1 :]]
        leaves, spec = pytree.flatten(others)
        dims = [None] * len(leaves) if in_dims is None else _batch_dims(others, in_dims)
        where = [i for i, dim in enumerate(dims) if dim is not None]
        if in_dims is not None:
            _batch_size([leaves[i] for i in where], [dims[i] for i in where])
        out_spec = None

        def function(parameters: Sequence[Tensor], batch: Sequence[Tensor]) -> list[Tensor]:
            nonlocal out_spec
            inside = list(leaves)
            for i, value in zip(where, batch, strict=True):
                inside[i] = value
            full = list(pytree.unflatten(spec, inside))
            full.insert(argnums, pytree.unflatten(params_spec, list(parameters)))
            found, out_spec = pytree.tensor_leaves(func(*full), "The function's output")
            return found

        found = capture(
            function,
            params,
            [leaves[i].movedim(dims[i], 0) for i in where],
            unbatched=[x for i, x in enumerate(leaves) if isinstance(x, Tensor) and i not in where],
            randomness=randomness,
            chunk_size=chunk_size,
            shared=in_dims is None,
        )
        assert out_spec is not None
        outputs = _outputs(found.outputs, batched=in_dims is not None)
        samples = len(found.outputs[0])
        return Jacobian(found.blocks, params, params_spec, outputs, out_spec, samples)

    return transformed


def gramian(
    func: Callable[..., PyTree],
    argnums: int = 0,
    in_dims: InDims = 0,
    *,
    randomness: str = "error",
    chunk_size: int | None = None,
) -> Callable[..., PyTree]:
    """Transform a per-sample function into one that returns the Gramian of its Jacobian.

    The arguments are those of :func:`jacobian`.

    Returns:
        A function that returns ``G = J Jᵀ`` of shape ``[B, *S, *reversed(S), B]`` for a per-sample
        output of shape ``S``; for a PyTree of outputs, a PyTree of PyTrees.
    """
    lazy = jacobian(func, argnums, in_dims, randomness=randomness, chunk_size=chunk_size)
    return lambda *args: lazy(*args).gramian()


def _batch_dims(others: Sequence[PyTree], in_dims: int | Sequence[PyTree]) -> list[int | None]:
    """The batch dimension of every leaf of the arguments (``None`` for what is no tensor)."""
    if not isinstance(in_dims, int) and len(in_dims) != len(others):
        raise ValueError(
            f"in_dims has {len(in_dims)} entries for {len(others)} arguments besides the "
            "differentiated one; give one entry for each of these."
        )
    each = [in_dims] * len(others) if isinstance(in_dims, int) else in_dims
    dims: list[int | None] = []
    for arg, dim in zip(others, each, strict=True):
        leaves = pytree.leaves(arg)
        same = [dim] * len(leaves) if dim is None or isinstance(dim, int) else pytree.leaves(dim)
        if len(same) != len(leaves):
            raise ValueError(f"in_dims {dim!r} does not match the structure of its argument.")
        dims += [d if isinstance(x, Tensor) else None for x, d in zip(leaves, same, strict=True)]
    return dims


def _batch_size(tensors: Sequence[Tensor], dims: Sequence[int | None]) -> None:
    """Raise unless all batched tensors have one and the same, positive number of samples."""
    sizes = set()
    for tensor, dim in zip(tensors, dims, strict=True):
        assert dim is not None
        if not -tensor.ndim <= dim < tensor.ndim:
            raise ValueError(
                f"An argument of shape {list(tensor.shape)} has no batch dimension {dim}. Put None in "
                "in_dims for arguments that all samples share."
            )
        sizes.add(tensor.shape[dim])
    if not sizes:
        raise ValueError("No argument is batched. Pass in_dims=None if there is no batch.")
    if len(sizes) > 1:
        raise ValueError(f"The batched arguments disagree on the number of samples: {sorted(sizes)}.")
    if 0 in sizes:
        raise ValueError("The batch is empty: a Gramian needs at least one sample.")


def _outputs(values: Sequence[Tensor], batched: bool) -> list[Output]:
    """The rows that each output stands for: ``values`` are ``[B, *S]``, or ``[1, *S]`` unbatched."""
    outputs: list[Output] = []
    for value in values:
        start = outputs[-1].stop if outputs else 0
        shape = tuple(value.shape) if batched else tuple(value.shape[1:])
        outputs.append(Output(start, shape, 0 if batched else None))
    return outputs
