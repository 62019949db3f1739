"""Makes the device ``second`` known to torch; see ``device.cpp``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import torch

from gramjd.internals import dispatch

NAME = "second"


def build(folder: Path) -> Path:
    """Compile the device into a library in this folder."""
    root = Path(torch.__file__).parent
    library = folder / "second.lib"  # no name that Python takes for a module
    command = [
        "g++", "-O1", "-std=c++20", "-shared", "-fPIC", str(Path(__file__).with_name("device.cpp")),
        "-o", str(library), f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}",
        f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return library


def start(library: Path) -> None:
    """Load it into this process, for good: ``torch.device("second")``."""
    torch.utils.rename_privateuse1_backend(NAME)
    module = types.ModuleType(NAME)
    vars(module).update(
        is_available=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        _is_in_bad_fork=lambda: False,
        get_rng_state=lambda device=None: torch.zeros(1, dtype=torch.uint8),
        set_rng_state=lambda state, device=None: None,
        manual_seed_all=lambda seed: None,
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
    )
    torch._register_device_module(NAME, module)
    torch.ops.load_library(str(library))
    torch.ops.second.start()
    dispatch.WITH_MEMORY = frozenset({*dispatch.WITH_MEMORY, NAME})


def reads() -> int:
    """Copies to the CPU so far, of values and of tensors."""
    return int(torch.ops.second.reads())


def end() -> None:
    """End the process at once: autograd's thread of a device may outlive the interpreter, and abort it."""
    sys.stdout.flush()
    os._exit(0)


def missing() -> str:
    """What is missing to build the device here, if anything is."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        return "torch's interface of devices was another one"
    return "" if shutil.which("g++") and sys.platform == "linux" else "it is built by g++ on Linux"
