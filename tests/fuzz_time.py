"""Ops of random models (:mod:`fuzz_program`) that move values in another way at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fuzz_program import Op, Program, Value
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence


class MatMul(torch.autograd.Function):
    """A use that no op shows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, w = ctx.saved_tensors
        return grads[0] @ w.T, x.flatten(0, -2).T @ grads[0].flatten(0, -2)


class Pick(torch.autograd.Function):
    """Entries of a dimension, by numbers that autograd does not save."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, dim: int, order: list[int]) -> Tensor:
        ctx.dim, ctx.order = dim, torch.tensor(order)
        return h.index_select(dim, ctx.order)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return torch.zeros_like(grads[0]).index_add(ctx.dim, ctx.order, grads[0]), None, None


def timed(p: Program, v: Value, a: int) -> Value:
    """Numbers that move positions, or samples there and back."""
    t, w, n = p.to(v, "BTD").t, p.parameter("DD", a), p.now.number
    length = t.shape[1]
    k, order, steps = n % length, p.order(len(t)), p.order(length)
    back = torch.tensor(order).argsort().tolist()
    h = t @ w

    def written(of: Tensor, places: list[int], dim: int) -> Tensor:
        out = torch.zeros_like(of)
        for i, j in enumerate(places):
            out.select(dim, i).copy_(of.select(dim, j))
        return out

    def stacked(of: Tensor, places: list[int]) -> Tensor:
        return torch.stack([of[i] for i in places])

    def swapped() -> Tensor:
        a, b = (lambda: (t @ w).sin()), (lambda: (t.transpose(0, 1) @ w).cos())
        if p.now.flip:
            second, first = b(), a()
        else:
            first, second = a(), b()
        return first + second.transpose(0, 1)

    def no_grad() -> Tensor:
        with torch.set_grad_enabled(not p.now.detached):
            target = t @ w
        return t + target

    out = p.choose(a, "timed", {
        "a position": lambda: h + t[:, k : k + 1],
        "a slice": lambda: torch.cat([t[:, k:], t[:, :k]], 1) @ w,
        "a shift": lambda: h.roll(k, 1) + t,
        "a pad": lambda: F.pad(h, (0, 0, k, length - k))[:, :length] + t,
        "a stride": lambda: t + h.clone(memory_format=torch.contiguous_format).as_strided(
            (len(t), h.shape[2]), (length * h.shape[2], 1), k * h.shape[2]).unsqueeze(1),
        "a flip": lambda: h.flip(1 + n % 2) + t,
        "a dimension": lambda: h.softmax(1 + n % 2),
        "a layout": lambda: (t.transpose(0, n % 2) @ w).sin().transpose(0, n % 2),
        "writes": lambda: written(h, steps, 1) + t,
        "samples written": lambda: written(written(t, order, 0) @ w, back, 0),
        "samples by number": lambda: stacked(stacked(t, order) @ w, back),
        "samples by index": lambda: (t[order] @ w).tanh()[back],
        "samples by split": lambda: torch.cat([(torch.cat([t.split(1)[i] for i in order]) @ w).split(1)[i]
                                               for i in back]),
        "picked in a function": lambda: t + Pick.apply(h, 1, steps),
        "samples picked in a function": lambda: Pick.apply(Pick.apply(t, 0, order) @ w, 0, back),
        "a mask": lambda: t + h * (torch.rand(len(t), length, 1) > (0.4, 1.0)[n % 2]),
        "another order": swapped,
        "detach": lambda: t + (h.detach() if p.now.detached else h),
        "no_grad": no_grad,
        "a loop": lambda: _repeat(t, w, 1 + n % 3),
        "a factor": lambda: t + float(n % 3) * h,
    })  # fmt: skip
    return Value(out, "BTD")


def _repeat(t: Tensor, w: Tensor, times: int) -> Tensor:
    for _ in range(times):
        t = (t @ w).sin()
    return t


def ragged(p: Program, v: Value, a: int) -> Value:
    """The first positions of each sample in one tensor; how many each has changes, their sum may not."""
    t, w = p.to(v, "BTD").t, p.parameter("DD", a)
    length = t.shape[1]
    sizes = [max(1, length // 2)] * len(t)
    if p.now.number % 3 and len(t) > 1:
        sizes[0], sizes[-1] = sizes[0] + 1, sizes[-1] - 1
    sizes = [sizes[i] for i in p.order(len(t))]
    lengths = torch.tensor(sizes)
    owner = torch.arange(len(t)).repeat_interleave(lengths)
    mask = torch.arange(length) < lengths[:, None]
    rows = (t[mask] @ w).tanh()
    none = rows.new_zeros(len(t), rows.shape[1])

    def packed() -> Tensor:
        some = pack_padded_sequence(t, lengths.clamp(min=1), batch_first=True, enforce_sorted=False)
        padded, _ = pad_packed_sequence(some._replace(data=some.data @ w), batch_first=True)
        return padded.sum(1)

    def attended() -> Tensor:
        inside = owner[:, None] == owner
        h = F.scaled_dot_product_attention(rows[None], rows[None], rows[None], attn_mask=inside)[0]
        return none.index_add(0, owner, h)

    out = p.choose(a, "ragged", {
        "split": lambda: torch.stack([piece.sum(0) for piece in rows.split(sizes)]),
        "pad_sequence": lambda: pad_sequence(list(rows.split(sizes)), batch_first=True).sum(1),
        "segment_reduce": lambda: torch.segment_reduce(rows, "sum", lengths=lengths),
        "index_add": lambda: none.index_add(0, owner, rows),
        "scatter_add": lambda: none.scatter_add(0, owner[:, None].expand_as(rows), rows),
        "index_put": lambda: none.index_put((owner,), rows, accumulate=True),
        "masked_scatter": lambda: t.new_zeros(t.shape).masked_scatter(mask.unsqueeze(2), rows).sum(1),
        "members": lambda: F.one_hot(owner, len(t)).to(rows).T @ rows,
        "embedding_bag": lambda: F.embedding_bag(torch.arange(len(rows)), rows, (lengths.cumsum(0) - lengths),
                                                 mode="sum"),
        "repeat_interleave": lambda: none.index_add(
            0, owner, rows * (t[:, 0] @ w).repeat_interleave(lengths, 0)),
        "packed": packed,
        "attention": attended,
        "graph": lambda: none.index_add(0, owner, rows + rows[_edges(sizes, p.now.number)]),
    })  # fmt: skip
    return Value(t + out.unsqueeze(1), "BTD")


def _edges(sizes: list[int], number: int) -> Tensor:
    """To each position one of its own sample's."""
    found, first = [], 0
    for size in sizes:
        found += [first + (i + number) % size for i in range(size)]
        first += size
    return torch.tensor(found, dtype=torch.long)


