"""LESS: how alike the gradient of a query and the step that Adam would take for a sample are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from gramjd import pytree
from gramjd.datasets.progress import batches_of
from gramjd.datasets.similarity import TopK, collected, divided, one_loss
from gramjd.jacobian import Jacobian
from gramjd.jacobian.lazy import check_parameters
from gramjd.pytree import PyTree


# fmt: off
@overload
def less(
    queries: Jacobian, jacobian: Callable[[PyTree], Jacobian], loader: Iterable[PyTree],
    optimizer: Optimizer, parameters: Mapping[str, Tensor], *, topk: None = None, progress: bool = ...,
) -> Tensor: ...
@overload
def less(
    queries: Jacobian, jacobian: Callable[[PyTree], Jacobian], loader: Iterable[PyTree],
    optimizer: Optimizer, parameters: Mapping[str, Tensor], *, topk: int, progress: bool = ...,
) -> TopK: ...
# fmt: on


def less(
    queries: Jacobian,
    jacobian: Callable[[PyTree], Jacobian],
    loader: Iterable[PyTree],
    optimizer: Optimizer,
    parameters: Mapping[str, Tensor],
    *,
    topk: int | None = None,
    progress: bool = True,
) -> Tensor | TopK:
    """Cosines of the gradients of queries with the steps of Adam for the samples of a dataset, exactly.

    ``cos(∇ℓ(query), Γ(sample))`` at one checkpoint, where ``Γ`` is the direction of the step that the
    optimizer would take if the gradient of this sample were its next one (LESS, Xia et al., arXiv
    2402.04333); several checkpoints are added up with their learning rates. ``Γ`` is no linear function of
    the gradient: gradients of one batch are formed, of one parameter at a time.

    Args:
        queries: the Jacobian of one tensor of losses, of any shape ``Q``.
        jacobian: from a batch to its Jacobian, of one loss for each sample.
        loader: an iterable of batches, read once.
        optimizer: ``torch.optim.Adam`` or ``AdamW`` with the state that it has at the checkpoint. It stays as
            it is.
        parameters: by the names that they have in the Jacobians, the tensors that the optimizer steps:
            ``dict(model.named_parameters())``.
        topk: return only so many largest cosines for each query.
        progress: show a bar after two seconds, if tqdm is installed.

    Returns:
        ``[*Q, N]`` on the CPU; with ``topk``, values and indices ``[*Q, topk]``.

    Raises:
        ValueError: the optimizer has no state for a parameter, or steps otherwise than plain Adam
            (``amsgrad``, ``maximize``, weight decay that is added to gradients); the Jacobians are of
            different parameters, of complex ones, or of outputs of other shapes; there are fewer samples
            than ``topk``.
        NotFiniteError: a cosine is NaN or infinite.
    """
    if len(queries.outputs.each) > 1:
        raise ValueError(f"The queries must be one tensor of losses, got {queries!r}.")
    moments = {name: _Moments.of(optimizer, parameters, name) for name in queries.names}

    def tiles() -> Iterator[Tensor]:
        with torch.no_grad():
            mine = {name: _rows(queries, name, len(queries.outputs.each[0].shape)) for name in queries.names}
        for batch in batches_of(loader, progress, "LESS"):
            jac = one_loss(jacobian(batch))
            check_parameters(queries, jac)
            with torch.no_grad():
                yield _cosines(mine, jac, moments).cpu()

    return collected(tiles(), topk)


def _cosines(queries: Mapping[str, Tensor], jac: Jacobian, moments: Mapping[str, _Moments]) -> Tensor:
    """``[*Q, n]`` with the samples of a batch."""
    products: list[Tensor] = []
    squares: list[Tensor] = []
    for name, mine in queries.items():
        steps = moments[name].step(_rows(jac, name, 1))  # [n, entries]
        products.append(mine @ steps.mT)
        squares.append(steps.square().sum(-1))
    lengths = torch.stack([mine.square().sum(-1) for mine in queries.values()]).sum(0).sqrt()
    return divided(torch.stack(products).sum(0), lengths[..., None] * torch.stack(squares).sum(0).sqrt())


def _rows(jac: Jacobian, name: str, ndim: int) -> Tensor:
    """``[*shape, entries]`` of one parameter."""
    (found,) = pytree.leaves(jac.select([name]).dense())
    rows: Tensor = found.detach()
    return rows.reshape(*rows.shape[:ndim], -1)


@dataclass(frozen=True)
class _Moments:
    """Adam's moments of a parameter."""

    first: Tensor  # flat, as the second
    second: Tensor
    steps: float  # that it has taken
    betas: tuple[float, float]
    eps: float

    @staticmethod
    def of(optimizer: Optimizer, parameters: Mapping[str, Tensor], name: str) -> _Moments:
        if name not in parameters:
            raise ValueError(f"parameters has no {name!r}, which the Jacobian of the queries is of.")
        p = parameters[name]
        if p.is_complex():
            raise ValueError(f"Parameter {name!r} is complex: less() is of real ones.")
        state = optimizer.state.get(p, {})
        if not {"exp_avg", "exp_avg_sq", "step"} <= set(state):
            raise ValueError(
                f"{type(optimizer).__name__} has no moments of parameter {name!r}: take the Adam or AdamW "
                "that trained it, with its state, and the very tensor that it steps."
            )
        group = next(g for g in optimizer.param_groups if any(q is p for q in g["params"]))
        decoupled = isinstance(optimizer, AdamW) or group.get("decoupled_weight_decay", False)
        added = 0 if decoupled else group["weight_decay"]
        odd = {"amsgrad": group["amsgrad"], "maximize": group["maximize"], "weight_decay": added}
        for option, value in odd.items():
            if value:
                raise ValueError(
                    f"Adam with {option}={value} steps otherwise than LESS assumes. Take one without it"
                    f"{', or AdamW' if option == 'weight_decay' else ''}."
                )
        first, second = (state[key].detach().clone().flatten() for key in ("exp_avg", "exp_avg_sq"))
        b1, b2 = map(float, group["betas"])
        return _Moments(first, second, float(state["step"]), (b1, b2), float(group["eps"]))

    def step(self, gradients: Tensor) -> Tensor:
        """``Γ`` for ``[n, entries]``, each of which would be the next gradient."""
        (b1, b2), t = self.betas, self.steps + 1
        first = (b1 * self.first + (1 - b1) * gradients) / (1 - b1**t)
        second = (b2 * self.second + (1 - b2) * gradients.square()) / (1 - b2**t)
        return first / (second.sqrt() + self.eps)
