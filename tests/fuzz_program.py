"""A grammar of random models: lists of instructions, each an op with two numbers.

The numbers choose an op's operands, parameters and variant. Every instruction is valid everywhere, so any
list is a model. Values know where their samples are only by name: ``B`` samples, ``T`` positions, ``D``
features, ``N`` is ``(B, T)`` merged and ``M`` is ``(T, B)`` merged; no letter for samples is a
batch-independent value. Models note what they did, so that the tests can count it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Instruction(NamedTuple):
    """An op by name, which of the values it takes, and which variant and parameters."""

    op: str
    on: int
    variant: int


class Value(NamedTuple):
    t: Tensor
    dims: str


Op = Callable[["Program", Value, int], Value]


class Moment(NamedTuple):
    """What is new in a step."""

    batch: int  # 0 is as many samples as the recipe says, 1 is one more, 2 is as many as there are positions
    number: int  # moves offsets, orders, sizes and masks
    gate: float  # what gates are opened to
    training: bool
    flip: bool  # ops run in another order
    detached: bool
    frozen: bool  # every other parameter


@dataclass
class Shared:
    """What a model and its children have in common."""

    ops: Mapping[str, Op]
    parts: Mapping[str, Callable[[int], nn.Module]]  # from the number of features
    notes: set[str]  # of what happened
    seeds: Iterator[int]  # of parameters
    now: Moment


class Program(nn.Module):
    """The model of a list of instructions; parameters and modules come into being when first used.

    There are few of each kind, so most are used more than once, also by parent and child.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        body: Sequence[Instruction],
        children: Sequence[Program],
        shared: Shared,
    ) -> None:
        super().__init__()
        self.sizes, self.body = dict(sizes), body
        self.own, self.parts = nn.ParameterDict(), nn.ModuleDict()
        self.children_ = nn.ModuleList(children)
        self.shared = shared
        for child in children[:1]:
            child.own = self.own  # the first child shares its parent's parameters

    @property
    def now(self) -> Moment:
        return self.shared.now

    def order(self, count: int, *, moved: bool = True) -> list[int]:
        """A permutation that changes with the step, each third time none."""
        number = self.now.number
        generator = torch.Generator().manual_seed(number)
        return (
            torch.randperm(count, generator=generator).tolist() if moved and number % 3 else [*range(count)]
        )

    def note(self, *what: str) -> None:
        self.shared.notes.update(what)

    def parameter(self, dims: str, which: int) -> Tensor:
        name = f"{dims}{which % 2}"
        if name in self.own:
            self.note("reuse")
        else:
            generator = torch.Generator().manual_seed(next(self.shared.seeds))
            values = torch.randn([self.sizes[d] for d in dims], generator=generator, dtype=torch.float64)
            self.own[name] = nn.Parameter(values / self.sizes["D"] ** 0.5)
        return self.own[name]

    def gate(self) -> Tensor:
        """A parameter that starts at zero."""
        if "gate" not in self.own:
            self.own["gate"] = nn.Parameter(torch.zeros(self.sizes["D"], dtype=torch.float64))
        return self.own["gate"]

    def part(self, kind: str, which: int) -> nn.Module:
        name = f"{kind}{which % 2}"
        self.note("nested module", kind, *(["reuse"] if name in self.parts else []))
        if name not in self.parts:
            with torch.random.fork_rng(devices=[]):  # the first forward draws what the others do
                torch.manual_seed(next(self.shared.seeds))
                self.parts[name] = self.shared.parts[kind](self.sizes["D"]).double().train(self.training)
        return self.parts[name]

    def choose(self, a: int, family: str, variants: Mapping[str, Callable[[], Tensor]]) -> Tensor:
        """The result of one of the variants."""
        name = list(variants)[a % len(variants)]
        self.note(f"{family}: {name}")
        return variants[name]()

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The output, which depends on all values that nothing else used, and all values."""
        self.ids, self.eps = inputs["ids"], inputs["eps"]
        self.sizes["B"] = len(self.ids)
        values = [Value(*given) for given in inputs["values"]]
        unused = set(range(len(values)))
        for op, on, variant in self.body:
            back = on // 2 % len(values) if on % 2 else 0  # every other time the last value
            self.values = values
            unused -= set() if op == "derived" else {len(values) - 1 - back}
            self.note(op)
            found = self.told(self.shared.ops[op](self, values[-1 - back], variant))
            self.values = values  # a child may be called by itself
            unused.add(len(values))
            values = [*values, found]
        del self.values
        out = values[-1]
        for index in sorted(unused - {len(values) - 1}):
            h, u, dims = self.meet(out, values[index])
            out = Value(h + u, dims)
        return {"out": out, "all": values}

    def to(self, v: Value, dims: str) -> Value:  # type: ignore[override]
        """The value with its dimensions in the order asked for; samples are added by decomposition."""
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
                self.note("broadcast")
                t = self.traced(t) if dim == "B" else t
        t = t.permute([have.index(dim) for dim in want])
        for merged, parts in [("N", "BT"), ("M", "TB")]:
            if merged in dims:
                at = want.index(parts)
                t, want = t.flatten(at, at + 1), want.replace(parts, merged)
        return Value(t, dims)

    def traced(self, t: Tensor) -> Tensor:
        """A tensor that gets samples here (in dimension 0): by which losses depend on which sample's."""
        return t if self.eps is None else t * (1 + self.eps.view(-1, *[1] * (t.ndim - 1)))

    def told(self, v: Value) -> Value:
        """A value whose samples move with ``eps``, each along a direction of its own.

        What an op makes of its parameters alone depends on no input, but belongs to its samples: an embedding
        of chosen indices, a bias behind a dead unit.
        """
        at = next((at for at, dim in enumerate(v.dims) if dim in "BNM"), None)
        if self.eps is None or at is None or not v.t.is_floating_point():
            return v
        direction = torch.randn(v.t.shape, generator=torch.Generator().manual_seed(v.t.numel()))
        counts = {"B": 1, "N": self.sizes["T"], "M": self.sizes["T"]}
        eps = (
            self.eps.repeat(counts["M"])
            if v.dims[at] == "M"
            else self.eps.repeat_interleave(counts[v.dims[at]])
        )
        return Value(v.t + eps.view(-1, *[1] * (v.t.ndim - 1 - at)) * direction.to(v.t), v.dims)

    def meet(self, v: Value, u: Value) -> tuple[Tensor, Tensor, str]:
        """Two values that broadcast: ``BTD``, or ``TD`` without samples."""
        found = [self.to(each, "BTD" if {*"BNM"} & {*each.dims} else "TD") for each in (v, u)]
        if found[0].dims != found[1].dims:
            self.note("broadcast", "batch-independent")
        return found[0].t, found[1].t, max(found[0].dims, found[1].dims, key=len)
