"""``gramjd.mtl_backward`` against its definition on dense Jacobians, and against TorchJD's."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from oracle import assert_close, dense_jacobian
from torch import Tensor, nn

import gramjd
from gramjd.weighting import MGDAWeighting, UPGradWeighting, mgda, upgrad


class Model(nn.Module):
    """Two tensors of features; of three heads the first uses one of them, the last the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 6), nn.Linear(6, 4)
        self.a, self.b, self.c = nn.Linear(6, 1), nn.Linear(10, 2), nn.Linear(4, 1)
        self.double()

    def features(self, x: Tensor) -> list[Tensor]:
        shared = torch.tanh(self.first(x))
        return [torch.sin(shared), torch.tanh(self.second(shared))]

    def losses(self, features: list[Tensor]) -> list[Tensor]:
        f, g = features
        return [
            (self.a(f) - 1).square().mean(),
            10 * (self.b(torch.cat([f, g], 1)) + 1).square().mean(),
            (self.c(g) + 2).abs().sum(),
        ]

    @property
    def trunk(self) -> list[Tensor]:
        return [*self.first.parameters(), *self.second.parameters()]

    @property
    def heads(self) -> list[nn.Module]:
        return [self.a, self.b, self.c]


WEIGHTING = {"shared": UPGradWeighting(), "features": MGDAWeighting()}  # neither gives equal weights here


def run(model: Model, step: Any) -> tuple[Any, dict[str, Tensor | None]]:
    """What a step returns, and the gradients that it leaves."""
    model.zero_grad()
    features = model.features(torch.randn(5, 3, generator=torch.Generator().manual_seed(3)).double())
    found = step(model.losses(features), features)
    return found, {name: p.grad for name, p in model.named_parameters()}


def by_definition(model: Model, wrt: str = "shared", scale: float = 1.0) -> tuple[Any, dict[str, Any]]:
    """Heads by their own losses, the trunk by the weighted gradient."""

    def step(losses: list[Tensor], features: list[Tensor]) -> Tensor:
        together = torch.stack(losses)
        of = model.trunk if wrt == "shared" else features
        rows = dense_jacobian(together, of)
        weights = WEIGHTING[wrt](rows @ rows.T)
        heads = [p for head in model.heads for p in head.parameters() if p.requires_grad]
        torch.autograd.backward(scale * together.sum(), inputs=heads, retain_graph=True)
        trunk = [p for p in model.trunk if p.requires_grad]
        torch.autograd.backward(scale * together, weights, inputs=trunk)
        return weights

    return run(model, step)


def same(got: tuple[Any, dict[str, Any]], want: tuple[Any, dict[str, Any]], tolerance: float = 1e-9) -> None:
    assert_close(got[0], want[0], tolerance)
    assert got[1].keys() == want[1].keys()
    for name, gradient in want[1].items():
        assert (got[1][name] is None) == (gradient is None), name
        if gradient is not None:
            assert_close(got[1][name], gradient, tolerance)


@pytest.mark.parametrize("wrt", ["shared", "features"])
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_heads_and_trunk(wrt: str, recorded: bool, named: bool) -> None:
    model = Model()
    want = by_definition(model, wrt)
    assert float(want[0].std()) > 0.01  # in conflict
    given: dict[str, Any] = {"shared": [model.first, model.second], "tasks": model.heads} if named else {}

    def step(losses: list[Tensor], features: list[Tensor]) -> Tensor:
        return gramjd.mtl_backward(losses, features, WEIGHTING[wrt], wrt=wrt, **given)

    if recorded:
        with gramjd.record(model.first, model.second):
            same(run(model, step), want)
    else:
        same(run(model, step), want)


def test_a_tensor_of_losses_and_one_feature() -> None:
    encoder, heads = nn.Linear(3, 4).double(), nn.Linear(4, 3).double()
    features = encoder(torch.randn(5, 3).double())
    losses = (heads(features) - torch.tensor([1.0, 0, -3]).double()).square().mean(0)
    rows = dense_jacobian(losses, encoder.parameters())
    weights = gramjd.mtl_backward(losses, features, upgrad)
    assert_close(weights, upgrad(rows @ rows.T), 1e-9)
    got = torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])
    assert_close(got, weights @ rows, 1e-9)
    assert heads.weight.grad is not None
    assert_close(heads.weight.grad, torch.autograd.grad(losses.sum(), heads.weight)[0])


