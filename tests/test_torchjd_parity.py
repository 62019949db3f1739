"""A training run by each public name of TorchJD and by what stands for it here: the same parameters.

``python tests/test_torchjd_parity.py`` writes the table of ``docs/torchjd.md``, which a test compares.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gramjd
from gramjd import weighting as ours
from gramjd.aggregation import graddrop, parameter_rows, trimmed_mean

PACKAGES = ("autogram", "autojac", "aggregation")
PAGE = Path(__file__).parents[1] / "docs" / "torchjd.md"
START, END = "<!-- written by tests/test_torchjd_parity.py -->\n\n", "\n<!-- end of the table -->"

Step = Callable[[nn.Module, Tensor], Any]  # from the model and its losses, to gradients in .grad


@dataclass(frozen=True)
class Row:
    """A name of TorchJD."""

    package: str
    name: str
    ours: str  # what stands for it, as the page shows it; empty: nothing
    note: str = ""  # where they differ, or why there is nothing
    theirs_step: Callable[[Any, nn.Module], Step] | None = None  # made once for a run, of the package
    ours_step: Callable[[nn.Module], Step] | None = None
    losses: int = 4
    needs: tuple[str, ...] = ()
    batch_dim: int | None = None


def torchjd(package: str) -> Any:
    return importlib.import_module(f"torchjd.{package}")


# their steps


def by_autojac(make: Callable[[Any], Any]) -> Callable[[Any, nn.Module], Step]:
    """``backward`` and ``jac_to_grad`` with an aggregator."""

    def made(aggregation: Any, model: nn.Module) -> Step:
        autojac, aggregator = torchjd("autojac"), make(torchjd("aggregation"))

        def step(model: nn.Module, losses: Tensor) -> None:
            autojac.backward(losses)
            autojac.jac_to_grad(model.parameters(), aggregator)

        return step

    return made


def by_autogram(make: Callable[[Any], Any], batch_dim: int | None = None
                ) -> Callable[[Any, nn.Module], Step]:  # fmt: skip
    """An engine of theirs and a weighting."""

    def made(aggregation: Any, model: nn.Module) -> Step:
        engine = torchjd("autogram").Engine(model, batch_dim=batch_dim)
        weighting = make(torchjd("aggregation"))

        def step(model: nn.Module, losses: Tensor) -> None:
            losses.backward(weighting(engine.compute_gramian(losses)))

        return step

    return made


# our steps


def by_backward(make: Callable[[], Any]) -> Callable[[nn.Module], Step]:
    def made(model: nn.Module) -> Step:
        weighting = make()
        return lambda model, losses: gramjd.backward(losses, weighting)

    return made


def by_engine(make: Callable[[], Any], batch_dim: int | None = None) -> Callable[[nn.Module], Step]:
    def made(model: nn.Module) -> Step:
        engine, weighting = gramjd.Engine(model, batch_dim=batch_dim), make()
        return lambda model, losses: engine.backward(losses, weighting)

    return made


def of_aggregator(name: str, shown: str, *arguments: Any, theirs: tuple[Any, ...] = (), **more: Any) -> Row:
    """An aggregator: with ``autojac`` there (of more arguments, perhaps), ``gramjd.backward`` here."""
    mine = f"{name}Weighting"
    return Row(
        "aggregation", name, f"`gramjd.backward(losses, {mine}({shown}))`",
        theirs_step=by_autojac(lambda module: getattr(module, name)(*arguments, *theirs)),
        ours_step=by_backward(lambda: getattr(ours, mine)(*arguments)), **more,
    )  # fmt: skip


def of_weighting(name: str, shown: str, *arguments: Any, theirs: tuple[Any, ...] = (), **more: Any) -> Row:
    """A weighting: with ``autogram.Engine`` there, ``Engine.backward`` here."""
    return Row(
        "aggregation", f"{name}Weighting", f"`weighting.{name}Weighting({shown})`",
        theirs_step=by_autogram(lambda module: getattr(module, f"{name}Weighting")(*arguments, *theirs)),
        ours_step=by_engine(lambda: getattr(ours, f"{name}Weighting")(*arguments)), **more,
    )  # fmt: skip


def both(name: str, shown: str = "", *arguments: Any, **more: Any) -> list[Row]:
    return [of_aggregator(name, shown, *arguments, **more), of_weighting(name, shown, *arguments, **more)]


def heads_and_trunk(theirs: Any, model: nn.Module) -> Step:
    def step(model: nn.Module, losses: Tensor) -> None:
        features = model[:2](model.x)  # type: ignore[index]
        each = list(model.of(model[2:](features)).unbind())  # type: ignore[index,operator]
        theirs.mtl_backward(each, features, retain_graph=True)  # tasks share a head
        theirs.jac_to_grad(model[:2].parameters(), torchjd("aggregation").UPGrad())  # type: ignore[index]

    return step


def our_heads_and_trunk(model: nn.Module) -> Step:
    def step(model: nn.Module, losses: Tensor) -> None:
        features = model[:2](model.x)  # type: ignore[index]
        each = list(model.of(model[2:](features)).unbind())  # type: ignore[index,operator]
        gramjd.mtl_backward(each, features, ours.UPGradWeighting())

    return step


def of_rows(theirs: Any, model: nn.Module) -> Step:
    aggregator = torchjd("aggregation").UPGrad()

    def step(model: nn.Module, losses: Tensor) -> None:
        parameters = list(model.parameters())
        rows = theirs.jac(losses, parameters)
        direction = aggregator(torch.cat([row.flatten(1) for row in rows], 1))
        for p, g in zip(parameters, direction.split([p.numel() for p in parameters]), strict=True):
            p.grad = g.view_as(p)

    return step


def of_lazy(model: nn.Module) -> Step:
    def step(model: nn.Module, losses: Tensor) -> None:
        J = gramjd.jac(losses, model)
        J.backward(ours.upgrad(J.gramian()))

    return step


def sign_of_mean(theirs: Any, model: nn.Module) -> Step:
    """An aggregator of a user's own, which is no combination of the rows."""

    class SignOfMean(theirs.Aggregator):  # type: ignore[misc,name-defined]
        def forward(self, matrix: Tensor, /) -> Tensor:
            return matrix.mean(0).sign()

    return by_autojac(lambda _: SignOfMean())(theirs, model)


