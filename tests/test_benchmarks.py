"""The benchmarks' implementations are right on small cases, and the README shows what is kept; never time."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_close, dense_gramian, dense_jacobian
from torch.utils._python_dispatch import TorchDispatchMode

import gramjd
from gramjd import pytree

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))  # of the benchmarks, which are not installed

pytest.importorskip("torch.nn.attention")  # of torch 2.3

from benchmarks import gpu, host_work, memory, report, runner, sketch_peers  # noqa: E402
from benchmarks.cases import CASES, REAL, SMALL, make  # noqa: E402
from benchmarks.implementations import IMPLEMENTATIONS, OURS, PEERS, TITLES, USUAL, floor  # noqa: E402
from benchmarks.measure import coverage  # noqa: E402
from benchmarks.oracle import Oracle, matrix  # noqa: E402
from benchmarks.problem import Outcome, Problem, sgd  # noqa: E402

CPU = torch.device("cpu")


def small(case: str) -> Problem:
    """In float64, with weights that conflict."""
    if case in ("E", *REAL):
        pytest.importorskip("transformers")
    problem = make(case, **SMALL[case]).moved(torch.float64)
    weights = torch.randn_like(problem.objectives())
    return replace(problem, weights=weights.detach())


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("case", CASES)
def test_implementation(case: str, name: str) -> None:
    problem = small(case)
    exact = problem.copied()
    objectives = exact.objectives()
    step = OURS[name](problem)
    step()  # what a first step leaves behind does not reach the second
    found = step()
    assert found.gramian is not None
    gramian = matrix(dense_gramian(objectives, exact.parameters))
    assert_close(matrix(found.gramian), gramian, 1e-9)
    alone = problem.kernel or name.endswith("-gramian")
    assert (found.gradient is None) == alone
    if found.gradient is not None:
        assert exact.weights is not None
        want = exact.weights.flatten() @ dense_jacobian(objectives, exact.parameters)
        assert_close(torch.cat([g.flatten() for g in found.gradient]), want, 1e-9)


@pytest.mark.parametrize("name", ["vmap-grad", "layer-vjp"])
@pytest.mark.parametrize("case", ["A", "B", "D", "F", "J"])
def test_rows(case: str, name: str) -> None:
    """Of torch.func alone, on cases that it vectorises in float64."""
    problem = small(case)
    errors = Oracle.of(problem).errors(PEERS[name](problem)())
    assert errors and max(errors.values()) < 1e-9


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # attention under vmap
@pytest.mark.parametrize("name", ["recipe-kept", "recipe-dropped"])
@pytest.mark.parametrize("case", CASES)
def test_recipe(case: str, name: str) -> None:
    """The strongest opponent is right on every case, in its second step, too."""
    problem = small(case)
    if case == "G":  # vmap refuses LSTMs in float64
        problem = problem.moved(torch.float32)
    step = PEERS[name](problem)
    step()
    found = step()
    assert found.gramian is not None and (found.gradient is None) == problem.kernel
    assert max(Oracle.of(problem).errors(found).values()) < (1e-5 if case == "G" else 1e-9)


@pytest.mark.parametrize("case", CASES)
def test_oracle(case: str) -> None:
    """The harness's own oracle is the one of the tests, and sees a wrong result."""
    problem = small(case)
    oracle = Oracle.of(problem)
    objectives = problem.objectives()
    assert_close(oracle.gramian, matrix(dense_gramian(objectives, problem.parameters)), 1e-10)
    wrong = oracle.gramian.clone()
    wrong[0, 0] *= 1.5
    assert oracle.errors(Outcome(wrong, None))["gramian_error"] > 1e-3


