"""Every example runs, quickly, and writes what it says it writes."""

import runpy
import sys
from pathlib import Path

import pytest

from gramjd.rules import registry

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(monkeypatch: pytest.MonkeyPatch, name: str, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *args])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


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


def test_watch_gradients(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Mislabelled samples have the longest gradients, and every diagnostic has its picture."""
    pytest.importorskip("matplotlib")
    run(monkeypatch, "watch_gradients.py", "--steps", "80", "--wrong", "2", "--out", str(tmp_path))
    longest = capsys.readouterr().out.split("gradients: [")[1].split("]")[0].split(", ")
    assert {"0", "1"} <= set(longest)
    assert len(list(tmp_path.glob("*.png"))) == 8
