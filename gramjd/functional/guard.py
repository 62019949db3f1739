"""Refuses modules that cannot be a pure function of their parameters and one sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gramjd.errors import CheckFailedError, NotSeparableError
from gramjd.internals import BatchNorm, base_of, held_by, unseen_by_modes
from gramjd.rules import tensors_of

_BATCH_NORMS = (F.batch_norm, torch.batch_norm)
COUNTED = frozenset({Tensor.add_, *_BATCH_NORMS})  # the ops that a guard is shown before they run
_PROPERTIES: Any = Tensor
# Of a tensor they give its values as constants, or none of them.
_CONSTANTS = {Tensor.detach, torch.detach, _PROPERTIES.data.__get__, _PROPERTIES.grad.__get__}

# Of tensors after the first one they take the shape, the dtype or the device.
_BY_FIRST = {"to", "type_as", "view_as", "reshape_as", "expand_as"}


class Guard:
    """Raises where a module reads its own parameters in place of the given ones, or statistics of the batch.

    Args:
        model: the module.
        replaced: the module's own parameters that are replaced by others.
    """

    def __init__(self, model: nn.Module, replaced: Mapping[str, Tensor]) -> None:
        self.model = model
        self.names = {id(p): name for name, p in replaced.items()}

    def before(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Raise if an op that is about to run takes or counts statistics of the batch."""
        if func is Tensor.add_:
            self._count(args[0])
        elif func in _BATCH_NORMS and (args[5] if len(args) > 5 else kwargs.get("training", False)):
            raise NotSeparableError(_batch_statistics(_layer(self.model, args, kwargs)))

    def after(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        """Raise if an op has received a parameter of the module's own."""
        given = args[:1] if getattr(func, "__name__", "") in _BY_FIRST else (*args, *kwargs.values())
        name, left = None, [*given]
        with unseen_by_modes():  # each question would be an op to those outside
            while left and name is None:
                value = left.pop()
                if isinstance(value, Tensor):
                    base = base_of(value)
                    name = self.names.get(id(value))
                    if name is None and base is not None and value.requires_grad:
                        name = self.names.get(id(base))
                elif isinstance(value, (list, tuple)):
                    left += value
        if name is not None and _depends(func, out):
            raise CheckFailedError(
                f"{type(self.model).__name__} reads its parameter {name!r} past torch.func.functional_call, "
                "from a list, a closure or another place that is no attribute of a module: it would be taken "
                "for a constant. Read it as an attribute (self.weight) in the forward, or use gramjd.Engine, "
                "which takes modules as they are."
            )

    def _count(self, written: Tensor) -> None:
        """Batch norm in training counts its batches first."""
        for name, module in self.model.named_modules() if written.dtype is torch.int64 else ():
            if _by_batch(module) and module.num_batches_tracked is written:
                raise NotSeparableError(_batch_statistics(f"{type(module).__name__} {name!r}"))


class GuardMode(TorchFunctionMode):
    """Shows a guard each op, where no other mode of ours does."""

    def __init__(self, guard: Guard) -> None:
        super().__init__()
        self.guard = guard

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in COUNTED:
            self.guard.before(func, args, kwargs)
        out = func(*args, **kwargs)
        self.guard.after(func, args, kwargs, out)
        return out


def refuse_batch_statistics(model: nn.Module) -> None:
    """Raise if a layer normalises by statistics of the batch, where calls cannot be watched."""
    for name, module in model.named_modules():
        if _by_batch(module):
            raise NotSeparableError(_batch_statistics(f"{type(module).__name__} {name!r}"))


def _depends(func: Any, out: Any) -> bool:
    """Whether the output of an op has a derivative with respect to a parameter that it received."""
    name = getattr(func, "__name__", "")
    if not torch.is_grad_enabled() or func in _CONSTANTS or name.endswith("_like") or name.startswith("new_"):
        return False
    return any(t.is_floating_point() or t.is_complex() for t in tensors_of(out))


def _by_batch(module: nn.Module) -> bool:
    return isinstance(module, BatchNorm) and (
        module.training or (module.running_mean is None and module.running_var is None)
    )


def _layer(model: nn.Module, args: Any, kwargs: Any) -> str:
    """The layer that a call of ``batch_norm`` is of, as far as its tensors tell."""
    given = {id(value) for value in (*args[1:], *kwargs.values()) if isinstance(value, Tensor)}
    layers = [(name, m) for name, m in model.named_modules() if _by_batch(m)]
    mine = [
        (name, m) for name, m in layers if given & {id(t) for held in held_by(m)[:2] for t in held.values()}
    ]
    for name, module in mine or layers:
        return f"{type(module).__name__} {name!r}"
    return "batch_norm(training=True)"


def _batch_statistics(layer: str) -> str:
    return (
        f"{layer} normalises by statistics of the batch, which a function of one sample has not: it is in "
        "training mode, or keeps no running statistics (track_running_stats=False). Call eval() on a layer "
        "that keeps some, use another normalisation (GroupNorm), or gramjd.Engine(model, batch_dim=None), "
        "which is exact for any computation."
    )
