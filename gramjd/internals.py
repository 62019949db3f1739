"""Questions that torch answers only in private; nothing else of ours touches its internals."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack

F = TypeVar("F", bound=Callable[..., Any])
_TENSOR: Any = Tensor
_PLAIN_FUNCTIONS = (_TENSOR.__torch_function__.__func__, torch.nn.Parameter.__torch_function__)
_CHECKPOINTS = torch.utils.checkpoint.__file__


def inside_transform() -> bool:
    """Is a transform of ``torch.func`` in progress?"""
    return _functorch.peek_interpreter_stack() is not None


def transform_level() -> int:
    """The number of the innermost transform of ``torch.func`` in progress; 0 where there is none."""
    innermost = _functorch.peek_interpreter_stack()
    return 0 if innermost is None else int(innermost.level())


# The transform of ``torch.func`` that is in progress, the innermost one, if there is one.
innermost_transform: Callable[[], Any] = _functorch.peek_interpreter_stack


def is_elsewhere(level: int) -> bool:
    """Is another transform the innermost one than the one of this number (0: none)?"""
    innermost = _functorch.peek_interpreter_stack()
    return bool(level) if innermost is None else innermost.level() != level


def below_transforms(tensor: Tensor) -> Tensor:
    """The tensor that wrappers of transforms stand for: itself, if it has none."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


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


@contextmanager
def outside_transforms() -> Iterator[None]:
    """A context in which no transform is in progress."""
    with ExitStack() as stack:
        while inside_transform():
            stack.enter_context(temporarily_pop_interpreter_stack())
        yield


def depends_on_innermost_transform(tensor: Tensor) -> bool:
    """Inside ``grad`` or ``vjp``: was ``tensor`` computed from what is being differentiated?"""
    level = _functorch.peek_interpreter_stack().level()
    return _functorch.maybe_get_level(tensor) == level and tensor.requires_grad


