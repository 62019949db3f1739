"""What an engine trusts after a proof, for which graphs, and that audits find what a graph does not show."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from exactness import Net, parameter
from oracle import assert_close, dense_gramian, needs_shapes
from torch import Tensor, nn

import gramjd
from gramjd import Engine, contraction
from gramjd.blocks import Block, Dense
from gramjd.engine.analysis.graph import walk
from gramjd.engine.analysis.signature import Unlisted, separation_keys
from gramjd.engine.solving import separation, solve
from gramjd.engine.solving.proofs import Proofs, describe
from gramjd.engine.solving.separation import patterns, patterns_for

pytestmark = needs_shapes

WHOLE = "it is proven that no data change which entries belong to which sample"


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 3, 22, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(6 * 9, 2)
    ).double()


def step(engine: Engine, model: nn.Module, x: Tensor) -> str:
    """One step, exact; what it rests on."""
    losses = model(x).flatten(1).sin().sum(1)
    jacobian, request, solution = engine._jacobian(losses)
    assert_close(jacobian.gramian(), dense_gramian(losses, model.parameters()))
    return describe(request, solution, False)


def test_explain_says_what_a_result_rests_on() -> None:
    model = nn.Linear(3, 2).double()
    engine = Engine(model, batch_dim=0)
    proofs = [engine.explain(model(draw(6, 3)).sum(1)).proof for _ in range(4)]
    assert "Proven" in proofs[0] and "2 of 4 parts" in proofs[0]
    assert "Verified against autograd's gradients in this call" in proofs[1]  # the audit of the second call
    assert "in an earlier call of this structure, 2 ago" in proofs[2] and WHOLE in proofs[2]
    assert str(engine.explain(model(draw(6, 3)).sum(1))).endswith(".")
    assert (
        "check='never'" in Engine(model, batch_dim=0, check="never").explain(model(draw(6, 3)).sum(1)).proof
    )


def test_losses_that_the_module_returns() -> None:
    """The cotangents of a call that returns ``[B]`` have one dimension."""

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).square().sum(1)

    model = WithLoss()
    engine = Engine(model, batch_dim=0)
    proofs = []
    for _ in range(3):
        losses = model(draw(6, 3))
        proofs.append(engine.explain(losses).proof)
        assert_close(engine.compute_gramian(losses), dense_gramian(losses, model.parameters()))
    assert WHOLE in proofs[2]


def test_a_proof_that_failed_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same layouts of as many samples: it would fail again, by a backward pass."""
    tried = []
    spread = solve.spread
    monkeypatch.setattr(solve, "spread", lambda *args, **kw: (tried.append(1), spread(*args, **kw))[1])
    model = nn.Linear(3, 2).double()
    engine = Engine(model, batch_dim=0)
    for samples, passes in [(4, 1), (4, 1), (4, 1), (5, 2), (5, 2)]:
        out = model(draw(samples, 3))
        losses = (out + 0 * out.roll(1, 0)).square().sum(1)  # NaN comes through, and no derivative
        assert "other data could change that" in engine.explain(losses).proof
        assert len(tried) == passes
        assert_close(engine.compute_gramian(losses), dense_gramian(losses, model.parameters()))


