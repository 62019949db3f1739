"""Arguments of a transformed function: what is differentiated, what is batched, what is shared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gramjd import pytree
from gramjd.internals import has_stock_type, is_compiling
from gramjd.pytree import PyTree, PyTreeSpec

InDims = int | None | Sequence[PyTree]


@dataclass(frozen=True)
class Arguments:
    """The leaves of one call's arguments, sorted."""

    parameters: list[Tensor]
    parameters_spec: PyTreeSpec
    batch: list[Tensor]  # [B, ...] each
    leaves: list[Any]  # of all arguments
    spec: PyTreeSpec  # of (args, values of kwargs), with the parameters' own positions empty
    keywords: list[str]
    where: list[int]  # the leaves that the batch replaces
    numbers: tuple[int, ...]  # the positions of the arguments that are differentiated
    single: bool  # is it one argument, or a tuple of them?

    @staticmethod
    def of(args: Sequence[Any], kwargs: Mapping[str, Any], argnums: tuple[int, ...], in_dims: InDims,
           single: bool) -> Arguments:  # fmt: skip
        """Sort the arguments of a call."""
        if not argnums or any(not -len(args) <= n < len(args) for n in argnums):
            raise ValueError(f"argnums {argnums} are not positions among {len(args)} positional arguments.")
        numbers = tuple(n % len(args) for n in argnums)
        if len(set(numbers)) < len(numbers):
            raise ValueError(f"argnums {argnums} name an argument twice.")
        if is_compiling():  # positions may be symbols: as such they are in no text and in no tuple
            numbers = tuple(next(i for i in range(len(args)) if i == n) for n in numbers)
            what = "The argument"
        else:
            what = f"Argument {argnums[0] if single else argnums}"
        chosen = args[numbers[0]] if single else tuple(args[n] for n in numbers)
        parameters, parameters_spec = pytree.tensor_leaves(chosen, what)
        _check_parameters(parameters, what)
        others = [() if n in numbers else arg for n, arg in enumerate(args)]
        leaves, spec = pytree.flatten((others, list(kwargs.values())))
        for leaf in leaves:
            if type(leaf) is not Tensor:
                _refuse_subclass(leaf)
        if is_compiling():  # an argument itself is recognised by its id, for which a graph would be guarded
            leaves = [leaf.view_as(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        dims: list[int | None] = [None] * len(leaves)
        if in_dims is not None:
            dims = _batch_dims(others, kwargs, numbers, in_dims)
            _check_batch_size(leaves, dims)
        where = [i for i, dim in enumerate(dims) if dim is not None]
        batch = [leaves[i].movedim(dims[i], 0) for i in where]
        keywords = list(kwargs)
        return Arguments(parameters, parameters_spec, batch, leaves, spec, keywords, where, numbers, single)

    def with_parameters(self, parameters: list[Tensor]) -> Arguments:
        """Replace the parameters."""
        return replace(self, parameters=parameters)

    def as_double(self) -> Arguments:
        """Convert all numbers to double precision."""

        def double(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
                return leaf
            return leaf.detach().to(torch.complex128 if leaf.is_complex() else torch.float64)

        parts = (list(map(double, part)) for part in (self.parameters, self.batch, self.leaves))
        parameters, batch, leaves = parts
        return replace(self, parameters=parameters, batch=batch, leaves=leaves)

    @property
    def batch_independent(self) -> list[Tensor]:
        """Tensors that all samples share, besides the parameters."""
        return [x for i, x in enumerate(self.leaves) if isinstance(x, Tensor) and i not in self.where]

    def of_sample(self, parameters: Sequence[Tensor], batch: Sequence[Tensor]
                  ) -> tuple[list[Any], dict[str, Any]]:  # fmt: skip
        """Positional and keyword arguments with these parameters and the tensors of one sample."""
        inside = list(self.leaves)
        for i, value in zip(self.where, batch, strict=True):
            inside[i] = value
        args, values = pytree.unflatten(self.spec, inside)
        chosen = pytree.unflatten(self.parameters_spec, list(parameters))
        for n, value in zip(self.numbers, [chosen] if self.single else chosen, strict=True):
            args[n] = value
        return args, dict(zip(self.keywords, values, strict=True))


def _batch_dims(others: Sequence[PyTree], kwargs: Mapping[str, Any], numbers: Sequence[int],
                in_dims: int | Sequence[PyTree]) -> list[int | None]:  # fmt: skip
    """The batch dimension of every leaf of the arguments (``None`` for what is no tensor)."""
    if isinstance(in_dims, int):
        each: Sequence[PyTree] = [None if n in numbers else in_dims for n in range(len(others))]
    else:
        each = in_dims
    if len(each) != len(others):
        raise ValueError(
            f"in_dims has {len(each)} entries for {len(others)} positional arguments; give one for "
            "each, None for those that are differentiated."
        )
    dims: list[int | None] = []
    for n, (arg, dim) in enumerate(zip(others, each, strict=True)):
        if n in numbers and dim is not None:
            raise ValueError(
                f"in_dims is {dim!r} for argument {n}, which is differentiated and so shared by all "
                "samples: its entry must be None."
            )
        if isinstance(arg, Tensor) and (dim is None or isinstance(dim, int)):
            dims.append(dim)
            continue
        try:
            found = pytree.prefix(dim, arg)
        except ValueError as error:
            raise ValueError(f"in_dims {dim!r} does not match the structure of its argument.") from error
        pairs = zip(pytree.leaves(arg), found, strict=True)
        dims += [d if isinstance(x, Tensor) else None for x, d in pairs]
    return dims + [0 if isinstance(x, Tensor) else None for x in pytree.leaves(list(kwargs.values()))]


def _check_batch_size(leaves: Sequence[Any], dims: Sequence[int | None]) -> None:
    """Raise unless all batched tensors have one and the same, positive number of samples."""
    sizes: list[int] = []  # compared, not hashed: a size that is hashed is a constant of a compiled graph
    for tensor, dim in zip(leaves, dims, strict=True):
        if dim is None:
            continue
        if not -tensor.ndim <= dim < tensor.ndim:
            raise ValueError(
                f"An argument of shape {list(tensor.shape)} has no batch dimension {dim}. Put None in "
                "in_dims for arguments that all samples share."
            )
        sizes.append(tensor.shape[dim])
    if not sizes:
        raise ValueError("No argument is batched. Pass in_dims=None if there is no batch.")
    if any(size != sizes[0] for size in sizes[1:]):
        raise ValueError(f"The batched arguments disagree on the number of samples: {sorted({*sizes})}.")
    if sizes[0] == 0:
        raise ValueError("The batch is empty: a Gramian needs at least one sample.")


def _check_parameters(parameters: Sequence[Tensor], what: str) -> None:
    """Raise unless there are tensors, of real or complex numbers, that products can be taken of."""
    if not parameters:
        raise ValueError(f"{what} holds no tensor to differentiate with respect to.")
    for p in parameters:
        if type(p) is not Tensor:
            _refuse_subclass(p)
        if not (p.is_floating_point() or p.is_complex()):
            raise TypeError(
                f"Cannot differentiate with respect to a tensor of {p.dtype}: parameters must be "
                "floating-point or complex tensors. Leave others out of the differentiated argument."
            )


def _refuse_subclass(value: Any) -> None:
    """Raise for tensors that have a behaviour of their own, which blocks would not respect."""
    if not isinstance(value, Tensor):
        return
    if not has_stock_type(value) or nn.parameter.is_lazy(value):
        raise TypeError(
            f"Arguments of a transform must be plain tensors, not {type(value).__name__}. Convert it, "
            "for instance with .to_local(), .to_dense() or .as_subclass(torch.Tensor)."
        )
