"""What ranks send for the Gramian of a whole batch, and how long a step takes, on gloo and one machine.

    python -m benchmarks.distributed

The batch of a case is shared out over 1, 2 and 4 processes of one thread each. Bytes are counted where
tensors are handed to ``torch.distributed``, in a step of a known signature; beside them is what the planner
predicted, and what a ring all-reduce of the gradients sends. Times are medians of steps that take turns: an
ordinary step under ``DistributedDataParallel``, and one with the Gramian of all ranks' samples.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from benchmarks.cases import CASES, TITLES
from benchmarks.problem import Problem
from benchmarks.runner import RESULTS, Record
from benchmarks.setting import setting
from gramjd import Engine
from gramjd.distributed import local_weights
from gramjd.distributed.traffic import Plan

MEASURED = ("A", "B", "C", "E")
RANKS = (1, 2, 4)
TIMED = 2  # processes at most that have a core each
MB = 1e6


@dataclass
class Sent:
    """Bytes that this rank hands over to others."""

    tensors: int = 0
    agreement: int = 0  # digests and pickled objects, by which ranks find out that they mean the same


@contextmanager
def counted(size: int) -> Iterator[Sent]:
    """Watch ``torch.distributed``; an all-gather sends a tensor to every other rank."""
    sent = Sent()
    each, objects, exchange, pairs = (
        dist.all_gather, dist.all_gather_object, dist.all_to_all_single, dist.batch_isend_irecv
    )  # fmt: skip

    def all_gather(found: Any, mine: torch.Tensor, **options: Any) -> Any:
        if mine.dtype == torch.uint8:
            sent.agreement += mine.nbytes * (size - 1)
        else:
            sent.tensors += mine.nbytes * (size - 1)
        return each(found, mine, **options)

    def all_gather_object(found: Any, mine: Any, **options: Any) -> Any:
        sent.agreement += len(pickle.dumps(mine)) * (size - 1)
        return objects(found, mine, **options)

    def all_to_all_single(buffer: Any, flat: torch.Tensor, given: Any, lengths: Any, **options: Any) -> Any:
        kept = lengths[dist.get_rank()] * flat.itemsize
        sent.tensors += flat.nbytes - kept
        return exchange(buffer, flat, given, lengths, **options)

    def batch_isend_irecv(ops: Any) -> Any:
        sent.tensors += sum(op.tensor.nbytes for op in ops if op.op is dist.isend)
        return pairs(ops)

    watching = (all_gather, all_gather_object, all_to_all_single, batch_isend_irecv)
    patches: dict[str, Any] = {function.__name__: function for function in watching}
    with mock.patch.multiple(dist, **patches):
        yield sent


@contextmanager
def planned() -> Iterator[list[Plan]]:
    """The plans that are asked for."""
    module, found = sys.modules["gramjd.distributed.gramian"], []
    plan_of = module.plan_of

    def remember(*args: Any) -> Plan:
        found.append(plan_of(*args))
        return found[-1]

    with mock.patch.object(module, "plan_of", remember):
        yield found


class Job:
    """A case under ``DistributedDataParallel``, with this rank's share of its samples."""

    def __init__(self, problem: Problem) -> None:
        rank, size = dist.get_rank(), dist.get_world_size()
        inputs, targets = (
            tuple(t.tensor_split(size)[rank] for t in each) for each in (problem.inputs, problem.targets)
        )
        model = DistributedDataParallel(problem.model)
        self.problem = replace(problem, model=model, inputs=inputs, targets=targets)
        self.engine = Engine(model, batch_dim=0)

    def plain(self) -> None:
        """An ordinary step."""
        self.problem.clear()
        self.problem.objectives().mean().backward()

    def step(self) -> None:
        """With the Gramian of all samples; the weights are those of the mean, whatever it says."""
        self.problem.clear()
        losses = self.problem.objectives()
        gramian = self.engine.compute_gramian(losses, group=dist.group.WORLD)
        weights = torch.full_like(gramian[0], 1 / len(gramian))
        losses.backward(local_weights(weights, losses, dist.group.WORLD))

    def bytes(self) -> Record:
        """Of a step, over all ranks."""
        self.step()
        with counted(dist.get_world_size()) as sent, planned() as plans:
            self.step()
        found = torch.tensor([sent.tensors, sent.agreement])
        dist.all_reduce(found)
        (plan,) = plans
        entries = sum(p.numel() for p in self.problem.parameters)
        return {
            "planned": plan.traffic.total,
            "sent": int(found[0]),
            "agreement": int(found[1]),
            "all_reduce": 2 * (dist.get_world_size() - 1) * 4 * entries,
            "by_factors": len(plan.round.which),
            "by_slices": len(plan.sliced),
        }

    def times(self, budget: float) -> Record:
        """Median seconds of both kinds of steps, for about ``budget`` seconds; all ranks run as many."""
        found: dict[str, list[float]] = {"plain_seconds": [], "step_seconds": []}
        steps: dict[str, Callable[[], None]] = {"plain_seconds": self.plain, "step_seconds": self.step}
        start, more = time.perf_counter(), torch.ones(1)
        while more:
            for name, run in steps.items():
                dist.barrier()
                begin = time.perf_counter()
                run()
                found[name].append(time.perf_counter() - begin)
            more.fill_(time.perf_counter() - start < budget or len(found["step_seconds"]) < 3)
            dist.broadcast(more, 0)
        return {name: statistics.median(mine) for name, mine in found.items()}


