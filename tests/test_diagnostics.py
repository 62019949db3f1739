"""Diagnostics: numbers against dense Jacobians, figures without a display, a monitored run."""

from __future__ import annotations

import subprocess
import sys
from math import isnan, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_close, dense_jacobian
from torch import Tensor, nn

import gramjd
from gramjd import Engine, Jacobian, diagnostics
from gramjd.weighting import upgrad

B, D, CLASSES = 12, 4, 3
LABELS = torch.arange(B) % CLASSES


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()


@pytest.fixture
def jacobian(model: nn.Module) -> Jacobian:
    x = torch.randn(B, D, dtype=torch.float64)
    engine = Engine(model, batch_dim=0)
    return engine.jacobian(nn.functional.cross_entropy(model(x), LABELS, reduction="none"))


def dense(jacobian: Jacobian) -> Tensor:
    return torch.cat([rows.flatten(1) for rows in jacobian.dense().values()], 1)


# Numbers.


def test_numbers_of_a_jacobian(jacobian: Jacobian) -> None:
    J = dense(jacobian)
    unit = J / J.norm(dim=1, keepdim=True)
    for source in (jacobian, jacobian.gramian()):
        assert_close(diagnostics.norms(source), J.norm(dim=1))
        assert_close(diagnostics.cosines(source), unit @ unit.T)
        assert_close(diagnostics.spectrum(source), torch.linalg.svdvals(J).square(), 1e-9)
        conflicting = [[float(a @ b) < 0 for b in J] for a in J]
        want = torch.tensor(conflicting).double().sum(1) / (B - 1)
        assert_close(diagnostics.conflicts(source), want)
        assert diagnostics.conflict_rate(source) == pytest.approx(float(want.mean()))
        w = torch.rand(B, dtype=torch.float64)
        step, mean = J.T @ w, J.mean(0)
        assert_close(diagnostics.descent(source, w), unit @ step / step.norm())
        cosine = step @ mean / step.norm() / mean.norm()
        assert diagnostics.angle(source, w) == pytest.approx(float(cosine.acos().rad2deg()))
        assert diagnostics.angle(source, w, -w) == pytest.approx(180, abs=1e-5)
        merged, names = diagnostics.merged(source, LABELS)
        means = torch.stack([J[label == LABELS].mean(0) for label in range(CLASSES)])
        assert_close(merged, means @ means.T)
        assert names == [0, 1, 2]


def test_layers(jacobian: Jacobian) -> None:
    """Sorted by module; the Gramians of all layers add up to the whole."""
    values, names, pairs = diagnostics.layers(jacobian)
    assert names == ["0", "2"] and len(pairs) == B * (B - 1) // 2 and values.shape == (2, len(pairs))
    rows = jacobian.dense()
    first = torch.cat([rows["0.weight"].flatten(1), rows["0.bias"]], 1)
    i, j = pairs[7]
    assert_close(values[0, 7], torch.nn.functional.cosine_similarity(first[i], first[j], 0))
    values, names, pairs = diagnostics.layers(jacobian, ["xyz"[n] for n in LABELS], per="parameter")
    assert names == ["0.bias", "0.weight", "2.bias", "2.weight"]
    assert pairs == [("x", "y"), ("x", "z"), ("y", "z")]
    means = torch.stack([rows["2.bias"][label == LABELS].mean(0) for label in range(CLASSES)])
    assert_close(values[2, 1], torch.nn.functional.cosine_similarity(means[0], means[2], 0))


def test_layers_without_a_gradient() -> None:
    """Heads of tasks: the other's gradient there is zero, and no cosine is known."""
    model = nn.ModuleDict({"trunk": nn.Linear(3, 2), "a": nn.Linear(2, 1), "b": nn.Linear(2, 1)})
    engine = Engine(model, batch_dim=None)
    h = model["trunk"](torch.randn(3))
    tasks = torch.cat([model["a"](h), model["b"](h)])
    jacobian = engine.jacobian(tasks)
    values, names, pairs = diagnostics.layers(jacobian)
    assert names == ["a", "b", "trunk"] and pairs == [(0, 1)]
    assert values.isnan().flatten().tolist() == [True, True, False]
    values, names, _ = diagnostics.layers(jacobian, per=model)  # in its own order
    assert names == ["trunk", "a", "b"]
    assert values.isnan().flatten().tolist() == [False, True, True]
    _, names, _ = diagnostics.layers(jacobian.select(["b.weight", "trunk.bias"]), per=model)
    assert names == ["trunk", "b"]


