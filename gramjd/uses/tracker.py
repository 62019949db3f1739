"""Watching ops: which of them receive a tracked tensor, and what is derived from it.

Both captures are trackers: :mod:`gramjd.functional.per_sample_mode` under ``vmap``,
:mod:`gramjd.engine.recording.recorder` in the user's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gramjd.internals import constant_in_graphs, undispatched
from gramjd.rules import tensors_of
from gramjd.uses.use import Derived, Record, Source

# Asked of tensors all the time; like most properties, they give no tensor. Modes answer them first of all.
QUESTIONS = (Tensor.dim, Tensor.size)

# Results differ from call to call: never derived, since their ops could not be called again.
_RANDOM = {"normal", "bernoulli", "multinomial", "poisson", "rrelu", "gumbel_softmax"}


class Tracker(TorchFunctionMode):
    """Watches every op; hands those that receive a tracked tensor to :meth:`record`.

    Tensors are recognised by identity; the tracker keeps those that it knows alive, so that no id
    is used twice, and is itself dropped when the forward ends.
    """

    def __init__(self, parameters: Iterable[Tensor], batch_independent: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.active = True
        self.sources: dict[int, Source] = {}
        self.known: dict[int, Tensor] = {}  # tracked and batch-independent tensors
        # batch-independent tensors, too, as far as the recorder around a checkpoint knows
        self.known_around: dict[int, Tensor] = {}
        self.add(parameters, batch_independent)

    def add(self, parameters: Iterable[Tensor], batch_independent: Iterable[Tensor]) -> None:
        """Track more parameters, and take more tensors for batch-independent."""
        for parameter in parameters:
            self.sources[id(parameter)] = self.known[id(parameter)] = parameter
        for tensor in batch_independent:
            self.known[id(tensor)] = tensor

    def record(self, op: Any, args: Any, kwargs: dict[str, Any], derived: bool) -> tuple[Any, Record | None]:
        """Call an op with a tracked argument: its output as the caller sees it, and the record."""
        raise NotImplementedError

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.active:
            return func(*args, **kwargs)
        if func is torch.einsum and len(args) == 2 and isinstance(args[1], (list, tuple)):
            args = (args[0], *args[1])  # one way to write it
        tracked, batch_independent, known = False, True, self.known
        # as in _classify: every op comes by here, and a call takes as long as all of this
        for value in (*args, *kwargs.values()) if kwargs else args:
            if isinstance(value, Tensor):
                if id(value) not in known:
                    batch_independent = False
                elif id(value) in self.sources:
                    tracked = True
            elif isinstance(value, (list, tuple)):
                inner = self._classify(value)
                tracked, batch_independent = tracked or inner[0], batch_independent and inner[1]
        if not tracked:
            out = func(*args, **kwargs)
            if batch_independent:
                self._remember(out)
            elif id(out) in self.known or self.known_around or func is Tensor.__setitem__:
                self._forget(args[0] if func is Tensor.__setitem__ else out)
            return out
        if func in _COMPOSITE and "out" not in kwargs:
            with self:
                return _COMPOSITE[func](*args, **kwargs)
        derived = batch_independent and not _is_random(func) and not is_inplace(func)
        out, record = self.record(func, args, kwargs, derived)
        if record is not None and record.derived:
            for output, tensor in enumerate(tensors_of(out)):
                self.sources[id(tensor)] = Derived(record, output)
                self.known[id(tensor)] = tensor
        elif not batch_independent:
            if id(out) in self.known or self.known_around or func is Tensor.__setitem__:
                self._forget(args[0] if func is Tensor.__setitem__ else out)
        elif record is None and not any(t.requires_grad for t in tensors_of(out)):
            self._remember(out)  # a comparison, an index, detached
        return out

    def _classify(self, values: Iterable[Any]) -> tuple[bool, bool]:
        """Whether a tracked tensor is among these leaves, and whether all tensors are batch-independent."""
        tracked, batch_independent = False, True
        for value in values:
            if isinstance(value, Tensor):
                if id(value) not in self.known:
                    batch_independent = False
                elif id(value) in self.sources:
                    tracked = True
            elif isinstance(value, (list, tuple)):
                inner = self._classify(value)
                tracked, batch_independent = tracked or inner[0], batch_independent and inner[1]
        return tracked, batch_independent

    def _remember(self, out: Any) -> None:
        """The results of ops on batch-independent tensors alone are batch-independent."""
        for tensor in [out] if isinstance(out, Tensor) else out if isinstance(out, (list, tuple)) else ():
            if isinstance(tensor, Tensor):
                self.known[id(tensor)] = tensor

    def _forget(self, written: Any) -> None:
        """A tensor that the batch was written into is batch-independent no more."""
        self.known_around.pop(id(written), None)
        if id(written) in self.known and id(written) not in self.sources:
            del self.known[id(written)]


@constant_in_graphs
def _is_random(func: Any) -> bool:
    """Whether the op draws random numbers, by its name."""
    name = getattr(func, "__name__", "").rstrip("_")
    return name in _RANDOM or name.startswith("rand") or "dropout" in name


@constant_in_graphs
def is_inplace(func: Any) -> bool:
    """Whether an op writes into its first argument."""
    name = getattr(func, "__name__", "")
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def first_argument(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The tensor that an op in place writes into: its first argument, by place or by one of torch's names."""
    if args:
        return args[0]
    return next((kwargs[name] for name in ("input", "tensor", "self") if name in kwargs), None)


def _kron(input: Tensor, other: Tensor) -> Tensor:
    """A Kronecker product as torch computes it."""
    rank = max(input.ndim, other.ndim)
    left, right = ([1] * (rank - t.ndim) + [*t.shape] for t in (input, other))
    input = input.reshape([n for size in left for n in (size, 1)])
    other = other.reshape([n for size in right for n in (1, size)])
    return (input * other).reshape([m * n for m, n in zip(left, right, strict=True)])


# Written in terms of ops that have rules: their bodies are followed, not the call itself.
_COMPOSITE: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: undispatched(F.multi_head_attention_forward),
    torch.kron: _kron,
    Tensor.kron: _kron,
}
