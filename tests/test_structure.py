"""What is made of a parameter before it meets the batch: its block keeps its structure, and is exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, dense_gramian
from torch import Tensor, nn

import gramjd
from gramjd import Engine
from gramjd.blocks import Dense, Outer
from gramjd.rules.elementwise import ADDS, DIVS, MULS, SUBS
from gramjd.rules.linear import MATMULS
from gramjd.rules.structure import REVERSALS, SWAPS, pulled_back


@dataclass(frozen=True)
class Case:
    """A weight of ``[5, 4]`` (or of ``output``) made from a parameter of ``shape`` by ``make``."""

    shape: tuple[int, ...]
    make: Callable[[Tensor], Tensor]
    structured: bool | None = True  # None: in part
    output: tuple[int, ...] = (5, 4)
    computed: torch.dtype = torch.float64  # in which it rounds
    new: bool = False  # needs what torch 2.1 does not have

    @property
    def tolerance(self) -> float:
        return max(1e-10, 8 * torch.finfo(self.computed).eps)


def w(*shape: int) -> Tensor:
    """Batch-independent numbers, the same in every call."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).cos().view(shape)


OLD = pytest.mark.skipif(
    not hasattr(F, "rms_norm"),
    reason="torch 2.1 neither reports x[0] and x[1:] to modes nor multiplies half precision on a CPU",
)
CASES: dict[Any, list[Case]] = {
    Tensor.view: [Case((2, 5, 2), lambda p: p.view(5, 4)), Case((20,), lambda p: p.view(5, -1))],
    Tensor.reshape: [Case((4, 5), lambda p: p.reshape(5, 4))],
    torch.reshape: [Case((1, 5, 4), lambda p: torch.reshape(p, (5, 4)))],
    Tensor.view_as: [Case((20,), lambda p: p.view_as(w(5, 4)))],
    Tensor.reshape_as: [Case((20,), lambda p: p.reshape_as(w(5, 4)))],
    Tensor.flatten: [Case((5, 2, 2), lambda p: p.flatten(1))],
    torch.flatten: [Case((5, 2, 2), lambda p: torch.flatten(p, 1))],
    Tensor.ravel: [Case((5, 4), lambda p: p.ravel().view(5, 4))],
    torch.ravel: [Case((5, 4), lambda p: torch.ravel(p).view(5, 4))],
    Tensor.unflatten: [Case((20,), lambda p: p.unflatten(0, (5, 4)))],
    torch.unflatten: [Case((20,), lambda p: torch.unflatten(p, 0, (5, 4)))],
    Tensor.squeeze: [Case((5, 1, 4), lambda p: p.squeeze(1)), Case((1, 5, 4, 1), lambda p: p.squeeze())],
    torch.squeeze: [Case((5, 4, 1), lambda p: torch.squeeze(p, -1))],
    Tensor.unsqueeze: [Case((5, 4), lambda p: p.unsqueeze(1)[:, 0])],
    torch.unsqueeze: [Case((5, 4), lambda p: torch.unsqueeze(p, 0)[0], new=True)],
    Tensor.contiguous: [Case((4, 5), lambda p: p.T.contiguous())],
    Tensor.clone: [Case((5, 4), lambda p: p.clone())],
    torch.clone: [Case((5, 4), lambda p: torch.clone(p))],
    Tensor.to: [Case((5, 4), lambda p: p.to(torch.float32).to(torch.float64), computed=torch.float32)],
    Tensor.type: [Case((5, 4), lambda p: p.type(torch.float64))],
    Tensor.type_as: [Case((5, 4), lambda p: p.type_as(w(1)))],
    Tensor.float: [Case((5, 4), lambda p: p.float().double(), computed=torch.float32)],
    Tensor.double: [Case((5, 4), lambda p: p.double())],
    Tensor.half: [Case((5, 4), lambda p: p.half().double(), computed=torch.float16, new=True)],
    Tensor.bfloat16: [Case((5, 4), lambda p: p.bfloat16().double(), computed=torch.bfloat16)],
    Tensor.permute: [
        Case((4, 5), lambda p: p.permute(1, 0)),
        Case((5, 2, 2), lambda p: p.permute(0, 2, 1).reshape(5, 4)),
        Case((2, 4, 2), lambda p: p.permute(2, 0, 1).reshape(4, 4), output=(4, 4), structured=False),
        Case((2, 5, 2), lambda p: p.permute(1, 0, 2).reshape(5, 4), structured=False),
        Case((2, 2, 5), lambda p: p.permute((2, 0, 1)).reshape(5, 4)),
    ],
    torch.permute: [Case((2, 2, 5), lambda p: torch.permute(p, (2, 1, 0)).reshape(5, 4))],
    Tensor.movedim: [Case((2, 2, 5), lambda p: p.movedim(-1, 0).reshape(5, 4))],
    torch.movedim: [Case((2, 2, 5), lambda p: torch.movedim(p, (2, 1), (0, 1)).reshape(5, 4))],
    Tensor.moveaxis: [Case((4, 5), lambda p: p.moveaxis(0, 1))],
    torch.moveaxis: [Case((4, 5), lambda p: torch.moveaxis(p, 0, 1))],
    Tensor.expand: [
        Case((1, 4), lambda p: p.expand(5, 4)),
        Case((5, 1), lambda p: p.expand(-1, 4)),
        Case((4,), lambda p: p.expand(5, 4)),
        Case((1, 4, 5), lambda p: p.expand(2, 4, 5), output=(2, 4, 5)),
    ],
    Tensor.expand_as: [Case((5, 1), lambda p: p.expand_as(w(5, 4)))],
    torch.broadcast_to: [Case((5, 1), lambda p: torch.broadcast_to(p, (5, 4)))],
    Tensor.broadcast_to: [Case((1, 4), lambda p: p.broadcast_to((5, 4)))],
    Tensor.narrow: [Case((7, 4), lambda p: p.narrow(0, 1, 5)), Case((5, 9), lambda p: p.narrow(-1, 3, 4))],
    torch.narrow: [Case((7, 4), lambda p: torch.narrow(p, 0, 1, 5))],
    Tensor.select: [Case((5, 3, 4), lambda p: p.select(1, 2)), Case((3, 5, 4), lambda p: p.select(0, -1))],
    torch.select: [Case((5, 4, 3), lambda p: torch.select(p, -1, 0))],
    Tensor.unbind: [Case((5, 4, 2), lambda p: p.unbind(-1)[0] - 2 * p.unbind(-1)[1])],
    torch.unbind: [Case((2, 5, 4), lambda p: torch.unbind(p)[1])],
    Tensor.chunk: [Case((11, 4), lambda p: p.chunk(2)[1]), Case((5, 8), lambda p: p.chunk(2, -1)[1])],
    torch.chunk: [Case((5, 8), lambda p: torch.chunk(p, 2, dim=1)[0])],
    Tensor.split: [
        Case((9, 4), lambda p: p.split([2, 5, 2])[1]),
        Case((5, 12), lambda p: p.split(4, dim=-1)[2]),
    ],
    torch.split: [Case((15, 4), lambda p: torch.split(p, 5)[0])],
    Tensor.__getitem__: [
        Case((7, 4), lambda p: p[1:-1], new=True),
        Case((3, 5, 4), lambda p: p[1], new=True),
        Case((5, 3, 4), lambda p: p[:, -2]),
        Case((10, 9), lambda p: p[::2, 1:8:2]),
        Case((5, 8), lambda p: p[..., 4:]),
        Case((5, 4), lambda p: p[None, ..., None][0, :, :, 0]),
        Case((5, 4), lambda p: p[[0, 2, 2, 1, 4]], structured=False),
    ],
    torch.cat: [
        Case((2, 4), lambda p: torch.cat([w(2, 4), p, w(1, 4)])),
        Case((5, 2), lambda p: torch.cat([p, p.sin()], -1), structured=None),
    ],
    torch.concat: [Case((5, 3), lambda p: torch.concat((p, w(5, 1)), dim=1))],
    torch.concatenate: [Case((5, 2), lambda p: torch.concatenate([w(5, 2), p], 1))],
    torch.stack: [
        Case((4,), lambda p: torch.stack([w(4), p, w(4), p, p])),
        Case((5, 2), lambda p: torch.stack([w(5, 2), p], 1).view(5, 4)),
        Case((4, 5), lambda p: torch.stack([w(4, 5), p]), output=(2, 4, 5)),
    ],
    Tensor.__neg__: [Case((5, 4), lambda p: -p)],
    Tensor.neg: [Case((5, 4), lambda p: p.neg())],
    torch.neg: [Case((5, 4), lambda p: torch.neg(p))],
}
for op in REVERSALS:
    CASES[op] = [Case((4, 5), lambda p, op=op: op(p))]
