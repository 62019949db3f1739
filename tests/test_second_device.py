"""Models on a device that is not the CPU, and on several: a stand-in for a GPU, see ``second_device``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from second_device import device

HERE = Path(__file__).parent / "second_device"
PLACES = {
    "second": ["second"] * 4,
    "losses elsewhere": ["second", "second", "second", "cpu"],
    "split": ["cpu", "second", "second", "second"],
    "alternating": ["second", "cpu", "second", "cpu"],
}

missing = device.missing()
pytestmark = pytest.mark.skipif(bool(missing), reason=missing)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return device.build(tmp_path_factory.mktemp("second"))


@pytest.mark.parametrize(
    ("model", "places"),
    [
        *[(model, "second") for model in ("mlp", "logits", "cnn", "tied")],
        ("mlp", "losses elsewhere"),
        *[(model, "split") for model in ("cnn", "tied")],
        *[(model, "alternating") for model in ("logits", "mlp")],
    ],
)
def test_steps(library: Path, model: str, places: str) -> None:
    run("steps.py", library, model, *PLACES[places])


def test_models_that_accelerate_dispatches(library: Path) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    run("dispatched.py", library)


def test_what_is_compared_on_a_gpu(library: Path) -> None:
    run("gpu.py", library)


def run(script: str, *arguments: Path | str) -> None:
    """Run a script in a process of its own: the device is there for good."""
    call = [sys.executable, HERE / script, *arguments]
    done = subprocess.run(call, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
