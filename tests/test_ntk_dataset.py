"""Kernels over whole datasets: tiles, files, interruptions, and loaders that cannot be trusted."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from allocations import OLD, Allocations
from kernels import MODELS, definition, fcn, inputs, less
from oracle import assert_close, assert_symmetric
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gramjd
from gramjd import ntk_dataset
from gramjd.datasets.batches import digest

OPTIONS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "fcn": ("fcn", (), ()),
    "fcn, trace": ("fcn", (-1,), ()),
    "fcn, diagonal": ("fcn", (), (1,)),
    "cnn": ("cnn", (), ()),
    "cnn, trace": ("cnn", (1,), ()),
    "cnn, diagonal": ("cnn", (), (2,)),
    "cnn, both": ("cnn", (3,), (1,)),
    "cnn, several": ("cnn", (1, 2), (-1,)),
}


@pytest.mark.parametrize("file", [False, True])
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("case", list(OPTIONS))
def test_definition(case: str, same: bool, file: bool, tmp_path: Path) -> None:
    """Batches of any sizes, the last one smaller."""
    name, trace, diagonal = OPTIONS[case]
    model, x1 = MODELS[name](), inputs(name, 7)
    x2 = x1 if same else inputs(name, 5)
    func, params = gramjd.functional_loss(model)
    loaders = [x1.split(3)] if same else [x1.split(3), x2.split([1, 4])]
    out = tmp_path / "kernel.npy" if file else None
    got = ntk_dataset(func, params, *loaders, trace_axes=trace, diagonal_axes=diagonal, out=out)
    want = less(definition(model, x1, x2), trace, diagonal)
    assert_close(got, want)
    if same and not diagonal:
        assert_symmetric(got)
    if out:
        assert np.array_equal(np.load(out), got.numpy())


def test_diagonal_of_output_is_symmetric() -> None:
    func, params = gramjd.functional_loss(fcn())
    got = ntk_dataset(func, params, inputs("fcn", 8).split(3), diagonal_axes=[1])
    assert torch.equal(got, got.permute(2, 1, 0))


def test_structured_batches() -> None:
    """Of a ``DataLoader``, with labels, in dictionaries, along another dimension, of bfloat16."""
    func, params = gramjd.functional_loss(fcn())
    x = inputs("fcn", 7)
    want = gramjd.ntk(func)(params, x)
    labelled = DataLoader(TensorDataset(x, torch.arange(7)), batch_size=3)
    assert_close(ntk_dataset(lambda p, batch: func(p, batch[0]), params, labelled), want)
    assert_close(ntk_dataset(func, params, DataLoader(TensorDataset(x), batch_size=4)), want)
    named = [{"x": part.mT, "name": "digits"} for part in x.split(2)]
    assert_close(ntk_dataset(lambda p, batch: func(p, batch["x"]), params, named, in_dims=1), want)
    assert_close(ntk_dataset(func, params, labelled_x := x.split(2), labelled_x), want)


def test_bfloat16(tmp_path: Path) -> None:
    """Accumulated in float32, as by ``ntk``."""
    func, params = gramjd.functional_loss(fcn().bfloat16())
    x = inputs("fcn", 5).bfloat16()
    got = ntk_dataset(func, params, x.split(3), out=tmp_path / "kernel.npy")
    assert_close(got, gramjd.ntk(func)(params, x), 1e-6)
    assert got.dtype == torch.float32


def test_no_graph_is_kept() -> None:
    model = fcn()
    params = dict(model.named_parameters())

    def func(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, params, (x,))

    assert not ntk_dataset(func, params, inputs("fcn", 4).split(2)).requires_grad


@pytest.mark.parametrize("num_workers", [1])
def test_workers_that_stay(num_workers: int) -> None:
    """A loader whose passes share one iterator."""
    func, params = gramjd.functional_loss(fcn())
    x = inputs("fcn", 6)
    loader = DataLoader(x, batch_size=2, num_workers=num_workers, persistent_workers=True)  # type: ignore[arg-type]
    assert_close(ntk_dataset(func, params, loader), gramjd.ntk(func)(params, x))
    assert_close(ntk_dataset(func, params, loader, loader), gramjd.ntk(func)(params, x))


# what is refused


def test_paths(tmp_path: Path) -> None:
    func, params = gramjd.functional_loss(fcn())
    loader: list[Tensor] = []  # not even looked at
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*missing to write kernel.npy in"):
        ntk_dataset(func, params, loader, out=tmp_path / "missing" / "kernel.npy")
    with pytest.raises(IsADirectoryError, match="is a folder; out must be the path of a file"):
        ntk_dataset(func, params, loader, out=str(tmp_path))
    (tmp_path / "precious.npy").write_text("precious")
    with pytest.raises(FileExistsError, match=r"precious.npy exists, and there is no .*precious.npy.journal"):
        ntk_dataset(func, params, loader, out=tmp_path / "precious.npy")
    assert (tmp_path / "precious.npy").read_text() == "precious"


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="space cannot be reserved on this system")
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error at the start, and nothing stays behind that would be in the way of another try."""
    func, params = gramjd.functional_loss(fcn())
    x = inputs("fcn", 4)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space left"):
            ntk_dataset(func, params, x.split(3), out=tmp_path / "kernel.npy")
    got = ntk_dataset(func, params, x.split(3), out=tmp_path / "kernel.npy")
    assert torch.equal(got, ntk_dataset(func, params, x.split(3)))


