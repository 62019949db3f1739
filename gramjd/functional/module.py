"""Makes the pure per-sample function that the transforms take from an ``nn.Module``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Concatenate, TypeVar, overload

import torch
from torch import Tensor, nn

from gramjd import pytree
from gramjd.functional.guard import Guard, GuardMode, refuse_batch_statistics
from gramjd.functional.per_sample_mode import PerSampleMode
from gramjd.internals import innermost_mode, is_compiling, named_tensors

Out = TypeVar("Out")


# fmt: off
@overload
def functional_loss(model: nn.Module, loss: Callable[..., Tensor]
                    ) -> tuple[Callable[Concatenate[dict[str, Tensor], ...], Tensor], dict[str, Tensor]]: ...
@overload
def functional_loss(model: nn.Module, loss: Callable[..., Out]
                    ) -> tuple[Callable[Concatenate[dict[str, Tensor], ...], Out], dict[str, Tensor]]: ...
@overload
def functional_loss(model: nn.Module, loss: None = None
                    ) -> tuple[Callable[Concatenate[dict[str, Tensor], ...], Any], dict[str, Tensor]]: ...
# fmt: on


def functional_loss(
    model: nn.Module, loss: Callable[..., Any] | None = None
) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    """The per-sample function of a model and a loss, and the parameters to call it with.

    Args:
        model: any module; its mode (training or evaluation) is read at every call. Frozen parameters
            and buffers are used as they are at the time of the call, and must not be written to.
        loss: ``loss(output, *targets)``, of a batch of one sample: a tensor (or a PyTree of tensors)
            whose first dimension, of size 1, is the batch, or a scalar. ``None``: the outputs are the
            objectives.

    Returns:
        ``(function, parameters)``. ``function(parameters, inputs, *targets)`` is a pure function of
        one sample: ``inputs`` without a batch dimension are the model's only argument, its positional
        arguments (a tuple or list), or its keyword arguments (a mapping), any of them PyTrees. The
        parameters are detached from the model, by name, each once if it is tied, the trainable ones
        alone.

    Raises:
        TypeError: the model is no module.
        ValueError: the model has no trainable parameter; or a loss kept its batch dimension, but
            not at size 1.
        CheckFailedError: when the function is called, the model (or the loss) reads a parameter from a list,
            a closure or another place that ``torch.func.functional_call`` does not replace.
        NotSeparableError: when the function is called, a batch norm uses statistics of the batch.

    Examples:
        >>> function, parameters = gramjd.functional_loss(model, nn.CrossEntropyLoss(reduction="none"))
        >>> J, losses = gramjd.jacobian_and_value(function)(parameters, inputs, labels)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"functional_loss takes a module, not a {type(model).__name__}.")
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(f"{type(model).__name__} has no parameter that requires gradients.")

    def function(parameters: Mapping[str, Tensor], inputs: Any, *targets: Any) -> Any:
        inputs, targets = pytree.map(_batch_of_one, inputs), pytree.map(_batch_of_one, targets)
        args: tuple[Any, ...] = (inputs,)
        kwargs: dict[str, Any] = {}
        if isinstance(inputs, Mapping):
            args, kwargs = (), dict(inputs)
        elif type(inputs) in (tuple, list):
            args = tuple(inputs)
        if is_compiling():
            refuse_batch_statistics(model)
            frozen = {n: p.detach() for n, p in model.named_parameters() if n not in parameters}
            held = {**frozen, **dict(model.named_buffers()), **parameters}
            output = torch.func.functional_call(model, held, args, kwargs)
            return pytree.map(_only_sample, output if loss is None else loss(output, *targets))
        held, replaced = _held(model, parameters)
        # a model that names its parameters itself may leave out names of tied ones
        renames = type(model).named_parameters is not nn.Module.named_parameters
        mode, guard = innermost_mode(), Guard(model, replaced)
        with mode.guarded(guard) if isinstance(mode, PerSampleMode) else GuardMode(guard):
            output = torch.func.functional_call(model, held, args, kwargs, tie_weights=renames)
            found = output if loss is None else loss(output, *targets)
        return pytree.map(_only_sample, found)

    return function, parameters


def _held(model: nn.Module, parameters: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors that replace those of a model, and the model's own parameters that are replaced, by name.

    Tied parameters are there by all their names, so that ``functional_call`` need not look for them.
    """
    own, buffers = named_tensors(model)
    given = {id(p): parameters[name] for name, p in reversed(own) if name in parameters}
    held = {**dict(buffers), **parameters}
    replaced = {}
    for name, p in own:
        other = parameters[name] if name in parameters else given.get(id(p))
        held[name] = p.detach() if other is None else other
        if other is not None and other is not p:
            replaced[name] = p
    return held, replaced


def _batch_of_one(leaf: Any) -> Any:
    return leaf.unsqueeze(0) if isinstance(leaf, Tensor) else leaf


def _only_sample(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or leaf.ndim == 0:
        return leaf
    if len(leaf) != 1:
        raise ValueError(
            f"The loss of a batch of one sample has shape {list(leaf.shape)}; its first dimension should "
            "be the batch, of size 1."
        )
    return leaf[0]
