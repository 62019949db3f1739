"""What a tensor is, whose memory it has and how often it was written."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from gramjd.internals.tracing import is_compiling
from gramjd.internals.transforms import inside_transform, is_wrapped

_TENSOR: Any = Tensor
_PLAIN_FUNCTIONS = (_TENSOR.__torch_function__.__func__, torch.nn.Parameter.__torch_function__)

# Is it a view of another tensor, as autograd sees it?
is_view: Callable[[Tensor], bool] = _TENSOR._is_view


def base_of(tensor: Tensor) -> Tensor | None:
    """What it is a view of, if it is one."""
    return tensor._base


def has_stock_type(tensor: Tensor) -> bool:
    """Is it a tensor, a parameter, a buffer, or one in the place of such while a program is traced?"""
    kind = type(tensor)
    return kind is Tensor or isinstance(tensor, (nn.Parameter, FakeTensor)) or kind.__name__ == "Buffer"


def sparse_values(tensor: Tensor) -> Tensor:
    """The entries that a sparse tensor has, which need not be in order."""
    values: Tensor = tensor._values()
    return values


def has_plain_layout(tensor: Tensor) -> bool:
    """Is it an ordinary strided tensor: not nested, not sparse, of no subclass that changes what ops do?"""
    return _is_ordinary(type(tensor)) and tensor.layout is torch.strided and not tensor.is_nested


@functools.lru_cache(maxsize=1024)
def _is_ordinary(kind: type) -> bool:
    """Are ops on tensors of this type those on any other, but perhaps for the type of what they return?"""
    function = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)  # type: ignore[attr-defined]
    dispatch = kind.__torch_dispatch__  # type: ignore[attr-defined]
    return function in _PLAIN_FUNCTIONS and dispatch is _TENSOR.__torch_dispatch__


def memory_of(tensor: Tensor) -> int:
    """The same for tensors that share memory."""
    return int(tensor.untyped_storage()._cdata)


def is_plain(tensor: Tensor) -> bool:
    """Has it memory of its own to look at: is it neither wrapped by a transform nor of a subclass?"""
    return type(tensor) is Tensor and not is_wrapped(tensor)


def is_ours(tensor: Tensor) -> bool:
    """May results made of it be written in place: does nothing trace, transform or differentiate it?"""
    if is_compiling() or torch.autograd.forward_ad._current_level >= 0:  # a dual tensor looks like any other
        return False
    return is_plain(tensor) and not tensor.requires_grad


def is_watched() -> bool:
    """Does a mode see every op below autograd?"""
    return bool(torch._C._len_torch_dispatch_stack())


def runs_plainly(tensors: Sequence[Tensor]) -> bool:
    """Are ops on these tensors what they seem: nothing traces, transforms, watches or records them?"""
    if is_compiling() or inside_transform() or torch.autograd.forward_ad._current_level >= 0:
        return False
    if is_watched() or torch._C._get_tracing_state() is not None:
        return False
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return False
    return all(type(t) in (Tensor, torch.nn.Parameter) and not t.is_meta for t in tensors)


def version_of(tensor: Tensor) -> int:
    """How often it, or what it is a view of, has been written in place; 0 where that is not counted."""
    return 0 if is_compiling() or tensor.is_inference() else tensor._version


def versions_of(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """The same of several; nothing where a graph is traced."""
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
    """What a flag is, where programs may branch on it; ``None`` in transforms and where tracing goes on."""
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
