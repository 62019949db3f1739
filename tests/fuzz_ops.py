"""The ops of random models (:mod:`fuzz_program`), each with its variants."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from fuzz_program import Op, Program, Value
from fuzz_time import LEAKS, MIXING, TIMED
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

PARTS: dict[str, Callable[[int], nn.Module]] = {
    "linear module": lambda d: nn.Linear(d, d),
    "norm module": lambda d: nn.LayerNorm(d, eps=0.1),
    "mlp": lambda d: nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Dropout(0.2), nn.Linear(2 * d, d)),
    "lstm": lambda d: nn.LSTM(d, d, 2, batch_first=True, dropout=0.2),
    "gru": lambda d: nn.GRU(d, d if d % 2 else d // 2, bidirectional=d % 2 == 0),
    "cell": lambda d: nn.GRUCell(d, d),
    "attention module": lambda d: nn.MultiheadAttention(d, 1, dropout=0.2, batch_first=True),
    "encoder": lambda d: nn.TransformerEncoderLayer(d, 1, 2 * d, batch_first=True, layer_norm_eps=0.1),
    "prelu": lambda d: nn.PReLU(),
    "weight norm": lambda d: parametrizations.weight_norm(nn.Linear(d, d)),
    "low rank": lambda d: nn.Sequential(nn.Linear(d, 1, bias=False), nn.Linear(1, d)),
}


def activate(p: Program, v: Value, a: int) -> Value:
    t = (p.to(v, "BTD") if v.dims[-1] in "BNM" else v).t  # no softmax over samples
    dims = "BTD" if v.dims[-1] in "BNM" else v.dims
    out = p.choose(a, "activate", {
        "tanh": lambda: t.tanh(),
        "gelu": lambda: F.gelu(t),
        "softmax": lambda: t.softmax(-1),
        "dropout": lambda: F.dropout(t, 0.3, p.training),
        "stochastic depth": lambda: t * (torch.rand([len(t), *[1] * (t.ndim - 1)]) > 0.3),
        "in place": lambda: t.clone().add_(t.sin()).relu_(),
        "quotient": lambda: t / (1 + t.square()),
        "straight through": lambda: t + (t.round() - t).detach(),
    })  # fmt: skip
    return Value(out, dims)


def autocast(function: Callable[..., Tensor], *args: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return function(*args)


def linear(p: Program, v: Value, a: int) -> Value:
    """A weight on the last dimension, in one of the ways to write it."""
    v = v if v.dims[-1] in "TD" else p.to(v, "BTD")
    last, t = v.dims[-1], v.t
    w, b = p.parameter(last * 2, a // 2), p.parameter(last, a)
    out = p.choose(a, "linear", {
        "bias": lambda: F.linear(t, w, b),
        "plain": lambda: F.linear(t, w),
        "@": lambda: t @ w,
        "transposed": lambda: torch.matmul(t, w.t()) + b,
        "einsum": lambda: torch.einsum("...i,ij->...j", t, w),
        "addmm": lambda: torch.addmm(b, t.flatten(0, -2), w).view_as(t) if t.ndim > 1 else t @ w,
        "from the left": lambda: (w @ t.unsqueeze(-1)).squeeze(-1),
        "cat of weights": lambda: F.linear(t, torch.cat([w[:1], w[1:] * 2])),
        "tied": lambda: sum(t @ piece for piece in (w.tanh(), w.T)),
        "random": lambda: t @ F.gumbel_softmax(w),
        "frozen copy": lambda: t @ (w + w.detach()),
        "float32": lambda: F.linear(t.float(), w.float(), b.float()).double(),
        "autocast": lambda: autocast(F.linear, t.float(), w.float()).double(),
        "standardised": lambda: F.linear(t, (w - w.mean(1, keepdim=True)) / (1 + w.norm()), b),
    })  # fmt: skip
    return Value(out, v.dims)


def scale(p: Program, v: Value, a: int) -> Value:
    """A parameter broadcast against a value, on any of its dimensions but the samples."""
    t, dims = v.t, [dim for dim in v.dims if dim in "TD"]
    mine = dims[a % len(dims)] if dims else ""
    w = p.parameter(mine, a // 2)
    w = w.reshape([-1 if dim == mine else 1 for dim in v.dims]) if mine else w
    p.note("broadcast")
    out = p.choose(a, "scale", {
        "*": lambda: t * w,
        "+": lambda: t + w,
        "-": lambda: w - t,
        "/": lambda: t / (2 + w.square()),
        "where": lambda: torch.where(t > 0, t, w),
        "lerp": lambda: torch.lerp(t, w, 0.3),
        "addcmul": lambda: torch.addcmul(t, w, t.sin()),
        "add in place": lambda: t.clone().add_(w),
        "mul in place": lambda: t.clone().mul_(w).tanh_(),
        "maximum": lambda: torch.maximum(t, w),
        "power": lambda: t.sigmoid() ** (1 + w.abs()),
        "expand": lambda: t * w.expand_as(t).exp(),
        "dropped": lambda: t + F.dropout(w, 0.3, p.training),
    })  # fmt: skip
    return Value(out, v.dims)


def norm(p: Program, v: Value, a: int) -> Value:
    v = p.to(v, "BDT") if a % 7 > 3 else v if v.dims[-1] == "D" else p.to(v, "BTD")
    w, b, n, t = p.parameter("D", a), p.parameter("D", a + 1), p.sizes["D"], v.t
    eps = 0.1  # the gradient of two numbers' norm is mere rounding without it
    out = p.choose(a, "norm", {
        "layer": lambda: F.layer_norm(t, [n], w, b, eps),
        "rms": lambda: t * t.square().mean(-1, keepdim=True).add(eps).rsqrt() * w,
        "float32 rms": lambda: F.normalize(t.float(), dim=-1).double() * w,
        "unit": lambda: F.normalize(t, dim=-1, eps=eps) * w,
        "group": lambda: F.group_norm(t, n if a // 7 % 2 else 1, w, b, eps),
        "instance": lambda: F.instance_norm(t, weight=w, bias=b, eps=eps),
        "batch, evaluated": lambda: F.batch_norm(t, torch.ones(n).double(), torch.ones(n).double(), w, b),
    })  # fmt: skip
    return Value(out, v.dims)


def convolve(p: Program, v: Value, a: int) -> Value:
    v = p.to(v, "BDT")
    w, b, k, t = p.parameter("DD3", a // 2), p.parameter("D", a), p.parameter("D33", a), v.t
    out = p.choose(a, "convolve", {
        "bias": lambda: F.conv1d(t, w, b, padding=1),
        "depthwise": lambda: F.conv1d(t, w[:, :1], padding=1, groups=len(w)),
        "dilated": lambda: F.conv1d(t, w, b, padding=2, dilation=2),
        "transposed": lambda: F.conv_transpose1d(t, w, b, padding=1),
        "2d": lambda: F.conv2d(t.unsqueeze(1), k.unsqueeze(1), b, padding=1).mean(1),
        "2d, channels last": lambda: F.conv2d(t.unsqueeze(-1).to(memory_format=torch.channels_last),
                                              w.unsqueeze(-1), padding=(1, 0)).squeeze(-1),
        "unfolded": lambda: torch.einsum("bdtk,edk->bet", F.pad(t, (1, 1)).unfold(2, 3, 1), w),
    })  # fmt: skip
    return Value(out, v.dims)


def embed(p: Program, v: Value, a: int) -> Value:
    """Tokens, or positions looked up once for the whole batch, added."""
    table, ids, h = p.parameter("VD", a // 8), p.ids, p.to(v, "BTD").t
    p.note(*(["batch-independent"] if a % 8 in (0, 1, 6) else []))
    out = p.choose(a, "embed", {
        "positions": lambda: h + table[: p.sizes["T"]],
        "positions by number": lambda: h + F.embedding(torch.arange(p.sizes["T"]), table),
        "tokens": lambda: h + p.traced(F.embedding(ids, table)),
        "index": lambda: h + p.traced(table[ids]),
        "bag": lambda: h + p.traced(F.embedding_bag(ids, table, mode="mean")).unsqueeze(1),
        "one-hot": lambda: h + p.traced(F.one_hot(ids, len(table)).double() @ table),
        "positions [1, T]": lambda: h + F.embedding(torch.arange(p.sizes["T"])[None], table),
        "tied head": lambda: (h @ table.T).softmax(-1) @ table + p.traced(F.embedding(ids, table)),
    })  # fmt: skip
    return Value(out, "BTD")


def rearrange(p: Program, v: Value, a: int) -> Value:
    layouts = {"TBD": "time first", "BDT": "features first", "DBT": "features first",
               "ND": "flattened [B*n, d]", "MD": "flattened [n*B, d]", "DN": "flattened [d, B*n]",
               "DTB": "samples last", "TDB": "samples last"}  # fmt: skip
    dims = list(layouts)[a % len(layouts)]
    p.note(layouts[dims], "reshape" if {*dims} & {*"NM"} else "transpose")
    v = p.to(v, dims)
    return Value(v.t.contiguous(), v.dims) if a % 2 else v


def child(p: Program, v: Value, a: int) -> Value:
    """A child program called with a PyTree, by one of several ways to call it."""
    if not len(p.children_):
        return module(p, v, a)
    called = p.children_[a % len(p.children_)]
    given = {"ids": p.ids, "eps": p.eps, "values": [v, p.values[a % len(p.values)]]}
    dims = ""

    def call(inputs: dict[str, Any] = given) -> Tensor:
        nonlocal dims
        t, dims = called(inputs)["out"]
        return t

    def hooked() -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            return call()

    def beside() -> Tensor:  # the child's own parameter, used by its parent
        t = p.to(Value(call(), dims), "BTD").t
        return t @ called.parameter("DD", a)

    p.note("PyTree", "nested module", *(["tying"] if called.own is p.own else []))
    if a % 5 == 4:
        p.note("parent uses child's")
    out = p.choose(a, "child", {
        "plain": call,
        "checkpoint": lambda: checkpoint(call, given, use_reentrant=False),
        "twice": lambda: call({**given, "values": [Value(call(), dims)]}),
        "saved-tensor hooks": hooked,
        "and its weight": beside,
    })  # fmt: skip
    return Value(out, "BTD" if a % 5 == 4 else dims)


def recurrent(p: Program, v: Value, a: int) -> Value:
    """A module of those that are rarely drawn."""
    return module(p, v, list(PARTS).index(("lstm", "gru", "cell")[a % 3]) + a // 3 * len(PARTS))


def module(p: Program, v: Value, a: int) -> Value:
    kind = list(PARTS)[a % len(PARTS)]
    part: Any = p.part(kind, a // len(PARTS))
    if kind in ("gru", "lstm", "cell", "attention module", "encoder") or v.dims[-1] != "D":
        v = p.to(v, "TBD" if kind == "gru" else "BTD")
    b = a // len(PARTS)
    if kind == "attention module":
        mask = (p.ids % 3 == 0) & (torch.arange(p.sizes["T"]) > 0) if b % 2 else None
        return Value(part(v.t, v.t, v.t, key_padding_mask=mask, need_weights=b % 3 == 0)[0], v.dims)
    if kind == "lstm":
        out, (_, c) = part(v.t)
        return Value(out + c[-1].unsqueeze(1), v.dims)
    if kind == "gru":
        out, h = part(v.t)
        return Value(out + h[:1].mean(2, keepdim=True), v.dims)
    if kind == "cell":
        h = torch.zeros_like(v.t[:, 0])
        return Value(torch.stack([h := part(x, h) for x in v.t.unbind(1)], 1), v.dims)
    if kind == "linear module" and b % 2:
        p.note("parent uses child's")
        return Value(part(v.t) + v.t @ part.weight, v.dims)
    if kind == "prelu" and b % 2:
        return Value(checkpoint(part, v.t, use_reentrant=False), v.dims)
    return Value(part(v.t), v.dims)


def combine(p: Program, v: Value, a: int) -> Value:
    h, u, dims = p.meet(v, p.values[a // 8 % len(p.values)])
    w = p.parameter("DD", a)
    both = torch.broadcast_tensors(h, u)
    p.note("double use")
    out = p.choose(a, "combine", {
        "+": lambda: h @ w + u,
        "*": lambda: h * u,
        "cat": lambda: torch.cat(both, -1) @ torch.cat([w, w.T]),
        "stack": lambda: torch.stack(both, -1).amax(-1),
        "detach": lambda: h + u.detach() @ w,
        "where": lambda: torch.where(h.detach() > u, h, u),
        "split": lambda: sum(piece for piece in (torch.cat(both, 0) @ w).chunk(2)).view_as(both[0]),
        "subtract in place": lambda: both[0].clone().sub_(u),
    })  # fmt: skip
    return Value(out, dims)


def attend(p: Program, v: Value, a: int) -> Value:
    """Attention by hand and fused, with biases and queries that no sample owns."""
    t = p.to(v, "BTD").t
    m, bias, queries = p.parameter("DD", a), p.parameter("TT", a), p.parameter("TD", a)
    causal = torch.ones_like(bias).triu(1).bool()
    dropout = 0.3 if p.training else 0.0
    p.note(*(["batch-independent"] if a % 6 > 1 else []))
    out = p.choose(a, "attend", {
        "fused": lambda: F.scaled_dot_product_attention(t @ m, t, t, dropout_p=dropout),
        "causal": lambda: (t @ m @ t.mT).masked_fill(causal, -torch.inf).softmax(-1) @ t,
        "position bias": lambda: F.dropout((t @ t.mT + bias).softmax(-1), dropout) @ (t @ m),
        "position bias, fused": lambda: F.scaled_dot_product_attention(t, t, t, bias, dropout_p=dropout),
        "learned queries": lambda: (queries @ (t @ m).mT).softmax(-1) @ t,
        "learned queries, fused": lambda: F.scaled_dot_product_attention(
            queries.expand_as(t)[:, None], t[:, None], t[:, None])[:, 0],
    })  # fmt: skip
    return Value(out, "BTD")


def write(p: Program, v: Value, a: int) -> Value:
    """Parameters and results in the place of parts of a value, by concatenation or in place."""
    t, w, m, at = p.to(v, "BTD").t, p.parameter("D", a), p.parameter("DD", a), a // 8 % p.sizes["T"]
    chosen = p.ids % 2 == 0

    def written(change: Callable[[Tensor], Any]) -> Tensor:
        h = t.clone()
        change(h)
        return h

    p.note(*(["in place"] if a % 8 > 1 else ["batch-independent"]))
    out = p.choose(a, "write", {
        "class token": lambda: torch.cat([w.expand(len(t), 1, -1), t[:, 1:]], 1),
        "masked fill": lambda: torch.where(chosen.unsqueeze(-1), w, t),
        "token": lambda: written(lambda h: h.__setitem__((slice(None), at), w)),
        "add to a slice": lambda: written(lambda h: h[:, at].add_(w)),
        "rows chosen": lambda: written(lambda h: h.__setitem__(chosen, t[chosen] @ m)),
        "rows and weight": lambda: written(lambda h: h.__setitem__(chosen, w)),
        "copied": lambda: written(lambda h: h[..., :1].copy_((t @ m)[..., -1:])),
        "features": lambda: written(lambda h: h.select(-1, 0).mul_(w[0])),
    })  # fmt: skip
    return Value(out, "BTD")


def derived(p: Program, v: Value, a: int) -> Value:
    """A function of parameters alone, batch-independent until something meets it."""
    w, t, b = p.parameter("DD", a), p.parameter("TD", a // 2), p.parameter("D", a)
    p.note("batch-independent")
    out = p.choose(a, "derived", {
        "@": lambda: t @ w,
        "softmax": lambda: (t.tanh() * b).softmax(-1),
        "linear": lambda: F.linear(t, w, b).sin(),
        "normalised": lambda: F.layer_norm(t, [len(b)], b, eps=0.1),
        "in place": lambda: t.clone().mul_(b),
    })  # fmt: skip
    return Value(out, "TD")


def pool(p: Program, v: Value, a: int) -> Value:
    """Reduced over positions, and back by decomposition."""
    t = p.to(v, "BTD").t
    pooled = p.choose(a, "pool", {
        "mean": lambda: t.mean(1), "max": lambda: t.amax(1), "last": lambda: t[:, -1],
        "logsumexp": lambda: t.logsumexp(1), "adaptive": lambda: F.adaptive_avg_pool1d(t.mT, 1)[..., 0],
    }) @ p.parameter("DD", a)  # fmt: skip
    return Value(pooled.unsqueeze(1).expand_as(t) if a // 5 % 2 else t + pooled[:, None], "BTD")


def flow(p: Program, v: Value, a: int) -> Value:
    """Control flow and what autograd does not see."""
    t, w, u = p.to(v, "BTD").t, p.parameter("DD", a), p.parameter("DD", a + 1)
    order = torch.arange(len(t)).roll(1) if a // 6 % 2 else torch.arange(len(t)).flip(0)

    def frozen() -> Tensor:
        with torch.no_grad():
            target = t @ u
        return t @ w - target

    out = p.choose(a, "flow", {
        "branch": lambda: t @ (w if float(t.detach().sum()) > 0 else u),
        "no_grad": frozen,
        "reorder": lambda: (t[order] @ w).tanh()[order.argsort()],
        "one by one": lambda: torch.stack([x @ w for x in t]),
        "scan": lambda: torch.stack([*itertools.accumulate(t.unbind(1), lambda h, x: (x + h @ u).sin())], 1),
        "split": lambda: torch.cat([piece @ w for piece in t.split(1)]),
    })  # fmt: skip
    return Value(out, "BTD")


def move(p: Program, v: Value, a: int) -> Value:
    """Features moved between positions by tokens, as in graph networks and routing."""
    t, w, u = p.to(v, "BTD").t, p.parameter("DD", a), p.parameter("DD", a + 1)
    at = (p.ids % p.sizes["T"]).unsqueeze(-1).expand_as(t)
    h = t @ w
    rows, within = h.flatten(0, 1), torch.arange(p.ids.numel()).view_as(p.ids).flip(1).flatten()
    experts = p.ids.flatten() % 2 == 0
    routed = [(experts, w), (~experts, u)]
    out = p.choose(a, "move", {
        "gather": lambda: h.gather(1, at),
        "scatter_add": lambda: torch.zeros_like(h).scatter_add(1, at, h),
        "index_add": lambda: t.index_add(1, at[0, :, 0], h),
        "index_add of rows": lambda: torch.zeros_like(rows).index_add(0, within, rows).view_as(h),
        "experts": lambda: sum(
            torch.zeros_like(rows).index_put((who,), t.flatten(0, 1)[who] @ m) for who, m in routed
        ).view_as(t),
    })  # fmt: skip
    return Value(out, "BTD")


def gate(p: Program, v: Value, a: int) -> Value:
    """Products of several weights' results: bilinear forms, fused projections in pieces, batched matmuls."""
    t, w, m = p.to(v, "BTD").t, p.parameter("DDD", a), p.parameter("DD", a)
    out = p.choose(a, "gate", {
        "bilinear": lambda: F.bilinear(t, t, w, p.parameter("D", a)),
        "baddbmm": lambda: torch.baddbmm(t, t, m.expand(len(t), -1, -1)),
        "einsum": lambda: torch.einsum("btd,def,btf->bte", t, w, t),
        "chunks": lambda: (lambda q, k: q * k.sigmoid())(*F.linear(t, torch.cat([m, m.T])).chunk(2, -1)),
        "with the mean": lambda: F.linear(t, m, m[0]) * t.mean(1, keepdim=True),
        "heads": lambda: torch.einsum("btd,hde->bthe", t, w).flatten(2).unflatten(2, (-1, len(w))).mean(2),
    })  # fmt: skip
    return Value(out, "BTD")