def test_oracle_of_some_parameters_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all rows at once would be too many."""
    problem = small("C")
    whole = Oracle.of(problem)
    monkeypatch.setattr("benchmarks.oracle.ROWS", 600)
    assert_close(Oracle.of(problem).gramian, whole.gramian, 1e-12)


def test_plain_step_and_floor() -> None:
    problem = replace(small("A"), weights=None)
    gradient = sgd(problem)().gradient
    assert gradient is not None
    assert Oracle.of(problem).errors(Outcome(None, gradient))["gradient_error"] < 1e-12
    assert floor.activation_backward(problem)() == Outcome(None, None)


def test_memory() -> None:
    """Blocks of a megabyte: one is returned, one at a time is beside it, one is older than the step."""
    older = [torch.ones(2**18)]

    def step() -> Outcome:
        older.clear()
        kept = torch.zeros(2**18)
        for _ in range(3):
            kept += torch.ones(2**18)
        return Outcome(kept, None)

    found = memory.measure(step, CPU)
    assert found.returned == 2**20
    assert found.peak == 2 * 2**20
    assert found.own == 2**20


def test_readme_shows_the_kept_results() -> None:
    text = report.README.read_text()
    _, begin, rest = text.partition(report.BEGIN)
    shown, end, _ = rest.partition(report.END)
    assert begin and end
    assert shown.strip() == report.section(runner.load("steps.json"), runner.load("real.json")).strip()


def test_every_case_and_implementation_is_kept() -> None:
    """What is measured on demand may be missing, nothing else."""
    known = {(r["case"], r["implementation"]) for r in runner.load("steps.json")}
    assert {(case, name) for case in CASES for name in USUAL} <= known
    assert known <= {(case, name) for case in CASES for name in TITLES}
    assert set(TITLES) == set(IMPLEMENTATIONS) and set(report.SHORT) == set(PEERS)
    real = {(r["case"], r["implementation"]) for r in runner.load("real.json")}
    assert real <= {(case, name) for case in REAL for name in TITLES}


def test_the_strongest_opponent() -> None:
    """The fastest peer, among those that are right and complete."""
    right = {"gramian_error": 1e-7, "gradient_error": 1e-7}
    records: list[runner.Record] = [
        {"implementation": "functional", "ratio": 1.0, **right},
        {"implementation": "recipe-kept", "ratio": 3.0, **right},
        {"implementation": "opacus", "ratio": 1.5, **right, "gradient_error": 0.5},
        {"implementation": "neural-tangents", "ratio": 2.0, "gramian_error": 1e-7},
        {"implementation": "backpack", "error": "RuntimeError"},
    ]
    assert report.strongest(records, kernel=False) is records[1]
    assert report.strongest(records, kernel=True) is records[3]
    assert report.strongest(records[:1], kernel=False) is None


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # attention under vmap
@pytest.mark.parametrize("name", ["functional", "engine", "engine-backward", "recipe-kept", "recipe-dropped"])
@pytest.mark.parametrize("case", REAL)
def test_real_models(case: str, name: str) -> None:
    """The models of real sizes, made small, by everything that is compared on them."""
    problem = small(case)
    errors = Oracle.of(problem).errors(IMPLEMENTATIONS[name](problem)())
    assert len(errors) == 2 and max(errors.values()) < 1e-9


def test_what_is_counted() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    found = host_work.count(lambda: (x.t() * 2).sum().item())
    assert (found.ops, found.arithmetic, found.read_back) == (4, 3, 1)
    assert found.calls == 1
    assert host_work.python_calls(lambda: [len(y) for y in (small_list() for _ in range(3))]) >= 4


def small_list() -> list[int]:
    return [1]


def test_host_work() -> None:
    """Each step's counts on a small model, the same again; the table has a line for each."""
    problem = host_work.transformer(batch=2, width=8, depth=1, length=3, vocabulary=5)
    counts = host_work.measure(problem)
    assert list(counts) == ["sgd", *host_work.STEPS]
    reads = {name: mine.read_back for name, mine in counts.items()}
    assert reads == {"sgd": 0, "functional": 0, "engine": 1, "engine-backward": 1}  # a GPU waits for each
    assert 0 < counts["sgd"].arithmetic < counts["sgd"].ops
    assert all(0 < counts[name].arithmetic < counts[name].ops for name in host_work.STEPS)
    assert counts == host_work.measure(problem)  # nothing but the code decides
    key = host_work.key_cost(problem, budget=0.05)
    assert 0 < key.calls < counts["engine"].calls and 0 < key.share < 1
    record = {
        "title": "small",
        "counts": {name: asdict(mine) for name, mine in counts.items()},
        "key": asdict(key),
    }
    assert host_work.table([record]).count("| small |") == 5


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_host_work_models(name: str) -> None:
    problem = {"mlp": host_work.mlp, "cnn": host_work.cnn}[name](batch=2, width=4, depth=2)
    assert host_work.steady("engine", problem)[1] is not None


