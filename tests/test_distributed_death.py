"""A rank that dies: the others get the process group's own error, and do not wait for ever."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import gramjd


def _work(rank: int, folder: str) -> None:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", store, timedelta(seconds=20), rank=rank, world_size=2)
    model = torch.nn.Linear(3, 2)
    engine = gramjd.Engine(model, batch_dim=0)
    engine.compute_gramian(model(torch.ones(2, 3)).sum(1), group=dist.group.WORLD)
    if rank == 1:
        os._exit(1)
    try:
        engine.compute_gramian(model(torch.ones(2, 3)).sum(1), group=dist.group.WORLD)
    except Exception as error:
        Path(folder, "error").write_text(f"{type(error).__module__}.{type(error).__name__}: {error}")
        os._exit(0)  # what gloo does at the end of a process whose peer is gone is not asked here


def test_a_rank_that_dies(tmp_path: Path) -> None:
    context = mp.spawn(_work, (str(tmp_path),), nprocs=2, join=False)  # torch 2.1: its queues live as long
    for process in context.processes:
        process.join(60)
    assert [process.exitcode for process in context.processes] == [0, 1]
    told = (tmp_path / "error").read_text()
    assert "gramjd" not in told.split(":")[0]  # an error of torch's
    assert "onnection" in told or "imed out" in told