SEPARABLE: dict[str, Op] = {
    f.__name__: f for f in [activate, linear, scale, norm, convolve, embed, rearrange, child, module,
                            recurrent, combine, attend, write, derived, pool, flow, move, gate, *TIMED]
}  # fmt: skip


def _nearest(h: Tensor, sharpness: Tensor) -> Tensor:
    """Attention across the batch by distance; others than one's own weigh ``exp(-sharpness)`` at most."""
    squares = (h.unsqueeze(0) - h.unsqueeze(1)).square().sum((2, 3))
    closest = (squares.detach() + 1e9 * torch.eye(len(h))).min() + 1e-3
    return torch.einsum("bc,ctd->btd", (-squares * sharpness.mean() / closest).softmax(1), h)


def mix(p: Program, v: Value, a: int) -> Value:
    """Samples mixed."""
    h, w = p.to(v, "BTD").t, p.parameter("D", a)
    out = p.choose(a, "mix", {
        "mean": lambda: h - h.mean(0),
        "softmax": lambda: h.softmax(0),
        "roll": lambda: h + h.roll(1, 0),
        "sort": lambda: h.sort(0)[0],
        "cumsum": lambda: h.cumsum(0),
        "batch norm": lambda: F.batch_norm(h.mT, None, None, w, p.parameter("D", a + 1), training=True).mT,
        "attention": lambda: (torch.einsum("btd,ctd->bc", h, h).softmax(1) @ h.flatten(1)).view_as(h),
        "detached mean and sum": lambda: h * h.detach().mean(0) + 0.1 * h.sum((0, 1)),
        "module of the mean": lambda: p.part("linear module", a)(h.mean(0)) + h,
        "wrong view": lambda: h.transpose(0, 1).reshape(h.shape).cumsum(1),
        "whole norm": lambda: h / h.norm(),
        **{name: functools.partial(function, p, h) for name, function in MIXING.items()},
    })  # fmt: skip
    return Value(out, "BTD")


def leak(p: Program, v: Value, a: int) -> Value:
    """Samples mixed by what is nothing in some steps."""
    h = p.to(v, "BTD").t
    out = p.choose(a, "leak", {
        "gate": lambda: h + h.mean(0) * p.gate(),
        "gated attention": lambda: h + _nearest(h, torch.ones(1)) * p.gate(),
        "saturated attention": lambda: _nearest(h, 60 - 110 * p.gate().detach()) + p.gate(),
        "dead": lambda: h + (h.mean(0) - 9 + 20 * p.gate().detach()).relu() + p.gate(),
        **{name: functools.partial(function, p, h) for name, function in LEAKS.items()},
    })  # fmt: skip
    return Value(out, "BTD")


OPS = {**SEPARABLE, "mix": mix, "leak": leak}
