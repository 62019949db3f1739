"""The transforms' own proof: blocks against ``torch.func``'s gradients, with random weights.

The first result of each *structure* (arguments and the uses found in the function, by kind, not by value) is
verified, and again at growing distances. Nothing is kept of the user's: keys hold names, numbers and dtypes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import inf, isfinite
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gramjd import pytree
from gramjd.arguments import Arguments
from gramjd.blocks import Block
from gramjd.capture import Captured
from gramjd.complexes import as_real, real_block
from gramjd.errors import CheckFailedError
from gramjd.internals import autocasts, innermost_level, runs_plainly, unfused_attention
from gramjd.rounding import own_precision, tolerance
from gramjd.rules import expansion_of
from gramjd.rules.registry import op_name
from gramjd.uses import Derived, Record

_STRUCTURES = 64  # that a transform remembers
_SCALE = 1.37  # no power of two: results differ by rounding alone
_SMALL = 0.2  # relative differences above it are no rounding
_NOISE = 8  # times what rounding moves a gradient by, as measured once, that a difference may be

Run = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Sequence[Tensor], Sequence[Tensor]]]


@dataclass
class Seen:
    """What a transform remembers of one structure."""

    calls: int = 0
    verified: int = 0  # the call of the transform, counted from 1, whose result was verified last


class Verifier:
    """When one transform verifies its results, and which of them it has.

    Args:
        check: ``"first"``, ``"always"`` or ``"never"``.
        audit: the greatest distance, in calls, between two verifications of a structure under ``"first"``;
            ``None``: its first result alone.

    Raises:
        ValueError: an option is none of these.
    """

    def __init__(self, check: str, audit: int | None) -> None:
        if check not in ("first", "always", "never"):
            raise ValueError(f"check must be 'first', 'always' or 'never', not {check!r}.")
        if audit is not None and not (type(audit) is int and audit > 0):
            raise ValueError(f"audit must be a positive number of calls, or None, not {audit!r}.")
        self.check, self.audit, self.calls, self.number = check, audit, 0, 0
        self.seen: dict[Hashable, Seen] = {}

    def applies(self, given: Arguments) -> bool:
        """Can results be verified here? Not where something else traces or transforms them."""
        return self.check != "never" and runs_plainly([*given.parameters, *given.batch, *given.unbatched])

    def verify(self, call: Call, found: Captured) -> None:
        """Verify a result, if its structure says so.

        Raises:
            CheckFailedError: it is wrong, or could not be computed a second time.
        """
        self.calls += 1
        key = structure(call.given, found)
        seen = self.seen.pop(key, None) or Seen()
        seen.calls += 1
        if self.check == "always" or not seen.verified or _is_due(seen.calls, self.audit):
            self.number += 1
            if self._prove(call, found, seen):
                seen.verified = self.calls
        self.seen[key] = seen  # the latest is last
        if len(self.seen) > _STRUCTURES:
            del self.seen[next(iter(self.seen))]

    def _prove(self, call: Call, found: Captured, seen: Seen) -> bool:
        """Raise if a result is wrong; could it be compared?"""
        call = replace(call, seed=self.number)
        first, difference = not seen.verified, call.difference(found)
        if difference == "" and first and call.hides_uses(found):
            elsewhere = call.moved()
            again = elsewhere.capture_or_none()
            moved = again and elsewhere.difference(again)
            difference = moved + _MOVED if moved else ""
        if not difference:
            return difference is not None
        since = ""
        if not first and self.check == "first":
            since = (
                f" Results since call {seen.verified + 1} of this transform may be wrong, too (this is call "
                f"{self.calls}): the last one of this structure that was proved is that of the call before."
            )
        raise CheckFailedError(f"{difference}.{since} {_REMEDY}")


_MOVED = " (at parameters moved a little, where what is zero now is not)"
_REMEDY = (
    "Correct the rule, if it is your own (gramjd.register_rule), and report it otherwise. Until then, take "
    "gramjd.Engine, which falls back on autograd; check='never' turns this check off."
)


def _is_due(call: int, audit: int | None) -> bool:
    """Is a structure verified at its first, second, fourth, … call, and then at every so many?"""
    if audit is None or call == 1:
        return call == 1
    return call % audit == 0 or (call < audit and call & (call - 1) == 0)


@dataclass(frozen=True)
class Call:
    """One call of a transformed function, to be computed once more."""

    given: Arguments
    run_of: Callable[[Arguments], Run]  # for one sample
    capture: Callable[[Run, Arguments], Captured]
    generators: Generators
    randomness: str
    chunk_size: int | None
    shared: bool  # is there no batch?
    seed: int = 0  # of the weights
    exact: bool = False  # without the caller's autocast

    def difference(self, found: Captured) -> str | None:
        """How a result differs from ``torch.func``'s gradient: empty if it does not.

        ``None`` if they cannot be compared, because outputs or gradients have NaN or infinite entries.

        Raises:
            CheckFailedError: the function failed.
        """
        if not all(bool(torch.isfinite(out).all()) for out in found.outputs):
            return None
        weights = _random_weights(found.outputs, self.seed)
        try:
            first = self.gradients(found.outputs, weights)
        except RuntimeError as error:
            raise CheckFailedError(
                "The result could not be verified, because the function failed when torch.func "
                f"differentiated it: {error}. Pass check='never' if its results are known to be right."
            ) from error
        if not all(bool(torch.isfinite(g).all()) for g in first.gradients):
            return None
        return self._compared(found, weights, first)

    def _compared(self, found: Captured, weights: list[Tensor], first: Gradients) -> str:
        blocks = [list(map(real_block, mine)) for mine in found.blocks]
        dtypes = self._dtypes(found)
        bad = _disagreements(blocks, found.outputs, weights, first.gradients, max(map(tolerance, dtypes)))
        sizes = [float(g.norm()) for g in first.gradients]
        if bad and all(off <= _SMALL * sizes[n] for n, off in bad.items()):
            # two forwards in few digits may differ in the sign of what enters a ReLU
            for twin in self._precise():
                again = twin.capture_or_none()
                if again is not None and _ops(again) == _ops(found):
                    return twin.difference(again) or ""
        if not bad:
            return ""
        repeated = self.gradients(found.outputs, weights)
        if not _same(repeated.outputs, first.outputs, max(map(tolerance, dtypes))):
            return (
                "The function gave other outputs when it was called again with the same arguments, so that "
                "its Jacobian could not be verified. It must be pure: draw random numbers from torch's "
                "default generator, and change nothing outside"
            )
        bad = self._without_noise(bad, found, weights, first, max(torch.finfo(d).eps for d in dtypes))
        if not bad:
            return ""
        names = pytree.paths(pytree.unflatten(self.given.parameters_spec, list(self.given.parameters)))
        relative = {n: off / sizes[n] if sizes[n] else inf for n, off in bad.items()}
        number, off = max(relative.items(), key=lambda item: item[1])
        origins = dict.fromkeys(block.origin for block in blocks[number]) or ["none was found"]
        more = f" (and those of {len(bad) - 1} more)" if len(bad) > 1 else ""
        return (
            f"The Jacobian with respect to {names[number] or 'the parameter'!r}{more} is wrong: weighted at "
            f"random, its rows differ from the gradient of torch.func by {off:.1g} of its norm. Its uses: "
            f"{', '.join(origins)}"
        )

    def _dtypes(self, found: Captured) -> set[torch.dtype]:
        """What the function computes in, as far as its parameters, their uses and its outputs tell."""
        given = [*self.given.parameters, *found.outputs, *(c for use in found.uses for c in use.cs)]
        return {*self._autocasts(), *(t.dtype for t in given if t is not None)}

    def _autocasts(self) -> list[torch.dtype]:
        return [] if self.exact else list(autocasts().values())

    def _precise(self) -> Iterator[Call]:
        """The same call with more digits, if there are any."""
        if self._autocasts():
            yield replace(self, exact=True)
        elif any(torch.finfo(p.dtype).bits < 64 for p in self.given.parameters):
            yield replace(self, given=self.given.as_double())

    def _without_noise(self, bad: dict[int, float], found: Captured, weights: list[Tensor],
                       first: Gradients, eps: float) -> dict[int, float]:  # fmt: skip
        """The differences that are not rounding of the function's own computation."""
        noise, sizes = self._noise(found, weights, first, eps), [float(g.norm()) for g in first.gradients]
        pairs = zip(found.outputs, weights, strict=True)
        total = sum(float((out * w).abs().sum()) for out, w in pairs)
        kept = {}
        for n, off in bad.items():
            rounding = noise[n] * sizes[n]
            measured = off <= _NOISE * rounding and (off <= _SMALL * sizes[n] or rounding > sizes[n] / 2)
            # how the sum changes where the parameter moves along the difference, by as much as it is
            change = off * max(1.0, float(self.given.parameters[n].norm()))
            if not measured and change > 4 * eps * total:
                kept[n] = off
        return kept

    def _noise(self, found: Captured, weights: list[Tensor], first: Gradients, eps: float) -> list[float]:
        """How far gradients move, relative to their norms, by the rounding of parameters and weights."""
        generator = torch.Generator().manual_seed(self.seed)
        moved = [p * (1 + 2 * eps * _noise_like(p, generator)) for p in self.given.parameters]
        call = replace(self, given=self.given.with_parameters(moved))
        again = call.gradients(found.outputs, [_SCALE * w for w in weights]).gradients
        return [
            float((b / _SCALE - a).norm() / a.norm().clamp(min=torch.finfo(a.dtype).tiny))
            for a, b in zip(first.gradients, again, strict=True)
        ]

    def gradients(self, like: Sequence[Tensor], weights: Sequence[Tensor]) -> Gradients:
        """Gradients of the weighted sum of all outputs ``[B, *S]``, by ``torch.func.vjp``."""
        return (own_precision(self._gradients) if self.exact else self._gradients)(like, weights)

    def _gradients(self, like: Sequence[Tensor], weights: Sequence[Tensor]) -> Gradients:
        parameters = [p.detach() for p in self.given.parameters]
        batch = [t.detach() for t in self.given.batch]
        samples = len(like[0])
        size = samples if self.shared else min(self.chunk_size or samples, samples)
        total: list[Tensor] | None = None
        outputs: list[list[Tensor]] = []
        mode = _Batchable()
        with torch.no_grad(), self.generators.as_before(), unfused_attention(), mode:
            for start in range(0, samples, size):
                if self.randomness == "same":
                    self.generators.restart()
                some = batch if self.shared else [t[start : start + size] for t in batch]
                mine = [w[start : start + size] for w in weights]
                outputs_of = partial(self._outputs, batch=some, mode=mode)
                found, pull, *_ = torch.func.vjp(outputs_of, parameters)
                (gradients,) = pull([w.to(out.dtype) for w, out in zip(mine, found, strict=True)])
                outputs.append([out.detach() for out in found])
                total = gradients if total is None else [a + b for a, b in zip(total, gradients, strict=True)]
        assert total is not None
        return Gradients([torch.cat(column) for column in zip(*outputs, strict=True)],
                         [as_real(g.detach()) for g in total])  # fmt: skip

    def _outputs(self, parameters: Sequence[Tensor], batch: Sequence[Tensor], mode: _Batchable
                 ) -> list[Tensor]:  # fmt: skip
        run, mode.level = self.run_of(self.given), innermost_level()
        if self.shared:
            return [out.unsqueeze(0) for out in run(parameters, batch)[0]]

        def sample(some: Sequence[Tensor]) -> list[Tensor]:
            mode.level = innermost_level()
            return list(run(parameters, some)[0])

        found: list[Tensor] = torch.vmap(sample, randomness=self.randomness)(batch)
        return found

    def hides_uses(self, found: Captured) -> bool:
        """Is something zero that need not stay so (a gate, LoRA's B), and hides what was not compared?"""
        if any(not bool(p.any()) for p in self.given.parameters):
            return True
        cotangents = ([c for c in use.cs if c is not None] for use in found.uses)
        return any(cs and not any(bool(c.any()) for c in cs) for cs in cotangents)

    def moved(self) -> Call:
        """The same call with parameters that are nowhere zero."""
        generator = torch.Generator().manual_seed(self.seed)
        moved = []
        for p in self.given.parameters:
            p = p.detach()
            size = float(p.norm()) / max(1, p.numel()) ** 0.5
            moved.append(p + (0.3 * size or 0.1) * _noise_like(p, generator))
        return replace(self, given=self.given.with_parameters(moved))

    def capture_or_none(self) -> Captured | None:
        """The result of the call, if the function has one there."""
        try:
            with torch.no_grad(), self.generators.as_before():
                capture = own_precision(self.capture) if self.exact else self.capture
                return capture(self.run_of(self.given), self.given)
        except Exception:  # another parameter may be none that the function is made for
            return None


