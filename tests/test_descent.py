"""A step in one call: ``Engine.backward``, ``gramjd.backward``, ``gramjd.grad``, Gramians of either shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from oracle import assert_close, dense_gramian, dense_jacobian
from torch import Tensor, nn

import gramjd
from gramjd import Engine, SlowPathWarning
from gramjd.blocks import Dense
from gramjd.weighting import GradVacWeighting, UPGradWeighting, mean, upgrad


def mlp(outputs: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def data(samples: int = 6) -> Tensor:
    return torch.randn(samples, 3).double()


def skewed(gramian: Tensor) -> Tensor:
    """Weights that differ from each other, and follow from the Gramian in every entry."""
    half = gramian.ndim // 2
    rest = gramian.reshape(gramian.shape[:half].numel(), -1)
    ramp = torch.linspace(1, 2, rest.shape[1], dtype=gramian.dtype)
    return (rest @ ramp / rest.abs().max()).reshape(gramian.shape[:half])


def taken(parameters: Iterable[Tensor]) -> Tensor:
    """The gradients, in one vector (zeros for none); they are then forgotten."""
    found = []
    for p in parameters:
        found.append((torch.zeros_like(p) if p.grad is None else p.grad.to_dense()).flatten())
        p.grad = None
    return torch.cat(found)


def step_by_definition(
    losses: Tensor, wrt: Iterable[Tensor], leaves: Iterable[Tensor], weighting: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Weights and gradients, from the dense Jacobians."""
    weights = weighting(dense_gramian(losses, wrt).detach())
    return weights, weights.flatten() @ dense_jacobian(losses, leaves)


WEIGHTINGS = [upgrad, skewed]


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize(
    ("shape", "batch_dim"), [((6,), 0), ((6, 2), 0), ((2, 6), 1), ((2, 6), -1), ((12,), None), ((3, 4), None)]
)
def test_engine_backward(
    weighting: Callable[[Tensor], Tensor], shape: tuple[int, ...], batch_dim: int | None
) -> None:
    model = mlp()
    engine = Engine(model, batch_dim=batch_dim)
    for _ in range(2):
        out = model(data()).square()
        out = {1: out[:, 0], 2: out}[len(shape)] if batch_dim == 0 else out.T
        losses = out.reshape(shape)
        want_weights, want = step_by_definition(losses, model.parameters(), model.parameters(), weighting)
        weights = engine.backward(losses, weighting)
        assert_close(weights, want_weights, 1e-9)
        assert_close(taken(model.parameters()), want, 1e-9)
        assert not weights.requires_grad


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("batch_dim", [0, -1, None])
def test_lists_of_losses(kind: Callable[[Any], Any], batch_dim: int | None) -> None:
    """Everywhere a tensor of losses is taken; with samples as their stack, else as one vector."""
    model = mlp()
    engine = Engine(model, batch_dim=batch_dim)
    out = model(data())
    each = [out[:, 0].square(), (out[:, 1] - 1).square()]
    joined = {0: torch.stack(each, 1), -1: torch.stack(each), None: torch.cat(each)}[batch_dim]
    want = dense_gramian(joined, model.parameters())
    losses = kind(each)
    assert_close(engine.compute_gramian(losses), want)
    assert_close(engine.jacobian(losses).gramian(), want)
    shown, want_shown = (str(engine.explain(of)).splitlines() for of in (losses, joined))
    assert shown[:-1] == want_shown[:-1]  # the last line says what it rests on, by now
    weights, gradient = step_by_definition(joined, model.parameters(), model.parameters(), skewed)
    assert_close(engine.backward(losses, skewed), weights)
    assert_close(taken(model.parameters()), gradient)
    assert_close(gramjd.backward(losses, skewed, batch_dim=batch_dim), weights)
    assert_close(taken(model.parameters()), gradient)
    assert_close(gramjd.jac(losses, model, batch_dim=batch_dim).gramian(), want)


