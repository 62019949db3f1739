"""Kernels over datasets by several processes, against those of one; killed and resumed."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path
from typing import Any

import ntk_cases as cases
import numpy as np
import pytest
import ranks
import torch
import torch.multiprocessing as mp
from kernels import MODELS, inputs
from ranks import of
from torch import Tensor

import gramjd
from gramjd import ntk_dataset

Results = list[dict[str, Any]]


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return ranks.run(["ntk_cases"], request.param, tmp_path_factory.mktemp("ntk"))


@pytest.mark.parametrize("name", list(cases.KERNELS))
def test_whole(results: Results, name: str) -> None:
    """All rows on rank 0, none elsewhere."""
    want = cases.kernel_of(name)
    first, *others = (found[(name, False)] for found in of(results, "kernels"))
    assert first.shape == want.shape
    assert first.dtype == want.dtype == torch.float64
    assert (first - want).norm() <= 1e-10 * want.norm()
    for other in others:
        assert other.shape == (0, *want.shape[1:])


@pytest.mark.parametrize("name", list(cases.KERNELS))
def test_sharded(results: Results, name: str) -> None:
    """Each rank has the rows of consecutive batches; of one batch and several ranks, one has them all."""
    want = cases.kernel_of(name)
    batches, size = cases.KERNELS[name][1], len(results)
    cuts = [len(batches) * rank // size for rank in range(size + 1)]
    shards = [found[(name, True)] for found in of(results, "kernels")]
    for rank, shard in enumerate(shards):
        assert len(shard) == sum(batches[cuts[rank] : cuts[rank + 1]])
    got = torch.cat(shards)
    assert got.shape == want.shape
    assert (got - want).norm() <= 1e-10 * want.norm()


def test_tiles_are_computed_once(results: Results) -> None:
    counts, tiles = of(results, "computed"), 5 * 6 // 2
    assert sum(counts) == tiles
    assert max(counts) <= -(-tiles // len(results))


def test_bfloat16(results: Results) -> None:
    for rank, (together, alone) in enumerate(of(results, "bfloat16")):
        assert together.dtype == torch.float32
        assert torch.equal(together, alone if rank == 0 else alone[:0])


DISAGREEMENTS = {
    "parameters": r"about the parameters: rank 0 has \w+, rank \d has \w+\. .* without a DistributedSampler",
    "batches": r"about the (shape|batches of loader1): rank 0 has .*without a DistributedSampler",
    "options": r"about the shape: rank 0 has \[6, 3, 3, 6\], rank \d has \[6, 6\]",
    "sharded": "about the option sharded: rank 0 has False, rank . has True",
    "symmetry": "about the symmetry: rank 0 has True, rank . has False",
    "function": "The function has other derivatives on rank . than on rank 0",
}


@pytest.mark.parametrize("what", list(DISAGREEMENTS))
def test_disagreement(results: Results, what: str) -> None:
    found = [mine[what] for mine in of(results, "refused")]
    assert {name for name, _ in found} == {"RanksDisagreeError"}
    assert len({message for _, message in found}) == 1
    assert re.search(DISAGREEMENTS[what], found[0][1])


@pytest.mark.parametrize(
    ("what", "culprit", "error", "message"),
    [
        ("loader", -1, "TypeError", "loader1 is an iterator"),
        ("midway", -1, "OSError", "the disk is gone"),
        ("overflow", -1, "NotFiniteError", "NaN or infinite"),
        ("folder", 0, "FileNotFoundError", "There is no folder"),
    ],
)
def test_a_rank_that_fails(results: Results, what: str, culprit: int, error: str, message: str) -> None:
    """Before the first tile or at any later one: its own error there, and one that tells it elsewhere."""
    found = [mine[what] for mine in of(results, "refused")]
    name, told = found.pop(culprit)
    assert name == error
    assert message in told
    for name, repeated in found:
        assert name == "RankFailedError"
        assert re.search(rf"Rank \d cannot take part. There: {error}: .*{message}", repeated)


def test_ranks_go_on_after_errors(results: Results) -> None:
    assert [tuple(mine["after"]) for mine in of(results, "refused")] == [
        (6 if rank == 0 else 0, 3, 3, 6) for rank in range(len(results))
    ]


def test_sharded_needs_a_group() -> None:
    func, params = gramjd.functional_loss(MODELS["fcn"]())
    with pytest.raises(ValueError, match=r"sharded=True needs group="):
        ntk_dataset(func, params, inputs("fcn", 4).split(2), sharded=True)


# killed, and resumed

TILES = 12 * 13 // 2


@pytest.fixture
def want(tmp_path: Path) -> Tensor:
    """The kernel by one process, of what is in the folder for others."""
    func, params = gramjd.functional_loss(MODELS["fcn"]())
    x = inputs("fcn", 46)
    torch.save(x, tmp_path / "x.pt")
    torch.save(params, tmp_path / "params.pt")
    return ntk_dataset(func, params, x.split(4), progress=False)


def lines(journal: Path) -> list[bytes]:
    """Of finished tiles; the last may be torn."""
    return journal.read_bytes().split(b"\n")[1:-1] if journal.exists() else []


def kill(folder: Path, size: int, victims: list[int], journal: str, sharded: bool,
         monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Start a kernel on some ranks, and kill some of them after a few tiles."""
    monkeypatch.setenv("PAUSE", "0.003")
    run = (size, str(folder), "store-1", sharded)
    context = mp.spawn(cases.work, run, nprocs=size, join=False)  # torch 2.1: its queues live as long
    processes = context.processes
    try:
        while len(lines(folder / journal)) < 10:
            assert all(process.is_alive() for process in processes), "one ended by itself"
            time.sleep(0.01)
        for victim in victims:
            processes[victim].kill()
        for process in processes:
            process.join(60)
    finally:
        for process in processes:
            process.kill()
    assert [process.exitcode for process in processes] == [
        -signal.SIGKILL if rank in victims else 3 for rank in range(size)
    ]
    for rank in {*range(size)} - {*victims}:
        told = (folder / f"error{rank}").read_text()
        assert "gramjd" not in told.split(":")[0]  # an error of torch's
    monkeypatch.delenv("PAUSE")
    assert 10 <= len(lines(folder / journal)) < TILES