for op in SWAPS:
    CASES[op] = [
        Case((4, 5), lambda p, op=op: op(p, 0, -1)),
        Case((2, 5, 4), lambda p, op=op: op(p, 0, 1).reshape(5, 8), output=(5, 8), structured=False),
        Case((5, 2, 2), lambda p, op=op: op(p, 1, 2).reshape(5, 4)),
    ]
for op in (*ADDS, *SUBS):
    CASES[op] = [
        Case((5, 4), lambda p, op=op: op(w(5, 4), p)),
        Case((5, 4), lambda p, op=op: op(p, w(4))),
        Case((4,), lambda p, op=op: op(w(5, 4), p), structured=False),
    ]
for op in (torch.add, torch.sub):
    CASES[op].append(Case((5, 4), lambda p, op=op: op(w(5, 4), p, alpha=3)))
    # tensors by name, in an order of their own, and dimensions by numpy's names: exact, by rows
    CASES[op].append(Case((5, 4), lambda p, op=op: op(other=p, input=w(5, 4)), structured=False))
CASES[torch.cat] += [
    Case((3, 4), lambda p: torch.cat(dim=0, tensors=[w(2, 4), p]), structured=False),
    Case((3, 4), lambda p: torch.cat([w(2, 4), p], axis=0), structured=False),
    Case((5, 4), lambda p: torch.cat([w(0), p], 1)),
]
CASES[torch.stack].append(Case((10,), lambda p: torch.stack([p, w(10)], 1).view(5, 4), structured=False))
CASES[torch.swapaxes].append(
    Case((4, 5), lambda p: torch.swapaxes(p, axis0=0, axis1=1).clone(), structured=False)
)
CASES[torch.permute].append(Case((4, 5), lambda p: torch.permute(p, dims=(1, 0)), structured=False))
CASES[Tensor.expand].append(Case((1, 4), lambda p: p.expand(size=(5, 4)), structured=False))
for op in MULS:
    CASES[op] = [
        Case((5, 4), lambda p, op=op: op(p, 0.5)),
        Case((5, 4), lambda p, op=op: op(w(5, 1), p)),
        Case((5, 4), lambda p, op=op: op(p, w(4))),
        Case((5, 4), lambda p, op=op: op(p, w(5, 4)), structured=False),
    ]
