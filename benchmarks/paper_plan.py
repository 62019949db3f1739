"""On paper: what the Gramian of a large language model's batch costs on many GPUs.

    python -m benchmarks.paper_plan

Blocks without memory stand for those of a transformer in Llama's shape. The planner that a run would ask
(:mod:`gramjd.distributed.traffic`) says what is sent, its cost functions how much is multiplied; bandwidths
and speeds are assumed. Nothing is measured. ``docs/scaling.md`` shows the tables; a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch

from gramjd.blocks import Block, Dense, Lookup, Outer
from gramjd.contraction import steps
from gramjd.contraction.choice import plans
from gramjd.contraction.cost import half
from gramjd.contraction.options import ENOUGH
from gramjd.contraction.rows import building_cost
from gramjd.distributed.factors import Manifest, Spec, Template
from gramjd.distributed.traffic import Plan, Problem, plan_of

BATCH = 1024  # samples, over all GPUs
GPUS = (8, 64, 256, 1024)


@dataclass(frozen=True)
class Machine:
    """What is assumed of GPUs and of what is between them, about an H100's."""

    training: float = 400e12  # FLOP/s that bfloat16 training reaches
    products: float = 200e12  # FLOP/s of products of float32 numbers, as TF32
    node: int = 8  # GPUs of one
    inside: float = 300e9  # bytes a second that a GPU sends within a node
    outside: float = 40e9  # and from node to node
    memory: float = 80e9  # bytes

    def seconds(self, sent: float, gpus: int) -> float:
        """Of bytes that each GPU sends, most of them to other nodes if there are some."""
        return sent / (self.inside if gpus <= self.node else self.outside)


@dataclass(frozen=True)
class Transformer:
    """A decoder in Llama's shape: untied head, no biases; in bfloat16."""

    layers: int = 32
    width: int = 4096
    wide: int = 11008  # of the feed-forward layers
    vocabulary: int = 32000
    length: int = 2048  # tokens of a sample
    rank: int = 0  # of adapters, which alone are trained; 0: everything is
    dtype: torch.dtype = torch.bfloat16

    @property
    def linears(self) -> list[tuple[str, int, int]]:
        """Of a layer: what the input is, output and input features."""
        d, wide = self.width, self.wide
        mixed = [("attended", d, d)] * 3 + [("mixed", d, d)]
        return mixed + [("normed", wide, d)] * 2 + [("gated", d, wide)]

    @property
    def weights(self) -> int:
        """Entries of matrices that every token passes."""
        return self.layers * sum(o * i for _, o, i in self.linears) + self.vocabulary * self.width

    def manifest(self, samples: int) -> Manifest:
        """What a rank with some samples holds after its backward pass, one loss per sample."""
        found = _Factors(samples, self.length, self.dtype)
        if not self.rank:
            found.lookup(self.vocabulary, self.width)
        for layer in range(self.layers):
            for name, o, i in self.linears:
                found.linear(f"{layer} {name}", o, i, self.rank)
            if not self.rank:
                found.dense(self.width)
                found.dense(self.width)
        if not self.rank:
            found.dense(self.width)
            found.linear("head", self.vocabulary, self.width, 0)
        return found.manifest()


class _Factors:
    """Templates of blocks, each a parameter's only one, and the tensors that these are made of."""

    def __init__(self, samples: int, length: int, dtype: torch.dtype) -> None:
        self.samples, self.length, self.dtype = samples, length, dtype
        self.tensors: list[Spec] = []
        self.blocks: list[tuple[Template, ...]] = []
        self.named: dict[str, int] = {}  # inputs, which several layers may share

    def linear(self, name: str, o: int, i: int, rank: int) -> None:
        """A weight ``[o, i]``; or the two of an adapter beside it, ``[rank, i]`` and ``[o, rank]``."""
        if name not in self.named:
            self.named[name] = self._positions(1, i)
        a = self.named[name]
        if rank:
            self._outer(self._positions(1, rank, cotangent=True), a, (rank, i))
            a, i = self._positions(1, rank), rank
        self._outer(self._positions(1, o, cotangent=True), a, (o, i))

    def lookup(self, vocabulary: int, width: int) -> None:
        c = self._positions(width, cotangent=True)
        ids = self._tensor(torch.int64, self.samples, self.length)
        self._block(Lookup, {"shape": (vocabulary, width)}, {"c": c, "ids": ids})

    def dense(self, width: int) -> None:
        self._block(Dense, {}, {"values": self._tensor(self.dtype, 1, self.samples, width)})

    def manifest(self) -> Manifest:
        return Manifest((self.samples,), (tuple(self.blocks),), tuple(self.tensors))

    def _outer(self, c: int, a: int, shape: tuple[int, int]) -> None:
        self._block(Outer, {"shape": shape}, {"c": c, "a": a})

    def _positions(self, *features: int, cotangent: bool = False) -> int:
        lead = (1,) if cotangent else ()
        return self._tensor(self.dtype, *lead, self.samples, self.length, *features)

    def _tensor(self, dtype: torch.dtype, *shape: int) -> int:
        self.tensors.append(Spec(dtype, shape, shape))
        return len(self.tensors) - 1

    def _block(self, kind: type[Block], constants: dict[str, Any], factors: dict[str, int]) -> None:
        self.blocks.append((Template(kind, tuple(constants.items()), tuple(factors.items())),))