def test_frozen_parameters() -> None:
    for frozen in (["first.weight", "a.bias"], ["second.weight", "second.bias", "c.weight", "c.bias"]):
        model = Model()
        for name in frozen:
            model.get_parameter(name).requires_grad_(False)
        want = by_definition(model)
        for given in ({}, {"shared": [model.first, model.second], "tasks": model.heads}):
            same(run(model, lambda ls, fs, g=given: gramjd.mtl_backward(ls, fs, upgrad, **g)), want)


def test_a_frozen_encoder_is_an_error() -> None:
    model = Model()
    for p in model.trunk:
        p.requires_grad_(False)
    with pytest.raises(gramjd.NotCoveredError, match="nothing in front of it"):
        run(model, lambda losses, features: gramjd.mtl_backward(losses, features, upgrad))


def test_parameters_of_several_tasks_get_the_sum() -> None:
    encoder, head = nn.Linear(3, 4).double(), nn.Linear(4, 1).double()
    features = encoder(torch.randn(5, 3).double())
    losses = [head(features).square().mean(), (head(features) - 1).abs().mean()]
    gramjd.mtl_backward(losses, features, upgrad)
    assert head.weight.grad is not None
    assert_close(head.weight.grad, torch.autograd.grad(losses[0] + losses[1], head.weight)[0])


def test_gradients_accumulate() -> None:
    model = Model()
    run(model, lambda losses, features: gramjd.mtl_backward(losses, features, upgrad))
    first = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    features = model.features(torch.randn(5, 3, generator=torch.Generator().manual_seed(3)).double())
    gramjd.mtl_backward(model.losses(features), features, upgrad)
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert_close(p.grad, 2 * first[name], 1e-9)


def test_losses_that_are_no_scalars() -> None:
    model = Model()
    cotangents = [torch.tensor([2.0, 3.0]).double(), torch.tensor(0.5).double()]

    def step(losses: list[Tensor], features: list[Tensor]) -> Tensor:
        outputs = [torch.stack(losses[:2]), losses[2]]
        return gramjd.mtl_backward(outputs, features, upgrad, grad_tensors=cotangents)

    def scalars(losses: list[Tensor], features: list[Tensor]) -> Tensor:
        return gramjd.mtl_backward([2 * losses[0] + 3 * losses[1], losses[2] / 2], features, upgrad)

    same(run(model, step), run(model, scalars))
    with pytest.raises(ValueError, match="is a scalar"):
        run(model, lambda ls, fs: gramjd.mtl_backward([torch.stack(ls[:2]), ls[2]], fs, upgrad))
    with pytest.raises(ValueError, match="1 grad_tensors for 3 losses"):
        run(model, lambda ls, fs: gramjd.mtl_backward(ls, fs, upgrad, grad_tensors=cotangents[1:]))


def scaler(scale: float) -> Any:
    if not hasattr(torch.amp, "GradScaler"):
        pytest.skip("torch.amp.GradScaler came with torch 2.3")
    return torch.amp.GradScaler("cpu", init_scale=scale)


@pytest.mark.parametrize("wrt", ["shared", "features"])
def test_scaler(wrt: str) -> None:
    model = Model()
    want = by_definition(model, wrt, scale=256.0)
    given = {"wrt": wrt, "scaler": scaler(256.0)}
    seen: list[Tensor] = []

    def weighting(gramian: Tensor) -> Tensor:
        seen.append(gramian)
        return WEIGHTING[wrt](gramian)

    same(run(model, lambda ls, fs: gramjd.mtl_backward(ls, fs, weighting, **given)), want)
    run(model, lambda ls, fs: gramjd.mtl_backward(ls, fs, weighting, wrt=wrt))
    assert_close(seen[0], seen[1])  # the weighting does not see the scale
    model.float()
    inputs = torch.randn(5, 3)
    features = model.features(inputs)
    model.zero_grad()
    weights = gramjd.mtl_backward(model.losses(features), features, upgrad, wrt=wrt, scaler=scaler(2.0**126))
    assert weights.isnan().all()
    assert all(p.grad is not None and not p.grad.isfinite().any() for p in model.parameters())


