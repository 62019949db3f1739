"""Kernels in files whose computation was interrupted: what is kept, and what must not be mixed."""

from __future__ import annotations

import importlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from allocations import OLD, Allocations
from kernels import fcn, inputs
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gramjd
from gramjd import ntk_dataset

MODULE = importlib.import_module("gramjd.ntk.dataset")


class Stops(Exception):
    pass


class Countdown:
    """A list of batches that fails when some number of them has been read."""

    def __init__(self, batches: list[Tensor], left: int) -> None:
        self.batches, self.left = batches, left

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.batches:
            if self.left == 0:
                raise Stops
            self.left -= 1
            yield batch


class Interrupted:
    """A kernel of four batches in a file, of which some tiles are missing."""

    def __init__(self, folder: Path) -> None:
        self.path, self.journal = folder / "kernel.npy", folder / "kernel.npy.journal"
        self.func, self.params = gramjd.functional_loss(fcn())
        self.batches = list(inputs("fcn", 10).split(3))
        with pytest.raises(Stops):  # a pass to look at them, a batch to try, a row, and its next one's start
            self.run(Countdown(self.batches, 4 + 1 + 4 + 2))

    def run(self, loader: Any = None, **changes: Any) -> Tensor:
        args = {"func": self.func, "params": self.params, "loader1": loader or self.batches, "out": self.path}
        return ntk_dataset(**{**args, **changes})

    @property
    def lines(self) -> list[str]:
        return self.journal.read_text().splitlines()[1:]

    @property
    def whole(self) -> Tensor:
        """What an uninterrupted run gives."""
        return ntk_dataset(self.func, self.params, self.batches)


@pytest.fixture
def interrupted(tmp_path: Path) -> Interrupted:
    return Interrupted(tmp_path)


def test_finished_tiles_are_kept(interrupted: Interrupted) -> None:
    """Their values are not touched, not even if they are wrong; the others are computed."""
    assert interrupted.lines == ["0 0", "0 1", "0 2", "0 3", "1 1"]
    array = np.load(interrupted.path, mmap_mode="r+")
    array[:3, :, :, 3:6] = 77.0  # tile 0 1
    array.flush()
    got = interrupted.run()
    assert (got[:3, :, :, 3:6] == 77).all()
    want = interrupted.whole
    want[:3, :, :, 3:6] = 77.0
    assert torch.equal(got, want)
    assert len(interrupted.lines) == 10


def test_finished_kernels_are_read(interrupted: Interrupted, monkeypatch: pytest.MonkeyPatch) -> None:
    want = interrupted.run()
    monkeypatch.setattr(MODULE._Tiles, "_row", None)  # nothing is computed
    assert torch.equal(interrupted.run(), want)


@pytest.mark.parametrize("kept", range(9))
def test_torn_line(interrupted: Interrupted, kept: int) -> None:
    """Whatever of the journal's end reached the disk."""
    content = interrupted.journal.read_bytes()
    interrupted.journal.write_bytes(content[: len(content) - 8 + kept] + b"\0\0" * (kept % 2))
    assert torch.equal(interrupted.run(), interrupted.whole)
    assert len(set(interrupted.lines)) == len(interrupted.lines) == 10
    assert torch.equal(interrupted.run(), interrupted.whole)


def test_lost_file(interrupted: Interrupted) -> None:
    """A journal without its file says nothing."""
    interrupted.path.unlink()
    assert torch.equal(interrupted.run(), interrupted.whole)


def doubled(given: Interrupted) -> dict[str, Any]:
    changed = [batch.clone() for batch in given.batches]
    changed[2][1, 1] *= 1 + 1e-15
    return {"loader": changed}


# what the error names, and calls that would compute something else
CHANGES: dict[str, Callable[[Interrupted], dict[str, Any]]] = {
    "parameters": lambda given: {"params": {name: p * (1 + 1e-9) for name, p in given.params.items()}},
    "batches of loader1, batches of loader2": doubled,
    "shape, batches of loader1": lambda given: {"loader": given.batches[:3]},
    "batches of loader1": lambda given: {"loader": torch.cat(given.batches).split(5)},
    "batches of loader2": lambda given: {"loader2": [torch.cat(given.batches)]},
    "shape, options": lambda given: {"trace_axes": [1]},
    "options": lambda given: {"in_dims": (0,), "loader": [(x,) for x in given.batches]},
    "function": lambda given: {"func": lambda params, x: given.func(params, x).sin()},
    "dtype, parameters": lambda given: {
        "params": {name: p.float() for name, p in given.params.items()},
        "loader": [x.float() for x in given.batches],
    },
}


