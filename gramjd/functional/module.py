"""From an ``nn.Module`` to the pure per-sample function that the transforms take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gramjd import pytree
from gramjd.functional.guard import Guard, refuse_batch_statistics
from gramjd.internals import is_compiling


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
        own = dict(model.named_parameters())
        frozen = {name: p.detach() for name, p in own.items() if name not in parameters}
        held = {**frozen, **dict(model.named_buffers()), **parameters}

        def objectives() -> Any:
            output = torch.func.functional_call(model, held, args, kwargs)
            return output if loss is None else loss(output, *targets)

        if is_compiling():
            refuse_batch_statistics(model)
            return pytree.map(_only_sample, objectives())
        with Guard(model, {n: p for n, p in own.items() if n in parameters and p is not parameters[n]}):
            found = objectives()
        return pytree.map(_only_sample, found)

    return function, parameters


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