def constant_in_graphs(function: F) -> F:
    """Decorator, as ``torch.compiler.assume_constant_result``, but without the import that this costs."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def differentiates() -> bool:
    """Do transforms differentiate here? Those of older versions of torch give zeros in inference mode."""
    if is_compiling() or not torch.is_inference_mode_enabled():
        return True
    return bool(torch.func.grad(torch.sin)(torch.zeros(())))


@constant_in_graphs
def innermost_level() -> int:
    """The number of the innermost transform in progress."""
    level: int = _functorch.peek_interpreter_stack().level()
    return level


@constant_in_graphs
def vmaps_in_progress() -> int:
    """How many levels of ``vmap`` are in progress?"""
    return sum(transform.key() == _functorch.TransformType.Vmap for transform in _transforms())


def _transforms() -> list[Any]:
    """The transforms in progress, the outermost first."""
    if hasattr(_functorch, "get_interpreter_stack"):
        return _functorch.get_interpreter_stack() or []
    innermost: Any = _functorch.peek_interpreter_stack()  # all that torch 2.1 shows
    if innermost is None:
        return []
    with temporarily_pop_interpreter_stack():
        return [*_transforms(), innermost]


def below_transform(tensor: Tensor, level: int) -> Tensor:
    """``tensor`` as it is outside the ``grad`` or ``vjp`` of this level: detached from it alone."""
    below: Tensor = _functorch._unwrap_for_grad(tensor, level)
    return below


def differentiated_outside(tensor: Tensor) -> bool:
    """Inside ``grad`` or ``vjp``: may anything outside of it differentiate ``tensor`` once more?"""
    transforms = _transforms()
    if any(transform.key() == _functorch.TransformType.Jvp for transform in transforms):
        return True
    level = transforms[-1].level()
    while _functorch.is_functorch_wrapped_tensor(tensor):
        own = _functorch.maybe_get_level(tensor) == level
        if not own and _functorch.is_gradtrackingtensor(tensor) and tensor.requires_grad:
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return tensor.requires_grad


def belongs_to(tensor: Tensor, level: int) -> bool:
    """Is it wrapped at this level: batched by the ``vmap`` that the level is?"""
    return bool(_functorch.maybe_get_level(tensor) == level)


def tap(tensor: Tensor) -> tuple[Any, Tensor]:
    """What ``torch.autograd.grad`` takes for the tensor as it is now, and the tensor to go on with.

    Later writes into the latter do not change what the former stands for.
    """
    get_edge = getattr(torch.autograd.graph, "get_gradient_edge", None)
    if get_edge is None:  # torch 2.1
        return tensor, tensor.clone()
    return get_edge(tensor), tensor


def unfused_attention() -> AbstractContextManager[Any]:
    """A context in which attention is made of ordinary ops."""
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:  # torch 2.1
        context: Any = torch.backends.cuda.sdp_kernel(enable_flash=False, enable_mem_efficient=False)
        return context
    return sdpa_kernel(SDPBackend.MATH)


def batched_gradients_level() -> int:
    """The level at which ``autograd.grad(..., is_grads_batched=True)`` called here batches cotangents."""
    level: int = torch._C._vmapmode_increment_nesting()
    torch._C._vmapmode_decrement_nesting()
    return level


@contextmanager
def outside_batched_gradients() -> Iterator[None]:
    """A context in a backward pass of batched cotangents in which ops (random ones) are as elsewhere."""
    levels = torch._C._vmapmode_increment_nesting()  # in a thread of autograd's own they count from 0
    for _ in range(levels):
        torch._C._vmapmode_decrement_nesting()
    try:
        yield
    finally:
        for _ in range(levels - 1):
            torch._C._vmapmode_increment_nesting()


def unbatched(gradient: Tensor, level: int, size: int) -> Tensor:
    """A cotangent batched at this level → ``[size, ...]``."""
    found: Tensor = torch._remove_batch_dim(gradient, level, size, 0)
    return found


# Is ``torch.compile`` tracing this very code? The function itself: tracing knows what it returns.
is_compiling: Callable[[], bool] = getattr(torch.compiler, "is_compiling", None) or torch._utils.is_compiling


@contextmanager
def without_hooks(tensors: Sequence[Tensor]) -> Iterator[None]:
    """A context in which gradients come to these tensors as they are: no hook of theirs runs."""
    held = [(hooks, dict(hooks)) for t in tensors if (hooks := t._backward_hooks)]
    for hooks, _ in held:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, mine in held:
            hooks.update(mine)


def is_plain(tensor: Tensor) -> bool:
    """Has it memory of its own to look at: is it neither wrapped by a transform nor of a subclass?"""
    return type(tensor) is Tensor and not _functorch.is_functorch_wrapped_tensor(tensor)


def is_ours(tensor: Tensor) -> bool:
    """May results made of it be written in place: does nothing trace, transform or differentiate it?"""
    if is_compiling() or torch.autograd.forward_ad._current_level >= 0:  # a dual tensor looks like any other
        return False
    return is_plain(tensor) and not tensor.requires_grad


def runs_plainly(tensors: Sequence[Tensor]) -> bool:
    """Are ops on these tensors what they seem: nothing traces, transforms, watches or records them?"""
    if is_compiling() or inside_transform() or torch.autograd.forward_ad._current_level >= 0:
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return False
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return False
    return all(type(t) in (Tensor, torch.nn.Parameter) and not t.is_meta for t in tensors)


def version_of(tensor: Tensor) -> int:
    """How often it, or what it is a view of, has been written in place; 0 where that is not counted."""
    return 0 if is_compiling() or tensor.is_inference() else tensor._version


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


def innermost_mode() -> object:
    """The ``TorchFunctionMode`` on top of the stack."""
    return torch.overrides._get_current_function_mode()


def autocasts() -> dict[str, torch.dtype]:
    """The dtypes of the autocast contexts in progress, by type of device."""
    if hasattr(torch, "get_autocast_dtype"):
        return {d: torch.get_autocast_dtype(d) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)}
    found = {"cpu": torch.get_autocast_cpu_dtype()} if torch.is_autocast_cpu_enabled() else {}  # torch 2.1
    return {**found, "cuda": torch.get_autocast_gpu_dtype()} if torch.is_autocast_enabled() else found


def saved_tensors_hook() -> object:
    """What tells the innermost ``saved_tensors_hooks`` context (checkpointing, offloading), if there is one.

    On torch 2.1, which does not show them, that of checkpoints alone: it is the call in progress.
    """
    known: Any = torch._C._autograd
    if hasattr(known, "_top_saved_tensors_default_hooks"):
        top = known._top_saved_tensors_default_hooks(False)
        return None if top is None else top[0]
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name in ("checkpoint", "unpack_hook") and code.co_filename == _CHECKPOINTS:
            return id(frame)
        frame = frame.f_back
    return None


def after_backward(callback: Callable[[], None]) -> None:
    """Call something when the backward pass in progress is over."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def in_backward() -> bool:
    """Is autograd running a backward pass in this thread: is what a checkpoint left out computed again?"""
    return bool(torch._C._current_graph_task_id() != -1)


def saved_numbers(kind: type) -> tuple[str, ...]:
    """The attributes by which nodes of a type show what they saved and is no tensor."""
    names = [name for name in dir(kind) if name.startswith("_saved_")]
    return tuple([name for name in names if not hasattr(kind, f"_raw{name}")])


def is_torchs_own(kind: type) -> bool:
    """Is a type of node made from an ``autograd.Function`` that torch itself defines?"""
    function: Any = getattr(kind, "_forward_cls", None)
    return function is not None and function.__module__.partition(".")[0] == "torch"


def shapes_of(nodes: Iterable[Any]) -> list[list[tuple[int, ...]]] | None:
    """The shapes of what autograd nodes are the gradient functions of; ``None`` where torch cannot say."""
    found: list[list[tuple[int, ...]]] = []
    try:
        for node in nodes:  # every step comes by here for all of them: no call that can be spared
            metadata = node._input_metadata
            if len(metadata) == 1:
                found.append([tuple(metadata[0].shape)])
            else:
                found.append([tuple(output.shape) for output in metadata])
    except (AttributeError, RuntimeError):  # torch 2.1 has no metadata; shapes of nested tensors have symbols
        return None
    return found


def losses_of_stack(output: Tensor) -> list[Any] | None:
    """Where the losses enter a graph that ``torch.stack`` made an output of: an edge for each, or ``None``.

    For outputs that are no such stack, and on torch 2.1, no list.
    """
    node: Any = output.grad_fn
    if output.ndim != 1 or type(node).__name__ != "StackBackward0":
        return None
    make = getattr(torch.autograd.graph, "GradientEdge", None)
    if make is None:
        return None
    edges = [child and make(child, number) for child, number in node.next_functions]
    dtypes = {edge.node._input_metadata[edge.output_nr].dtype for edge in edges if edge is not None}
    return edges if dtypes == {output.dtype} else None