def test_losses_of_several_shapes_are_one_vector() -> None:
    model = mlp()
    engine = Engine(model, batch_dim=None)
    out = model(data())
    losses = [out.mean(), out[:, 0], out[:2]]
    vector = torch.cat([loss.flatten() for loss in losses])
    assert_close(engine.compute_gramian(losses), dense_gramian(vector, model.parameters()))
    engine = Engine(model, batch_dim=0)
    with pytest.raises(ValueError, match="losses in a list have one shape"):
        engine.compute_gramian(losses)


def test_lists_that_hold_no_losses() -> None:
    model = mlp()
    engine = Engine(model, batch_dim=None)
    with pytest.raises(ValueError, match="no losses"):
        engine.backward([], upgrad)
    with pytest.raises(TypeError, match="got a float in a list"):
        engine.backward([model(data()).mean(), 1.0], upgrad)  # type: ignore[list-item]
    with pytest.raises(TypeError, match="got a dict"):
        engine.backward({"loss": model(data()).mean()}, upgrad)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got a dict"):
        gramjd.backward({"loss": model(data()).mean()}, upgrad)  # type: ignore[arg-type]


def test_gradients_of_unregistered_leaves() -> None:
    """Partial Jacobian descent: the Gramian of a part, gradients for all."""
    model = mlp()
    offset = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    engine = Engine(model[2], batch_dim=0)
    everything = [*model.parameters(), offset]
    for _ in range(2):
        losses = (model(data()) + offset).square().sum(1)
        weights, want = step_by_definition(losses, model[2].parameters(), everything, upgrad)
        assert_close(engine.backward(losses, upgrad), weights, 1e-9)
        assert_close(taken(everything), want, 1e-9)


def test_gradients_accumulate() -> None:
    model = mlp()
    engine = Engine(model, batch_dim=0)
    total = torch.zeros(32, dtype=torch.float64)
    for _ in range(3):
        losses = model(data()).square().sum(1)
        total += step_by_definition(losses, model.parameters(), model.parameters(), upgrad)[1]
        engine.backward(losses, upgrad)
    assert_close(taken(model.parameters()), total, 1e-9)


def test_hooks_of_parameters_run_once() -> None:
    model = mlp()
    calls: list[int] = []
    for p in model.parameters():
        p.register_hook(lambda g: calls.append(1) or 2 * g)  # type: ignore[func-returns-value]
    engine = Engine(model, batch_dim=0)
    losses = model(data()).square().sum(1)
    want = dense_jacobian(losses, model.parameters()).mean(0)  # for which the hooks run, too
    for step in (engine.backward, gramjd.backward):
        calls.clear()
        step(losses, mean)
        assert len(calls) == 4
        assert_close(taken(model.parameters()), want)


def test_inputs_choose_the_leaves() -> None:
    model = mlp()
    engine = Engine(model, batch_dim=0)
    losses = model(data()).square().sum(1)
    weights, want = step_by_definition(losses, model.parameters(), model[2].parameters(), upgrad)
    for step in (engine.backward, gramjd.backward):
        more = {"batch_dim": 0} if step is gramjd.backward else {}
        assert_close(
            step(losses, upgrad, inputs=model[2].parameters(), retain_graph=True, **more), weights, 1e-9
        )
        assert model[0].weight.grad is None
        assert_close(taken(model[2].parameters()), want, 1e-9)
        step(losses, upgrad, inputs=model[2].weight, retain_graph=True, **more)  # as torch, also one alone
        assert [p.grad is None for p in model.parameters()] == [True, True, False, True]
        assert_close(taken([model[2].weight]), want[: model[2].weight.numel()], 1e-9)


