"""Answers about a tensor: its kind, its memory, and the number of writes into it."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from gramjd.internals.tracing import is_compiling, is_dynamo_tracing
from gramjd.internals.transforms import inside_transform, is_wrapped

_TENSOR: Any = Tensor
_PLAIN_FUNCTIONS = (_TENSOR.__torch_function__.__func__, torch.nn.Parameter.__torch_function__)

# Is it a view of another tensor, as autograd sees it?
is_view: Callable[[Tensor], bool] = _TENSOR._is_view


# The base of a view; ``None`` for other tensors.
base_of: Callable[[Tensor], Tensor | None] = attrgetter("_base")


def has_stock_type(tensor: Tensor) -> bool:
    """Whether it is a tensor, a parameter, a buffer, or the fake tensor of one in a trace."""
    kind = type(tensor)
    return kind is Tensor or isinstance(tensor, (nn.Parameter, FakeTensor)) or kind.__name__ == "Buffer"


def sparse_values(tensor: Tensor) -> Tensor:
    """The entries that a sparse tensor has, which need not be in order."""
    values: Tensor = tensor._values()
    return values


def has_plain_layout(tensor: Tensor) -> bool:
    """Whether a tensor is strided, not nested, not sparse, and of no subclass that changes ops."""
    return _is_ordinary(type(tensor)) and tensor.layout is torch.strided and not tensor.is_nested


@functools.lru_cache(maxsize=1024)
def _is_ordinary(kind: type) -> bool:
    """Whether ops on this type are the ordinary ones; only the type of the result may differ."""
    function = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)  # type: ignore[attr-defined]
    dispatch = kind.__torch_dispatch__  # type: ignore[attr-defined]
    return function in _PLAIN_FUNCTIONS and dispatch is _TENSOR.__torch_dispatch__


def memory_of(tensor: Tensor) -> int:
    """A number that is equal for tensors that share memory."""
    return int(tensor.untyped_storage()._cdata)


def with_memory(tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors, with memory for zeros that autograd gave none (the gradient of ``sgn``)."""
    if True not in map(_TENSOR._is_zerotensor, tensors):
        return tensors
    return [torch.zeros_like(t) if t._is_zerotensor() else t for t in tensors]


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor has its own memory: it is no wrapper of a transform and of no subclass."""
    return type(tensor) is Tensor and not is_wrapped(tensor)


def in_forward_mode() -> bool:
    """Whether something differentiates in forward mode: a dual tensor looks like any other."""
    return bool(torch.autograd.forward_ad._current_level >= 0)


def is_ours(tensor: Tensor) -> bool:
    """Whether results may be changed in place: nothing traces, transforms or differentiates them."""
    if is_dynamo_tracing() or torch.autograd.forward_ad._current_level >= 0:  # asked often: few calls
        return False
    return type(tensor) is Tensor and not is_wrapped(tensor) and not tensor.requires_grad


# Does a mode see every op below autograd? How many do.
is_watched: Callable[[], int] = torch._C._len_torch_dispatch_stack

# Is one of torch's profilers recording, perhaps what is allocated, too?
is_profiled: Callable[[], bool] = torch._C._autograd._profiler_enabled


def runs_plainly(tensors: Sequence[Tensor]) -> bool:
    """Whether nothing traces, transforms, watches or records ops on these tensors."""
    if is_compiling() or inside_transform() or in_forward_mode():
        return False
    if is_watched() or torch._C._get_tracing_state() is not None:
        return False
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return False
    return not [t for t in tensors if type(t) not in (Tensor, torch.nn.Parameter) or t.is_meta]


def version_of(tensor: Tensor) -> int:
    """The number of writes into a tensor or its base; 0 if torch does not count them."""
    return 0 if is_dynamo_tracing() or tensor.is_inference() else tensor._version


def versions_of(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """The numbers of writes into several tensors; none where a graph is traced."""
    if is_compiling():
        return ()
    if True in map(Tensor.is_inference, tensors):
        return tuple(map(version_of, tensors))
    return tuple(map(_VERSION, tensors))


_VERSION: Callable[[Tensor], int] = attrgetter("_version")


def version_kept(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context in which marking a tensor as written does not count as a write."""
    autograd: Any = torch.autograd
    context: AbstractContextManager[Any] = autograd._unsafe_preserve_version_counter(tensor)
    return context


def value_of(flag: Tensor) -> bool | None:
    """The value of a flag that programs may branch on; ``None`` in transforms and while tracing."""
    if is_compiling() or inside_transform() or flag.is_meta:
        return None
    try:
        return bool(flag)
    except RuntimeError:  # a tracing or a fake tensor
        return None


# The hooks that are on a tensor, if there are any.
hooks_of: Callable[[Tensor], Any] = attrgetter("_backward_hooks")


@contextmanager
def without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    """A context in which gradients come to these tensors as they are: no hook of theirs runs."""
    held = [(hooks, dict(hooks)) for t in tensors if (hooks := hooks_of(t))]
    for hooks, _ in held:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, mine in held:
            hooks.update(mine)


@contextmanager
def taking_gradients(leaves: Sequence[Tensor], take: Callable[[int, Tensor], None]) -> Iterator[None]:
    """A context in which a backward pass gives the gradient of each leaf to ``take`` as soon as it is known.

    With the place of the leaf. In its place the pass returns zeros that take no memory, so that the gradients
    of all leaves are never there at the same time; sparse ones it returns as they are. The leaves must be
    without hooks, as in :func:`without_hooks`.
    """

    def hook(place: int, gradient: Tensor | None) -> Tensor | None:
        if gradient is None:  # as of views of a nested tensor
            return None
        take(place, gradient)
        return None if gradient.is_sparse else gradient.new_zeros(()).expand(gradient.shape)

    held = [(leaf, hooks_of(leaf)) for leaf in leaves]
    try:
        for place, (leaf, hooks) in enumerate(held):
            if hooks is None:
                leaf._backward_hooks = OrderedDict({0: partial(hook, place)})
            else:
                hooks[0] = partial(hook, place)
        yield
    finally:
        for leaf, hooks in held:
            if hooks is None:
                leaf._backward_hooks = None
            else:
                hooks.pop(0, None)
