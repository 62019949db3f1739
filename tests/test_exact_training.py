"""Exact without changing the model: how it is wrapped, trained and called."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from exactness import Net, check, draw, parameter
from oracle import OLD, assert_close, dense_gramian
from torch import Tensor, nn
from torch.nn.utils import parametrize

import gramjd
from gramjd import Engine
from gramjd.engine.recording.compiled import StandIn

B, D = 6, 4


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def losses_on(x: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda m: m(x).square().sum(1)


# Wrappers.

NEEDS_HOOKS = pytest.mark.skipif(OLD, reason="Dynamo of torch 2.1 fails on modules that have hooks")
DYNAMOS_OWN = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@NEEDS_HOOKS
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model(backend: str) -> None:
    """``OptimizedModule``: its call is replayed; nothing of the recording is compiled."""
    torch._dynamo.reset()
    check(torch.compile(net(), backend=backend), losses_on(draw(B, D)))


@pytest.mark.parametrize("batch_dim", [0, None])
def test_a_compiled_model_under_autocast(batch_dim: int | None) -> None:
    """The replay runs under the same autocast."""
    torch._dynamo.reset()
    model, x = torch.compile(net().float(), backend="eager"), torch.randn(B, D)

    def losses(m: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m(x).float().square().sum(1)

    check(model, losses, batch_dims=[batch_dim], tolerance=2 * torch.finfo(torch.bfloat16).eps)


@NEEDS_HOOKS
@DYNAMOS_OWN
def test_a_compiled_part() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(D, D), torch.compile(net().float(), backend="eager"), nn.Linear(3, 2))
    check(model.double(), losses_on(draw(B, D)))


@NEEDS_HOOKS
def test_an_engine_inside_a_compiled_model() -> None:
    """Hooks inside a compiled call do nothing, and break no graph: rows."""
    torch._dynamo.reset()
    model, x = net(), draw(B, D)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    check(model, lambda _: compiled(x).square().sum(1), rows=["weight", "bias"])


@NEEDS_HOOKS
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("which", ["root", "part", "both"])
@DYNAMOS_OWN
def test_a_model_compiled_in_place(which: str, fullgraph: bool) -> None:
    """``module.compile()`` compiles the hooks, too: the call is stood in for, and replayed."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = nn.Sequential(nn.Linear(D, D), net()).double()
    compiled = {"root": [model], "part": [model[1]], "both": [model, model[1]]}[which]
    for module in compiled:
        module.compile(backend="aot_eager", fullgraph=fullgraph)
    calls = [module._compiled_call_impl for module in compiled]
    other = Engine(model, batch_dim=None)  # at the same time
    check(model, losses_on(draw(B, D)))
    check(model, lambda m: m(draw(B, D)).square().sum(1) + m(draw(B, D)).exp().sum(1))  # used twice
    assert not torch._dynamo.utils.counters["graph_break"]
    assert all(copy.deepcopy(module)._compiled_call_impl is None for module in compiled)
    other.close()
    assert [module._compiled_call_impl for module in compiled] == calls


@NEEDS_HOOKS
@DYNAMOS_OWN
def test_a_model_compiled_in_place_after_its_engine_was_made() -> None:
    """Its first call cannot be seen: rows. Those after it are; those of a part always were."""
    torch._dynamo.reset()
    model, x = nn.Sequential(nn.Linear(D, D), net()).double(), draw(B, D)
    engine = Engine(model, batch_dim=0)
    for part in (model[1], model):
        part.compile(backend="eager")
        for step in range(3):
            out = losses_on(x)(model)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", gramjd.SlowPathWarning)
                gramian = engine.compute_gramian(out)
            assert len(caught) == (part is model and step == 0)
            assert_close(gramian, dense_gramian(out, model.parameters()))
    engine.close()
    assert not any(isinstance(m._compiled_call_impl, StandIn) for m in (model, model[1]))


@NEEDS_HOOKS
def test_a_compiled_function_inside_a_model() -> None:
    """Its graph is that without an engine; what it uses is replayed with the call of its module."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Net(lambda m, x: m.last(m.scaled(x, m.scale)), last=nn.Linear(D, 2), scale=parameter(D))
    model.scaled = torch.compile(lambda x, scale: (x * scale).tanh(), backend="eager", fullgraph=True)
    check(model, losses_on(draw(B, D)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@NEEDS_HOOKS
@DYNAMOS_OWN
def test_two_engines_that_see_one_opaque_call() -> None:
    """It is marked once: without a check of the total, what two marks give would be added up."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(D, D), torch.compile(net(), backend="eager")).double()
    engines = [Engine(model, batch_dim=0, check="never", strategies=["ops", "functional"]) for _ in range(2)]
    for engine in engines:
        out = losses_on(draw(B, D))(model)
        assert_close(engine.compute_gramian(out), dense_gramian(out, model.parameters()))