def our_sign_of_mean(model: nn.Module) -> Step:
    def step(model: nn.Module, losses: Tensor) -> None:
        rows = gramjd.jac(losses, model).dense()
        for name, p in model.named_parameters():
            p.grad = rows[name].mean(0).sign()

    return step


def first_half(theirs: Any, model: nn.Module) -> Step:
    """A weighting of a user's own."""

    class Longest(theirs.Weighting):  # type: ignore[misc,name-defined]
        def forward(self, gramian: Tensor, /) -> Tensor:
            return gramian.diagonal() / gramian.trace()

    return by_autogram(lambda _: Longest())(theirs, model)


class Longest(ours.Weighting):
    def forward(self, gramian: Tensor) -> Tensor:
        return gramian.diagonal() / gramian.trace()


def of_two_batches(name: str, *arguments: Any) -> Row:
    """A weighting of the inner products of two batches' gradients: here, of half a batch each."""

    def theirs_step(aggregation: Any, model: nn.Module) -> Step:
        weighting = getattr(aggregation, name)(*arguments)

        def step(model: nn.Module, losses: Tensor) -> None:
            parameters = list(model.parameters())
            rows = [torchjd("autojac").jac(half, parameters) for half in model.halves()]  # type: ignore[operator]
            one, two = (torch.cat([row.flatten(1) for row in mine], 1) for mine in rows)
            losses.backward(weighting(one @ two.T))

        return step

    def ours_step(model: nn.Module) -> Step:
        weighting = getattr(ours, name)(*arguments)

        def step(model: nn.Module, losses: Tensor) -> None:
            one, two = (gramjd.jac(half, model) for half in model.halves())  # type: ignore[operator]
            losses.backward(weighting(one.cross(two)))

        return step

    shown = f"`losses.backward({name}()(J1.cross(J2)))`"
    return Row(
        "aggregation", name, shown, "with `J1`, `J2` from `gramjd.jac` or an `Engine`", theirs_step, ours_step
    )


