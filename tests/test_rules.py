"""Every op rule against the dense oracle, through both faces; a rule without a case fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import pytest
import torch
import torch.nn.functional as F
from oracle import OLD, assert_close, dense_gramian
from torch import Tensor, nn

import gramjd
from gramjd import Engine
from gramjd.rules import registered
from gramjd.rules.contractions import INNERS, OUTERS
from gramjd.rules.conv import CONVS, TRANSPOSED_CONVS
from gramjd.rules.elementwise import ADDCMULS, ADDS, ADDS_INPLACE, DIVS, LERPS, MULS, SUBS, SUBS_INPLACE
from gramjd.rules.linear import ADDMMS, BADDBMMS, BMMS, MATMULS, MVS

REGISTERED = registered()  # before any example adds rules of its own


@dataclass(frozen=True)
class Case:
    """``call(p, x)`` uses the parameter as one argument of the op; ``x`` is ``[n, *sample]``."""

    parameter: tuple[int, ...]
    sample: tuple[int, ...]
    call: Callable[[Tensor, Tensor], Tensor]
    integers: int = 0  # x holds integers below this number
    alone: bool = False  # the op takes one sample at a time


_CONSTANTS = torch.randn(2000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def w(*shape: int) -> Tensor:
    """A constant argument, the same in every call."""
    return _CONSTANTS[: prod(shape)].view(shape)


def binary(op: Callable[..., Tensor], name: str) -> list[Case]:
    """Cases of a broadcasting op with the parameter as its ``input`` or ``other``."""
    if name == "other":
        shapes = [(4,), (3, 1), (1, 1, 4), ()]
        return [Case(s, (3, 4), lambda p, x: op(x + 0, p)) for s in shapes]
    return [Case(s, (3, 4), lambda p, x: op(p, x)) for s in [(4,), (3, 1), (1, 1, 4), ()]]


def conv(op: Callable[..., Tensor], name: str) -> list[Case]:
    """Convolutions in 1, 2 and 3 dimensions with every option."""
    n = CONVS.index(op) + 1
    kernel, size = (3, 2, 1)[:n], (7, 5, 3)[:n]
    options: list[dict[str, object]] = [
        {}, {"padding": 1, "stride": 2}, {"padding": "same", "dilation": 2}, {"padding": "valid"},
        {"groups": 2, "padding": (1,) * n, "stride": (2,) * n}, {"groups": 4, "dilation": (2,) * n},
    ]  # fmt: skip
    shapes = [(8, 4 // kw.get("groups", 1), *kernel) for kw in options]  # type: ignore[operator]
    return [_conv(op, name, kw, shape, size) for kw, shape in zip(options, shapes, strict=True)]


def conv_transpose(op: Callable[..., Tensor], name: str) -> list[Case]:
    """Transposed convolutions in 1, 2 and 3 dimensions with every option."""
    n = TRANSPOSED_CONVS.index(op) + 1
    kernel, size = (3, 2, 1)[:n], (4, 3, 2)[:n]
    options: list[dict[str, object]] = [
        {}, {"stride": 2, "padding": 1}, {"stride": (3,) * n, "output_padding": 2},
        {"groups": 2, "dilation": (2,) * n, "output_padding": (1,) * n}, {"groups": 4, "padding": (0,) * n},
    ]  # fmt: skip
    shapes = [(4, 8 // kw.get("groups", 1), *kernel) for kw in options]  # type: ignore[operator]
    return [_conv(op, name, kw, shape, size) for kw, shape in zip(options, shapes, strict=True)]


def _conv(op: Callable[..., Tensor], name: str, kw: dict[str, object], shape: tuple[int, ...],
          size: tuple[int, ...]) -> Case:  # fmt: skip
    if name == "weight":
        return Case(shape, (4, *size), lambda p, x: op(x, p, w(8), **kw))
    return Case((8,), (4, *size), lambda p, x: op(x, w(*shape), p, **kw))


LINEAR = [
    Case((5, 4), (4,), lambda p, x: F.linear(x, p)),
    Case((5, 4), (3, 4), lambda p, x: F.linear(x, p, w(5))),
    Case((5, 4), (2, 3, 4), lambda p, x: F.linear(x, p, bias=w(5))),
]
CASES: dict[tuple[object, str], list[Case]] = {
    (F.linear, "weight"): LINEAR,
    (F.linear, "bias"): [Case((5,), (3, 4), lambda p, x: F.linear(x, w(5, 4), p))],
    (F.embedding, "weight"): [
        Case((7, 4), (3,), lambda p, x: F.embedding(x, p), integers=7),
        Case((7, 4), (3, 2), lambda p, x: F.embedding(x, p, padding_idx=2), integers=7),
        Case((7, 4), (), lambda p, x: F.embedding(x, p, padding_idx=-1), integers=7),
    ],
    (Tensor.__getitem__, "input"): [
        Case((7, 4), (), lambda p, x: p[x], integers=7),
        Case((7, 2, 3), (3,), lambda p, x: p[x - 3], integers=7),
        Case((7,), (2, 3), lambda p, x: p[x.int() - 7], integers=7),
        Case((3, 4), (2, 5), lambda p, x: p[x], integers=3),
        Case((7, 4), (2,), lambda p, x: p[x % 4, x % 3], integers=7),
        Case((7, 4), (2,), lambda p, x: p[:, 1:3][x], integers=7),
        Case((7, 4), (2,), lambda p, x: p[1:, x % 4].movedim(0, -1), integers=7),
        Case((4,), (4,), lambda p, x: x * torch.where(x > 0, p, 0.0) + p[torch.tensor([3, 0, 0, 1])]),
        Case((4,), (4,), lambda p, x: x * p[torch.tensor([True, False, True, False])].sum()),
    ],
    **{
        (op, "input"): [
            Case((7, 4), (), lambda p, x, op=op: op(p, 0, x), integers=7),
            Case((7, 4), (3,), lambda p, x, op=op: op(p, -2, x.flatten()).unflatten(0, x.shape), integers=7),
        ]
        for op in (torch.index_select, Tensor.index_select)
    },
    (F.layer_norm, "weight"): [
        Case((4,), (3, 4), lambda p, x: F.layer_norm(x, (4,), p, w(4))),
        Case((3, 4), (2, 3, 4), lambda p, x: F.layer_norm(x, (3, 4), p, eps=1e-3)),
    ],
    (F.layer_norm, "bias"): [Case((4,), (3, 4), lambda p, x: F.layer_norm(x, (4,), w(4), p))],
    (Tensor.expand, "input"): [
        Case((1, 4), (4,), lambda p, x: p.expand(len(x), -1) * x),
        Case((1, 3, 1), (3, 4), lambda p, x: torch.cat([p.expand(len(x), 3, 2), x], 2).sin()),
    ],
    (Tensor.broadcast_to, "input"): [Case((1, 4), (4,), lambda p, x: p.broadcast_to(x.shape) * x)],
    (torch.broadcast_to, "input"): [Case((1, 4), (4,), lambda p, x: torch.broadcast_to(p, x.shape) * x)],
    (Tensor.expand_as, "input"): [Case((3, 1), (3, 4), lambda p, x: p.expand_as(x).sin() * x)],
    (Tensor.repeat, "input"): [
        Case((1, 4), (4,), lambda p, x: p.repeat(len(x), 1) * x),
        Case((1, 2), (3, 4), lambda p, x: torch.cat([p.repeat(len(x), 3, 2), x], 2).sin()),
        Case((3, 2), (3, 4), lambda p, x: p.repeat(1, 2) * x),
    ],
    (Tensor.__rsub__, "input"): [Case((4,), (3, 4), lambda p, x: Tensor.__rsub__(p, x))],
    (Tensor.__rsub__, "other"): [Case((4,), (3, 4), lambda p, x: Tensor.__rsub__(x, p))],
    (Tensor.__rtruediv__, "input"): [
        Case((4,), (3, 4), lambda p, x: Tensor.__rtruediv__(p, x)),
        Case((4,), (3, 4), lambda p, x: x * (2 / p)),
    ],
    (Tensor.__rtruediv__, "other"): [Case((4,), (3, 4), lambda p, x: Tensor.__rtruediv__(x, p))],
    (torch.where, "input"): [Case((3, 1), (3, 4), lambda p, x: torch.where(x > 0, p, x))],
    (torch.where, "other"): [
        Case((4,), (3, 4), lambda p, x: torch.where(x > 0, x, p)),
        Case((3, 4), (3, 4), lambda p, x: torch.where(torch.eye(3, 4) > 0, 0.5, p) * x),
    ],
    (Tensor.where, "input"): [Case((4,), (3, 4), lambda p, x: p.where(x > 0, x))],
    (Tensor.where, "other"): [Case((1, 4), (3, 4), lambda p, x: x.where(x > 0, p))],
    (F.prelu, "weight"): [
        Case((4,), (4,), F_prelu := lambda p, x: F.prelu(x, p)),
        Case((1,), (4,), F_prelu),
        Case((4,), (4, 2, 3), F_prelu),
    ],
    (F.group_norm, "weight"): [
        Case((4,), (4,), lambda p, x: F.group_norm(x, 2, p)),
        Case((4,), (4, 2, 3), lambda p, x: F.group_norm(x, 2, p, w(4), 1e-3)),
    ],
    (F.group_norm, "bias"): [Case((4,), (4, 2, 3), lambda p, x: F.group_norm(x, 2, w(4), p))],
    (F.instance_norm, "weight"): [
        Case((4,), (4, 2, 3), lambda p, x: F.instance_norm(x, weight=p)),
        Case((4,), (4, 2), lambda p, x: F.instance_norm(x, w(4), w(4) ** 2, p, use_input_stats=False)),
    ],
    (F.instance_norm, "bias"): [Case((4,), (4, 5), lambda p, x: F.instance_norm(x, None, None, w(4), p))],
    (F.batch_norm, "weight"): [
        Case((4,), (4,), lambda p, x: F.batch_norm(x, w(4), w(4) ** 2, p)),
        Case((3,), (3, 2), lambda p, x: F.batch_norm(x, w(3), w(3) ** 2, p, w(3), eps=0.1)),
    ],
    (F.batch_norm, "bias"): [Case((4,), (4, 5), lambda p, x: F.batch_norm(x, w(4), w(4) ** 2, w(4), p))],
    (F.bilinear, "weight"): [
        Case((5, 4, 4), (4,), lambda p, x: F.bilinear(x, x.sin(), p)),
        Case((5, 4, 3), (2, 4), lambda p, x: F.bilinear(x, x[..., :3].sin(), p, w(5))),
    ],
    (F.bilinear, "bias"): [Case((5,), (4,), lambda p, x: F.bilinear(x, x, w(5, 4, 4), p))],
}
if hasattr(F, "rms_norm"):
    CASES[F.rms_norm, "weight"] = [
        Case((4,), (3, 4), lambda p, x: F.rms_norm(x, (4,), p)),
        Case((3, 4), (2, 3, 4), lambda p, x: F.rms_norm(x, (3, 4), p, eps=1e-3)),
    ]
EINSUMS = [  # equation, weight, sample of the other operand
    ("ni,oi->no", (5, 4), (4,)), ("nti,io->nto", (4, 5), (3, 4)), ("nti,io->not", (4, 5), (3, 4)),
    ("nti,oi->tno", (5, 4), (3, 4)), ("...i,oi->...o", (5, 4), (2, 4)), ("ni,oi", (5, 4), (4,)),
    ("n...d,dk->n...k", (4, 5), (2, 3, 4)), ("nhti,hio->nhto", (2, 4, 5), (2, 3, 4)),
    ("nti,hio->nhto", (2, 4, 5), (3, 4)), ("nti,ioh->nhto", (4, 5, 2), (3, 4)),
    ("nhtd,hde->nte", (2, 3, 4), (2, 5, 3)), ("nhtd,ehd->nte", (4, 2, 3), (2, 5, 3)),
    ("nhi,i->nh", (4,), (3, 4)), ("nij,ij->n", (3, 4), (3, 4)), ("ni,o->nio", (5,), (4,)),
    ("ni,ii->n", (4, 4), (4,)), ("nd,id->ni", (3, 1), (4,)), ("nt,oi->no", (3, 2), (4,)),
    ("nhd,dhk->nk", (3, 2, 4), (2, 3)), ("nd,hdk->nhk", (2, 3, 4), (3,)), ("nd,dhk->nkh", (3, 2, 4), (3,)),
]  # fmt: skip


def einsum(equation: str, *operands: Tensor) -> Tensor:
    """With the samples, whose letter is n, put first."""
    out = torch.einsum(equation, *operands)
    return out.movedim(max(equation.partition("->")[2].find("n"), 0), 0)


def _swapped(equation: str) -> str:
    operands, arrow, out = equation.partition("->")
    return ",".join(operands.split(",")[::-1]) + arrow + out


CASES[torch.einsum, "second"] = [Case(p, s, lambda p, x, e=e: einsum(e, x, p)) for e, p, s in EINSUMS]
CASES[torch.einsum, "first"] = [
    Case(p, s, lambda p, x, e=e: einsum(_swapped(e), p, x)) for e, p, s in EINSUMS
]


def swapped_tensordot(x: Tensor, p: Tensor, dims: object) -> Tensor:
    """A product with the parameter first; the samples, which its free dimensions come before, put first."""
    if isinstance(dims, int):
        dims = [*range(x.ndim - dims, x.ndim)], [*range(dims)]
    ours, theirs = dims  # type: ignore[misc]
    return torch.tensordot(p, x, dims=(theirs, ours)).movedim(p.ndim - len(theirs), 0)


TENSORDOTS = [
    ((4, 5), (3, 4), 1), ((3, 4, 5), (2, 3, 4), 2), ((3, 4, 5), (3, 4), ([1, 2], [0, -2])),
    ((5, 4), (3, 4), ([-1], [1])), ((4, 3), (3, 4), ([1, 2], [1, 0])), ((5, 4), (), 0),
    ((2, 4, 5), (4,), ([1], [1])), ((1, 5), (4,), 1), ((4, 3), (3, 4), ((2, 1), (0, 1))),
]  # fmt: skip
CASES[torch.tensordot, "b"] = [
    Case(p, s, lambda p, x, dims=dims: torch.tensordot(x, p, dims)) for p, s, dims in TENSORDOTS
]
CASES[torch.tensordot, "a"] = [
    Case(p, s, lambda p, x, dims=dims: swapped_tensordot(x, p, dims)) for p, s, dims in TENSORDOTS
]
for op in INNERS:
    sizes = [(4,), (5, 4), (2, 5, 4), ()]
    CASES[op, "other"] = [Case(p, (3, 4), lambda p, x, op=op: op(x, p)) for p in sizes]
    CASES[op, "input"] = [
        Case(p, (3, 4), lambda p, x, op=op: op(p, x).movedim(p.ndim - (p.ndim > 0), 0)) for p in sizes
    ]
for op in OUTERS:
    CASES[op, "vec2"] = [Case((5,), (), lambda p, x, op=op: op(x, p))]
    CASES[op, "input"] = [Case((5,), (), lambda p, x, op=op: op(p, x).T)]
VECDOTS = [((4,), -1), ((3, 4), -1), ((3, 4), 1), ((3, 1), 1), ((1, 3, 4), -1)]
CASES[torch.linalg.vecdot, "y"] = [
    Case(p, (3, 4), lambda p, x, dim=dim: torch.linalg.vecdot(x, p, dim=dim)) for p, dim in VECDOTS
]
CASES[torch.linalg.vecdot, "x"] = [
    Case(p, (3, 4), lambda p, x, dim=dim: torch.linalg.vecdot(p, x, dim=dim)) for p, dim in VECDOTS
]


def heads(x: Tensor) -> Tensor:
    """``[n, i]`` twice, ``[2, n, i]``."""
    return torch.stack([x, x.sin()])


for op in BMMS:
    CASES[op, "mat2"] = [
        Case((2, 4, 5), (4,), lambda p, x, op=op: op(heads(x), p).transpose(0, 1)),
        Case((4, 5), (3, 4), lambda p, x, op=op: op(x, p.expand(len(x), 4, 5))),
    ]
    CASES[op, "input"] = [Case((2, 5, 4), (4,), lambda p, x, op=op: op(p, heads(x).mT).permute(2, 0, 1))]
for op in BADDBMMS:
    CASES[op, "input"] = [
        Case((2, 1, 5), (4,), lambda p, x, op=op: op(p, heads(x), w(2, 4, 5), beta=3).transpose(0, 1))
    ]
    CASES[op, "batch2"] = [
        Case((2, 4, 5), (4,), lambda p, x, op=op: op(w(2, 1, 5), heads(x), p, alpha=3).transpose(0, 1))
    ]
    CASES[op, "batch1"] = [
        Case((2, 5, 4), (4,), lambda p, x, op=op: op(w(2, 5, 1), p, heads(x).mT).permute(2, 0, 1))
    ]
for op in MATMULS:
    CASES[op, "other"] = [Case((4, 5), (4,), lambda p, x, op=op: op(x, p))]
    CASES[op, "input"] = [Case((5, 4), (4,), lambda p, x, op=op: op(p, x.T).T)]
    if op not in (torch.mm, Tensor.mm):
        CASES[op, "other"].append(Case((4, 5), (2, 3, 4), lambda p, x, op=op: op(x, p)))
        CASES[op, "input"].append(Case((5, 4), (2, 4, 3), lambda p, x, op=op: op(p, x)))
        CASES[op, "other"].append(Case((2, 4, 5), (2, 3, 4), lambda p, x, op=op: op(x, p)))
        CASES[op, "other"].append(Case((4,), (3, 4), lambda p, x, op=op: op(x, p)))
        CASES[op, "input"].append(Case((5, 4), (4,), lambda p, x, op=op: op(p, x[0])[None], alone=True))
        CASES[op, "input"].append(Case((2, 5, 4), (3, 2, 4, 3), lambda p, x, op=op: op(p, x)))
for op in MVS:
    CASES[op, "vec"] = [Case((4,), (4,), lambda p, x, op=op: op(x, p))]
    CASES[op, "input"] = [Case((3, 4), (4,), lambda p, x, op=op: op(p, x[0])[None], alone=True)]
for op in ADDMMS:
    CASES[op, "mat1"] = [Case((5, 4), (4,), lambda p, x, op=op: op(w(5, 1), p, x.T, beta=2, alpha=3).T)]
    CASES[op, "mat2"] = [Case((4, 5), (4,), lambda p, x, op=op: op(w(5), x, p, beta=2, alpha=3))]
    CASES[op, "input"] = [Case((5,), (4,), lambda p, x, op=op: op(p, x, w(4, 5), beta=2, alpha=3))]
for op in ADDCMULS:
    CASES[op, "input"] = [Case((3, 1), (3, 4), lambda p, x, op=op: op(p, x, x.sin(), value=3))]
    CASES[op, "tensor1"] = [Case((4,), (3, 4), lambda p, x, op=op: op(x, p, x.sin(), value=3))]
    CASES[op, "tensor2"] = [Case((3, 1), (3, 4), lambda p, x, op=op: op(w(4), x.sin(), p))]
for op in LERPS:
    CASES[op, "input"] = [Case((3, 4), (3, 4), lambda p, x, op=op: op(p, x, 0.3))]
    CASES[op, "end"] = [Case((3, 4), (3, 4), lambda p, x, op=op: op(x, p, w(3, 1)))]
    CASES[op, "weight"] = [Case((4,), (3, 4), lambda p, x, op=op: op(x, x.sin(), p))]
for family in (ADDS, SUBS, MULS, DIVS):
    for op in family:
        CASES[op, "input"], CASES[op, "other"] = binary(op, "input"), binary(op, "other")
for op in (*ADDS_INPLACE, *SUBS_INPLACE):
    CASES[op, "other"] = binary(op, "other")
for op in (torch.add, torch.sub):
    CASES[op, "other"].append(Case((4,), (3, 4), lambda p, x, op=op: op(x, p, alpha=3)))
CASES[torch.mul, "input"].append(Case((4,), (4,), lambda p, x: x.sin() * torch.mul(p, 3.0)))
for op in CONVS:
    CASES[op, "weight"], CASES[op, "bias"] = conv(op, "weight"), conv(op, "bias")
for op in TRANSPOSED_CONVS:
    CASES[op, "weight"], CASES[op, "bias"] = conv_transpose(op, "weight"), conv_transpose(op, "bias")
CASES[F.conv2d, "weight"] += [
    Case((2, 4, 3, 3), (4, 5, 5), lambda p, x: F.conv2d(F.pad(x, (1, 1, 1, 1), "circular"), p)),
    Case((2, 4, 3, 3), (2, 4, 5, 5), lambda p, x: F.conv2d(x.flatten(0, 1), p).unflatten(0, (-1, 2))),
    Case((2, 4, 3, 3), (4, 6, 6), lambda p, x: F.conv2d(F.conv2d(x, p)[:, :1].expand(-1, 4, -1, -1), p)),
]
if OLD:  # whose modes see the indices of several dimensions alone
    CASES[Tensor.__getitem__, "input"] = CASES[Tensor.__getitem__, "input"][6:7]


def cases() -> Iterator[object]:
    """Every case, with a name that says op, argument and number."""
    for (op, name), found in CASES.items():
        label = f"{getattr(op, '__qualname__', op)}-{name}"
        for number, case in enumerate(found):
            yield pytest.param(case, id=f"{label}-{number}")


class Uses(nn.Module):
    """The op between two maps that have no parameters, so that cotangents differ by position."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.p = case, nn.Parameter(torch.randn(case.parameter, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.case.call(self.p, x).tanh()


