"""Sketches of per-sample gradients beside dattri-llm and bergson: time, bytes, errors, parameters covered.

``python -m benchmarks.sketch_peers [model …]`` writes ``results/sketch_peers.md`` from all results that are
kept. A transformer and a CNN, each of the kind of layers that all of them hook; one thread. Every sketch has
about as many numbers a sample, whether one for all parameters or one for each layer.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import gramjd
from benchmarks import runner, timing
from benchmarks.cases.objectives import cross_entropy, token_cross_entropy
from benchmarks.cases.transformer import Block
from benchmarks.implementations.rows import on_path
from benchmarks.measure import coverage
from benchmarks.problem import NotApplicable, Problem, sgd
from benchmarks.setting import setting
from benchmarks.sketches import WARM

CPU = torch.device("cpu")
SEEDS = range(5)
BATCHES = 8  # of a dataset, whose first one has to make the files
KEPT = "sketch_peers.json"
HEAD = """\
# Sketches of per-sample gradients, beside other libraries

`python -m benchmarks.sketch_peers`: one batch (of a dataset, eight), one thread, float32. Time is that of a
sample, in SGD steps of a sample, forward and backward pass included. Errors are those of inner products of
different samples, relative to the norms of their gradients (root mean square over pairs and five seeds):
beside the exact ones of all parameters, and of the parameters that are covered.
"""


class Transformer(nn.Module):
    """Layers of their own for projections and feed-forward, which every library hooks; positions are bare."""

    device, dtype = CPU, torch.float32  # bergson asks the model

    def __init__(self, width: int, depth: int, length: int, vocabulary: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.positions)))


def transformer(batch: int = 64, width: int = 128, depth: int = 2, length: int = 64,
                vocabulary: int = 512) -> Problem:  # fmt: skip
    """The next token of sequences."""
    ids, labels = (torch.randint(0, vocabulary, (batch, length)) for _ in range(2))
    return Problem(Transformer(width, depth, length, vocabulary), (ids,), (labels,), token_cross_entropy)


class Convolutions(nn.Sequential):
    """Three convolutions with group norm, and a linear layer."""

    device, dtype = CPU, torch.float32

    def __init__(self, width: int) -> None:
        layers: list[nn.Module] = []
        for inputs, channels in ((3, width), (width, 2 * width), (2 * width, 2 * width)):
            layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.GroupNorm(4, channels), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def cnn(batch: int = 64, width: int = 32, size: int = 32) -> Problem:
    """Ten classes of pictures."""
    images, labels = torch.randn(batch, 3, size, size), torch.randint(0, 10, (batch,))
    return Problem(Convolutions(width), (images,), (labels,), cross_entropy)


MODELS: dict[str, Callable[..., Problem]] = {"transformer": transformer, "CNN": cnn}


@dataclass
class Sketching:
    """One step of an implementation, and the names of the parameters whose gradients it sketches."""

    rows: Callable[[], Tensor]  # [B, n]
    covered: list[str] = field(default_factory=list)
    proofs: int = 0  # calls that are not measured, beyond the usual ones
    batches: int = 1  # of each call


def transform(problem: Problem, dim: int, seed: int, kind: str) -> Sketching:
    """``gramjd.jacobian``."""
    func, params = gramjd.functional_loss(problem.model, problem.loss)
    jacobian = gramjd.jacobian(func)

    def rows() -> Tensor:
        found = jacobian(params, *problem.inputs, *problem.targets)
        return found.sketch(dim, seed=seed, kind=kind)

    return Sketching(rows, list(params))


def engine(problem: Problem, dim: int, seed: int, kind: str) -> Sketching:
    """``compute_gramian(sketch=…)``, which keeps no factor until the backward pass is over."""
    using, projection = gramjd.Engine(problem.model, batch_dim=0), gramjd.Projection(dim, seed, kind)
    return Sketching(
        lambda: using.compute_gramian(problem.objectives(), sketch=projection).sketch,
        [name for name, _ in problem.model.named_parameters()],
        WARM,
    )


def dataset(problem: Problem, dim: int, seed: int, kind: str) -> Sketching:
    """``gradients_dataset`` of several batches: sketches and norms, in files."""
    func, params = gramjd.functional_loss(problem.model, problem.loss)
    jacobian = gramjd.jacobian(func)
    batch = (*problem.inputs, *problem.targets)

    def rows() -> Tensor:
        with tempfile.TemporaryDirectory() as folder:
            store = gramjd.gradients_dataset(
                lambda some: jacobian(params, *some), BATCHES * [batch],
                f"{folder}/store", dim, seed=seed, kind=kind, progress=False,
            )  # fmt: skip
            return torch.tensor(store.sketches[: len(batch[0])])

    return Sketching(rows, list(params), batches=BATCHES)


def dattri(problem: Problem, dim: int, seed: int) -> Sketching:
    """Both factors of linear, convolutional and embedding layers projected; gradients of norms as a whole."""
    on_path()
    from dattri_llm import REGISTER_ALL, HookManager, HookManagerConfig
    from dattri_llm.gradient.ops import canonical_class_name, is_norm

    model = problem.model
    layers = _layers(model)
    norms = [name for name in layers if is_norm(canonical_class_name(model.get_submodule(name)))]
    most = dim - dim // 10 if norms else dim
    side = math.isqrt(most // (len(layers) - len(norms)))
    rest = (dim - (len(layers) - len(norms)) * side**2) // max(1, len(norms))
    usual = {"proj_seed": seed, "proj_max_batch_size": 8, "proj_type": "rademacher"}
    projections: dict[str, dict[str, Any]] = {"__default__": {**usual, "style": "logra", "proj_dim": side}}
    projections |= {name: {**usual, "style": "dense", "proj_dim": rest} for name in norms}
    config = HookManagerConfig(
        linear_io=REGISTER_ALL, projection_kwargs=projections, capture_style="materialized"
    )
    manager = HookManager(model, config)
    found, first = Sketching(lambda: torch.empty(0)), _first(model)

    def rows() -> Tensor:
        with manager.collect():
            problem.objectives().sum().backward(inputs=first)
            gradient = manager.get_gradient()
        problem.clear()
        mine = {name: data for name, data in gradient.data.items() if len(data) == len(problem.inputs[0])}
        found.covered = _parameters_of(model, list(mine))
        return torch.cat([data.flatten(1) for data in mine.values()], 1)

    found.rows = rows
    return found


def bergson(problem: Problem, dim: int, seed: int, target: str) -> Sketching:
    """Linear layers, each projected from both sides, or all by one matrix each into one sketch."""
    on_path()
    from bergson import GradientProcessor, IndexConfig, InMemoryCollector
    from bergson.gradients import LayerAdapter

    model, batch = problem.model, len(problem.inputs[0])
    hooked = [name for name, m in model.named_modules() if isinstance(m, LayerAdapter.supported_modules)]
    size = dim if target == "global" else math.isqrt(dim // len(hooked))
    processor = GradientProcessor(
        projection_dim=size, include_bias=True, projection_target=target, projection_seed=seed
    )
    config = IndexConfig(run_path=tempfile.mkdtemp())
    collector = InMemoryCollector(model=model, data=range(batch), cfg=config, processor=processor)
    first = _first(model)

    def rows() -> Tensor:
        with collector:
            losses = problem.objectives()
            losses.sum().backward(inputs=first)
            collector.process_batch(list(range(batch)), losses=losses)
        problem.clear()
        return torch.from_numpy(collector.builder.grad_buffer)

    return Sketching(rows, _parameters_of(model, hooked))


def _layers(model: nn.Module) -> list[str]:
    """Names of the modules, without the whole model, that have parameters of their own, in their order."""
    return [
        name for name, m in model.named_modules() if name and any(True for _ in m.parameters(recurse=False))
    ]


def _first(model: nn.Module) -> list[nn.Parameter]:
    """What a hooked backward pass is asked for: all layers are after it, and no other weight gradient is."""
    return list(model.get_submodule(_layers(model)[0]).parameters(recurse=False))


def _parameters_of(model: nn.Module, layers: Sequence[str]) -> list[str]:
    """Names of the layers' own parameters."""
    return [f"{name}.{own}" for name in layers
            for own, _ in model.get_submodule(name).named_parameters(recurse=False)]  # fmt: skip


