"""Compares blocks with gradients: whether they differ by more than the function's own rounding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite

import torch
from torch import Tensor

from gramjd import pytree
from gramjd.blocks import Block
from gramjd.complexes import real_block
from gramjd.contraction import Options
from gramjd.contraction.consistency import INCONSISTENT, is_consistent
from gramjd.errors import CheckFailedError
from gramjd.functional.capture import Captured
from gramjd.internals import autocasts
from gramjd.rounding import own_precision, tolerance
from gramjd.verification.gradients import Gradients, Repeatable, noise_like
from gramjd.verification.structures import ops_of

_SCALE = 1.37  # no power of two: results differ by rounding alone
_SMALL = 0.2  # relative differences above it are no rounding
_NOISE = 8  # times what rounding moves a gradient by, as measured once, that a difference may be
_IMPURE = (
    "The function gave other outputs when it was called again with the same arguments, so that its Jacobian "
    "could not be verified. It must be pure: draw random numbers from torch's default generator, and change "
    "nothing outside"
)
_WRONG_PRODUCTS = INCONSISTENT.format("the parameters").rstrip(". ")
_CHANGE = 4  # see Call.slack
_CHANGE_ALONE = 1024  # for one sample: no others average its rounding, and no wrong rule of vmap is as small


@dataclass(frozen=True)
class Call(Repeatable):
    """One call of a transformed function, whose result is compared with ``torch.func``'s."""

    slack: int = _CHANGE  # roundings of the outputs that a difference, as a step, may change them by

    def difference(self, found: Captured) -> str | None:
        """Describe the difference to ``torch.func``'s gradient; an empty text if there is none.

        ``None`` if they cannot be compared, because outputs or gradients have NaN or infinite entries.

        The gradient is that of all samples, by ``vmap``, whose rule for an op may be wrong for all of them or
        all but one. So the results of two are compared without ``vmap``, too; those of each, where ``vmap``
        does not confirm them.

        Raises:
            CheckFailedError: the function failed.
        """
        if self.without_vmap or self.randomness != "error":  # alone, a sample would draw other numbers
            return self._difference(found)
        try:
            together, failed = self._difference(found), None
        except CheckFailedError as error:
            together, failed = None, error
        if together in (_IMPURE, _WRONG_PRODUCTS) or (together is None and failed is None):
            return together
        samples = len(found.outputs[0])
        some = {self.seed % samples, (self.seed + 1) % samples}
        for n in range(samples) if together or failed else sorted(some):
            if difference := self._of_sample(found, n, together, failed):
                return difference
        return ""

    def _of_sample(self, found: Captured, n: int, together: str | None, failed: CheckFailedError | None
                   ) -> str | None:  # fmt: skip
        """The difference in the result of one sample; where nothing tells, what all samples have shown."""
        doubtful = bool(together) or failed is not None
        try:
            alone = replace(self, sample=n, slack=_CHANGE if doubtful else _CHANGE_ALONE)
            difference = alone._difference(found)
        except Exception:  # a function that runs under vmap alone
            difference = None
        if difference is None and failed is not None:
            raise failed from failed.__cause__
        return together if difference is None else difference

    def _difference(self, found: Captured) -> str | None:
        """Describe the difference, of all samples or of one."""
        if self.sample is not None:
            found = found.of_sample(self.sample)
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
        return self._other_outputs(found, first) or self._compared(found, weights, first)

    def _other_outputs(self, found: Captured, alone: Gradients) -> str:
        """Describe outputs of one sample that are others under ``vmap``, by more than rounding."""
        if self.sample is None:
            return ""
        eps = max(torch.finfo(dtype).eps for dtype in self._dtypes(found))
        pairs = zip(found.outputs, alone.outputs, strict=True)
        if all(torch.allclose(a.to(b.dtype), b, rtol=0.01, atol=_CHANGE_ALONE * eps) for a, b in pairs):
            return ""
        return (
            f"The outputs of sample {self.sample} are others if it runs by itself, without torch.vmap. "
            "Either vmap's rule for an op of the function is wrong, or the function is not pure"
        )

    def _compared(self, found: Captured, weights: list[Tensor], first: Gradients) -> str:
        blocks = [list(map(real_block, mine)) for mine in found.blocks]
        dtypes = self._dtypes(found)
        bad = _disagreements(blocks, found.outputs, weights, first.gradients, max(map(tolerance, dtypes)))
        sizes = [float(g.norm()) for g in first.gradients]
        if bad and (self.sample is not None or all(off <= _SMALL * sizes[n] for n, off in bad.items())):
            # two forwards in few digits may differ in the sign of what enters a ReLU
            for twin in self._precise():
                again = twin.capture_or_none()
                if again is not None and ops_of(again) == ops_of(found):
                    return twin._difference(again) or ""
        if not bad:
            w = torch.cat([x.reshape(len(x), -1).T for x in weights])  # [K, B]
            right = is_consistent(blocks, w, Options())
            return "" if right else _WRONG_PRODUCTS
        repeated = self.gradients(found.outputs, weights)
        if not _same(repeated.outputs, first.outputs, max(map(tolerance, dtypes))):
            return _IMPURE
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
        """The dtypes of the function's parameters, their uses and its outputs."""
        given = [*self.given.parameters, *found.outputs, *(c for use in found.uses for c in use.cs)]
        return {*self._autocasts(), *(t.dtype for t in given if t is not None)}

    def _autocasts(self) -> list[torch.dtype]:
        return [] if self.exact else list(autocasts().values())

    def _precise(self) -> Iterator[Call]:
        """Yield the call in a higher precision, if there is one: without autocast, or in float64."""
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
            measured = off <= _NOISE * noise[n] and (off <= _SMALL * sizes[n] or noise[n] > sizes[n] / 2)
            # how the sum changes where the parameter moves along the difference, by as much as it is
            change = off * max(1.0, float(self.given.parameters[n].norm()))
            if not measured and change > self.slack * eps * total:
                kept[n] = off
        return kept

    def _noise(self, found: Captured, weights: list[Tensor], first: Gradients, eps: float) -> list[float]:
        """The norm of the change of gradients by the rounding of parameters and weights."""
        generator = torch.Generator().manual_seed(self.seed)
        moved = [p * (1 + 2 * eps * noise_like(p, generator)) for p in self.given.parameters]
        call = replace(self, given=self.given.with_parameters(moved))
        again = call.gradients(found.outputs, [_SCALE * w for w in weights]).gradients
        return [float((b / _SCALE - a).norm()) for a, b in zip(first.gradients, again, strict=True)]

    def hides_uses(self, found: Captured) -> bool:
        """Whether zeros that can change later (a gate, LoRA's B) hide uses from the comparison."""
        if any(not bool(p.any()) for p in self.given.parameters):
            return True
        cotangents = ([c for c in use.cs if c is not None] for use in found.uses)
        return any(cs and not any(bool(c.any()) for c in cs) for cs in cotangents)


def _random_weights(outputs: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Random weights for each output, ``[B, *S]``, none close to zero."""
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
        left, row = gradient, w.to(gradient)
        for block in mine:
            left = left - block.vjp(row).detach()
        off, most = float(left.norm()), max(lost, tolerance(gradient.dtype)) * sizes[n]
        if off <= most:
            continue
        # a gradient that is nothing but rounding (an attention's key bias) is noise of the whole's size
        bound = sum(float(block.bound(row.abs()).detach()) for block in mine)
        if not isfinite(off) or off > most + 64 * torch.finfo(gradient.dtype).eps * (bound + max(sizes)):
            bad[n] = off if isfinite(off) else inf
    return bad


def _same(got: Sequence[Tensor], want: Sequence[Tensor], most: float) -> bool:
    """Whether two computations of the outputs are equal up to rounding."""
    return all(float((a - b).norm()) <= most * float(b.norm()) for a, b in zip(got, want, strict=True))