@pytest.mark.parametrize("what", list(CHANGES))
def test_another_kernel(interrupted: Interrupted, what: str) -> None:
    before = interrupted.path.read_bytes(), interrupted.journal.read_bytes()
    with pytest.raises(
        ValueError, match=f"another kernel: .*{what}.* differ. Choose another path, or delete"
    ):
        interrupted.run(**CHANGES[what](interrupted))
    assert (interrupted.path.read_bytes(), interrupted.journal.read_bytes()) == before


def test_another_file_beside_the_journal(interrupted: Interrupted) -> None:
    np.save(interrupted.path, np.zeros(3))
    with pytest.raises(ValueError, match=r"kernel.npy is float64\[3\], not float64\[10, 3, 3, 10\]"):
        interrupted.run()


@pytest.mark.parametrize("content", [b"", b"dear diary\n0 1\n", b"[1]\n0 0\n"])
def test_no_journal(interrupted: Interrupted, content: bytes) -> None:
    interrupted.journal.write_bytes(content)
    with pytest.raises(ValueError, match=r"kernel.npy.journal is no journal of a kernel, or is damaged"):
        interrupted.run()


def test_progress_of_a_resumed_run(
    monkeypatch: pytest.MonkeyPatch, interrupted: Interrupted, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gramjd.datasets.progress.PATIENCE", 0)
    capsys.readouterr()
    interrupted.run()
    shown = capsys.readouterr().err
    assert "5/10" in shown and "10/10" in shown


KILLED = """
import sys, time, torch, gramjd
from gramjd.datasets import journal
from pathlib import Path
folder = Path(sys.argv[1])
torch.set_num_threads(1)
journal.FLUSH_SECONDS = 0
saved = torch.load(folder / "saved.pt")
model = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.Tanh(), torch.nn.Linear(16, 10))
model.load_state_dict(saved["model"])
func, params = gramjd.functional_loss(model)

class Slow(list):
    def __iter__(self):
        for batch in super().__iter__():
            time.sleep(float(sys.argv[2]))
            yield batch

gramjd.ntk_dataset(func, params, Slow(saved["x"].split(int(sys.argv[3]))), out=folder / "kernel.npy")
"""


def kill_midway(folder: Path, model: nn.Module, x: Tensor, batch: int, pause: float, tiles: int) -> int:
    """Compute a kernel in a process of its own, kill it after some tiles, and return their number."""
    torch.save({"model": model.state_dict(), "x": x}, folder / "saved.pt")
    path = folder / "kernel.npy.journal"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder), str(pause), str(batch)])
    try:
        while not path.exists() or path.read_bytes().count(b"\n") <= tiles:
            assert process.poll() is None, "it ended by itself"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return path.read_bytes().count(b"\n") - 1


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs a system with SIGKILL")
def test_killed(tmp_path: Path) -> None:
    """Killed midway and resumed: bit for bit what an uninterrupted run gives."""
    model, x = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)), torch.randn(50, 64)
    finished = kill_midway(tmp_path, model, x, 6, pause=0.01, tiles=7)
    assert 7 <= finished < 45
    func, params = gramjd.functional_loss(model)
    got = ntk_dataset(func, params, x.split(6), out=tmp_path / "kernel.npy")
    assert torch.equal(got, ntk_dataset(func, params, x.split(6)))


@pytest.mark.slow
def test_all_digits(tmp_path: Path) -> None:
    """1,797 digits and 10 outputs, 1.2 GiB: killed midway and resumed."""
    x = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    finished = kill_midway(tmp_path, model, x, 128, pause=0.0, tiles=40)
    assert 40 <= finished < 15 * 16 // 2
    func, params = gramjd.functional_loss(model)
    batches = x.split(128)
    with Allocations() as allocations:
        got = ntk_dataset(func, params, batches, out=tmp_path / "kernel.npy")
    print(f"{finished} of 120 tiles were there; peak beside the file: {allocations.peak / 2**20:.0f} MiB")
    assert OLD or allocations.peak < got.nbytes / 10
    assert got.shape == (1797, 10, 10, 1797)
    assert torch.equal(got, ntk_dataset(func, params, batches))
