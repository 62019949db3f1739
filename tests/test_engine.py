"""``Engine``: constructor forms, shapes, what counts, and training as if it were not there."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from oracle import assert_close, assert_symmetric, dense_gramian
from torch import Tensor, nn
from zoo import make

import gramjd
from gramjd import Engine


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def test_the_training_loop_of_torchjds_documentation() -> None:
    from torch.nn import Linear, MSELoss, ReLU, Sequential
    from torch.optim import SGD

    from gramjd.weighting import UPGradWeighting

    inputs, targets = torch.randn(8, 16, 5), torch.randn(8, 16)
    model = Sequential(Linear(5, 4), ReLU(), Linear(4, 1))
    optimizer = SGD(model.parameters(), lr=1e-3)
    criterion, weighting = MSELoss(reduction="none"), UPGradWeighting()
    engine = Engine(model.modules(), batch_dim=0)
    for input, target in zip(inputs, targets, strict=True):
        losses = criterion(model(input).squeeze(dim=1), target)
        gramian = engine.compute_gramian(losses)
        assert_close(gramian, dense_gramian(losses, model.parameters()), 1e-5)
        losses.backward(weighting(gramian))
        optimizer.step()
        optimizer.zero_grad()


SHAPES: list[tuple[int, ...]] = [(), (3,), (3, 2), (2, 3), (2, 3, 4), (3, 2, 3)]


@pytest.mark.parametrize(
    ("shape", "batch_dim"),
    [(shape, dim) for shape in SHAPES for dim in (None, *range(len(shape)), *range(-len(shape), 0))],
)
def test_outputs_of_every_shape(shape: tuple[int, ...], batch_dim: int | None) -> None:
    """The generalized Gramian ``[*shape, *reversed(shape)]`` for every place of the batch."""
    samples = 1 if batch_dim is None else shape[batch_dim]
    others = [n for d, n in enumerate(shape) if batch_dim is None or d != batch_dim % len(shape)]
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 24)).double()
    engine = Engine(model, batch_dim=batch_dim, strategies=["ops"])
    size = torch.Size(others).numel()
    for _ in range(2):
        out = model(torch.randn(samples, 3).double())[:, :size].unflatten(1, others or (1,))
        out = out if others else out.squeeze(1)
        out = out[0] if batch_dim is None else out.movedim(0, batch_dim)
        assert out.shape == shape
        gramian = engine.compute_gramian(out)
        assert gramian.shape == (*shape, *reversed(shape))
        assert_close(gramian, dense_gramian(out, model.parameters()))
        assert_symmetric(gramian)


def test_constructor_forms() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))).double()
    first, second = model[0], model[1]
    out = model(torch.randn(3, 3).double()).sum(1)
    whole = dense_gramian(out, model.parameters())
    tail = dense_gramian(out, second[1].parameters())
    for engine, want in [
        (Engine(model, batch_dim=0), whole),
        (Engine(first, second, batch_dim=0), whole),
        (Engine(first, model, second, batch_dim=0), whole),  # overlaps count once
        (Engine(model.modules(), batch_dim=0), whole),
        (Engine([first, *second], 0), whole),
        (Engine(nn.ModuleList([first, second]), batch_dim=None), whole),
        (Engine([second[1], second], None), tail),  # a container has no direct parameters
    ]:
        out = model(torch.randn(3, 3).double()).sum(1)
        want = dense_gramian(out, model.parameters() if want is whole else second[1].parameters())
        assert_close(engine.compute_gramian(out), want)
        engine.close()


def test_a_part_of_the_model() -> None:
    """Partial Jacobian descent: only what is registered counts."""
    model = mlp()
    engine = Engine(model[2], batch_dim=0)
    out = model(torch.randn(3, 3).double()).sum(1)
    assert_close(engine.compute_gramian(out), dense_gramian(out, model[2].parameters()))


def test_parameters_outside_registered_calls_count() -> None:
    """A loss that uses a registered parameter directly."""
    model = mlp()
    engine = Engine(model, batch_dim=0)
    out = model(torch.randn(3, 3).double()).sum(1) * (1 + model[0].weight.square().sum())
    with pytest.warns(gramjd.SlowPathWarning, match=r"'0.weight'.*outside of the calls"):
        gramian = engine.compute_gramian(out)
    assert_close(gramian, dense_gramian(out, model.parameters()))


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.filterwarnings("ignore::gramjd.SlowPathWarning")
def test_a_penalty_outside_whose_weight_is_zero_at_first(batch_dim: int | None) -> None:
    """A share of nothing passes every check: that there is one follows from the graph."""
    model = mlp()
    engine = Engine(model, batch_dim=batch_dim)
    for strength in (0.0, 0.5):
        out = model(torch.randn(3, 3).double()).sum(1) + strength * model[0].weight.square().sum()
        assert_close(engine.compute_gramian(out), dense_gramian(out, model.parameters()))


def test_new_control_flow_is_checked_again() -> None:
    """The same modules in a graph that differs are another signature."""
    model = mlp()
    engine = Engine(model, batch_dim=0)
    x = torch.randn(3, 3).double()
    for _ in range(2):
        out = model(x).sum(1)
        assert_close(engine.compute_gramian(out), dense_gramian(out, model.parameters()))
        out = model(x).sum(1) + model[2].bias.sum()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", gramjd.SlowPathWarning)
            gramian = engine.compute_gramian(out)
        assert_close(gramian, dense_gramian(out, model.parameters()))


@pytest.mark.parametrize("reorder", ["index", "gather", "index_select", "sort", "embedding"])
def test_samples_that_move_are_seen_to_move(reorder: str) -> None:
    """The graph is the same on every call; where the samples go is not."""
    model = mlp()
    engine = Engine(model, batch_dim=0)
    for order in ([0, 1, 2, 3], [2, 0, 3, 1], [0, 1, 2, 3], [1, 0, 3, 2]):
        index, out = torch.tensor(order), model(torch.randn(4, 3).double())
        if reorder == "index":
            out = out[index]
        elif reorder == "gather":
            out = out.gather(0, index[:, None].expand_as(out))
        elif reorder == "index_select":
            out = out.index_select(0, index)
        elif reorder == "sort":
            out = out.sort(0)[0] if order[0] else out.sort(1)[0]
        else:
            out = torch.nn.functional.embedding(index, out)
        losses = out.square().sum(1)
        try:
            gramian = engine.compute_gramian(losses)
        except gramjd.NotSeparableError:  # sample b of the losses is not sample b of the model
            assert order != [0, 1, 2, 3]
        else:
            assert_close(gramian, dense_gramian(losses, model.parameters()))


def test_dimensions_belong_to_the_signature() -> None:
    """The same ops along other dimensions put the samples elsewhere."""
    model = nn.Linear(4, 4).double()
    engine = Engine(model, batch_dim=0)
    x = torch.randn(4, 4, 4, 4).double()
    for dims in ((0, 1), (1, 0), (0, 2), (0, 1)):
        losses = model(x.transpose(*dims)).transpose(*dims).square().sum((1, 2, 3))
        assert_close(engine.compute_gramian(losses), dense_gramian(losses, model.parameters()))


def test_rounding_noise_is_no_reason_for_a_slow_way() -> None:
    """A shift before a softmax has no gradient; what autograd gives for it is rounding."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.shift = nn.Linear(3, 5), nn.Parameter(torch.randn(1))

        def forward(self, x: Tensor) -> Tensor:
            return (self.layer(x) + self.shift).log_softmax(1)

    model = Shifted().double()
    engine = Engine(model, batch_dim=0, strategies=["ops"])
    out = model(torch.randn(4, 3).double())[:, :2].sum(1)
    assert_close(engine.compute_gramian(out), dense_gramian(out, model.parameters()))