def hidden(p: Program, v: Value, a: int) -> Value:
    """Uses that no op shows, behind what is nothing in some steps."""
    t, w, g = p.to(v, "BTD").t, p.parameter("DD", a), p.gate()
    shown = t @ w if a // 11 % 2 else t
    now = p.now.gate

    def written() -> Tensor:
        out = shown.clone()
        out[:, 0] = out[:, 0] + g * MatMul.apply(t[:, 0], w)
        return out

    out = p.choose(a, "hidden", {
        "gate": lambda: shown + g * MatMul.apply(t, w),
        "gate inside": lambda: shown + MatMul.apply(t * g, w),
        "number": lambda: shown + now * MatMul.apply(t, w) + g,
        "weight": lambda: shown + MatMul.apply(t, w * g),
        "low rank": lambda: shown + MatMul.apply(MatMul.apply(t, w), torch.diag(g)),
        "dead": lambda: shown + (MatMul.apply(t, w) - 9 + 20 * g.detach().abs()).relu() + g,
        "mask": lambda: shown + MatMul.apply(t, w) * (torch.rand(len(t), 1, 1) < abs(now)) + g,
        "where": lambda: torch.where(torch.rand(len(t), 1, 1) < abs(now), MatMul.apply(t, w), shown) + g,
        "write": written,
        "plain": lambda: shown + g * (t @ w),
        "dropout": lambda: shown + F.dropout(MatMul.apply(t, w), 0.0 if now else 1.0) + g,
    })  # fmt: skip
    return Value(out, "BTD")


TIMED: list[Op] = [timed, ragged, hidden]


def _pair(p: Program, h: Tensor) -> Tensor:
    """A sample gets another one, behind the gate."""
    out = h.clone()
    i = p.now.number % len(h)
    out[i] = out[i] + p.gate() * h[i - 1]
    return out


def _sets(p: Program, h: Tensor) -> Tensor:
    """Positions of the whole batch in sets of other sizes than the samples have."""
    sizes = [h.shape[1]] * len(h)
    if p.now.number % 3 and len(h) > 1:
        sizes[0], sizes[-1] = sizes[0] - 1, sizes[-1] + 1
    return h + torch.stack([piece.mean(0) for piece in h.flatten(0, 1).split(sizes)]).unsqueeze(1)


class Mean(torch.autograd.Function):
    """The mean of the batch, of which no op tells."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.mean(0, keepdim=True).expand_as(x).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].mean(0, keepdim=True).expand_as(grads[0]).clone()


def _banded(p: Program, h: Tensor) -> Tensor:
    k = p.now.number % 2
    return h + ((h.flatten(1) @ h.flatten(1).T).tril(k).triu(-k) @ h.flatten(1)).view_as(h) * 0.1


LEAKS: dict[str, Callable[[Program, Tensor], Tensor]] = {
    "one pair": _pair,
    "mean in a function": lambda p, h: h + p.gate() * Mean.apply(h),
    "a sample chosen": lambda p, h: h + h[p.now.number % len(h)] * p.gate(),
}
# Functions of hidden values ``[B, T, D]`` in which samples are mixed, in some steps at least.
MIXING: dict[str, Callable[[Program, Tensor], Tensor]] = {
    "sets of other sizes": _sets,
    "band": _banded,
    "shift by number": lambda p, h: h + h.roll(p.now.number, 0),
    "samples moved": lambda p, h: h[p.order(len(h))],
    "samples moved in a function": lambda p, h: Pick.apply(h, 0, p.order(len(h))),
    "samples written": lambda p, h: torch.stack([h[i] for i in p.order(len(h))]) + h,
    "batch norm by mode": lambda p, h: (
        F.batch_norm(
            h.mT, torch.zeros(h.shape[2]).double(), torch.ones(h.shape[2]).double(), training=p.training
        ).mT
    ),
    "detached mean, or not": lambda p, h: h - (h.mean(0).detach() if p.now.detached else h.mean(0)),
    "a matrix of data": lambda p, h: torch.einsum(
        "bc,ctd->btd", torch.eye(len(h)).double() + (p.now.number % 2) * torch.ones(len(h), len(h)), h
    ),
}
