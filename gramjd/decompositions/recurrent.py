"""Recurrent networks, which torch fuses, step by step as linear maps and gates.

Equations and argument orders are those of ``torch.nn.LSTM``, ``GRU`` and ``RNN``. The samples of packed
sequences are padded here, and keep their state where they have ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gramjd.decompositions import scans
from gramjd.decompositions.registry import register_decomposition
from gramjd.internals import VF

State = tuple[Tensor, ...]  # (h,), of an LSTM (h, cell)
Step = Callable[..., State]  # (gates of the input, state, weights) -> state
Weights = Sequence[Tensor | None]  # hidden to hidden, its bias, projection


def lstm_step(gates: Tensor, state: State, weights: Weights) -> State:
    weight, bias, projection = weights
    h, cell = state
    i, f, g, o = (gates + F.linear(h, weight, bias)).chunk(4, -1)  # type: ignore[arg-type]
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    h = o.sigmoid() * cell.tanh()
    return h if projection is None else F.linear(h, projection), cell


def gru_step(gates: Tensor, state: State, weights: Weights) -> State:
    weight, bias, _ = weights
    (h,) = state
    r, z, n = gates.chunk(3, -1)
    r_h, z_h, n_h = F.linear(h, weight, bias).chunk(3, -1)  # type: ignore[arg-type]
    z = (z + z_h).sigmoid()
    n = (n + (r + r_h).sigmoid() * n_h).tanh()
    return (n + z * (h - n),)


def tanh_step(gates: Tensor, state: State, weights: Weights) -> State:
    return ((gates + F.linear(state[0], weights[0], weights[1])).tanh(),)  # type: ignore[arg-type]


def relu_step(gates: Tensor, state: State, weights: Weights) -> State:
    return ((gates + F.linear(state[0], weights[0], weights[1])).relu(),)  # type: ignore[arg-type]


_SCANS = {lstm_step: scans.LSTM, gru_step: scans.GRU, tanh_step: scans.TANH, relu_step: scans.RELU}


def _direction(step: Step, x: Tensor, state: State, weights: Weights, reverse: bool, alive: Tensor | None
               ) -> tuple[Tensor, State]:  # fmt: skip
    """One layer in one direction: ``x [T, B, i]`` → outputs ``[T, B, h]`` and the last state."""
    w_ih, w_hh, b_ih, b_hh, projection = weights
    gates = F.linear(x, w_ih, b_ih)  # type: ignore[arg-type]
    closed = _SCANS.get(step) if alive is None and projection is None and len(x) > 1 else None
    used = [w for w in weights if w is not None]
    if closed is not None and scans.applies(gates, state, used):
        given = (x.flip(0), gates.flip(0)) if reverse else (x, gates)
        out, last = scans.scan(closed, *given, state, used)
        return out.flip(0) if reverse else out, last
    outputs: list[Tensor] = []
    times = range(len(x))
    for t in reversed(times) if reverse else times:
        new = step(gates[t], state, (w_hh, b_hh, projection))
        if alive is not None:
            new = tuple(torch.where(alive[t], n, s) for n, s in zip(new, state, strict=True))
        state = new
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if reverse else outputs), state


def _layers(step: Step, x: Tensor, hx: State, weights: Sequence[Tensor], bias: bool, layers: int,
            dropout: float, train: bool, bidirectional: bool, alive: Tensor | None = None
            ) -> tuple[Tensor, State]:  # fmt: skip
    """All layers and directions: outputs ``[T, B, h]`` and last states ``[layers, B, h]``."""
    directions = 2 if bidirectional else 1
    per = len(weights) // (layers * directions)
    last: list[State] = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            number = layer * directions + direction
            mine: list[Tensor | None] = list(weights[number * per : (number + 1) * per])
            if not bias:
                mine[2:2] = [None, None]
            mine += [None] * (5 - len(mine))
            out, state = _direction(step, x, tuple(h[number] for h in hx), mine, direction == 1, alive)
            outputs.append(out)
            last.append(state)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if dropout and train and layer < layers - 1:
            if alive is None:
                x = F.dropout(x, dropout)
            else:  # numbers are drawn for the steps that there are
                place = _places(alive)
                x = _spread(F.dropout(x.flatten(0, 1)[place], dropout), place, alive)
    return x, tuple(torch.stack(states) for states in zip(*last, strict=True))


def _padded(step: Step, x: Tensor, hx: State, weights: Sequence[Tensor], bias: bool, layers: int,
            dropout: float, train: bool, bidirectional: bool, batch_first: bool
            ) -> tuple[Tensor, State]:  # fmt: skip
    """Sequences of one length, ``[T, B, i]`` or ``[B, T, i]``."""
    x = x.transpose(0, 1) if batch_first else x
    out, last = _layers(step, x, hx, weights, bias, layers, dropout, train, bidirectional)
    return out.transpose(0, 1) if batch_first else out, last


def _packed(step: Step, data: Tensor, batch_sizes: Tensor, hx: State, weights: Sequence[Tensor], bias: bool,
            layers: int, dropout: float, train: bool, bidirectional: bool
            ) -> tuple[Tensor, State]:  # fmt: skip
    """Packed sequences: ``data [all steps, i]``, of which ``batch_sizes [T]`` belong to each time."""
    sizes = batch_sizes.to(data.device)
    alive = torch.arange(hx[0].shape[1], device=data.device) < sizes[:, None]  # [T, B]
    place = _places(alive)
    out, last = _layers(
        step,
        _spread(data, place, alive),
        hx,
        weights,
        bias,
        layers,
        dropout,
        train,
        bidirectional,
        alive[..., None],
    )
    return out.flatten(0, 1)[place], last


def _places(alive: Tensor) -> Tensor:
    """The indices of the existing steps among all ``T·B``, in order of time."""
    return alive.flatten().nonzero().squeeze(1)


def _spread(data: Tensor, place: Tensor, alive: Tensor) -> Tensor:
    """Packed entries ``[steps, i]`` in their places ``[T, B, i]``, zeros elsewhere."""
    return (
        data.new_zeros(alive.numel(), data.shape[1]).index_copy(0, place, data).unflatten(0, alive.shape[:2])
    )


def _is_packed(args: Sequence[Any]) -> bool:
    """Whether the op has packed arguments: the second is the batch sizes, the fourth the weights."""
    return isinstance(args[3], (list, tuple))


@register_decomposition(VF.lstm)
def lstm(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    out, (h, cell) = (_packed if _is_packed(args) else _padded)(lstm_step, *args)
    return out, h, cell


def _single(step: Step) -> Callable[..., tuple[Tensor, Tensor]]:
    """The decomposition of a network whose state is one tensor."""

    def network(*args: Any) -> tuple[Tensor, Tensor]:
        place = 2 if _is_packed(args) else 1
        args = (*args[:place], (args[place],), *args[place + 1 :])
        out, (h,) = (_packed if place == 2 else _padded)(step, *args)
        return out, h

    return network


@register_decomposition(VF.lstm_cell)
def lstm_cell(input: Tensor, hx: State, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None,
              b_hh: Tensor | None = None) -> State:  # fmt: skip
    return lstm_step(F.linear(input, w_ih, b_ih), tuple(hx), (w_hh, b_hh, None))


def _single_cell(step: Step) -> Callable[..., Tensor]:
    """The decomposition of a cell whose state is one tensor."""

    def cell(input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None,
             b_hh: Tensor | None = None) -> Tensor:  # fmt: skip
        return step(F.linear(input, w_ih, b_ih), (hx,), (w_hh, b_hh, None))[0]

    return cell


for _name, _step in (("gru", gru_step), ("rnn_tanh", tanh_step), ("rnn_relu", relu_step)):
    register_decomposition(getattr(VF, _name))(_single(_step))
    register_decomposition(getattr(VF, f"{_name}_cell"))(_single_cell(_step))
