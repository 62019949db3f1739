"""``mtl_backward``: heads follow their own losses, what they share follows the weighted gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gramjd import pytree
from gramjd.complexes import as_real
from gramjd.descent.jacobians import Inputs, jacobian_of, unique
from gramjd.descent.rows import gradients, keeping_grads
from gramjd.engine.analysis.reach import Reach, reach
from gramjd.engine.step import OVERFLOWED, Scaled
from gramjd.errors import NotCoveredError, NotFiniteError
from gramjd.internals import without_hooks
from gramjd.jacobian.accumulate import accumulate
from gramjd.objectives import Losses, Weights, combined, weigh
from gramjd.rounding import own_precision


def mtl_backward(losses: Losses, features: Losses, weighting: Weights, *, shared: Inputs = None,
                 tasks: Sequence[Inputs] | None = None, wrt: str = "shared",
                 grad_tensors: Sequence[Tensor] | None = None, retain_graph: bool = False,
                 scaler: Any = None, chunk_size: int | None = None) -> Tensor:  # fmt: skip
    """A step of several tasks that share an encoder: each head by its own loss, the encoder by all of them.

    Adds to ``.grad`` of each task's own parameters the plain gradient of its loss, and to that of the shared
    ones ``Jᵀ w``, where ``J`` has a row for each task, and ``w`` are weights computed from ``J Jᵀ``. Costs
    a backward pass of each head, and of the encoder one for each task; with ``wrt="features"`` one
    altogether. In a forward pass that was recorded
    (:func:`gramjd.record`, an ``Engine``) the encoder's Jacobian is made of factors.

    Args:
        losses: of the tasks, scalars, in a list or one tensor ``[tasks]``.
        features: what the encoder gives the heads: a tensor, or several, of which a task may use some. All
            that the losses have in common goes through them.
        weighting: from the Gramian ``[tasks, tasks]`` to weights ``[tasks]``.
        shared: the encoder: modules, or tensors; by default all leaves that the features depend on. Frozen
            parameters of modules take no part.
        tasks: of each task its head, modules or tensors likewise; by default all leaves that its loss
            depends on by no feature. A parameter in several gets the sum of their gradients.
        wrt: what the Gramian is of: the ``"shared"`` parameters, or the ``"features"`` (MGDA-UB, an upper
            bound of their norms: Sener and Koltun, arXiv 1810.04650, Section 3.2).
        grad_tensors: for losses that are no scalars, their cotangents, as of ``torch.autograd.backward``.
        retain_graph: whether the encoder's part of the graph stays with ``wrt="features"``, as in ``torch``.
            The rest is kept until nobody holds the losses.
        scaler: a ``GradScaler``, as in :meth:`gramjd.Engine.backward`.
        chunk_size: as in :func:`gramjd.jac`.

    Returns:
        The weights ``[tasks]``, detached.

    Raises:
        NotCoveredError: features have no graph, or no loss depends on them.
        ValueError: a loss reaches shared parameters by something else than the features; parameters are
            shared and a task's; a feature is computed from another; losses are no scalars.
        NotFiniteError: losses or their Gramian have NaN or infinite entries.
        TypeError: the arguments hold something else than tensors.

    Examples:
        >>> features = encoder(input)
        >>> losses = [criterion(head(features), y) for head, y in zip(heads, targets)]
        >>> weights = gramjd.mtl_backward(losses, features, UPGradWeighting())
    """
    each = list(losses.unbind()) if isinstance(losses, Tensor) and losses.ndim else _listed(losses, "losses")
    found = _Tasks.of(each, _listed(features, "features"), shared, tasks)
    if wrt not in ("shared", "features"):
        raise ValueError(f"wrt must be 'shared' or 'features', not {wrt!r}.")
    total = Scaled.by(scaler, _contracted(each, grad_tensors))
    leaves = [*found.shared.values(), *(p for head in found.heads for p in head.values())]

    def together() -> Tensor:
        return found.step(total, weighting, wrt, chunk_size, retain_graph)

    weights: Tensor = total.attempt(together, lambda: leaves)
    return weights


def _listed(tensors: Any, what: str) -> list[Tensor]:
    """A list of tensors, none of them twice."""
    found = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    if not found:
        raise ValueError(f"There are no {what}.")
    for t in found:
        if not isinstance(t, Tensor):
            raise TypeError(f"{what} must be a tensor or a list of tensors, not of {type(t).__name__}.")
    if len({id(t) for t in found}) < len(found):
        raise ValueError(f"One of the {what} is given twice.")
    return found


def _contracted(losses: Sequence[Tensor], cotangents: Sequence[Tensor] | None) -> Tensor:
    """A scalar for each task, ``[tasks]``."""
    if cotangents is None:
        shapes = [list(loss.shape) for loss in losses if loss.ndim]
        if shapes:
            raise ValueError(
                f"The loss of a task is a scalar, but one has shape {shapes[0]}. Take its mean or sum, or "
                "pass grad_tensors."
            )
        with torch.enable_grad():
            return torch.stack(list(losses))
    if len(cotangents) != len(losses):
        raise ValueError(f"There are {len(cotangents)} grad_tensors for {len(losses)} losses.")
    with torch.enable_grad():
        pairs = zip(losses, cotangents, strict=True)
        return torch.cat([combined(loss, cotangent.unsqueeze(0)) for loss, cotangent in pairs])


@dataclass(frozen=True)
class _Tasks:
    """The features, shared parameters and task parameters of several losses."""

    features: list[Tensor]
    shared: dict[str, Tensor]
    heads: list[dict[str, Tensor]]

    @staticmethod
    def of(losses: Sequence[Tensor], features: list[Tensor], shared: Inputs, tasks: Sequence[Inputs] | None
           ) -> _Tasks:  # fmt: skip
        _check_features(features)
        beyond = [reach([loss], features) for loss in losses]
        if not any(part.met for part in beyond):
            raise NotCoveredError(
                "None of the losses depends on the features. Compute the losses from these very tensors, not "
                "from copies of them or from another forward pass."
            )
        trunk = _by_number(reach(features)) if shared is None else unique(shared)
        heads = [_by_number(part) for part in beyond] if tasks is None else [unique(task) for task in tasks]
        if len(heads) != len(losses):
            raise ValueError(f"There are tasks= for {len(heads)} losses, and {len(losses)} losses.")
        mine = {id(p): name for name, p in trunk.items()}
        for number, (part, head) in enumerate(zip(beyond, heads, strict=True)):
            for p in head.values():
                if id(p) in mine:
                    raise ValueError(
                        f"Parameter {mine[id(p)]!r}, of shape {list(p.shape)}, is shared, and task {number}'s"
                        " own. If a head takes it from the encoder by another tensor than the features, pass "
                        "that among them; else tell by shared= and tasks= whose it is."
                    )
            for p in part.leaves.values():
                if id(p) in mine:
                    raise ValueError(
                        f"Loss {number} depends on the shared parameter {mine[id(p)]!r}, of shape "
                        f"{list(p.shape)}, by something else than the features: its gradient would be "
                        "incomplete. Pass all tensors that heads take from the encoder as features."
                    )
        return _Tasks(features, trunk, heads)

    @own_precision
    def step(self, total: Scaled, weighting: Weights, wrt: str, chunk_size: int | None, retain_graph: bool
             ) -> Tensor:  # fmt: skip
        """Compute all gradients, then add them to ``.grad``."""
        if not bool(torch.isfinite(total.output.detach()).all()):
            raise NotFiniteError("The losses have NaN or infinite entries: their gradients are meaningless.")
        own, rows = self._heads(total.output)
        tasks = len(total.output)
        if wrt == "features" or not self.shared:
            gramian, jac = _of_rows(rows, tasks), None
        else:
            y = combined(self.features, rows)
            tensors, spec = pytree.flatten(self.shared)
            jac = jacobian_of(y, tensors, pytree.paths(self.shared), spec, None, chunk_size)
            gramian = jac.gramian()
        if not bool(torch.isfinite(gramian).all()):
            raise NotFiniteError(OVERFLOWED)
        weights = weigh(weighting, gramian, (tasks,), scale=total.scale)
        accumulate([p for p, _ in own.values()], [g for _, g in own.values()])
        if jac is not None:
            jac.backward(weights.to(jac.dtype))
        elif self.shared:
            self._once(rows, weights, retain_graph)
        return weights

    def _heads(self, total: Tensor) -> tuple[dict[int, tuple[Tensor, Tensor]], list[Tensor | None]]:
        """Gradients of heads, by id, and rows ``[tasks, *feature.shape]`` of each feature (none: zeros)."""
        own: dict[int, tuple[Tensor, Tensor]] = {}
        rows: list[list[Tensor | None]] = [[] for _ in self.features]
        for number, head in enumerate(self.heads):
            one_hot = torch.zeros_like(total.detach())
            one_hot[number] = 1
            leaves = list(head.values())
            # hooks of features run in the pass behind them
            with without_hooks(self.features), keeping_grads(self.features):
                found = gradients(total, [*leaves, *self.features], one_hot)
            for p, g in zip(leaves, found, strict=False):
                if g is not None:
                    own[id(p)] = (p, own[id(p)][1] + g if id(p) in own else g)
            for column, g in zip(rows, found[len(leaves) :], strict=True):
                column.append(g)
        return own, [_stacked(column, f) for column, f in zip(rows, self.features, strict=True)]

    def _once(self, rows: Sequence[Tensor | None], weights: Tensor, retain_graph: bool) -> None:
        """The encoder's gradient by one backward pass, from what the features have of it."""
        pairs = [(f, row) for f, row in zip(self.features, rows, strict=True) if row is not None]
        cotangents = [torch.tensordot(weights.to(row), row, 1) for _, row in pairs]
        torch.autograd.backward(
            [f for f, _ in pairs], cotangents, retain_graph=retain_graph, inputs=list(self.shared.values())
        )