@pytest.fixture
def one_process() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_distributed_data_parallel() -> None:
    """Registered outside or inside; the gradients of a weighted backward are those without an engine."""
    model, x = net(), draw(B, D)
    twin = copy.deepcopy(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    check(wrapped, losses_on(x))
    check(model, lambda _: wrapped(x).square().sum(1))
    engine = Engine(wrapped, batch_dim=0)
    out = wrapped(x).square().sum(1)
    weights = engine.compute_gramian(out).sum(0)
    out.backward(weights)
    twin(x).square().sum(1).backward(weights)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(p.grad, q.grad)


# Derived and frozen weights.


class Symmetric(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).T


class Averaged(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return (w + w.roll(1, 0)) / 2


def test_parametrize() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 3)).double()
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    parametrize.register_parametrization(model[2], "weight", Averaged())
    check(model, losses_on(draw(B, D)))


class LoRALinear(nn.Module):
    """A frozen layer and a trained update of low rank (Hu et al., arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int = 2, dropout: float = 0.1) -> None:
        super().__init__()
        self.base, self.dropout = base.requires_grad_(False), nn.Dropout(dropout)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        self.scaling = 8 / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(self.dropout(x))) * self.scaling


def test_lora_with_a_frozen_base() -> None:
    model = net()
    model[0], model[2] = LoRALinear(model[0]), LoRALinear(model[2])
    check(model.double(), losses_on(draw(B, D)))


def test_requires_grad_toggled_between_steps() -> None:
    """One engine; what is frozen takes no part, what is thawed takes part again."""
    model, x = net(), draw(B, D)
    engine = Engine(model, batch_dim=0, strategies=["ops"])
    for step in range(6):
        for i, p in enumerate(model.parameters()):
            p.requires_grad_(step % 3 == 0 or i % 3 == step % 3)
        out = losses_on(x)(model)
        assert_close(engine.compute_gramian(out), dense_gramian(out, model.parameters()))


# Several forwards, several outputs, several engines.

FORWARDS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "siamese": lambda m, x, y: (m(x) - m(y)).square().sum(1),
    "triplets": lambda m, x, y: F.triplet_margin_loss(m(x), m(y), m(x + y), reduction="none"),
    "a permuted forward": lambda m, x, y: (m(x) - m(y)[torch.tensor([2, 0, 1, 5, 3, 4])]).square().sum(1),
    "micro-batches": lambda m, x, y: torch.cat([m(part).square().sum(1) for part in x.split(2)]),
    "uneven micro-batches": lambda m, x, y: torch.cat([m(part).square().sum(1) for part in x.split(4)]),
    "micro-batches interleaved": lambda m, x, y: torch.stack(
        [m(x[::2]).square().sum(1), m(x[1::2]).square().sum(1)], 1
    ).flatten(),
    "a recurrent use": lambda m, x, y: m(F.pad(m(x), (0, 1))).square().sum(1),
}


@pytest.mark.parametrize("name", list(FORWARDS))
def test_several_forwards(name: str) -> None:
    x, y = draw(B, D), draw(B, D)
    check(net(), lambda m: FORWARDS[name](m, x, y), times=3)


def test_many_permuted_samples_in_float32() -> None:
    """Weights of many samples are close to each other; owners are found all the same."""
    model, x, order = net().float(), torch.randn(256, D), torch.randperm(256)
    check(model, lambda m: m(x)[order].square().sum(1), batch_dims=[0], tolerance=1e-5)


def test_several_engines_on_several_models() -> None:
    """An encoder and a decoder with an engine each, beside one for both."""
    encoder, decoder, x = nn.Linear(D, 3).double(), nn.Linear(3, D).double(), draw(B, D)
    engines = [
        Engine(encoder, batch_dim=0),
        Engine(decoder, batch_dim=0),
        Engine(encoder, decoder, batch_dim=0),
    ]
    for _ in range(2):
        out = (decoder(encoder(x).tanh()) - x).square().sum(1)
        one, two, both = (engine.compute_gramian(out) for engine in engines)
        assert_close(one, dense_gramian(out, encoder.parameters()))
        assert_close(two, dense_gramian(out, decoder.parameters()))
        assert_close(both, one + two)


def test_several_outputs_of_one_forward() -> None:
    """Losses of tasks apart, together, and of some samples only."""
    model, x = net(), draw(B, D)
    engine, whole = Engine(model, batch_dim=0), Engine(model, batch_dim=None)
    h = model(x)
    for out in (h.square().sum(1), h[:, 0].exp(), h[2:5].sum(1), h):
        want = dense_gramian(out, model.parameters())
        assert_close(engine.compute_gramian(out), want)
        assert_close(whole.compute_gramian(out), want)
    assert_close(whole.compute_gramian(h.sum()), dense_gramian(h.sum(), model.parameters()))


# Losses that contain gradients. The weights enter by autograd's own ops, too, which nobody sees: rows.

HIDDEN = ["weight", "bias"]


def slope(m: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """``[B]`` outputs and the ``[B, D]`` derivative of each with respect to its input."""
    x = x.clone().requires_grad_()
    out = m(x).square().sum(1)
    return out, torch.autograd.grad(out.sum(), x, create_graph=True)[0]


def test_gradient_penalties() -> None:
    x = draw(B, D)

    def losses(m: nn.Module) -> Tensor:
        out, gradient = slope(m, x)
        return out + (gradient.norm(dim=1) - 1) ** 2

    check(net(), losses, rows=HIDDEN)


@pytest.mark.parametrize("objectives", [1, 2])
@pytest.mark.parametrize("sizes", [(2, 2), (2, 3), (3, 2), (4, 2)])
@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.filterwarnings("ignore::gramjd.SlowPathWarning")
def test_penalties_through_a_group_normalisation(
    batch_dim: int | None, sizes: tuple[int, int], objectives: int
) -> None:
    """Of several cotangents at once, torch's backward pass gives something else for some sizes."""
    samples, steps = sizes
    model = Net(lambda m, x: F.group_norm(m.first(x.mT).mT.tanh(), 1, eps=0.1), first=nn.Linear(2, 2))
    x = draw(samples, 2, steps).requires_grad_()
    h = model(x)
    (gradient,) = torch.autograd.grad(h.square().sum(), x, create_graph=True)
    h = h + gradient
    losses = torch.stack([h.sin().sum((1, 2)), h.square().mean((1, 2))][:objectives], 1)
    found = Engine(model, batch_dim=batch_dim).compute_gramian(losses)
    assert_close(found, dense_gramian(losses, model.parameters()))


