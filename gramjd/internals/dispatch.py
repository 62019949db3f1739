"""Ops below autograd: what runs, and what torch says of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gramjd.internals.tracing import is_dynamo_tracing

_CHANGING = ("data_dependent_output", "dynamic_output_shape", "inplace_view", "nondeterministic_seeded")
WITH_MEMORY = frozenset({"cpu", "cuda"})  # devices whose tensors are ordinary memory
_CHANGING_TAGS = frozenset(getattr(torch.Tag, name) for name in _CHANGING if hasattr(torch.Tag, name))

See = Callable[[Any, Sequence[Any], dict[str, Any], Any], None]


class SeenOps(TorchDispatchMode):
    """A mode that shows ``see`` each op, after it has run, with its arguments and its result."""

    def __init__(self, see: See) -> None:
        super().__init__()
        self.see = see

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = op(*args, **(kwargs or {}))
        self.see(op, args, kwargs or {}, found)
        return found


class SeenReads(TorchFunctionMode):
    """A mode that tells ``see`` of each function that reads the values of a tensor, but runs no op for it."""

    def __init__(self, see: Callable[[str], None]) -> None:
        super().__init__()
        self.see = see

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _READS:
            self.see(function.__name__)
        return function(*args, **(kwargs or {}))


_autocasts_on_cpu: Callable[[], bool] = (
    partial(torch.is_autocast_enabled, "cpu")
    if hasattr(torch, "get_autocast_dtype")
    else torch.is_autocast_cpu_enabled  # torch 2.1
)

_TENSOR: Any = Tensor
_READS = (Tensor.tolist, Tensor.numpy, _TENSOR.__array__, _TENSOR.__dlpack__)


def callable_of(op: Any) -> Callable[..., Any]:
    """An op without the Python method around it."""
    found: Callable[..., Any] = op._op
    return found


def is_fixed(op: Any, args: Sequence[Any]) -> bool:
    """Whether the result has a size that follows from the arguments' sizes, and is no number, nor random."""
    if not isinstance(op, torch._ops.OpOverload):  # of higher order: it takes functions
        return False
    if op is torch.ops.aten.index.Tensor:  # whose size depends on values if it is indexed by masks
        return all(index is None or index.dtype not in (torch.bool, torch.uint8) for index in args[1])
    return not _CHANGING_TAGS & set(op.tags)


def written(op: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that an op writes into."""
    for place, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs[argument.name] if argument.kwarg_only or place >= len(args) else args[place]
            yield from [value] if isinstance(value, Tensor) else value


def geometry(tensors: Sequence[Tensor | None]) -> tuple[Hashable, ...] | None:
    """Sizes, strides, dtypes and devices of tensors, which of them share memory, and where there is none.

    ``None`` where ops on them are not the same as on other tensors like these: something traces, transforms
    or differentiates them, or they are no ordinary strided tensors with memory on the CPU or a CUDA card.
    """
    if is_dynamo_tracing() or _functorch.peek_interpreter_stack() is not None:
        return None
    if torch.autograd.forward_ad._current_level >= 0 or torch._C._get_tracing_state() is not None:
        return None
    if torch.is_autocast_enabled() or _autocasts_on_cpu():
        return None
    grad, first = torch.is_grad_enabled(), dict[int, int]()
    found: list[Hashable] = []
    for n, t in enumerate(tensors):
        if t is None:
            found.append(None)
            continue
        if type(t) is not Tensor and type(t) is not torch.nn.Parameter:
            return None
        device = t.device
        if (grad and t.requires_grad) or t.layout is not torch.strided or device.type not in WITH_MEMORY:
            return None
        if _functorch.is_functorch_wrapped_tensor(t) or t.is_neg() or t.is_conj() or t.is_nested:
            return None
        memory = first.setdefault(t.untyped_storage().data_ptr(), n)
        found.append((t.shape, t.stride(), t.storage_offset(), t.dtype, device, memory))
    return tuple(found)
