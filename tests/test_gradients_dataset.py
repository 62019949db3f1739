"""Stores of the gradients of datasets: what is in them, interruptions, and what must not be mixed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import assert_close
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import gramjd
from gramjd import Engine, GradientStore, Jacobian, gradients_dataset
from gramjd.datasets import journal
from gramjd.jacobian import projection

Batch = tuple[Tensor, Tensor]
FILES = ["sketches.npy", "norms.npy", "ids.npy", "journal"]


class Work:
    """A dataset of eleven samples in four batches, a model, and its gradients."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.path = folder / "store"
        self.model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        self.func, self.params = gramjd.functional_loss(self.model, nn.CrossEntropyLoss(reduction="none"))
        self.x, self.y = torch.randn(11, 6, dtype=torch.float64), torch.randint(0, 3, (11,))
        self.loader: Any = list(zip(self.x.split(3), self.y.split(3), strict=True))
        self.jac = gramjd.jacobian(self.func)

    def jacobian(self, batch: Batch) -> Jacobian:
        return self.jac(self.params, *batch)

    def run(self, loader: Any = None, **changes: Any) -> GradientStore:
        given = {"jacobian": self.jacobian, "path": self.path, "dim": 16, "progress": False, **changes}
        return gradients_dataset(loader=self.loader if loader is None else loader, **given)

    @property
    def whole(self) -> Jacobian:
        return self.jacobian((self.x, self.y))


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(tmp_path)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_projections_of_another_version(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    """Factored sketches of a store from before their ``Ω`` changed are not mixed with new ones."""
    with monkeypatch.context() as patched:
        patched.setattr(projection, "_VERSIONS", {})
        old = work.run(kind="factored")
    with pytest.raises(ValueError, match="projection"):
        work.run(kind="factored")
    new = work.run(kind="factored", path=work.path.with_name("new"))
    with pytest.raises(ValueError, match="differ in projection: their sketches have nothing to do"):
        gramjd.similarity(old, new)


class Countdown:
    """Batches that end in an error."""

    def __init__(self, batches: list[Batch], left: int) -> None:
        self.batches, self.left = batches, left

    def __iter__(self) -> Iterator[Batch]:
        yield from self.batches[: self.left]
        raise OSError("the disk is gone")


@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "countsketch", "factored"])
def test_what_is_stored(work: Work, kind: str) -> None:
    store = work.run(dtype=torch.float64, seed=3, kind=kind)
    assert len(store) == 11 and store.sketches.dtype == "float64"
    assert_close(store.rows(0, 11), work.whole.sketch(16, seed=3, kind=kind))
    assert_close(torch.tensor(store.norms), work.whole.norms())
    assert store.ids.tolist() == list(range(11))
    for name in ("sketches", "norms", "ids"):  # files as any other
        assert np.array_equal(np.load(work.path / f"{name}.npy"), getattr(store, name))
    again = GradientStore.open(str(work.path))
    assert torch.equal(again.rows(2, 5), store.rows(2, 5))
    assert repr(again).endswith(f"store', samples=11, dim=16, seed=3, kind='{kind}')")
    assert not store.sketches.flags.writeable


def test_engine(work: Work) -> None:
    """The other face gives the same store."""
    criterion, engine = nn.CrossEntropyLoss(reduction="none"), Engine(work.model, batch_dim=0)
    store = work.run(jacobian=lambda batch: engine.jacobian(criterion(work.model(batch[0]), batch[1])))
    assert_close(store.rows(0, 11), work.whole.sketch(16).float(), 1e-6)
    assert all(p.grad is None for p in work.model.parameters())