@pytest.mark.parametrize("wrt", ["shared", "features"])
def test_under_autocast(wrt: str) -> None:
    """What is computed in the call has the precision of the tensors, not that of the context."""
    model = Model().float()
    x = torch.randn(5, 3)

    def step(context: Any) -> list[Tensor]:
        model.zero_grad()
        features = model.features(x)
        losses = model.losses(features)
        with context:
            weights = gramjd.mtl_backward(losses, features, WEIGHTING[wrt], wrt=wrt)
        return [weights, *(p.grad for p in model.parameters() if p.grad is not None)]

    want = step(contextlib.nullcontext())
    for got, wanted in zip(step(torch.autocast("cpu", torch.bfloat16)), want, strict=True):
        assert_close(got, wanted, 1e-6)


@pytest.mark.parametrize("wrt", ["shared", "features"])
def test_hooks_and_kept_gradients_of_features(wrt: str) -> None:
    """A hook runs once on its way to the trunk, as in an ordinary backward pass of the weighted losses."""
    model = Model()

    def hooked(losses: list[Tensor], features: list[Tensor]) -> Tensor:
        features[0].register_hook(lambda g: 2 * g)
        features[1].retain_grad()
        weights = gramjd.mtl_backward(losses, features, upgrad, wrt=wrt)
        if wrt == "features":
            assert features[1].grad is not None
        return weights

    weights, got = run(model, hooked)

    def plain(losses: list[Tensor], features: list[Tensor]) -> None:
        features[0].register_hook(lambda g: 2 * g)
        torch.autograd.backward(torch.stack(losses), weights, inputs=model.trunk)

    _, want = run(model, plain)
    for name in ("first.weight", "second.weight"):
        assert_close(got[name], want[name], 1e-9)  # type: ignore[arg-type]


def test_mgda_ub() -> None:
    """One pass through the encoder; the norm of the features' gradient is the smallest there is."""
    model = Model()
    passes: list[int] = []

    def step(losses: list[Tensor], features: list[Tensor]) -> Tensor:
        features[0].grad_fn.register_hook(lambda *_: passes.append(1))  # type: ignore[union-attr]
        return gramjd.mtl_backward(losses, features, lambda G: mgda(G), wrt="features")

    weights, _ = run(model, step)
    assert len(passes) == 1
    features = model.features(torch.randn(5, 3, generator=torch.Generator().manual_seed(3)).double())
    rows = dense_jacobian(torch.stack(model.losses(features)), features)
    norm = (weights @ rows).norm()
    for other in torch.eye(3).double():
        for t in (0.01, 0.1, 1.0):
            assert float((((1 - t) * weights + t * other) @ rows).norm()) >= float(norm) - 1e-9


@pytest.mark.parametrize("wrt", ["shared", "features"])
def test_complex_features(wrt: str) -> None:
    encoder = torch.randn(3, 4, dtype=torch.complex128, requires_grad=True)
    features = torch.randn(5, 3, dtype=torch.complex128) @ encoder
    losses = [features.abs().square().mean(), (features.real - 1).square().sum(), features.imag.exp().mean()]
    of = encoder if wrt == "shared" else features
    rows = torch.stack([torch.autograd.grad(loss, of, retain_graph=True)[0].flatten() for loss in losses])
    want = WEIGHTING[wrt]((rows @ rows.mH).real)
    gradients = [torch.autograd.grad(loss, encoder, retain_graph=True)[0] for loss in losses]
    weights = gramjd.mtl_backward(losses, features, WEIGHTING[wrt], wrt=wrt)
    assert_close(weights, want, 1e-9)
    assert encoder.grad is not None
    assert_close(encoder.grad, torch.tensordot(want.to(encoder.dtype), torch.stack(gradients), 1), 1e-9)


# what would be silently wrong