def test_groups_have_weights_of_their_own() -> None:
    model = mlp()
    engine = Engine(model, batch_dim=0)
    layers = {"first": ["0.weight", "0.bias"], "last": ["2.weight", "2.bias"]}
    losses = model(data()).square().sum(1)
    parts = {"first": model[0], "last": model[2]}
    want = {n: step_by_definition(losses, m.parameters(), m.parameters(), skewed) for n, m in parts.items()}
    given: dict[str, Any] = {"per": layers}
    for step in (engine.backward, lambda *a, **k: gramjd.backward(*a, model, batch_dim=0, **k)):
        for weighting in (skewed, {"first": skewed, "last": skewed}):
            weights = step(losses, weighting, **given)
            for name, module in parts.items():
                assert_close(weights[name], want[name][0], 1e-9)
                assert_close(taken(module.parameters()), want[name][1], 1e-9)
    by_function = engine.backward(losses, skewed, per=lambda name: name.split(".")[0])
    assert list(by_function) == ["0", "2"]
    assert_close(taken(model[2].parameters()), want["last"][1], 1e-9)


def test_groups_that_cannot_be() -> None:
    model = mlp()
    engine = Engine(model[2], batch_dim=0)
    losses = model(data()).square().sum(1)
    with pytest.raises(gramjd.NotCoveredError, match="are in no group"):
        engine.backward(losses, upgrad, per="parameter")
    whole = Engine(model, batch_dim=0)
    losses = model(data()).square().sum(1)
    with pytest.raises(ValueError, match="remembers its calls"):
        whole.backward(losses, GradVacWeighting(), per="parameter")
    with pytest.raises(ValueError, match="need per="):
        whole.backward(losses, {"a": upgrad})
    with pytest.raises(ValueError, match="give each group one"):
        whole.backward(losses, {"a": upgrad}, per="parameter")
    with pytest.raises(ValueError, match="not by both"):
        whole.backward(losses, upgrad, per="parameter", inputs=model[2].parameters())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("weighting", "error", "match"),
    [
        (lambda G: G, ValueError, "one for each"),
        (lambda G: [1.0] * 6, TypeError, "returned a list"),
        (lambda G: G[0] * torch.nan, ValueError, "NaN or infinite"),
    ],
)
def test_weights_that_cannot_be(
    weighting: Callable[[Tensor], Any], error: type[Exception], match: str
) -> None:
    model = mlp()
    engine = Engine(model, batch_dim=0)
    losses = model(data()).square().sum(1)
    for step in (engine.backward, lambda *a: gramjd.backward(*a, batch_dim=0)):
        with pytest.raises(error, match=match):
            step(losses, weighting)
        assert all(p.grad is None for p in model.parameters())


def test_sparse_gradients_stay_sparse() -> None:
    """As ``SparseAdam`` needs them."""
    table = nn.Embedding(7, 3, sparse=True).double()
    head = nn.Linear(3, 1).double()
    engine = Engine(table, head, batch_dim=0)
    losses = head(table(torch.tensor([1, 4, 1, 2]))).squeeze(1).square()
    leaves = [*table.parameters(), *head.parameters()]
    weights = upgrad(engine.compute_gramian(losses))
    for step in (engine.backward, lambda *a, **k: gramjd.backward(*a, batch_dim=0, **k)):
        assert_close(step(losses, upgrad, retain_graph=True), weights, 1e-9)
        assert table.weight.grad is not None and table.weight.grad.is_sparse
        got = taken(leaves)
        losses.backward(weights, retain_graph=True)
        assert_close(got, taken(leaves), 1e-9)


def scaler(scale: float) -> Any:
    if not hasattr(torch.amp, "GradScaler"):
        pytest.skip("torch.amp.GradScaler came with torch 2.3")
    return torch.amp.GradScaler("cpu", init_scale=scale)


