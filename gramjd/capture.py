"""Capture of a pure per-sample function: every use of a parameter, with its cotangents.

The function runs once, under ``vmap``, so that inside it there is no batch dimension to guess, and at
a level of differentiation of our own:

- An op with a rule receives the bare parameter, and autograd's edge behind its output is remembered
  (a *tap*). One backward pass to all taps at once gives the cotangents of all uses; since the op did
  not see a parameter that requires gradients, no weight gradient is computed on the way.
- Any other op receives the parameter as a tensor that requires gradients. Whatever depends on it
  through ops that have no rule, that no mode shows us, or that run at a level of the function's own
  (a ``grad`` or ``vmap`` inside it), reaches the parameter itself in the same backward pass: these
  rows are ``Dense``. So every dependency is accounted for, known or not.

All of it is plain tensor code that composes with the transforms of ``torch.func``: nothing here
detaches from levels outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gramjd import pytree
from gramjd.assembly import blocks_of
from gramjd.blocks import Block, Dense
from gramjd.internals import (
    belongs_to,
    below_transform,
    depends_on_innermost_transform,
    differentiated_outside,
    innermost_level,
    tap,
    unfused_attention,
    vmaps_in_progress,
)
from gramjd.rules import expansion_of, tensors_of
from gramjd.tracker import Tracker, is_inplace
from gramjd.uses import Record, Use, describe

Function = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Sequence[Tensor], Sequence[Tensor]]]

# Their derivatives are wrong, or fail, under two levels of vmap: torch's own defects.
_ONE_LEVEL = {"cdist", "pdist", "prelu", "rrelu"}


@dataclass(frozen=True)
class Captured:
    """Values ``[B, *S]`` of each output, auxiliary values, and blocks ``(k, b)`` of each parameter."""

    outputs: list[Tensor]
    aux: list[Tensor]
    blocks: list[list[Block]]


@dataclass
class _Trace:
    """What one run of the function leaves behind besides values of single samples."""

    records: list[Record] = field(default_factory=list)
    tracked: list[list[Tensor]] = field(default_factory=list)  # tensors of the slots of each record
    constants: list[list[Tensor]] = field(default_factory=list)  # values saved by derived records
    outputs: list[int] = field(default_factory=list)  # how many each record has
    reached: list[bool] = field(default_factory=list)  # does the output depend on each tap, parameter?
    one_level: bool = False  # is there an op that tolerates one level of vmap alone?


class _Tap(Tracker):
    """Taps the outputs of ops with rules; everything else goes its way, with gradients."""

    def __init__(self, wrapped: Sequence[Tensor], raw: Sequence[Tensor], zero: Tensor, shared: bool,
                 unbatched: Sequence[Tensor]) -> None:  # fmt: skip
        super().__init__(wrapped, unbatched)
        self.below: dict[int, Tensor] = {}  # tracked tensors as levels outside see them, by id
        for parameter, tensor in zip(wrapped, raw, strict=True):
            self.sources[id(parameter)] = tensor
            self.below[id(parameter)] = tensor
        self.zero = zero  # requires gradients
        self.shared = shared  # no batch: every tensor is "the sample", nothing is derived
        self.level = innermost_level()
        self.trace = _Trace()
        self.taps: list[Any] = []
        self.saved: list[list[Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in _ONE_LEVEL:
            self._refuse_nesting(func.__name__)
        if func is F.scaled_dot_product_attention and args and args[0].device.type == "cpu":
            with unfused_attention():  # the fused kernel has no batching rule there
                return super().__torch_function__(func, types, args, kwargs)
        expansion = expansion_of(func)
        if expansion is None:
            return super().__torch_function__(func, types, args, kwargs)
        with self:
            return expansion(*args, **(kwargs or {}))

    def record(self, op: Any, args: Any, kwargs: dict[str, Any], derived: bool) -> tuple[Any, Record | None]:
        if innermost_level() != self.level:  # inside a transform of the function's own
            return op(*args, **kwargs), None
        if is_inplace(op):
            if id(args[0]) in self.sources:
                raise NotImplementedError(_INPLACE.format(op=getattr(op, "__name__", op)))
            return op(*args, **kwargs), None
        record, leaves = describe(op, args, kwargs, self.sources, derived and not self.shared)
        if record.derived:
            return self._derive(op, args, kwargs, record, leaves)
        out = None
        if None not in record.entries and torch.is_grad_enabled():
            out = op(*self._bare(args), **self._bare(kwargs))
        if not isinstance(out, Tensor):
            return op(*args, **kwargs), None
        if not depends_on_innermost_transform(out):
            out = out + self.zero.to(out.dtype)
        found, out = tap(out)
        self.taps.append(found)
        self._keep(record, leaves, [leaves[i] for i in record.saved], [], 1)
        return out, record

    def _derive(self, op: Any, args: Any, kwargs: dict[str, Any], record: Record, leaves: Sequence[Any]
                ) -> tuple[Any, Record | None]:  # fmt: skip
        """Call an op on tracked and un-batched tensors alone: what it returns is tracked in turn."""
        out = op(*args, **kwargs)
        outs = tensors_of(out)
        below = [below_transform(t, self.level) for t in outs]
        if not any(depends_on_innermost_transform(t) for t in outs):
            return out, None  # a shape, a comparison, or detached
        if any(belongs_to(t, self.level - 1) for t in below):
            return out, None  # batched all the same
        self.below.update((id(t), value) for t, value in zip(outs, below, strict=True))
        constants = [below_transform(leaves[i], self.level) for i in record.saved]
        self._keep(record, leaves, [], constants, len(outs))
        return out, record

    def _keep(self, record: Record, leaves: Sequence[Any], saved: list[Tensor], constants: list[Tensor],
              outputs: int) -> None:  # fmt: skip
        self.trace.records.append(record)
        self.trace.tracked.append([self.below[id(leaves[slot.index])] for slot in record.slots])
        self.trace.constants.append(constants)
        self.trace.outputs.append(outputs)
        self.saved.append(saved)

    def _refuse_nesting(self, op: str) -> None:
        """Raise if torch would differentiate the op wrongly here; note that one more level would be."""
        self.trace.one_level = True
        if vmaps_in_progress() > 1:
            raise NotImplementedError(
                f"torch's own derivative of {op} is wrong, or fails, under nested vmap. Call the "
                "transform in a loop instead of inside torch.vmap."
            )

    def _bare(self, tree: Any) -> Any:
        """Arguments with tracked tensors as levels outside see them, which need no gradients here."""
        return pytree.map(lambda leaf: self.below.get(id(leaf), leaf), tree)


_INPLACE = (
    "The function writes into a parameter, or into a tensor made of parameters alone, in place ({op}), "
    "which cannot be followed under a transform. Use the out-of-place form (w = w * s) instead."
)


def capture(
    function: Function,
    parameters: Sequence[Tensor],
    batched: Sequence[Tensor],
    cotangents: Sequence[Tensor] | None = None,
    *,
    unbatched: Sequence[Tensor] = (),
    randomness: str = "error",
    chunk_size: int | None = None,
    shared: bool = False,
) -> Captured:
    """Run ``function`` and return its outputs with the blocks of every parameter.

    Args:
        function: per sample, ``(parameters, batched) -> (outputs, aux)``, lists of tensors all four.
        parameters: what to differentiate with respect to; shared by all samples.
        batched: ``[B, ...]`` each.
        cotangents: of each output, ``[K, B, *S]``; by default every entry of every output is an
            objective of its own, in order.
        unbatched: tensors that the function closes over and that are the same for all samples.
        randomness, chunk_size: as in ``torch.func.vmap``.
        shared: no batch: ``batched`` are passed on as they are, and ``B = 1``.
    """
    # An alias apiece: tied entries stay apart, as torch.func.grad keeps them apart.
    raw = [p.view_as(p) for p in parameters]
    trace = _Trace()

    def per_sample(batch: Sequence[Tensor], given: Sequence[Tensor]) -> Any:
        def run(wrapped: Sequence[Tensor], zero: Tensor) -> Any:
            nonlocal trace
            tracker = _Tap(wrapped, raw, zero, shared, unbatched)
            with tracker:
                outputs, aux = function(wrapped, batch)
            trace = tracker.trace
            cs = list(_pull(outputs, [*tracker.taps, *wrapped], list(given) or _basis(outputs), trace))
            return torch.zeros(()), (cs, tracker.saved, list(outputs), list(aux))

        found = torch.func.vjp(run, raw, torch.zeros(()), has_aux=True)
        return found[2]  # type: ignore[misc]

    given = [c[:, 0] if shared else c.transpose(0, 1) for c in cotangents or ()]
    if shared:
        found = pytree.map(lambda t: t.unsqueeze(0), per_sample(batched, given))
    else:
        found = torch.vmap(per_sample, randomness=randomness, chunk_size=chunk_size)(batched, given)
    cs, saved, values, aux = found
    uses, rows = _uses(trace, iter(c.transpose(0, 1) for c in cs), saved, len(raw))
    blocks = blocks_of(uses, raw)
    for mine, row in zip(blocks, rows, strict=True):
        if row is not None:
            mine.append(Dense(row, origin="autograd (no rule covers an op that used it)"))
    return Captured(values, aux, blocks)


def _pull(outputs: Sequence[Tensor], inputs: Sequence[Any], cotangents: Sequence[Tensor], trace: _Trace
          ) -> Sequence[Tensor]:  # fmt: skip
    """Cotangents ``[K, ...]`` of those inputs that the outputs depend on; ``trace`` learns which."""
    live = [n for n, out in enumerate(outputs) if depends_on_innermost_transform(out)]
    if not live:
        trace.reached = [False] * len(inputs)
        return []
    ends = [outputs[n] for n in live]

    graph = any(differentiated_outside(out) for out in ends)

    def grad(*cs: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(
            ends, inputs, cs, retain_graph=True, create_graph=graph, allow_unused=True
        )
        trace.reached = [g is not None for g in found]
        return [g for g in found if g is not None]

    each = [cotangents[n] for n in live]
    K = len(each[0])
    if K == 1:
        return [g.unsqueeze(0) for g in grad(*(c[0] for c in each))]
    if not trace.one_level:
        return list(torch.vmap(grad)(*each))
    rows = [grad(*(c[k] for c in each)) for k in range(K)]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def _basis(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Cotangents that pick one entry of one output after the other, ``[K, *S]`` each."""
    sizes = [out.numel() for out in outputs]
    parts = []
    for n, out in enumerate(outputs):
        eye = torch.eye(sum(sizes), device=out.device).to(out.dtype)
        start = sum(sizes[:n])
        parts.append(eye[:, start : start + sizes[n]].reshape(-1, *out.shape))
    return parts


def _uses(trace: _Trace, cs: Iterator[Tensor], saved: Sequence[Sequence[Tensor]], parameters: int
          ) -> tuple[list[Use], list[Tensor | None]]:  # fmt: skip
    """The uses that the outputs depend on, and rows of what reached a parameter past all of them."""
    reached = iter(trace.reached)
    uses = []
    for n, record in enumerate(trace.records):
        if record.derived:
            uses.append(Use.of(record, trace.constants[n], [None] * trace.outputs[n], trace.tracked[n]))
        elif next(reached):
            uses.append(Use.of(record, saved[n], [next(cs)], trace.tracked[n]))
    return uses, [next(cs) if is_reached else None for is_reached in reached]
