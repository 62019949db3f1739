"""Real processes of a gloo group, which run one function each, and what they return."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(modules: Sequence[str], size: int, folder: Path) -> list[dict[str, Any]]:
    """What every function ``case_NAME(rank, size)`` of some modules returned or raised, of each rank."""
    mp.spawn(_work, (modules, size, str(folder)), nprocs=size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def of(results: list[dict[str, Any]], case: str) -> list[Any]:
    """What each rank returned; their tracebacks, if they raised."""
    found = [mine[case] for mine in results]
    assert not any(isinstance(x, str) for x in found), "\n".join(map(str, found))
    return found


def _work(rank: int, modules: Sequence[str], size: int, folder: str) -> None:
    torch.set_num_threads(1)
    imported = [importlib.import_module(module) for module in modules]
    store = f"file://{folder}/store"  # one rank that fails leaves the others waiting: not for long
    dist.init_process_group("gloo", store, timedelta(seconds=60), rank=rank, world_size=size)
    cases = {name: case for module in imported for name, case in vars(module).items()}
    found: dict[str, Any] = {}
    for name in sorted(name for name in cases if name.startswith("case_")):
        torch.manual_seed(0)
        try:
            found[name.removeprefix("case_")] = cases[name](rank, size)
        except Exception:
            found[name.removeprefix("case_")] = traceback.format_exc()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