for op in DIVS:
    CASES[op] = [
        Case((5, 4), lambda p, op=op: op(p, w(4))),
        Case((5, 4), lambda p, op=op: op(p, 3)),
        Case((5, 4), lambda p, op=op: op(w(5, 4), p), structured=False),
    ]
for op in MATMULS:
    CASES[op] = [
        Case((5, 3), lambda p, op=op: op(p, w(3, 4))),
        Case((3, 4), lambda p, op=op: op(w(5, 3), p)),
        Case((4, 3), lambda p, op=op: op(w(5, 3), p.T)),
        # a product in another shape: both keep some features together, or none
        Case((2, 3), lambda p, op=op: op(p, w(3, 10)).view(4, 5).T),
        Case((3, 10), lambda p, op=op: op(w(2, 3), p).view(4, 5).T),
        Case((10, 3), lambda p, op=op: op(p, w(3, 2)).view(5, 4)),
        Case((3, 2), lambda p, op=op: op(w(10, 3), p).view(5, 4)),
        Case((6, 3), lambda p, op=op: op(p, w(3, 4)).view(4, 6), output=(4, 6)),
        Case((3, 4), lambda p, op=op: op(w(6, 3), p).view(4, 6), output=(4, 6)),
    ]
CASES[torch.matmul] += [
    Case((5, 0), lambda p: w(5, 4) + torch.matmul(p, w(0, 4))),
    Case((5, 4), lambda p: p + torch.matmul(w(5, 0), p[:0]), structured=None, new=True),
    Case((3, 4), lambda p: torch.matmul(w(5, 3), other=p)),
]


