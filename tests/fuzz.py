"""Random models: programs of a small grammar, and what the exactness contract makes of each.

A program is a list of instructions, each an op of the tables below with two numbers that choose its
operands, parameters and variant. Every instruction is valid everywhere, so any list is a model. Values
know where their samples are only by name: ``B`` samples, ``T`` positions, ``D`` features, ``N`` is
``(B, T)`` merged and ``M`` is ``(T, B)`` merged; no letter for samples is an un-batched value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from oracle import dense_gramian
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gramjd
from gramjd import Engine


class Instruction(NamedTuple):
    """An op by name, which of the values it takes, and which variant and parameters."""

    op: str
    on: int
    variant: int


@dataclass(frozen=True)
class Recipe:
    """A whole example: sizes, the model's instructions, those of its children, and the losses."""

    sizes: Mapping[str, int]
    body: tuple[Instruction, ...]
    children: tuple[tuple[Instruction, ...], ...]
    loss: int
    setting: int  # of the engine, and of what is done with the model
    seed: int


class Value(NamedTuple):
    t: Tensor
    dims: str


class Program(nn.Module):
    """The model of a list of instructions; parameters and modules come into being when first used.

    There are few of each kind, so most are used more than once, also by parent and child.
    """

    def __init__(self, sizes: Mapping[str, int], body: tuple[Instruction, ...],
                 children: tuple[tuple[Instruction, ...], ...] = ()) -> None:  # fmt: skip
        super().__init__()
        self.sizes, self.body = sizes, body
        self.own, self.parts = nn.ParameterDict(), nn.ModuleDict()
        self.children_ = nn.ModuleList([Program(sizes, child) for child in children])
        for child in self.children_[:1]:
            child.own = self.own  # the first child shares its parent's parameters

    def parameter(self, dims: str, which: int) -> Tensor:
        name = f"{dims}{which % 2}"
        if name not in self.own:
            shape = [self.sizes[dim] for dim in dims]
            with torch.random.fork_rng(devices=[]):  # the first forward draws what the others do
                values = torch.randn(shape, dtype=torch.float64)
            self.own[name] = nn.Parameter(values / self.sizes["D"] ** 0.5)
        return self.own[name]

    def part(self, kind: str, which: int) -> nn.Module:
        name = f"{kind}{which % 2}"
        if name not in self.parts:
            with torch.random.fork_rng(devices=[]):
                self.parts[name] = PARTS[kind](self.sizes["D"]).double().train(self.training)
        return self.parts[name]

    def forward(self, inputs: dict[str, Any]) -> tuple[Value, list[Value]]:
        self.ids: Tensor = inputs["ids"]
        values = [Value(*given) for given in inputs["values"]]
        for op, on, variant in self.body:
            self.values = values
            back = on // 2 % len(values) if on % 2 else 0  # every other time the last value
            values = [*values, OPS[op](self, values[-1 - back], variant)]
        del self.values
        return values[-1], values

    def to(self, v: Value, dims: str) -> Value:  # type: ignore[override]
        """The value with its dimensions in the order asked for; samples are added by expansion."""
        t, have = v
        sizes = self.sizes
        for merged, parts in [("N", "BT"), ("M", "TB")]:
            if merged in have:
                at = have.index(merged)
                t = t.unflatten(at, [sizes[part] for part in parts])
                have = have.replace(merged, parts)
        want = dims.replace("N", "BT").replace("M", "TB")
        for dim in want:
            if dim not in have:
                t, have = t.expand(sizes[dim], *t.shape), dim + have
        t = t.permute([have.index(dim) for dim in want])
        for merged, parts in [("N", "BT"), ("M", "TB")]:
            if merged in dims:
                at = want.index(parts)
                t, want = t.flatten(at, at + 1), want.replace(parts, merged)
        return Value(t, dims)


PARTS: dict[str, Callable[[int], nn.Module]] = {
    "linear": lambda d: nn.Linear(d, d),
    "norm": nn.LayerNorm,
    "mlp": lambda d: nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Dropout(0.2), nn.Linear(2 * d, d)),
    "lstm": lambda d: nn.LSTM(d, d, batch_first=True),
    "gru": lambda d: nn.GRU(d, d if d % 2 else d // 2, bidirectional=d % 2 == 0),
    "attention": lambda d: nn.MultiheadAttention(d, 1, dropout=0.2, batch_first=True),
    "prelu": lambda d: nn.PReLU(),
}

_ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [
    torch.tanh, torch.sin, F.gelu, F.silu, lambda t: t.softmax(-1), lambda t: F.dropout(t, 0.3),
    lambda t: t.clone().relu_(), lambda t: t / (1 + t.square()),
]  # fmt: skip


def activate(p: Program, v: Value, a: int) -> Value:
    v = p.to(v, "BTD") if v.dims[-1] in "BNM" else v  # no softmax over samples
    return Value(_ACTIVATIONS[a % len(_ACTIVATIONS)](v.t), v.dims)


def linear(p: Program, v: Value, a: int) -> Value:
    """A weight on the last dimension, in one of the ways to write it."""
    last = v.dims[-1]
    if last not in "TD":
        v, last = p.to(v, "BTD"), "D"
    w, b = p.parameter(last * 2, a // 2), p.parameter(last, a)
    out = [
        lambda: F.linear(v.t, w, b),
        lambda: F.linear(v.t, w),
        lambda: v.t @ w,
        lambda: torch.matmul(v.t, w.t()) + b,
        lambda: torch.einsum("...i,ij->...j", v.t, w),
        lambda: torch.addmm(b, v.t.flatten(0, -2), w).view_as(v.t) if v.t.ndim > 1 else v.t @ w,
        lambda: (w @ v.t.unsqueeze(-1)).squeeze(-1),
        lambda: F.linear(v.t, torch.cat([w[:1], w[1:] * 2])),
        lambda: sum(v.t @ piece for piece in (w.tanh(), w.T)),
    ][a % 9]()
    return Value(out, v.dims)


def scale(p: Program, v: Value, a: int) -> Value:
    """A parameter broadcast against a value, on any of its dimensions but the samples."""
    dims = [dim for dim in v.dims if dim in "TD"]
    mine = dims[a % len(dims)] if dims else ""
    w = p.parameter(mine, a // 2)
    w = w.reshape([-1 if dim == mine else 1 for dim in v.dims]) if mine else w
    out = [
        lambda: v.t * w,
        lambda: v.t + w,
        lambda: w - v.t,
        lambda: v.t / (2 + w.square()),
        lambda: torch.where(v.t > 0, v.t, w),
        lambda: torch.lerp(v.t, w, 0.3),
        lambda: torch.addcmul(v.t, w, v.t.sin()),
        lambda: v.t.clone().add_(w),
        lambda: v.t.clone().mul_(w).tanh_(),
        lambda: torch.maximum(v.t, w),
        lambda: v.t.sigmoid() ** (1 + w.abs()),
    ][a % 11]()
    return Value(out, v.dims)


def normalise(p: Program, v: Value, a: int) -> Value:
    if v.dims[-1] != "D":
        v = p.to(v, "BTD")
    w, b, n = p.parameter("D", a), p.parameter("D", a + 1), p.sizes["D"]
    if a % 3 == 0:
        return Value(F.layer_norm(v.t, [n], w, b), v.dims)
    if a % 3 == 1:
        return Value(v.t * v.t.square().mean(-1, keepdim=True).add(1e-5).rsqrt() * w, v.dims)
    v = p.to(v, "BDT")
    return Value(F.group_norm(v.t, n if a % 2 else 1, w, b), v.dims)


def convolve(p: Program, v: Value, a: int) -> Value:
    v = p.to(v, "BDT")
    w, b = p.parameter("DD3", a // 2), p.parameter("D", a)
    groups = p.sizes["D"] if a % 2 else 1
    w = w[:, :1] if groups > 1 else w
    out = F.conv1d(v.t, w, b if a % 3 else None, padding=1, groups=groups)
    return Value(out, v.dims)


def embed(p: Program, v: Value, a: int) -> Value:
    """Tokens, or positions looked up once for the whole batch, added."""
    table = p.parameter("VD", a // 4)
    if a % 4 == 0:
        return Value(table[: p.sizes["T"]], "TD")
    if a % 4 == 1:
        return Value(F.embedding(torch.arange(p.sizes["T"]), table), "TD")
    v = p.to(v, "BTD")
    out = F.embedding(p.ids, table) if a % 4 == 2 else table[p.ids]
    return Value(v.t + out, v.dims)


def rearrange(p: Program, v: Value, a: int) -> Value:
    v = p.to(v, ["TBD", "BDT", "DBT", "ND", "MD", "BTD", "DTB", "TDB", "DN"][a % 9])
    return Value(v.t.contiguous(), v.dims) if a % 2 else v


def child(p: Program, v: Value, a: int) -> Value:
    """A child program called with a PyTree, plainly, under a checkpoint, or after its own weight's use."""
    if not len(p.children_):
        return module(p, v, a)
    called = p.children_[a % len(p.children_)]
    inputs = {"ids": p.ids, "values": [v, p.values[a % len(p.values)]]}
    if a % 5 == 4:
        out: Value = checkpoint(lambda inputs: called(inputs)[0], inputs, use_reentrant=False)
    else:
        out, _ = called(inputs)
    if a % 5 == 3:
        out, _ = called({**inputs, "values": [out]})
    return out


def module(p: Program, v: Value, a: int) -> Value:
    kind = list(PARTS)[a % len(PARTS)]
    part = p.part(kind, a // len(PARTS))
    if kind == "gru" or v.dims[-1] != "D" or kind in ("lstm", "attention"):
        v = p.to(v, "TBD" if kind == "gru" else "BTD")
    if kind == "attention":
        return Value(part(v.t, v.t, v.t, need_weights=a % 2 == 0)[0], v.dims)
    if kind == "lstm":
        out, (_, c) = part(v.t)
        return Value(out + c.transpose(0, 1), v.dims)
    if kind == "gru":
        out, h = part(v.t)
        return Value(out + h[:1].mean(2, keepdim=True), v.dims)
    if kind == "linear" and a % 2:  # a parent that uses its child's weight beside calling it
        return Value(part(v.t) + v.t @ part.weight, v.dims)  # type: ignore[operator]
    return Value(part(v.t), v.dims)


def meet(p: Program, v: Value, u: Value) -> tuple[Tensor, Tensor, str]:
    """Two values that broadcast: ``BTD``, or ``TD`` without samples."""
    found = [p.to(each, "BTD" if {*"BNM"} & {*each.dims} else "TD") for each in (v, u)]
    return found[0].t, found[1].t, max(found[0].dims, found[1].dims, key=len)


def combine(p: Program, v: Value, a: int) -> Value:
    h, u, dims = meet(p, v, p.values[a // 6 % len(p.values)])
    w = p.parameter("DD", a)
    out = [
        lambda: h + u,
        lambda: h * u,
        lambda: torch.cat(torch.broadcast_tensors(h, u), -1) @ torch.cat([w, w.T]),
        lambda: torch.stack(torch.broadcast_tensors(h, u), -1).amax(-1),
        lambda: (h @ u.transpose(-1, -2)).softmax(-1) @ u,
        lambda: h + u.detach(),
    ][a % 6]()
    return Value(out, dims)


def token(p: Program, v: Value, a: int) -> Value:
    """A learned token in the place of a position, by concatenation or in place."""
    v = p.to(v, "BTD")
    w = p.parameter("D", a)
    if a % 2:
        return Value(torch.cat([w.expand(len(v.t), 1, -1), v.t[:, 1:]], 1), v.dims)
    out = v.t.clone()
    out[:, a % p.sizes["T"]] = w
    return Value(out, v.dims)


def derived(p: Program, v: Value, a: int) -> Value:
    """A function of parameters alone, un-batched until something meets it."""
    w, t = p.parameter("DD", a), p.parameter("TD", a // 2)
    return Value([lambda: t @ w, lambda: (t.tanh() * p.parameter("D", a)).softmax(-1),
                  lambda: F.linear(t, w, p.parameter("D", a)).sin()][a % 3](), "TD")  # fmt: skip


def pool(p: Program, v: Value, a: int) -> Value:
    """Reduced over positions, and back by expansion."""
    v = p.to(v, "BTD")
    pooled = [v.t.mean(1), v.t.amax(1), v.t[:, -1], v.t.logsumexp(1)][a % 4]
    return Value(pooled.unsqueeze(1).expand_as(v.t) if a % 2 else v.t + pooled[:, None], v.dims)


def pick(p: Program, v: Value, a: int) -> Value:
    """Positions chosen by tokens, put through a weight and put back."""
    v = p.to(v, "BTD")
    chosen = p.ids % 2 == a % 2
    w = p.parameter("DD", a)
    out = v.t.clone()
    out[chosen] = v.t[chosen] @ w
    return Value(out, v.dims)


def branch(p: Program, v: Value, a: int) -> Value:
    """Control flow by the data of the whole batch."""
    w = p.parameter("DD", a) if float(v.t.detach().sum()) > 0 else p.parameter("DD", a + 1)
    v = p.to(v, "BTD")
    return Value((v.t @ w).tanh(), v.dims)


def reorder(p: Program, v: Value, a: int) -> Value:
    """Samples in another order and back: not mixed."""
    v = p.to(v, "BTD")
    order = torch.arange(len(v.t)).roll(1 + a % 2) if a % 3 else torch.arange(len(v.t)).flip(0)
    h = (v.t[order] @ p.parameter("DD", a)).tanh()
    return Value(h[order.argsort()], v.dims)


def scan(p: Program, v: Value, a: int) -> Value:
    """A loop over the positions with the same weights at each."""
    v = p.to(v, "BTD")
    w, u = p.parameter("DD", a), p.parameter("DD", a + 1)
    h, found = torch.zeros_like(v.t[:, 0]), []
    for x in v.t.unbind(1):
        h = (x @ w + F.linear(h, u)).tanh() if a % 2 else torch.addmm(x, h, w).sin()
        found.append(h)
    return Value(torch.stack(found, 1), v.dims)


def move(p: Program, v: Value, a: int) -> Value:
    """Features moved between positions by tokens, as in graph networks and routing."""
    v = p.to(v, "BTD")
    at = (p.ids % p.sizes["T"]).unsqueeze(-1).expand_as(v.t)
    h = v.t @ p.parameter("DD", a)
    rows, within = h.flatten(0, 1), torch.arange(p.ids.numel()).view_as(p.ids).flip(1).flatten()
    out = [
        lambda: h.gather(1, at),
        lambda: torch.zeros_like(h).scatter_add(1, at, h),
        lambda: v.t.index_add(1, at[0, :, 0], h),
        lambda: torch.zeros_like(rows).index_add(0, within, rows).view_as(h),
    ][a % 4]()
    return Value(out, v.dims)


def gate(p: Program, v: Value, a: int) -> Value:
    """Products of several weights' results: bilinear forms, fused projections in pieces, batched matmuls."""
    v = p.to(v, "BTD")
    w, m = p.parameter("DDD", a), p.parameter("DD", a)
    out = [
        lambda: F.bilinear(v.t, v.t, w, p.parameter("D", a)),
        lambda: torch.baddbmm(v.t, v.t, m.expand(len(v.t), -1, -1)),
        lambda: torch.einsum("btd,def,btf->bte", v.t, w, v.t),
        lambda: (lambda q, k: q * k.sigmoid())(*F.linear(v.t, torch.cat([m, m.T])).chunk(2, -1)),
        lambda: F.linear(v.t, m, m[0]) * v.t.mean(1, keepdim=True),
        lambda: F.scaled_dot_product_attention(v.t @ m, v.t, v.t, dropout_p=0.3 if p.training else 0.0),
    ][a % 6]()
    return Value(out, v.dims)


SEPARABLE: dict[str, Callable[[Program, Value, int], Value]] = {
    f.__name__: f
    for f in [activate, linear, scale, normalise, convolve, embed, rearrange, child, module, combine, token,
              derived, pool, pick, branch, reorder, scan, move, gate]
}  # fmt: skip


def mix(p: Program, v: Value, a: int) -> Value:
    """Samples mixed."""
    v = p.to(v, "BTD")
    h = v.t
    out = [
        lambda: h - h.mean(0),
        lambda: h.softmax(0),
        lambda: h + h.roll(1, 0),
        lambda: h.sort(0)[0],
        lambda: h.cumsum(0),
        lambda: F.batch_norm(h.transpose(1, 2), None, None, p.parameter("D", a), p.parameter("D", a + 1),
                             training=True).transpose(1, 2),
        lambda: torch.einsum("btd,ctd->bct", h, h).softmax(1).mean(-1) @ h.flatten(1),
        lambda: h * h.detach().mean(0) + 0.1 * h.sum((0, 1)),
        lambda: p.part("linear", a)(h.mean(0)) + h,
    ][a % 9]()  # fmt: skip
    return Value(out.reshape(h.shape), v.dims)


OPS = {**SEPARABLE, "mix": mix}


def run(recipe: Recipe, model: Program) -> tuple[Tensor, int]:
    """The losses of a recipe's own data and random numbers, and which dimension has the samples."""
    torch.manual_seed(recipe.seed)
    shape = [recipe.sizes[dim] for dim in "BTD"]
    x, y = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    ids = torch.randint(recipe.sizes["V"], shape[:2])
    out, values = model({"ids": ids, "values": [(x, "BTD")]})
    a, h = recipe.loss, model.to(out, "BTD").t
    if a % 7 == 0:  # another value has a part, un-batched ones among them
        h = h + model.to(values[a % len(values)], "BTD").t
    if a % 5 == 0:  # two forwards, one loss
        h = h * model.to(model({"ids": ids, "values": [(y, "BTD")]})[0], "BTD").t
    if a % 3 == 0:
        return (h - y).square().sum((1, 2)), 0
    if a % 3 == 1:
        return F.cross_entropy(h.transpose(1, 2), ids % h.shape[2], reduction="none"), 0
    samples_first = a // 3 % 2
    return torch.stack([h.sin().sum((1, 2)), h.square().mean((1, 2))], samples_first), 1 - samples_first


def registered(recipe: Recipe, model: Program) -> tuple[Any, list[Tensor]]:
    """What the engine is given, and the parameters that it then stands for."""
    if recipe.setting % 4 == 1:
        return [list(model.modules())], list(model.parameters())
    parts = [*model.children_, *model.parts.values()]
    if recipe.setting % 4 == 2 and parts:  # some modules only
        some = parts[::2]
        return [some], list({id(p): p for m in some for p in m.parameters(recurse=False)}.values())
    return [model], list(model.parameters())


def outcome(recipe: Recipe) -> list[str]:
    """What became of the recipe with a batch dimension and without; an assertion fails if it is wrong."""
    torch.manual_seed(recipe.seed)
    model = Program(recipe.sizes, recipe.body, recipe.children).train(recipe.setting % 3 > 0)
    losses, dim = run(recipe, model)  # the parameters come into being
    for p in list(model.parameters())[1::2]:
        p.requires_grad_(recipe.setting % 5 > 0)  # or frozen
    modules, parameters = registered(recipe, model)
    losses, _ = run(recipe, model)
    trainable = [p for p in parameters if p.requires_grad]
    if not bool(losses.isfinite().all()) or not _reaches(losses, trainable):
        return ["no parameter"]
    found = []
    for batch_dim in (dim, None):
        engine = Engine(*modules, batch_dim=batch_dim)
        for _ in range(2):
            losses, _ = run(recipe, model)
            try:
                gramian = engine.compute_gramian(losses)
            except gramjd.NotSeparableError:
                assert batch_dim is not None
                result = "refused"
            else:
                want = dense_gramian(losses, trainable)
                noise = 1e-24  # what is zero but for rounding
                assert (gramian - want).abs().max() <= 1e-8 * want.abs().max() + noise
                result = "exact"
        engine.close()
        found.append(
            f"{_kind(recipe, model, parameters) if batch_dim is not None else 'no samples'}: {result}"
        )
    return found


def _reaches(losses: Tensor, parameters: list[Tensor]) -> bool:
    """Does the loss depend on any of the parameters?"""
    if not parameters or not losses.requires_grad:
        return False
    found = torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
    return any(gradient is not None for gradient in found)


def _kind(recipe: Recipe, model: Program, parameters: list[Tensor]) -> str:
    """May the recipe be refused?"""
    if any(op == "mix" for op, _, _ in recipe.body):
        return "mixing"
    checkpointed = any(op == "child" and a % 5 == 4 for op, _, a in recipe.body)
    if checkpointed or len(parameters) < len(list(model.parameters())):
        return "un-batched out of sight"  # in a checkpoint, or outside the registered modules
    return "separable"