def marked(file: Path, want: Tensor) -> None:
    """Another value in a tile that is finished: whoever computed it again would mend it."""
    assert b"0 1" in lines(file.with_name(f"{file.name}.journal"))
    array = np.load(file, mmap_mode="r+")
    array[:4, ..., 4:8] = want[:4, ..., 4:8] = 77.0
    array.flush()


@pytest.mark.parametrize(
    ("victims", "resumed"),
    [
        ([1], 1),
        pytest.param([0], 3, marks=pytest.mark.slow),
        pytest.param([0, 1], 2, marks=pytest.mark.slow),
    ],
)
def test_killed(victims: list[int], resumed: int, want: Tensor, tmp_path: Path,
                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """By one or all of two ranks, and resumed by another number of them: bit by bit the same kernel."""
    kill(tmp_path, 2, victims, "kernel.npy.journal", False, monkeypatch)
    marked(tmp_path / "kernel.npy", want)
    mp.spawn(cases.work, (resumed, str(tmp_path), "store-2", False), nprocs=resumed)
    assert torch.equal(torch.load(tmp_path / "0.pt"), want)
    assert np.array_equal(np.load(tmp_path / "kernel.npy"), want)
    finished = lines(tmp_path / "kernel.npy.journal")
    assert len(finished) == len(set(finished)) == TILES


@pytest.mark.slow
def test_killed_when_sharded(want: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank has a file and a journal of its own; tiles that one of two keepers lost come again."""
    names = [f"kernel-{rank}-of-2.npy" for rank in range(2)]
    kill(tmp_path, 2, [1], f"{names[0]}.journal", True, monkeypatch)
    marked(tmp_path / names[0], want)
    journal = tmp_path / f"{names[1]}.journal"
    journal.write_bytes(b"\n".join(journal.read_bytes().split(b"\n")[:-3]))
    mp.spawn(cases.work, (2, str(tmp_path), "store-2", True), nprocs=2)
    got = torch.cat([torch.from_numpy(np.load(tmp_path / name)) for name in names])
    assert torch.equal(got, want)
    assert torch.equal(torch.cat([torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]), want)