class Mapped(nn.Module):
    """The weight in a linear map (both ways round, so that it is its transpose, too), or in ``bmm``."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.p = case, nn.Parameter(torch.randn(case.shape, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.case.make(self.p)
        if weight.ndim == 3:
            heads = torch.stack([x, x.sin()])
            return torch.bmm(heads, weight).transpose(0, 1).flatten(1)
        return F.linear(x, weight) @ weight


class LookedUp(nn.Module):
    """The weight as a table."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.p = case, nn.Parameter(torch.randn(case.shape, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        table = self.case.make(self.p)
        ids = (x.abs() * 10).long() % len(table)
        return F.embedding(ids, table)


def cases() -> Iterator[Any]:
    """Every case, with a name that says op and number."""
    for op, found in CASES.items():
        name = gramjd.rules.registry.op_name(op)
        for number, case in enumerate(found):
            marks = [OLD] if case.new else []
            yield pytest.param(case, id=f"{name}-{number}", marks=marks)


def losses(out: Tensor, several: bool = True) -> Tensor:
    both = torch.stack([out.flatten(1).sin().sum(1), out.flatten(1).square().sum(1)], 1)
    return both if several else both[:, 0]


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("case", list(cases()))
def test_structure_is_kept(case: Case, several: bool) -> None:
    x = torch.randn(3, case.output[-1] if len(case.output) == 2 else 4, dtype=torch.float64)
    for kind in (Mapped, LookedUp):
        model = kind(case)
        if kind is LookedUp and len(case.output) == 3:
            continue
        want = dense_gramian(losses(model(x), several), [model.p])
        for batch_dim in (0, None):
            engine = Engine(model, batch_dim=batch_dim, strategies=["ops"])
            got = engine.jacobian(losses(model(x), several))
            assert_close(got.gramian(), want, case.tolerance)
            if kind is Mapped and case.structured is not None:
                wanted = Outer if case.structured else Dense
                assert {type(block) for block in got.blocks[0]} == {wanted}
            engine.close()

        def per_sample(p: Tensor, sample: Tensor, model: nn.Module = model) -> Tensor:
            return losses(torch.func.functional_call(model, {"p": p}, (sample[None],)), several)[0]

        assert_close(gramjd.gramian(per_sample)(model.p.detach(), x), want, case.tolerance)


class Repeated(nn.Module):
    """A weight repeated for every sample, so that ``bmm`` can take it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 5, dtype=torch.float64))
        self.v = nn.Parameter(torch.randn(1, 5, 4, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(1, 1, 4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.bmm(x, self.w.expand(len(x), 4, 5)).tanh()
        out = torch.baddbmm(self.b.expand(len(x), 1, 4), h, self.v.expand(len(x), -1, -1))
        return out + x @ self.w @ self.v.broadcast_to((len(x), 5, 4))


@pytest.mark.parametrize("samples", [1, 3, 4, 5])
def test_weights_repeated_for_every_sample(samples: int) -> None:
    model, x = Repeated(), torch.randn(samples, 3, 4, dtype=torch.float64)
    want = dense_gramian(losses(model(x)), model.parameters())
    for batch_dim in (0, None):
        engine = Engine(model, batch_dim=batch_dim, strategies=["ops"])
        for _ in range(2):
            got = engine.jacobian(losses(model(x)))
            assert_close(got.gramian(), want)
        kinds = {name: {type(b) for b in blocks} for name, blocks in zip(got.names, got.blocks, strict=True)}
        assert kinds == {"w": {Outer}, "v": {Outer}, "b": {Dense}}
        engine.close()


def test_every_pullback_has_a_case() -> None:
    missing = [gramjd.rules.registry.op_name(op) for op in pulled_back() if op not in CASES]
    assert not missing, f"add cases for {missing} to CASES"
