"""The built wheel: the whole package, its promises about versions, and nothing else."""

import importlib
import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from gramjd.__main__ import main

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (found,) = folder.glob("*.whl")
    return found


def test_it_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    written = {name for name in names if ".dist-info/" in name}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "gramjd").rglob("*.py")}
    assert names - written == sources | {"gramjd/py.typed"}
    kinds = {name.partition(".dist-info/")[2] for name in written}
    assert kinds == {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}


def test_its_classifiers_are_the_versions_that_it_admits(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode())
    classifiers = metadata.get_all("Classifier", [])
    versions = [c.rpartition(" ")[2] for c in classifiers if "Python :: 3." in c]
    assert versions == ["3.10", "3.11", "3.12", "3.13"]
    assert metadata["Requires-Python"] == ">=3.10"
    assert "Requires-Dist: torch>=2.1\n" in metadata.as_string()


def test_its_script_is_the_command_line(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    module, _, function = archive.read(name).decode().strip().rpartition("gramjd = ")[2].partition(":")
    assert getattr(importlib.import_module(module), function) is main


def test_it_works_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    code = "import gramjd, gramjd.diagnostics, gramjd.weighting; print(gramjd.__file__)"
    for command, start in [(["-c", code], str(tmp_path)), (["-m", "gramjd", "info"], "gramjd ")]:
        found = subprocess.run([sys.executable, *command], cwd=tmp_path, env=environment, check=True,
                               capture_output=True, text=True)  # fmt: skip
        assert found.stdout.startswith(start) and not found.stderr