@pytest.mark.parametrize("recorded", [True, False])
def test_scaler(recorded: bool) -> None:
    """The weighting sees the Gramian of the losses, the optimizer gradients that the scaler unscales."""
    model, scale = mlp().float(), scaler(1024.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = Engine(model, batch_dim=0)
    if not recorded:
        engine.close()
    losses = model(data().float()).square().sum(1)
    seen = []

    def weighting(gramian: Tensor) -> Tensor:
        seen.append(gramian)
        return skewed(gramian)

    weights, want = step_by_definition(losses, model.parameters(), model.parameters(), skewed)
    if recorded:
        got = engine.backward(losses, weighting, scaler=scale)
    else:
        got = gramjd.backward(losses.sum(0, keepdim=True).expand(6) * 0 + losses, weighting, scaler=scale)
    assert_close(seen[0], dense_gramian(losses, model.parameters()), 1e-5)
    assert_close(got, weights, 1e-4)
    before = [p.detach().clone() for p in model.parameters()]
    scale.step(optimizer)
    scale.update()
    moved = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, model.parameters(), strict=True)])
    assert_close(moved, want.detach(), 1e-4)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_scale_that_overflows_skips_the_step(recorded: bool) -> None:
    model, scale = mlp().float(), scaler(2.0**127)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    engine = Engine(model, batch_dim=0)
    if not recorded:
        engine.close()
    before = [p.detach().clone() for p in model.parameters()]
    losses = model(data().float()).square().sum(1)
    weights = (
        engine.backward(losses, upgrad, scaler=scale)
        if recorded
        else gramjd.backward(losses, upgrad, scaler=scale)
    )
    assert weights.isnan().all() and weights.shape == losses.shape
    scale.step(optimizer)
    scale.update()
    assert scale.get_scale() == 2.0**126
    assert all(torch.equal(b, p) for b, p in zip(before, model.parameters(), strict=True))


def test_losses_that_overflow_by_themselves_are_an_error() -> None:
    model = mlp().float()
    engine = Engine(model, batch_dim=0)
    losses = model(data().float()).square().sum(1) * torch.inf
    for step in (engine.backward, gramjd.backward):
        with pytest.raises(gramjd.NotFiniteError):
            step(losses, upgrad, scaler=scaler(4.0))
        assert all(p.grad is None for p in model.parameters())


def test_the_graph_is_freed_by_a_backward_pass() -> None:
    model = mlp()
    engine = Engine(model[2], batch_dim=0)
    losses = model(data()).square().sum(1)
    engine.backward(losses, upgrad, retain_graph=True)
    engine.backward(losses, upgrad)
    with pytest.raises(gramjd.NoGraphError, match="freed"):
        engine.backward(losses, upgrad)


def test_a_gramian_that_overflows_is_an_error_that_says_where() -> None:
    model = mlp()
    engine = Engine(model, batch_dim=0)
    scales = torch.tensor([1, 1, 1e200, 1, 1, 1], dtype=torch.float64)  # finite, its square is not
    losses = model(data()).square().sum(1) * scales
    with pytest.raises(gramjd.NotFiniteError, match="The Gramian of the output") as of_gramian:
        engine.compute_gramian(losses)
    with pytest.raises(gramjd.NotFiniteError) as of_step:
        engine.backward(losses, upgrad)
    assert str(of_step.value) == str(of_gramian.value)
    with pytest.raises(gramjd.NotFiniteError, match="The Gramian of the losses"):
        gramjd.backward(losses, upgrad)
    assert all(p.grad is None for p in model.parameters())


# without an engine


@pytest.mark.parametrize("chunk_size", [None, 1, 4, 100])
def test_backward_of_an_unrecorded_forward(chunk_size: int | None) -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)).double()
    losses = model(data()).square().sum(1)
    weights, want = step_by_definition(losses, model.parameters(), model.parameters(), upgrad)
    assert_close(gramjd.backward(losses, upgrad, chunk_size=chunk_size), weights, 1e-9)
    assert_close(taken(model.parameters()), want, 1e-9)


def test_what_the_gramian_is_of() -> None:
    """Modules, parameters, or a representation: gradients go to all leaves."""
    encoder, head = mlp(4), nn.Linear(4, 3).double()
    features = encoder(data())
    losses = head(features).square().mean(0)
    leaves = [*encoder.parameters(), *head.parameters()]
    for wrt, of in [
        (encoder, list(encoder.parameters())),
        ([encoder[2], head], [*encoder[2].parameters(), *head.parameters()]),
        (head.parameters(), list(head.parameters())),
        ({"weight": head.weight}, [head.weight]),
        (features, [features]),
        ([head.weight, head], list(head.parameters())),
    ]:
        weights, want = step_by_definition(losses, of, leaves, upgrad)
        assert_close(gramjd.backward(losses, upgrad, wrt, retain_graph=True), weights, 1e-9)
        assert_close(taken(leaves), want, 1e-9)