@dataclass(frozen=True)
class Gradients:
    """Values ``[B, *S]`` of each output, and the (real) gradients of their weighted sum."""

    outputs: list[Tensor]
    gradients: list[Tensor]


class Generators:
    """The states of torch's default generators before a call that may draw random numbers."""

    def __init__(self, may_draw: bool, parameters: Sequence[Tensor]) -> None:
        devices = {p.device for p in parameters if p.is_cuda} if may_draw else set()
        self.states = {device: torch.cuda.get_rng_state(device) for device in devices}
        self.cpu = torch.get_rng_state() if may_draw else None

    def restart(self) -> None:
        """Put the generators into these states."""
        if self.cpu is not None:
            torch.set_rng_state(self.cpu)
        for device, state in self.states.items():
            torch.cuda.set_rng_state(state, device)

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """A context that begins with these states, and leaves the generators as it found them."""
        devices = [device.index for device in self.states]
        with torch.random.fork_rng(devices=devices, enabled=self.cpu is not None):
            self.restart()
            yield


class _Batchable(TorchFunctionMode):
    """Ops for which ``vmap`` has no batching rule, or a wrong one, by what they are made of."""

    level = 0  # of the innermost transform around the function; it may have some of its own inside

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        body = expansion_of(func)
        if func in _NORMS and innermost_level() > self.level:
            body = _NORMS[func]
        if body is None:
            return func(*args, **(kwargs or {}))
        with self:
            return body(*args, **(kwargs or {}))


