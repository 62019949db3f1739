"""``python -m gramjd`` on files as users write them."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from math import ceil, nan
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gramjd
from gramjd.__main__ import main
from gramjd.cli import memory, terminal
from gramjd.cli.check import check
from gramjd.cli.cost import peak_bytes
from gramjd.cli.load import load

FILE = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import beside  # a neighbour, as for any script


def losses(model, batch):
    x, y = batch
    return cross_entropy(model(x), y, reduction="none")


def factory(*extra):
    model = nn.Sequential(nn.Linear(5, 8), *extra, nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, beside.CLASSES))
    return model, (torch.randn(12, 5), torch.randint(0, 3, (12,))), losses


def normalised():
    return factory(nn.BatchNorm1d(8))


def of_tasks():
    model, batch, losses = factory()
    return model, batch, lambda model, batch: losses(model, batch).reshape(6, 2).T


def of_lists():
    model, batch, losses = factory()
    return model, batch, lambda model, batch: [losses(model, batch), 2 * losses(model, batch)]


def half():
    model, (x, y), losses = factory()
    return model.bfloat16(), (x.bfloat16(), y), losses


def only_float32():
    model, (x, y), losses = factory()
    return model, (x, y), lambda model, batch: losses(model, (x, y))


def forward_raises():
    model, batch, _ = factory()
    return model, batch, lambda model, batch: model.absent(batch)


def row_by_row():
    model, (x, y), _ = factory()
    return model, x, lambda model, x: (x @ model[0].weight.T).square().sum(1)


def detached():
    model, batch, losses = factory()
    return model, batch, lambda model, batch: losses(model, batch).detach()


def raises():
    raise LookupError("no data")


def returns_two():
    return factory()[:2]


def returns_no_model():
    return factory, 1, losses


def returns_no_function():
    return nn.Linear(1, 1), 1, torch.ones(3)


class Phases(nn.Module):
    # turns features by phases that are kept as complex numbers

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("phases", torch.polar(torch.ones(4), torch.arange(4.0)))

    def forward(self, x):
        return torch.fft.ifft(torch.fft.fft(self.layer(x)) * self.phases).real


def of_phases():
    batch = torch.randn(6, 4), torch.randn(6, 4)
    return Phases(), batch, lambda model, batch: (model(batch[0]) - batch[1]).square().sum(1)


def of_complex_data():
    x = torch.randn(6, 4, dtype=torch.complex64)
    return nn.Linear(4, 2), x, lambda model, x: model(torch.view_as_real(x * 1j).sum(-1)).square().sum(1)


def several():
    model, _, losses = factory()
    for n in (12, 7, 9):
        yield model, (torch.randn(n, 5), torch.randint(0, 3, (n,))), losses


def loader():
    model, _, losses = factory()
    data = torch.utils.data.TensorDataset(torch.randn(30, 5), torch.randint(0, 3, (30,)))
    return model, torch.utils.data.DataLoader(data, batch_size=10), losses


def nothing():
    return
    yield


def no_batches():
    model, _, losses = factory()
    return model, iter(()), losses


def two_models():
    yield factory()
    yield factory()


def normalised_in_eval():
    model, batch, losses = normalised()
    return model.eval(), batch, losses


def only_in_training():
    model, batch, losses = factory()

    def of(model, batch):
        assert model.training
        return losses(model, batch)

    return model, batch, of


def other_in_float64():
    model, (x, y), _ = factory()
    return model.eval(), x, lambda model, x: model(x).sum(1) * (1 if x.dtype == torch.float32 else 3)


def sparse_table():
    return nn.Embedding(9, 3, sparse=True), torch.arange(6), lambda model, i: model(i).square().sum(1)


constant = 3
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "beside.py").write_text("CLASSES = 3\n")
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield str(path)
    for name in ("beside", "gramjd_user_mine"):
        sys.modules.pop(name, None)


def test_info_as_a_process() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "gramjd", "info"], capture_output=True, text=True, check=True
    )
    assert gramjd.__version__ in found.stdout and torch.__version__ in found.stdout
    assert "memory_budget" in found.stdout and not found.stderr


def test_explain(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{file}:factory"]) == 0
    out = capsys.readouterr().out
    assert "Outer(K=1, B=12, T=1, o=8, i=5)" in out and out.splitlines()[-3].startswith("total")
    assert out.splitlines()[-2].startswith("Strategies: ops for ")
    assert out.splitlines()[-1].startswith("Proven")


@pytest.mark.parametrize("command", ["explain", "check"])
def test_a_refusal_is_not_an_error(command: str, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, f"{file}:normalised"]) == 3
    out = capsys.readouterr().out
    assert out.startswith("refused: NotSeparableError") and "batch_dim=None is --batch-dim none.\n" in out


@pytest.mark.parametrize(
    ("factory", "options"),
    [
        ("factory", []),
        ("factory", ["--rows", "5"]),
        ("factory", ["--batch-dim", "none", "--repeats", "1"]),
        ("of_tasks", ["--batch-dim", "1"]),
        ("of_lists", ["--repeats", "1"]),
        ("of_lists", ["--batch-dim", "none", "--repeats", "1"]),
        ("normalised", ["--batch-dim", "none"]),
        ("half", []),
        ("only_float32", ["--own-precision"]),
        ("half", ["--own-precision"]),
        ("of_phases", []),
        ("of_complex_data", []),
        ("several", []),
        ("several", ["--batches", "2", "--mode", "eval"]),
        ("loader", []),
        ("normalised_in_eval", []),
        ("only_in_training", []),
        ("sparse_table", []),
    ],
)
def test_check(factory: str, options: list[str], file: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Exact on a copy in float64, and measured beside an SGD step."""
    assert main(["check", f"{file}:{factory}", *options]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("exact: in ") and all(line.startswith("gramjd: ") for line in err.splitlines())
    assert ("compared on 5 of them" in out) == ("--rows" in options)
    (sgd,) = (line.split() for line in out.splitlines() if line.startswith("SGD"))
    assert float(sgd[1]) > 0 and float(sgd[2]) == 1 and float(sgd[3]) >= 0
    assert out.count("backward(w)") == 2


def test_check_estimates_its_memory_first(
    file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient has 8 · 5 + 8 + 3 · 8 + 3 = 75 entries; a forward pass holds 1000 bytes in float32."""

    def measured(step: Callable[[], object], device: torch.device) -> int:
        step()
        return 1000

    run = gramjd.Engine.compute_gramian
    calls: list[Tensor] = []
    monkeypatch.setattr(
        gramjd.Engine, "compute_gramian", lambda engine, output: calls.append(output) or run(engine, output)
    )
    monkeypatch.setattr(sys.modules["gramjd.cli.check"], "peak_bytes", measured)
    copied, gradient, forward = 8 * 75, 8 * 75, 2 * 1000
    five = ceil(memory.MARGIN * (copied + (5 + 2) * gradient + forward))
    own = ceil(memory.MARGIN * ((12 + 2) * gradient // 2 + forward // 2))
    for free, remedies in (
        (five, ["pass --rows 5, or pass --own-precision, which"]),
        (own, [": pass --own-precision, which"]),
        (own - 2, [": pass --own-precision --rows 11, which"]),
        (1000, [": take a smaller batch"]),
    ):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        assert main(["check", f"{file}:factory"]) == 2
        out, err = capsys.readouterr()
        assert not out and not calls and "the gradients of 12 losses take" in err
        assert all(remedy in err for remedy in remedies)
    for free, options in ((five, ["--rows", "5"]), (own, ["--own-precision"])):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        assert main(["check", f"{file}:factory", "--repeats", "1", *options]) == 0
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    assert main(["check", f"{file}:factory", "--repeats", "1"]) == 0


TEXTS = """
import torch
from torch import nn


def factory():
    model = nn.Sequential(nn.Embedding({words}, 64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, {words}))
    batch = torch.randint(0, {words}, (8, {length}))

    def losses(model, ids):
        return nn.functional.cross_entropy(model(ids).mT, ids, reduction="none").mean(1)

    return model, batch, losses
"""


@pytest.mark.parametrize(("words", "length", "rows"), [(1000, 4, 8), (1000, 64, 2), (100, 256, 8)])
def test_no_comparison_takes_more_than_is_estimated(
    words: int, length: int, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many parameters, or many activations."""
    path = tmp_path / "texts.py"
    path.write_text(TEXTS.format(words=words, length=length))
    needs: list[memory.Need] = []
    comparison = sys.modules["gramjd.cli.check"]
    monkeypatch.setattr(comparison, "refuse", lambda rows, need, own, device: needs.append(need))
    monkeypatch.setattr(comparison, "cost", lambda *args: [])
    problem = load(f"{path}:factory")
    assert check(problem, 0, rows=rows, repeats=1).code == 0
    peak = peak_bytes(
        lambda: comparison._compare(
            problem.copied(double=True), 0, rows, "both", comparison.Report(), terminal.Progress()
        ),
        torch.device("cpu"),
    )
    assert peak <= needs[0].of(rows) <= 1.5 * peak


def test_free_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than the host has, and no more than a control group leaves."""
    here = memory.free_bytes(torch.device("cpu"))
    assert here is None or here > 0
    monkeypatch.setattr(memory, "_of_the_host", lambda: 10**9)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.free_bytes(torch.device("cpu")) == 10**9
    for name, text in (("max", "max"), ("current", "700"), ("stat", "anon 600\ninactive_file 100\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert memory.free_bytes(torch.device("cpu")) == 10**9
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory.free_bytes(torch.device("cpu")) == 400


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_after_two_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    for stream in (io.StringIO(), Terminal()):
        show = terminal.Progress(stream)
        show("running the losses")
        assert not stream.getvalue()
        now[0] += 2
        show("comparing")
        now[0] += 0.1
        show("comparing", 1, 64)  # too soon
        now[0] += 20
        show("comparing", 9, 64)
        show.close()
        now[0] = 100.0
        found = stream.getvalue()
        if stream.isatty():
            assert found == "\r\x1b[Kgramjd: comparing\r\x1b[Kgramjd: comparing, 9 of 64\r\x1b[K"
        else:
            assert found == "gramjd: comparing (2 s)\ngramjd: comparing, 9 of 64 (22 s)\n"


def test_check_shows_its_stages(
    file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "PATIENCE", 0)
    assert main(["check", f"{file}:factory", "--repeats", "1"]) == 0
    err = capsys.readouterr().err
    stages = ("running the losses", "running the losses in float64",
              "Gramian in float64 and train(), step 1",
              "gradients of autograd in float64 and train(), step 1",
              "Gramian in float32 and eval(), step 2", "measuring a step")  # fmt: skip
    places = [err.index(f"gramjd: {stage}") for stage in stages]
    assert places == sorted(places)


def test_colors_of_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal alone, and not with NO_COLOR."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    line = "exact: in float64, the Gramian is autograd's."
    assert terminal.in_color(line, io.StringIO()) == line
    assert terminal.in_color(line, Terminal()) == line.replace("exact", "\x1b[1;32mexact\x1b[0m")
    assert terminal.in_color("note: slow", Terminal()) == "note: slow"
    monkeypatch.setenv("NO_COLOR", "1")
    assert terminal.in_color(line, Terminal()) == line


def test_device(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", f"{file}:factory", "--device", "cpu", "--repeats", "1"]) == 0
    moved = load(f"{file}:factory").moved_to(torch.device("meta"))
    assert moved.batches[0][0].is_meta and all(p.is_meta for p in moved.model.parameters())
    capsys.readouterr()
    if not torch.cuda.is_available():
        assert main(["check", f"{file}:factory", "--device", "cuda"]) == 2
        assert "Moving the model to 'cuda' raised" in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"gramjd {gramjd.__version__}\n"


def test_check_says_what_is_slow(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", f"{file}:row_by_row"]) == 0
    assert (
        "note: The Jacobian of parameter '0.weight' is computed one row at a time" in capsys.readouterr().out
    )


def test_check_finds_a_wrong_gramian(
    file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = gramjd.Engine.compute_gramian

    def wrong(engine: gramjd.Engine, output: Tensor) -> Tensor:
        return right(engine, output) * (1 + 1e-6)

    monkeypatch.setattr(gramjd.Engine, "compute_gramian", wrong)
    assert main(["check", f"{file}:factory"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("WRONG") and "by 1.0e-06" in out and "SGD" not in out
    assert main(["check", f"{file}:factory", "--tolerance", "1e-5"]) == 0
    monkeypatch.setattr(gramjd.Engine, "compute_gramian", lambda engine, output: right(engine, output) * nan)
    assert main(["check", f"{file}:factory"]) == 1


@pytest.mark.parametrize("changed", ["mode", "samples", "batch"])
def test_check_finds_what_holds_for_the_first_step_alone(
    changed: str, file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that trusts what it should not: in the other mode, of moved samples, of another batch."""
    right, first = gramjd.Engine.compute_gramian, dict[object, Tensor]()

    def wrong(engine: gramjd.Engine, output: Tensor) -> Tensor:
        found = right(engine, output)
        if changed == "mode":
            return found if engine._modules[0].training else 2 * found
        return first.setdefault((engine, len(output) if changed == "batch" else 0), found)

    monkeypatch.setattr(gramjd.Engine, "compute_gramian", wrong)
    factory = "loader" if changed == "batch" else "factory"
    options = [] if changed == "mode" else ["--mode", "eval"]
    assert main(["check", f"{file}:{factory}", *options]) == 1
    assert "WRONG" in capsys.readouterr().out
    if changed == "mode":
        assert main(["check", f"{file}:{factory}", "--mode", "train"]) == 0


def test_what_check_says_of_steps(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    def lines(*args: str) -> str:
        assert main(["check", *args]) == 0
        return capsys.readouterr().out

    out = lines(f"{file}:several", "--batches", "2")
    assert "in train(): 4 steps" in out and "in eval(): 4 steps" in out and "on 2 batches" in out
    out = lines(f"{file}:normalised_in_eval")
    assert "in eval(): 2 steps" in out and "note: in train(), refused: NotSeparableError" in out
    assert "note: not judged in eval(), where losses(model, batch) raised" in lines(
        f"{file}:only_in_training"
    )
    assert "computes other losses" in lines(f"{file}:other_in_float64")
    assert "other losses" not in lines(f"{file}:factory")


def test_complex_numbers_stay_complex(file: str) -> None:
    problem = load(f"{file}:of_phases")
    double = problem.copied(double=True)
    assert double.model.phases.dtype == torch.complex128 and double.model.layer.weight.dtype == torch.float64
    assert torch.equal(double.model.phases.to(torch.complex64), problem.model.phases)
    assert problem.model.phases.dtype == torch.complex64
    double = load(f"{file}:of_complex_data").copied(double=True)
    assert double.batches[0].dtype == torch.complex128


def test_check_leaves_the_model_alone(file: str) -> None:
    problem = load(f"{file}:normalised")
    before = {name: tensor.clone() for name, tensor in problem.model.state_dict().items()}
    modes = [module.training for module in problem.model.modules()]
    assert check(problem, None).code == 0
    assert modes == [module.training for module in problem.model.modules()]
    assert all(torch.equal(before[name], tensor) for name, tensor in problem.model.state_dict().items())
    for module in problem.model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(p.grad is None for p in problem.model.parameters())


def test_the_peak_of_memory() -> None:
    """What is held at once, not what is allocated in all."""

    def step() -> None:
        for _ in range(3):
            torch.zeros(2**20)

    assert peak_bytes(step, torch.device("cpu")) == 4 * 2**20


MISTAKES = {
    "{file}": "Expected FILE:FACTORY",
    "{file}:": "Expected FILE:FACTORY",
    "{file}x.py:factory": "There is no file",
    "nowhere.of.mine:factory": "No module named 'nowhere'",
    "{file}:absent": "'absent' does not exist in .*; defined there: losses, factory",
    "{file}:constant": "'constant' is not a function",
    "{file}:raises": "raised LookupError: no data",
    "{file}:returns_two": r"must return \(model, batch, losses\), got 2 values",
    "{file}:returns_no_model": "is no module but of type function",
    "{file}:returns_no_function": "they must be a function",
    "{file}:nothing": "yielded nothing",
    "{file}:no_batches": "iterator of batches .* is empty",
    "{file}:two_models": "yielded several models",
    "{file}:detached": "a tensor without a graph",
    "{file}:forward_raises": "raised AttributeError",
    "{file}:only_float32": "In float64: .* Try --own-precision",
}


@pytest.mark.parametrize("spec", list(MISTAKES))
def test_mistakes(spec: str, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", spec.format(file=file)]) == 2
    out, err = capsys.readouterr()
    assert not out and re.search("gramjd: error: .*" + MISTAKES[spec], err.splitlines()[-1])


@pytest.mark.parametrize(
    "options",
    [
        ["--rows", "0"],
        ["--batch-dim", "first"],
        ["--repeats", "x"],
        ["--tolerance", "small"],
        ["--device", "x"],
    ],
)
def test_wrong_options(options: list[str], file: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["check", f"{file}:factory", *options])
    assert options[0] in capsys.readouterr().err


def test_a_file_that_cannot_be_imported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.py").write_text("import nothing_of_the_kind\n")
    assert main(["explain", f"{tmp_path / 'broken.py'}:f"]) == 2
    assert "raised ModuleNotFoundError" in capsys.readouterr().err


def test_a_reader_that_stops_early(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FILE, encoding="utf-8")
    (tmp_path / "beside.py").write_text("CLASSES = 3\n", encoding="utf-8")
    call = [sys.executable, "-m", "gramjd", "explain", "mine.py:factory"]
    with subprocess.Popen(call, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert b"BrokenPipe" not in process.stderr.read()
        assert process.wait() == 0


def test_without_numpy() -> None:
    """numpy is optional: torch's warning that it is missing is no news to whom imports gramjd first."""
    code = "import sys; sys.modules['numpy'] = None; import gramjd, torch; print(gramjd.Engine)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Engine" in done.stdout and "NumPy" not in done.stderr
