"""Everything that a GPU decides, in one command of at most eight minutes: ``make gpu``.

    python -m benchmarks.gpu                    # a CUDA card: benchmarks/results/gpu.json
    python -m benchmarks.gpu --device cpu       # a dry run of the same code at tiny sizes

Three parts, each entry by itself, so that what fails is an entry of the results and not the end of the run:

- **equality**: Gramian and gradient beside a float64 oracle or, under autocast, beside autograd's on the same
  graph: float32 without and with TF32, bfloat16 and float16 autocast with a ``GradScaler``,
  ``channels_last``, fused attention;
- **steps**: the cases A to J, BERT-base and GPT-2 medium by ours and the recipes, in plain SGD steps; memory,
  kernel launches and values read back by the host in a step;
- **modes**: SGD and the functional step compiled and as CUDA graphs.

What the time is too short for is listed as left out. It exits with 1 if a result is not equal.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

import gramjd
from benchmarks import memory, timing
from benchmarks.cases import CASES, LARGE, SMALL, make
from benchmarks.implementations import COMPILED, IMPLEMENTATIONS, ours
from benchmarks.oracle import Oracle
from benchmarks.problem import Outcome, Problem, Step, sgd
from benchmarks.setting import setting
from gramjd.cli.cost import silent

RESULT = Path(__file__).parent / "results" / "gpu.json"
OURS = ("functional", "engine", "engine-backward")
COMPARED = (*OURS, "recipe-kept", "recipe-dropped")
WARM_UP = 10  # calls before a step is profiled or captured: then nothing is left to prove
Record = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Where, and until when."""

    device: torch.device
    deadline: float
    seconds: float  # for which a pair of steps alternates

    @property
    def small(self) -> bool:
        """A dry run."""
        return self.device.type != "cuda"

    def problem(self, case: str) -> Problem:
        """A case of its usual size, or tiny."""
        return make(case, str(self.device), **(SMALL.get(case, {}) if self.small else {}))

    def entry(self, name: str, measure: Callable[[], Record]) -> Record:
        """What a measurement found, or why it found nothing."""
        if time.monotonic() > self.deadline:
            return {"name": name, "left_out": "no time left"}
        start = time.monotonic()
        try:
            found = measure()
        except Exception as error:  # the others go on
            found = {"error": f"{type(error).__name__}: {error}"[:300]}
        if not self.small:
            gc.collect()
            torch.cuda.empty_cache()
        found = {"name": name, **found, "took": round(time.monotonic() - start, 1)}
        print(json.dumps(found), flush=True)
        return found


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Products and convolutions in TF32, or in full float32."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def equality(run: Run) -> list[Record]:
    """Every setting by each of ours."""
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    settings: dict[str, tuple[str, Callable[[], AbstractContextManager[None]], float]] = {
        "float32, case A": ("A", lambda: tf32(False), 1e-4),
        "float32, case C": ("C", lambda: tf32(False), 1e-4),
        "float32, case F": ("F", lambda: tf32(False), 1e-3),
        "TF32, case A": ("A", lambda: tf32(True), 3e-2),
        "TF32, case F": ("F", lambda: tf32(True), 5e-2),
        "fused attention, case H": ("H", lambda: sdpa_kernel(fused), 1e-3),
    }
    found = [
        run.entry(f"{title}, {name}", partial(_within, run, case, name, context, tolerance))
        for title, (case, context, tolerance) in settings.items()
        for name in OURS
    ]
    for name in OURS:
        found.append(run.entry(f"channels_last, case F, {name}", partial(_channels_last, run, name)))
    for dtype in (torch.bfloat16, torch.float16):
        found.append(run.entry(f"autocast, {dtype}, GradScaler", partial(_autocast, run, dtype)))
    return found


def _within(run: Run, case: str, name: str, context: Callable[[], AbstractContextManager[None]],
            tolerance: float) -> Record:  # fmt: skip
    problem = make(case, str(run.device), **SMALL[case])
    with context():
        return _judged(problem, IMPLEMENTATIONS[name](problem)(), tolerance)


def _judged(problem: Problem, outcome: Outcome, tolerance: float) -> Record:
    """Errors beside the float64 oracle, and whether they are small enough."""
    errors = Oracle.of(problem).errors(outcome)
    return {**errors, "tolerance": tolerance, "equal": max(errors.values()) <= tolerance}


def _channels_last(run: Run, name: str) -> Record:
    problem = make("F", str(run.device), **SMALL["F"])
    problem.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    inputs = tuple(x.to(memory_format=torch.channels_last) for x in problem.inputs)
    problem = replace(problem, inputs=inputs)
    with tf32(False):
        return _judged(problem, IMPLEMENTATIONS[name](problem)(), 1e-3)


