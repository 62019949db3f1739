"""Replaces errors of ``torch.func`` about functions that it cannot transform by errors with a remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# What torch's own messages contain, and what the function did.
_CAUSES = {
    "calling .item()": "reads the value of a tensor (.item(), int(), float(), or an if)",
    "data-dependent control flow": "reads the value of a tensor (.item(), int(), float(), or an if)",
    "dynamic shape": "asks for a tensor whose size depends on values (nonzero, unique, a boolean mask)",
    "setup_context staticmethod": "calls a torch.autograd.Function that has no setup_context",
    "does not have vmap support": "calls a torch.autograd.Function that has neither a vmap method nor "
    "generate_vmap_rule=True",
    "saved tensor hooks": "uses a checkpoint, or another context of saved-tensor hooks",
    "Tensor that doesn't have storage": "takes the values of a tensor out of torch (numpy(), tolist())",
    "Batching rule not implemented": "calls an op that vmap has no batching rule for",
    "inplace arithmetic(": "writes what belongs to one sample in place into a tensor that all share",
    "that would mutate a captured Tensor": "writes into a tensor from outside of it (a buffer of the module)",
}


@contextmanager
def explained() -> Iterator[None]:
    """A context that turns torch's errors about functions that it cannot transform into ours.

    Raises:
        NotImplementedError: in place of those.
    """
    try:
        yield
    except RuntimeError as error:
        said = str(error)
        cause = next((cause for part, cause in _CAUSES.items() if part in said), None)
        if cause is None or type(error) is not RuntimeError:
            raise
        raise NotImplementedError(
            f"The function {cause}, which transforms of torch.func do not support. gramjd.Engine takes "
            "modules as they run, with that in their forward: Engine(module, batch_dim=0)."
        ) from error
