"""Sketched Gramians from every face, and how far off they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import gramjd
from gramjd import Engine, NotFiniteError, Projection, SketchedGramian


class Work:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        self.x, self.y = torch.randn(30, 6, dtype=torch.float64), torch.randint(0, 3, (30,))
        self.criterion = nn.CrossEntropyLoss(reduction="none")
        self.func, self.params = gramjd.functional_loss(self.model, self.criterion)
        self.jac = gramjd.jacobian(self.func)(self.params, self.x, self.y)

    @property
    def losses(self) -> Tensor:
        found: Tensor = self.criterion(self.model(self.x), self.y)
        return found


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "countsketch", "factored"])
def test_faces(work: Work, kind: str) -> None:
    """All give the products of the same sketch, without a graph."""
    given = Projection(16, seed=3, kind=kind)
    rows = work.jac.sketch(16, seed=3, kind=kind)
    engine = Engine(work.model, batch_dim=0)
    transform = gramjd.gramian(work.func, sketch=given)
    with_value = gramjd.gramian_and_value(work.func, sketch=given)(work.params, work.x, work.y)
    found = [
        work.jac.gramian(sketch=given),
        transform(work.params, work.x, work.y),
        with_value[0],
        engine.compute_gramian(work.losses, sketch=given),
        engine.compute_gramian(work.losses, sketch=given, flat=True),
    ]
    torch.testing.assert_close(with_value[1], work.losses.detach())
    for gramian in found:
        assert isinstance(gramian, SketchedGramian) and gramian.error == given.error
        assert gramian.shape == (30, 30) and not gramian.sketch.requires_grad
        torch.testing.assert_close(gramian.sketch, rows.detach())
    assert torch.equal(work.jac.gramian(sketch=16).sketch, work.jac.sketch(16, kind="countsketch"))


def test_shapes(work: Work) -> None:
    """Several outputs for each sample, and a batch dimension that is not the first."""
    outputs = gramjd.functional_loss(work.model)[0]
    found = gramjd.gramian(outputs, sketch=7)(work.params, work.x)
    assert found.shape == (30, 3, 3, 30)
    engine = Engine(work.model, batch_dim=1)
    other = engine.compute_gramian(work.model(work.x).mT, sketch=7)
    assert other.shape == (3, 30, 30, 3)
    torch.testing.assert_close(other.sketch, found.sketch.transpose(0, 1))
    flat = engine.compute_gramian(work.model(work.x).mT, sketch=7, flat=True)
    assert flat.shape == (90, 90)
    torch.testing.assert_close(flat.sketch, other.sketch.reshape(90, 7))


@pytest.mark.parametrize("order", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_two_precisions(order: tuple[torch.dtype, torch.dtype]) -> None:
    """Regions come one after the other; the sum is as precise as the most precise of them."""
    torch.manual_seed(0)
    first, last = nn.Linear(5, 4, dtype=order[0]), nn.Linear(4, 2, dtype=order[1])
    x = torch.randn(12, 5)

    def losses() -> Tensor:
        return last(torch.tanh(first(x.to(order[0]))).to(order[1])).square().sum(1)

    engine = Engine(first, last, batch_dim=0)
    found = engine.compute_gramian(losses(), sketch=64).sketch
    assert found.dtype == torch.float64
    want = engine.jacobian(losses()).sketch(64, kind="countsketch")
    torch.testing.assert_close(found, want, check_dtype=False, rtol=1e-5, atol=1e-6)


def test_groups(work: Work) -> None:
    """The sketches of groups of parameters add up to that of all."""
    found = work.jac.gramian("parameter", sketch=9)
    assert list(found) == work.jac.names
    torch.testing.assert_close(sum(g.sketch for g in found.values()), work.jac.gramian(sketch=9).sketch)
    one = work.jac.select(["0.weight"]).sketch(9, kind="countsketch")
    torch.testing.assert_close(found["0.weight"].sketch, one)


@pytest.mark.parametrize(
    ("kind", "dim"),
    [("rademacher", 32), ("gaussian", 32), ("countsketch", 32), ("factored", 36), ("factored", 24)],
)
def test_error(work: Work, kind: str, dim: int) -> None:
    """The standard deviation of no entry is above what is stated, and of some not far below; no bias."""
    want = work.jac.gramian()
    lengths = want.diagonal().sqrt()
    seeds = [work.jac.gramian(sketch=Projection(dim, seed, kind)) for seed in range(200)]
    relative = torch.stack([(g.dense() - want) / lengths / lengths[:, None] for g in seeds])
    spread = relative.square().mean(0).sqrt()
    stated = seeds[0].error
    assert stated is not None
    assert float(spread.max()) <= 1.3 * stated  # 200 seeds tell a standard deviation to some 10%
    assert float(spread.max()) >= 0.15 * stated
    assert float((relative.mean(0).abs() / (spread / 200**0.5)).max()) < 6


def test_a_step(work: Work) -> None:
    """A weighting's weights from a sketch, and the gradients that they make, in both faces."""
    gramian = work.jac.gramian(sketch=20)
    weights = gramjd.weighting.upgrad(gramian)
    want = gramjd.weighting.upgrad(gramian.dense())
    torch.testing.assert_close(weights, want, rtol=0, atol=1e-8)
    jac = Engine(work.model, batch_dim=0).jacobian(work.losses)
    jac.backward(gramjd.weighting.upgrad(jac.gramian(sketch=20)))
    found = {name: p.grad for name, p in work.model.named_parameters()}
    torch.testing.assert_close(found, dict(work.jac.vjp(weights)))


