"""What is never allocated, seen by a dispatch mode; tests do not look at time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from allocations import OLD, Allocations
from oracle import assert_close
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gramjd
from gramjd import Engine
from gramjd.blocks import Block, Conv, Dense, Lookup, Outer
from gramjd.contraction import Options
from gramjd.contraction.accumulator import GramianSum
from gramjd.contraction.choice import plans
from gramjd.contraction.options import limits

MiB = 2**20


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def outer(K: int, B: int, T: int, i: int, o: int, dtype: torch.dtype = torch.float32) -> Outer:
    return Outer(randn(K, B, T, 1, o, dtype=dtype), randn(B, T, 1, i, dtype=dtype), (o, i))


def lookup(B: int, T: int, V: int, d: int) -> Lookup:
    return Lookup(randn(1, B, T, d), torch.randint(0, V, (B, T)), (V, d))


def conv(B: int, channels: int, size: int) -> Conv:
    points, windows = randn(1, B, 1, 1, channels, size, size), randn(1, B, 1, 1, channels, size + 2, size + 2)
    return Conv(points, windows, (channels, channels, 3, 3), (1, 1), (1, 1))


def pairs() -> dict[str, tuple[Block, Block]]:
    """Pairs of which some plan would take far more than 32 MiB at once."""
    long, many = outer(1, 32, 96, 512, 512), outer(64, 1, 512, 64, 512)
    half = outer(1, 32, 96, 512, 512, torch.bfloat16)
    large, small, table = conv(16, 64, 56), conv(32, 128, 8), lookup(16, 96, 50_000, 512)
    crossed = Outer(long.c, long.a, (512, 512), transposed=True)
    found: dict[str, tuple[Block, Block]] = {
        name: (block, block)
        for name, block in {"outer": long, "many objectives": many, "bfloat16": half, "large conv": large,
                            "small conv": small, "lookup": table}.items()
    }  # fmt: skip
    rows = Dense(randn(4, 16, 512, 512))
    depthwise = Conv(randn(1, 32, 1, 192, 1, 28, 28), randn(1, 32, 1, 192, 1, 34, 34), (192, 1, 7, 7), (1, 1),
                     (1, 1))  # fmt: skip
    transposed = Conv(randn(1, 32, 1, 1, 64, 16, 16), randn(4, 32, 1, 1, 64, 18, 18), (64, 64, 3, 3), (1, 1),
                      (1, 1))  # fmt: skip
    unfolded = Outer(randn(1, 32, 64, 1, 128), randn(32, 64, 1, 1152), small.shape)
    joint = Outer(randn(1, 64, 256, 1, 512), randn(1, 256, 1, 512).expand(64, -1, -1, -1), (512, 512))
    return found | {
        "depthwise": (depthwise, depthwise),
        "transposed conv": (transposed, transposed),
        "two convs": (small, conv(32, 128, 8)),
        "conv and outer": (small, unfolded),
        "conv and dense": (small, Dense(randn(1, 32, *small.shape))),
        "shared": (joint, joint),
        "two lookups": (table, lookup(16, 128, 50_000, 512)),
        "crossed": (long, crossed),
        "tied": (lookup(8, 64, 20_000, 256), outer(1, 8, 64, 256, 20_000)),
        "lookup and dense": (lookup(8, 512, 5000, 512), Dense(randn(1, 8, 5000, 512))),
        "outer and dense": (long, rows),
        "dense": (rows, rows),
    }


KINDS = [
    "outer", "many objectives", "bfloat16", "large conv", "small conv", "lookup", "crossed", "tied",
    "lookup and dense", "outer and dense", "dense", "depthwise", "transposed conv", "two convs",
    "conv and outer", "conv and dense", "shared", "two lookups",
]  # fmt: skip


@pytest.mark.skipif(OLD, reason="the end of a storage cannot be seen")
@pytest.mark.parametrize("kind", KINDS)
def test_budget(kind: str) -> None:
    u, v = pairs()[kind]
    options = Options(memory_budget=32 * MiB)
    tried = 0
    for way, cost in plans(u, v):
        if cost.multiply_adds > 2e10 or (tried and cost.time > 10 * plans(u, v)[0][1].time):
            continue  # no one would wait for it
        dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        with Allocations() as allocations:
            way.run(u, v, limits(options, torch.zeros(()), dtype))
        assert allocations.peak <= 64 * MiB, (way.name, allocations.peak / MiB)
        tried += 1
    assert tried


def test_no_tensor_of_batch_times_weight() -> None:
    """A 1024-wide MLP of four hidden layers, batch 64: not even one weight's worth of entries more."""
    width, batch = 1024, 64
    layers: list[nn.Module] = [nn.Linear(width, width), nn.ReLU()] * 1
    for _ in range(3):
        layers += [nn.Linear(width, width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(width, 10))
    engine = Engine(model, batch_dim=0, strategies=["ops"], audit=None)
    for checked in (True, False):
        losses = model(torch.randn(batch, width)).logsumexp(1)
        with Allocations() as allocations:
            gramian = engine.compute_gramian(losses)
        assert gramian.shape == (batch, batch)
        # the check multiplies out one weighted gradient, as large as the weight itself
        assert allocations.largest <= 4 * (width * width if checked else 2 * batch * width)


def test_wide_linear() -> None:
    """Beyond inputs and cotangents, nothing above 64 MiB."""
    model = nn.Linear(4096, 4096)
    engine = Engine(model, batch_dim=0, strategies=["ops"], audit=None)
    losses = model(torch.randn(64, 4096)).square().mean(1)
    with Allocations() as allocations:
        engine.compute_gramian(losses)
    assert allocations.largest <= 64 * MiB


def test_norms_need_no_gramian() -> None:
    """16,384 rows of the head: their Gramian would take a gigabyte."""
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 8))
    function, params = gramjd.functional_loss(model)
    J = gramjd.jacobian(function)(params, torch.randn(2048, 20))
    with Allocations() as allocations:
        found = J.squared_norms()
    assert found.shape == (2048, 8)
    assert allocations.largest <= 16 * MiB