def their_excess(aggregation: Any, model: nn.Module) -> Step:
    weighting = aggregation.ExcessMTLWeighting()

    def step(model: nn.Module, losses: Tensor) -> None:
        rows = torchjd("autojac").jac(losses, list(model.parameters()), retain_graph=True)
        losses.backward(weighting(torch.cat([row.flatten(1) for row in rows], 1)))

    return step


def excess(model: nn.Module) -> Step:
    weighting = ours.ExcessMTLWeighting()

    def step(model: nn.Module, losses: Tensor) -> None:
        J = gramjd.jac(losses, model)
        J.backward(weighting(parameter_rows(J)))

    return step


def aggregated(aggregator: Callable[[Any], Any]) -> Callable[[nn.Module], Step]:
    def step(model: nn.Module, losses: Tensor) -> None:
        parameters = list(model.parameters())
        for p, g in zip(parameters, aggregator(gramjd.jac(losses, parameters)), strict=True):
            p.grad = g

    return lambda model: step


def preferred() -> Tensor:
    return torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)


FRANK_WOLFE = (
    "equal to TorchJD's with `epsilon=1e-12, max_iters=10_000`; with its defaults, parameters differ by 2e-3"
)
CONIC = "equal for `c=0.0`; for `c=0.5`, parameters differ by 2e-5 (TorchJD's conic solver)"
LEAST_SQUARES = "equal for `alpha=0.0`; else parameters differ by up to 1.2e-9 (TorchJD's least squares)"
INPUTS = "does not fill `.jac`; with `inputs=params`: `backward(losses, weighting, params, inputs=params)`"
NASH = "equal to TorchJD's with `optim_niter=100`"
ROWS_OF_PARAMETERS = "forms the rows of one parameter at a time"

