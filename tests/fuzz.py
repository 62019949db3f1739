"""Random examples: a model (:mod:`fuzz_program`), losses, an engine, and what the contract makes of them."""

from __future__ import annotations

import importlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from fuzz_ops import OPS, PARTS
from fuzz_program import Instruction, Moment, Program, Shared
from oracle import assert_symmetric, dense_gramian
from steps import preparing, projecting
from torch import Tensor

import gramjd
from gramjd import Engine


@dataclass(frozen=True)
class Recipe:
    """A whole example."""

    sizes: Mapping[str, int]
    body: tuple[Instruction, ...]
    children: tuple[tuple[Instruction, ...], ...]
    loss: str
    forwards: str
    registered: str  # what the engine is given
    engines: str  # with a batch dimension, without, or both on the same forward
    moments: tuple[Moment, ...]  # one a step
    audited: bool
    seed: int


def _cosines(h: Tensor, y: Tensor, ids: Tensor) -> Tensor:
    a, b = (F.normalize(t.flatten(1), dim=1, eps=1e-3) for t in (h, y))
    return F.cross_entropy(a @ b.T, torch.arange(len(a)), reduction="none")


def _centred(h: Tensor, y: Tensor, ids: Tensor) -> Tensor:
    losses = (h - y).square().sum((1, 2))
    return losses - losses.mean()


def _ranked(h: Tensor, y: Tensor, ids: Tensor) -> Tensor:
    """Targets are samples: one's own in some steps, others in others."""
    a = h.flatten(1).tanh()
    own = torch.arange(len(a))
    return F.nll_loss(a @ a.T, own if int(ids.sum()) % 2 else own.roll(1), reduction="none")


def _classified(h: Tensor, y: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(h.mT, ids % h.shape[2], reduction="none")


# each with the dimension of its samples
LOSSES: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Tensor], int]] = {
    "squares": (lambda h, y, ids: (h - y).square().sum((1, 2)), 0),
    "classes": (lambda h, y, ids: _classified(h, y, ids).mean(1), 0),
    "masked": (lambda h, y, ids: (_classified(h, y, ids) * (ids > 1)).sum(1) / (1 + (ids > 1).sum(1)), 0),
    "two objectives": (lambda h, y, ids: torch.stack([h.sin().sum((1, 2)), h.square().mean((1, 2))], 1), 0),
    "objectives first": (lambda h, y, ids: torch.stack([(h - y).abs().sum((1, 2)), h.amax((1, 2))]), 1),
    "every token": (_classified, 0),
    "every token, time first": (lambda h, y, ids: _classified(h, y, ids).T, 1),
    "matrix": (lambda h, y, ids: (h - y)[:, :2].square(), -3),
}
MIXED_LOSSES = {"contrastive": (_cosines, 0), "centred": (_centred, 0), "targets are samples": (_ranked, 0)}
# of the least precise op in a model of float64
PRECISIONS = {"linear: float32": 1e-5, "norm: float32 rms": 1e-5, "linear: autocast": 5e-2}
NOTHING = "nothing to differentiate"
PARTIAL = {"inner roots", "some modules", "child: checkpoint", "child: saved-tensor hooks"}
FORWARDS = ("one", "siamese", "micro-batches", "dropout twice", "intermediate result", "gradient penalty")


def build(recipe: Recipe) -> Program:
    """The model; its first child holds the other one, which so is held twice."""
    shared = Shared(OPS, PARTS, set(), itertools.count(recipe.seed), recipe.moments[0])
    children: list[Program] = []
    for body in reversed(recipe.children):
        children = [Program(recipe.sizes, body, children, shared), *children]
    return Program(recipe.sizes, recipe.body, children, shared).train(recipe.moments[0].training)


def run(recipe: Recipe, model: Program, step: int = 0, eps: Tensor | None = None) -> tuple[Tensor, int]:
    """The losses of the step's own data and random numbers, and which dimension has the samples.

    ``eps`` of zeros ``[samples]`` takes part so that the derivatives with respect to it say whose they are.
    """
    torch.manual_seed(recipe.seed + step)
    enter(recipe, model, step)
    shape = [samples(recipe, step), recipe.sizes["T"], recipe.sizes["D"]]
    x, y, x2 = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    ids = torch.randint(recipe.sizes["V"], shape[:2])
    kind = recipe.forwards
    x.requires_grad_(kind == "gradient penalty")

    def forward(x: Tensor, ids: Tensor = ids, eps: Tensor | None = eps, which: int = -1) -> Tensor:
        given = x if eps is None else x * (1 + eps[:, None, None])
        out = model({"ids": ids, "values": [(given, "BTD")], "eps": eps})
        found: Tensor = model.to(out["out"], "BTD").t
        if which >= 0:
            found = found + model.to(out["all"][which % len(out["all"])], "BTD").t
        return found

    if kind == "micro-batches":
        sizes = [1, len(x) - 1]
        pieces = eps.split(sizes) if eps is not None else [None, None]
        h = torch.cat([forward(*one) for one in zip(x.split(sizes), ids.split(sizes), pieces)])  # noqa: B905
    else:
        h = forward(x, which=recipe.seed if kind == "intermediate result" else -1)
    if kind in ("siamese", "dropout twice"):
        h = h * forward(x2 if kind == "siamese" else x)
    if kind == "gradient penalty":
        h = h + torch.autograd.grad(h.square().sum(), x, create_graph=True)[0]
    loss, dim = {**LOSSES, **MIXED_LOSSES}[recipe.loss]
    return loss(h, y, ids), dim