def test_tied_embedding() -> None:
    """No tensor as large as vocabulary times width times batch, nor a tenth of that."""
    table = nn.Embedding(50_000, 512)

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = table

        def forward(self, ids: Tensor) -> Tensor:
            return torch.nn.functional.linear(self.table(ids).tanh(), self.table.weight)

    model, ids = Tied(), torch.randint(0, 50_000, (8, 32))
    engine = Engine(model, batch_dim=0, strategies=["ops"], audit=None)
    weight = 4 * 50_000 * 512
    for most in (weight, 8 * weight // 10):  # the check takes one weighted gradient
        losses = model(ids).logsumexp(2).mean(1)
        with Allocations() as allocations:
            engine.compute_gramian(losses)
        assert allocations.largest <= most
    engine.close()

    def loss(params: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, (sample[None],)).logsumexp(2).mean()

    params = {"table.weight": table.weight.detach()}
    with Allocations() as allocations:
        gramjd.gramian(loss)(params, ids)
    assert allocations.largest <= 8 * weight // 10


@pytest.mark.skipif(OLD, reason="the end of a storage cannot be seen")
def test_shared_activations_are_not_repeated() -> None:
    """Neither those that all rows share nor tables that no sample owns."""
    K, T, i, o = 128, 64, 512, 16
    table = torch.arange(T).expand(K, -1)
    blocks: list[Block] = [
        Outer(randn(K, 1, T, 1, o), randn(1, T, 1, i), (o, i)),
        Outer(randn(1, K, T, 1, o), randn(1, T, 1, i).expand(K, -1, -1, -1), (o, i)),
        Lookup(randn(1, K, T, o), table, (20_000, o)),
    ]
    for block in blocks:
        repeated = 4 * K * T * (20_000 if isinstance(block, Lookup) else i)
        for way, cost in plans(block, block):
            if cost.time <= 10 * plans(block, block)[0][1].time:
                with Allocations() as allocations:
                    way.run(block, block, limits(Options(), torch.zeros(()), torch.float32))
                assert allocations.largest < repeated, way.name


class Attending(nn.Module):
    """One head over a long sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        heads = (h.unsqueeze(1) for h in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(*heads, is_causal=True).square().mean((1, 2, 3))


def test_fused_attention_stays_fused() -> None:
    """No tensor of all pairs of positions, neither in the forward pass nor in the Gramian."""
    T = 1024
    model, x = Attending(), torch.randn(2, T, 8)
    engine = Engine(model, batch_dim=0, strategies=["ops"], memory_budget=MiB, audit=None)
    for _ in range(2):
        with Allocations() as allocations:
            engine.compute_gramian(model(x))
        assert allocations.largest < 4 * 2 * T * T


class Deep(nn.Module):
    """Many layers of one width, each perhaps under a checkpoint."""

    def __init__(self, depth: int, checkpointed: bool, shared: bool = False) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(1 if shared else depth)]
        self.layers, self.depth, self.checkpointed = nn.ModuleList(layers), depth, checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for n in range(self.depth):
            layer = self.layers[n % len(self.layers)]
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return x.square().mean(1)


def peaks(model: nn.Module, objectives: int, autocast: bool = False, samples: int = 16,
          sketch: int | None = None) -> tuple[int, int]:  # fmt: skip
    """Bytes of the first call of ``compute_gramian``, and of one when all is proven."""
    engine, x = Engine(model, batch_dim=0, strategies=["ops"], audit=None), torch.randn(samples, 32, 64)
    found = []
    for _ in range(4):  # two of the six patterns of samples in each of the first three
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = model(x).float()[:, :objectives]
        with Allocations() as allocations:
            engine.compute_gramian(losses, sketch=sketch)
        found.append(allocations.peak)
    return found[0], found[-1]


@pytest.mark.skipif(OLD, reason="the end of a storage cannot be seen")
def test_cotangents_under_autocast_are_contracted_as_they_come() -> None:
    """What rounding is measured by in the first calls does not make later ones wait for all cotangents."""
    known, known_deep = (peaks(Deep(depth, False), 1, autocast=True)[1] for depth in (4, 16))
    assert known_deep <= known + 16 * 32 * 64 * 4


@pytest.mark.skipif(OLD, reason="the end of a storage cannot be seen")
@pytest.mark.parametrize("objectives", [1, 8])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_cotangents_are_contracted_as_they_come(objectives: int, checkpointed: bool) -> None:
    """Four times the layers, no more memory; at the first call, one random objective's cotangents more."""
    cotangent = 16 * 32 * 64 * 4
    (first, known), (first_deep, known_deep) = (
        peaks(Deep(depth, checkpointed), objectives) for depth in (4, 16)
    )
    assert known_deep <= known + cotangent
    gradient, recomputed = 4 * (64 * 64 + 64), 2 * cotangent if checkpointed else 0
    assert first_deep <= first + 12 * (cotangent + recomputed + gradient)
    shared, shared_deep = (peaks(Deep(depth, checkpointed, shared=True), objectives)[1] for depth in (4, 16))
    assert shared_deep > shared + 12 * objectives * cotangent  # all uses of a parameter at once


def peak_of_steps(depth: int, beyond: bool, budget: int | None) -> int:
    """Bytes of a step in one call, when all is proven, without its gradients; their values are checked.

    ``beyond``: the losses depend on a leaf that is not registered.
    """
    torch.manual_seed(0)
    model, scale = Deep(depth, False), torch.ones(16, requires_grad=beyond)
    engine = Engine(model, batch_dim=0, audit=None, memory_budget=budget)
    for _ in range(7):  # the fifth one records ops
        losses = model(torch.randn(16, 32, 64))[:, 0] * scale
        weights = torch.rand(16)
        want = torch.autograd.grad(losses, list(model.parameters()), weights, retain_graph=True)
        model.zero_grad()
        with Allocations() as allocations:
            engine.backward(losses, lambda gramian, weights=weights: weights)
        for p, gradient in zip(model.parameters(), want, strict=True):
            assert p.grad is not None
            assert_close(p.grad, gradient, 1e-5)
    assert (scale.grad is not None) == beyond
    return allocations.peak - sum(p.nbytes for p in model.parameters())


@pytest.mark.skipif(OLD, reason="the end of a storage cannot be seen")
def test_factors_are_kept_only_where_they_are_of_use_and_fit() -> None:
    """Four times the layers take as much memory, if a second backward pass runs."""
    cotangent = 16 * 32 * 64 * 4
    for beyond, budget in ((False, MiB), (True, None)):
        few, many = (peak_of_steps(depth, beyond, budget) for depth in (4, 16))
        assert many <= few + cotangent
    few, many = (peak_of_steps(depth, False, None) for depth in (4, 16))
    assert many > few + 11 * cotangent


@pytest.mark.skipif(OLD, reason="the end of a storage cannot be seen")
def test_sketches_are_added_up_as_cotangents_come() -> None:
    """Four times the layers, no more memory than one cotangent and what is kept of a random matrix."""
    known, known_deep = (peaks(Deep(depth, False), 1, sketch=64)[1] for depth in (4, 16))
    assert known_deep <= known + 16 * 32 * 64 * 4


@pytest.mark.skipif(OLD, reason="the end of a storage cannot be seen")
def test_the_proof_keeps_projections_of_what_is_large() -> None:
    """Four times the layers: at the first call, eight of the 64 columns of each cotangent more."""
    first, deep = (peaks(Deep(depth, False), 1, samples=64)[0] for depth in (4, 16))
    cotangent, gradient = 64 * 32 * 64 * 4, 4 * (64 * 64 + 64)
    assert deep <= first + 12 * (cotangent // 8 + gradient) + cotangent // 8


@pytest.mark.parametrize("copied", [False, True])
def test_options_of_engine(copied: bool) -> None:
    """An engine contracts within its budget and in its dtype; so does a copy of it."""
    model = nn.Sequential(nn.Linear(6, 256), nn.Linear(256, 256))
    x = torch.randn(32, 32, 6)
    largest, found = {}, {}
    small, default = 64 * 1024, None
    for budget in [small, default]:
        engine = Engine(model, batch_dim=0, memory_budget=budget, accumulate_dtype=torch.float64)
        mine = model
        if copied:
            engine, mine = copy.deepcopy((engine, model))
        losses = mine(x).square().mean((1, 2))
        engine.compute_gramian(losses)  # the checks are done
        with Allocations() as allocations:
            found[budget] = engine.compute_gramian(losses)
        largest[budget] = allocations.largest
        engine.close()
    assert largest[small] <= MiB  # the cotangents; a tile takes 64 KiB
    assert largest[default] > 8 * MiB  # rows of 32 samples
    assert found[small].dtype == torch.float64
    torch.testing.assert_close(found[small], found[default])


@pytest.mark.parametrize("option", [{"memory_budget": 0}, {"accumulate_dtype": torch.int64}])
def test_wrong_options_of_engine(option: dict[str, Any]) -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=next(iter(option))):
        Engine(model, batch_dim=0, **option)
    assert not model._forward_hooks


def test_short_rows_keep_to_the_budget() -> None:
    """Those of biases wait for others; the Gramian of all that waited is added up in tiles, too."""
    total = GramianSum(Options(memory_budget=MiB), torch.device("cpu"))
    values = [torch.randn(1, 1024, 64) for _ in range(3)]
    with Allocations() as allocations:
        for rows in values:
            total.add({"bias": [Dense(rows)]})
    assert total.total is not None and allocations.peak <= total.total.nbytes + 2 * MiB
    both = torch.cat([rows[0] for rows in values], 1).double()
    assert_close(total.total[0, :, 0].double(), both @ both.T, 1e-5)