ROWS = [
    Row("autogram", "Engine", "`Engine`", "generalized Gramians by default; `[m, m]` with `flat=True`",
        by_autogram(lambda module: module.UPGradWeighting(), 0), by_engine(ours.UPGradWeighting, 0),
        losses=0, needs=("quadprog",), batch_dim=0),
    Row("autojac", "backward", "`gramjd.backward(losses, weighting)`", INPUTS,
        by_autojac(lambda module: module.UPGrad()), by_backward(ours.UPGradWeighting), needs=("quadprog",)),
    Row("autojac", "jac", "`gramjd.jac(outputs, inputs)`", "lazy; `.dense()` for the rows",
        of_rows, of_lazy, needs=("quadprog",)),
    Row("autojac", "jac_to_grad", "`J.backward(weighting(J.gramian()))`",
        "with `J = gramjd.jac(outputs, inputs)`",
        by_autojac(lambda module: module.UPGrad()), of_lazy, needs=("quadprog",)),
    Row("autojac", "mtl_backward", "`gramjd.mtl_backward(losses, features, weighting)`",
        "raises an error if a loss depends on the encoder outside of the features",
        heads_and_trunk, our_heads_and_trunk,
        needs=("quadprog",)),
    Row("aggregation", "Aggregator", "a function of `gramjd.jac(losses, model).dense()`", "",
        sign_of_mean, our_sign_of_mean),
    Row("aggregation", "WeightedAggregator", "`gramjd.backward(losses, weighting)`", "",
        by_autojac(lambda module: module.WeightedAggregator(module.MeanWeighting())),
        by_backward(ours.MeanWeighting)),
    Row("aggregation", "GramianWeightedAggregator", "`gramjd.backward(losses, weighting)`", "",
        by_autojac(lambda module: module.GramianWeightedAggregator(module.MGDAWeighting())),
        by_backward(ours.MGDAWeighting), losses=2),
    Row("aggregation", "Weighting", "`weighting.Weighting`", "or any function of a Gramian",
        first_half, by_engine(Longest)),
    *both("UPGrad", "", needs=("quadprog",)),
    *both("DualProj", "", needs=("quadprog",)),
    *both("MGDA", "", theirs=(1e-12, 10_000), note=FRANK_WOLFE),
    *both("CAGrad", "c", 0.0, needs=("cvxpy", "clarabel"), note=CONIC),
    *both("FairGrad", "alpha", 0.0, needs=("scipy",), note=LEAST_SQUARES),
    *both("IMTLG"),
    *both("AlignedMTL"),
    *both("PCGrad"),
    *both("GradVac"),
    *both("Krum", "n_byzantine, n_selected", 1, 2),
    *both("Random"),
    *both("Mean"),
    *both("Sum"),
    *both("Constant", "w", preferred()),
    of_aggregator("NashMTL", "n_tasks", 4, theirs=(1.0, 1, 100), needs=("cvxpy", "ecos"), note=NASH),
    Row("aggregation", "CRMOGMWeighting", "`weighting.CRMOGMWeighting(weighting)`", "",
        by_autogram(lambda module: module.CRMOGMWeighting(module.IMTLGWeighting())),
        by_engine(lambda: ours.CRMOGMWeighting(ours.IMTLGWeighting()))),
    of_aggregator("ConFIG", ""),
    *both("PCD"),
    Row("aggregation", "ExcessMTL", "`J.backward(ExcessMTLWeighting()(parameter_rows(J)))`",
        ROWS_OF_PARAMETERS, by_autojac(lambda module: module.ExcessMTL()), excess),
    Row("aggregation", "ExcessMTLWeighting", "`weighting.ExcessMTLWeighting()`",
        "takes `gramjd.aggregation.parameter_rows(J)`, or a matrix `J` as in TorchJD", their_excess, excess),
    of_two_batches("MoDoWeighting"),
    of_two_batches("SDMGradWeighting"),
    Row("aggregation", "GradDrop", "`gramjd.aggregation.graddrop(J)`", ROWS_OF_PARAMETERS,
        by_autojac(lambda module: module.GradDrop()), aggregated(graddrop)),
    Row("aggregation", "TrimmedMean", "`gramjd.aggregation.trimmed_mean(J, trim_number)`", ROWS_OF_PARAMETERS,
        by_autojac(lambda module: module.TrimmedMean(1)), aggregated(lambda J: trimmed_mean(J, 1))),
]  # fmt: skip