def _layer_norm(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
                bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:  # fmt: skip
    dims = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(dims, keepdim=True)
    out = centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


def _group_norm(input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
                eps: float = 1e-5) -> Tensor:  # fmt: skip
    groups = input.unflatten(1, (num_groups, -1)).flatten(2)
    out = _layer_norm(groups, groups.shape[2:], eps=eps).reshape(input.shape)
    channels = (-1, *[1] * (input.ndim - 2))
    out = out if weight is None else out * weight.reshape(channels)
    return out if bias is None else out + bias.reshape(channels)


def _instance_norm(input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None,
                   weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True,
                   momentum: float = 0.1, eps: float = 1e-5) -> Tensor:  # fmt: skip
    if use_input_stats:
        return _group_norm(input, input.shape[1], weight, bias, eps)
    return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)


# Where a function differentiates inside, torch's derivatives of theirs are wrong under one more vmap.
_NORMS: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.instance_norm: _instance_norm,
}


def structure(given: Arguments, found: Captured) -> Hashable:
    """Equal for calls whose blocks come about in the same way: of the same ops and kinds of arguments."""
    numbers: dict[int, int] = {id(p): n for n, p in enumerate(found.parameters)}
    uses = []
    for use in found.uses:
        record = use.record
        numbers[id(record)] = len(numbers)
        op = op_name(record.call.op), record.derived
        uses.append((*op, *_slots(record, numbers), *map(_kind, record.leaves)))
    return (
        tuple([(p.dtype, p.shape, p.device.type) for p in given.parameters]),
        tuple([_kind(leaf) for leaf in given.leaves]),
        str(given.spec),
        tuple([_kind(out) for out in found.outputs]),
        tuple([tuple([block.origin for block in mine]) for mine in found.blocks]),
        tuple(uses),
        tuple(autocasts().items()),
    )


