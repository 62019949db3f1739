"""Sketches of Jacobians against dense Jacobians and dense projections, and what their inner products are."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from allocations import OLD, Allocations
from oracle import assert_close, dense_jacobian
from torch import Tensor, nn
from torch.func import grad, vmap
from zoo import CASES, make

import gramjd
from gramjd import Engine, Jacobian, SlowPathWarning
from gramjd.blocks import Conv, Dense, Lookup, Outer
from gramjd.jacobian import sketches
from gramjd.jacobian.philox import key_of, normals, philox, signs, words
from gramjd.jacobian.projection import Projection

KINDS = ["rademacher", "gaussian", "countsketch", "factored"]
SEEDS = range(200)
RECENT = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 13)

# the generator


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_known_answers(counter: str, key: str, want: str) -> None:
    """Those of the authors' Random123, ``kat_vectors``."""
    words = [torch.tensor([int(word, 16)]) for word in counter.split()]
    first, second = (int(word, 16) for word in key.split())
    assert [f"{int(word):08x}" for word in philox(words, (first, second))] == want.split()


def test_numbers_are_known_by_position() -> None:
    """Rows anywhere, and the first columns of more."""
    key = key_of(3, "weight")
    some = torch.tensor([5, 0, 2**33 + 1])
    for entries in (signs, normals):
        whole = entries(torch.arange(8), 300, key, torch.float64)
        assert torch.equal(entries(some, 7, key, torch.float64)[:2], whole[[5, 0], :7])
        assert not torch.equal(entries(some, 99, key, torch.float64)[2], whole[1, :99])  # all 64 bits count
        assert not torch.equal(entries(torch.arange(8), 300, key_of(4, "weight"), torch.float64), whole)
    words = [int(w) for w in philox([torch.tensor([x]) for x in (5, 0, 1, 0)], key)]
    bits = [word >> bit & 1 for word in words for bit in range(32)]
    assert signs(some, 256, key, torch.float32)[0, 128:].tolist() == [2.0 * bit - 1 for bit in bits]


def test_numbers_stay_the_same() -> None:
    """Stored sketches are of these: another Ω in another version would mix them up."""
    key = key_of(0, "weight")
    assert key == (274632002, 3266664884)
    want = [1, 1, -1, -1, -1, 1, -1, 1, 1, 1, -1, -1, 1, 1, 1, -1]
    assert signs(torch.tensor([7]), 16, key, torch.int64)[0].tolist() == want


def test_distributions() -> None:
    which, key = torch.arange(4000), key_of(0, "")
    for entries, kurtosis in ((signs, 1.0), (normals, 3.0)):
        x = entries(which, 500, key, torch.float64)  # 2e6 numbers
        assert abs(float(x.mean())) < 3e-3 and abs(float(x.square().mean()) - 1) < 3e-3
        assert abs(float(x.pow(4).mean()) - kurtosis) < 2e-2
        columns, rows = x.T @ x / 4000, x @ x.T / 500
        assert float((columns - columns.diag().diag()).abs().max()) < 6 / 4000**0.5
        assert float((rows - rows.diag().diag()).abs().max()) < 7 / 500**0.5


# exactness


