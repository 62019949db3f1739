"""A process group ends when it is destroyed: threads of gloo, left running, may abort the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

THREADS = Path("/proc/self/task")
SCRIPT = """
from pathlib import Path

import gramjd
import torch
import torch.distributed as dist


def step():
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 2))
    losses = model(torch.ones(4, 3)).sum(1)
    gramian = gramjd.Engine(model, batch_dim=0).compute_gramian(losses, group=dist.group.WORLD)
    losses.backward(gramjd.distributed.local_weights(gramian.sum(0), losses, dist.group.WORLD))


def threads():
    return len(list(Path("/proc/self/task").iterdir()))


dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
step()
before = threads()
dist.destroy_process_group()
print(before, threads())
"""


@pytest.mark.skipif(not THREADS.exists(), reason="lists the threads of a process as Linux does")
def test_no_thread_of_gloo_outlives_its_group() -> None:
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    before, after = map(int, ended.stdout.split())
    assert after < before