def test_penalties_on_the_gradients_of_parameters() -> None:
    """They mix samples, as the parameters are everyone's."""
    x, model = draw(B, D), net()

    def losses(m: nn.Module) -> Tensor:
        out = m(x).square().sum(1)
        gradients = torch.autograd.grad(out.mean(), list(m.parameters()), create_graph=True)
        return out + sum(g.square().sum() for g in gradients)

    engine = Engine(model, batch_dim=0)
    with pytest.raises(gramjd.NotSeparableError, match="batch_dim=None"):
        engine.compute_gramian(losses(model))
    engine.close()
    check(model, losses, batch_dims=[None], rows=HIDDEN)


def test_derivatives_by_torch_func_in_the_loss() -> None:
    x = draw(B, D)

    def losses(m: nn.Module) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda z: m(z).sum()))(x).square().sum(1) + m(x).sum(1)

    check(net(), losses, rows=HIDDEN)


# Mixed precision.


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA is not here")


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", torch.bfloat16),
        pytest.param("cuda", torch.bfloat16, marks=needs_cuda),
        pytest.param("cuda", torch.float16, marks=needs_cuda),
    ],
)
def test_autocast(device: str, dtype: torch.dtype, inside: bool, batch_dim: int | None) -> None:
    """Scaled losses; ``compute_gramian`` in or outside the context; a Gramian of float32."""
    model = nn.Sequential(nn.Linear(D, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)).to(device)
    x = torch.randn(B, D, device=device)
    scale = 2.0**16 if dtype == torch.bfloat16 else 2.0**8  # where GradScaler starts, and ends up
    engine = Engine(model, batch_dim=batch_dim, strategies=["ops"])
    for _ in range(2):
        with torch.autocast(device, dtype):
            hidden = model(x)
            assert hidden.dtype == dtype
            losses = hidden.float().square().sum(1) * scale
            gramian = engine.compute_gramian(losses) if inside else None
        gramian = engine.compute_gramian(losses) if gramian is None else gramian
        assert gramian.dtype == torch.float32
        want = dense_gramian(losses, model.parameters())
        assert_close(gramian, want, torch.finfo(dtype).eps)
        assert_close(gramian / scale**2, dense_gramian(losses / scale, model.parameters()), 0.01)


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_networks_under_autocast(kind: type[nn.RNNBase], batch_dim: int | None) -> None:
    """Their replay computes with more digits than they did: layouts are found at theirs.

    A GRU's rounding is more than a replay may differ by: rows.
    """
    x = torch.randn(7, 3, D)

    def losses(m: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m(x)[0].float().square().sum((0, 2))

    try:
        losses(kind(D, 5))
    except RuntimeError as error:  # oneDNN has no LSTM of bfloat16 on some CPUs
        pytest.skip(f"torch itself fails: {error}")
    check(kind(D, 5), losses, batch_dims=[batch_dim], tolerance=2 * torch.finfo(torch.bfloat16).eps,
          rows=["weight", "bias"] if kind is nn.GRU else [])  # fmt: skip


def test_a_gradient_scaler_leaves_the_weights_alone() -> None:
    """A step: scale the losses, weight them by their Gramian, unscale, step."""
    model, x = net().float(), torch.randn(B, D)
    twin = copy.deepcopy(model)
    engine = Engine(model, batch_dim=0)
    factor = 2.0**16
    losses = model(x).square().sum(1) * factor
    weights = engine.compute_gramian(losses).sum(0)
    weights = weights / weights.norm()  # of no scale
    losses.backward(weights)
    twin(x).square().sum(1).backward(weights)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(p.grad / factor, q.grad, 1e-5)


@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.parametrize("first", [True, False])
def test_gradients_that_overflow(first: bool, batch_dim: int | None) -> None:
    """A scale too large for float16 raises, at the first call or later, and is not remembered."""
    model = nn.Sequential(nn.Linear(D, 8), Halved(), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(B, D)
    engine = Engine(model, batch_dim=batch_dim, strategies=["ops"])
    for scale in (1e8, 1.0, 1e8, 16.0) if first else (1.0, 1e8, 16.0):
        out = model(x).square().sum(1) * scale
        if scale > 1e4:
            with pytest.raises(gramjd.NotFiniteError, match="GradScaler"):
                engine.compute_gramian(out)
        else:
            assert_close(engine.compute_gramian(out), dense_gramian(out, model.parameters()), 1e-5)


class Halved(nn.Module):
    """Whose gradients pass through float16."""

    def forward(self, x: Tensor) -> Tensor:
        return x.half().float()


def test_half_precision_is_accumulated_in_float32() -> None:
    """Sums of 4096 products of bfloat16: the Gramian keeps what bfloat16 sums would lose."""
    model = nn.Linear(4096, 1, bias=False).bfloat16()
    x = torch.ones(2, 4096, dtype=torch.bfloat16)
    engine = Engine(model, batch_dim=0)
    gramian = engine.compute_gramian(model(x)[:, 0].float())
    assert gramian.dtype == torch.float32
    assert_close(gramian, torch.full((2, 2), 4096.0), 1e-6)


def test_losses_of_bfloat16() -> None:
    """By all strategies, and by the transforms; torch 2.1 has no identity matrix of bfloat16."""
    model = nn.Linear(3, 2, bias=False).bfloat16()
    x = torch.eye(3).bfloat16()  # every product is exact
    for strategies in (["ops"], ["functional"], ["rows"]):
        for batch_dim in (0, None):
            out = Engine(model, batch_dim=batch_dim, strategies=strategies).compute_gramian(model(x)).float()
            assert_close(out, torch.einsum("ab,cd->acdb", torch.eye(3), torch.eye(2)))
    function, parameters = gramjd.functional_loss(model)
    assert_close(gramjd.gramian(function)(parameters, x).float(), out)


def test_a_parameter_that_takes_no_part() -> None:
    model = Net(lambda m, x: m.used(x), used=nn.Linear(D, 2), unused=parameter(3))
    check(model, losses_on(draw(B, D)))


@pytest.mark.parametrize("batch_dim", [0, None])
def test_tables_with_sparse_gradients(batch_dim: int | None) -> None:
    model = nn.Sequential(nn.Embedding(7, D, sparse=True), nn.Flatten(), nn.Linear(3 * D, 2)).double()
    twin, ids = copy.deepcopy(model), torch.randint(0, 7, (B, 3))
    twin[0].sparse = False
    engine = Engine(model, batch_dim=batch_dim, strategies=["ops"])
    for _ in range(2):
        gramian = engine.compute_gramian(losses_on(ids)(model))
        assert_close(gramian, dense_gramian(losses_on(ids)(twin), twin.parameters()))