def test_outliers() -> None:
    rows = torch.eye(20) * torch.tensor([1.0] * 8 + [1.1] * 8 + [1.2, 0.0, 50.0, 9.0])
    assert diagnostics.outliers(rows @ rows.T).tolist() == [18, 19]
    assert diagnostics.outliers(torch.eye(5)).tolist() == []
    assert diagnostics.outliers(rows @ rows.T, whisker=1000).tolist() == []


def test_effective_rank() -> None:
    assert diagnostics.effective_rank(torch.eye(6)) == pytest.approx(6)
    assert diagnostics.effective_rank(torch.ones(6, 6)) == pytest.approx(1)
    assert diagnostics.effective_rank(torch.zeros(6, 6)) == 0


def test_gradients_of_zero() -> None:
    G = torch.zeros(3, 3)
    G[0, 0] = 4
    assert diagnostics.cosines(G).tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert diagnostics.conflict_rate(G) == 0
    assert diagnostics.descent(G, torch.ones(3)).tolist() == [1, 0, 0]
    assert isnan(diagnostics.angle(G, torch.tensor([0.0, 1.0, 0.0])))


def test_generalized_gramians_are_numbered_as_the_flat_output(model: nn.Module) -> None:
    x = torch.randn(B, D, dtype=torch.float64)
    engine = Engine(model, batch_dim=0)
    out = model(x)
    J, gramian = dense_jacobian(out, model.parameters()), engine.compute_gramian(out)
    unit = J / J.norm(dim=1, keepdim=True)
    assert_close(diagnostics.cosines(gramian), unit @ unit.T)
    w = torch.rand_like(out)
    step = J.T @ w.detach().flatten()
    assert_close(diagnostics.descent(gramian, w), unit @ step / step.norm())


def test_upgrad_raises_no_objective() -> None:
    rows = torch.randn(5, 40, dtype=torch.float64)
    rows[1] -= 0.9 * rows[0]
    G = rows @ rows.T
    assert diagnostics.descent(G, torch.tensor([1.0, 5, 0, 0, 0])).min() < -0.1
    assert diagnostics.descent(G, upgrad(G)).min() > -1e-3


def test_orders() -> None:
    """By labels, stably; by similarity: two bundles of gradients come apart."""
    G = torch.eye(4)
    assert diagnostics.ordering(G, ["b", "a", "b", "a"]).tolist() == [1, 3, 0, 2]
    assert diagnostics.ordering(torch.eye(2)).tolist() == [0, 1]
    pytest.importorskip("scipy")
    bundle = torch.randint(0, 2, (30,))
    rows = torch.randn(2, 50)[bundle] + 0.3 * torch.randn(30, 50)
    order = diagnostics.ordering(rows @ rows.T)
    assert sorted(order.tolist()) == list(range(30))
    assert int((bundle[order].diff() != 0).sum()) == 1


def test_errors(jacobian: Jacobian) -> None:
    G = torch.eye(3)
    for wrong in (torch.randn(3, 4), torch.randn(3, 2, 3), torch.eye(3) * nan, torch.randn(3, 3)):
        with pytest.raises(ValueError, match="Gramian"):
            diagnostics.cosines(wrong)
    with pytest.raises(TypeError, match="not of a list"):
        diagnostics.norms([[1.0]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="of a Jacobian"):
        diagnostics.layers(G)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="single objective"):
        diagnostics.conflict_rate(torch.ones(1, 1))
    with pytest.raises(ValueError, match="one weight for each of the 3"):
        diagnostics.descent(G, torch.ones(2))
    with pytest.raises(ValueError, match="one label for each of the 3"):
        diagnostics.merged(G, [1, 2])
    with pytest.raises(ValueError, match="no pair"):
        diagnostics.layers(jacobian, ["same"] * B)
    two = gramjd.jacobian(lambda w, x: (w @ x, w.sum()))(torch.randn(3), torch.randn(2, 3))
    for function in (diagnostics.cosines, diagnostics.norms):
        with pytest.raises(ValueError, match="has several"):
            function(two)