def _slots(record: Record, numbers: dict[int, int]) -> Iterator[Hashable]:
    for slot, entry in zip(record.slots, record.entries, strict=True):
        source = slot.source
        key = (source.record, source.output) if isinstance(source, Derived) else (source, 0)
        yield slot.index, numbers.get(id(key[0])), key[1], entry is None


def _ops(found: Captured) -> list[str]:
    return [op_name(use.record.call.op) for use in found.uses]


def _kind(leaf: Any) -> Hashable:
    """What decides on rules: dtypes and dimensions of tensors, whether these are one; flags, integers."""
    if isinstance(leaf, Tensor):
        return leaf.dtype, *[min(size, 2) for size in leaf.shape]
    if isinstance(leaf, slice):
        return leaf.start, leaf.stop, leaf.step
    if leaf is None or isinstance(leaf, (bool, int, str, torch.dtype)):
        return leaf
    return type(leaf).__name__


def _random_weights(outputs: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Of each output, ``[B, *S]``: none close to zero."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for out in outputs:
        uniform = torch.rand(2, *out.shape, generator=generator)
        found.append(((0.5 + uniform[0]) * (1 - 2 * (uniform[1] < 0.5).float())).to(out.device))
    return found


@own_precision
def _disagreements(blocks: Sequence[Sequence[Block]], outputs: Sequence[Tensor], weights: Sequence[Tensor],
                   gradients: Sequence[Tensor], lost: float) -> dict[int, float]:  # fmt: skip
    """The parameters whose blocks' ``Jᵀ w`` is not the gradient, and the norm of the difference."""
    pairs = zip(weights, outputs, strict=True)
    w = torch.cat([x.reshape(len(x), -1).T.to(out.dtype) for x, out in pairs])  # [K, B]
    sizes = [float(g.norm()) for g in gradients]
    bad: dict[int, float] = {}
    for n, (mine, gradient) in enumerate(zip(blocks, gradients, strict=True)):
        left, row = gradient, w.to(gradient.dtype)
        for block in mine:
            left = left - block.vjp(row).detach()
        off, most = float(left.norm()), max(lost, tolerance(gradient.dtype)) * sizes[n]
        if off <= most:
            continue
        # a gradient that is nothing but rounding (an attention's key bias) is noise of the whole's size
        bound = sum(float(block.bound(row.abs())) for block in mine)
        if not off <= most + 64 * torch.finfo(gradient.dtype).eps * (bound + max(sizes)):
            bad[n] = off if isfinite(off) else inf
    return bad


def _same(got: Sequence[Tensor], want: Sequence[Tensor], most: float) -> bool:
    """Are two computations of the outputs equal but for rounding?"""
    return all(float((a - b).norm()) <= most * float(b.norm()) for a, b in zip(got, want, strict=True))


def _noise_like(parameter: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(parameter.shape, generator=generator)
    return noise.to(parameter.device, parameter.dtype)
