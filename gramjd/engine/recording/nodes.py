"""Identity nodes: how a use leaves its mark in the user's own autograd graph.

A node holds what the use's blocks follow from and lives exactly as long as the graph. Beside each
output it has a *tap*, a leaf without storage of its own, whose gradient is the output's cotangent:
asking autograd for the gradients of taps runs the backward pass through activations alone. What becomes
of the cotangents then is up to the *sink* that the node has for the time of the pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from gramjd.internals import (
    innermost_transform,
    is_wrapped,
    leaf_of,
    node_type,
    outside_transforms,
    plain_apply,
    saved_tensors_hook,
)

Cotangents = list[Tensor | None]  # of the outputs of a node, [K, *y]


class Node(torch.autograd.Function):
    """The identity on the outputs of a use or of a module call."""

    @staticmethod
    def forward(ctx: Any, record: Any, saved: Sequence[Tensor], inplace: bool, *tensors: Tensor) -> Any:
        ctx.record = record
        ctx.sink = None
        ctx.differentiated = ctx.followed = False  # was a graph made of its gradients? see OpMark.follow
        ctx.received = None
        ctx.hooked, ctx.values = saved_tensors_hook() is not None, None
        # not parameters themselves: hooks on them would die with what torch 2.1 unpacks
        ctx.save_for_backward(*([t.detach() for t in saved] if ctx.hooked else saved))
        ctx.set_materialize_grads(False)
        outputs = tensors[: len(tensors) // 2]
        if inplace:
            ctx.mark_dirty(*outputs)
        else:  # not a view of its argument as far as autograd is concerned: users may write into it
            outputs = tuple(map(Tensor.detach, outputs))
        return outputs if len(outputs) > 1 else outputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():  # create_graph=True
            ctx.record.follow(ctx, grads)
        taps = (None,) * len(grads)
        if ctx.sink is not None:
            if ctx.hooked and ctx.values is None:
                ctx.values = ctx.saved_tensors  # outside of a backward pass, each would be computed anew
            taps = ctx.sink(
                ctx, [g if g is None or g.layout is torch.strided else g.to_dense() for g in grads]
            )
        return (None, None, None, *grads, *taps)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        outputs = tuple(t.view_as(t) for t in tangents[3 : 3 + (len(tangents) - 3) // 2])
        return outputs if len(outputs) > 1 else outputs[0]


_FIRST = itemgetter(0)
NODE_TYPE: Any = node_type(Node)
_APPLY = plain_apply(Node)


def attach(
    record: Any, saved: Sequence[Tensor], outputs: Sequence[Tensor], inplace: bool = False
) -> list[Tensor]:
    """The outputs with a node that holds ``record`` and ``saved`` behind them."""
    taps = []
    for t in outputs:
        strides = (0,) * t.ndim
        taps.append(torch.empty_strided(t.shape, strides, dtype=t.dtype, device=t.device, requires_grad=True))
    if innermost_transform() is None:
        found = _APPLY(record, saved, inplace, *outputs, *taps)
    else:  # a checkpoint is computed again under vmap
        with outside_transforms():
            apply = Node.apply if True in map(is_wrapped, outputs) else _APPLY
            found = apply(record, saved, inplace, *outputs, *taps)
    return [found] if isinstance(found, Tensor) else list(found)


def values_of(node: Any) -> list[Tensor]:
    """The values that a node saved, detached."""
    return [*map(Tensor.detach, node.saved_tensors if node.values is None else node.values)]


def forget(nodes: Sequence[Any]) -> None:
    """Give up what a backward pass computed again for a checkpoint."""
    for node in nodes:
        node.values = None


def taps_of(node: Any) -> list[Tensor]:
    """The taps of a node, one for each output."""
    edges = node.next_functions
    return [*map(leaf_of, map(_FIRST, edges[len(edges) // 2 :]))]