@pytest.mark.parametrize("batch_dim", [0, None])
def test_a_cotangent_of_mere_rounding_is_no_mixing(batch_dim: int | None) -> None:
    """RWKV's running maximum has no gradient; what autograd gives for it belongs to no sample."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.decay = nn.Linear(3, 8), nn.Parameter(torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            most = torch.maximum(h.detach() - 1 + self.decay, h)
            above, below = (h - most).exp(), (-most).exp() + (-h - most).exp()
            return above / below

    model = Scaled().double()
    engine = Engine(model, batch_dim=batch_dim, strategies=["ops"])
    for _ in range(3):
        out = model(torch.randn(4, 3).double()).square().sum(1)
        assert_close(engine.compute_gramian(out), dense_gramian(out, model.parameters()))


@pytest.mark.parametrize("batch_dim", [0, None])
def test_autocast(batch_dim: int | None) -> None:
    """From the recorded ops, and as close to autograd's own as its rows, which it rounds to bfloat16."""
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.LayerNorm(5), nn.Linear(5, 2))
    engine = Engine(model, batch_dim=batch_dim)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(4, 3)).float().square().sum(1)
    gramian = engine.compute_gramian(out)  # a warning would tell of rows
    assert gramian.dtype == torch.float32
    assert_close(gramian, dense_gramian(out, model.parameters()), torch.finfo(torch.bfloat16).eps)