@dataclass(frozen=True)
class Estimate:
    """Of one step on some GPUs, for each of them."""

    model: Transformer
    gpus: int
    machine: Machine = Machine()

    @property
    def samples(self) -> int:
        return BATCH // self.gpus

    @cached_property
    def manifest(self) -> Manifest:
        return self.model.manifest(self.samples)

    @property
    def which(self) -> tuple[int, ...]:
        return tuple(range(len(self.manifest.blocks[0])))

    @cached_property
    def problem(self) -> Problem:
        return Problem((self.manifest,) * self.gpus, 1, 4, ENOUGH["cuda"] // 4, summed=False, whole=True)

    @cached_property
    def plan(self) -> Plan:
        return plan_of(self.problem, self.which)

    @property
    def held(self) -> int:
        """Bytes of the factors."""
        return self.manifest.bytes(self.which)

    @property
    def sent(self) -> float:
        """Bytes for the Gramian."""
        return self.plan.traffic.total / self.gpus

    @property
    def reduced(self) -> float:
        """Bytes that a ring sends to add up gradients in the parameters' dtype."""
        entries = sum(prod(block.shape) for block in self._blocks().values())
        return 2 * (self.gpus - 1) / self.gpus * entries * self.model.dtype.itemsize

    @property
    def multiply_adds(self) -> float:
        """For the Gramian."""
        mine, theirs, sliced = self._blocks(), self._blocks(), set(self.plan.sliced)
        meetings = (self.gpus - 1) / 2
        found = 0.0
        for p, block in mine.items():
            if p in sliced:
                columns = prod(block.shape) // self.gpus
                found += building_cost(block)[0] + half(True, BATCH**2 * columns, BATCH)
            else:
                found += steps([block])[0].multiply_adds
                found += meetings * plans(block, theirs[p])[0][1].multiply_adds
        return found

    @property
    def training(self) -> float:
        """Seconds of an ordinary step: three products for each weight and token, then gradients travel."""
        products = 2 if self.model.rank else 3  # frozen weights need no gradient of theirs
        flops = 2 * products * self.model.weights * self.model.length * self.samples
        return flops / self.machine.training + self.machine.seconds(self.reduced, self.gpus)

    @property
    def multiplying(self) -> float:
        """Seconds."""
        return 2 * self.multiply_adds / self.machine.products

    @property
    def sending(self) -> float:
        """Seconds."""
        return self.machine.seconds(self.sent, self.gpus)

    @property
    def ratio(self) -> float:
        """Of a step with the Gramian to one without."""
        return 1 + (self.multiplying + self.sending) / self.training

    def _blocks(self) -> dict[int, Block]:
        part = self.manifest.parts(self.manifest.meta(), self.which)[0]
        return {p: blocks[0] for p, blocks in enumerate(part.blocks)}

    def row(self) -> str:
        """Of the table."""
        gb, fits = 1e9, "" if self.held <= self.machine.memory else " (!)"
        cells = [
            str(self.gpus), str(self.samples), f"{_short(self.held / gb)}{fits}",
            f"{len(self.which) - len(self.plan.sliced)} / {len(self.plan.sliced)}",
            _short(self.sent / gb), _short(self.reduced / gb), _short(self.training),
            _short(self.multiplying), _short(self.sending), f"{self.ratio:.2f}",
        ]  # fmt: skip
        return "| " + " | ".join(cells) + " |"


def _short(number: float) -> str:
    """Three digits."""
    return f"{float(f'{number:.3g}'):,g}"


HEAD = """\
| GPUs | samples each | factors, GB | parameters by factors / slices | sent for the Gramian, GB \
| all-reduce, GB | ordinary step, s | multiply, s | send, s | ratio |
|---|---|---|---|---|---|---|---|---|---|"""


def table(model: Transformer) -> str:
    return "\n".join([HEAD, *(Estimate(model, gpus).row() for gpus in GPUS)])


def main() -> None:
    print(table(Transformer()))
    print()
    print(table(Transformer(rank=16)))


if __name__ == "__main__":
    main()