@pytest.mark.parametrize("engine_of", ["encoder", "head", "all"])
def test_a_representation_in_a_recorded_forward(engine_of: str) -> None:
    """Its Gramian takes the place of the engine's; the gradients are those of the weighted losses."""
    encoder, head = mlp(4), nn.Linear(4, 3).double()
    modules = {"encoder": [encoder], "head": [head], "all": [encoder, head]}[engine_of]
    engine = Engine(*modules, batch_dim=None)
    leaves = [*encoder.parameters(), *head.parameters()]
    for several in (False, True):
        hidden = encoder[0](data())
        features = encoder[1:](hidden)
        losses = head(features).square().mean(0)
        of = [hidden, features] if several else [features]
        weights, want = step_by_definition(losses, of, leaves, upgrad)
        assert float((weights - upgrad(engine.compute_gramian(losses))).abs().max()) > 1e-3
        assert_close(gramjd.backward(list(losses), upgrad, of if several else features), weights, 1e-9)
        assert_close(taken(leaves), want, 1e-9)


def test_record() -> None:
    """The factors of a forward pass, without a warning; the modules are as they were."""
    model = mlp()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with gramjd.record(model):
        losses = model(data()).square().sum(1)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    weights, want = step_by_definition(losses, model.parameters(), model.parameters(), upgrad)
    assert_close(gramjd.backward(losses, upgrad, model, batch_dim=0), weights, 1e-9)
    assert_close(taken(model.parameters()), want, 1e-9)
    blocks = gramjd.jac(losses, model, batch_dim=0).blocks
    assert {type(b).__name__ for mine in blocks for b in mine} == {"Outer", "Dense"}
    with pytest.raises(ZeroDivisionError), gramjd.record(model):
        1 / 0  # noqa: B018
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_rows_of_samples_warn() -> None:
    model = mlp()
    losses = model(data()).square().sum(1)
    weights, want = step_by_definition(losses, model.parameters(), model.parameters(), upgrad)
    with pytest.warns(SlowPathWarning, match="gramjd.record"):
        got = gramjd.backward(losses, upgrad, batch_dim=0)
    assert_close(got, weights, 1e-9)
    assert_close(taken(model.parameters()), want, 1e-9)


def test_a_model_of_which_a_part_was_recorded() -> None:
    trunk, head = mlp(4), nn.Linear(4, 20).double()
    with gramjd.record(trunk):
        features = trunk(data())
    losses = head(features).square().mean(0)
    leaves = [*trunk.parameters(), *head.parameters()]
    weights, want = step_by_definition(losses, leaves, leaves, upgrad)
    assert_close(gramjd.backward(losses, upgrad), weights, 1e-9)
    assert_close(taken(leaves), want, 1e-9)
    kinds = [type(b) for mine in gramjd.jac(losses, [trunk, head]).blocks for b in mine]
    assert len(kinds) == 6 and kinds.count(Dense) == 4  # biases, and the head


def test_a_recorded_parameter_that_is_used_elsewhere_too() -> None:
    model = mlp()
    with gramjd.record(model):
        out = model(data())
    losses = (out @ model[2].weight).square().sum(1) + model[0].bias.sum()
    weights, want = step_by_definition(losses, model.parameters(), model.parameters(), upgrad)
    assert_close(gramjd.backward(losses, upgrad), weights, 1e-9)
    assert_close(taken(model.parameters()), want, 1e-9)