def run(row: Row, make: Callable[[nn.Module], Step]) -> Tensor:
    """The parameters after three steps of SGD; each step draws the same random numbers in both libraries."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    x, y = torch.randn(8, 3).double(), 3 * torch.randn(8, 4).double()
    model.x = x
    model.of = lambda out: (out - y).square().mean(0)
    model.halves = lambda: [(model(x[h]) - y[h]).square().mean(0) for h in (slice(4), slice(4, 8))]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = make(model)
    for seed in range(3):
        out = model(x)
        losses = (out - y).square().sum(1) if row.batch_dim == 0 else model.of(out)[: row.losses]
        torch.manual_seed(seed)
        step(model, losses)
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


TESTED = [row for row in ROWS if row.theirs_step is not None]


@pytest.mark.parametrize("row", TESTED, ids=lambda row: row.name)
def test_a_training_run(row: Row) -> None:
    for package in ("torchjd", *row.needs):
        pytest.importorskip(package)
    assert row.theirs_step is not None and row.ours_step is not None
    make_theirs, make_ours = row.theirs_step, row.ours_step
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, of solvers
        want = run(row, lambda model: make_theirs(torchjd(row.package), model))
    got = run(row, make_ours)
    assert not torch.equal(want, run(row, lambda model: lambda *_: None))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "arguments", "apart", "needs"),
    [
        ("MGDA", (), (1e-4, 1e-2), ()),
        ("CAGrad", (0.5,), (1e-9, 1e-4), ("cvxpy", "clarabel")),
        ("FairGrad", (1.0,), (0, 1e-8), ("scipy",)),
    ],
)
def test_how_far_their_solvers_are_off(
    name: str, arguments: tuple[float, ...], apart: tuple[float, float], needs: tuple[str, ...]
) -> None:
    """What the notes of the page say; that ours is the better solution is for the tests of weightings."""
    for package in ("torchjd", *needs):
        pytest.importorskip(package)
    row = of_aggregator(name, "", *arguments)
    assert row.theirs_step is not None and row.ours_step is not None
    make_theirs = row.theirs_step
    want = run(row, lambda model: make_theirs(torchjd("aggregation"), model))
    assert apart[0] <= float((run(row, row.ours_step) - want).abs().max()) <= apart[1]


def test_the_losses_are_in_conflict() -> None:
    """Or else all weightings but the degenerate would do the same."""
    seen = []

    def look(gramian: Tensor) -> Tensor:
        seen.append(gramian)
        return ours.mean(gramian)

    for row in (ROWS[0], ROWS[1]):
        seen.clear()
        run(row, by_engine(lambda: look, row.batch_dim))
        assert float(seen[0].min()) < 0


@pytest.mark.parametrize("name", ["UW", "FAMO", "DWA", "STCH", "Mean"])
def test_a_scalarizer_with_our_engine(name: str) -> None:
    """It balances the losses of each sample, a weighting the samples: as by the definition."""
    pytest.importorskip("torchjd")
    scalarization = torchjd("scalarization")
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    balance = getattr(scalarization, name)(*([] if name == "Mean" else [2])).double()
    engine = gramjd.Engine(model, batch_dim=0)
    leaves = [p for p in (*model.parameters(), *balance.parameters()) if p.requires_grad]
    optimizer = torch.optim.SGD(leaves, lr=0.05)
    for _ in range(3):
        losses = (model(torch.randn(6, 3).double()) - torch.randn(6, 2).double()).square() + 0.1
        objectives = torch.stack([balance(each) for each in losses])
        each = [torch.autograd.grad(o, list(model.parameters()), retain_graph=True) for o in objectives]
        rows = torch.stack([torch.cat([g.flatten() for g in mine]) for mine in each])
        want = ours.upgrad(rows @ rows.T)
        gradients = torch.autograd.grad(objectives, leaves, want, retain_graph=True, allow_unused=True)
        optimizer.zero_grad()
        weights = engine.backward(objectives, ours.UPGradWeighting())
        torch.testing.assert_close(weights, want, rtol=1e-8, atol=1e-10)
        for p, g in zip(leaves, gradients, strict=True):
            assert (p.grad is None) == (g is None)
            torch.testing.assert_close(p.grad, g, rtol=1e-8, atol=1e-10)
        optimizer.step()


def test_every_public_name_has_its_row() -> None:
    pytest.importorskip("torchjd")
    public = {(package, name) for package in PACKAGES for name in torchjd(package).__all__}
    listed = [(row.package, row.name) for row in ROWS]
    assert sorted(listed) == sorted(public)
    assert all(row.note for row in ROWS if not row.ours)


def table() -> str:
    lines = ["| `torchjd.` | gramjd | |", "|---|---|---|"]
    for row in ROWS:
        lines.append(f"| `{row.package}.{row.name}` | {row.ours or '–'} | {row.note} |")
    return "\n".join(lines) + "\n"


def test_the_page_shows_this_table() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text[text.index(START) + len(START) : text.index(END)] == table()


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    before, after = page[: page.index(START) + len(START)], page[page.index(END) :]
    PAGE.write_text(before + table() + after, encoding="utf-8")
