"""A module call as the pure function ``functional_call(module, params, args, kwargs)``.

Its per-sample Jacobian is built by ``vmap(vjp)`` over the batch dimension, with the same capture of
ops inside, and applied to the cotangents of the call's outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

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
    arguments, used = saved[: -n - outs], [i for i, c in enumerate(cs) if c is not None]
    recorded = [saved[i - outs] for i in used]
    parameters = saved[-n - outs : -outs]
    batched = [layout is None or _has_samples(t, layout, recorded[0]) for t in arguments]
    mapped = [t if layout is None else layout.split(t, layout.dim, samples)
              for t, b in zip(arguments, batched, strict=True) if b]  # fmt: skip
    shared = [t for t, b in zip(arguments, batched, strict=True) if not b]

    def function(params: Sequence[Tensor], batch: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        mine, others = iter(batch), iter(shared)
        tensors = iter([next(mine) if b else next(others) for b in batched])
        leaves = [next(tensors) if leaf is pytree.PLACEHOLDER else leaf for leaf in mark.leaves]
        args, kwargs = pytree.unflatten(mark.spec, leaves)
        named = dict(zip(mark.names, params, strict=True))
        module = original_of(mark.module)
        with ExitStack() as stack:
            for device, dtype in mark.autocasts.items():
                stack.enter_context(torch.autocast(device, dtype, cache_enabled=False))
            out = torch.func.functional_call(module, _without_prefix(named), args, kwargs)
        live = [t for t, is_live in zip(tensors_of(out), mark.live, strict=True) if is_live]
        return [live[i] for i in used], []

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
    precision = max([0.0, *map(tolerance, mark.autocasts.values())])  # other orders of adding up
    for got, want in zip(found.outputs, recorded, strict=True):
        want = want.unsqueeze(0) if layout is None else layout.split(want, layout.dim, samples)
        if got.shape != want.shape or (
            (got - want).norm() > max(precision, tolerance(got.dtype)) * want.norm()
        ):
            raise ValueError("a second call of the module, sample by sample, gave other outputs")
    return found.blocks


def _has_samples(argument: Tensor, layout: Layout, output: Tensor) -> bool:
    """Whether the argument is batched along the dimension of the outputs."""
    return argument.ndim > layout.dim and argument.shape[layout.dim] == output.shape[layout.dim]


def _without_prefix(named: dict[str, Any]) -> dict[str, Any]:
    """Names of a compiled module's parameters as its original module knows them."""
    return {name_in_original(name): value for name, value in named.items()}