class Growing:
    """Other batches in every pass."""

    def __init__(self, step: float, lost: int = 0) -> None:
        self.batches, self.step, self.lost, self.passes = list(inputs("fcn", 6).split(2)), step, lost, 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        for batch in self.batches[: len(self.batches) - self.lost * (self.passes - 1)]:
            yield batch + self.step * self.passes


X = torch.arange(30, dtype=torch.float64).view(6, 5)
LOADERS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "shuffled": (lambda: DataLoader(X, batch_size=2, shuffle=True), ValueError, "{} shuffles its samples. A"),  # type: ignore[arg-type]
    "secretly shuffled": (lambda: Shuffled(), ValueError, "Batch . of {} changed since the first pass"),
    "augmented": (lambda: Growing(1e-9), ValueError, "Batch 0 of {} changed since the first pass"),
    "shrinking": (lambda: Growing(0, lost=1), ValueError, "{} gave 3 batches in its first pass and fewer"),
    "generator": (lambda: (x for x in X.split(2)), TypeError, r"{} is an iterator, .* Pass list\({}\)"),
    "tensor": (lambda: X, TypeError, "{} must be an iterable of batches, .*, not a Tensor"),
    "no iterable": (lambda: 3, TypeError, "{} must be an iterable of batches, .*, not a int"),
    "empty": (lambda: [], ValueError, "{} gave no batch"),
    "empty batch": (lambda: [X[:0]], ValueError, "The batch is empty"),
    "no tensor": (lambda: [3.0], ValueError, "No argument is batched"),
}


class Shuffled:
    """A permutation of the samples in every pass, never the same twice."""

    def __init__(self) -> None:
        self.shift = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.shift += 1
        return iter(X.roll(self.shift, 0).split(2))


@pytest.mark.parametrize("place", ["loader1", "loader2"])
@pytest.mark.parametrize("kind", list(LOADERS))
def test_loaders_that_cannot_be_trusted(kind: str, place: str) -> None:
    make, error, message = LOADERS[kind]
    func, params = gramjd.functional_loss(fcn())
    loaders = {"loader1": X.split(2), place: make()}
    with pytest.raises(error, match=message.replace("{}", place)):
        ntk_dataset(func, params, **loaders)


def test_options_that_make_no_sense() -> None:
    func, params = gramjd.functional_loss(fcn())
    for option in ["trace_axes", "diagonal_axes"]:
        for axis in [0, -2]:
            with pytest.raises(ValueError, match=r"Axis 0, that of the samples.*batch by batch: torch.cat"):
                ntk_dataset(func, params, X.split(2), **{option: [axis]})
        with pytest.raises(ValueError, match="Axis 2 is none of the 2 axes"):
            ntk_dataset(func, params, X.split(2), **{option: [2]})
    with pytest.raises(TypeError, match="whose output is a PyTree"):
        ntk_dataset(lambda p, x: [func(p, x)], params, X.split(2))
    with pytest.raises(ValueError, match="holds no tensor to differentiate"):
        ntk_dataset(func, {}, X.split(2))


def test_without_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    func, params = gramjd.functional_loss(fcn())
    monkeypatch.setitem(sys.modules, "numpy.lib.format", None)
    with pytest.raises(ImportError, match="needs numpy: pip install numpy"):
        ntk_dataset(func, params, X.split(2), out=tmp_path / "kernel.npy")


# the bar


@pytest.mark.parametrize(("progress", "installed"), [(True, True), (True, False), (False, True)])
def test_progress(progress: bool, installed: bool, monkeypatch: pytest.MonkeyPatch,
                  capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    func, params = gramjd.functional_loss(fcn())
    if not installed:
        monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    monkeypatch.setattr("gramjd.datasets.progress.PATIENCE", 0)
    kernel = ntk_dataset(func, params, X.split(2), progress=progress)
    assert kernel.shape == (6, 3, 3, 6)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert ("6/6" in shown.err) == (progress and installed)


# memory


@pytest.mark.skipif(OLD, reason="the end of a storage cannot be seen")
def test_memory() -> None:
    """Beyond the result it does not grow with the dataset: one pair of batches, not all of them."""
    func, params = gramjd.functional_loss(nn.Sequential(nn.Linear(5, 256), nn.Tanh(), nn.Linear(256, 4)))
    extra = {}
    for batches in [3, 24]:
        x = torch.randn(batches * 8, 5)
        with Allocations() as allocations:
            kernel = ntk_dataset(func, params, x.split(8))
        extra[batches] = allocations.peak - kernel.nbytes
    assert extra[24] <= 1.1 * extra[3], extra


def test_digests_of_arrays() -> None:
    """Also of entries that the representation of a large array leaves out."""
    array = np.zeros(5000)
    changed = array.copy()
    changed[2500] = 1
    assert repr(array) == repr(changed)
    assert digest({"x": array}) != digest({"x": changed})
    assert digest({"x": array}) == digest({"x": array.copy()})