def test_outputs_in_a_container() -> None:
    found = gramjd.jacobian(lambda w, x: {"loss": w @ x})(torch.ones(3), torch.eye(3))
    assert_close(diagnostics.norms(found), diagnostics.norms(found.gramian()["loss"]["loss"]))


def test_imports_without_matplotlib() -> None:
    """Numbers need nothing but torch; a figure says what to install."""
    code = """
import sys
sys.modules["matplotlib"] = sys.modules["matplotlib.figure"] = sys.modules["scipy"] = None
import torch
from gramjd import diagnostics
assert diagnostics.conflict_rate(torch.eye(2)) == 0
for function in (diagnostics.plot_spectrum, diagnostics.ordering):
    try:
        function(torch.eye(3))
    except ImportError as error:
        assert "gramjd[plot]" in str(error)
    else:
        raise AssertionError(function)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# Figures.


def figures(jacobian: Jacobian) -> dict[str, Any]:
    G = jacobian.gramian()
    weights = [torch.rand(B) for _ in range(5)]
    steps, series = list(range(5)), [0.5, 0.4, 0.2, 0.1, 0.3]
    tasks = [w[:3] for w in weights]
    d = diagnostics
    return {
        "similarity": lambda ax: d.plot_similarity(G, ax=ax),
        "similarity by label": lambda ax: d.plot_similarity(jacobian, labels=LABELS, ax=ax),
        "similarity by cluster": lambda ax: d.plot_similarity(G, cluster=True, ax=ax),
        "similarity of one": lambda ax: d.plot_similarity(G[:1, :1], ax=ax),
        "layers": lambda ax: d.plot_layers(jacobian, ax=ax),
        "layers by label": lambda ax: d.plot_layers(jacobian, labels=LABELS, per="parameter", ax=ax),
        "norms": lambda ax: d.plot_norms(jacobian, labels=LABELS, whisker=0.1, ax=ax),
        "equal norms": lambda ax: d.plot_norms(torch.eye(3), ax=ax),
        "spectrum": lambda ax: d.plot_spectrum(G, ax=ax),
        "spectrum of zero": lambda ax: d.plot_spectrum(torch.zeros(3, 3), ax=ax),
        "descent": lambda ax: d.plot_descent(G, upgrad(G), ax=ax),
        "weights": lambda ax: d.plot_weights(steps, weights, ax=ax),
        "weights of tasks": lambda ax: d.plot_weights(steps, torch.stack(tasks), names="abc", ax=ax),
        "history": lambda ax: d.plot_history(steps, series, ylabel="conflict rate", ax=ax),
        "histories": lambda ax: d.plot_history(steps, {"SGD": series, "UPGrad": series[::-1]}, ax=ax),
    }


def test_figures(jacobian: Jacobian, tmp_path: Path) -> None:
    """On axes of one's own or of their own, without a display, and saved as a picture."""
    figure = pytest.importorskip("matplotlib.figure")
    for name, draw in figures(jacobian).items():
        given = figure.Figure(layout="constrained").add_subplot()
        assert draw(given) is given and given.has_data()
        ax = draw(None)
        ax.figure.savefig(tmp_path / name)
        assert (tmp_path / f"{name}.png").stat().st_size > 2000
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_what_figures_say(jacobian: Jacobian) -> None:
    pytest.importorskip("matplotlib")
    G = jacobian.gramian()
    ax = diagnostics.plot_similarity(jacobian, labels=LABELS)
    assert f"{diagnostics.conflict_rate(G):.0%}" in ax.get_title()
    shown = torch.tensor(ax.images[0].get_array().data)
    order = LABELS.argsort(stable=True)
    assert_close(shown, diagnostics.cosines(G)[order][:, order])
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "1", "2"]
    ax = diagnostics.plot_norms(torch.diag(torch.tensor([1.0] * 10 + [100.0])), labels="aaaaaaaaaab")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["10 others", "1 outlier: 10 (b)"]
    assert sum(bar.get_height() for bars in ax.containers for bar in bars) == 11
    ax.figure.draw_without_rendering()
    assert ax.get_legend().get_window_extent().y0 > ax.get_window_extent().y1 - 1  # it covers no bar
    G = torch.tensor([[1.0, -2], [-2, 9]])
    labels = [text.get_text() for text in diagnostics.plot_descent(G, upgrad(G)).get_legend().get_texts()]
    assert labels == ["mean gradient: raises 1", "step: raises 0"]
    with pytest.raises(ValueError, match="not by both"):
        diagnostics.plot_similarity(G, labels=[0, 1], cluster=True)


