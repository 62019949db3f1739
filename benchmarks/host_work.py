"""What a steady step asks of the host, counted beside a plain SGD step: no clock decides.

    python -m benchmarks.host_work

For three models the functional step and both Engine steps, each after ten calls, when nothing is left to
prove, and with audits off. Every step updates the parameters: ``torch.optim.SGD`` after a backward pass,
``p - rate * g`` after the functional one.

- **ops** that are dispatched below autograd, all of them and those that are neither views nor empty memory:
  ``arithmetic`` (rows ask torch for memory only where a mode such as this count's watches);
- **Python calls** (functions and generators, by ``sys.setprofile``);
- **values read back** to the host (``aten::_local_scalar_dense``): on a GPU each one waits for the device.

Of the engine's key (the walk over the graph and the separation key) the Python calls, and its share of
a step's time: the two run by themselves, in random order.
Writes ``benchmarks/results/host_work.json`` and ``host_work.md``.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import timing
from benchmarks.cases import perceptrons, sequences
from benchmarks.cases.objectives import cross_entropy
from benchmarks.implementations import ours
from benchmarks.problem import Outcome, Problem, Step, sgd
from benchmarks.setting import setting
from gramjd import Engine
from gramjd.engine.analysis.graph import walk
from gramjd.engine.analysis.signature import separation_keys

RESULTS = Path(__file__).parent / "results"
WARM_UP = 10  # calls
RATE = 1e-6
_WHOLE = "it is proven that no data change which entries belong to which sample"
_EMPTY = frozenset({"aten::empty", "aten::empty_strided", "aten::new_empty"})
_ALIASES = frozenset({"aten::_unsafe_view"})  # that their schema does not call views


@dataclass(frozen=True)
class Counts:
    """Of one step."""

    ops: int
    arithmetic: int
    calls: int
    read_back: int


@dataclass(frozen=True)
class KeyCost:
    """What the engine's key takes of a step."""

    calls: int  # of Python functions
    seconds: float  # the median over rounds
    share: float  # of the step beside it, likewise


class _Ops(TorchDispatchMode):
    """Counts what is dispatched below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.ops = self.arithmetic = self.read_back = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops += 1
        self.arithmetic += not (_is_view(func) or func.name() in _EMPTY)
        self.read_back += func.name() == "aten::_local_scalar_dense"
        return func(*args, **(kwargs or {}))


def _is_view(op: Any) -> bool:
    """Does an op return its argument's memory, unwritten?"""
    aliases = [out.alias_info for out in op._schema.returns]
    return op.name() in _ALIASES or any(alias is not None and not alias.is_write for alias in aliases)


def count(step: Callable[[], object]) -> Counts:
    """Of one call of a step, and of one more for the Python calls: a mode makes some of its own."""
    with _Ops() as found:
        step()
    return Counts(found.ops, found.arithmetic, python_calls(step), found.read_back)


def python_calls(run: Callable[[], object]) -> int:
    """How many Python functions run in it, itself included."""
    number = 0

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal number
        number += event == "call"

    before = sys.getprofile()
    gc.disable()  # what it would call back is no part of a step
    try:
        sys.setprofile(note)
        run()
    finally:
        sys.setprofile(before)
        gc.enable()
    return number


def mlp(batch: int = 64, width: int = 896, depth: int = 5) -> Problem:
    """Hidden layers of one width."""
    return perceptrons.mlp(batch, width, depth)


def transformer(batch: int = 16, width: int = 192, depth: int = 3, length: int = 64,
                vocabulary: int = 1000) -> Problem:  # fmt: skip
    """Pre-norm layers with ``nn.MultiheadAttention``, one loss a sequence."""
    return sequences.encoder(batch, width, depth, length, vocabulary)


def cnn(batch: int = 32, width: int = 32, depth: int = 6, size: int = 16) -> Problem:
    """Convolutions, each with group normalisation; every second one halves the picture."""
    layers: list[nn.Module] = []
    for number in range(depth):
        inputs, stride = width if number else 3, 1 + number % 2
        layers += [nn.Conv2d(inputs, width, 3, stride, 1), nn.GroupNorm(4, width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    images, labels = torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))
    return Problem(model, (images,), (labels,), cross_entropy)


MODELS: dict[str, Callable[..., Problem]] = {"MLP": mlp, "transformer": transformer, "CNN": cnn}
TITLES = {
    "MLP": "MLP, 5×896",
    "transformer": "pre-norm transformer, 3 layers of 192, 16×64 tokens",
    "CNN": "6 convolutions with group norm",
}
STEPS = {
    "functional": "functional",
    "engine": "compute_gramian, losses.backward(w)",
    "engine-backward": "engine.jacobian, J.gramian, J.backward(w)",
}


