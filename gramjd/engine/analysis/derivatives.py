"""Uses in the gradients of a recorded op, where a graph is made of these (``create_graph=True``).

The gradient of ``F.linear(x, w)`` with respect to ``x`` is ``g @ w``: the weight is used once more, by an op
that autograd runs and no mode sees. Physics-informed losses, gradient penalties and forces are made of such.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gramjd import pytree
from gramjd.internals import LEAF_TYPE, leaf_of
from gramjd.rules.elementwise import MULS
from gramjd.rules.linear import ADDMMS, MATMULS
from gramjd.rules.registry import Op
from gramjd.uses.use import Record

# By op and tracked argument: the op that makes the other argument's gradient of the cotangent and that one.
_GRADIENTS: dict[tuple[Op, str], Op] = {
    (F.linear, "weight"): torch.matmul,
    **{(op, "other"): F.linear for op in MATMULS},
    **{(op, "mat2"): F.linear for op in ADDMMS},
    **{(op, name): torch.mul for op in MULS for name in ("input", "other")},
}


def gradient_op(record: Record) -> tuple[int, Op] | None:
    """The slot of a call that its gradient uses, and by which op; ``None`` where that is not known."""
    found = [
        (which, _GRADIENTS[record.call.op, str(slot.name)])
        for which, slot in enumerate(record.slots)
        if (record.call.op, str(slot.name)) in _GRADIENTS
    ]
    # one other tensor, whose gradient it is; that of a bias has another shape
    tracked = {slot.index for slot in record.slots}
    others = [
        name
        for index, (name, leaf) in enumerate(zip(record.call.names, record.leaves, strict=False))
        if leaf is pytree.PLACEHOLDER and index not in tracked and name != "bias"
    ]
    plain = len(others) == 1 and "alpha" not in record.call.names and not record.derived
    return found[0] if len(found) == 1 and plain else None


def is_gradient(op: Op, cotangent: Tensor, tracked: Tensor, gradient: Tensor) -> bool:
    """Whether the result of the op has the gradient's shape: nothing was broadcast or summed."""
    if cotangent.is_complex() or tracked.is_complex():  # the gradient has conjugates
        return False
    if op is torch.mul:
        return cotangent.shape == gradient.shape
    if tracked.ndim != 2 or cotangent.ndim < 2:
        return False
    size = tracked.shape[1 if op is torch.matmul else 0]
    return gradient.shape == (*cotangent.shape[:-1], size)


def edge_to_input(node: Any, arguments: set[Any], slots: list[Tensor]) -> tuple[Any, int] | None:
    """The edge by which autograd passes on the gradient of the only argument that is not tracked.

    Args:
        node: behind the op's output.
        arguments: what computed the op's arguments.
        slots: the tracked ones.

    Returns:
        An autograd node inside the op, and which of its results it is; ``None`` if that is not the only one.
    """
    tracked = {t.grad_fn for t in slots} | {None}
    ids = set(map(id, slots))
    stack = [child for child, _ in node.next_functions[: len(node.next_functions) // 2]]
    seen, found = set(stack), list[tuple[Any, int]]()
    while stack:
        inner = stack.pop()
        if inner in arguments or type(inner) is LEAF_TYPE:
            return None  # the op returned an argument as it was
        for index, (child, _) in enumerate(inner.next_functions):
            is_leaf = type(child) is LEAF_TYPE
            if child in tracked or (is_leaf and id(leaf_of(child)) in ids):
                continue
            if child in arguments or is_leaf:
                found.append((inner, index))
            elif child not in seen:
                seen.add(child)
                stack.append(child)
    return found[0] if len(found) == 1 else None
