"""What the proof of a new graph costs: the first steps of an engine on BERT-base, in time and in memory.

    python -m benchmarks.first_step

Batch 8 of 128 tokens, random weights, without dropout. A step is a forward, ``compute_gramian`` and
``losses.backward`` with mean weights, or plain SGD. Each call takes turns with an SGD step of a copy of the
model, and its time is in that step's; the engine is new in each of three rounds. Memory is the peak of what
is resident in a process of its own, in which blocks of a mebibyte and more go back to the system when they
are freed (``MALLOC_MMAP_THRESHOLD_``).
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import seconds
from gramjd import Engine

TABLE = Path(__file__).parent / "results" / "first_step.md"
CPU = torch.device("cpu")
BATCH, TOKENS, CALLS, ROUNDS = 8, 128, 10, 3
STEPS = {
    "SGD": "plain SGD",
    "engine": "compute_gramian, losses.backward(w)",
    "jacobian": "engine.backward",
    "frugal": "engine.backward, memory_budget of 64 MiB",
}


class Setting:
    """The model and its batch."""

    def __init__(self) -> None:
        from transformers import BertConfig, BertForSequenceClassification

        torch.manual_seed(0)
        config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        self.model: nn.Module = BertForSequenceClassification(config).train()
        self.ids = torch.randint(0, config.vocab_size, (BATCH, TOKENS))
        self.labels = torch.randint(0, 2, (BATCH,))

    def losses(self) -> Tensor:
        self.model.zero_grad()  # first: gradients of the step before are not held during the forward
        return F.cross_entropy(self.model(input_ids=self.ids).logits, self.labels, reduction="none")

    def step(self, kind: str) -> Callable[[], object]:
        """A step, with a new engine if it has one."""
        if kind == "SGD":
            return lambda: self.losses().mean().backward()
        budget = 64 * 2**20 if kind == "frugal" else None
        engine = Engine(self.model, batch_dim=0, audit=None, memory_budget=budget)
        weights = torch.full((BATCH,), 1 / BATCH)

        def by_engine() -> None:
            losses = self.losses()
            if kind in ("jacobian", "frugal"):
                engine.backward(losses, lambda gramian: weights)
                return
            engine.compute_gramian(losses)
            losses.backward(weights)

        return by_engine


def main() -> None:
    """Measure, print and keep the table."""
    if len(sys.argv) > 1:  # a process that measures memory
        step = Setting().step(sys.argv[1])
        for _ in range(3):
            step()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    peaks = {kind: peak(kind) for kind in STEPS}
    times = times_of()
    lines = [
        "# First steps of an engine",
        "",
        f"BERT-base, batch {BATCH} of {TOKENS} tokens; torch {torch.__version__}, {torch.get_num_threads()} "
        "threads. Times in SGD steps; memory is the peak of what is resident.",
        "",
        f"| step | {' | '.join(f'call {n + 1}' for n in range(CALLS))} | memory, GiB | of SGD's |",
        f"| --- | {' | '.join(['---'] * CALLS)} | --- | --- |",
    ]
    for kind, title in STEPS.items():
        cells = [f"{t:.2f}" for t in times[kind]]
        cells += [f"{peaks[kind] / 2**20:.2f}", f"{peaks[kind] / peaks['SGD']:.2f}"]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    text = "\n".join(lines) + "\n"
    TABLE.write_text(text, encoding="utf-8")
    print(text)


def peak(kind: str) -> int:
    """KiB resident at the peak of a process that takes three steps."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    command = [sys.executable, "-m", "benchmarks.first_step", kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def times_of() -> dict[str, list[float]]:
    """Of each call of a new engine, the median over the rounds of its time in SGD steps."""
    setting, plain = Setting(), Setting().step("SGD")
    for _ in range(2):
        plain()
    rounds = [{kind: ratios(setting.step(kind), plain) for kind in STEPS} for _ in range(ROUNDS)]
    return {
        kind: [statistics.median(calls) for calls in zip(*(each[kind] for each in rounds), strict=True)]
        for kind in STEPS
    }


def ratios(step: Callable[[], object], plain: Callable[[], object]) -> list[float]:
    """Of each of some calls, its time to that of the plain step before it."""
    found = []
    for _ in range(CALLS):
        beside = seconds(plain, CPU)
        found.append(seconds(step, CPU) / beside)
    return found


if __name__ == "__main__":
    main()
