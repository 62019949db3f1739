"""Answers about tracers, modes and contexts in progress."""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

F = TypeVar("F", bound=Callable[..., Any])

# Is ``torch.compile`` tracing this very code? The function itself: tracing knows what it returns.
is_compiling: Callable[[], bool] = getattr(torch.compiler, "is_compiling", None) or torch._utils.is_compiling

# Does Dynamo trace this very code? Where nothing else that compiles matters: half the calls.
is_dynamo_tracing: Callable[[], bool] = getattr(torch.compiler, "is_dynamo_compiling", None) or is_compiling


def constant_in_graphs(function: F) -> F:
    """Decorator, as ``torch.compiler.assume_constant_result``, but without the import that this costs."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_graphs
def item_writes() -> int:
    """The number of writes of items in the graph that Dynamo traces; torch 2.14 shows modes none of them."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        translator = InstructionTranslator.current_tx()
    except AttributeError:  # something else compiles
        return 0
    return sum(node.target is operator.setitem for node in translator.output.graph.nodes)


class _Items(TorchFunctionMode):
    """Notes whether it is shown a write of items."""

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or func is torch.Tensor.__setitem__
        return func(*args, **(kwargs or {}))


def sees_item_writes() -> bool:
    """Whether modes are shown each write of items; those of torch 2.1 are not."""
    tensor, ids = torch.zeros(2, device="cpu"), torch.tensor([0, 1], device="cpu")
    with _Items() as mode:
        tensor[ids] = ids.to(tensor)
    return mode.seen


# A context in which no mode sees what is asked of tensors.
unseen_by_modes: Callable[[], AbstractContextManager[Any]] = torch._C.DisableTorchFunction


def innermost_mode() -> object:
    """The ``TorchFunctionMode`` on top of the stack."""
    return torch.overrides._get_current_function_mode()


def autocasts() -> dict[str, torch.dtype]:
    """The dtypes of the autocast contexts in progress, by type of device."""
    if hasattr(torch, "get_autocast_dtype"):
        return {d: torch.get_autocast_dtype(d) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)}
    found = {"cpu": torch.get_autocast_cpu_dtype()} if torch.is_autocast_cpu_enabled() else {}  # torch 2.1
    return {**found, "cuda": torch.get_autocast_gpu_dtype()} if torch.is_autocast_enabled() else found


def unfused_attention() -> AbstractContextManager[Any]:
    """A context in which attention is made of ordinary ops."""
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:  # torch 2.1
        context: Any = torch.backends.cuda.sdp_kernel(enable_flash=False, enable_mem_efficient=False)
        return context
    return sdpa_kernel(SDPBackend.MATH)