def test_checkpointing_goes_on_working() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.p = nn.Linear(3, 4), nn.Linear(4, 2), nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.utils.checkpoint.checkpoint(lambda h: self.a(h).tanh() * self.p, x, use_reentrant=False)
            return self.b(h)

    model, x = Checkpointed().double(), torch.randn(5, 3).double()
    model(x).square().mean().backward()
    plain = [p.grad for p in model.parameters()]
    model.zero_grad()
    engine = Engine(model, batch_dim=0)
    out = model(x).square().sum(1)
    with pytest.warns(gramjd.SlowPathWarning):
        gramian = engine.compute_gramian(out)
    assert_close(gramian, dense_gramian(out, model.parameters()))
    model(x).square().mean().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))


def test_requires_grad_may_change_between_forwards() -> None:
    model = mlp()
    engine = Engine(model, batch_dim=0)
    x = torch.randn(3, 3).double()
    for frozen in ([], [model[0].weight], [model[0].weight, model[2].bias], [model[2].weight], []):
        model.requires_grad_(True)
        for p in frozen:
            p.requires_grad_(False)
        out = model(x).sum(1)
        assert_close(engine.compute_gramian(out), dense_gramian(out, model.parameters()))


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")  # torch 2.1
def test_lazy_modules() -> None:
    """Their parameters come into being in the first forward."""
    model = nn.Sequential(nn.LazyLinear(5), nn.Tanh(), nn.LazyLinear(2))
    engine = Engine(model, batch_dim=0)
    for _ in range(3):
        losses = model(torch.randn(6, 4)).square().sum(1)
        assert_close(engine.compute_gramian(losses), dense_gramian(losses, model.parameters()), 1e-5)


def test_several_forwards_in_one_output() -> None:
    """Siamese branches, and micro-batches put together."""
    model = mlp()
    engine = Engine(model, batch_dim=0)
    a, b = torch.randn(4, 3).double(), torch.randn(4, 3).double()
    out = (model(a) - model(b)).square().sum(1)
    assert_close(engine.compute_gramian(out), dense_gramian(out, model.parameters()))


def test_several_outputs_of_one_forward() -> None:
    model = mlp()
    engine = Engine(model, batch_dim=0)
    h = model(torch.randn(4, 3).double())
    for out in (h.sum(1), h.square().sum(1), h[:, :2]):
        assert_close(engine.compute_gramian(out), dense_gramian(out, model.parameters()))


def test_two_engines_on_one_model() -> None:
    model, inputs = make("tied")
    whole, part = Engine(model, batch_dim=0), Engine(model.mix, batch_dim=0, strategies=["ops"])
    out = model(*inputs(3)).square().mean((1, 2))
    assert_close(whole.compute_gramian(out), dense_gramian(out, model.parameters()))
    assert_close(part.compute_gramian(out), dense_gramian(out, model.mix.parameters()))
    whole.close()
    out = model(*inputs(3)).square().mean((1, 2))
    assert_close(part.compute_gramian(out), dense_gramian(out, model.mix.parameters()))


def test_dropout_and_side_effects_are_those_of_the_forward_that_ran() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.calls = nn.Linear(3, 4), nn.Linear(4, 2), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            h = nn.functional.dropout(self.a(x), 0.5) * torch.rand(x.shape[0], 1, dtype=x.dtype)
            return self.b(h) if h.sum().item() > 0 else self.b(-h)

    model = Noisy().double()
    engine = Engine(model, batch_dim=0, strategies=["ops"])
    for _ in range(4):
        out = model(torch.randn(5, 3).double()).square().sum(1)
        assert_close(engine.compute_gramian(out), dense_gramian(out, model.parameters()))
    assert model.calls == 4