def test_a_loss_that_goes_around_the_features() -> None:
    model = Model()
    x = torch.randn(5, 3).double()
    first = torch.tanh(model.first(x))
    features = [torch.sin(first)]
    losses = [model.a(features[0]).mean(), model.c(torch.tanh(model.second(first))).mean()]
    with pytest.raises(ValueError, match=r"is shared, and task 1's own"):
        gramjd.mtl_backward(losses, features, upgrad)
    with pytest.raises(ValueError, match="Loss 1 depends on the shared parameter"):
        gramjd.mtl_backward(losses, features, upgrad, shared=model.first, tasks=[model.a, model.c])
    assert all(p.grad is None for p in model.parameters())
    gramjd.mtl_backward(losses, first, upgrad)
    assert all(p.grad is not None for p in [*model.first.parameters(), *model.second.parameters()])


def test_one_output_of_an_op_that_has_several() -> None:
    encoder, heads = nn.Linear(3, 4).double(), nn.Linear(2, 2).double()
    left, right = encoder(torch.randn(5, 3).double()).chunk(2, 1)
    losses = [heads(left).mean(), heads(right).square().mean()]
    with pytest.raises(ValueError, match="is shared"):
        gramjd.mtl_backward(losses, left, upgrad)
    weights = gramjd.mtl_backward(losses, [left, right], upgrad)
    rows = dense_jacobian(torch.stack(losses), encoder.parameters())
    assert_close(weights, upgrad(rows @ rows.T), 1e-9)
    assert encoder.weight.grad is not None
    assert_close(encoder.weight.grad.flatten(), (weights @ rows)[:12], 1e-9)


def test_features_of_features() -> None:
    model = Model()
    first = torch.tanh(model.first(torch.randn(5, 3).double()))
    second = torch.tanh(model.second(first))
    losses = [model.a(first).mean(), model.c(second).mean()]
    with pytest.raises(ValueError, match="Feature 1 is computed from another"):
        gramjd.mtl_backward(losses, [first, second], upgrad)


def test_features_that_no_loss_uses() -> None:
    model = Model()
    x = torch.randn(5, 3).double()
    losses = model.losses(model.features(x))
    with pytest.raises(gramjd.NotCoveredError, match="None of the losses depends"):
        gramjd.mtl_backward(losses, model.features(x), upgrad)


def test_arguments_that_do_not_fit() -> None:
    model = Model()

    def step(**given: Any) -> Any:
        return lambda losses, features: gramjd.mtl_backward(
            given.pop("losses", losses), given.pop("features", features), upgrad, **given
        )

    for given, error, match in [
        ({"wrt": "trunk"}, ValueError, "must be 'shared' or 'features'"),
        ({"tasks": [model.a]}, ValueError, "tasks= for 1 losses, and 3"),
        ({"shared": model.first, "tasks": [model.first, model.b, model.c]}, ValueError, "task 0's own"),
        (
            {"tasks": [model.b, model.a, model.c]},
            ValueError,
            "listed for task 0, whose loss does not depend on it, as loss 1",
        ),
        ({"features": []}, ValueError, "no features"),
        ({"losses": []}, ValueError, "no losses"),
        ({"losses": [1.0]}, TypeError, "not of float"),
    ]:
        with pytest.raises(error, match=match):
            run(model, step(**given))
        assert all(p.grad is None for p in model.parameters())


def test_nothing_is_added_where_the_weighting_fails() -> None:
    model = Model()
    with pytest.raises(ValueError, match="one for each"):
        run(model, lambda losses, features: gramjd.mtl_backward(losses, features, lambda G: G))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("given", [False, True])
def test_torchjd(given: bool) -> None:
    pytest.importorskip("quadprog")
    autojac = pytest.importorskip("torchjd.autojac")
    from torchjd.aggregation import UPGrad

    model = Model()

    def theirs(losses: list[Tensor], features: list[Tensor]) -> Tensor:
        more: dict[str, Any] = {}
        if given:
            heads = [list(head.parameters()) for head in model.heads]
            more = {"shared_params": model.trunk, "tasks_params": heads}
        autojac.mtl_backward(losses, features, **more)
        return autojac.jac_to_grad(model.trunk, UPGrad())  # type: ignore[no-any-return]

    def ours(losses: list[Tensor], features: list[Tensor]) -> Tensor:
        more: dict[str, Any] = {"shared": model.trunk, "tasks": model.heads} if given else {}
        return gramjd.mtl_backward(losses, features, UPGradWeighting(), **more)

    same(run(model, ours), run(model, theirs), 1e-8)
