"""Recurrences over time, with their derivatives in closed form.

A layer, of whose input at time ``t`` the gates are ``x_t``, is

    u_t = h_{t-1} Wᵀ + b,    state_t = step(x_t, u_t, state_{t-1}).

Torch's fused op gives all hidden states ``h``. So ``u`` is one linear map at all times at once: one use of
``W`` in place of one for each time. Backpropagation through time (Werbos, 1990) then gives the cotangents of
all ``x_t`` and ``u_t`` by one product and a few other ops a step, without a graph of every gate.

The equations are those of ``torch.nn.LSTM``, ``GRU`` and ``RNN``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gramjd import prepared
from gramjd.internals import (
    VF,
    differentiated_outside,
    in_forward_mode,
    inside_transform,
    is_compiling,
    unseen_by_modes,
)

State = tuple[Tensor, ...]  # (h,), of an LSTM (h, cell)
Several = tuple[Tensor, ...]


@dataclass(frozen=True)
class Scan:
    """A recurrence, by functions that know no transforms.

    Attributes:
        hidden: ``(input [T, B, i], weights, first state)`` → ``h [T, B, H]``.
        known: ``(x, u, h, *first state)`` → what ``pull`` needs of all times; of an LSTM the cells first.
        pull: ``(dh, *d last state, *known, *first state, W)`` → the cotangents of ``x``, ``u`` and the first
            state.
        carried: how many tensors a state has.
    """

    hidden: Callable[[Tensor, Sequence[Tensor], State], Tensor]
    known: Callable[..., Several]
    pull: Callable[..., Several]
    carried: int = 1


def _fused(op: Callable[..., Any], carried: int) -> Callable[[Tensor, Sequence[Tensor], State], Tensor]:
    def hidden(x: Tensor, weights: Sequence[Tensor], state: State) -> Tensor:
        """One layer by torch's fused op."""
        first = [s.unsqueeze(0) for s in state]
        given = (x, first if carried > 1 else first[0], list(weights), len(weights) > 2)
        found: Tensor = op(*given, 1, 0.0, False, False, False)[0]
        return found

    return hidden


def _lstm_known(x: Tensor, u: Tensor, h: Tensor, h0: Tensor, c0: Tensor) -> Several:
    z = x + u
    i, f, _, o = z.sigmoid().chunk(4, 2)
    g = z.chunk(4, 2)[2].tanh()
    added, cells, cell = i * g, [], c0
    for f_t, added_t in zip(f.unbind(0), added.unbind(0), strict=True):
        cell = torch.addcmul(added_t, f_t, cell)
        cells.append(cell)
    return torch.stack(cells), i, f, g, o


def _lstm_pull(dh: Tensor, dh_last: Tensor, dc: Tensor, cells: Tensor, i: Tensor, f: Tensor, g: Tensor,
               o: Tensor, h0: Tensor, c0: Tensor, w: Tensor) -> Several:  # fmt: skip
    tanh = cells.tanh()
    before = torch.cat([c0.unsqueeze(0), cells[:-1]])
    by_cell = (g * i * (1 - i), before * f * (1 - f), i * (1 - g * g))  # d cell / d gates
    slopes = torch.stack([*by_cell, tanh * o * (1 - o)], 2)  # the last one: d h / d gate
    found: list[Tensor] = []
    back = dh_last
    for dh_t, cell_t, f_t, slope_t in _backwards(dh, o * (1 - tanh * tanh), f, slopes):
        d = dh_t + back
        dc = torch.addcmul(dc, d, cell_t)
        dz = (torch.stack([dc, dc, dc, d], 1) * slope_t).flatten(1)
        dc, back = dc * f_t, dz.mm(w)
        found.append(dz)
    dx = torch.stack(found[::-1])
    return dx, dx, back, dc