@pytest.mark.parametrize("name", ["mlp", "tied", "convolutions", "in place", "nested"])
def test_backward_is_as_without_an_engine(name: str) -> None:
    model, inputs = make(name)
    model.eval()
    twin, batch = copy.deepcopy(model), inputs(3)
    Engine(model, batch_dim=0)
    engine = Engine(model, batch_dim=0)
    calls: list[tuple[str, int]] = []
    for tag, m in (("with", model), ("without", twin)):
        next(m.parameters()).register_hook(lambda g, tag=tag: calls.append((tag, g.numel())))
        out = m(*batch)
        out.register_hook(lambda g, tag=tag: calls.append((tag, g.numel())))
        loss = out.square().mean()
        grads = torch.autograd.grad(loss, list(_trainable(m)), create_graph=True, allow_unused=True)
        penalty = loss + sum(g.square().sum() for g in grads if g is not None)
        penalty.backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            assert torch.equal(p.grad, q.grad)
    assert [n for tag, n in calls if tag == "with"] == [n for tag, n in calls if tag == "without"]
    engine.close()


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def test_forward_mode_and_function_transforms_pass_through_a_hooked_model() -> None:
    model, x = mlp(), torch.randn(4, 3).double()
    want = torch.func.vmap(torch.func.jacrev(model))(x)
    engine = Engine(model, batch_dim=0)
    assert_close(torch.func.vmap(torch.func.jacrev(model))(x), want)
    tangent = torch.randn_like(x)
    with warnings.catch_warnings(), torch.autograd.forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, on first use
        out = model(torch.autograd.forward_ad.make_dual(x, tangent))
        got = torch.autograd.forward_ad.unpack_dual(out).tangent
    assert_close(got, torch.einsum("boi,bi->bo", want, tangent))
    engine.close()


def test_copies() -> None:
    model = mlp()
    engine = Engine(model, batch_dim=0)
    x = torch.randn(3, 3).double()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for copied in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ):
        own = Engine(copied, batch_dim=0)
        out = copied(x).sum(1)
        assert_close(own.compute_gramian(out), dense_gramian(out, copied.parameters()))
    both_model, both_engine = copy.deepcopy((model, engine))
    out = both_model(x).sum(1)
    assert_close(both_engine.compute_gramian(out), dense_gramian(out, both_model.parameters()))
    out = model(x).sum(1)
    same = copy.copy(engine)
    out = model(x).sum(1)
    assert_close(same.compute_gramian(out), engine.compute_gramian(out))


def test_it_is_deterministic_and_draws_no_random_numbers() -> None:
    model, inputs = make("class token")
    engine = Engine(model, batch_dim=0)
    out = model(*inputs(3))[:, 0]
    state = torch.get_rng_state()
    first = engine.compute_gramian(out)
    assert torch.equal(first, engine.compute_gramian(out))
    assert torch.equal(state, torch.get_rng_state())


def test_float32_passes_its_own_checks() -> None:
    model, inputs = make("tied")
    model.float()
    engine = Engine(model, batch_dim=0, strategies=["ops"])
    out = model(*inputs(3)).square().mean((1, 2))
    gramian = engine.compute_gramian(out)
    assert gramian.dtype == torch.float32
    assert_close(gramian, dense_gramian(out, model.parameters()), 1e-5)


def test_the_lazy_jacobian() -> None:
    model, inputs = make("tied")
    engine = Engine(model, batch_dim=1)
    out = model(*inputs(3)).square().mean(2).T  # [5, 3]
    jacobian = engine.jacobian(out)
    w = torch.randn_like(out)
    want = torch.autograd.grad(out, list(model.parameters()), w, retain_graph=True)
    got = jacobian.vjp(w)
    for (name, _), expected in zip(model.named_parameters(), want, strict=True):
        assert_close(got[name], expected)
    assert "outputs=[5, 3]" in repr(jacobian)
    dense = jacobian.dense()
    rows = torch.cat([dense[name].reshape(15, -1) for name, _ in model.named_parameters()], 1)
    assert_close((rows @ rows.T).reshape(5, 3, 5, 3).permute(0, 1, 3, 2), jacobian.gramian())


