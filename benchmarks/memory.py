"""How much memory a step takes at its peak.

Counted on a CPU: every block that torch's allocator hands out while the step runs, temporaries inside ops
included, as ``torch.profiler`` reports them; not what MKL, oneDNN and JAX allocate by themselves. On a
CUDA device: the caching allocator's own statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.problem import Outcome, Step
from gramjd.cli.cost import silent


@dataclass(frozen=True)
class Memory:
    """In bytes, beyond what was held before the step: parameters and data."""

    peak: int  # everything
    own: int  # without what the step returns: the gradients of the parameters and the Gramian
    returned: int


def measure(step: Step, device: torch.device) -> Memory:
    """One step's."""
    return _on_cuda(step, device) if device.type == "cuda" else _on_cpu(step)


def _on_cuda(step: Step, device: torch.device) -> Memory:
    """There, what is returned counts as held at the peak."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    outcome = step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    returned = sum(storage.nbytes() for storage in _storages(outcome).values())
    return Memory(peak, max(0, peak - returned), returned)


def _on_cpu(step: Step) -> Memory:
    with silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        outcome = step()
    events = sorted(_allocations(profiler), key=lambda event: event.start_time_ns)
    blocks = [(event.extra_fields.ptr, event.extra_fields.alloc_size) for event in events]
    # What the step returns is the last block at its address.
    last = {ptr: number for number, (ptr, size) in enumerate(blocks) if size > 0}
    results = {last[ptr] for ptr in _storages(outcome) if ptr in last}
    held: dict[int, tuple[int, bool]] = {}  # by address: bytes, and whether it is returned
    live = own = peak = own_peak = 0
    for number, (ptr, size) in enumerate(blocks):
        if size < 0 and ptr not in held:  # older than the step
            continue
        if size > 0:
            held[ptr] = size, number in results
        bytes_, returned = held[ptr] if size > 0 else held.pop(ptr)
        change = bytes_ if size > 0 else -bytes_
        live += change
        own += 0 if returned else change
        peak, own_peak = max(peak, live), max(own_peak, own)
    return Memory(peak, own_peak, sum(blocks[number][1] for number in results))


def _allocations(profiler: profile) -> Iterator[Any]:
    """Events of blocks handed out and given back."""
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = list(profiler.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.tag.name == "Allocation":
            yield event


def _storages(outcome: Outcome) -> dict[int, Any]:
    """What an outcome holds, by address."""
    given: list[Tensor | None] = [outcome.gramian, *(outcome.gradient or ())]
    storages = [x.untyped_storage() for x in given if x is not None]
    return {storage.data_ptr(): storage for storage in storages}