@pytest.mark.parametrize(
    ("count", "ticks", "label"), [(10, 45, ""), (12, 0, "66 pairs, from 0, 1 to 10, 11")]
)
def test_pairs_of_many_labels(count: int, ticks: int, label: str) -> None:
    """Up to sixty pairs are named one by one, of more the first and the last."""
    pytest.importorskip("matplotlib")
    net = nn.Linear(3, 2)
    engine = Engine(net, batch_dim=0)
    ax = diagnostics.plot_layers(engine.jacobian(net(torch.randn(count, 3)).square().sum(1)))
    shown = [text.get_text() for text in ax.get_xticklabels()]
    assert len(shown) == ticks and ax.get_xlabel() == label
    assert not shown or shown[-1] == "8, 9"


# The monitor.


class Log:
    """What a ``SummaryWriter`` would have written."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []
        self.figures: list[tuple[str, int]] = []

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.scalars.append((tag, scalar_value, global_step))

    def add_figure(self, tag: str, figure: Any, global_step: int) -> None:
        figure.canvas.draw()
        self.figures.append((tag, global_step))


@pytest.mark.parametrize("whole", [True, False])
def test_monitor(jacobian: Jacobian, model: nn.Module, whole: bool) -> None:
    """From a Jacobian, or from a Gramian that is there already, with the Jacobian for its layers."""
    pytest.importorskip("matplotlib")
    log = Log()
    monitor = diagnostics.Monitor(log, scalars=2, figures=lambda step: step == 3, prefix="g/", per=model)
    G = jacobian.gramian()
    w = upgrad(G)
    for step in range(5):
        if whole:
            monitor.log(step, jacobian, w, labels=LABELS)
        else:
            monitor.log(step, G, w, labels=LABELS, jacobian=jacobian)
    assert monitor.steps == [0, 2, 4] and len(monitor.weights) == 3
    assert {tag for tag, _, _ in log.scalars} == {f"g/{name}" for name in monitor.history}
    assert ("g/conflict_rate", diagnostics.conflict_rate(G), 4) in log.scalars
    assert monitor.history["angle_to_mean"] == [diagnostics.angle(G, w)] * 3
    assert monitor.history["least_descent"][0] == float(diagnostics.descent(G, w).min())
    drawn = ["similarity", "norms", "spectrum", "layers", "descent", "weights"]
    assert log.figures == [(f"g/{name}", 3) for name in drawn]


def test_monitor_of_other_sources(jacobian: Jacobian) -> None:
    """A Gramian of one objective; a batch of one label; batches of several sizes."""
    pytest.importorskip("matplotlib")
    log = Log()
    monitor = diagnostics.Monitor(log, figures=1)
    monitor.log(0, torch.ones(1, 1))
    assert set(monitor.history) == {"effective_rank", "mean_norm", "largest_norm", "outliers"}
    monitor = diagnostics.Monitor(log, figures=1)
    log.figures.clear()
    monitor.log(0, jacobian, torch.ones(B), labels=[0] * B)
    monitor.log(1, jacobian.gramian()[:4, :4], torch.ones(4))
    assert [tag for tag, step in log.figures if step == 1][-1] == "gradients/descent"
    assert "gradients/layers" not in [tag for tag, _ in log.figures]


def test_monitor_without_a_writer_or_matplotlib() -> None:
    monitor = diagnostics.Monitor()
    assert repr(monitor) == "Monitor(steps=0, numbers=[], scalars=1, figures=None, writer=None)"
    monitor.log(7, torch.eye(3))
    assert repr(monitor).startswith("Monitor(steps=1, last=7, numbers=['conflict_rate', 'effective_rank', ")
    assert monitor.steps == [7] and monitor.history["effective_rank"] == [pytest.approx(3)]
    with pytest.raises(ValueError, match="every step or at none"):
        monitor.log(8, torch.eye(3), torch.ones(3))
    for wrong in ({"scalars": 0}, {"figures": 1}):
        with pytest.raises(ValueError, match=r"positive number|to a writer"):
            diagnostics.Monitor(**wrong)  # type: ignore[arg-type]
