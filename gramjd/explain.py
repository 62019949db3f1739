"""``explain``: what the Gramian of a model will cost and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from gramjd.engine import Engine
from gramjd.explanation import Explanation, explanation
from gramjd.jacobian import Jacobian
from gramjd.objectives import Losses, joined


def explain(target: Jacobian | nn.Module, *args: Any, batch_dim: int | None = 0,
            loss: Callable[[Any], Losses] | None = None, **kwargs: Any) -> Explanation:  # fmt: skip
    """Explain every use of every parameter: its op, block and plan, its operations and its memory.

    Args:
        target: a Jacobian, of :func:`gramjd.jacobian` or :meth:`gramjd.Engine.jacobian`; or a module.
        args, kwargs: the arguments of the module, which is called once.
        batch_dim: the batch dimension of the module's output, or of the loss, as for :class:`gramjd.Engine`.
        loss: a function from the module's output to a tensor of objectives, or a list of them. By default,
            the output itself is the objectives.

    Returns:
        An :class:`Explanation` to iterate over or to print. A bias with the plan ``with its weight`` uses the
        products of its weight, and needs none of its own.

    Raises:
        TypeError: ``target`` is something else, or a module's output is no tensor and ``loss`` is
            not given.
    """
    if isinstance(target, Jacobian):
        if args or kwargs or loss is not None:
            raise TypeError("A Jacobian is explained as it is: pass no other arguments.")
        return explanation(target)
    if not isinstance(target, nn.Module):
        raise TypeError(
            f"explain takes a Jacobian or a module with its arguments, not a {type(target).__name__}. For "
            "a function, pass gramjd.jacobian(function)(params, ...)."
        )
    engine = Engine(target, batch_dim=batch_dim)
    try:
        output = target(*args, **kwargs)
        losses = output if loss is None else joined(loss(output), batch_dim)
        if not isinstance(losses, Tensor):
            raise TypeError(
                f"The module returned a {type(losses).__name__}, not a tensor: say what to differentiate "
                "with loss=, a function of the output that returns a tensor of objectives."
            )
        return explanation(engine.jacobian(losses))
    finally:
        engine.close()
