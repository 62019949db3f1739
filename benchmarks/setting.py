"""What a number depends on besides the code: threads, their spinning, versions, device."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform

import torch

LIBRARIES = ("torch", "gramjd", "torchjd", "transformers", "optree")
# Threads that spin while another program runs slow a small step a hundredfold, so that they sleep at once.
THREADS = {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "GOMP_SPINCOUNT": "0"}


def environment() -> dict[str, str]:
    """Of every child process: the fixed settings, where the caller has not chosen others."""
    return {**THREADS, **os.environ}


def setting(device: str) -> dict[str, object]:
    """Of this process."""
    versions = {name: version for name in LIBRARIES if (version := _version(name))}
    on_cuda = torch.device(device).type == "cuda"
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if on_cuda else _processor(),
        "threads": torch.get_num_threads(),
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "default"),
        "dtype": "float32",
        "python": platform.python_version(),
        "versions": versions,
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _processor() -> str:
    """The name of the CPU, where the system tells it."""
    try:
        with open("/proc/cpuinfo") as lines:
            named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return f"CPU, {named[0] if named else platform.machine()}"
    except OSError:
        return f"CPU, {platform.processor() or platform.machine()}"