def work(rank: int, size: int, cases: Mapping[str, Mapping[str, int]], budget: float, folder: str) -> None:
    """What one process of a group does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store-{size}", rank=rank, world_size=size)
    records = measured(cases, budget)
    if rank == 0:
        Path(folder, f"{size}.json").write_text(json.dumps({"setting": setting("cpu"), "records": records}))
    dist.destroy_process_group()


def measured(cases: Mapping[str, Mapping[str, int]], budget: float) -> list[Record]:
    """All cases by the ranks of the group."""
    size, records = dist.get_world_size(), []
    for case, sizes in cases.items():
        torch.manual_seed(0)  # the same weights and data on every rank
        job = Job(CASES[case](**sizes))
        record = {"case": case, "ranks": size, **job.bytes()}
        records.append(record | (job.times(budget) if size <= TIMED else {}))
    return records


def measure(cases: Mapping[str, Mapping[str, int]], ranks: Sequence[int], budget: float) -> Record:
    """All cases on each number of ranks."""
    with tempfile.TemporaryDirectory() as folder:
        for size in ranks:
            mp.spawn(work, (size, cases, budget, folder), nprocs=size)  # type: ignore[attr-defined]
        found = [json.loads(Path(folder, f"{size}.json").read_text()) for size in ranks]
    records = list(itertools.chain(*(mine["records"] for mine in found)))
    records.sort(key=lambda record: record["case"])
    return {"setting": found[0]["setting"], "records": records}


def page(found: Record) -> str:
    """The tables."""
    told = ", ".join(f"{name} {value}" for name, value in found["setting"]["versions"].items())
    lines = [
        "# Several processes",
        "",
        "Written by `python -m benchmarks.distributed`: "
        + " ".join(str(__doc__).split("\n\n", 2)[2].replace("``", "`").split()),
        "",
        "Bytes of all ranks together, in MB (10⁶); what ranks send to agree is not in the plan. The last",
        "column says how many parameters go which way.",
        "",
        "| case | ranks | planned | sent | to agree, kB | all-reduce | sent / all-reduce | factors, slices |",
        "|---|---|---|---|---|---|---|---|",
        *(_bytes(record) for record in found["records"] if record["ranks"] > 1),
        "",
        "Seconds of a step; the global batch is the same. Four processes have no core each here.",
        "",
        "| case | processes | ordinary step | with the Gramian | ratio |",
        "|---|---|---|---|---|",
        *(_times(record) for record in found["records"] if "step_seconds" in record),
        "",
        f"{found['setting']['date']}, {found['setting']['device']}, {told}; float32.",
        "",
    ]
    return "\n".join(lines)


def _bytes(record: Record) -> str:
    cells = [f"{record[name] / MB:.3f}" for name in ("planned", "sent", "all_reduce")]
    cells.insert(2, f"{record['agreement'] / 1e3:.2f}")
    ratio = record["sent"] / record["all_reduce"]
    ways = f"{record['by_factors']}, {record['by_slices']}"
    named = f"{record['case']}, {TITLES[record['case']]}"
    return " | ".join([f"| {named}", str(record["ranks"]), *cells, f"{ratio:.2f}", ways]) + " |"


def _times(record: Record) -> str:
    plain, step = record["plain_seconds"], record["step_seconds"]
    return f"| {record['case']} | {record['ranks']} | {plain:.4f} | {step:.4f} | {step / plain:.2f} |"


def main() -> None:
    """Measure, keep and print."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seconds", type=float, default=6.0, help="for the steps of a case")
    budget = parser.parse_args().seconds
    found = measure({case: {} for case in MEASURED}, RANKS, budget)
    (RESULTS / "distributed.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "distributed.md").write_text(page(found))
    print(page(found))


if __name__ == "__main__":
    main()