IMPLEMENTATIONS: dict[str, Callable[[Problem, int, int], Sketching]] = {
    "gramjd transform, factored": partial(transform, kind="factored"),
    "gramjd Engine, factored": partial(engine, kind="factored"),
    "`gradients_dataset`, factored": partial(dataset, kind="factored"),
    "gramjd transform, rademacher": partial(transform, kind="rademacher"),
    "dattri-llm, each layer": dattri,
    "bergson, each layer": partial(bergson, target="per_module"),
    "bergson, one for all": partial(bergson, target="global"),
}


def exact(problem: Problem) -> dict[str, Tensor]:
    """Gramians ``[B, B]`` of the gradients of each parameter, in float64."""
    precise = problem.moved(torch.float64)
    params = {name: p.detach() for name, p in precise.model.named_parameters()}

    def loss(params: dict[str, Tensor], *sample: Tensor) -> Tensor:
        one = [x.unsqueeze(0) for x in sample]
        return precise.loss(functional_call(precise.model, params, (one[0],)), one[1])[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # attention goes sample by sample
        rows = vmap(grad(loss), (None, 0, 0))(params, *precise.inputs, *precise.targets)
    return {name: each.flatten(1) @ each.flatten(1).T for name, each in rows.items()}


def error(rows: Tensor, gramian: Tensor) -> float:
    """Of inner products of different samples, relative to the norms of their gradients: the mean square."""
    norms = gramian.diag().sqrt()
    off = (rows.double() @ rows.double().T - gramian) / (norms[:, None] * norms)
    i, j = torch.triu_indices(len(rows), len(rows), 1)
    return float(off[i, j].square().mean())


def measure(model: str, name: str, dim: int, seconds: float, **sizes: int) -> dict[str, Any]:
    """A record of the results; why there are none is its ``error``."""
    torch.manual_seed(0)
    problem = MODELS[model](**sizes)
    record: dict[str, Any] = {"model": model, "implementation": name, "setting": setting("cpu")}
    gramians, beside, squares = exact(problem), problem.copied(), []
    try:
        for seed in SEEDS:
            sketching = IMPLEMENTATIONS[name](problem.copied(), dim, seed)
            rows = sketching.rows()
            mine = sum(gramians[each] for each in sketching.covered)
            squares.append([error(rows, sum(gramians.values())), error(rows, mine)])  # type: ignore[arg-type]
        for _ in range(sketching.proofs):
            sketching.rows()
        plain = sgd(beside)
        found = timing.alternate(
            sketching.rows, lambda: [plain() for _ in range(sketching.batches)], CPU, seconds
        )
    except NotApplicable as reason:
        return {**record, "error": str(reason)}
    except Exception as failure:  # a peer never stops the run
        return {**record, "error": f"{type(failure).__name__}: {failure}"}
    of_all, of_covered = (statistics.mean(column) ** 0.5 for column in zip(*squares, strict=True))
    record |= found.summary() | coverage(problem, sketching.covered)
    numbers = {"numbers": rows.shape[1], "bytes": rows.shape[1] * rows.element_size()}
    return {**record, **numbers, "error_of_all": of_all, "error_of_covered": of_covered}


def page(records: Sequence[dict[str, Any]]) -> str:
    """The table of all results."""
    lines = [HEAD]
    titles = (
        "model",
        "implementation",
        "time",
        "quartiles",
        "numbers",
        "bytes",
        "error",
        "of covered",
        "covered",
    )
    lines += [_row(titles), "|---" * len(titles) + "|"]
    for r in records:
        if "ratio" not in r:
            reason = " ".join(r["error"].split())[:160]
            lines.append(_row([r["model"], r["implementation"], *"–" * 6, reason]))
            continue
        times = f"{r['ratio']:.2f}", f"{r['low']:.2f}–{r['high']:.2f}"
        errors = f"{r['error_of_all']:.3f}", f"{r['error_of_covered']:.3f}"
        left_out = ", ".join(f"`{name}`" for name in r["left_out"])
        share = f"{100 * r['covered']:.3g} %" + (f", not {left_out}" if left_out else "")
        head = r["model"], r["implementation"], *times
        lines.append(_row([*head, r["numbers"], r["bytes"], *errors, share]))
    settings = dict.fromkeys(f"{r['setting']['date']}, {r['setting']['device']}." for r in records)
    return "\n".join([*lines, "", *settings, ""])


def _row(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--impl", nargs="+", default=list(IMPLEMENTATIONS))
    parser.add_argument("--dim", type=int, default=900)
    parser.add_argument("--seconds", type=float, default=8, help="for each comparison")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of peers
    known = {(r["model"], r["implementation"]): r for r in runner.load(KEPT)}
    for model in args.models:
        for name in args.impl:
            start = time.monotonic()
            record = measure(model, name, args.dim, args.seconds)
            known[model, name] = record
            keys = ("ratio", "error_of_all", "error_of_covered", "numbers", "error")
            said = {key: record[key] for key in keys if key in record}
            print(model, name, said, f"{time.monotonic() - start:.0f} s", flush=True)
    order = [(model, name) for model in MODELS for name in IMPLEMENTATIONS if (model, name) in known]
    records = [known[key] for key in order]
    runner.keep_all(KEPT, records)
    (runner.RESULTS / "sketch_peers.md").write_text(page(records))


if __name__ == "__main__":
    main()
