"""``backward``: a step of Jacobian descent without an engine to keep."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, overload

from torch import Tensor

from gramjd import pytree
from gramjd.descent.jacobians import Inputs, jacobian_of, unique
from gramjd.engine.analysis.reach import reach
from gramjd.engine.step import Scaled, Step, Weightings
from gramjd.errors import NoGraphError
from gramjd.jacobian.lazy import Groups, Per
from gramjd.objectives import Losses, Weights, joined


# fmt: off
@overload
def backward(losses: Losses, weighting: Weights, modules: Inputs = ..., *, batch_dim: int | None = ...,
             per: None = None, flat: bool = ..., inputs: Tensor | Iterable[Tensor] | None = ...,
             retain_graph: bool = ..., scaler: Any = ..., chunk_size: int | None = ...) -> Tensor: ...
@overload
def backward(losses: Losses, weighting: Weightings, modules: Inputs = ..., *, batch_dim: int | None = ...,
             per: Groups, flat: bool = ..., inputs: None = None, retain_graph: bool = ..., scaler: Any = ...,
             chunk_size: int | None = ...) -> dict[str, Tensor]: ...
@overload
def backward(losses: Losses, weighting: Weightings, modules: Inputs = ..., *, batch_dim: int | None = ...,
             per: Per, flat: bool = ..., inputs: Tensor | Iterable[Tensor] | None = ...,
             retain_graph: bool = ..., scaler: Any = ..., chunk_size: int | None = ...) -> Any: ...
# fmt: on


def backward(losses: Losses, weighting: Weightings, modules: Inputs = None, *, batch_dim: int | None = None,
             per: Per = None, flat: bool = False, inputs: Tensor | Iterable[Tensor] | None = None,
             retain_graph: bool = False, scaler: Any = None, chunk_size: int | None = None
             ) -> Any:  # fmt: skip
    """A step of Jacobian descent: Gramian, weights, and the weighted gradient added to ``.grad``.

    It replaces ``losses.mean().backward()``, and needs nothing before the forward pass. It then takes one
    backward pass for each loss, and memory for as many gradients: this is cheapest for a few task losses.
    For one loss per sample, run the forward pass within ``with gramjd.record(model):`` and pass
    ``batch_dim``: the Gramian is then made of factors, as by an :class:`gramjd.Engine`.

    Args:
        losses: a tensor of losses of any shape, or a list or tuple of tensors: all their entries, one after
            the other. With a ``batch_dim``, a list means the stack along a new last dimension (a new first
            one, if ``batch_dim`` is negative).
        weighting: a function from their Gramian to one weight for each, such as those of
            ``gramjd.weighting``.
        modules: the modules or tensors with respect to which the Gramian is computed. A tensor need not be a
            leaf: the output of an encoder may replace its parameters (MGDA-UB: Sener and Koltun, arXiv
            1810.04650). ``None``: all leaves of the losses' graph. All leaves get gradients in any case.
        batch_dim: the dimension of the losses that counts independent samples.
        per: groups of parameters with weights of their own, as in :meth:`gramjd.Engine.backward`.
        flat: whether the weighting takes ``[m, m]`` and returns ``[m]``, as TorchJD's do.
        inputs: the leaves that get gradients; all of them by default.
        retain_graph: whether the backward pass for the gradients keeps the graph, as in ``torch``. If the
            Gramian is of all leaves, no such pass runs, and the graph stays until you delete the losses.
        scaler: a ``GradScaler``, as in :meth:`gramjd.Engine.backward`.
        chunk_size: as in :func:`gramjd.jac`.

    Returns:
        The weights, shaped like the losses, detached; with ``per`` a dictionary of them by group.

    Raises:
        NoGraphError: the losses have no graph, or it was freed.
        NotCoveredError: they depend on none of the ``modules``; with ``per``, a leaf is in no group.
        NotFiniteError: losses or their Gramian have NaN or infinite entries.
        NotSeparableError: a recorded model has cross-sample dependence, which rules ``batch_dim`` out.
        TypeError, ValueError: the weights are no tensor, are not shaped like the losses, or not finite;
            arguments do not fit each other.

    Examples:
        >>> losses = [task_loss(model(input)) for task_loss in task_losses]
        >>> weights = gramjd.backward(losses, UPGradWeighting())
    """
    scaled = Scaled.by(scaler, joined(losses, batch_dim))
    output = scaled.output
    leaves = [inputs] if isinstance(inputs, Tensor) else inputs
    step = Step(weighting, per, flat, None if leaves is None else list(leaves), scaled.scale, retain_graph)
    named = _leaves(output) if modules is None else unique(modules)
    tensors, spec = pytree.flatten(named)

    def alone() -> Any:
        jac = jacobian_of(output, tensors, pytree.paths(named), spec, batch_dim, chunk_size)
        gramian = jac.gramian(per)
        return step.take(step.of_use(jac, output), gramian, output, output.shape, lambda weights: weights)

    return scaled.attempt(alone, lambda: reach([output]).leaves.values(), per)


def _leaves(output: Any) -> dict[str, Tensor]:
    if not isinstance(output, Tensor):
        raise TypeError(f"Expected a tensor or a list of tensors, got a {type(output).__name__}.")
    if not output.requires_grad:
        raise NoGraphError(
            "The losses have no autograd graph. Compute them with gradients enabled (not under "
            "torch.no_grad(), not detached)."
        )
    return {str(n): leaf for n, leaf in enumerate(reach([output]).leaves.values())}