def test_an_error_of_ours_is_no_refusal_of_a_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    model, engine = (net := nn.Linear(3, 2).double()), Engine(net, batch_dim=0)
    monkeypatch.setattr(separation.Reached, "of", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.compute_gramian(model(draw(4, 3)).sum(1))


@pytest.mark.parametrize("shape", [(6,), (6, 4), (0, 6), (6, 0, 2)])
def test_masks_along_dimensions_of_samples(shape: tuple[int, ...]) -> None:
    found = separation.Reached.of(torch.zeros(shape), 6)
    assert {dim: len(mask) for dim, mask in found.along.items()} == {
        dim: size for dim, size in enumerate(shape) if size % 6 == 0
    }


def test_a_hook_that_refuses_nan() -> None:
    def refuse(gradient: Tensor) -> None:
        if bool(gradient.isnan().any()):
            raise ValueError("NaN")

    model, engine = (net := nn.Linear(3, 2).double()), Engine(net, batch_dim=0)
    for _ in range(3):
        out = model(draw(4, 3)).sin()
        out.register_hook(refuse)
        losses = out.sum(1)
        assert_close(engine.compute_gramian(losses), dense_gramian(losses, model.parameters()))


def test_a_proof_holds_for_other_batch_sizes_and_lengths() -> None:
    model, engine = encoder(), None
    engine = Engine(model, batch_dim=0, audit=None)
    for _ in range(3):
        step(engine, model, draw(5, 7, 12))
    for batch, length in [(5, 8), (7, 9), (7, 13), (8, 11), (10, 17)]:
        assert WHOLE in step(engine, model, draw(batch, length, 12)), (batch, length)


def test_coincidences_of_sizes_cost_a_proof_and_no_number() -> None:
    model = encoder()
    engine = Engine(model, batch_dim=0, audit=None)
    for _ in range(3):
        step(engine, model, draw(5, 7, 12))
    for batch, length in [(7, 7), (4, 7), (12, 12), (5, 12), (3, 3), (1, 5)]:
        assert WHOLE not in step(engine, model, draw(batch, length, 12)), (batch, length)


def test_a_new_size_of_images_costs_a_proof() -> None:
    model = convolutional()
    engine = Engine(model, batch_dim=0, audit=None)
    for _ in range(3):
        step(engine, model, draw(5, 2, 8, 8))
    assert WHOLE in step(engine, model, draw(5, 2, 8, 8))
    assert "measured" in step(engine, model, draw(3, 2, 8, 8))  # six channels, which five do not divide


@pytest.mark.parametrize("samples", [2, 3, 6, 7, 20, 21, 64])
def test_patterns_tell_each_sample_from_each_other(samples: int) -> None:
    found = torch.stack(patterns(samples, patterns_for(samples)))
    for i in range(samples):
        for j in range(samples):
            assert i == j or bool((found[:, i] & ~found[:, j]).any())


def test_one_pair_among_many_behind_a_gate_is_never_trusted() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.gate = nn.Linear(3, 3), nn.Parameter(torch.zeros(()))
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            leak = torch.zeros(len(x), len(x), dtype=x.dtype)
            leak[4, 11] = 1.0
            return h + self.gate * (leak.tril(0) + leak.triu(0)) @ h.tanh()

    model = Pair()
    engine = Engine(model, batch_dim=0)
    for _ in range(12):
        assert WHOLE not in step(engine, model, draw(16, 3))
    with torch.no_grad():
        model.gate.fill_(0.5)
    with pytest.raises(gramjd.NotSeparableError):
        engine.compute_gramian(model(draw(16, 3)).square().sum(1))


def steps_until(error: type[Exception], at: Callable[[int], Tensor], engine: Engine, most: int) -> int:
    for number in range(1, most):
        losses = at(number)
        try:
            engine.compute_gramian(losses)
        except error as raised:
            message = str(raised)
            break
    else:
        return most
    assert f"in call {number}" in message and "may be wrong" in message
    return number


@pytest.mark.parametrize(("audit", "found"), [(256, 16), (5, 15), (None, 40)])
def test_an_audit_finds_a_hook_that_begins_to_mix_samples(audit: int | None, found: int) -> None:
    """Nothing in the graph shows it; the message says which calls may be wrong."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    engine = Engine(model, batch_dim=0, audit=audit)

    def at(number: int) -> Tensor:
        h = model[0](draw(8, 3))
        if number > 10:
            h.register_hook(lambda g: g + g.roll(1, -2))
        return model[2](torch.tanh(h))[:, 0]

    assert steps_until(gramjd.CheckFailedError, at, engine, 40) == found


@pytest.mark.parametrize("audit", [256, 5])
def test_after_a_failed_audit_each_call_is_verified(audit: int) -> None:
    """The structure is trusted no more: samples depend on each other in every second call, and it says so."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    engine = Engine(model, batch_dim=0, audit=audit)

    def at(number: int, mixes: bool) -> Tensor:
        h = model[0](draw(6, 3))
        h.register_hook(lambda g: g + g.roll(1, -2) if mixes else g)
        return model[2](torch.tanh(h))[:, 0]

    steps_until(gramjd.CheckFailedError, lambda number: at(number, number > 10), engine, 40)
    for number in range(12):
        losses = at(number, number % 2 == 1)
        if number % 2:
            with pytest.raises(gramjd.NotSeparableError):
                engine.compute_gramian(losses)
        else:
            assert_close(engine.compute_gramian(losses), dense_gramian(losses, model.parameters()))
    assert "of which an audit failed" in engine.explain(at(0, False)).proof


def test_audits_are_rare() -> None:
    proofs = Proofs(256)
    due = [call for call in range(2, 2000) if proofs._is_due(call)]
    assert due == [2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 1792]


@pytest.mark.parametrize("audit", [0, -1, "often", 1.5])
def test_audits_that_are_no_number_of_calls_are_refused(audit: object) -> None:
    with pytest.raises(ValueError, match="audit must be"):
        Engine(nn.Linear(2, 2), batch_dim=0, audit=audit)  # type: ignore[arg-type]


def key(x: Tensor, samples: int) -> object:
    losses = x.flatten(1).sum(1) if x.ndim > 1 else x
    graph = walk(losses)
    return graph.structure, separation_keys(graph.order, graph.numbers, tuple(losses.shape), samples)[0]


def leaf(*shape: int) -> Tensor:
    return draw(*shape).requires_grad_()


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * g


def test_what_is_not_listed_has_no_key() -> None:
    with pytest.raises(Unlisted, match="TwiceBackward"):
        key(Twice.apply(2 * leaf(4, 3)), 4)
    with pytest.raises(Unlisted, match="MaskedScatterBackward"):
        key(draw(4, 3).masked_scatter(torch.ones(4, 3, dtype=torch.bool), 2 * leaf(4, 3)), 4)
    written = torch.arange(4)
    out = (2 * leaf(4, 3))[written]
    written[0] = 3
    with pytest.raises(Unlisted, match="IndexBackward0, whose indices were written in place"):
        key(out, 4)
    with pytest.raises(Unlisted, match="Cat"):
        key(torch.cat([draw(1, 3), leaf(2, 3), draw(1, 3)]), 4)


def test_what_is_over_leaves_alone_needs_no_list() -> None:
    """Nothing is behind a leaf that could reach another sample: a table indexed by a tensor, above all."""
    assert key(Twice.apply(leaf(4, 3)), 4) == key(Twice.apply(leaf(4, 3)), 4)
    assert key(leaf(9, 3)[torch.tensor([3, 1, 1, 0])], 4) == key(leaf(9, 3)[torch.tensor([8, 2, 0, 1])], 4)


# What is different in two programs of the same ops on the same shapes, or of the same ops.
DIFFERENT: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
    "the start of a slice": (lambda: leaf(6, 3)[0:4], lambda: leaf(6, 3)[1:5]),
    "the step of a slice": (lambda: leaf(9, 3)[0:4], lambda: leaf(9, 3)[0:8:2]),
    "an index": (lambda: leaf(4, 5, 3)[:, 0], lambda: leaf(4, 5, 3)[:, 1]),
    "a shift": (lambda: leaf(4, 3).roll(1, 0), lambda: leaf(4, 3).roll(2, 0)),
    "sizes of a split": (lambda: leaf(8, 3).split([4, 4])[0], lambda: leaf(8, 3).split([4, 1, 3])[0]),
    "the order of a view": (lambda: leaf(20).view(4, 5), lambda: leaf(20).view(5, 4).T),
    "offsets of a diagonal": (
        lambda: leaf(4, 4, 5).diagonal(0, 0, 1).T,
        lambda: leaf(4, 4, 5).diagonal(1, 1, 2),
    ),
    "padding": (
        lambda: nn.functional.pad(leaf(3, 3), (0, 0, 0, 1)),
        lambda: nn.functional.pad(leaf(3, 3), (0, 0, 1, 0)),
    ),
    "dimensions of a transposition": (
        lambda: leaf(4, 4, 4).transpose(0, 1),
        lambda: leaf(4, 4, 4).transpose(1, 2),
    ),
    "what a concatenation begins with": (
        lambda: torch.cat([draw(2, 3), leaf(2, 3)]),
        lambda: torch.cat([leaf(2, 3), draw(2, 3)]),
    ),
    "groups of a convolution": (
        lambda: nn.functional.conv1d(leaf(1, 4, 3), draw(4, 4, 1))[0],
        lambda: nn.functional.conv1d(leaf(1, 4, 3), draw(4, 1, 1), groups=4)[0],
    ),
}


