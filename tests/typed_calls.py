"""What type checkers say of calls, which is also what the calls return; mypy reads it, a test runs it."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Concatenate, get_args, get_origin

import torch
from torch import Tensor, nn
from torch.func import functional_call

import gramjd
from gramjd import Engine, Jacobian, SketchedGramian
from gramjd import weighting as weightings

if TYPE_CHECKING:
    from typing_extensions import assert_type
else:

    def assert_type(value: Any, kind: Any) -> Any:
        """The same at run time, also of what containers hold."""
        outer, inner = get_origin(kind) or kind, get_args(kind)
        assert isinstance(value, outer), f"{type(value)} is no {kind}"
        if outer in (dict, list) or inner[1:] == (...,):
            for each in value.values() if outer is dict else value:
                assert_type(each, inner[outer is dict])
        elif outer is tuple:
            assert all(assert_type(*pair) is pair[0] for pair in zip(value, inner, strict=True))
        return value


Named = dict[str, Tensor]
PLAIN: list[weightings.Weighting] = [
    weightings.AlignedMTLWeighting(),
    weightings.CAGradWeighting(0.5),
    weightings.ConFIGWeighting(),
    weightings.ConstantWeighting(torch.ones(3)),
    weightings.CRMOGMWeighting(weightings.MeanWeighting()),
    weightings.DualProjWeighting(),
    weightings.FairGradWeighting(1.0),
    weightings.GradVacWeighting(),
    weightings.IMTLGWeighting(),
    weightings.KrumWeighting(0),
    weightings.MeanWeighting(),
    weightings.MGDAWeighting(),
    weightings.MoDoWeighting(),
    weightings.NashMTLWeighting(3),
    weightings.PCDWeighting(),
    weightings.PCGradWeighting(),
    weightings.RandomWeighting(),
    weightings.SDMGradWeighting(),
    weightings.SumWeighting(),
    weightings.UPGradWeighting(),
]


def of_weightings() -> None:
    gramian, sketched = torch.eye(3), SketchedGramian(torch.eye(3))
    for weighting in PLAIN:
        assert_type(weighting(gramian), Tensor)
    assert_type(weightings.GradVacWeighting()(gramian), Tensor)
    assert_type(weightings.UPGradWeighting()(sketched), Tensor)
    assert_type(weightings.DualProjWeighting()(sketched), Tensor)
    assert_type(weightings.MGDAWeighting()(sketched), Tensor)
    assert_type(weightings.CAGradWeighting(0.5)(sketched), Tensor)
    assert_type(weightings.ExcessMTLWeighting()(torch.ones(3, 2)), Tensor)
    assert_type((weightings.MeanWeighting() << (lambda rows: rows @ rows.T))(gramian), Tensor)
    if TYPE_CHECKING:  # an error without the comment, as mypy warns of comments that are not needed
        weightings.IMTLGWeighting()(sketched)  # type: ignore[arg-type]


def of_engines() -> None:
    model = nn.Linear(3, 1)
    weighting = weightings.UPGradWeighting()
    with Engine(model, batch_dim=0) as engine:

        def losses() -> Tensor:
            found: Tensor = model(torch.randn(4, 3)).squeeze(1).square()
            return found

        assert_type(engine.compute_gramian(losses()), Tensor)
        assert_type(engine.compute_gramian(losses(), flat=True), Tensor)
        assert_type(engine.compute_gramian(losses(), sketch=8), SketchedGramian)
        assert_type(engine.backward(losses(), weighting), Tensor)
        assert_type(engine.backward(losses(), weighting, per="parameter"), Named)
        jac = engine.jacobian(losses())
        if TYPE_CHECKING:
            assert_type(jac, Jacobian[Tensor, Named])
        weights = assert_type(weighting(assert_type(jac.gramian(), Tensor)), Tensor)
        assert_type(jac.gramian("parameter"), Named)
        assert_type(jac.gramian(sketch=8), SketchedGramian)
        assert_type(jac.gramian("parameter", sketch=8), dict[str, SketchedGramian])
        assert_type(jac.vjp(weights), Named)
        assert_type(jac.jvp(dict(model.named_parameters())), Tensor)
        assert_type(jac.dense(), Named)
        assert_type(jac.cross(jac), Tensor)
        assert_type(jac.norms(), Tensor)
        assert_type(jac.squared_norms(), Tensor)
        assert_type(jac.diagonal(), Tensor)
        assert_type(jac.sketch(8), Tensor)
        assert_type(jac.select("bias").vjp(weights), Named)
        assert_type(jac.to(dtype=torch.float64).gramian(), Tensor)
        assert_type(Jacobian.cat([jac, jac]).gramian(), Tensor)
        assert_type(jac @ jac.T, Tensor)


def of_steps() -> None:
    model = nn.Linear(3, 2)
    weighting = weightings.UPGradWeighting()

    def losses() -> Tensor:
        found: Tensor = model(torch.randn(4, 3)).square().mean(0)
        return found

    assert_type(gramjd.backward(losses(), weighting), Tensor)
    assert_type(gramjd.backward(losses(), weighting, model, per="parameter"), Named)
    assert_type(gramjd.jac(losses(), model).vjp(torch.ones(2)), Named)
    assert_type(gramjd.jac(losses(), model.weight).vjp(torch.ones(2)), Tensor)
    jac = gramjd.jac(losses(), [model.weight, model.bias])
    assert_type(jac.gramian(), Tensor)
    assert_type(jac.vjp(torch.ones(2)), tuple[Tensor, ...])
    assert_type(gramjd.jac(losses(), model.parameters()).vjp(torch.ones(2)), tuple[Tensor, ...])


def of_datasets() -> None:
    model = nn.Linear(3, 1)
    function, params = gramjd.functional_loss(model, nn.MSELoss())
    x, y, jac = torch.randn(4, 3), torch.ones(4, 1), gramjd.jacobian(function)
    queries, loader = jac(params, x, y), [(x, y)]

    def of_batch(batch: Any) -> Jacobian:
        return jac(params, *batch)

    assert_type(gramjd.similarity(x, x), Tensor)
    assert_type(gramjd.similarity(x, x, topk=2), gramjd.TopK)
    assert_type(gramjd.dataset_similarity(queries, of_batch, loader), Tensor)
    assert_type(gramjd.dataset_similarity(queries, of_batch, loader, topk=2), gramjd.TopK)
    assert_type(gramjd.tracin([queries], [of_batch], loader, [0.1]), Tensor)
    assert_type(gramjd.influence(queries, of_batch, loader, 0.1), Tensor)


def of_transforms() -> None:
    model = nn.Linear(3, 1)
    x, params = torch.randn(4, 3), {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: Named, x: Tensor) -> Tensor:
        output: Tensor = functional_call(model, params, (x,))
        return output.square().sum()

    def both(params: Named, x: Tensor) -> tuple[Tensor, float]:
        return loss(params, x), 1.0

    def several(params: Named, x: Tensor) -> Named:
        return {"a": loss(params, x), "b": loss(params, 2 * x)}

    def two(params: Named, x: Tensor) -> tuple[Tensor, Tensor]:
        return loss(params, x), loss(params, 2 * x)

    def listed(params: Named, x: Tensor) -> list[Tensor]:
        return [loss(params, x), loss(params, 2 * x)]

    assert_type(gramjd.jacobian(loss)(params, x).gramian(), Tensor)
    assert_type(gramjd.jacobian(both, has_aux=True)(params, x)[0].gramian(), Tensor)
    jac, values = gramjd.jacobian_and_value(loss)(params, x)
    assert_type(jac.norms(), Tensor)
    assert_type(values, Tensor)
    assert_type(gramjd.gramian(loss)(params, x), Tensor)
    assert_type(gramjd.gramian(loss, sketch=8)(params, x), SketchedGramian)
    assert_type(gramjd.gramian(both, has_aux=True)(params, x)[0], Tensor)
    gramian, values = gramjd.gramian_and_value(loss)(params, x)
    assert_type(gramian, Tensor)
    assert_type(values, Tensor)
    tree = gramjd.jacobian(several)(params, x)
    assert_type(tree.norms(), Named)
    assert_type(tree.gramian(), dict[str, Named])
    assert_type(tree.gramian("parameter"), dict[str, dict[str, Named]])
    assert_type(tree.cross(tree), dict[str, Named])
    assert_type(tree.dense(), dict[str, Named])
    assert_type(gramjd.gramian(several)(params, x), dict[str, Named])
    assert_type(gramjd.gramian_and_value(several)(params, x), tuple[dict[str, Named], Named])
    pair = gramjd.jacobian(two)(params, x)
    assert_type(pair.gramian(), tuple[tuple[Tensor, ...], ...])
    assert_type(pair.cross(pair), tuple[tuple[Tensor, ...], ...])
    assert_type(pair.dense(), tuple[Named, ...])
    assert_type(gramjd.gramian(two)(params, x), tuple[tuple[Tensor, ...], ...])
    assert_type(gramjd.jacobian(listed)(params, x).gramian(), list[list[Tensor]])
    assert_type(gramjd.gramian(listed)(params, x), list[list[Tensor]])
    function, found = gramjd.functional_loss(model, nn.MSELoss())
    if TYPE_CHECKING:
        assert_type(function, Callable[Concatenate[Named, ...], Tensor])
    assert_type(gramjd.gramian(function)(found, x, torch.ones(4, 1)), Tensor)
    assert_type(gramjd.jacobian(function)(found, x, torch.ones(4, 1)).vjp(torch.ones(4)), Named)


def of_gradients() -> None:
    model = nn.Linear(3, 1)
    weighting, x = weightings.UPGradWeighting(), torch.randn(4, 3)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: Named, x: Tensor) -> Tensor:
        output: Tensor = functional_call(model, params, (x,))
        return output.square().sum()

    def both(params: Named, x: Tensor) -> tuple[Tensor, float]:
        return loss(params, x), 1.0

    def of_two(left: Tensor, right: Tensor, x: Tensor) -> Tensor:
        return (x @ left * right).sum()

    assert_type(gramjd.jacobian(loss)(params, x).vjp(torch.ones(4)), Named)
    assert_type(gramjd.jacobian(loss)(params, x).dense(), Named)
    assert_type(gramjd.grad(loss, weighting)(params, x), Named)
    assert_type(gramjd.grad(both, weighting, has_aux=True)(params, x)[0], Named)
    gradient, losses = gramjd.grad_and_value(loss, weighting)(params, x)
    assert_type(gradient, Named)
    assert_type(losses, Tensor)
    gradient, (losses, _) = gramjd.grad_and_value(both, weighting, has_aux=True)(params, x)
    assert_type(gradient, Named)
    assert_type(losses, Tensor)
    left, right = torch.ones(3, 2), torch.ones(2)
    assert_type(gramjd.grad(of_two, weighting, in_dims=(None, None, 0))(left, right, x), Tensor)
    gramjd.grad(of_two, weighting, argnums=(0, 1))(left, right, x)  # several arguments: anything
    _, losses = gramjd.grad_and_value(of_two, weighting, 1, (None, None, 0))(left, right, x)
    assert_type(losses, Tensor)
    lambdas = gramjd.grad(lambda params, x: (params["weight"] * x).sum(), weighting)
    lambdas({"weight": right}, torch.ones(4, 2))["weight"].sum()  # of a lambda, anything
    jac = gramjd.jacobian(loss)(params, x)
    assert_type(gramjd.aggregation.graddrop(jac), Named)
    assert_type(gramjd.aggregation.trimmed_mean(jac, 1), Named)


def all_of_them() -> Iterator[Callable[[], None]]:
    yield from (of_weightings, of_engines, of_steps, of_datasets, of_transforms, of_gradients)