def test_host_work_of_an_unsteady_step() -> None:
    """Of a scatter by a mask nothing is ever proven."""
    problem = host_work.mlp(batch=3, width=4, depth=1)
    everywhere = torch.ones(3, dtype=torch.bool)
    scattered = replace(
        problem, loss=lambda out, labels: torch.zeros(3).masked_scatter(everywhere, out[:, 0].contiguous())
    )
    with pytest.raises(RuntimeError, match="is not steady after 10 calls"):
        host_work.steady("engine", scattered)


@pytest.mark.parametrize("name", ["ConFIG", "ExcessMTL", "GradDrop", "TrimmedMean"])
def test_weightings_of_rows_answer_alike(name: str) -> None:
    """What the table of times compares is one computation in both libraries."""
    pytest.importorskip("torchjd")
    from benchmarks import weighting

    assert set(weighting.ROWS) == {"ConFIG", "ExcessMTL", "GradDrop", "TrimmedMean"}
    found = []
    mine, other = weighting.calls(name, 5)
    assert other is not None
    for call in (mine, other):
        torch.manual_seed(0)
        found.append(call().flatten())
    assert_close(*found, 1e-10)
    times: dict[str, list[float]] = {"gramjd": [], "TorchJD": []}
    assert weighting.measure(name, 5, times, patience=60)[:2] == [name, "5"]
    assert all(len(each) == 1 and each[0] > 0 for each in times.values())


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_a_dry_run_of_what_a_gpu_decides(tmp_path: Path) -> None:
    """The same code at tiny sizes: everything is equal, every case is timed by everything compared."""
    out = tmp_path / "gpu.json"
    assert gpu.main(["--device", "cpu", "--out", str(out)]) == 0
    kept = json.loads(out.read_text())
    assert kept["dry_run"] and len(kept["equality"]) == 23
    assert all(r["equal"] and 0 < r["gramian_error"] <= r["tolerance"] for r in kept["equality"])
    missing = [r["name"] for r in kept["steps"] if "error" in r and "No module named" not in r["error"]]
    assert missing == [] and len(kept["steps"]) == len(CASES) * len(gpu.COMPARED)
    timed = {r["name"]: r for r in kept["steps"] if "ratio" in r}
    assert all(r["ratio"] > 0 and r["launches"] == 0 <= r["read_back"] for r in timed.values())


def test_no_time_is_left_and_what_is_wrong(tmp_path: Path) -> None:
    """Entries are left out by name, and a run without equal results fails."""
    out = tmp_path / "gpu.json"
    assert gpu.main(["--device", "cpu", "--minutes", "-1", "--out", str(out)]) == 1
    kept = json.loads(out.read_text())
    assert {r.get("left_out") for r in (*kept["equality"], *kept["steps"])} == {"no time left"}
    problem = small("A")
    found = gpu._judged(problem, Outcome(torch.eye(4), None), 1e-3)
    assert not found["equal"]


def test_what_a_profile_counts() -> None:
    events = {
        "cudaLaunchKernel": 3,
        "cudaLaunchKernelExC": 2,
        "Memcpy DtoH (Device -> Pinned)": 1,
        "aten::mm": 9,
    }
    found = gpu.counted({**events, "aten::_local_scalar_dense": 4})
    assert found == {"launches": 5, "copies_to_host": 1, "read_back": 4, "synchronizations": 0}