class Mixing(nn.Module):
    """Samples are mixed between two layers."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.mix, self.last = nn.Linear(3, 4), mix, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.mix(self.first(x)).tanh()).square().sum(1)


MIXES: dict[str, Callable[[Tensor], Tensor]] = {
    "batch norm by hand": lambda h: (h - h.mean(0)) / h.var(0).sqrt(),
    "attention across the batch": lambda h: (h @ h.T).softmax(1) @ h,
    "cumulative sum": lambda h: h.cumsum(0),
}


@pytest.mark.parametrize("mix", list(MIXES.values()), ids=list(MIXES))
def test_mixing_in_the_middle_of_a_model_is_an_error(mix: Callable[[Tensor], Tensor]) -> None:
    model = Mixing(mix).double()
    engine, exact = Engine(model, batch_dim=0), Engine(model, batch_dim=None)
    out = model(torch.randn(5, 3, dtype=torch.float64))
    with pytest.raises(gramjd.NotSeparableError, match=r"'first.weight' there is cross-sample .* linear"):
        engine.compute_gramian(out)
    assert_close(exact.compute_gramian(out), dense_gramian(out, model.parameters()))


def test_float32_island_in_a_float64_model() -> None:
    """Its rounding, far above that of float64, is measured; nothing goes the slow way."""

    class Island(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.scale, self.b = nn.Linear(6, 5), nn.Parameter(torch.ones(5)), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).float()
            h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)
            return self.b(self.scale * h.double()).square().sum(1)

    model = Island().double()
    engine = Engine(model, batch_dim=0)
    out = model(torch.randn(7, 6, dtype=torch.float64))
    assert_close(engine.compute_gramian(out), dense_gramian(out, model.parameters()), 1e-6)


@pytest.mark.parametrize("share", [0.3, 0.05, 0.01, 1e-3])
def test_a_gradient_of_mere_rounding_excuses_no_other(share: float) -> None:
    """A key bias has no gradient but rounding; a small use outside every module is found all the same."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            scores = (self.q(x) @ self.k(x).mT).softmax(-1)
            return self.out(scores @ self.v(x)).square().mean((1, 2))

    model, x = Attention().double(), torch.randn(5, 4, 6, dtype=torch.float64)
    engine = Engine(model, batch_dim=0)
    losses = model(x) + share * (x.mean(1) @ model.out.weight.T).sum(1)
    with pytest.warns(gramjd.SlowPathWarning, match="'out.weight' is computed"):
        gramian = engine.compute_gramian(losses)
    assert_close(gramian, dense_gramian(losses, model.parameters()))


def test_deprecated_ways() -> None:
    """The former name of ``strategies`` still works, and says so."""
    model, x = mlp(), torch.randn(4, 3).double()
    with pytest.warns(DeprecationWarning, match="strategies="):
        engine = Engine(model, batch_dim=0, ways=("functional",))
    losses = model(x).sum(1)
    assert_close(engine.compute_gramian(losses), dense_gramian(losses, model.parameters()), 1e-10)


def test_an_engine_is_a_context_and_says_what_it_is() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)), torch.randn(5, 4)
    with Engine(model, batch_dim=0) as engine:
        assert repr(engine) == "Engine(Sequential, batch_dim=0, parameters=4, check='first')"
        engine.compute_gramian(model(x).squeeze(1))
    assert repr(engine).endswith("closed)")
    with pytest.warns(gramjd.SlowPathWarning, match="engine is closed"):
        engine.compute_gramian(model(x).squeeze(1))
    late = model(x).squeeze(1)
    with pytest.warns(gramjd.SlowPathWarning, match="create the engine before the forward"):
        Engine(model, batch_dim=0).compute_gramian(late)


def test_batch_norm_in_training_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    engine, x = Engine(model, batch_dim=0), torch.randn(5, 4)
    with pytest.raises(gramjd.NotSeparableError, match=r"^A batch normalisation uses statistics"):
        engine.compute_gramian(model(x).squeeze(1))
    engine.compute_gramian(model.eval()(x).squeeze(1))
    with pytest.raises(gramjd.NotSeparableError) as raised:
        engine.compute_gramian((out := model(x).squeeze(1)) - out.mean())
    assert "uses statistics" not in str(raised.value)


def test_views_for_notebooks() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    engine = Engine(model, batch_dim=0)
    losses = model(torch.randn(5, 4)).squeeze(1)
    jac = engine.jacobian(losses)
    assert jac.device == torch.device("cpu") and jac.select("0.weight").names == ["0.weight"]
    assert "Jacobian(outputs=[5]" in jac._repr_html_()
    table = engine.explain(losses)._repr_html_()
    assert table.startswith("<table>") and table.count("<tr>") == 1 + 4 + 1 and "0.weight" in table