def draw(case: Case, samples: int) -> Tensor:
    if case.integers:
        return torch.randint(0, case.integers, (samples, *case.sample))
    return torch.randn(samples, *case.sample, dtype=torch.float64)


def objectives(out: Tensor, several: bool) -> Tensor:
    """``[B]`` or ``[B, 3]``."""
    flat = out.flatten(1) if out.ndim > 1 else out[:, None]
    scale = torch.linspace(0.5, 2, flat.shape[1], dtype=flat.dtype)
    losses = [(flat * scale).sum(1), flat.square().mean(1), (flat[:, 0] - scale[0]).exp()]
    return torch.stack(losses, 1) if several else losses[0]


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("case", list(cases()))
def test_rule(case: Case, several: bool) -> None:
    model, x = Uses(case), draw(case, 3)

    def run() -> Tensor:
        outs = [model(samples) for samples in (x.split(1) if case.alone else [x])]
        return objectives(torch.cat(outs), several)

    want = dense_gramian(run(), model.parameters())
    for batch_dim in (0, None)[case.alone :]:
        engine = Engine(model, batch_dim=batch_dim, strategies=["ops"])
        for _ in range(2):  # measured and checked first, then from what is known
            assert_close(engine.compute_gramian(run()), want)
        engine.close()

    def per_sample(p: Tensor, sample: Tensor) -> Tensor:
        return objectives(case.call(p, sample[None]).tanh(), several)[0]

    got = gramjd.gramian(per_sample)(model.p.detach(), x)
    assert_close(got, want)


