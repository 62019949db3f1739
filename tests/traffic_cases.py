"""What the processes of ``test_distributed.py`` do to test who sends what."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from distributed_cases import MODELS, losses_of, make, own, sizes_of
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel

import gramjd
from gramjd.distributed import local_weights, ring, traffic
from gramjd.distributed.ranks import Ranks
from gramjd.weighting import upgrad

GRAMIAN = sys.modules["gramjd.distributed.gramian"]
WAYS = ("planned", "factors", "slices", "messages")


@contextmanager
def forced(way: str) -> Iterator[None]:
    """All parameters by factors, or all by slices of rows."""

    def plan_of(problem: traffic.Problem, which: tuple[int, ...]) -> traffic.Plan:
        known = traffic._rows(problem, which)
        times = traffic._times(problem.manifests, which)
        return traffic._plan(problem, known, times, which if way == "factors" else ())

    with mock.patch.object(GRAMIAN, "plan_of", traffic.plan_of if way == "planned" else plan_of):
        yield


def budget(way: str) -> int | None:
    return 2**12 if way == "messages" else None


def local(name: str, rank: int, size: int) -> tuple[nn.Module, Tensor, Tensor]:
    model, x, y = make(name, sum(sizes_of(size)))
    return model, *own(rank, size, x, y)


def case_ways(rank: int, size: int) -> Any:
    group, found = dist.group.WORLD, {}
    for name in MODELS:
        for way in WAYS:
            model, x, y = local(name, rank, size)
            engine = gramjd.Engine(model, batch_dim=0, memory_budget=budget(way))
            losses = losses_of(model, x, y)
            with forced(way):
                whole, again = (engine.compute_gramian(losses, group=group) for _ in range(2))
                rows = engine.compute_gramian(losses, group=group, rows="local")
            found[(name, way)] = whole, rows, again
    return found


def tasks(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Three losses, sums over samples, with factors that differ between samples."""
    losses = losses_of(model, x, y)
    scale = x.double().flatten(1).mean(1)
    return torch.stack([losses.sum(), (losses * scale).sum(), (losses.square() * scale.cos()).sum()])


def case_sums(rank: int, size: int) -> Any:
    group, found = dist.group.WORLD, {}
    for name in MODELS:
        for way in WAYS:
            model, x, y = local(name, rank, size)
            wrapped = DistributedDataParallel(model)
            engine = gramjd.Engine(wrapped, batch_dim=None, memory_budget=budget(way))
            losses = tasks(wrapped, x, y)
            with forced(way):
                whole = engine.compute_gramian(losses, group=group)
            weights = upgrad(whole)
            losses.backward(local_weights(weights, losses, group, batch_dim=None))
            found[(name, way)] = whole, weights, [p.grad for p in model.parameters()]
    return found


def case_sums_refused(rank: int, size: int) -> Any:
    """Rows of sums over ranks, and outputs with a batch dimension beside others without one."""
    model, x, y = local("mlp", rank, size)
    try:
        engine = gramjd.Engine(model, batch_dim=None)
        engine.compute_gramian(tasks(model, x, y), group=dist.group.WORLD, rows="local")
    except ValueError as error:
        first = str(error)
    params = dict(model.named_parameters())
    try:
        one, two = (gramjd.jacobian(_norms, in_dims=dims)(params, torch.ones(2)) for dims in (0, None))
        both = gramjd.Jacobian(one.parts, one.parameters, one.parameters_spec, _both(one, two))
        both.gramian(group=dist.group.WORLD)
    except ValueError as error:
        return first, str(error)


def _norms(params: dict[str, Tensor], x: Tensor) -> Tensor:
    return sum((p * x.sum()).square().sum() for p in params.values())


def _both(one: gramjd.Jacobian, two: gramjd.Jacobian) -> Any:
    """The outputs of two Jacobians together."""
    outputs = one.outputs
    return type(outputs)([*outputs.each, *two.outputs.each], outputs.spec, outputs.samples)


def case_traffic(rank: int, size: int) -> Any:
    """Bytes that this rank sends, those planned of all ranks, and other ranks' factors held at a time."""
    found = {}
    for name in MODELS:
        for way in WAYS:
            model, x, y = local(name, rank, size)
            engine = gramjd.Engine(model, batch_dim=0, memory_budget=budget(way))
            losses = losses_of(model, x, y)
            with forced(way), planned() as plans, counted() as sent, held() as most:
                engine.compute_gramian(losses, group=dist.group.WORLD)
            found[(name, way)] = sum(sent), plans[0].traffic.total, max(most, default=0)
    return found


@contextmanager
def planned() -> Iterator[list[traffic.Plan]]:
    """The plans that are made."""
    plans: list[traffic.Plan] = []
    plan_of = GRAMIAN.plan_of

    def remember(*args: Any) -> traffic.Plan:
        plans.append(plan_of(*args))
        return plans[-1]

    with mock.patch.object(GRAMIAN, "plan_of", remember):
        yield plans


@contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes of each tensor that this rank hands to another one, but for those of the agreement."""
    sent: list[int] = []
    start, exchange, gather = Ranks.start, Ranks.exchange, Ranks.gather

    def counting_start(self: Ranks, given: Any, received: Any) -> Any:
        sent.extend(t.nbytes for to, t in given if to != self.rank)
        return start(self, given, received)

    def counting_exchange(self: Ranks, given: Any, lengths: Any) -> Any:
        sent.extend(t.nbytes for to, t in enumerate(given) if to != self.rank)
        return exchange(self, given, lengths)

    def counting_gather(self: Ranks, mine: Tensor) -> Any:
        sent.extend([mine.nbytes] * (self.size - 1) if mine.is_floating_point() else [])
        return gather(self, mine)

    with (
        mock.patch.object(Ranks, "start", counting_start),
        mock.patch.object(Ranks, "exchange", counting_exchange),
        mock.patch.object(Ranks, "gather", counting_gather),
    ):
        yield sent


@contextmanager
def held() -> Iterator[list[int]]:
    """How many other ranks' factors are in memory, each time that some arrive."""
    alive: list[StorageWeakRef] = []
    counts: list[int] = []
    unpack = ring.unpack

    def watching(buffer: Tensor, *args: Any) -> Any:
        alive.append(StorageWeakRef(buffer.untyped_storage()))
        counts.append(sum(not ref.expired() for ref in alive))
        return unpack(buffer, *args)

    with mock.patch.object(ring, "unpack", watching):
        yield counts