def samples(recipe: Recipe, step: int) -> int:
    """Another number in some steps, perhaps that of positions."""
    b = recipe.sizes["B"]
    return (b, b + 1, recipe.sizes["T"])[recipe.moments[step].batch]


def enter(recipe: Recipe, model: Program, step: int) -> None:
    """What changes at a step, but for data."""
    model.shared.now = now = recipe.moments[step]
    model.train(now.training)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("gate"):
                p.fill_(now.gate)


def registered(recipe: Recipe, model: Program, losses: Tensor) -> tuple[list[Any], list[Tensor]]:
    """What the engine is given, and which parameters it then stands for."""
    inner = [*model.children_, *model.parts.values()]
    given: dict[str, list[Any]] = {
        "modules": [list(model.modules())],
        "roots": [*inner, model],
        "inner roots": inner[::2],
        "some modules": [list(model.modules())[1::2]],
    }
    modules = given.get(recipe.registered, [model])
    parameters = _parameters(modules)
    if _reaches(losses, parameters):
        return modules, parameters
    return [model], list(model.parameters())


def _parameters(modules: list[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for m in modules:
        found += (
            [p for each in m for p in each.parameters(recurse=False)]
            if isinstance(m, list)
            else m.parameters()
        )
    return list({id(p): p for p in found}.values())


def _reaches(losses: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """The parameters that the losses depend on."""
    trainable = [p for p in parameters if p.requires_grad]
    if not trainable or not losses.requires_grad:
        return []
    found = torch.autograd.grad(losses.sum(), trainable, retain_graph=True, allow_unused=True)
    return [p for p, g in zip(trainable, found, strict=True) if g is not None]


def outcome(recipe: Recipe) -> tuple[list[str], set[str], list[str]]:
    """What became of the recipe, by step and engine, what its model did, and on what each result rests."""
    try:
        with projecting(recipe.seed % 2 == 1), preparing(at_once=recipe.seed % 3 > 0):
            return _outcome(recipe)
    except RuntimeError as error:
        if "derivative for" not in str(error) and "not implemented" not in str(error):
            raise
        return [NOTHING], set(), []  # PyTorch has no second derivative of an op, as a gradient penalty needs


def _outcome(recipe: Recipe) -> tuple[list[str], set[str], list[str]]:
    model = build(recipe)
    run(recipe, model)  # the parameters come into being
    plain, dim = run(recipe, model)
    modules, parameters = registered(recipe, model, plain)
    reached = _reaches(plain, parameters)
    if not reached or not bool(plain.isfinite().all()):
        return [NOTHING], set(), []
    did = {recipe.loss, recipe.forwards, recipe.registered, recipe.engines, *model.shared.notes}
    did |= {f"{field} changes" for field, values in _fields(recipe).items() if len(values) > 1}
    did |= {name for name in ("frozen", "training") if True in _fields(recipe)[name]}
    if recipe.moments[0].frozen:  # torch has other kernels then
        _freeze(reached, recipe.moments[0])
        plain, _ = run(recipe, model)
    dims = {"batch": [dim], "none": [None], "both": [dim, None]}[recipe.engines]
    audit = 256 if recipe.audited else None
    engines = {d: Engine(*modules, batch_dim=d, audit=audit) for d in dims}
    found, grounds = [], list[str]()
    for step, now in enumerate(recipe.moments):
        if step:
            train(model, step)
        _freeze(reached, now)
        losses, _ = run(recipe, model, step)
        if step == 0 and (losses - plain).abs().max() > tolerance(1e-12, did) * plain.abs().max():
            found.append("wrong: the forward itself")
        if not _reaches(losses, parameters):
            found.append(NOTHING)
            continue
        with _grounds(grounds):
            results = {d: _try(engine, losses) for d, engine in engines.items()}
        want = dense_gramian(losses, parameters)
        for d, got in results.items():
            if isinstance(got, Tensor):
                found.append(f"{_kind(d)}: {_compare(got, want, did)}")
                continue
            if not want.isfinite().all() and isinstance(got, gramjd.NotFiniteError):
                found.append("overflow")
                continue
            why = "unwarranted" if d is None else _excuse(recipe, model, step, did)
            found.append(f"{_kind(d)}: {_refusal(got, why)}")
    for engine in engines.values():
        engine.close()
    return found, did, grounds


@contextmanager
def _grounds(found: list[str]) -> Iterator[None]:
    """While the context lasts, note on what each result of an engine rests."""
    module: Any = importlib.import_module("gramjd.engine.engine")
    solve = module.solve

    def noting(request: Any, *args: Any) -> Any:
        known, batched = request.known, request.problem.batch_dim is not None
        solution = solve(request, *args)
        whole = not batched or (solution.separation is not None and solution.separation.is_whole)
        if known.audit:
            found.append("audited")
        elif not known.is_complete:
            complete = solution.program.complete and whole
            found.append("proven" if complete else "verified, but not proven for later steps")
        else:
            measured = batched and not known.layouts
            found.append("trusted" if not measured else "proven again" if whole else "measured")
        return solution

    module.solve = noting
    try:
        yield
    finally:
        module.solve = solve


def _freeze(parameters: list[Tensor], now: Moment) -> None:
    for p in parameters[1::2]:
        p.requires_grad_(not now.frozen)


def _fields(recipe: Recipe) -> dict[str, set[Any]]:
    """The values that each field of the moments takes."""
    return {name: {getattr(now, name) for now in recipe.moments} for name in Moment._fields}


def train(model: Program, step: int) -> None:
    """A step of an optimizer: parameters move a little; gates are opened by their moments."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for name, p in model.named_parameters():
            moved = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.add_(0.0 if name.endswith("gate") else 0.05 * moved)


def _kind(dim: int | None) -> str:
    return "no samples" if dim is None else "samples"


def _try(engine: Engine, losses: Tensor) -> Tensor | Exception:
    """The Gramian or what it raised; no random number is drawn."""
    state = torch.get_rng_state()
    try:
        return engine.compute_gramian(losses)
    except Exception as error:
        return error
    finally:
        assert torch.equal(state, torch.get_rng_state())


def tolerance(least: float, did: set[str]) -> float:
    """Of what a model computed, by its least precise op."""
    return max([least, *(each for name, each in PRECISIONS.items() if name in did)])


def _compare(got: Tensor, want: Tensor, did: set[str]) -> str:
    assert_symmetric(got)
    noise = 1e-24  # what is zero but for rounding
    size = float(want.abs().max())
    off = float((got - want).abs().max()) if got.shape == want.shape else torch.inf
    return "exact" if off <= tolerance(1e-8, did) * size + noise else f"wrong by {off:.1e} of {size:.1e}"


def _refusal(error: Exception, why: str) -> str:
    """An error of ours, by cause; it must have one."""
    name = type(error).__name__
    if not isinstance(error, gramjd.GramjdError) or not str(error):
        return f"foreign {name}: {error}"
    cause = re.sub(r"For '.*?' ", "", str(error)).split(":")[0].split(",")[0]
    return f"{why if isinstance(error, gramjd.NotSeparableError) else 'unwarranted'} {name} ({cause})"


def _excuse(recipe: Recipe, model: Program, step: int, did: set[str]) -> str:
    """Why a step may be refused: derivatives say that samples are mixed, or else what is known."""
    if mixes(recipe, model, step):
        return "warranted"
    moments = list(recipe.moments)
    moments[step] = moments[step]._replace(gate=0.5)
    if mixes(replace(recipe, moments=tuple(moments)), model, step):
        return "warranted, hidden now:"
    if meet(recipe, model, step):  # by what is nothing now, such as a gate
        opened = any(mixes(recipe, model, other) for other in range(len(recipe.moments)))
        return "warranted, hidden now:" if opened else "cancelled:"
    if {"batch-independent", "broadcast"} & did and did & PARTIAL:
        return "out of sight:"  # no registered call is seen to give batch-independent values their samples
    return "rounding:" if "linear: autocast" in did else "unwarranted"  # three digits tell samples apart


def meet(recipe: Recipe, model: Program, step: int) -> bool:
    """Do values of two samples meet? NaN in one of them is in the losses of others then."""
    for b in range(samples(recipe, step)):
        eps = torch.zeros(samples(recipe, step), dtype=torch.float64)
        eps[b] = torch.nan
        losses, dim = run(recipe, model, step, eps)
        found = losses.movedim(dim, 0).reshape(len(eps), -1).isnan().any(1)
        if torch.cat([found[:b], found[b + 1 :]]).any():
            return True
    return False


def mixes(recipe: Recipe, model: Program, step: int) -> bool:
    """Does the loss of a sample depend on another sample? No entry is small by rounding: they are zero."""
    eps = torch.zeros(samples(recipe, step), dtype=torch.float64, requires_grad=True)
    losses, dim = run(recipe, model, step, eps)
    for b, row in enumerate(losses.movedim(dim, 0)):
        for entry in row.flatten():
            (g,) = torch.autograd.grad(entry, eps, retain_graph=True)
            if torch.cat([g[:b], g[b + 1 :]]).abs().max() > 1e-14 * g.abs().max():
                return True
    return False