@pytest.mark.parametrize("case", list(cases()))
def test_rule_of_arguments_without_a_batch_dimension(case: Case) -> None:
    """As in a function of one sample: one id, one vector, one image."""
    model, x = Uses(case), draw(case, 3)

    def per_sample(p: Tensor, sample: Tensor) -> Tensor:
        return objectives(case.call(p, sample)[None].tanh(), False)[0]

    try:
        losses = torch.stack([per_sample(model.p, each) for each in x])
        torch.vmap(torch.func.grad(per_sample), (None, 0))(model.p.detach(), x)
    except Exception as error:  # the op needs one, or fails under vmap (an index without dimensions)
        pytest.skip(str(error))
    want = dense_gramian(losses, model.parameters())
    assert_close(gramjd.gramian(per_sample)(model.p.detach(), x), want)


@pytest.mark.parametrize(
    "call",
    [
        lambda p, x: torch.matmul(x, p, out=None),
        lambda p, x: torch.linalg.vecdot(x, p, out=None),
        lambda p, x: F.cosine_similarity(x, p, axis=-1),
        lambda p, x: torch.tensordot(x, p, torch.tensor(1)),
    ],
)
def test_arguments_that_no_rule_knows(call: Callable[[Tensor, Tensor], Tensor]) -> None:
    case = Case((4,), (4,), call)
    model, x = Uses(case), draw(case, 3)
    want = dense_gramian(objectives(model(x), False), model.parameters())
    with Engine(model, batch_dim=0) as engine, pytest.warns(gramjd.SlowPathWarning, match="argument|dims"):
        assert_close(engine.compute_gramian(objectives(model(x), False)), want)


def test_every_rule_has_a_case() -> None:
    missing = [
        f"{getattr(op, '__qualname__', op)}({name})" for op, name in REGISTERED if (op, name) not in CASES
    ]
    assert not missing, f"add cases for {missing} to CASES"


def test_register_rule_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="no argument 'q'"):
        gramjd.register_rule(torch.sin, wrt="q")(lambda c, p: c)
    with pytest.raises(ValueError, match="must name the same arguments"):
        gramjd.register_rule(F.linear, wrt="w")(lambda c, x, w: c)
    with pytest.raises(ValueError, match="align"):
        gramjd.register_rule(torch.sin, wrt="p", align="middle")
