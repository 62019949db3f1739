"""Capture of a pure per-sample function: every use of a parameter, with its cotangents.

The function runs under ``vmap``, so that inside it there is no batch dimension to guess. A zero
*perturbation* is added to the output of every op that receives a tracked parameter; the ``vjp`` with
respect to all perturbations gives every cotangent in one backward pass. All of it is plain tensor
code that composes with the transforms of ``torch.func``: nothing here detaches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gramjd import pytree
from gramjd.blocks import Block, Dense
from gramjd.internals import depends_on_innermost_transform
from gramjd.rules import expansion_of, tensors_of
from gramjd.tracker import Tracker, is_inplace
from gramjd.uses import Record, Use, blocks_of, describe

Function = Callable[[Sequence[Tensor], Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Captured:
    """Values ``[B, *S]`` of each output, and the blocks ``(k, b)`` of each parameter."""

    outputs: list[Tensor]
    blocks: list[list[Block]]


@dataclass
class _Trace:
    """What one run of the function leaves behind besides tensors."""

    records: list[Record] = field(default_factory=list)
    tracked: list[list[Tensor]] = field(default_factory=list)
    constants: list[list[Any] | None] = field(default_factory=list)  # saved where it is un-batched
    shapes: list[list[tuple[torch.Size, torch.dtype, torch.device]]] = field(default_factory=list)
    leftover: bool = False  # does anything else than the records depend on the parameters?

    def zeros(self) -> list[Tensor]:
        """A perturbation for every output of every use that is not derived."""
        return [
            torch.zeros(shape, dtype=dtype, device=device)
            for record, outputs in zip(self.records, self.shapes, strict=True)
            for shape, dtype, device in ([] if record.derived else outputs)
        ]


class _Perturb(Tracker):
    """Adds perturbations to the outputs of tracked ops (none on the first run, which finds them)."""

    def __init__(self, parameters: Sequence[Tensor], raw: Sequence[Tensor],
                 perturbations: Sequence[Tensor] | None, shared: bool, unbatched: Sequence[Tensor]
                 ) -> None:  # fmt: skip
        super().__init__(parameters, unbatched)
        self.raw = {id(p): r for p, r in zip(parameters, raw, strict=True) if p is not r}
        for parameter, tensor in zip(parameters, raw, strict=True):
            self.sources[id(parameter)] = self.sources[id(tensor)] = tensor
            self.known[id(tensor)] = tensor
        self.perturbations = None if perturbations is None else list(perturbations)
        self.shared = shared  # no batch: every tensor is "the sample", nothing is derived
        self.trace = _Trace()
        self.saved: list[list[Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        expansion = expansion_of(func)
        if expansion is None:
            return super().__torch_function__(func, types, args, kwargs)
        with self:
            return expansion(*args, **(kwargs or {}))

    def record(self, op: Any, args: Any, kwargs: dict[str, Any], derived: bool) -> tuple[Any, Record | None]:
        args, kwargs = self._without_wrappers(args), self._without_wrappers(kwargs)
        derived = derived and not self.shared
        record, leaves = describe(op, args, kwargs, self.sources, derived)
        out = op(*args, **kwargs)
        outs = tensors_of(out)
        if not any(t.is_floating_point() or t.is_complex() for t in outs):
            if out is None:  # such as __setitem__
                raise NotImplementedError(_INPLACE.format(op=getattr(op, "__name__", op)))
            return out, None
        if is_inplace(op) and (None in record.entries or args[0] is not out):
            raise NotImplementedError(_INPLACE.format(op=getattr(op, "__name__", op)))
        self.trace.records.append(record)
        self.trace.tracked.append([leaves[slot.index] for slot in record.slots])
        values = [leaves[i] for i in record.saved]
        self.trace.constants.append(values if derived else None)
        self.saved.append([] if derived else values)
        self.trace.shapes.append([(t.shape, t.dtype, t.device) for t in outs])
        return out if derived else self._perturbed(op, out, outs), record

    def _perturbed(self, op: Any, out: Any, outs: list[Tensor]) -> Any:
        if self.perturbations is None:
            return out
        mine = [self.perturbations.pop(0) for _ in outs]
        if is_inplace(op):
            return out.add_(mine[0])
        if isinstance(out, Tensor):
            return out + mine[0]
        leaves, spec = pytree.flatten(out)
        return pytree.unflatten(spec, [x + mine.pop(0) if isinstance(x, Tensor) else x for x in leaves])

    def _without_wrappers(self, tree: Any) -> Any:
        """Arguments with each parameter as the function's caller holds it."""
        return pytree.map(lambda leaf: self.raw.get(id(leaf), leaf), tree) if self.raw else tree