def _autocast(run: Run, dtype: torch.dtype) -> Record:
    """One step with a scaler, beside autograd's rows of the same losses and its own scaled backward pass."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 4)).to(run.device)
    parameters, engine = list(model.parameters()), gramjd.Engine(model, batch_dim=0)
    scaler = torch.amp.GradScaler(run.device.type, init_scale=2.0**8)
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    x, y = torch.randn(8, 16, device=run.device), torch.randint(0, 4, (8,), device=run.device)
    weights = torch.linspace(0.1, 1, 8, device=run.device)
    with torch.autocast(run.device.type, dtype):
        losses = nn.functional.cross_entropy(model(x), y, reduction="none")
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    wanted = torch.stack([torch.cat([g.flatten() for g in row]).double() for row in rows])
    gramian = engine.compute_gramian(losses).double()
    scaler.scale(losses @ weights.to(losses)).backward()
    scaler.unscale_(optimizer)
    gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).double()
    right = wanted @ wanted.T, weights.double() @ wanted
    errors = [float((a - b).norm() / b.norm()) for a, b in zip((gramian, gradient), right, strict=True)]
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-2
    return {"gramian_error": errors[0], "gradient_error": errors[1], "tolerance": tolerance,
            "equal": max(errors) <= tolerance}  # fmt: skip


def steps(run: Run) -> list[Record]:
    """Every case by ours and the recipes; the large models on a GPU alone."""
    large = [] if run.small else ["BERT", *LARGE]
    return [
        run.entry(f"{case}, {name}", partial(_step, run, case, name))
        for case in [*CASES, *large]
        for name in COMPARED
    ]


def _step(run: Run, case: str, name: str) -> Record:
    problem = run.problem(case)
    beside = problem.copied()
    return _timed(run, IMPLEMENTATIONS[name](problem), sgd(beside))


def _timed(run: Run, step: Step, plain: Step) -> Record:
    """Time beside the plain step, memory, and what each asks of the host."""
    found: Record = dict(
        timing.alternate(step, plain, run.device, run.seconds, most=20 if not run.small else 2).summary()
    )
    for name, each in (("", step), ("sgd_", plain)):
        for _ in range(0 if run.small else WARM_UP):
            each()
        found |= {f"{name}{key}": value for key, value in host(each, run.device).items()}
        if not run.small:
            found |= {
                f"{name}{key}_bytes": size for key, size in asdict(memory.measure(each, run.device)).items()
            }
    return found


def host(step: Callable[[], object], device: torch.device) -> dict[str, int]:
    """Kernel launches, copies to the host and values read back in one step, by ``torch.profiler``."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with silent(), profile(activities=activities) as profiler:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return counted({event.key: event.count for event in profiler.key_averages()})


def counted(events: Mapping[str, int]) -> dict[str, int]:
    """Of events by name."""

    def number(*names: str) -> int:
        return sum(count for key, count in events.items() if key.startswith(names))

    return {
        "launches": number("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch"),
        "copies_to_host": number("Memcpy DtoH"),
        "read_back": number("aten::_local_scalar_dense"),
        "synchronizations": number("cudaStreamSynchronize"),
    }


def modes(run: Run, cases: Sequence[str] = ("A", "C", "BERT")) -> list[Record]:
    """Compiled, and as CUDA graphs: a dry run has neither."""
    if run.small:
        return []
    found = []
    for case in cases:
        for name in COMPILED:
            found.append(run.entry(f"{case}, {name}", partial(_step, run, case, name)))
        for name in ("sgd", "functional"):
            found.append(run.entry(f"{case}, {name}, CUDA graph", partial(_graphed, run, case, name)))
    return found


def _graphed(run: Run, case: str, name: str) -> Record:
    """A step captured once and replayed, beside the eager plain step."""
    problem = run.problem(case)
    beside = problem.copied()
    step = sgd(problem) if name == "sgd" else ours.functional(problem, audit=None)  # audits read values back
    side = torch.cuda.Stream(run.device)
    side.wait_stream(torch.cuda.current_stream(run.device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream(run.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    problem.clear()
    with torch.cuda.graph(graph):
        outcome = step()

    def replay() -> Outcome:
        graph.replay()
        return outcome

    return _timed(run, replay, sgd(beside)) | (
        _judged_copy(problem, replay()) if case in "ABCDEFGHIJ" else {}
    )


def _judged_copy(problem: Problem, outcome: Outcome) -> Record:
    return Oracle.of(problem.copied()).errors(outcome)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts and keep what they find."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=7.5, help="after which no new entry begins")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --device cpu is a dry run at tiny sizes")
    run = Run(device, time.monotonic() + 60 * options.minutes, 0.01 if device.type != "cuda" else 1.0)
    kept: Record = {"setting": setting(options.device), "dry_run": run.small}
    for part in (equality, steps, modes):
        kept[part.__name__] = part(run)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(kept, indent=1) + "\n")
    wrong = [r["name"] for r in kept["equality"] if not r.get("equal")]
    print(f"{len(kept['equality']) - len(wrong)} settings equal; not equal, or not measured: {wrong}")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
