"""Modules and functions of ``torch.nn``: what they hold, what was compiled, what is inside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

# Parameters, buffers and children of a module, by name: for walks that every forward takes.
_Tensors = Mapping[str, Tensor | None]
held_by: Callable[[nn.Module], tuple[_Tensors, _Tensors, Mapping[str, nn.Module | None]]]
held_by = attrgetter("_parameters", "_buffers", "_modules")

# The class of all modules that normalise by statistics of the batch.
BatchNorm: Any = nn.modules.batchnorm._BatchNorm

# The fused recurrent ops, and the weights that ``weight_norm`` makes.
VF: Any = torch._VF
weight_norm_op: Callable[..., Tensor] = torch._weight_norm

# What ``torch.nn.functional.grouped_mm`` calls, where there is one.
grouped_mm_op: Callable[..., Tensor] | None = getattr(torch, "_grouped_mm", None)


# What a module calls that was compiled in place, by ``module.compile()``.
compiled_call: Callable[[nn.Module], Callable[..., Any] | None] = attrgetter("_compiled_call_impl")


def set_compiled_call(module: nn.Module, call: Callable[..., Any] | None) -> None:
    """Let a module call something else in its place."""
    module._compiled_call_impl = call


def plain_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a module by the code that was compiled."""
    return module._call_impl(*args, **kwargs)


def hides_ops(module: nn.Module) -> bool:
    """Whether a module is scripted or compiled."""
    compiled = "_orig_mod" in module._modules or module._compiled_call_impl is not None
    return compiled or isinstance(module, torch.jit.ScriptModule)


def original_of(module: nn.Module) -> nn.Module:
    """The module that ``torch.compile`` was given; itself, for any other."""
    found: nn.Module = getattr(module, "_orig_mod", module)
    return found


def name_in_original(name: str) -> str:
    """The name that a parameter of a module of ``torch.compile`` has in the original one."""
    return name.removeprefix("_orig_mod.")


def applied(module: nn.Module, function: Callable[[Tensor], Tensor]) -> nn.Module:
    """The module itself, its parameters and buffers replaced by what the function makes of them."""
    return module._apply(function)


def undispatched(func: Any) -> FunctionType:
    """A Python function of torch without its own ``__torch_function__`` dispatch: only its body."""
    space = {**func.__globals__, "has_torch_function": lambda *_: False}
    return FunctionType(func.__code__, space, func.__name__, func.__defaults__, func.__closure__)


def named_parameters(module: nn.Module, recurse: bool = True) -> Iterable[tuple[str, Tensor]]:
    """Yield the parameters of ``named_parameters`` in its order, each as often as a module holds it.

    Without its generators: every step asks.
    """
    if type(module).named_parameters is not nn.Module.named_parameters:
        return module.named_parameters(recurse=recurse)
    return _walk(module, recurse)[0]


def named_tensors(module: nn.Module) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    """Parameters and buffers of a module and all below it, each as often as one holds it."""
    kind = type(module)
    if kind.named_parameters is nn.Module.named_parameters and kind.named_buffers is nn.Module.named_buffers:
        return _walk(module, True)
    return list(module.named_parameters()), list(module.named_buffers())


def _walk(module: nn.Module, recurse: bool) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    found: tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]] = ([], [])
    stack, seen = [("", module)], set[int]()
    while stack:
        prefix, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        parameters, buffers, children = held_by(module)
        for held, into in zip((parameters, buffers), found, strict=True):
            for name, tensor in held.items():
                if tensor is not None:
                    into.append((prefix + name, tensor))
        for name, child in reversed(list(children.items())) if recurse else ():
            if child is not None:
                stack.append((f"{prefix}{name}.", child))
    return found
