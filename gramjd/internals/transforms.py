"""The transforms of ``torch.func`` in progress, and what tensors are inside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch import eager_transforms
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack

from gramjd.internals.tracing import constant_in_graphs, is_compiling


def inside_transform() -> bool:
    """Whether a transform of ``torch.func`` is in progress."""
    return _functorch.peek_interpreter_stack() is not None


def transform_level() -> int:
    """The number of the innermost transform of ``torch.func`` in progress; 0 where there is none."""
    innermost = _functorch.peek_interpreter_stack()
    return 0 if innermost is None else int(innermost.level())


# The transform of ``torch.func`` that is in progress, the innermost one, if there is one.
innermost_transform: Callable[[], Any] = _functorch.peek_interpreter_stack


def is_elsewhere(level: int) -> bool:
    """Whether the innermost transform has another number than this one (0: no transform)."""
    innermost = _functorch.peek_interpreter_stack()
    return bool(level) if innermost is None else innermost.level() != level


def outside_transforms() -> AbstractContextManager[Any]:
    """A context in which no transform is in progress."""
    return _NOTHING if _functorch.peek_interpreter_stack() is None else _popped()


_NOTHING = nullcontext()


@contextmanager
def _popped() -> Iterator[None]:
    with ExitStack() as stack:
        while inside_transform():
            stack.enter_context(temporarily_pop_interpreter_stack())
        yield


def differentiates() -> bool:
    """Whether transforms differentiate here; in older versions of torch, not in inference mode."""
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
    """The number of ``vmap`` levels in progress."""
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


def below_transforms(tensor: Tensor) -> Tensor:
    """The tensor inside wrappers of transforms: itself, if it has none."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def below_transform(tensors: Sequence[Tensor], level: int) -> list[Tensor]:
    """Tensors as they are outside the ``grad`` or ``vjp`` of this level: detached from it alone."""
    return [_functorch._unwrap_for_grad(tensor, level) for tensor in tensors]


def differentiable(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Wrap tensors as inputs of the ``grad`` or ``vjp`` in progress, as it wraps its own arguments."""
    level = innermost_level()
    before = _functorch.get_inplace_requires_grad_allowed()
    _functorch.set_inplace_requires_grad_allowed(True)
    try:
        return [_functorch._wrap_for_grad(tensor, level).requires_grad_() for tensor in tensors]
    finally:
        _functorch.set_inplace_requires_grad_allowed(before)


def zeros_that_require_gradients(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that the ``grad`` or ``vjp`` in progress differentiates by, as Dynamo can trace it."""
    found: Tensor = eager_transforms._create_differentiable(torch.zeros(shape, dtype=dtype, device=device))
    return found


def gradients_in_graphs(outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
                        ) -> Sequence[Tensor]:  # fmt: skip
    """Gradients inside the ``grad`` or ``vjp`` in progress, as Dynamo can trace it; zeros for none."""
    found: Sequence[Tensor] = eager_transforms._autograd_grad(
        list(outputs), list(inputs), list(cotangents), retain_graph=True, create_graph=True
    )
    return found


@constant_in_graphs
def reached_in_graphs() -> tuple[bool, ...]:
    """Which inputs of the last :func:`gradients_in_graphs` that Dynamo traced the outputs depend on."""
    from torch._dispatch.python import enable_python_dispatcher
    from torch._dynamo.symbolic_convert import InstructionTranslator

    traced: Any = InstructionTranslator.current_tx().output
    grad = eager_transforms._autograd_grad
    last = next(node for node in reversed(traced.graph.nodes) if node.target is grad)
    outputs, inputs = ([node.meta["example_value"] for node in given] for given in last.args[:2])
    ends = [out for out in outputs if out.requires_grad]
    if not ends:
        return (False,) * len(inputs)
    with traced.fake_mode, enable_python_dispatcher():  # as Dynamo runs each op
        ones = [*map(torch.ones_like, ends)]
        found = torch.autograd.grad(ends, inputs, ones, retain_graph=True, allow_unused=True)
    return tuple([g is not None for g in found])


def depends_on_innermost_transform(tensor: Tensor) -> bool:
    """Whether ``tensor`` depends on what the innermost ``grad`` or ``vjp`` differentiates."""
    level = _functorch.peek_interpreter_stack().level()
    return _functorch.maybe_get_level(tensor) == level and tensor.requires_grad


def differentiated_outside(tensor: Tensor) -> bool:
    """Whether ``tensor`` may also be differentiated outside of the innermost ``grad`` or ``vjp``."""
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
    """Whether a tensor is wrapped at this level, that is, batched by the level's ``vmap``."""
    return bool(_functorch.maybe_get_level(tensor) == level)


# Is a tensor a wrapper of another one, as transforms make them?
is_wrapped: Callable[[Tensor], bool] = _functorch.is_functorch_wrapped_tensor


def stops_functions() -> bool:
    """Whether ``autograd.Function`` goes through a transform; cheaper than :func:`inside_transform`."""
    return bool(torch._C._are_functorch_transforms_active())


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


def without_batch(gradient: Tensor, level: int, size: int) -> Tensor:
    """A cotangent batched at this level → ``[size, ...]``."""
    found: Tensor = torch._remove_batch_dim(gradient, level, size, 0)
    return found


def outside_vmap(tensors: Sequence[Tensor], level: int, size: int) -> list[Tensor]:
    """Return tensors ``[size, ...]``, as the ``vmap`` of this level would return these tensors."""
    return [_functorch._remove_batch_dim(tensor, level, size, 0) for tensor in tensors]
