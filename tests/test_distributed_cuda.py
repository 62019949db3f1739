"""Gramians over NCCL: on several devices where there are some, else on one."""

from __future__ import annotations

import os
from pathlib import Path

import distributed_cases as cases
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from oracle import dense_gramian

import gramjd
from gramjd.distributed import local_weights

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="NCCL needs CUDA, which is not here")


def _work(rank: int, size: int, folder: str) -> None:
    torch.cuda.set_device(rank)
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    dist.init_process_group("nccl", f"file://{folder}/store", rank=rank, world_size=size)
    group, found = dist.group.WORLD, {}
    for name in ("mlp", "cnn"):
        model, x, y = cases.make(name, sum(cases.sizes_of(size)))
        mine = [t.cuda() for t in cases.own(rank, size, x, y)]
        wrapped = torch.nn.parallel.DistributedDataParallel(model.cuda(), [rank])
        losses = cases.losses_of(wrapped, *mine)
        whole = gramjd.Engine(wrapped, batch_dim=0).compute_gramian(losses, group=group)
        weights = whole.sum(0)
        losses.backward(local_weights(weights, losses, group))
        found[name] = whole.cpu(), weights.cpu(), [p.grad.cpu() for p in model.parameters()]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@needs_cuda
def test_nccl(tmp_path: Path) -> None:
    size = min(4, torch.cuda.device_count())
    mp.spawn(_work, (size, str(tmp_path)), nprocs=size)
    for rank in range(size):
        for name, (whole, weights, gradients) in torch.load(tmp_path / f"{rank}.pt").items():
            model, x, y = cases.make(name, sum(cases.sizes_of(size)))
            losses = cases.losses_of(model, x, y)
            want = dense_gramian(losses, model.parameters())
            assert (whole - want).norm() <= 1e-10 * want.norm()
            losses.backward(weights)
            for got, p in zip(gradients, model.parameters(), strict=True):
                assert (got - p.grad).norm() <= 1e-10 * p.grad.norm()
