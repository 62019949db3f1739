"""The parts of a graph of several tasks, an encoder and a head for each task, and one step of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gramjd import pytree
from gramjd.complexes import as_real
from gramjd.descent.jacobians import Inputs, jacobian_of, unique
from gramjd.descent.rows import gradients, keeping_grads
from gramjd.distributed import is_sharded
from gramjd.distributed.agreement import Statement, agree
from gramjd.distributed.ranks import Ranks
from gramjd.engine.analysis.reach import Reach, reach
from gramjd.engine.step import OVERFLOWED, Scaled
from gramjd.errors import NotCoveredError, NotFiniteError
from gramjd.internals import without_hooks
from gramjd.jacobian import Jacobian
from gramjd.jacobian.accumulate import accumulate
from gramjd.objectives import Weights, combined, weigh
from gramjd.rounding import own_precision


@dataclass(frozen=True)
class Parts:
    """The features, shared parameters and task parameters of several losses."""

    features: list[Tensor]
    shared: dict[str, Tensor]
    heads: list[dict[str, Tensor]]

    @staticmethod
    def of(losses: Sequence[Tensor], features: list[Tensor], shared: Inputs, tasks: Sequence[Inputs] | None
           ) -> Parts:  # fmt: skip
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
                if is_sharded(p):
                    raise TypeError(
                        f"A parameter of task {number}, of shape {list(p.shape)}, is sharded over ranks: "
                        "keep an Engine, created after sharding, in place of mtl_backward."
                    )
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
        _check_heads(beyond, heads)
        return Parts(features, trunk, heads)

    def leaves(self) -> list[Tensor]:
        """All leaves that get a gradient."""
        return [*self.shared.values(), *(p for head in self.heads for p in head.values())]

    def differentiate(self, total: Tensor) -> tuple[dict[int, tuple[Tensor, Tensor]], list[Tensor | None]]:
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

    def once(self, rows: Sequence[Tensor | None], weights: Tensor, retain_graph: bool) -> None:
        """The encoder's gradient by one backward pass, from what the features have of it."""
        pairs = [(f, row) for f, row in zip(self.features, rows, strict=True) if row is not None]
        cotangents = [torch.tensordot(weights.to(row), row, 1) for _, row in pairs]
        torch.autograd.backward(
            [f for f, _ in pairs], cotangents, retain_graph=retain_graph, inputs=list(self.shared.values())
        )


@dataclass(frozen=True)
class Part:
    """The losses of one process, and their gradients once they are computed."""

    parts: Parts
    total: Scaled  # [tasks]
    wrt: str
    own: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # heads' parameters and gradients
    rows: Sequence[Tensor | None] = ()  # [tasks, *feature.shape] of each feature
    jac: Jacobian | None = None  # of the shared parameters, where the Gramian is of these

    @own_precision
    def differentiated(self, chunk_size: int | None) -> Part:
        """Compute the gradients of the heads, the rows of the features and the Jacobian of the encoder."""
        if not bool(torch.isfinite(self.total.output.detach()).all()):
            raise NotFiniteError("The losses have NaN or infinite entries: their gradients are meaningless.")
        own, rows = self.parts.differentiate(self.total.output)
        jac, shared = None, self.parts.shared
        if self.wrt == "shared" and shared:
            y = combined(self.parts.features, rows)
            tensors, spec = pytree.flatten(shared)
            jac = jacobian_of(y, tensors, pytree.paths(shared), spec, None, chunk_size)
        return replace(self, own=own, rows=rows, jac=jac)

    @own_precision
    def step(self, weighting: Weights, retain_graph: bool, group: Any = None, averaged: bool = True
             ) -> Tensor:  # fmt: skip
        """Compute the weights and all gradients, then add these to ``.grad``."""
        gramian = self._gramian(group)
        if not bool(torch.isfinite(gramian).all()):
            raise NotFiniteError(OVERFLOWED)
        weights = weigh(weighting, gramian, (len(self.total.output),), scale=self.total.scale)
        times = Ranks.of(group, gramian.device).size if group is not None and averaged else 1
        taken = [g if times == 1 else times * g for _, g in self.own.values()]
        accumulate([p for p, _ in self.own.values()], taken)
        if self.jac is not None:
            self.jac.backward(times * weights.to(self.jac.dtype))
        elif self.parts.shared:
            self.parts.once(self.rows, times * weights, retain_graph)
        return weights

    def _gramian(self, group: Any) -> Tensor:
        """The Gramian ``[tasks, tasks]``, with a group that of the sums over ranks."""
        tasks, jac = len(self.total.output), self.jac
        mine = _of_rows(self.rows, tasks) if jac is None else None
        if group is not None:
            ranks = Ranks.of(group, self.total.output.device)
            dtype = None if mine is None else str(mine.dtype)
            agree(
                ranks, Statement({"number of tasks": tasks, "wrt": self.wrt, "dtype of the Gramian": dtype})
            )
            if mine is not None:  # the features of all ranks lie side by side in a row
                return torch.stack(ranks.gather(mine)).sum(0).to(mine.device)
        if jac is None:
            assert mine is not None
            return mine
        found: Tensor = jac.gramian(group=group)
        return found


def _by_number(part: Reach) -> dict[str, Tensor]:
    return {str(n): p for n, p in enumerate(part.leaves.values())}


def _check_heads(beyond: Sequence[Reach], heads: Sequence[dict[str, Tensor]]) -> None:
    """Raise for a parameter that is listed for other tasks than those whose losses it is in."""
    listed = {id(p): (name, p) for head in heads for name, p in head.items()}
    for n, (name, p) in listed.items():
        mine = [task for task, head in enumerate(heads) if any(p is other for other in head.values())]
        uses = [task for task, part in enumerate(beyond) if n in part.leaves]
        if uses and not set(uses) & set(mine):
            raise ValueError(
                f"Parameter {name!r}, of shape {list(p.shape)}, is listed for task {mine[0]}, whose loss "
                f"does not depend on it, as loss {uses[0]} does. List tasks= in the order of the losses."
            )


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
