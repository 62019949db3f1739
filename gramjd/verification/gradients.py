"""A transform's call once more: its function differentiated by ``torch.func``, nothing of ours in between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gramjd.complexes import as_real
from gramjd.functional.arguments import Arguments
from gramjd.functional.capture import Captured
from gramjd.functional.strides import with_usual_strides
from gramjd.internals import innermost_level, unfused_attention
from gramjd.rounding import own_precision
from gramjd.rules import decomposition_of

Run = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Sequence[Tensor], Sequence[Tensor]]]
Same = TypeVar("Same", bound="Repeatable")


@dataclass(frozen=True)
class Repeatable:
    """One call of a transformed function, to be computed once more."""

    given: Arguments
    run_of: Callable[[Arguments], Run]  # for one sample
    capture: Callable[[Run, Arguments], Captured]
    generators: Generators
    randomness: str
    chunk_size: int | None
    shared: bool  # is there no batch?
    sample: int | None = None  # the only one, which runs without ``vmap``; ``None``: all samples
    seed: int = 0  # of the weights
    exact: bool = False  # without the caller's autocast

    @property
    def without_vmap(self) -> bool:
        """Whether the function runs as it is, without ``vmap``."""
        return self.shared or self.sample is not None

    def gradients(self, like: Sequence[Tensor], weights: Sequence[Tensor]) -> Gradients:
        """Gradients of the weighted sum of all outputs ``[B, *S]``, by ``torch.func.vjp``."""
        return (own_precision(self._gradients) if self.exact else self._gradients)(like, weights)

    def _gradients(self, like: Sequence[Tensor], weights: Sequence[Tensor]) -> Gradients:
        parameters = [p.detach() for p in self.given.parameters]
        batch = [t.detach() if self.sample is None else t.detach()[self.sample] for t in self.given.batch]
        samples = len(like[0])
        size = samples if self.without_vmap else min(self.chunk_size or samples, samples)
        total: list[Tensor] | None = None
        outputs: list[list[Tensor]] = []
        mode = _Batchable()
        # a sample by itself needs no op but those of the function
        batchable = nullcontext() if self.sample is not None else mode
        with torch.no_grad(), self.generators.as_before(), unfused_attention(), batchable:
            for start in range(0, samples, size):
                if self.randomness == "same":
                    self.generators.restart()
                some = batch if self.without_vmap else [t[start : start + size] for t in batch]
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
        if self.without_vmap:
            return [out.unsqueeze(0) for out in run(parameters, batch)[0]]

        def sample(some: Sequence[Tensor]) -> list[Tensor]:
            mode.level = innermost_level()
            return list(run(parameters, some)[0])

        found: list[Tensor] = torch.vmap(sample, randomness=self.randomness)(batch)
        return found

    def moved(self: Same) -> Same:
        """Return the call with parameters that are nowhere zero."""
        generator = torch.Generator().manual_seed(self.seed)
        moved = []
        for p in self.given.parameters:
            p = p.detach()
            size = float(p.norm()) / max(1, p.numel()) ** 0.5
            moved.append(p + (0.3 * size or 0.1) * noise_like(p, generator))
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
        body = decomposition_of(func)
        if func in _NORMS and innermost_level() > self.level:
            body = _NORMS[func]
        if body is None:
            if func is F.group_norm:
                args, kwargs = with_usual_strides(args, kwargs or {}, nullcontext())
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


def noise_like(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Draw normal random numbers of the shape and dtype of a tensor."""
    noise = torch.randn(parameter.shape, generator=generator)
    return noise.to(parameter.device, parameter.dtype)
