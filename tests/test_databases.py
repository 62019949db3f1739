"""Torch's own test databases of ops and modules, each in a process of its own: importing them sets flags."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("name", ["op_database", "module_database"])
def test_no_gramian_is_wrong(name: str) -> None:
    pytest.importorskip("expecttest")  # which they import
    jobs = str(min(4, os.cpu_count() or 1))
    command = [sys.executable, "-m", "pytest", "-q", "-n", jobs, str(HERE / f"{name}.py")]
    run = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:]