def test_refused(work: Work) -> None:
    with pytest.raises(ValueError, match="positive integer"):
        work.jac.gramian(sketch=0)
    with pytest.raises(ValueError, match="accumulate_dtype"):
        work.jac.gramian(sketch=4, accumulate_dtype=torch.float64)
    with pytest.raises(ValueError, match="of one process"):
        work.jac.gramian(sketch=4, group=object())
    engine = Engine(work.model, batch_dim=0)
    with pytest.raises(ValueError, match="leave group out"):
        engine.compute_gramian(work.losses, sketch=4, group=object())
    two = gramjd.jacobian(lambda p, x, y: (work.func(p, x, y), work.func(p, x, y) ** 2))
    with pytest.raises(ValueError, match=r"of one output tensor"):
        two(work.params, work.x, work.y).gramian(sketch=4)
    work.x[3] = torch.inf
    with pytest.raises(NotFiniteError, match="NaN or infinite"):
        engine.compute_gramian(work.losses, sketch=4)


@pytest.mark.parametrize("kind", ["rademacher", "countsketch", "factored"])
def test_steps(work: Work, kind: str) -> None:
    """Whose data move, with a projection that changes midway."""
    engine, jacobian = Engine(work.model, batch_dim=0), gramjd.jacobian(work.func)
    generator = torch.Generator().manual_seed(1)
    for step in range(12):
        given = Projection(16, seed=int(step in (7, 8)), kind=kind)
        work.x = torch.randn(30, 6, dtype=torch.float64, generator=generator)
        J = jacobian(work.params, work.x, work.y)
        want = J.sketch(16, seed=given.seed, kind=kind, memory_budget=2**30)  # never prepared
        found = engine.compute_gramian(work.losses, sketch=given).sketch
        torch.testing.assert_close(found, want)
        torch.testing.assert_close(J.sketch(16, seed=given.seed, kind=kind), want)


@pytest.mark.parametrize("kind", ["countsketch", "factored"])
def test_parameters_of_one_shape(kind: str) -> None:
    """Their ops differ by the names that random numbers depend on."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(5, 5) for _ in range(3))).double()
    engine, given = Engine(model, batch_dim=0), Projection(16, kind=kind)
    for _ in range(8):
        losses = model(torch.randn(7, 5, dtype=torch.float64)).square().sum(1)
        want = engine.jacobian(losses).sketch(16, kind=kind, memory_budget=2**30)
        torch.testing.assert_close(engine.compute_gramian(losses, sketch=given).sketch, want)


@pytest.mark.parametrize("dim", [3, 8, 16, 50])
@pytest.mark.parametrize(("start", "stop"), [(0, 50), (5, 37), (20, 31), (16, 32)])
def test_ranges(dim: int, start: int, stop: int) -> None:
    """Entries go to the same columns, in runs or one by one."""
    given, cpu = Projection(dim, kind="countsketch"), torch.device("cpu")
    found, signs = given.places("a", start, stop, cpu, torch.float64, False)
    columns = given.columns_of(("a",), start, stop, cpu, False)
    if isinstance(found, Tensor):
        assert stop - start > 4 * dim and torch.equal(found, columns)
    else:
        each = [torch.arange(column, column + end - begin) for begin, end, column in found]
        assert torch.equal(torch.cat(each), columns)
    assert torch.equal(signs.abs(), torch.full((stop - start,), dim**0.5, dtype=torch.float64))