def steady(name: str, problem: Problem) -> tuple[Step, Engine | None]:
    """A step by one of ours that has nothing left to prove, and its engine.

    Raises:
        RuntimeError: the engine has not proven the model.
    """
    if name == "functional":
        step, engine = _updating(ours.functional(problem, audit=None), problem), None
    else:
        engine = Engine(problem.model, batch_dim=problem.batch_dim, audit=None)
        mine = (ours.engine if name == "engine" else ours.engine_backward)(problem, using=engine)
        step = _optimized(mine, problem)
    for _ in range(WARM_UP):
        step()
    if engine is not None and _WHOLE not in (told := str(engine.explain(problem.objectives()))):
        raise RuntimeError(f"{name} is not steady after {WARM_UP} calls: {told.splitlines()[-1]}")
    return step, engine


def _optimized(step: Step, problem: Problem) -> Step:
    """A step that leaves gradients, with the optimizer's."""
    optimizer = torch.optim.SGD(problem.parameters, lr=RATE)

    def run() -> Outcome:
        optimizer.zero_grad()
        found = step()
        optimizer.step()
        return found

    return run


def _updating(step: Step, problem: Problem) -> Step:
    """A step that returns gradients, with new parameters computed of them."""
    parameters = [p.detach() for p in problem.parameters]

    def run() -> Outcome:
        found = step()
        assert found.gradient is not None
        for p, gradient in zip(parameters, found.gradient, strict=True):
            torch.sub(p, gradient, alpha=RATE)
        return found

    return run


def measure(problem: Problem) -> dict[str, Counts]:
    """The counts of the plain step, and of each of ours; a model of its own for each."""
    copied = problem.copied()
    plain = _optimized(sgd(copied), copied)
    for _ in range(WARM_UP):
        plain()
    found = {"sgd": count(plain)}
    for name in STEPS:
        step, engine = steady(name, problem.copied())
        found[name] = count(step)
        if engine is not None:
            engine.close()
    return found


def key_cost(problem: Problem, budget: float = 8.0) -> KeyCost:
    """Of the walk over one step's losses and their separation key, beside the step of ``compute_gramian``."""
    step, engine = steady("engine", problem)
    assert engine is not None
    losses = problem.objectives()

    def key() -> None:
        graph = walk(losses)
        separation_keys(graph.order, graph.numbers, tuple(losses.shape), len(losses))

    key()
    calls = python_calls(key) - 1  # but for the function that asks
    times = timing.alternate(key, step, torch.device("cpu"), budget)
    shares = [mine / whole for mine, whole in zip(times.step, times.plain, strict=True)]
    engine.close()
    return KeyCost(calls, statistics.median(times.step), statistics.median(shares))


def table(records: list[dict[str, Any]]) -> str:
    """The counts of each step, and how many times the plain step's they are."""
    lines = [
        "| model | step | arithmetic ops | all ops | Python calls | read back |",
        "|---|---|---|---|---|---|",
    ]
    for record in records:
        plain = record["counts"]["sgd"]
        for name, title in {"sgd": "plain SGD", **STEPS}.items():
            mine = record["counts"][name]
            cells = [
                f"{mine[key]}" + ("" if name == "sgd" else f" ({mine[key] / plain[key]:.2f}×)")
                for key in ("arithmetic", "ops", "calls")
            ]
            lines.append(f"| {record['title']} | {title} | {' | '.join(cells)} | {mine['read_back']} |")
    lines += ["", "| model | Python calls of the engine's key | of the step | its time | share of the step |",
              "|---|---|---|---|---|"]  # fmt: skip
    for record in records:
        key, calls = record["key"], record["counts"]["engine"]["calls"]
        share = f"{1e3 * key['seconds']:.2f} ms | {100 * key['share']:.1f} %"
        lines.append(f"| {record['title']} | {key['calls']} | {100 * key['calls'] / calls:.0f} % | {share} |")
    return "\n".join(lines)


def main() -> None:
    """Count, print the tables, and keep them."""
    torch.manual_seed(0)
    records = []
    for name, make in MODELS.items():
        problem = make()
        counts = {step: asdict(found) for step, found in measure(problem).items()}
        records.append({"title": TITLES[name], "counts": counts, "key": asdict(key_cost(problem))})
    text = table(records)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    kept = {"setting": setting("cpu"), "models": records}
    (RESULTS / "host_work.json").write_text(json.dumps(kept, indent=1) + "\n")
    (RESULTS / "host_work.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