def _by_number(part: Reach) -> dict[str, Tensor]:
    return {str(n): p for n, p in enumerate(part.leaves.values())}


def _check_features(features: Sequence[Tensor]) -> None:
    """Raise unless they depend on something, and none on another."""
    for number, feature in enumerate(features):
        if feature.grad_fn is None:
            raise NotCoveredError(
                f"Feature {number}, of shape {list(feature.shape)}, has no graph, so there is nothing in "
                "front of it to share. Pass what the encoder returned, computed with gradients enabled; "
                "where it is frozen, sum(losses).backward() trains the heads."
            )
        others = [f for f in features if f is not feature]
        inside = feature.grad_fn.next_functions
        if others and _leads_to(inside, others):
            raise ValueError(
                f"Feature {number} is computed from another one, so that its gradient would count twice. "
                "Pass the tensors that all heads start from."
            )


def _leads_to(edges: Sequence[tuple[Any, int]], others: Sequence[Tensor]) -> bool:
    ends = {(t.grad_fn, t.output_nr) for t in others}
    stack, seen = [edge for edge in edges if edge[0] is not None], set()
    while stack:
        edge = stack.pop()
        if edge in ends:
            return True
        if edge[0] not in seen:
            seen.add(edge[0])
            stack += [child for child in edge[0].next_functions if child[0] is not None]
    return False


def _stacked(column: Sequence[Tensor | None], feature: Tensor) -> Tensor | None:
    """``[tasks, *feature.shape]``, zeros for a task that does not use it; None if none does."""
    if all(g is None for g in column):
        return None
    return torch.stack([torch.zeros_like(feature) if g is None else g for g in column]).detach()


def _of_rows(rows: Sequence[Tensor | None], tasks: int) -> Tensor:
    """The Gramian of the features, at least in float32."""
    used = [row for row in rows if row is not None]
    flat = [as_real(row).flatten(1) for row in used]
    wide = [row.to(torch.promote_types(row.dtype, torch.float32)) for row in flat]
    total = sum((row @ row.T for row in wide[1:]), wide[0] @ wide[0].T)
    assert total.shape == (tasks, tasks)
    return (total + total.T) / 2
