"""Versions, devices and defaults, for a bug report."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

import gramjd
from gramjd.contraction.options import Options, limits
from gramjd.engine.solving.strategies import STRATEGIES

OPTIONAL = ("numpy", "matplotlib", "scipy", "scikit-learn", "tqdm", "transformers", "torchjd")


def info() -> str:
    """A table of names and values."""
    rows = {
        "gramjd": gramjd.__version__,
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "torch": str(torch.__version__),
        "optree": _version("optree"),
        **{name: _version(name) for name in OPTIONAL},
        **{f"device {name}": text for name, text in _devices().items()},
        "check": "first",
        "strategies": ", ".join(STRATEGIES),
        "accumulate_dtype": "float32 for half and bfloat16, else as the parameters",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def _devices() -> dict[str, str]:
    """Each device and the memory that a contraction on it may use by default."""
    names = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        names[f"cuda:{index}"] = f"{found.name}, {found.total_memory / 2**30:.0f} GiB"
    return {name: f"{text}; memory_budget {_budget(name) / 2**20:.0f} MiB" for name, text in names.items()}


def _budget(device: str) -> int:
    like = torch.empty(0, device=device)
    return limits(Options(), like, like.dtype).elements * like.element_size()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