def test_graphs_that_are_not_there() -> None:
    model, other = mlp(), mlp()
    losses = model(data()).square().sum(1)
    with pytest.raises(gramjd.NotCoveredError, match="depend on none of the inputs"):
        gramjd.backward(losses, upgrad, other)
    with pytest.raises(gramjd.NoGraphError, match="no autograd graph"):
        gramjd.backward(losses.detach(), upgrad)
    losses.sum().backward()
    with pytest.raises(gramjd.NoGraphError, match="freed"):
        gramjd.backward(losses, upgrad)
    with pytest.raises(ValueError, match="does not require gradients"):
        gramjd.backward(model(data()).mean(0), upgrad, [data()])
    with pytest.raises(ValueError, match="chunk_size"):
        gramjd.backward(model(data()).mean(0), upgrad, chunk_size=0)
    with pytest.raises(ValueError, match="batch_dim=1"):
        gramjd.backward(model(data()).mean(0), upgrad, batch_dim=1)


def test_nothing_changes_but_grad() -> None:
    """Also where an intermediate tensor keeps its gradient."""
    model = mlp()
    features = model[:2](data())
    features.retain_grad()
    losses = model[2](features).square().mean(0)
    gramjd.jac(losses, features)
    assert features.grad is None
    gramjd.backward(losses, mean, features, retain_graph=True)
    assert features.grad is not None
    got, features.grad = features.grad, None
    losses.mean().backward()
    assert_close(got, features.grad)


# functions


def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return (torch.tanh(x @ params["w1"]) @ params["w2"] - y).square()


def arguments() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    params = {"w1": torch.randn(3, 5).double(), "w2": torch.randn(5, 2).double()}
    return params, data(), torch.randn(6, 2).double()


@pytest.mark.parametrize("flat", [False, True])
def test_grad(flat: bool) -> None:
    params, x, y = arguments()
    J, losses = gramjd.jacobian_and_value(loss)(params, x, y)
    weights = upgrad(J.gramian())
    want = J.vjp(weights)
    got = gramjd.grad(loss, upgrad, flat=flat)(params, x, y)
    assert got.keys() == params.keys()
    for name in params:
        assert_close(got[name], want[name], 1e-9)
    found, value = gramjd.grad_and_value(loss, upgrad, flat=flat)(params, x, y)
    assert_close(found["w1"], want["w1"], 1e-9)
    assert torch.equal(value, losses)
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    dense = torch.stack([loss(leaves, a, b) for a, b in zip(x, y, strict=True)])
    by_hand = step_by_definition(dense, leaves.values(), leaves.values(), upgrad)[1]
    assert_close(torch.cat([got[n].flatten() for n in leaves]), by_hand, 1e-9)


