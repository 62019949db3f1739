"""A module call as the pure function ``functional_call(module, params, args, kwargs)``.

Its per-sample Jacobian is built by ``vmap(vjp)`` over the batch dimension, with the same capture of
ops inside, and applied to the cotangents of the call's outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from itertools import compress
from operator import not_

import torch
from torch import Tensor

from gramjd import pytree
from gramjd.blocks import Block
from gramjd.engine.analysis.layouts import Layout
from gramjd.engine.recording.compiled import uncompiled
from gramjd.engine.recording.recorded import CallMark
from gramjd.functional.capture import capture
from gramjd.internals import name_in_original, original_of
from gramjd.rounding import tolerance
from gramjd.rules import tensors_of


def call_blocks(
    mark: CallMark,
    saved: Sequence[Tensor],
    cs: Sequence[Tensor | None],
    layout: Layout | None,
    samples: int,
) -> list[list[Block]]:
    """Blocks of the parameters that the call answers for.

    Args:
        mark: the call.
        saved: what its node saved.
        cs: canonical cotangents ``[K, B, ...]`` of the outputs that require gradients; ``None`` for
            those that the objectives do not depend on.
        layout: of the outputs; ``None`` without a batch.
        samples: ``B``.

    Raises:
        ValueError: the replayed outputs differ from the recorded ones.
    """
    n, outs = len(mark.names), len(cs)
    arguments, parameters = saved[: -n - outs], saved[-n - outs : -outs]
    used = [i for i, c in enumerate(cs) if c is not None]
    recorded = [saved[i - outs] for i in used]
    batched = [layout is None or _has_samples(t, layout, recorded[0]) for t in arguments]
    mapped, shared = [*compress(arguments, batched)], [*compress(arguments, map(not_, batched))]
    if layout is None:
        wanted = [t.unsqueeze(0) for t in recorded]
    else:
        mapped, wanted = [[layout.split(t, layout.dim, samples) for t in each] for each in (mapped, recorded)]

    def function(params: Sequence[Tensor], batch: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        mine, others = iter(batch), iter(shared)
        out = _call(mark, params, [next(mine) if b else next(others) for b in batched])
        found = [out[i] for i in used]
        _refuse_other_shapes(found, wanted)
        return found, []

    with torch.random.fork_rng(devices=[]), uncompiled():
        if mark.rng_state is not None:
            torch.set_rng_state(mark.rng_state)
        found = capture(
            function,
            parameters,
            mapped,
            [c for c in cs if c is not None],
            batch_independent=shared,
            randomness="different",
            shared=layout is None,
        )
    _refuse_others(found.outputs, wanted, mark)
    return found.blocks


def _call(mark: CallMark, parameters: Sequence[Tensor], arguments: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a call that require gradients, with other parameters and tensor arguments."""
    tensors = iter(arguments)
    leaves = [next(tensors) if leaf is pytree.PLACEHOLDER else leaf for leaf in mark.leaves]
    args, kwargs = pytree.unflatten(mark.spec, leaves)
    named = {name_in_original(name): p for name, p in zip(mark.names, parameters, strict=True)}
    with ExitStack() as stack:
        for device, dtype in mark.autocasts.items():
            stack.enter_context(torch.autocast(device, dtype, cache_enabled=False))
        out = torch.func.functional_call(original_of(mark.module), named, args, kwargs)
    return [t for t, is_live in zip(tensors_of(out), mark.live, strict=True) if is_live]


def _refuse_other_shapes(outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Raise where one sample's outputs do not have the shapes of those recorded."""
    for got, want in zip(outputs, wanted, strict=True):
        if got.shape != want.shape[1:]:
            raise ValueError(
                f"for one sample, the module returned {list(got.shape)} in place of {list(want.shape[1:])}, "
                "so that it takes samples from elsewhere than its arguments"
            )


def _refuse_others(outputs: Sequence[Tensor], wanted: Sequence[Tensor], mark: CallMark) -> None:
    """Raise where the outputs of a replay are not those recorded, but for the order of adding up."""
    rounding = max([0.0, *map(tolerance, mark.autocasts.values())])
    for got, want in zip(outputs, wanted, strict=True):
        most = max(rounding, tolerance(got.dtype))
        if got.shape != want.shape or (got - want).norm() > most * want.norm():
            raise ValueError("a second call of the module, sample by sample, gave other outputs")


def _has_samples(argument: Tensor, layout: Layout, output: Tensor) -> bool:
    """Whether the argument is batched along the dimension of the outputs."""
    return argument.ndim > layout.dim and argument.shape[layout.dim] == output.shape[layout.dim]
