"""Every example runs, quickly, and writes what it says it writes."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gramjd
from gramjd.rules import registry

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(monkeypatch: pytest.MonkeyPatch, name: str, *args: str) -> dict[str, Any]:
    """The names that an example defines, after it ran."""
    monkeypatch.setattr(sys, "argv", [name, *args])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def results(table: str) -> dict[str, list[float]]:
    """The numbers of each method, from the printed table."""
    cells = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {name: [float(cell.rstrip("%")) for cell in row] for name, *row in cells[1:]}


def test_train_digits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    run(monkeypatch, "train_digits.py", "--epochs", "3", "--out", str(tmp_path / "new" / "folder"))
    found = results(capsys.readouterr().out)
    assert found.keys() == {"SGD", "UPGrad"}
    for train_loss, _, _, _, _, test_accuracy, _ in found.values():
        assert train_loss < 1  # it starts at log(10) = 2.3
        assert test_accuracy > 80
    for picture in ["curves.png", "conflicts.png"]:
        content = (tmp_path / "new" / "folder" / picture).read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 10_000


def test_custom_rule(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))  # the example's rules go with it
    run(monkeypatch, "custom_rule.py")
    before, after = capsys.readouterr().out.split("With rules:")
    assert "Outer" not in before and "no rule covers it" in before
    assert after.count("Outer") == 2
    assert float(after.split()[-1].rstrip(".")) < 1e-5


def test_multitask_digits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    run(monkeypatch, "multitask_digits.py", "--steps", "250", "--seeds", "1", "--out", str(tmp_path))
    found = results(capsys.readouterr().out.replace("°", ""))
    assert found.keys() == {"SGD", "UPGrad", "MGDA", "CAGrad"}
    for digit, parity, magnitude, *accuracies, _, angle in found.values():
        assert digit < 2 and parity < 0.6 and magnitude < 0.6  # log of 10 and of 2 at first
        assert min(accuracies) > 40 and 0 <= angle < 90
    assert (tmp_path / "multitask.png").stat().st_size > 10_000


def test_mixed_precision(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In float16, the first scale overflows, is lowered, and the losses go down."""
    if not hasattr(torch.amp, "GradScaler"):
        pytest.skip("torch.amp.GradScaler came with torch 2.3")
    run(monkeypatch, "mixed_precision.py")
    run(monkeypatch, "mixed_precision.py", "--dtype", "float16", "--scale", "1e6")
    bfloat16, float16 = capsys.readouterr().out.splitlines()
    for line in (bfloat16, float16):
        first, last = re.findall(r"\d\.\d+", line)
        assert float(last) < 0.2 < float(first)
    assert bfloat16.endswith("scale 1") and 0 < int(float16.split()[-1]) < 1e5


def lines_of(capsys: pytest.CaptureFixture[str]) -> tuple[list[float], list[float]]:
    """The numbers of the first and of the last line."""
    first, *_, last = (line for line in capsys.readouterr().out.splitlines())
    a, b = ([float(n) for n in re.findall(r"\d+(?:\.\d+)?", line)] for line in (first, last))
    return a, b


@pytest.mark.parametrize("name", ["iwrm.py", "iwmtl.py", "grouping.py", "partial.py", "monitoring.py"])
def test_losses_fall(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, name)
    (start, first, *_), (end, last, *_) = lines_of(capsys)
    assert (start, end) == (0, 9) and last < first / 8


@pytest.mark.parametrize("wrt", ["shared", "features"])
def test_mtl(wrt: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "mtl.py", "--wrt", wrt)
    (_, value, _, classes, _), (_, value_at_last, _, classes_at_last, _) = lines_of(capsys)
    assert value_at_last < value / 20 and classes_at_last < classes


def test_recurrent(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "recurrent.py")
    for first, last in lines_of(capsys):
        assert last < first / 10


def test_micro_batches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "micro_batches.py")
    differences = re.findall(r"difference (\S+)", capsys.readouterr().out)
    assert len(differences) == 2 and all(float(difference) < 1e-5 for difference in differences)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")  # torch 2.1's own saving
def test_resume(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "resume.py")
    assert "parameters are equal" in capsys.readouterr().out


def test_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 13):
        pytest.skip("Dynamo traces the transforms as of torch 2.13")
    torch._dynamo.reset()
    pytest.importorskip("matplotlib")
    run(monkeypatch, "compiled.py", "--backend", "aot_eager", "--sizes", "16", "--out", str(tmp_path))
    assert (tmp_path / "compiled.png").exists()
    out = capsys.readouterr().out
    assert float(re.findall(r"apart by (\S+)", out)[0]) < 1e-5
    assert float(re.findall(r"relative difference (\S+)", out)[0]) < 1e-5