@pytest.mark.parametrize("name", list(DIFFERENT))
def test_keys_that_differ(name: str) -> None:
    first, second = DIFFERENT[name]
    assert key(first(), 4) == key(first(), 4)
    assert key(first(), 4) != key(second(), 4)


def only_once(x: Tensor, p: Tensor) -> Tensor:
    """An op with a rule that is right for a single sample alone."""
    if torch.overrides.has_torch_function((x, p)):
        found: Tensor = torch.overrides.handle_torch_function(only_once, (x, p), x, p)
        return found
    return (x * p).sum(-1)


def test_a_proof_for_one_sample_is_none_for_several() -> None:
    @gramjd.register_rule(only_once, wrt="p", needs=["x"])
    def rule(c: Tensor, x: Tensor, p: Tensor) -> Dense:
        return Dense((c.unsqueeze(-1) * x[0]).sum(2))

    model = Net(lambda m, x: only_once(x, m.p), p=parameter(5))
    engine = Engine(model, batch_dim=0, audit=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gramjd.SlowPathWarning)
        for samples in (1, 1, 1, 1, 6, 6, 1, 4):
            losses = model(draw(samples, 5)).sin()
            assert_close(engine.compute_gramian(losses), dense_gramian(losses, model.parameters()))


def plant_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every product of two blocks wrong in one entry, by a tenth of the largest."""
    right = contraction.contract

    def wrong(u: Block, v: Block, options: contraction.Options = contraction.DEFAULT) -> Tensor:
        found = right(u, v, options).clone()
        found[0, 0, 0, 1] += 0.1 * found.abs().max()
        return found

    monkeypatch.setattr(contraction, "contract", wrong)


@pytest.mark.parametrize(("width", "length"), [(64, 1), (2, 30)])  # pairwise, by rows
def test_a_wrong_contraction_is_an_error(monkeypatch: pytest.MonkeyPatch, width: int, length: int) -> None:
    """The gradients are right, and so they say nothing of it."""
    model, x = nn.Linear(width, width, bias=False).double(), draw(3, length, width)

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return (x @ p["w"]).square().sum()

    plant_an_error(monkeypatch)
    with pytest.raises(gramjd.CheckFailedError, match="with respect to weight"):
        Engine(model, batch_dim=0).compute_gramian(model(x).square().sum((1, 2)))
    with pytest.raises(gramjd.CheckFailedError, match="The Gramian with respect to"):
        gramjd.gramian(loss)({"w": draw(width, 5)}, x)


def reflected(m: Net, x: Tensor) -> Tensor:
    """A Householder flow before a Gaussian, whose density it does not change."""
    unit = m.p / m.p.norm()
    return m.linear(x) - 2 * (m.linear(x) @ unit)[..., None] * unit


def undone(m: Net, x: Tensor) -> Tensor:
    return m.linear(x) * m.p.exp() * (-m.p).exp()


def rotated(m: Net, x: Tensor) -> Tensor:
    return m.linear(x) @ torch.linalg.matrix_exp(m.p[:, None] * m.p.cos() - m.p * m.p.cos()[:, None])


def subtracted(m: Net, x: Tensor) -> Tensor:
    """Blocks of two kinds, so that each pair is contracted alone."""
    weight = m.p.view(2, 2)
    return (
        m.linear(x) + F.linear(x, weight).repeat(1, 1, 2) - (x[..., None, :] * weight).sum(-1).repeat(1, 1, 2)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("function", [reflected, undone, rotated, subtracted])
def test_uses_that_cancel_exactly(function: Callable[[Net, Tensor], Tensor], dtype: torch.dtype) -> None:
    """The Gramian of such a parameter is the rounding of its uses, and so are its gradients."""
    wide = 2 if function is subtracted else 4
    model = Net(function, p=parameter(4), linear=nn.Linear(wide, 4)).to(dtype)
    engine, x = Engine(model, batch_dim=0), torch.randn(5, 3, wide, dtype=dtype)
    want, tolerance = dense_gramian(gaussian(model(x)), model.parameters()), 64 * torch.finfo(dtype).eps
    for _ in range(2):
        assert_close(engine.compute_gramian(gaussian(model(x))), want, tolerance)

    def loss(p: dict[str, Tensor], sample: Tensor) -> Tensor:
        return gaussian(torch.func.functional_call(model, p, (sample[None],)))[0]

    assert_close(gramjd.gramian(loss)(dict(model.named_parameters()), x), want, tolerance)


def gaussian(out: Tensor) -> Tensor:
    return out.square().flatten(1).sum(1)


def test_a_wrong_contraction_of_uses_that_cancel_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What may cancel is no excuse for an error of the size of what cancels."""
    model = Net(subtracted, p=parameter(4), linear=nn.Linear(2, 4).requires_grad_(False))
    plant_an_error(monkeypatch)
    with pytest.raises(gramjd.CheckFailedError, match="with respect to p"):
        Engine(model, batch_dim=0).compute_gramian(gaussian(model(draw(5, 3, 2))))
