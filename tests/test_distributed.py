"""Gramians over real processes of a gloo group, against those of one process with all samples."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import distributed_cases as cases
import pytest
import ranks
import torch
import traffic_cases
from oracle import dense_gramian
from ranks import of
from torch import Tensor

import gramjd

SIZES = [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
MODULES = ["distributed_cases", "traffic_cases"]
SHARDED = importlib.util.find_spec("torch.distributed.fsdp._fully_shard") is not None  # since torch 2.6
Results = list[dict[str, Any]]


@pytest.fixture(scope="module", params=SIZES)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Of every case, of each rank."""
    return ranks.run(
        [*MODULES, *(["sharded_cases"] if SHARDED else [])], request.param, tmp_path_factory.mktemp("ranks")
    )


def close(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    assert (got - want).norm() <= 1e-10 * want.norm()


@pytest.mark.parametrize("name", list(cases.MODELS))
def test_engine(results: Results, name: str) -> None:
    sizes = cases.sizes_of(len(results))
    model, x, y = cases.make(name, sum(sizes))
    want = dense_gramian(cases.losses_of(model, x, y), model.parameters())
    for rank, (whole, rows) in enumerate(found[name] for found in of(results, "engine")):
        close(whole, want)
        assert torch.equal(whole, whole.T)
        assert torch.equal(rows, whole[sum(sizes[:rank]) :][: sizes[rank]])


def test_functional(results: Results) -> None:
    sizes = cases.sizes_of(len(results))
    model, x, y = cases.make("mlp", sum(sizes))
    jac = cases.functional(model, x, y, len(results))
    want, shares = jac.gramian(), jac.gramian("parameter")
    for rank, found in enumerate(of(results, "functional")):
        mine = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        for one in want:
            for two in want:
                close(found["tree"][one][two], want[one][two])
                close(found["rows"][one][two], want[one][two][mine])
                close(found["micro"][one][two], want[one][two])
                for name in shares:
                    close(found["shares"][name][one][two], shares[name][one][two])


def test_bfloat16(results: Results) -> None:
    model, x, y = cases.make("mlp", sum(cases.sizes_of(len(results))))
    engine = gramjd.Engine(model.bfloat16(), batch_dim=0)
    want = engine.compute_gramian(cases.losses_of(model, x.bfloat16(), y))
    for got in of(results, "bfloat16"):
        assert got.dtype == torch.float32
        assert (got - want).norm() < 0.01 * want.norm()  # products of other shapes round otherwise


def test_subgroup(results: Results) -> None:
    sizes = cases.sizes_of(len(results))
    model, x, y = cases.make("mlp", sum(sizes))
    losses = cases.losses_of(model, x, y)[: sum(sizes[:-1])]
    want = dense_gramian(losses, model.parameters())
    *members, outsider = of(results, "subgroup")
    assert outsider is None
    for got in members:
        close(got, want)


@pytest.mark.parametrize("mode", [(), ("find_unused_parameters",), ("static_graph",)], ids=str)
@pytest.mark.parametrize("way", ["autograd", "jacobian"])
@pytest.mark.parametrize("name", list(cases.MODELS))
def test_step(results: Results, name: str, way: str, mode: tuple[str, ...]) -> None:
    """The gradients under DDP are those of one process with the whole batch."""
    model, x, y = cases.make(name, sum(cases.sizes_of(len(results))))
    for found in of(results, "step"):
        weights, gradients = found[(name, way, *mode)]
        model.zero_grad()
        cases.losses_of(model, x, y).backward(weights)
        for got, p in zip(gradients, model.parameters(), strict=True):
            close(got, p.grad)


def test_static_graph(results: Results) -> None:
    for name, message in of(results, "static_graph"):
        assert name in ("NotCoveredError", "RankFailedError")
        assert "Take the first step without an engine" in message


def test_unused_parameters(results: Results) -> None:
    model, x = cases.two_heads()
    pieces = [model(x[2 * rank : 2 * rank + 2], rank) for rank in range(len(results))]
    losses = torch.cat(pieces).square().sum(1)
    want = dense_gramian(losses, model.parameters()).sum(0)
    losses.backward(want)
    for found in of(results, "unused"):
        for weights, gradients in found:
            close(weights, want)
            for got, p in zip(gradients, model.parameters(), strict=True):
                close(got, p.grad)


DISAGREEMENTS = {
    "check": r"about the check: rank 0 has first, rank \d has always",
    "batch_dim": r"about the batch_dim: rank 0 has 0, rank \d has -1",
    "rows": r"about the rows: rank 0 has all, rank \d has local",
    "objectives": r"about the outputs of one sample: .*shape=\(1,\).*shape=\(1, 3\)",
    "shapes": r"about the parameters: rank 0 has bias \[3\] torch.float64, rank \d has bias \[5\]",
    "names": r"on one rank only: \['1.bias \[3\] torch.float64'.*rank 0 has 2 of them, rank \d has 4",
    "dtype": r"about the parameters: .*torch.float64, rank \d has .*torch.float32",
}


@pytest.mark.parametrize("what", list(DISAGREEMENTS))
def test_disagreement(results: Results, what: str) -> None:
    """One error, the same on every rank, and no rank waits for another."""
    found = [mine[what] for mine in of(results, "disagreement")]
    assert {name for name, _ in found} == {"RanksDisagreeError"}
    assert len({message for _, message in found}) == 1
    assert re.search(DISAGREEMENTS[what], found[0][1])


@pytest.mark.parametrize(
    ("what", "error", "message"),
    [
        ("wrong rows", "ValueError", "rows must be 'all' or 'local', not 'some'"),
        ("mixed", "NotSeparableError", "as independent samples"),
    ],
)
def test_a_rank_that_fails(results: Results, what: str, error: str, message: str) -> None:
    """Its own error there, and on every other rank one that tells it."""
    *others, (own, told) = (mine[what] for mine in of(results, "disagreement"))
    assert own == error
    assert message in told
    for name, repeated in others:
        assert name == "RankFailedError"
        assert re.search(rf"Rank {len(results) - 1} cannot take part. There: {error}: .*{message}", repeated)


def test_errors_on_all_ranks(results: Results) -> None:
    """Overflow that only some ranks' rows have, no sample anywhere, weights of a wrong shape."""
    expected = [
        ("overflow", "NotFiniteError", "NaN or infinite"),
        ("empty", "ValueError", "No rank has a sample"),
        ("weights", "ValueError", rf"On rank {len(results) - 1} the weights have shape"),
    ]
    for mine in of(results, "disagreement"):
        for what, error, message in expected:
            assert mine[what][0] == error
            assert re.search(message, mine[what][1])
        assert mine["after"].shape == (2 * len(results), 2 * len(results))


@pytest.mark.parametrize("way", traffic_cases.WAYS)
@pytest.mark.parametrize("name", list(cases.MODELS))
def test_ways(results: Results, name: str, way: str) -> None:
    """By factors alone, by slices alone, and in many small messages; twice the same, bit by bit."""
    sizes = cases.sizes_of(len(results))
    model, x, y = cases.make(name, sum(sizes))
    want = dense_gramian(cases.losses_of(model, x, y), model.parameters())
    for rank, found in enumerate(of(results, "ways")):
        whole, rows, again = found[(name, way)]
        close(whole, want)
        assert torch.equal(whole, whole.T)
        assert torch.equal(whole, again)
        assert torch.equal(rows, whole[sum(sizes[:rank]) :][: sizes[rank]])
        assert torch.equal(whole, of(results, "ways")[0][(name, way)][0])


@pytest.mark.parametrize("way", traffic_cases.WAYS)
@pytest.mark.parametrize("name", list(cases.MODELS))
def test_sums_over_ranks(results: Results, name: str, way: str) -> None:
    """Task losses of which each rank has a share: the Gramian and the step of one process."""
    model, x, y = cases.make(name, sum(cases.sizes_of(len(results))))
    losses = traffic_cases.tasks(model, x, y)
    want = dense_gramian(losses, model.parameters())
    for found in of(results, "sums"):
        whole, weights, gradients = found[(name, way)]
        close(whole, want)
        assert torch.equal(whole, whole.T)
        assert torch.equal(whole, of(results, "sums")[0][(name, way)][0])
        model.zero_grad()
        losses.backward(weights, retain_graph=True)
        for got, p in zip(gradients, model.parameters(), strict=True):
            close(got, p.grad)


def test_what_ranks_hold_and_send(results: Results) -> None:
    """The planner's bytes are those sent; no rank has the factors of all at a time."""
    for name in cases.MODELS:
        for way in traffic_cases.WAYS:
            found = [mine[(name, way)] for mine in of(results, "traffic")]
            assert sum(sent for sent, *_ in found) == found[0][1]
            if len(results) > 2:
                assert all(held <= 2 for *_, held in found)


def test_the_cheaper_way_is_taken(results: Results) -> None:
    for name in cases.MODELS:
        planned = {way: of(results, "traffic")[0][(name, way)][1] for way in traffic_cases.WAYS}
        assert planned["planned"] <= min(planned["factors"], planned["slices"])


needs_shards = pytest.mark.skipif(not SHARDED, reason="torch has no fully_shard")


@needs_shards
@pytest.mark.parametrize("way", ["autograd", "jacobian"])
@pytest.mark.parametrize("name", list(cases.MODELS))
def test_sharded(results: Results, name: str, way: str) -> None:
    """Under fully_shard: the Gramian and the step of one process; weights only where a replay needs them."""
    model, x, y = cases.make(name, sum(cases.sizes_of(len(results))))
    want = dense_gramian(cases.losses_of(model, x, y), model.parameters())
    for found in of(results, "sharded"):
        gramian, weights, gradients, units = found[(name, way)]
        close(gramian, want)
        model.zero_grad()
        cases.losses_of(model, x, y).backward(weights)
        for got, p in zip(gradients, model.parameters(), strict=True):
            close(got, p.grad)
        expected = {"lstm": ["FSDPTagger"], "transformer": ["FSDPEmbedding"]}
        assert units == expected.get(name, [])


@needs_shards
@pytest.mark.parametrize("name", list(cases.MODELS))
def test_sharded_sums(results: Results, name: str) -> None:
    model, x, y = cases.make(name, sum(cases.sizes_of(len(results))))
    losses = traffic_cases.tasks(model, x, y)
    want = dense_gramian(losses, model.parameters())
    for found in of(results, "sharded_sums"):
        gramian, weights, gradients = found[name]
        close(gramian, want)
        model.zero_grad()
        losses.backward(weights, retain_graph=True)
        for got, p in zip(gradients, model.parameters(), strict=True):
            close(got, p.grad)


@needs_shards
def test_sharded_refused(results: Results) -> None:
    found = of(results, "sharded_refused")
    assert [mine["finite"][0] for mine in found] == ["RankFailedError"] * (len(found) - 1) + [
        "NotFiniteError"
    ]
    for mine in found:
        name, message = mine["covered"]
        assert name == "CheckFailedError"
        assert "'1.scale'" in message and "no per-row backward" in message


def test_sums_have_no_rows_of_their_own(results: Results) -> None:
    for local, mixed in of(results, "sums_refused"):
        assert "sums over all ranks" in local
        assert "all outputs have a batch dimension, or none" in mixed


def test_without_a_group() -> None:
    jac = gramjd.jacobian(lambda p, x: (p * x).sum())(torch.ones(3), torch.ones(2, 3))
    with pytest.raises(ValueError, match="rows='local' needs group="):
        jac.gramian(rows="local")
    model = torch.nn.Linear(2, 1)
    with pytest.raises(ValueError, match="rows='some' needs group="):
        gramjd.Engine(model, batch_dim=0).compute_gramian(model(torch.ones(3, 2)).sum(1), rows="some")
    with pytest.raises(ValueError, match="init_process_group first"):
        jac.gramian(group=object())