class _Factories(TorchDispatchMode):
    """Records tensors with several entries made on the CPU from no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = [x for x in pytree.leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_cpu = [x for x in pytree.leaves(found) if isinstance(x, torch.Tensor) and x.device.type == "cpu"]
        if not given and any(x.numel() > 1 for x in on_cpu):
            self.made.append(func.name())
        return found


@pytest.mark.parametrize("case", ["A", "B", "C", "F", "H", "J"])
def test_nothing_is_made_on_the_cpu_for_inputs_elsewhere(case: str) -> None:
    """A functional step of meta tensors, which also refuse every read by the host."""
    problem = make(case, "meta", **SMALL[case])
    step = IMPLEMENTATIONS["functional"](problem)
    with _Factories() as factories:
        torch.zeros(2), torch.zeros(2, device="meta"), torch.zeros(())
    assert factories.made == ["aten::zeros"]
    with _Factories() as factories:
        found = step()
    assert found.gramian is not None and found.gramian.device.type == "meta"
    assert found.gradient is not None and {g.device.type for g in found.gradient} == {"meta"}
    assert factories.made == []


def test_coverage() -> None:
    """Of a peer that covers some parameters: their share, and the names of the others."""
    problem = small("A")
    named = dict(problem.model.named_parameters())
    found = coverage(problem, ["0.weight", "2.bias"])
    share = (named["0.weight"].numel() + named["2.bias"].numel()) / sum(p.numel() for p in named.values())
    assert found["covered"] == pytest.approx(share)
    assert found["left_out"] == [name for name in named if name not in ("0.weight", "2.bias")]
    assert coverage(problem, None) == {}
    timed = {"ratio": 1.0, "low": 1.0, "high": 1.0, "seconds": 1.0, "sgd_seconds": 1.0, "sgd_own_bytes": 1}
    record: runner.Record = {"case": "A", "implementation": "dattri-llm", **timed, **found}
    page = report._steps_page([record])
    assert f"cover: A {100 * share:.3g} %, not `*.bias`, not `*.weight`." in page
    assert "cover:" not in report._steps_page([{"case": "A", "implementation": "opacus", **timed}])


SIZES = {
    "transformer": {"batch": 4, "width": 8, "depth": 1, "length": 3, "vocabulary": 11},
    "CNN": {"batch": 3, "width": 4, "size": 8},
}


@pytest.mark.parametrize("model", SIZES)
def test_sketch_peers(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours cover all parameters, with the errors that are to be expected; a failure is told."""
    monkeypatch.setattr(sketch_peers, "WARM", 1)
    names = [name for name in sketch_peers.IMPLEMENTATIONS if "gramjd" in name or "dataset" in name]
    records = [sketch_peers.measure(model, name, 400, 0.01, **SIZES[model]) for name in names]
    for r in records:
        bound = gramjd.Projection(400, kind="factored").error
        assert r["covered"] == 1 and r["left_out"] == [] and r["bytes"] == 4 * r["numbers"] == 1600
        assert 0 < r["error_of_all"] == r["error_of_covered"] < bound
    monkeypatch.setitem(sketch_peers.IMPLEMENTATIONS, names[0], lambda problem, dim, seed: 1 / 0)
    failed = sketch_peers.measure(model, names[0], 400, 0.01, **SIZES[model])
    assert failed["error"] == "ZeroDivisionError: division by zero"
    page = sketch_peers.page([*records, failed])
    assert page.count("| 100 % |") == len(names) and page.count("division by zero") == 1


def test_error_of_sketches() -> None:
    """The root of its mean is one of pairs of different rows, relative to their norms."""
    rows = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double()
    gramian = torch.tensor([[4.0, 3.0], [3.0, 9.0]]).double()
    assert sketch_peers.error(rows, gramian) == pytest.approx((3 / (2 * 3)) ** 2)