def omega(name: str, shape: tuple[int, ...], projection: Projection) -> Tensor:
    """All of the ``Ω`` of a parameter."""
    P = torch.Size(shape).numel()
    draw = normals if projection.kind == "gaussian" else signs
    seed, dim = projection.seed, projection.dim
    if projection.kind == "countsketch":
        q = P // shape[0] if shape else P
        return (
            placed(name, P, projection)
            if q in (1, P) or 4 * dim >= P
            else separate(name, (shape[0], q), projection)
        )
    if projection.kind != "factored":
        return draw(torch.arange(P), dim, key_of(seed, name), torch.float64) / dim**0.5
    if len(shape) < 2 or shape[0] == 1 or shape[0] == P:
        return placed(name, P, projection)
    sizes = (shape[0], P // shape[0])
    long = 8 * math.ceil(dim**0.5 / 16)
    columns = [long if size == max(sizes) else 16 * long for size in sizes]
    if sizes[0] == sizes[1]:
        columns = [16 * long, long]
    both = [
        torch.eye(size, dtype=torch.float64)
        if count >= size
        else signs(torch.arange(size), count, key_of(seed, name, side), torch.float64) / count**0.5
        for side, (size, count) in enumerate(zip(sizes, columns, strict=True))
    ]
    grid = torch.einsum("il,jr->ijlr", *both)
    if grid.shape[2] > grid.shape[3] and grid.shape[2:] != sizes:  # the fewer columns come first
        grid = grid.mT
    return grid.flatten(2).flatten(0, 1) @ placed(name, grid.shape[2:].numel(), projection)


def separate(name: str, sizes: tuple[int, int], projection: Projection) -> Tensor:
    """The product of two signs for each entry, in a column that is the sum of two."""
    seed, dim = projection.seed, projection.dim
    rows = torch.arange(sizes[0])
    first = words(rows, key_of(seed, name, 0, "places")) % dim
    sign = signs(rows, 1, key_of(seed, name, 0), torch.float64)
    rest = placed(name, sizes[1], projection, 1)  # [q, dim]
    return torch.cat([sign[i] * rest.roll(int(first[i]), 1) for i in range(sizes[0])])


def placed(name: str, entries: int, projection: Projection, *side: int) -> Tensor:
    """A sign for each entry, in a column of its run of ``dim`` entries."""
    seed, dim = projection.seed, projection.dim
    run, place = torch.arange(entries) // dim, torch.arange(entries) % dim
    first = words(torch.arange(-(-entries // dim)), key_of(seed, name, *side, "places"))
    found = torch.zeros(entries, dim, dtype=torch.float64)
    sign = signs(torch.arange(-(-entries // 128)), 128, key_of(seed, name, *side), torch.float64).flatten()
    found[torch.arange(entries), (first[run] + place) % dim] = sign[:entries]
    return found


def dense_sketch(J: Jacobian, rows: Tensor, projection: Projection) -> Tensor:
    """``rows [m, n]`` times all of ``Ω``."""
    pieces = rows.split([p.numel() for p in J.parameters], 1)
    named = zip(J.names, J.parameters, pieces, strict=True)
    return torch.stack([x @ omega(name, tuple(p.shape), projection) for name, p, x in named]).sum(0)


def quiet(engine: Engine, out: Tensor) -> Jacobian:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowPathWarning)
        return engine.jacobian(out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CASES)
def test_exact(name: str, kind: str) -> None:
    """On awkward modules: tied weights, bare parameters, reuse."""
    module, inputs = make(name)
    out = module(*inputs(3)).flatten(1)[:, :2]
    J = quiet(Engine(module, batch_dim=0), out)
    rows = dense_jacobian(out, J.parameters)
    got = J.sketch(9, seed=5, kind=kind)
    assert_close(got.flatten(0, 1), dense_sketch(J, rows, Projection(9, 5, kind)))


class Everything(nn.Module):
    """Blocks of every type, grouped, strided, dilated and transposed convolutions among them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 4)
        self.conv = nn.Conv1d(4, 8, 3, stride=2, padding=1, groups=2)
        self.up = nn.ConvTranspose1d(8, 6, 3, dilation=2, groups=2)
        self.norm = nn.LayerNorm(6)
        self.tensor = nn.Parameter(torch.randn(3, 2, 6))
        self.scalar = nn.Parameter(torch.tensor(0.7))
        self.head = nn.Linear(6, 4)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.up(self.conv(self.table(ids).mT).tanh()).mT
        h = self.norm(h).tanh() * self.scalar + torch.einsum("abi,...i->...", self.tensor, h)[..., None]
        return F.linear(self.head(h), self.table.weight).square().mean(-2)[:, :3]  # [B, 3]


@pytest.fixture
def everything() -> tuple[Jacobian, Tensor]:
    torch.manual_seed(2)
    module = Everything().double()
    ids = torch.randint(0, 50, (4, 7))
    func, params = gramjd.functional_loss(module)
    J = gramjd.jacobian(func)(params, ids)
    named = dict(module.named_parameters())
    return J, dense_jacobian(module(ids), [named[name] for name in J.names])


@pytest.mark.parametrize("budget", [None, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_types_of_blocks(everything: tuple[Jacobian, Tensor], kind: str, budget: int | None) -> None:
    J, rows = everything
    assert {type(block) for mine in J.blocks for block in mine} == {Outer, Conv, Lookup, Dense}
    got = J.sketch(20, seed=-1, kind=kind, memory_budget=budget)
    assert got.shape == (4, 3, 20) and not got.requires_grad
    assert_close(got.flatten(0, 1), dense_sketch(J, rows, Projection(20, -1, kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_in_small_pieces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More samples and entries than fit into the least budget."""
    monkeypatch.setattr(gramjd.contraction.options, "SMALLEST", 2**16)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 11)).double()
    func, params = gramjd.functional_loss(model)
    J = gramjd.jacobian(func)(params, torch.randn(9, 3, 8, 8).double())
    assert_close(J.sketch(36, kind=kind, memory_budget=1), J.sketch(36, kind=kind))
    rows = torch.cat([J.dense()[name].flatten(2) for name in J.names], 2).flatten(0, 1)
    assert_close(J.sketch(36, kind=kind).flatten(0, 1), dense_sketch(J, rows, Projection(36, 0, kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_one_projection(kind: str) -> None:
    """Whatever the batches, their order, the face, the parameters beside and the order of these."""
    module, inputs = make("tied")
    x = inputs(6)[0]
    out = module(x).flatten(1)[:, 0]
    J = quiet(Engine(module, batch_dim=0), out)
    want = J.sketch(16, kind=kind, seed=1)
    func, params = gramjd.functional_loss(module)
    jac = gramjd.jacobian(lambda p, x: func(p, x).flatten()[0])
    reversed_ = dict(reversed(list(params.items())))
    assert_close(jac(reversed_, x).sketch(16, kind=kind, seed=1), want)
    chunked = gramjd.jacobian(lambda p, x: func(p, x).flatten()[0], chunk_size=2)
    assert_close(chunked(params, x).sketch(16, kind=kind, seed=1), want)
    parts = [jac(params, piece) for piece in x.split([1, 3, 2])]
    assert_close(Jacobian.cat(parts).sketch(16, kind=kind, seed=1), want)
    assert_close(torch.cat([j.sketch(16, kind=kind, seed=1) for j in parts]), want)
    each = sum(J.select([name]).sketch(16, kind=kind, seed=1) for name in J.names)
    assert_close(each, want)
    assert J.without_samples().sketch(16, kind=kind).shape == (0, 16)


def test_another_strategy_has_the_same_projection() -> None:
    """Blocks of other types, of the same parameters."""
    module, inputs = make("convolutions")
    x = inputs(3)
    for kind in KINDS:
        fast, slow = (
            quiet(Engine(module, batch_dim=0, strategies=strategies), module(*x).flatten(1)[:, 0])
            for strategies in (("ops", "functional", "rows"), ("rows",))
        )
        assert {type(b) for mine in fast.blocks for b in mine} != {
            type(b) for mine in slow.blocks for b in mine
        }
        assert_close(fast.sketch(16, kind=kind), slow.sketch(16, kind=kind))


def test_outputs_and_complex_parameters() -> None:
    """A PyTree of outputs; the real and imaginary parts of a parameter lie side by side."""

    def func(p: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        z = p["z"] @ x
        return {"one": z.abs().sum(), "two": torch.stack([z.real, z.imag])}

    params = {"z": torch.randn(2, 3, dtype=torch.complex128)}
    J = gramjd.jacobian(func, has_aux=False)(params, torch.randn(4, 3, dtype=torch.complex128))
    got, dense = J.sketch(12, seed=3), J.dense()
    assert got["one"].shape == (4, 12) and got["two"].shape == (4, 2, 2, 12)
    matrix = omega("z", (2, 3, 2), Projection(12, 3, "rademacher"))
    for name, rows in dense.items():
        real = torch.view_as_real(rows["z"].contiguous()).flatten(-3)
        assert_close(got[name], real @ matrix)


def test_half_precision() -> None:
    """In float32, of the factors' own numbers."""
    func = lambda p, x: (p["w"] @ x).tanh()  # noqa: E731
    p, x = {"w": torch.randn(3, 8).bfloat16()}, torch.randn(5, 8).bfloat16()
    J = gramjd.jacobian(func)(p, x)
    got = J.sketch(16)
    assert got.dtype == torch.float32
    rows = J.dense()["w"].double().flatten(2).flatten(0, 1)
    want = rows @ omega("w", (3, 8), Projection(16, 0, "rademacher"))
    assert_close(got.flatten(0, 1).double(), want, 1e-2)  # dense() rounds the products to bfloat16
    assert_close(J.to(dtype=torch.float32).sketch(16), got, 1e-6)


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4)), (64, 256)),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(8, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.Flatten(), nn.Linear(4608, 3)
        ),
        (32, 8, 16, 16),
    ),
    "table": (lambda: nn.Sequential(nn.Embedding(5000, 64), nn.Flatten(), nn.Linear(2048, 2)), (32, 32)),
}


@pytest.mark.skipif(OLD, reason="torch 2.1 cannot tell when storages are freed")
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("name", list(MODELS))
def test_memory(name: str, kind: str) -> None:
    """Within the budget, where a row of weights times ``dim`` is more than that."""
    build, shape = MODELS[name]
    func, params = gramjd.functional_loss(build())
    x = torch.randint(0, 5000, shape) if name == "table" else torch.randn(shape)
    J = gramjd.jacobian(lambda p, x: func(p, x).flatten()[0])(params, x)
    for budget in (2**20, 2**22):
        with Allocations() as allocations:
            result = J.sketch(64, kind=kind, memory_budget=budget)
        assert allocations.peak <= budget + 3 * result.nbytes


# composition


def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
    h = F.conv1d(x[None], p["kernel"]).tanh().flatten()
    return (h @ p["w"]).square().sum() + p["table"][torch.tensor([1, 0])].sum() * h[0]


def loss_params() -> dict[str, Tensor]:
    shapes = {"kernel": (2, 1, 3), "w": (8, 3), "table": (3, 2)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_and_grad(kind: str) -> None:
    members, x = [loss_params() for _ in range(3)], torch.randn(5, 6, dtype=torch.float64)
    stacked = {name: torch.stack([p[name] for p in members]) for name in members[0]}

    def sketched(p: dict[str, Tensor]) -> Tensor:
        return gramjd.jacobian(loss)(p, x).sketch(9, kind=kind)

    def dense(p: dict[str, Tensor]) -> Tensor:
        rows = vmap(grad(loss), (None, 0))(p, x)
        pieces = [rows[n].flatten(1) @ omega(n, tuple(p[n].shape), Projection(9, 0, kind)) for n in p]
        return torch.stack(pieces).sum(0)

    assert_close(vmap(sketched)(stacked), torch.stack([dense(p) for p in members]))
    got = grad(lambda p: sketched(p).sin().sum())(members[0])
    want = grad(lambda p: dense(p).sin().sum())(members[0])
    for name in want:
        assert_close(got[name], want[name])
    trained = {name: p.clone().requires_grad_() for name, p in members[0].items()}
    found = torch.autograd.grad(sketched(trained).sin().sum(), list(trained.values()))
    for name, g in zip(trained, found, strict=True):
        assert_close(g, want[name])


@pytest.mark.skipif(not RECENT, reason="Dynamo traces these transforms as of torch 2.13")
def test_compiled() -> None:
    """One graph, for a seed that is written into it."""
    p, x = loss_params(), torch.randn(5, 6, dtype=torch.float64)
    jac = gramjd.jacobian(loss)

    def sketched(p: dict[str, Tensor], x: Tensor) -> Any:
        return torch.stack([jac(p, x).sketch(9, seed=7, kind=kind) for kind in KINDS])

    assert_close(torch.compile(sketched, fullgraph=True, backend="aot_eager")(p, x), sketched(p, x))


# inner products


def variance_bound(rows: list[Tensor], kind: str, dim: int) -> Tensor:
    """``[m, m]``: of each pair of rows, that the docs state; ``rows``: of each parameter, ``[m, *shape]``."""
    flat = torch.cat([x.flatten(1) for x in rows], 1)
    G, square = flat @ flat.T, flat.square()
    norms = G.diag()[:, None] * G.diag()
    if kind == "gaussian":
        return (norms + G**2) / dim
    if kind == "rademacher":
        return (norms + G**2 - 2 * square @ square.T) / dim
    (X,) = rows
    by_sides = Projection(dim, 0, kind).by_sides((X.shape[1], X.shape[2]))
    if 1 in X.shape[1:] or (kind == "countsketch" and not by_sides):
        return (norms + G**2 - 2 * square @ square.T) / dim
    l, r = (math.inf if a == b else a for a, b in zip(columns_of(X, dim), X.shape[1:], strict=True))  # noqa: E741
    N, M = torch.einsum("aij,bik->abjk", X, X), torch.einsum("bij,akj->abik", X, X)
    t = (N * N.mT).sum((2, 3))
    n2, m2 = N.square().sum((2, 3)), M.square().sum((2, 3))
    if kind == "countsketch":
        return (n2 + m2 + 2 * t + 2 * norms + 2 * G**2) / dim
    v = (n2 + t) / r + (m2 + t) / l + (n2 + m2 + norms + G**2) / (l * r)
    own = v.diag()  # of squared norms
    return v + (norms + (own[:, None] * own).sqrt() + G**2 + v) / dim


def columns_of(X: Tensor, dim: int) -> tuple[int, int]:
    return Projection(dim, 0, "factored").columns((X.shape[1], X.shape[2]))


@pytest.mark.parametrize(
    ("kind", "sizes", "least"),
    [
        ("rademacher", (10, 12), 0.9),
        ("gaussian", (10, 12), 0.9),
        ("countsketch", (400, 1), 0.8),
        ("countsketch", (10, 12), 0.5),  # few entries share a column, which the bound does not know
        ("countsketch", (150, 140), 0.4),
        ("factored", (10, 12), 0.5),
        ("factored", (12, 140), 0.5),
        ("factored", (140, 12), 0.5),
        ("factored", (150, 140), 0.7),  # projected from both sides
        ("factored", (400, 1), 0.7),
    ],
)
def test_inner_products(kind: str, sizes: tuple[int, int], least: float) -> None:
    """Over 200 seeds: unbiased, with the variance that is stated (of factored ones, at most that)."""
    dim, x = 64, torch.randn(8, sizes[1], dtype=torch.float64)
    p = {"w": torch.randn(sizes, dtype=torch.float64) / sizes[1] ** 0.5}
    J = gramjd.jacobian(lambda p, x: (p["w"] @ x).sin().sum() + (p["w"] @ x.flip(0)).square().sum())(p, x)
    G = J.gramian()
    found = torch.stack([(S := J.sketch(dim, seed=seed, kind=kind)) @ S.T for seed in SEEDS])
    variance = variance_bound([J.dense()["w"]], kind, dim)
    z = (found.mean(0) - G) / (variance / len(SEEDS)).sqrt()
    pairs = torch.triu_indices(8, 8)
    assert float(z[tuple(pairs)].abs().max()) < 3.5  # of 36
    ratio = float((found.var(0) / variance)[tuple(pairs)].mean())
    off = float(z.abs().max())
    print(f"{kind}, {sizes}: mean off by {off:.2f} standard errors, variance {ratio:.3f} of the stated")
    assert least < ratio < (1.0 if kind == "factored" else 1.1)
    norms = G.diag().sqrt()
    bound = Projection(dim, 0, kind).error * norms[:, None] * norms
    assert bool((variance <= bound**2 * (1 + 1e-9)).all())


@pytest.mark.parametrize("budget", [None, 1])
def test_count_sketch_by_rows_or_transforms(budget: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two plans, of one random matrix."""
    monkeypatch.setattr(gramjd.contraction.options, "SMALLEST", 2**14)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 2), nn.Flatten(1), nn.Linear(125, 11)
    ).double()
    func, params = gramjd.functional_loss(model)
    J = gramjd.jacobian(lambda p, x: func(p, x).flatten()[:2])(params, torch.randn(9, 3, 8, 8).double())
    rows = torch.cat([J.dense()[name].flatten(2) for name in J.names], 2).flatten(0, 1)
    want = dense_sketch(J, rows, Projection(30, 0, "countsketch"))
    for cost in (0.0, 1e9):
        monkeypatch.setattr(sketches.counting, "_FOURIER", cost)
        assert_close(J.sketch(30, kind="countsketch", memory_budget=budget).flatten(0, 1), want)


def test_parameters_are_independent() -> None:
    """Inner products of the gradients of two parameters add up, and have no share in each other."""
    func = lambda p, x: (p["a"] * x).sum() - (p["b"] * x).sum()  # noqa: E731
    p = {name: torch.randn(6, dtype=torch.float64) for name in "ab"}
    J = gramjd.jacobian(func)(p, torch.randn(3, 6, dtype=torch.float64))
    for kind in KINDS:
        found = torch.stack([(S := J.sketch(36, seed=s, kind=kind)) @ S.T for s in SEEDS])
        dense = J.dense()
        rows = torch.cat([dense["a"], dense["b"]], 1)
        variance = variance_bound([rows], "gaussian" if kind == "gaussian" else "rademacher", 36)
        assert float(((found.mean(0) - rows @ rows.T) / (variance / 200).sqrt()).abs().max()) < 3.5


# what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim must be a positive integer, not 0"),
        ({"dim": 2.0}, "dim must be a positive integer, not 2.0"),
        (
            {"dim": 4, "kind": "sparse"},
            "kind must be one of 'rademacher', 'gaussian', 'factored', 'countsketch', not 'sparse'",
        ),
        ({"dim": 4, "seed": None}, "seed must be an integer, not None"),
        ({"dim": 4, "memory_budget": 0}, "memory_budget must be a positive"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    J = gramjd.jacobian(lambda p, x: p @ x)(torch.randn(3), torch.randn(2, 3))
    with pytest.raises(ValueError, match=message):
        J.sketch(**options)


def test_names_must_differ() -> None:
    p = {"a": {"b": torch.randn(3)}, "a.b": torch.randn(3)}
    J = gramjd.jacobian(lambda p, x: (p["a"]["b"] * p["a.b"]) @ x)(p, torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"by name, and two are named 'a.b': rename one"):
        J.sketch(4)


def test_factors_that_were_written() -> None:
    x = torch.randn(2, 3)
    J = gramjd.jacobian(lambda p, x: p @ x)(torch.randn(4, 3), x)
    x.zero_()
    with pytest.raises(RuntimeError, match="was written in place since"):
        J.sketch(4)
