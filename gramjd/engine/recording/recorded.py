"""The data of a node in the graph: an op that received a parameter, or a call of a whole module."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress, count
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from gramjd import pytree
from gramjd.engine.analysis.derivatives import edge_to_input, gradient_op, is_gradient
from gramjd.engine.recording.nodes import NODE_TYPE, Cotangents, attach
from gramjd.internals import after_backward, autocasts, has_plain_layout
from gramjd.rules import tensors_of
from gramjd.uses.use import Record, describe

HOOK = "a hook on a tensor"

_REQUIRES_GRAD = attrgetter("requires_grad")
_NUMBERS = count()  # of marks, in the order of the forward


@dataclass(frozen=True)
class Replay:
    """The data that the replay of a fused op needs besides its arguments."""

    rng_state: Tensor | None  # of the CPU before the op, if it drew random numbers
    sizes: tuple[tuple[int, ...], ...]  # of its arguments, which tell how many steps there are


@dataclass(frozen=True)
class OpMark:
    """A use; the node saves the values that its rules read, the tensors of its slots.

    That of an op that will be replayed saves its (live) outputs, too.
    """

    number: int
    record: Record
    live: tuple[bool, ...]  # which outputs require gradients, and so have a tap
    batch_independent: bool  # are all arguments the same for all samples?
    replay: Replay | None = None
    lost: str = ""  # why its blocks cannot follow from it
    arguments: tuple[Any, ...] = ()  # the nodes of autograd's graph that computed the op's arguments
    hooks: Sequence[str] = ()  # that its forward put on tensors, also later ones

    def follow(self, node: Any, grads: Cotangents) -> None:
        """A graph is made of the gradients of the use: where they use the parameter, they get a node, too."""
        node.differentiated, first = True, not node.differentiated
        if first and not (self.lost or self.replay or node.hooked):
            node.followed = _follow(node, self)
        if node.followed:
            node.received = grads[0]
            after_backward(lambda: setattr(node, "received", None))  # it refers to the node by its graph

    @property
    def signature(self) -> Hashable:
        """A key that is equal for the same op with the same settings and parameters in the same places."""
        kind = self.record.derived, self.batch_independent, self.live, self.lost, self.replay is not None
        return self.record.signature, kind


@dataclass(frozen=True)
class CallMark:
    """A module call; the node saves its tensor arguments, its parameters, its (live) outputs."""

    number: int
    module: nn.Module
    names: tuple[str, ...]  # of the parameters that it answers for
    parameters: tuple[Tensor, ...]
    leaves: tuple[Any, ...]  # of (args, kwargs), placeholders for tensors
    spec: pytree.PyTreeSpec
    live: tuple[bool, ...]  # which output tensors require gradients
    arguments: tuple[Any, ...]  # the nodes of autograd's graph that computed its arguments
    rng_state: Tensor | None  # of the CPU, before the call
    autocasts: dict[str, torch.dtype]  # that it ran under, by type of device

    def follow(self, node: Any, grads: Cotangents) -> None:
        """A graph is made of the gradients of the call, which no op shows."""
        node.differentiated = True

    @property
    def signature(self) -> Hashable:
        """A key that is equal for calls of the same module."""
        return ("call", id(self.module), self.names, tuple(self.autocasts.items()))


def computed_by(values: Iterable[Any]) -> tuple[Any, ...]:
    """The nodes of autograd's graph that computed some tensors; call it before an op writes into one."""
    found: list[Any] = []
    for value in values:
        if isinstance(value, Tensor):
            if value.grad_fn is not None:
                found.append(value.grad_fn)
        elif isinstance(value, (list, tuple)):
            found += computed_by(value)
    return tuple(found)


def mark_fused(record: Record, leaves: Sequence[Any], out: Any, rng_state: Tensor,
               arguments: tuple[Any, ...]) -> Any:  # fmt: skip
    """The output of an op that has only a decomposition, with a node to replay it from behind it.

    Args:
        record: of the call.
        leaves: of its arguments.
        out: what it returned.
        rng_state: of the CPU before the call.
        arguments: see :func:`computed_by`.
    """
    outs = tensors_of(out)
    live = [t for t in outs if t.requires_grad]
    saved = [leaves[i] for i in record.saved] + [leaves[slot.index] for slot in record.slots]
    state = None if torch.equal(rng_state, torch.get_rng_state()) else rng_state
    replay = Replay(state, tuple([tuple(t.shape) for t in saved]))
    mark = OpMark(next(_NUMBERS), record, tuple([t.requires_grad for t in outs]), False, replay,
                  arguments=arguments)  # fmt: skip
    return _replace_live(out, attach(mark, [*saved, *live], live))