def test_structured(work: Work) -> None:
    """A ``DataLoader`` with ids; several outputs, whose batch dimension is not the first."""
    numbers = torch.arange(100, 111)
    loader = DataLoader(TensorDataset(work.x, numbers), batch_size=4)
    outputs = gramjd.functional_loss(work.model)[0]
    rows = gramjd.jacobian(lambda p, x: outputs(p, x).outer(x[:2]))

    store = work.run(loader, jacobian=lambda batch: rows(work.params, batch[0]), ids=lambda batch: batch[1])
    assert store.ids.tolist() == numbers.tolist()
    assert store.sketches.shape == (11, 3, 2, 16) and store.norms.shape == (11, 3, 2)
    assert_close(store.rows(0, 11), rows(work.params, work.x).sketch(16).float(), 1e-6)

    def last(batch: list[Tensor]) -> Jacobian:
        engine = Engine(work.model, batch_dim=1)
        return engine.jacobian(work.model(batch[0]).mT)

    other = work.run(loader, jacobian=last, path=work.path.with_name("last"))
    want = gramjd.jacobian(outputs)(work.params, work.x).sketch(16)
    assert_close(other.rows(0, 11), want.float(), 1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_float16(work: Work, scale: float) -> None:
    """Of gradients of any size, as precise as float16 is; a gradient of zero stays one."""
    weights = torch.ones(11, dtype=torch.float64)
    weights[4] = 0

    def scaled(p: Any, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return work.func(p, x, y) * w * scale

    jac = gramjd.jacobian(scaled)
    loader = list(zip(work.x.split(4), work.y.split(4), weights.split(4), strict=True))
    store = work.run(loader, jacobian=lambda batch: jac(work.params, *batch), dtype=torch.float16)
    assert store.sketches.dtype == np.float32 and store.rows(0, 1).dtype == torch.float32
    want = jac(work.params, work.x, work.y, weights).sketch(16)
    error = (store.rows(0, 11) - want).norm(dim=1)
    assert bool((error <= 2**-11 * want.norm(dim=1)).all())
    assert not store.rows(4, 5).any()
    assert np.array_equal(store.sketches, store.rows(0, 11).numpy())
    in_file = np.load(work.path / "sketches.npy")
    assert in_file.dtype == np.float16
    size = np.abs(in_file).max(1)
    assert ((size >= 0.5) & (size <= 1) | (size == 0)).all()


# interruptions


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("left", [0, 1, 3, 4])
def test_interrupted(work: Work, left: int, dtype: torch.dtype) -> None:
    want = work.path.with_name("whole")
    work.run(path=want, dtype=dtype)
    with pytest.raises(OSError, match="the disk is gone"):
        work.run(Countdown(work.loader, left), dtype=dtype)
    if left:
        assert len(GradientStore.open(work.path)) == min(3 * left, 11)  # closed in order
    work.run(dtype=dtype)
    assert content(work.path) == content(want)
    work.run(dtype=dtype)  # nothing is left to do
    assert content(work.path) == content(want)


def test_nothing_is_computed_twice(work: Work) -> None:
    """But the first batch, which tells whether the function is the same."""
    seen = []

    def counted(batch: Batch) -> Jacobian:
        seen.append(len(batch[0]))
        return work.jacobian(batch)

    with pytest.raises(OSError, match="the disk"):
        work.run(Countdown(work.loader, 2), jacobian=counted)
    work.run(jacobian=counted)
    assert seen == [3, 3] + [3, 3, 2]


def test_more_samples(work: Work) -> None:
    """A loader that goes on appends."""
    whole = work.path.with_name("whole")
    more = [*work.loader, (torch.randn(2, 6).double(), torch.tensor([0, 1]))]
    work.run(more, path=whole)
    assert len(work.run()) == 11
    assert len(work.run(more)) == 13
    assert content(work.path) == content(whole)


@pytest.mark.parametrize("cut", range(0, 120, 7))
def test_torn(work: Work, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever of the journal's end, and more of the arrays than it tells of, reached the disk."""
    monkeypatch.setattr(journal, "FLUSH_SECONDS", 0)
    work.run()
    want = content(work.path)
    log = work.path / "journal"
    log.write_bytes(want["journal"][: len(want["journal"]) - cut])
    with (work.path / "norms.npy").open("ab") as file:
        file.write(b"torn")
    work.run()
    assert content(work.path) == want


KILLED = """
import os, random, signal, sys, time, torch, gramjd
from gramjd.datasets import journal
folder, samples, size, flush, pause, within, ranks = sys.argv[1], *map(float, sys.argv[2:])
torch.set_num_threads(1)
journal.FLUSH_SECONDS = flush
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
func, params = gramjd.functional_loss(model, torch.nn.CrossEntropyLoss(reduction="none"))
jac = gramjd.jacobian(func)
x, y = torch.randn(int(samples), 8), torch.randint(0, 4, (int(samples),))
loader = list(zip(x.split(int(size)), y.split(int(size))))

def write(name, pause, loader, shard):
    def jacobian(batch):
        time.sleep(pause)
        return jac(params, *batch)
    gramjd.gradients_dataset(
        jacobian, loader, f"{folder}/{name}", 32, dtype=torch.float16, progress=False, shard=shard
    )

half = len(loader) // 3
if ranks == 2:
    work = [(loader[:half], (0, 2)), (loader[half:], (1, 2))]
else:
    work = [(loader, None)]
draw, killed, status = random.Random(0), 0, 0
while work:
    children = []
    for given in work:
        children.append(os.fork())
        if children[-1] == 0:
            write("killed", pause, *given)
            os._exit(0)
    time.sleep(draw.random() * within * (1 + killed / 4))
    for child in children:
        os.kill(child, signal.SIGKILL)
    ends = [os.waitpid(child, 0)[1] for child in children]
    status = max([status, *(os.WEXITSTATUS(end) for end in ends if os.WIFEXITED(end))])
    work = [given for given, end in zip(work, ends) if not os.WIFEXITED(end)]
    killed += len(work)
write("whole", 0, loader, None)
print(status, killed)
"""


def store_under_fire(
    folder: Path, samples: int, size: int, flush: float, pause: float, within: float, ranks: int = 1
) -> int:
    """Write a store in processes that are killed at random; return the number of those that were killed."""
    options = map(str, (samples, size, flush, pause, within, ranks))
    given = [sys.executable, "-c", KILLED, str(folder), *options]
    found = subprocess.run(given, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    assert found[0] == "0"
    store, whole = GradientStore.open(folder / "killed"), GradientStore.open(folder / "whole")
    assert len(store) == samples
    if ranks == 1:
        assert content(folder / "killed") == content(folder / "whole")
    for name in ("sketches", "norms", "ids"):
        assert np.array_equal(np.asarray(getattr(store, name)), getattr(whole, name))
    return int(found[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system with fork and SIGKILL")
def test_killed(tmp_path: Path) -> None:
    """Killed at random moments and resumed: to the byte what one run writes."""
    assert store_under_fire(tmp_path, 120, 3, flush=0, pause=0.02, within=0.5) > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system with fork and SIGKILL")
def test_killed_shards(tmp_path: Path) -> None:
    """Two ranks at once, killed together and resumed: joined, they are what one process writes."""
    assert store_under_fire(tmp_path, 120, 3, flush=0, pause=0.02, within=0.5, ranks=2) > 0


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system with fork and SIGKILL")
def test_killed_often(tmp_path: Path) -> None:
    start = time.monotonic()
    killed = store_under_fire(tmp_path, 20_000, 32, flush=0.05, pause=0.002, within=2)
    print(f"20,000 samples, killed {killed} times, in {time.monotonic() - start:.0f} s")
    assert killed > 2


# several ranks


def parts(loader: list[Batch]) -> list[list[Batch]]:
    """Contiguous, of unequal size."""
    return [loader[:2], loader[2:3], loader[3:]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_shards(work: Work, dtype: torch.dtype) -> None:
    """Written in any order, interrupted or not, they are read as one store."""
    whole = work.run(path=work.path.with_name("whole"), dtype=dtype)
    given = parts(work.loader)
    assert len(work.run(given[2], shard=(2, 3), dtype=dtype)) == 2
    with pytest.raises(ValueError, match=r"lacks the shards 0, 1 of 3"):
        GradientStore.open(work.path)
    with pytest.raises(OSError, match="the disk is gone"):
        work.run(Countdown(given[0], 1), shard=(0, 3), dtype=dtype)
    work.run(given[0], shard=(0, 3), dtype=dtype)
    work.run(given[1], shard=(1, 3), dtype=dtype)
    joined = GradientStore.open(work.path)
    assert len(joined) == 11 and joined.sketches.shape == whole.sketches.shape
    for name in ("sketches", "norms", "ids"):
        assert np.array_equal(np.asarray(getattr(joined, name)), getattr(whole, name))
    for start in range(12):
        for stop in range(start, 12):
            assert torch.equal(joined.rows(start, stop), whole.rows(start, stop))
    for index in (3, -1, slice(1, 9, 3), slice(None, None, -1), [10, 0, 6], np.array([[5, 6], [7, -11]])):
        assert np.array_equal(joined.sketches[index], whole.sketches[index])
    for wrong, error in ((11, IndexError), (-12, IndexError), ([0.5], TypeError), ([True], TypeError)):
        with pytest.raises(error):
            joined.sketches[wrong]
    want = gramjd.similarity(whole, whole, topk=3)
    found = gramjd.similarity(joined, joined, topk=3)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    work.run([*given[1], *given[2]], shard=(1, 3), dtype=dtype)  # appended to
    assert len(GradientStore.open(work.path)) == 13


def test_bfloat16(work: Work) -> None:
    store, want = work.run(dtype=torch.bfloat16), work.whole.sketch(16)
    assert np.load(work.path / "sketches.npy").dtype == np.uint16
    assert store.sketches.dtype == np.float32 and store.settings["stored in"] == "bfloat16"
    assert torch.equal(store.rows(2, 9), want[2:9].to(torch.bfloat16).float())
    before = content(work.path)
    work.run(dtype=torch.bfloat16)
    assert content(work.path) == before
    with pytest.raises(TypeError, match="pass the store itself"):
        gramjd.similarity(store, np.load(work.path / "sketches.npy"))


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sketches_are_an_array_of_numbers(work: Work, dtype: torch.dtype, shards: bool) -> None:
    """Whatever the files hold: as numpy, scikit-learn and ``similarity`` see them."""
    for rank, part in enumerate(parts(work.loader)) if shards else ():
        work.run(part, shard=(rank, 3), dtype=dtype)
    store = GradientStore.open(work.path) if shards else work.run(dtype=dtype)
    want, sketches = store.rows(0, 11).numpy(), store.sketches
    assert_close(torch.tensor(want), work.whole.sketch(16).float(), 1e-6 if dtype == torch.float32 else 1e-2)
    assert sketches.shape == (11, 16) and sketches.ndim == 2 and len(sketches) == 11
    assert np.asarray(sketches).dtype == sketches.dtype == np.float32
    assert np.asarray(sketches, dtype=np.float64).dtype == np.float64
    for index in (3, -2, slice(1, 9, 3), slice(5, 2), [10, 0, 6], np.array([[5, 6], [7, -11]])):
        assert np.array_equal(sketches[index], want[index])
    assert np.array_equal(sketches @ want[0], want @ want[0]) and np.array_equal(sketches - want, 0 * want)
    similarities = gramjd.similarity(store, store)
    assert torch.equal(gramjd.similarity(sketches, sketches), similarities)
    assert_close(similarities, torch.tensor(want @ want.T), 1e-5)
    if dtype != torch.float32 and not shards:
        for wrong in ((0, 1), (slice(None), 3), ..., None):
            with pytest.raises(TypeError, match="choose their columns afterwards"):
                sketches[wrong]
        some = np.arange(11) % 2 == 0
        assert np.array_equal(sketches[some], want[some])
        with pytest.raises(ValueError, match="without a copy"):
            sketches.__array__(copy=False)


def test_the_file_of_a_store_in_float16(work: Work) -> None:
    """Lacks the scales, which ``similarity`` notices."""
    store = work.run(dtype=torch.float16)
    raw = np.load(work.path / "sketches.npy", mmap_mode="r")
    for left, right, name in ((raw, store, "left"), (store, raw[2:5], "right")):
        with pytest.raises(ValueError, match=f"{name} is the file of a store in float16"):
            gramjd.similarity(left, right)


def test_ids_of_shards(work: Work) -> None:
    """One's own are kept."""
    for rank, part in enumerate(parts(work.loader)):
        work.run(part, shard=(rank, 3), ids=lambda batch: batch[1])
    assert GradientStore.open(work.path).ids.tolist() == work.y.tolist()


def test_shards_that_do_not_fit(work: Work) -> None:
    given = parts(work.loader)
    work.run(given[0], shard=(0, 2))
    with pytest.raises(FileExistsError, match="is no store of gradients"):
        work.run()  # no place for a store of one process
    work.run(given[1], shard=(1, 2), seed=1)
    with pytest.raises(ValueError, match=r"shard-00001-of-00002 and .* differ in projection: not one store"):
        GradientStore.open(work.path)
    work.run(given[1], shard=(1, 3))
    with pytest.raises(ValueError, match="shards of 2 and of 3 ranks"):
        GradientStore.open(work.path)
    other = work.path.with_name("other")
    work.run(path=other)
    with pytest.raises(FileExistsError, match="of one process"):
        work.run(path=other, shard=(0, 2))
    (other / "journal").unlink()
    with pytest.raises(FileExistsError, match="is no store of gradients"):
        work.run(path=other, shard=(0, 2))


# what must not be mixed


CHANGES: dict[str, Callable[[Work], dict[str, Any]]] = {
    "parameters": lambda w: {"jacobian": lambda b: w.jac({n: p + 1e-9 for n, p in w.params.items()}, *b)},
    "projection": lambda w: {"seed": 1},
    "projection differ": lambda w: {"kind": "gaussian"},
    "stored in": lambda w: {"dtype": torch.float64},
    "shapes of parameters, parameters": lambda w: {"jacobian": lambda b: w.jacobian(b).select(["0.bias"])},
    "ids": lambda w: {"ids": lambda b: b[1]},
    "another function": lambda w: {
        "jacobian": lambda b: gramjd.jacobian(lambda *a: 2 * w.func(*a))(w.params, *b)
    },
    "Batch 1 of the loader is not the one": lambda w: {"loader": [w.loader[0], w.loader[2], w.loader[1]]},
    "The loader gave 2 batches, and .* has 4": lambda w: {"loader": w.loader[:2]},
    "Batch 0 of the loader": lambda w: {
        "loader": [(w.x[:3] * (1 + 1e-12), w.y[:3]), *w.loader[1:]],
    },
}


@pytest.mark.parametrize("what", list(CHANGES))
def test_something_else(work: Work, what: str) -> None:
    work.run()
    before = content(work.path)
    with pytest.raises(ValueError, match=what):
        work.run(**CHANGES[what](work))
    assert content(work.path) == before


def test_parameters_that_change_on_the_way(work: Work) -> None:
    criterion, engine = nn.CrossEntropyLoss(reduction="none"), Engine(work.model, batch_dim=0)

    def trained(batch: Batch) -> Jacobian:
        found = engine.jacobian(criterion(work.model(batch[0]), batch[1]))
        with torch.no_grad():
            work.model[0].weight.mul_(1.1)
        return found

    with pytest.raises(ValueError, match="In batch 1 of the loader, parameters of the Jacobian is not as in"):
        work.run(jacobian=trained)
    assert len(GradientStore.open(work.path)) == 3


def test_not_finite(work: Work) -> None:
    bad = [*work.loader[:2], (work.x[:3] * float("nan"), work.y[:3])]
    with pytest.raises(gramjd.NotFiniteError, match="Gradients of batch 2 are NaN or infinite"):
        work.run(bad)
    assert len(work.run()) == 11
    huge = [(work.x[:3], work.y[:3])]
    jac = gramjd.jacobian(lambda *args: 1e60 * work.func(*args))
    with pytest.raises(gramjd.NotFiniteError, match="batch 0"):  # finite in float64 alone
        work.run(huge, jacobian=lambda b: jac(work.params, *b), path=work.path.with_name("huge"))


def test_damaged(work: Work) -> None:
    work.run()
    with (work.path / "norms.npy").open("r+b") as file:
        file.truncate(300)
    with pytest.raises(ValueError, match=r"norms.npy is damaged: it has less than the 11 rows"):
        work.run()
    (work.path / "journal").write_text("dear diary")
    with pytest.raises(ValueError, match="is no journal of a store of gradients, or is damaged"):
        work.run()
    with pytest.raises(ValueError, match="is no journal of a store of gradients"):
        GradientStore.open(work.path)


def test_refused(work: Work) -> None:
    loader: list[Batch] = []
    with pytest.raises(FileNotFoundError, match=r"There is no folder .* to make store in"):
        work.run(path=work.path / "missing" / "store")
    with pytest.raises(FileNotFoundError, match="There is no store of gradients at"):
        GradientStore.open(work.path)
    with pytest.raises(ValueError, match="gave no batch"):
        work.run(loader)
    with pytest.raises(TypeError, match="iterator, which can be read only once"):
        work.run(iter(work.loader))
    with pytest.raises(ValueError, match="shuffles its samples"):
        work.run(DataLoader(TensorDataset(work.x, work.y), shuffle=True))
    with pytest.raises(ValueError, match=r"stored in torch.float16, .*, not torch.complex64"):
        work.run(dtype=torch.complex64)
    for shard in ((2, 2), (-1, 2), (0,), (0.0, 2)):
        with pytest.raises(ValueError, match=r"shard must be \(rank, ranks\)"):
            work.run(shard=shard)
    with pytest.raises(ValueError, match="kind must be one of"):
        work.run(kind="sparse")
    with pytest.raises(TypeError, match=r"must return a gramjd.Jacobian, not a Tensor"):
        work.run(jacobian=lambda batch: batch[0])
    engine = Engine(work.model, batch_dim=None)
    with pytest.raises(ValueError, match="must be of one tensor with a batch dimension"):
        work.run(jacobian=lambda batch: engine.jacobian(work.model(batch[0]).sum()))
    with pytest.raises(TypeError, match=r"ids of batch 0 must be integers, not torch.float64"):
        work.run(ids=lambda batch: batch[0])
    with pytest.raises(ValueError, match="ids of batch 0 must be 3, got a shape of"):
        work.run(ids=lambda batch: [1])
    assert not work.path.exists()
    work.path.mkdir()
    (work.path / "precious").write_text("precious")
    with pytest.raises(FileExistsError, match="exists, and is no store of gradients"):
        work.run()
    assert [file.name for file in work.path.iterdir()] == ["precious"]
