"""What the processes of ``test_distributed_ntk.py`` do: kernels over datasets whose tiles are dealt out."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from kernels import MODELS, inputs
from torch import Tensor

import gramjd
from gramjd import ntk_dataset
from gramjd.datasets import journal
from gramjd.ntk.kernel import Axes

# A model, sizes of the first loader's batches, those of the second's, and options
KERNELS: dict[str, tuple[str, list[int], list[int] | None, dict[str, Any]]] = {
    "symmetric": ("fcn", [3, 2, 4, 1, 2], None, {}),
    "symmetric, trace": ("cnn", [2, 3, 1, 2], None, {"trace_axes": (1, 2), "diagonal_axes": (-1,)}),
    "two loaders": ("fcn", [3, 4], [2, 1, 3], {"trace_axes": (-1,)}),
    "fewer tiles than ranks": ("fcn", [4], None, {}),
}


def kernel_of(name: str, **options: Any) -> Tensor:
    """The same call on every rank, and in a process alone."""
    torch.manual_seed(3)
    model, one, two, given = KERNELS[name]
    func, params = gramjd.functional_loss(MODELS[model]())
    loaders = [list(inputs(model, sum(sizes)).split(sizes)) for sizes in (one, two) if sizes]
    return ntk_dataset(func, params, *loaders, progress=False, **given, **options)


def case_kernels(rank: int, size: int) -> Any:
    group = dist.group.WORLD
    return {
        (name, sharded): kernel_of(name, group=group, sharded=sharded)
        for name in KERNELS
        for sharded in (False, True)
    }


def case_computed(rank: int, size: int) -> int:
    """How many tiles this rank computes."""
    kernel = Axes.kernel
    with mock.patch.object(Axes, "kernel", autospec=True, side_effect=kernel) as counted:
        kernel_of("symmetric", group=dist.group.WORLD)
    return counted.call_count


def case_bfloat16(rank: int, size: int) -> Any:
    """Of parameters in bfloat16, tiles are of float32."""
    func, params = gramjd.functional_loss(MODELS["fcn"]().bfloat16())
    batches = _batches(torch.bfloat16)
    together = ntk_dataset(func, params, batches, progress=False, group=dist.group.WORLD)
    return together, ntk_dataset(func, params, batches, progress=False)


def _batches(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return list(inputs("fcn", 6).to(dtype).split(2))


class Countdown:
    """Batches, until some number of them has been read."""

    def __init__(self, batches: list[Tensor], left: int) -> None:
        self.batches, self.left = batches, left

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.batches:
            if self.left == 0:
                raise OSError("the disk is gone")
            self.left -= 1
            yield batch


def case_refused(rank: int, size: int) -> Any:
    """What every rank raises where the last one has something else than the others, by what that is."""
    odd, found = rank == size - 1, {}
    torch.manual_seed(5)
    func, params = gramjd.functional_loss(MODELS["fcn"]())
    batches = _batches()

    def attempt(
        name: str, func: Any = func, params: Any = params, loader: Any = batches, **options: Any
    ) -> None:
        try:
            ntk_dataset(func, params, loader, progress=False, **{"group": dist.group.WORLD, **options})
        except Exception as error:
            found[name] = type(error).__name__, str(error)

    attempt("parameters", params={n: p * (1 + 1e-9 * odd) for n, p in params.items()})
    attempt("batches", loader=batches[rank::size])
    attempt("options", trace_axes=[1] if odd else [])
    attempt("sharded", sharded=odd)
    attempt("symmetry", loader2=list(batches) if odd else None)
    attempt("function", func=(lambda p, x: func(p, x).sin()) if odd else func)
    attempt("loader", loader=iter(batches) if odd else batches)
    attempt("midway", loader=Countdown(batches, 3 + 1 + 1) if odd else batches)
    attempt("folder", out="/no/such/folder/kernel.npy")
    overflowing = [batch * (1e200 if number == 2 else 1) for number, batch in enumerate(batches)]
    attempt("overflow", func=lambda p, x: func(p, x) * x.abs().max(), loader=overflowing)
    found["after"] = ntk_dataset(func, params, batches, progress=False, group=dist.group.WORLD).shape
    return found


class Slow(list[Tensor]):
    """Batches that leave the time to kill somebody."""

    def __iter__(self) -> Iterator[Tensor]:
        for batch in super().__iter__():
            time.sleep(float(os.environ.get("PAUSE", 0)))
            yield batch


def work(rank: int, size: int, folder: str, store: str, sharded: bool) -> None:
    """A kernel in a file, by a rank that may be killed; what it raises is written down."""
    torch.set_num_threads(1)
    journal.FLUSH_SECONDS = 0
    dist.init_process_group(
        "gloo", f"file://{folder}/{store}", timedelta(seconds=20), rank=rank, world_size=size
    )
    batches = Slow(torch.load(f"{folder}/x.pt").split(4))
    func, params = gramjd.functional_loss(MODELS["fcn"]())
    params = torch.load(f"{folder}/params.pt")
    try:
        found = ntk_dataset(
            func, params, batches, out=f"{folder}/kernel.npy", progress=False, group=dist.group.WORLD,
            sharded=sharded,
        )  # fmt: skip
    except Exception as error:
        Path(folder, f"error{rank}").write_text(f"{type(error).__module__}.{type(error).__name__}: {error}")
        os._exit(3)  # what gloo does at the end of a process whose peer is gone is not asked here
    torch.save(found.clone(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