@pytest.mark.filterwarnings("ignore", "error::gramjd.SlowPathWarning")  # Lightning has many of its own
def test_train_lightning(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pytorch_lightning")
    run(monkeypatch, "train_lightning.py", "--epochs", "3")
    assert float(re.findall(r"epochs: (\S+)%", capsys.readouterr().out)[0]) > 85


def test_finetune_bert(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a warning: the padded batches never take the per-row backward."""
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    run(monkeypatch, "finetune_bert.py", "--steps", "100")
    before, after = re.findall(r"(\d+\.\d)% (?:before|after)", capsys.readouterr().out)
    assert float(after) > 85 > float(before)


def test_watch_gradients(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Mislabelled samples have the longest gradients, and every diagnostic has its picture."""
    pytest.importorskip("matplotlib")
    run(monkeypatch, "watch_gradients.py", "--steps", "80", "--wrong", "2", "--out", str(tmp_path))
    longest = capsys.readouterr().out.split("gradients: [")[1].split("]")[0].split(", ")
    assert {"0", "1"} <= set(longest)
    assert len(list(tmp_path.glob("*.png"))) == 9


def test_functional_training(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "functional_training.py", "--steps", "150")
    lines = [re.findall(r"\d+\.?\d*", line) for line in capsys.readouterr().out.splitlines()]
    (_, first, _), *_, (step, last, accuracy) = lines
    assert step == "149" and float(last) < 0.4 < float(first)
    assert float(accuracy) > 90


def test_ensemble_ntk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The deviation falls with the root of the width."""
    run(monkeypatch, "ensemble_ntk.py", "--widths", "8", "128", "--members", "50", "--samples", "20")
    narrow, wide = results(capsys.readouterr().out).values()
    assert 2 < narrow[0] / wide[0] < 8  # four, up to chance


def test_kernel_spectrum(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Largest first, and those of the kernel itself."""
    pytest.importorskip("scipy")
    top = run(monkeypatch, "kernel_spectrum.py", "--samples", "60", "--epochs", "5", "--eigenvalues", "4")
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["before training", "after training"]
    for *_, shown in rows:
        values = [float(value) for value in shown.split()]
        assert len(values) == 4 and values == sorted(values, reverse=True) and values[-1] > 0
    model = torch.nn.Linear(5, 3).double()
    function, params = gramjd.functional_loss(model)
    J = gramjd.jacobian(function)(params, torch.randn(7, 5).double())
    want = torch.linalg.eigvalsh(J @ J.T).flip(0)[:4]
    torch.testing.assert_close(top["top_eigenvalues"](J, 4), want)


def test_natural_gradient(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    small = ["--steps", "25", "--width", "10", "--points", "60"]
    run(monkeypatch, "natural_gradient.py", *small, "--out", str(tmp_path))
    found = results(capsys.readouterr().out)
    assert found.keys() == {"natural gradient", "Adam"}
    (_, natural), (_, adam) = found.values()
    assert natural < 0.05 and natural < adam / 5
    assert (tmp_path / "poisson.png").stat().st_size > 10_000


def test_kernel_regression(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    small = ["--samples", "300", "--width", "8", "--epochs", "20", "--batch-size", "128"]
    for _ in range(2):  # the second time, the kernels are there
        run(monkeypatch, "kernel_regression.py", *small, "--out", str(tmp_path / "kernels"))
        found = results(capsys.readouterr().out)
        assert list(found) == ["kernel before training", "kernel after training", "trained network"]
        assert all(accuracy > 80 for (accuracy,) in found.values())
    assert len(list((tmp_path / "kernels").glob("*.npy"))) == 4


def test_ddp_digits(tmp_path: Path) -> None:
    """Two processes, cut off after a checkpoint and started again: the loss curve of one process."""
    pytest.importorskip("matplotlib")
    options = ["--epochs", "1", "--batch-size", "101", "--save-every", "4", "--lr", "0.05"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for command, out in (
        ([], "one"),
        (["--stop-after", "6"], "two"),  # two steps after the checkpoint are lost
        ([], "two"),
    ):
        start = [] if out == "one" else torchrun
        script = [str(EXAMPLES / "ddp_digits.py"), *options, *command, "--out", str(tmp_path / out)]
        ended = subprocess.run([sys.executable, *start, *script], capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stderr
    one, two = (json.loads((tmp_path / out / "losses.json").read_text()) for out in ("one", "two"))
    assert len(one) == 13
    assert one[-1] < one[0]
    assert two == pytest.approx(one, rel=1e-10)


def test_nearest_sentences(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Far more than the three of twelve that chance finds, of gradients and of sketches."""
    run(monkeypatch, "nearest_sentences.py")
    out = capsys.readouterr().out
    hits = {name: int(n) for name, n in re.findall(r"subject, by (exact|sketches).*: (\d+) of 12", out)}
    assert hits["exact"] >= 9 and hits["sketches"] >= 6
    assert "cut the onions and fry them in butter" in out


def test_mislabelled_digits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Far more than the 5% that chance finds, at once; gradients tell more than losses learnt by heart."""
    pytest.importorskip("matplotlib")
    options = ["--epochs", "10", "60", "--seeds", "1", "--dim", "256", "--out", str(tmp_path)]
    run(monkeypatch, "mislabelled_digits.py", *options)
    out = capsys.readouterr().out
    found = results(out)
    assert list(found) == ["10", "60"]
    assert min(found["10"]) > 60
    narrow, wide = re.findall(r"10 epochs, whisker .*: (\d+)% of the outliers .*, (\d+)% of", out)
    assert int(wide[0]) > int(narrow[0]) > 20 and int(narrow[1]) >= int(wide[1]) > 80
    similarity, loss, norm = found["60"]
    assert similarity > max(loss, norm)
    assert (tmp_path / "mislabelled.png").stat().st_size > 10_000


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # from peft
def test_finetune_lora(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Without a warning of ours: adapters take the fast strategy."""
    pytest.importorskip("peft")
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    run(monkeypatch, "finetune_lora.py", "--steps", "150", "--out", str(tmp_path))
    assert (tmp_path / "lora.png").exists()
    share, before, after = re.findall(r"([\d.]+)%", capsys.readouterr().out)
    assert float(share) < 20 and float(before) < 60 and float(after) > 80


def test_pinn(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """NashMTL needs no factor to be better than the mean."""
    pytest.importorskip("matplotlib")
    run(
        monkeypatch,
        "pinn.py",
        "--steps",
        "800",
        "--seeds",
        "1",
        "--methods",
        "mean",
        "NashMTL",
        "--out",
        str(tmp_path),
    )
    found = results(capsys.readouterr().out)
    assert found["NashMTL"][0] < found["mean"][0] / 2
    assert (tmp_path / "pinn.png").stat().st_size > 10_000


def test_reinforcement(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    options = ["--rounds", "15", "--seeds", "1", "--out", str(tmp_path)]
    top = run(monkeypatch, "reinforcement.py", *options)
    found = results(capsys.readouterr().out)
    assert found.keys() == top["METHODS"].keys()
    first, last, conflicts = found["two losses, NashMTL"]
    assert last > first and 0 <= conflicts <= 100
    assert (tmp_path / "pole.png").stat().st_size > 10_000


def test_unequal_units(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The sum of the losses forgets the task with the small loss; scale-invariant weightings do not."""
    run(monkeypatch, "unequal_units.py", "--steps", "250", "--seeds", "1", "--units", "30", "--lr", "0.01")
    found = results(capsys.readouterr().out)
    assert found["sum"][0] < 60
    for method in ("ConFIG", "NashMTL"):
        accuracy, left = found[method]
        assert accuracy > 80 and left < 50


def test_weightings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What theory says of some of them."""
    run(monkeypatch, "weightings.py")
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    worst = {name: float(cosine) for name, cosine, *_ in rows}
    invariant = {name for name, _, scale, *_ in rows if scale == "yes"}
    random = {name for name, _, _, drawn, *_ in rows if drawn == "yes"}
    assert min(worst[name] for name in worst if "reg_eps" in name or name == "mgda") > -1e-3
    assert worst["mean"] < -0.1
    assert invariant == {"nash_mtl", "fairgrad", "imtl_g", "config"}
    assert random == {"pcgrad", "gradvac", "random"}


def test_refusals(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each error is raised, and its remedy works."""
    top = run(monkeypatch, "refusals.py")
    out = capsys.readouterr().out
    for kind, _, remedy, _ in top["CASES"]:
        assert f"{kind.__name__}: " in out and f"Remedy: {remedy}" in out


def test_proofs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "proofs.py")
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows[:1]] == [["8", "12"]] and "in this call" in rows[0][2]
    assert "in an earlier call" in rows[2][2]