def _gru_known(x: Tensor, u: Tensor, h: Tensor, h0: Tensor) -> Several:
    H = h0.shape[1]
    u_n = u[:, :, 2 * H :]
    r, z = (x[:, :, : 2 * H] + u[:, :, : 2 * H]).sigmoid().chunk(2, 2)
    return r, z, (x[:, :, 2 * H :] + r * u_n).tanh(), u_n, h


def _gru_pull(dh: Tensor, dh_last: Tensor, r: Tensor, z: Tensor, n: Tensor, u_n: Tensor, h: Tensor,
              h0: Tensor, w: Tensor) -> Several:  # fmt: skip
    before = torch.cat([h0.unsqueeze(0), h[:-1]])
    to_n = (1 - z) * (1 - n * n)  # d h / d what n is the tanh of
    to_gates = [to_n * u_n * r * (1 - r), (before - n) * z * (1 - z)]
    to_x, to_u = torch.stack([*to_gates, to_n], 2), torch.stack([*to_gates, to_n * r], 2)
    cotangents, dus = [], []
    back = dh_last
    for dh_t, z_t, u_t in _backwards(dh, z, to_u):
        d = dh_t + back
        du = (d.unsqueeze(1) * u_t).flatten(1)
        back = torch.addmm(d * z_t, du, w)
        cotangents.append(d)
        dus.append(du)
    dx = (torch.stack(cotangents[::-1]).unsqueeze(2) * to_x).flatten(2)
    return dx, torch.stack(dus[::-1]), back


def _rnn_known(x: Tensor, u: Tensor, h: Tensor, h0: Tensor) -> Several:
    return (h,)


def _rnn_pull(slope: Callable[[Tensor], Tensor]) -> Callable[..., Several]:
    def pull(dh: Tensor, dh_last: Tensor, h: Tensor, h0: Tensor, w: Tensor) -> Several:
        found: list[Tensor] = []
        back = dh_last
        for dh_t, slope_t in _backwards(dh, slope(h)):
            dz = (dh_t + back) * slope_t
            back = dz.mm(w)
            found.append(dz)
        dx = torch.stack(found[::-1])
        return dx, dx, back

    return pull


def _backwards(*tensors: Tensor) -> list[Several]:
    """The entries of several tensors at each time, the last time first."""
    return [*zip(*(t.unbind(0) for t in tensors), strict=True)][::-1]


LSTM = Scan(_fused(VF.lstm, 2), _lstm_known, _lstm_pull, carried=2)
GRU = Scan(_fused(VF.gru, 1), _gru_known, _gru_pull)
TANH = Scan(_fused(VF.rnn_tanh, 1), _rnn_known, _rnn_pull(lambda h: 1 - h * h))
RELU = Scan(_fused(VF.rnn_relu, 1), _rnn_known, _rnn_pull(lambda h: (h > 0).to(h.dtype)))


def applies(x: Tensor, state: State, weights: Sequence[Tensor]) -> bool:
    """Whether the closed form is enough: nothing differentiates it once more, or forward, or compiles it.

    In an engine's replay nobody asks for the cotangents of a first state, unless it is made of parameters.
    On a GPU, cuDNN wants the weights of all layers in one piece of memory.
    """
    tensors = (x, *state, *weights)
    if is_compiling() or in_forward_mode() or x.device.type != "cpu" or len({t.dtype for t in tensors}) > 1:
        return False
    if inside_transform():
        return not any(map(differentiated_outside, tensors))
    return not any(t.requires_grad for t in state)