def test_grad_takes_the_arguments_of_torch_func() -> None:
    params, x, y = arguments()

    def func(x: Tensor, w1: Tensor, w2: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        losses = loss({"w1": w1, "w2": w2}, x, y)
        return losses, {"predicted": losses.detach().sqrt()}

    in_dims = (1, None, None, 0)
    args = (x.T, params["w1"], params["w2"], y)
    want = gramjd.grad(loss, skewed)(params, x, y)
    (w1, w2), aux = gramjd.grad(func, skewed, argnums=(1, 2), in_dims=in_dims, has_aux=True)(*args)
    assert_close(w1, want["w1"])
    assert_close(w2, want["w2"])
    assert aux["predicted"].shape == (6, 2)
    whole = gramjd.grad_and_value(func, skewed, argnums=2, in_dims=in_dims, has_aux=True)(*args)
    found, (losses, aux) = whole
    J = gramjd.jacobian(lambda w2, x, y: loss({"w1": params["w1"], "w2": w2}, x, y))(params["w2"], x, y)
    assert_close(found, J.vjp(skewed(J.gramian())))
    assert_close(losses.sqrt(), aux["predicted"])


def test_grad_of_several_outputs_and_of_no_batch() -> None:
    params, x, y = arguments()

    def both(params: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        each = loss(params, x, y)
        return {"b": each.sum(), "a": each}

    J = gramjd.jacobian(both)(params, x, y)
    want = J.T @ skewed(J @ J.T)
    got = gramjd.grad(both, skewed)(params, x, y)
    assert_close(torch.cat([got["w1"].flatten(), got["w2"].flatten()]), want)
    whole = gramjd.grad(lambda p: loss(p, x, y).mean(0), upgrad, in_dims=None)(params)
    J = gramjd.jacobian(lambda p: loss(p, x, y).mean(0), in_dims=None)(params)
    assert_close(whole["w1"], J.vjp(upgrad(J.gramian()))["w1"])


def test_grad_under_vmap() -> None:
    """An ensemble, each member with its own weights."""
    (a, x, y), (b, _, _) = arguments(), arguments()
    stacked = {name: torch.stack([a[name], b[name]]) for name in a}
    step = gramjd.grad(loss, upgrad)
    together = torch.vmap(step, (0, None, None))(stacked, x, y)
    for n, params in enumerate([a, b]):
        assert_close(together["w1"][n], step(params, x, y)["w1"], 1e-8)


def test_grad_refuses_weights_of_another_shape() -> None:
    with pytest.raises(ValueError, match="one weight for each loss"):
        gramjd.grad(loss, lambda G: G)(*arguments())
    for flat in (False, True):
        for transform in (gramjd.grad, gramjd.grad_and_value):
            with pytest.raises(ValueError, match="returned weights that are NaN or infinite"):
                transform(loss, lambda G: torch.full(G.shape[: G.ndim // 2], torch.nan), flat=flat)(
                    *arguments()
                )


# Gramians of either shape


@pytest.mark.parametrize("shape", [(), (4,), (4, 2), (2, 3, 2)])
def test_flat_gramians(shape: tuple[int, ...]) -> None:
    model = mlp(12)
    engine = Engine(model, batch_dim=None)
    losses = model(data(1))[0, : torch.Size(shape).numel()].reshape(shape)
    rows = dense_jacobian(losses, model.parameters())
    flat = engine.compute_gramian(losses, flat=True)
    assert_close(flat, rows @ rows.T)
    generalized = engine.compute_gramian(losses)
    assert torch.equal(gramjd.gramians.flatten(generalized), flat)
    assert torch.equal(gramjd.gramians.unflatten(flat, shape), generalized)
    pair = torch.stack([generalized, 2 * generalized])
    assert torch.equal(gramjd.gramians.flatten(pair), torch.stack([flat, 2 * flat]))
    assert torch.equal(gramjd.gramians.unflatten(torch.stack([flat, 2 * flat]), shape), pair)


def test_shapes_that_are_no_gramians() -> None:
    with pytest.raises(ValueError, match="generalized Gramian has shape"):
        gramjd.gramians.flatten(torch.zeros(2, 3, 2, 3))
    with pytest.raises(ValueError, match=r"has shape \[6, 6\]"):
        gramjd.gramians.unflatten(torch.zeros(5, 5), (2, 3))
    model = mlp()
    with pytest.raises(ValueError, match="no square matrix"):
        Engine(model, batch_dim=0).compute_gramian(model(data()), flat=True, rows="local")


def test_either_weighting_of_either_shape() -> None:
    pytest.importorskip("quadprog")
    theirs = pytest.importorskip("torchjd.aggregation").UPGradWeighting()
    model = mlp()
    engine = Engine(model, batch_dim=0)
    losses = model(data()).square()
    weights = UPGradWeighting()(engine.compute_gramian(losses))  # [6, 2]
    flat = engine.compute_gramian(losses, flat=True)
    assert_close(UPGradWeighting()(flat).view(6, 2), weights, 1e-9)
    assert_close(theirs(flat).view(6, 2), weights, 1e-6)
    assert_close(engine.backward(losses, theirs, flat=True), weights, 1e-6)
    assert_close(gramjd.backward(losses, theirs, batch_dim=0, flat=True), weights, 1e-6)
    taken(model.parameters())
    with pytest.raises((ValueError, RuntimeError)):
        engine.backward(losses, theirs)


def test_a_weighting_that_is_no_function() -> None:
    model = nn.Linear(3, 2)
    engine = gramjd.Engine(model, batch_dim=0)
    with pytest.raises(TypeError, match=r"must be a function of the Gramian.*'mean'"):
        engine.backward(model(torch.randn(4, 3)).sum(1), "mean")  # type: ignore[arg-type]
    assert model.weight.grad is None
