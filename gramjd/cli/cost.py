"""Measures the time and the peak memory of a step, with and without a Gramian."""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from gramjd.cli.load import Problem
from gramjd.engine import Engine

Step = Callable[[], object]


def cost(problem: Problem, batch_dim: int | None, repeats: int, device: torch.device) -> list[str]:
    """A table of time and memory: a plain SGD step, and steps that also compute the Gramian."""
    without_hooks = problem.copied()
    engine = Engine(problem.model, batch_dim=batch_dim)

    def with_gramian(losses: Tensor) -> None:
        engine.compute_gramian(losses)
        losses.backward(torch.full_like(losses, 1 / losses.numel()))

    def with_jacobian(losses: Tensor) -> None:
        jacobian = engine.jacobian(losses)
        jacobian.gramian()
        jacobian.backward(torch.full_like(losses, 1 / losses.numel()))

    plain, drop_in, lazy = "SGD", "Gramian, losses.backward(w)", "Gramian, J.backward(w)"
    steps = {
        plain: _step(without_hooks, lambda losses: losses.mean().backward()),
        drop_in: _step(problem, with_gramian),
        lazy: _step(problem, with_jacobian),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the check before has shown them
        first = seconds({name: steps[name] for name in (plain, drop_in)}, 1, device)
        times = seconds(steps, repeats, device)
        peaks = {name: peak_bytes(run, device) for name, run in steps.items()}
    engine.close()
    lines = [f"{'one step':<30}{'ms':>10}{'x SGD':>8}{'peak MiB':>11}"]
    for name in steps:
        ratio = times[name] / times[plain]
        lines.append(f"{name:<30}{1e3 * times[name]:>10.2f}{ratio:>8.2f}{peaks[name] / 2**20:>11.1f}")
    return [*lines, f"The first step with a Gramian, proofs included, took {1e3 * first[drop_in]:.2f} ms."]


def _step(problem: Problem, backward: Callable[[Tensor], None]) -> Step:
    """Forward, backward and update; the parameters stay as they are."""
    optimizer = torch.optim.SGD(problem.model.parameters(), lr=0.0)

    def run() -> None:
        backward(problem.losses())
        optimizer.step()
        optimizer.zero_grad()

    return run


def seconds(steps: Mapping[str, Step], repeats: int, device: torch.device) -> dict[str, float]:
    """Median time of each step; they take turns, so that a busy moment does not fall on one alone."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            _wait(device)
            start = time.perf_counter()
            step()
            _wait(device)
            found[name].append(time.perf_counter() - start)
    return {name: statistics.median(mine) for name, mine in found.items()}


def peak_bytes(step: Step, device: torch.device) -> int:
    """The most memory that a step held at once, beyond what was held before it."""
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    with silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    live = peak = 0
    for event in profiler.profiler.kineto_results.events():  # in order of time
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def silent() -> Iterator[None]:
    """A context without standard error, to which the profiler's C++ part writes."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