def scan(recurrence: Scan, given: Tensor, x: Tensor, state: State, weights: Sequence[Tensor]
         ) -> tuple[Tensor, State]:  # fmt: skip
    """Outputs ``[T, B, H]`` and the last state.

    One ``F.linear`` uses the weights between hidden states.

    Args:
        recurrence: of which kind.
        given: the input ``[T, B, i]``.
        x: its gates ``[T, B, gates]``.
        state: the first one.
        weights: of the fused op: of the input, between hidden states, and their biases, if there are any.
    """
    n = recurrence.carried
    _, w, *biases = weights
    with unseen_by_modes():
        bare, first = [t.detach() for t in weights], [s.detach() for s in state]

        def hidden(given: Tensor, *rest: Tensor) -> Several:
            return (recurrence.hidden(given, rest[n:], rest[:n]),)

        kernel = _Kernel(hidden, (1, *[0] * n, *[None] * len(bare)), (1,))
        (h,) = _Merged.apply(kernel, given.detach(), *first, *bare)
        before = torch.cat([first[0].unsqueeze(0), h[:-1]])
    u = F.linear(before, w, biases[1] if biases else None)
    with unseen_by_modes():
        kernel = _Kernel(recurrence.known, (1, 1, 1, *[0] * n), key=recurrence.known)
        known = _Merged.apply(kernel, x.detach(), u.detach(), h, *first)
        out, *last = _Through.apply(recurrence, x, u, bare[1], *state, h, *known)
    return out, tuple(last)


@dataclass(frozen=True)
class _Kernel:
    """A function of tensors, and the dimension of the samples in each argument; ``None``: it has none."""

    run: Callable[..., tuple[Tensor, ...]]
    dims: tuple[int | None, ...]
    results: tuple[int, ...] | None = None  # in each result; by default the second one
    key: object = None  # under which its ops are prepared


class _Merged(torch.autograd.Function):
    """A function that is run below ``vmap``: its batches are more samples."""

    @staticmethod
    def forward(kernel: _Kernel, *tensors: Tensor) -> Several:
        if kernel.key is None:
            return kernel.run(*tensors)
        found, _ = prepared.call(lambda given: (kernel.run(*given), None), kernel.key, tensors)
        return tuple(found)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, kernel: _Kernel, *tensors: Tensor) -> Any:
        size, given = info.batch_size, [*zip(tensors, in_dims[1:], kernel.dims, strict=True)]
        if any(own is not None and at is None for _, own, at in given):  # weights of their own for each
            each = [
                _Merged.apply(kernel, *(t if own is None else t.select(own, n) for t, own, _ in given))
                for n in range(size)
            ]
            return tuple(map(torch.stack, zip(*each, strict=True))), (0,) * len(each[0])
        merged = [t if at is None else _together(t, own, at, size) for t, own, at in given]
        found = _Merged.apply(kernel, *merged)
        dims = kernel.results or (1,) * len(found)
        return tuple(t.unflatten(at, (size, -1)) for t, at in zip(found, dims, strict=True)), dims


def _together(t: Tensor, own: int | None, at: int, size: int) -> Tensor:
    """A tensor with the batch in dimension ``own`` (``None``: alike for all) as more samples in ``at``."""
    batched = t.expand(size, *t.shape) if own is None else t.movedim(own, 0)
    return batched.movedim(0, at).flatten(at, at + 1)


class _Through(torch.autograd.Function):
    """Hidden states that are known, as what a recurrence makes of the gates."""

    generate_vmap_rule = True

    @staticmethod
    def forward(recurrence: Scan, x: Tensor, u: Tensor, w: Tensor, *tensors: Tensor) -> Several:
        states = tensors[recurrence.carried :][: recurrence.carried]
        return states[0].clone(), *[each[-1].clone() for each in states]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.recurrence, _, _, *tensors = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        n = ctx.recurrence.carried
        w, *tensors = ctx.saved_tensors
        first, known = tensors[:n], tensors[n + 1 :]
        dims = (1, *[0] * n, *[1] * len(known), *[0] * n, None)
        kernel = _Kernel(ctx.recurrence.pull, dims, (1, 1, *[0] * n), key=ctx.recurrence.pull)
        dx, du, *dfirst = _Merged.apply(kernel, *cotangents, *known, *first, w)
        return None, dx, du, None, *dfirst, None, *[None] * len(known)
