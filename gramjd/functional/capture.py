"""Capture of a pure per-sample function: every use of a parameter, with its cotangents.

The function runs under ``vmap``, so that inside it there is no batch dimension to guess. Cotangents come
from edges of autograd's graph (:mod:`gramjd.functional.edges`), or, where ``torch.compile`` traces, which
knows no edges, from perturbations (:mod:`gramjd.functional.perturbations`).

All of it is plain tensor code that composes with the transforms of ``torch.func``: nothing here
detaches from levels outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from gramjd import pytree
from gramjd.blocks import Block, Dense
from gramjd.functional.edges import by_edges
from gramjd.functional.per_sample_mode import Function, Trace
from gramjd.functional.perturbations import by_perturbations
from gramjd.internals import differentiates, is_compiling, outside_vmap, transform_level, with_memory
from gramjd.uses.accumulation import blocks_of
from gramjd.uses.known_calls import KnownCalls
from gramjd.uses.use import Use

# Cotangents, what the uses saved, outputs, auxiliary values.
Values = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Captured:
    """Values ``[B, *S]`` of each output, auxiliary values, and blocks ``(k, b)`` of each parameter.

    The blocks follow from the uses of ``parameters``: aliases of those that were given, or tensors that the
    records of uses have in their place.
    """

    outputs: list[Tensor]
    aux: list[Tensor]
    blocks: list[list[Block]]
    parameters: list[Tensor]
    uses: list[Use]

    def of_sample(self, n: int) -> Captured:
        """Outputs and blocks of one sample alone."""
        blocks = [[block.samples(n, n + 1) for block in mine] for mine in self.blocks]
        return replace(self, outputs=[out[n : n + 1] for out in self.outputs], blocks=blocks)


def capture(
    function: Function,
    parameters: Sequence[Tensor],
    batched: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None = None,
    *,
    batch_independent: Sequence[Tensor] = (),
    randomness: str = "error",
    chunk_size: int | None = None,
    shared: bool = False,
    known_calls: KnownCalls | None = None,
) -> Captured:
    """Run ``function`` and return its outputs with the blocks of every parameter.

    Args:
        function: per sample, ``(parameters, batched) -> (outputs, aux)``, lists of tensors all four.
        parameters: what to differentiate with respect to; shared by all samples.
        batched: ``[B, ...]`` each.
        cotangents: of each output, ``[K, B, *S]``; by default every entry of every output is an
            objective of its own, in order.
        batch_independent: tensors that the function closes over and that are the same for all samples.
        randomness, chunk_size: as in ``torch.func.vmap``.
        shared: no batch: ``batched`` are passed on as they are, and ``B = 1``.
        known_calls: of earlier runs of the function.

    Raises:
        RuntimeError: in inference mode, where this version of torch does not differentiate.
    """
    if not differentiates():
        raise RuntimeError(
            f"torch {torch.__version__} gives gradients of zero in inference mode: use torch.no_grad()."
        )
    raw = [*parameters]
    if is_compiling() or {*map(type, raw)} != {Tensor} or len({*map(id, raw)}) < len(raw):
        # an alias apiece: tied entries stay apart, as torch.func.grad keeps them apart
        raw = [p.view_as(p) for p in parameters]
    known = None if is_compiling() else known_calls or KnownCalls()
    sources = raw if known is None else known.sources(len(raw))
    run = by_perturbations if known is None else partial(by_edges, known_calls=known.of(sources, alone=True))
    given = [c[:, 0] if shared else c.transpose(0, 1) for c in cotangents or ()]
    trace = Trace()

    def per_sample(batch: Sequence[Tensor], given: Sequence[Tensor]) -> Values:
        nonlocal trace
        found = run(function, raw, batch, given, shared, batch_independent)
        trace = found.trace
        return found.cs, found.saved, found.outputs, found.aux

    if shared:
        found: Values = pytree.map(lambda t: t.unsqueeze(0), per_sample(batched, given))
    elif is_compiling() or chunk_size is not None:
        found = torch.vmap(per_sample, randomness=randomness, chunk_size=chunk_size)(batched, given)
    else:
        found = _batched(per_sample, batched, given, randomness)
    cs, saved, values, aux = found
    if not is_compiling():
        cs = with_memory(cs)
    rows_first = [c.unsqueeze(0) if trace.one_objective else c.transpose(0, 1) for c in cs]
    uses, rows = _uses(trace, iter(rows_first), iter(saved))
    blocks = blocks_of(uses, sources)
    for mine, row in zip(blocks, rows, strict=True):
        if row is not None:
            mine.append(Dense(row, origin="autograd (no rule covers an op that used it)"))
    return Captured(values, aux, blocks, sources, uses)


def _batched(function: Callable[..., Values], batched: Sequence[Tensor], given: Sequence[Tensor],
             randomness: str) -> Values:  # fmt: skip
    """``vmap`` of a function that returns lists of tensors, without its walks over nested containers."""
    found: list[Values] = []
    arguments, count = [*batched, *given], len(batched)
    size = arguments[0].shape[0]

    def run(*one: Tensor) -> Tensor:
        level = transform_level()
        cs, saved, values, aux = function(one[:count], one[count:])
        cs, saved, values, aux = (outside_vmap(each, level, size) for each in (cs, saved, values, aux))
        found.append((cs, saved, values, aux))
        return one[0]  # what it returns to torch is of no interest

    torch.vmap(run, randomness=randomness)(*arguments)
    return found[0]


def _uses(trace: Trace, cs: Iterator[Tensor], saved: Iterator[Tensor]
          ) -> tuple[list[Use], list[Tensor | None]]:  # fmt: skip
    """The uses that the outputs depend on, and rows of what reached a parameter past all of them."""
    reached = iter(trace.reached)
    uses = []
    for n, record in enumerate(trace.records):
        if record.derived:
            uses.append(Use.of(record, trace.constants[n], [None] * trace.outputs[n], trace.tracked[n]))
        else:
            mine = [*islice(saved, len(record.saved))]
            if next(reached):
                uses.append(Use.of(record, mine, [next(cs)], trace.tracked[n]))
    return uses, [next(cs) if is_reached else None for is_reached in reached]
