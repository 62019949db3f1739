"""Every plan of every pair of blocks, under every budget, against rows written out in float64."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import pytest
import torch
from oracle import assert_close
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import gramjd
from gramjd import contraction
from gramjd.blocks import Block, Conv, Dense, Lookup, Outer, flatten, unflatten
from gramjd.contraction import Options, options, tiles
from gramjd.contraction.choice import plans, swapped
from gramjd.contraction.consistency import is_consistent
from gramjd.contraction.conv import METHODS, Method
from gramjd.contraction.options import Limits, limits

V, D, K, B = 6, 4, 2, 3


@pytest.fixture(autouse=True)
def no_smallest_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks are tiled, too."""
    monkeypatch.setattr(contraction.options, "SMALLEST", 1)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def matrices(K: int = K, B: int = B) -> dict[str, Block]:
    """Blocks of one parameter ``[V, D]``."""
    return {
        "outer": Outer(randn(K, B, 5, 1, V), randn(B, 5, 1, D), (V, D)),
        "one position": Outer(randn(K, B, 1, 1, V), randn(B, 1, 1, D), (V, D)),
        "shared activations": Outer(randn(K, B, 5, 1, V), randn(1, 5, 1, D).expand(B, -1, -1, -1), (V, D)),
        "shared cotangents": Outer(randn(K, 1, 5, 1, V).expand(-1, B, -1, -1, -1), randn(B, 5, 1, D), (V, D)),
        "transposed": Outer(randn(K, B, 2, 1, D), randn(B, 2, 1, V), (V, D), transposed=True),
        "grouped": Outer(randn(K, B, 3, 2, V // 2), randn(B, 3, 2, D), (V, D)),
        "grouped otherwise": Outer(randn(K, B, 2, 3, V // 3), randn(B, 2, 3, D), (V, D)),
        "grouped and transposed": Outer(
            randn(K, B, 3, 2, D), randn(B, 3, 2, V // 2), (V, D), transposed=True
        ),
        "lookup": Lookup(randn(K, B, 7, D), torch.randint(0, V, (B, 7)), (V, D)),
        "shared ids": Lookup(randn(K, B, 2, D), torch.randint(0, V, (1, 2)).expand(B, -1), (V, D)),
        "dense": Dense(randn(K, B, V, D)),
    }


def convolutions(K: int = K, B: int = B) -> dict[str, Block]:
    """Blocks of one parameter ``[6, 2, 3, 2]``."""
    shape = (6, 2, 3, 2)
    return {
        "conv": Conv(randn(K, B, 1, 1, 6, 4, 3), randn(1, B, 1, 1, 2, 6, 4), shape, (1, 1), (1, 1)),
        "strided": Conv(randn(K, B, 2, 2, 3, 3, 2), randn(1, B, 2, 2, 2, 10, 7), shape, (2, 3), (2, 1)),
        "grouped": Conv(randn(K, B, 1, 3, 2, 4, 3), randn(1, B, 1, 3, 2, 6, 4), shape, (1, 1), (1, 1)),
        "depthwise": Conv(randn(K, B, 1, 6, 1, 4, 3), randn(1, B, 1, 6, 2, 6, 4), shape, (1, 1), (1, 1)),
        "backwards": Conv(randn(1, B, 1, 1, 6, 4, 3), randn(K, B, 1, 1, 2, 7, 5), shape, (1, 1), (1, 1)),
        "outer": Outer(randn(K, B, 3, 1, 6), randn(B, 3, 1, 12), shape),
        "dense": Dense(randn(K, B, *shape)),
    }


def reshaped(K: int = K, B: int = B) -> dict[str, Block]:
    """Blocks of one parameter ``[8, 3]`` whose uses reshape it to other matrices and tables."""
    shape = (8, 3)

    def outer(o: int, i: int, T: int, G: int = 1, **transposed: bool) -> Block:
        return Outer(randn(K, B, T, G, o), randn(B, T, G, i), shape, **transposed)

    def lookup(entries: int, T: int) -> Block:
        return Lookup(randn(K, B, T, 24 // entries), torch.randint(0, entries, (B, T)), shape)

    return {
        "as it is": outer(8, 3, 2),
        "a column": outer(24, 1, 1),
        "a row": outer(1, 24, 3),
        "wider": outer(6, 4, 2),
        "wide": outer(3, 8, 5),
        "transposed as it is": outer(3, 8, 2, transposed=True),
        "transposed otherwise": outer(2, 12, 4, transposed=True),
        "grouped": outer(4, 3, 2, G=2),
        "grouped otherwise": outer(2, 4, 2, G=3),
        "lookup": lookup(8, 4),
        "lookup of fewer": lookup(4, 5),
        "lookup of more": lookup(12, 2),
        "dense": Dense(randn(K, B, *shape)),
    }


PAIRS = [
    pytest.param(kinds, left, right, budget, id=f"{kinds.__name__}-{left}-{right}-{budget}")
    for kinds, budgets in (
        (matrices, [1, 700, None]),
        (convolutions, [700, None]),
        (reshaped, [1, 700, None]),
    )
    for left, right in itertools.combinations_with_replacement(kinds(), 2)
    for budget in budgets
]


def rows(*found: Block) -> Tensor:
    K, B = found[0].rows
    return sum((block.dense() for block in found), torch.zeros(())).reshape(K * B, -1)


def inner(u: Block, v: Block) -> Tensor:
    return (rows(u) @ rows(v).T).view(*u.rows, *v.rows)


@pytest.mark.parametrize(("kinds", "left", "right", "budget"), PAIRS)
def test_every_plan(kinds: object, left: str, right: str, budget: int | None) -> None:
    u, v = kinds()[left], kinds(3, 5)[right]  # type: ignore[operator]
    others = [(u, v), (v, u), (u, kinds()[right])]  # type: ignore[operator]
    options = Options(memory_budget=budget)
    for x, y in [(u, u), (v, v), *others]:
        if swapped(x, y):
            assert_close(contraction.contract(x, y, options), inner(x, y))
            continue
        found = plans(x, y)
        assert found
        for way, _ in found:
            got = way.run(x, y, limits(options, u.dense(), torch.float64))
            assert_close(got, inner(x, y))
        if x is y:
            got = contraction.gramian([x], options)
            assert torch.equal(got, got.permute(2, 3, 0, 1))


@pytest.mark.parametrize(("kinds", "left", "right", "budget"), PAIRS)
def test_sums_of_blocks(kinds: object, left: str, right: str, budget: int | None) -> None:
    found = [kinds()[left], kinds()[right], kinds()[left]]  # type: ignore[operator]
    options, total = Options(memory_budget=budget), rows(*found)
    got = contraction.gramian(found, options)
    assert_close(got.reshape(K * B, K * B), total @ total.T)
    assert torch.equal(got, got.permute(2, 3, 0, 1))
    assert_close(contraction.squared_norms(found, options).flatten(), total.square().sum(1))
    other = [kinds(1, 4)[right]]  # type: ignore[operator]
    assert_close(contraction.cross(found, other, options).reshape(K * B, 4), total @ rows(*other).T)
    steps = contraction.steps(found, options)
    assert all(step.plan and step.multiply_adds >= 0 and step.bytes >= 0 for step in steps)


def _large() -> dict[str, Block]:
    """So many rows that half of a symmetric product is enough, and so long ones that sums are split."""
    n, entries = tiles.HALVES * tiles.LEAF, 128 * tiles.STRETCHES
    ids = torch.randint(0, V, (2, 4))
    return {
        "one position": Outer(randn(1, n, 1, 1, 2), randn(n, 1, 1, 3), (2, 3)),
        "many positions": Outer(randn(1, n, 2, 1, 2), randn(n, 2, 1, 3), (2, 3)),
        "many objectives": Outer(randn(n, 1, 2, 1, 2), randn(1, 2, 1, 3), (2, 3)),
        "conv": Conv(randn(1, n, 1, 1, 2, 2), randn(1, n, 1, 1, 1, 3), (2, 1, 2), (1,), (1,)),
        "lookup": Lookup(randn(n // 2, 2, 4, D), ids, (V, D)),
        "dense": Dense(randn(1, n, 3)),
        "long": Outer(randn(1, 64, 3, 1, entries // 8), randn(64, 3, 1, 32), (entries // 8, 32)),
        "long and dense": Dense(randn(2, 32, 4 * entries)),
    }


@pytest.mark.parametrize("kind", _large())
def test_halves_and_stretches(kind: str) -> None:
    u = _large()[kind]
    want = inner(u, u)
    for way, cost in plans(u, u):
        if cost.multiply_adds < 1e10:
            got = way.run(u, u, limits(Options(), u.dense(), torch.float64))
            assert_close(got, want)
    got = contraction.gramian([u])
    assert torch.equal(got, got.permute(2, 3, 0, 1))


def test_half_of_a_symmetric_product_is_not_computed() -> None:
    rows = torch.randn(tiles.HALVES * tiles.LEAF, 2)
    with FlopCounterMode(display=False) as counter:
        got = tiles.product(rows, rows)
    assert_close(got, rows @ rows.T, 1e-6)
    assert counter.get_total_flops() <= 2 * len(rows) ** 2 * 2 * (tiles.HALVES + 1) / (2 * tiles.HALVES)


def _outers(c: Tensor, a: Tensor) -> list[Block]:
    return [Outer(c.view(2, 2, 3, 1, 2), a.view(2, 3, 1, 4), (2, 4))]


def _convs(c: Tensor, a: Tensor) -> list[Block]:
    return [Conv(c.view(1, 2, 1, 1, 3, 2, 2), a.view(1, 2, 1, 1, 1, 4, 3), (3, 1, 3, 2), (1, 1), (1, 1))]


def _tied(c: Tensor, a: Tensor) -> list[Block]:
    ids = torch.tensor([[0, 4, 4], [1, 0, 4]])
    table = Lookup(c.view(2, 2, 3, 2), ids, (5, 2))
    return [
        table,
        Outer(a[:20].view(2, 2, 1, 1, 5), c[:4].view(2, 1, 1, 2), (5, 2)),
        Dense(a[:20].view(1, 2, 5, 2).expand(2, -1, -1, -1)),
    ]


COMPOSED = {"outers": _outers, "convs": _convs, "tied": _tied}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of torch itself, for jvp
@pytest.mark.parametrize("kind", COMPOSED)
def test_composes(kind: str) -> None:
    """With ``vmap``, ``grad``, ``jvp`` and ``torch.compile(fullgraph=True)``."""

    def both(c: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        blocks = COMPOSED[kind](c, a)
        return contraction.gramian(blocks), contraction.squared_norms(blocks)

    c, a = randn(3, 24), randn(3, 24)
    singles = [both(x, y) for x, y in zip(c, a, strict=True)]
    for got, want in zip(torch.vmap(both)(c, a), zip(*singles, strict=True), strict=True):
        assert_close(got, torch.stack(want))
    inputs = (c[0].requires_grad_(), a[0].requires_grad_())
    assert torch.autograd.gradcheck(both, inputs, check_forward_ad=True)
    if torch.__version__.startswith("2.1."):
        return  # its compiler does not know dataclasses
    compiled = torch.compile(both, fullgraph=True, backend="eager")
    for got, want in zip(compiled(*inputs), both(*inputs), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_floats_are_accumulated_in_float32(dtype: torch.dtype) -> None:
    for kinds in (matrices, convolutions):
        for u in kinds().values():
            u = _cast(u, dtype)
            exact = inner(_cast(u, torch.float64), _cast(u, torch.float64))
            for accumulate, tolerance in ((None, 1e-5), (torch.float64, 1e-10)):
                got = contraction.contract(u, u, Options(accumulate_dtype=accumulate))
                assert got.dtype == (accumulate or torch.float32)
                assert_close(got.double(), exact, tolerance)


def _cast(block: Block, dtype: torch.dtype) -> Block:
    tensors = {f.name: getattr(block, f.name) for f in fields(block)}
    floats = {n: t.to(dtype) for n, t in tensors.items() if isinstance(t, Tensor) and t.is_floating_point()}
    return replace(block, **floats)


def test_float64_on_request_from_float32() -> None:
    u = Outer(torch.randn(1, 4, 50, 1, 3), torch.randn(4, 50, 1, 3), (3, 3))
    got = contraction.gramian([u], Options(accumulate_dtype=torch.float64))
    v = Outer(u.c.double(), u.a.double(), u.shape)
    assert_close(got, inner(v, v))


def test_options_refuse_nonsense() -> None:
    for budget in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="memory_budget"):
            Options(memory_budget=budget)  # type: ignore[arg-type]
    for dtype in (torch.int64, torch.complex64, "float32"):
        with pytest.raises(ValueError, match="accumulate_dtype"):
            Options(accumulate_dtype=dtype)  # type: ignore[arg-type]


def test_free_memory_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch holds unused is free, too; the driver is asked once a second, not for each product."""
    asked, now = [], [5.0]

    def mem_get_info(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return 2**30, 2**34

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**29)
    monkeypatch.setattr(options.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(options, "_FREE_ON_CARDS", {})
    card = torch.device("cuda", 0)
    for _ in range(3):
        assert Options().budget(card) == Options().rows_budget(card) == (2**30 + 2**29) // 8
    assert asked == [card]
    now[0] += 1.0
    Options().budget(card)
    Options().budget(torch.device("cuda", 1))
    assert asked == [card, card, torch.device("cuda", 1)]


def test_what_the_plans_are_for() -> None:
    """The choices that matter: one position, long sequences, depthwise and shared activations."""

    def chosen(*blocks: Block) -> list[str]:
        return [step.plan for step in contraction.steps(blocks)]

    meta = torch.empty((), device="meta")

    def outer(K: int, B: int, T: int, i: int, o: int) -> Outer:
        return Outer(meta.new_empty(K, B, T, 1, o), meta.new_empty(B, T, 1, i), (o, i))

    assert chosen(outer(1, 64, 1, 1024, 1024)) == ["pairwise"]
    assert chosen(outer(1, 16, 64, 256, 256)) == ["rows"]
    assert chosen(outer(8, 1, 32, 512, 512)) == ["joint"]
    table = Lookup(meta.new_empty(1, 8, 32, 512), meta.new_empty(8, 32, dtype=torch.int64), (50_000, 512))
    assert chosen(table, outer(1, 8, 32, 512, 50_000)) == ["pairwise", "picked", "pairwise"]
    narrow = Conv(meta.new_empty(1, 64, 1, 1, 32, 32, 32), meta.new_empty(1, 64, 1, 1, 3, 34, 34),
                  (32, 3, 3, 3), (1, 1), (1, 1))  # fmt: skip
    depthwise = Conv(meta.new_empty(1, 64, 1, 64, 1, 16, 16), meta.new_empty(1, 64, 1, 64, 1, 18, 18),
                     (64, 1, 3, 3), (1, 1), (1, 1))  # fmt: skip
    assert chosen(narrow) == ["unfolded"]
    assert chosen(depthwise) == ["grouped"]


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_bias_of_the_same_cotangents_costs_no_product(K: int, transposed: bool) -> None:
    c, a = torch.randn(K, 6, 1, 1, 400, dtype=torch.float64), torch.randn(6, 1, 1, 500, dtype=torch.float64)
    weight = Outer(c, a, (500, 400) if transposed else (400, 500), transposed)
    same, scaled = Dense(c.reshape(K, 6, 400)), Dense(2 * c.reshape(K, 6, 400))
    for bias, shares in ((same, 1), (scaled, 2)):
        found = list(contraction.gramians([[bias], [weight]]))
        assert len(found) == shares
        want = sum(block.dense().flatten(2).flatten(0, 1) @ block.dense().flatten(2).flatten(0, 1).mT
                   for block in (weight, bias))  # fmt: skip
        total = torch.stack(found).sum(0).reshape(K * 6, K * 6)
        torch.testing.assert_close(total, want)


def test_sums_over_no_samples() -> None:
    """Blocks without positions are zero: a total of no samples has a Gramian, and gradients, of zeros."""
    convs = nn.Sequential(nn.Conv2d(2, 3, 3, groups=1), nn.Flatten(), nn.Linear(12, 2)).double()
    tokens = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2)).double()
    for model, x in ((convs, torch.ones(0, 2, 4, 4).double()), (tokens, torch.ones(0, 4).long())):
        jac = gramjd.Engine(model, batch_dim=None).jacobian(model(x).flatten(1).sum(0))
        assert torch.equal(jac.gramian(), torch.zeros_like(jac.gramian()))
        assert torch.equal(jac.norms(), torch.zeros_like(jac.norms()))
        jac.backward(torch.ones_like(jac.norms()))
        assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of torch itself, for jvp
@pytest.mark.parametrize("of", ["points", "windows", "both"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("kind", ["conv", "strided", "backwards"])
def test_memory_used_again_is_no_part_of_derivatives(kind: str, method: Method, of: str) -> None:
    """Of rows that are built some samples at a time, by autograd and by transforms, in either factor."""
    block, few = convolutions(2, 4)[kind], Limits(300, torch.float64)
    assert isinstance(block, Conv)
    names = ["points", "windows"] if of == "both" else [of]
    inputs = tuple(getattr(block, name) for name in names)

    def rows(*factors: Tensor) -> Tensor:
        return method.rows(replace(block, **dict(zip(names, factors, strict=True))), few)

    def dense(*factors: Tensor) -> Tensor:
        found = replace(block, **dict(zip(names, factors, strict=True))).dense()
        return found.transpose(0, 1).flatten(0, 1).flatten(1)

    tangents = tuple(map(torch.randn_like, inputs))
    weights = torch.randn_like(dense(*inputs))
    for transform in (
        lambda f: torch.func.jvp(f, inputs, tangents)[1],
        lambda f: torch.func.grad(lambda *x: (f(*x).square() * weights).sum())(*inputs),
        lambda f: torch.vmap(f)(*(torch.stack([x, 2 * x]) for x in inputs)),
        lambda f: _forward(f, inputs, tangents),
        lambda f: _reverse(f, inputs, weights),
    ):
        assert_close(transform(rows), transform(dense))


def _forward(f: Callable[..., Tensor], inputs: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
        return forward_ad.unpack_dual(f(*duals)).tangent


def _reverse(f: Callable[..., Tensor], inputs: Sequence[Tensor], weights: Tensor) -> Tensor:
    tracked = [x.clone().requires_grad_() for x in inputs]
    return torch.autograd.grad((f(*tracked).square() * weights).sum(), tracked)[0]


TF32 = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from gramjd.blocks import Conv
from gramjd.contraction import gramian
from gramjd.contraction.choice import plans

def block(device):
    points, windows = (torch.ones(1, 2, 1, 1, 3, n, n, device=device) for n in (4, 6))
    return Conv(points, windows, (3, 3, 3, 3), (1, 1), (1, 1))

def grouped(device):
    u = block(device)
    return "grouped" in [plan.name for plan, _ in plans(u, u)]

for setting in ("allow_tf32 = True", "allow_tf32 = False", "conv.fp32_precision = 'tf32'",
                "conv.fp32_precision = 'ieee'", "rnn.fp32_precision = 'tf32'"):
    exec("torch.backends.cudnn." + setting)
    gramian([block("cpu")])
    with FakeTensorMode():
        print(grouped("cuda"), grouped("cpu"))
"""


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="older than these settings")
def test_convolutions_that_round_to_tf32_are_no_plan() -> None:
    """In a process of its own: torch cannot go back from the newer settings to the older ones."""
    done = subprocess.run([sys.executable, "-c", TF32], capture_output=True, text=True, check=True)
    found = [line.split() for line in done.stdout.splitlines()]
    assert found == [[cuda, "True"] for cuda in ("False", "True", "False", "True", "True")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_right_contraction_is_consistent(dtype: torch.dtype) -> None:
    """Also of thousands of positions, which few digits do not add up."""
    c, ids = torch.randn(1, 8, 4000, 16), torch.zeros(8, 4000, dtype=torch.long)
    a = torch.randn(8, 4000, 3).abs()
    blocks = [
        [Lookup(c.abs().to(dtype), ids, (20, 16))],
        [
            Outer(c[:, :, :, None].to(dtype), a[:, :, None].to(dtype), (16, 3)),
            Dense(c[:, :, :16, :3].to(dtype)),
        ],
        [Dense(torch.randn(1, 8, 16).to(dtype))],
    ]
    w = torch.rand(1, 8, dtype=torch.float64) + 0.5
    assert is_consistent(blocks, w, Options())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_contractions_of_what_cancels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A right one is consistent; one that is wrong by as much as what cancels is not."""
    c, a, w = torch.randn(1, 8, 50, 2, 6), torch.randn(8, 50, 2, 5), torch.rand(1, 8) + 0.5
    conv = Conv(torch.randn(1, 8, 1, 2, 3, 20), torch.randn(1, 8, 1, 2, 4, 24), (6, 4, 3), (1,), (2,))
    right, other = contraction.contract, (12, 2)

    def wrong(u: Block, v: Block, options: Options = contraction.DEFAULT) -> Tensor:
        found = right(u, v, options).clone()
        found[0, 0, 0, 1] += found.abs().max()
        return found

    for each in (Outer(c, a, (12, 5)), Lookup(c[:, :, :, 0], torch.randint(9, (8, 50)), (9, 6)), conv):
        tensors, structure = flatten([[each]])
        rounded = [t.to(dtype) if t.is_floating_point() else t for t in tensors]
        block = unflatten(structure, rounded)[0][0]
        blocks = [[block, Dense(-block.dense())]]
        assert is_consistent(blocks, w, Options())
        small = [Outer((0.02 * c).to(dtype), a[..., :2].to(dtype), other)]
        assert is_consistent([*blocks, small], w, Options())
        with monkeypatch.context() as patch:
            patch.setattr(contraction, "contract", wrong)
            assert not is_consistent(blocks, w, Options())
        with monkeypatch.context() as patch:  # what cancels hides no error of another parameter
            patch.setattr(
                contraction, "contract", lambda u, *v: (wrong if u.shape == other else right)(u, *v)
            )
            assert not is_consistent([*blocks, small], w, Options())