_INPLACE = (
    "The function writes a parameter into another tensor in place ({op}), which cannot be followed "
    "under a transform. Use the out-of-place form (torch.cat, torch.where, x = x + p) instead."
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
        function: per sample, ``(parameters, batched) -> outputs``, lists of tensors all three.
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

    def mapped(run: Callable[..., Any], *args: Any) -> Any:
        if shared:
            return pytree.map(lambda t: t.unsqueeze(0), run(*args))
        return torch.vmap(run, randomness=randomness, chunk_size=chunk_size)(*args)

    found = _discover(function, raw, batched, unbatched, shared, mapped)
    trace = _Trace()

    def per_sample(batch: Sequence[Tensor], *given: Tensor) -> Any:
        def run(perturbations: list[Tensor], wrapped: list[Tensor]) -> Any:
            nonlocal trace
            inside = wrapped or raw
            tracker = _Perturb(inside, raw, perturbations, shared, unbatched)
            outputs = _call(tracker, function, inside, batch)
            trace = tracker.trace
            if trace.shapes != found.shapes:
                raise RuntimeError("The function took another path in its second run; it is not pure.")
            return outputs, (tracker.saved, outputs)

        zeros = found.zeros() or [torch.zeros(())]  # vjp wants a primal, even where nothing is used
        extra = raw if found.leftover else []
        outputs, vjp_fn, (saved, values) = torch.func.vjp(run, zeros, extra, has_aux=True)  # type: ignore[misc]
        cs, rows = _pull(vjp_fn, given or _basis(outputs))
        return values, cs, rows, saved

    given = [c[:, 0] if shared else c.transpose(0, 1) for c in cotangents or ()]
    values, cs, rows, saved = mapped(per_sample, batched, *given)
    uses = _uses(trace, [c.transpose(0, 1) for c in cs], saved)
    blocks = blocks_of(uses, raw)
    for number, row in enumerate(rows):
        blocks[number].append(Dense(row.transpose(0, 1)))
    return Captured(values, blocks)


def _discover(function: Function, raw: Sequence[Tensor], batched: Sequence[Tensor],
              unbatched: Sequence[Tensor], shared: bool, mapped: Callable[..., Any]) -> _Trace:  # fmt: skip
    """A first run that finds the shapes of the perturbations, and whether the records tell all.

    Parameters are wrapped at a ``vjp`` level that tracked ops do not see: an output that still
    requires gradients there depends on a parameter through something that no rule watched.
    """
    found = _Trace()

    def per_sample(batch: Sequence[Tensor]) -> Any:
        def run(wrapped: list[Tensor]) -> Any:
            nonlocal found
            tracker = _Perturb(wrapped, raw, None, shared, unbatched)
            outputs = _call(tracker, function, wrapped, batch)
            found = tracker.trace
            found.leftover = any(depends_on_innermost_transform(out) for out in outputs)
            return outputs

        return torch.func.vjp(run, list(raw))[0]

    mapped(per_sample, batched)
    return found


def _call(tracker: _Perturb, function: Function, parameters: Sequence[Tensor], batch: Sequence[Tensor]
          ) -> list[Tensor]:  # fmt: skip
    """The function under the tracker; an output that is itself derived counts as a use of it."""
    with tracker:
        outputs = list(function(parameters, batch))
    return [
        tracker.record(Tensor.clone, (out,), {}, derived=False)[0] if id(out) in tracker.sources else out
        for out in outputs
    ]


def _basis(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Cotangents that pick one entry of one output after the other, ``[K, *S]`` each."""
    sizes = [out.numel() for out in outputs]
    parts = []
    for n, out in enumerate(outputs):
        eye = torch.eye(sum(sizes), dtype=out.dtype, device=out.device)
        start = sum(sizes[:n])
        parts.append(eye[:, start : start + sizes[n]].reshape(-1, *out.shape))
    return parts


def _uses(trace: _Trace, cs: Sequence[Tensor], saved: Sequence[Sequence[Tensor]]) -> list[Use]:
    """The records of a run, each with its share of the cotangents (none where it derived a tensor)."""
    uses, rest = [], list(cs)
    for n, record in enumerate(trace.records):
        mine = [None if record.derived else rest.pop(0) for _ in trace.shapes[n]]
        constants = trace.constants[n]
        uses.append(Use.of(record, saved[n] if constants is None else constants, mine, trace.tracked[n]))
    return uses


def _pull(vjp_fn: Callable[..., Any], cotangents: Sequence[Tensor]) -> Any:
    """``vjp_fn`` over the leading dimension K of the cotangents."""
    if len(cotangents[0]) == 1:
        return pytree.map(lambda t: t.unsqueeze(0), vjp_fn([c[0] for c in cotangents]))
    return torch.vmap(vjp_fn)(list(cotangents))