def mark_op(record: Record, leaves: Sequence[Any], out: Any, arguments: tuple[Any, ...], inplace: bool,
            batch_independent: bool, lost: str = "", hooks: Sequence[str] = ()) -> Any:  # fmt: skip
    """The output of an op with a node for its record behind it."""
    outs = [out] if isinstance(out, Tensor) else tensors_of(out)
    live = tuple(map(_REQUIRES_GRAD, outs))
    saved = [*map(leaves.__getitem__, record.needed)]
    mark = OpMark(next(_NUMBERS), record, live, batch_independent, None, lost, arguments, hooks)
    marked = attach(mark, saved, [*compress(outs, live)], inplace)
    return marked[0] if isinstance(out, Tensor) else _replace_live(out, marked)


def lose(tensor: Tensor, cause: str) -> None:
    """Let the node behind a derived tensor say that not all uses of the tensor are known: it ``cause``."""
    node: Any = tensor.grad_fn
    if isinstance(node, NODE_TYPE) and isinstance(node.record, OpMark):
        origin = node.record.record.origin
        node.record = replace(node.record, lost=f"what {origin} computed {cause}")


def _follow(node: Any, mark: OpMark) -> bool:
    """Put a node behind the gradient of a use, if this gradient uses the parameter again."""
    found, count = gradient_op(mark.record), len(mark.record.saved)
    slots = _saved(node)[count:]
    edge = None if found is None else edge_to_input(node, set(mark.arguments), slots)
    if found is None or edge is None or not slots:
        return False
    (which, op), (inner, index) = found, edge
    reference = weakref.ref(node)  # autograd's own are out of the garbage collector's sight

    def replace_gradient(gradients: Sequence[Tensor | None], _: Any) -> tuple[Tensor | None, ...] | None:
        use, gradient = reference(), gradients[index]
        g = getattr(use, "received", None)
        if g is None or gradient is None:
            return None
        if not gradient.requires_grad or not torch.is_grad_enabled():
            return None
        tracked = next(iter(_saved(use)[count + which :]), None)
        if tracked is None or not is_gradient(op, g, tracked, gradient):
            return None
        sources = {id(tracked): mark.record.slots[which].source}
        record, leaves = describe(op, (g, tracked), {}, sources, False)
        if None in record.entries:
            return None
        marked = mark_op(record, leaves, gradient, computed_by((g,)), False, False)
        return (*gradients[:index], marked, *gradients[index + 1 :])

    inner.register_hook(replace_gradient)
    return True


def _saved(node: Any) -> list[Tensor]:
    """The tensors that a node saved; none, if one of them was written in place since."""
    try:
        return list(node.saved_tensors)
    except RuntimeError:
        return []


def mark_call(module: nn.Module, args: Any, kwargs: Any, out: Any, named: Mapping[str, Tensor],
              rng_state: Tensor | None = None) -> Any:  # fmt: skip
    """The output of a module call with a node for the call behind it; as it is without gradients.

    ``named`` are the parameters that the call answers for.
    """
    outs = tensors_of(out)
    live = [t for t in outs if t.requires_grad]
    if not live:
        return out
    leaves, spec = pytree.flatten((args, kwargs))
    static = tuple(pytree.PLACEHOLDER if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    names, parameters = tuple(named), tuple(named.values())
    mark = CallMark(next(_NUMBERS), module, names, parameters, static, spec,
                    tuple(map(_REQUIRES_GRAD, outs)), computed_by(tensors),
                    rng_state, autocasts())  # fmt: skip
    return _replace_live(out, attach(mark, [*tensors, *parameters, *live], live))


def is_markable(out: Any) -> bool:
    """Whether nodes can be put behind all tensors of an output that require gradients."""
    return all(has_plain_layout(t) for t in tensors_of(out) if t.requires_grad)


def is_marked(module: nn.Module, out: Any) -> bool:
    """Whether the output of this module call has a node for the call behind it."""
    marks = (getattr(t.grad_fn, "record", None) for t in tensors_of(out) if t.requires_grad)
    return any(isinstance(mark, CallMark) and mark.module is module for mark in marks)


def _replace_live(out: Any, marked: Sequence[Tensor]) -> Any:
    """The output with the tensors that require gradients replaced, in order."""
    if isinstance(out, Tensor):
        return marked[0]
    flat, spec = pytree.flatten(out)
    rest = iter(marked)
    return pytree.unflatten(spec, [next(rest) if _is_live(leaf) else leaf for leaf in flat])


def _is_live(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.requires_grad
