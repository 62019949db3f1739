"""The transforms under ``torch.compile(fullgraph=True)``: one graph, equal to eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close
from test_composition import (
    INSIDE,
    WRITES,
    Params,
    dense,
    derived_inside,
    forward_over_reverse,
    harmless,
    inner_vmap,
    logdet,
    loss,
    make_params,
    maml,
    mlp,
    writing,
)
from torch import Tensor, nn

import gramjd
from gramjd import pytree

RECENT = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 13)
pytestmark = [
    pytest.mark.skipif(not RECENT, reason="Dynamo traces these transforms as of torch 2.13"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),  # batch norm under vmap
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


def check(func: Callable[..., Any], *args: Any, backend: str = "aot_eager") -> None:
    """Compiled to one graph, a function returns what it returns in eager mode."""
    found, wanted = torch.compile(func, fullgraph=True, backend=backend)(*args), func(*args)
    leaves = pytree.leaves(wanted)
    assert leaves and len(leaves) == len(pytree.leaves(found))
    for got, want in zip(pytree.leaves(found), leaves, strict=True):
        assert_close(got, want)


def step_of(model: nn.Module, objective: Callable[..., Tensor]) -> tuple[Callable[..., Any], Params]:
    """A Jacobian-descent step with weights that are a function of the Gramian, and the parameters."""
    function, params = gramjd.functional_loss(model.double(), objective)

    def step(params: Params, x: Tensor, y: Tensor) -> Any:
        J, losses = gramjd.jacobian_and_value(function)(params, x, y)
        G = J.gramian()
        kinds = [[type(block).__name__ for block in blocks] for blocks in J.blocks]
        return losses, G, J.vjp(torch.linalg.solve(G + torch.eye(len(G)), losses)), kinds

    return step, params


def small_mlp() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.LayerNorm(5), nn.Linear(5, 4))
    return model, torch.randn(6, 3), torch.randint(0, 4, (6,))


def small_cnn() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4),
    )  # fmt: skip
    return model.eval(), torch.randn(3, 1, 8, 8), torch.randint(0, 4, (3,))


class Encoder(nn.Module):
    """Embedding, positions, two layers of torch's own encoder, a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(11, 8), nn.Parameter(torch.randn(5, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(ids) + self.position)).mT


def small_transformer() -> tuple[nn.Module, Tensor, Tensor]:
    ids = torch.randint(0, 11, (3, 5))
    return Encoder(), ids, ids.roll(1, 1)


MODELS = [small_mlp, small_cnn, small_transformer]


def per_sample(output: Tensor, target: Tensor) -> Tensor:
    losses = F.cross_entropy(output, target, reduction="none")
    return losses if losses.ndim == 1 else losses.mean(1)


@pytest.mark.parametrize("make", MODELS)
def test_steps_of_models(make: Callable[[], tuple[nn.Module, Tensor, Tensor]]) -> None:
    """One graph gives the losses, the Gramian and the weighted gradient, from blocks of the same kinds."""
    torch.set_default_dtype(torch.float64)
    try:
        model, x, y = make()
        step, params = step_of(model, per_sample)
        *found, kinds = torch.compile(step, fullgraph=True, backend="aot_eager")(params, x, y)
        *wanted, same = step(params, x, y)
    finally:
        torch.set_default_dtype(torch.float32)
    assert kinds == same
    for got, want in zip(pytree.leaves(found), pytree.leaves(wanted), strict=True):
        assert_close(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("make", MODELS)
def test_steps_of_models_by_the_default_backend(
    make: Callable[[], tuple[nn.Module, Tensor, Tensor]],
) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model, x, y = make()
        step, params = step_of(model, per_sample)
        check(lambda *args: step(*args)[:3], params, x, y, backend="inductor")
    finally:
        torch.set_default_dtype(torch.float32)


class Sizes:
    """A backend that counts graphs."""

    graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return graph


def two_layers(p: Params, x: Tensor, y: Tensor) -> Tensor:
    """Objectives per sample of ops whose batching rules leave sizes as symbols."""
    return (torch.tanh(x @ p["w1"]) @ p["w2"] - y).square()


def whole_step(params: Params, x: Tensor, y: Tensor) -> Any:
    J, values = gramjd.jacobian_and_value(two_layers)(params, x, y)
    return values, J.gramian(), J.norms(), J.vjp(values)


SIZES = [(4, 5, 3), (6, 5, 3), (7, 5, 3), (7, 6, 3), (9, 8, 3)]  # batch, width, objectives


@pytest.mark.parametrize(
    "more", [[], pytest.param([(9, 8, 4), (5, 9, 6)], marks=pytest.mark.slow)], ids=["widths", "objectives"]
)
def test_sizes_as_symbols(more: list[tuple[int, int, int]]) -> None:
    """One graph of symbols serves other batch sizes, widths and numbers of objectives."""
    count = Sizes()
    compiled = torch.compile(whole_step, fullgraph=True, backend=count)
    met = []
    for batch, width, outputs in [*SIZES, *more]:
        x, y = torch.randn(batch, 3).double(), torch.randn(batch, outputs).double()
        params = {"w1": torch.randn(3, width).double(), "w2": torch.randn(width, outputs).double()}
        found, wanted = compiled(params, x, y), whole_step(params, x, y)
        for got, want in zip(pytree.leaves(found), pytree.leaves(wanted), strict=True):
            assert_close(got, want)
        met.append(count.graphs)
    assert met == [1, 2, 2, 3, 3, *[4] * len(more)]


@pytest.mark.slow
@pytest.mark.parametrize("dims", [1, 2])
def test_dynamic_from_the_start(dims: int) -> None:
    """Convolutions, embeddings and sequences, compiled with symbols wherever the compiler can."""
    convolved, table = torch.randn(4, 2, 3, 3).double(), torch.randn(7, 3).double()

    def images(p: Params, x: Tensor) -> Tensor:
        return F.conv2d(x[None], p["w"]).tanh().mean((-1, -2))[0, : dims + 1]

    def tokens(p: Params, ids: Tensor) -> Tensor:
        return (F.embedding(ids, p["w"]).cumsum(0) @ p["w"].T).tanh().mean(1)[:dims]

    for func, w, batches in (
        (images, convolved, [torch.randn(b, 2, 6, 6).double() for b in (2, 3)]),
        (tokens, table, [torch.randint(0, 7, (b, n)) for b, n in ((2, 4), (3, 5))]),
    ):
        compiled = torch.compile(gramjd.gramian(func), fullgraph=True, backend="eager", dynamic=True)
        for x in batches:
            assert_close(compiled({"w": w}, x), dense(func)({"w": w}, x))


def hidden(p: Params, x: Tensor) -> Tensor:
    """Ways to a parameter that tracing does not show as calls: a property, a method of Python's."""
    return torch.tanh(x @ p["w1"].T).sum() + (2 - p["s"]).sin().sum() + (x[0] / (1 + p["t"] ** 2)).sum()


def test_ways_that_tracing_hides() -> None:
    params, x = make_params(), torch.randn(4, 3).double()
    got = torch.compile(gramjd.gramian(hidden), fullgraph=True, backend="aot_eager")(params, x)
    assert_close(got, dense(hidden)(params, x))


@pytest.mark.parametrize("how", WRITES)
def test_writes_come_after_what_is_read(how: str) -> None:
    """In eager mode they are an error; a graph has no writes, so that it gives what the function means."""
    params, x = make_params(), torch.randn(4, 3).double()
    compiled = torch.compile(gramjd.gramian(writing(how)), fullgraph=True, backend="aot_eager")
    try:
        got = compiled(params, x)
    except torch._dynamo.exc.Unsupported:  # autograd's error, where tracing does not show what was written
        assert how == "item"
        return
    assert_close(got, dense(writing("nothing"))(params, x))


def into_expressions(how: str) -> Callable[[Params, Tensor], Tensor]:
    """A function that writes into a weight expression between two of its uses."""

    def func(p: Params, x: Tensor) -> Tensor:
        w = p["w1"] * 1.0
        before = F.linear(x, w).cos().sum()
        if how == "item":
            w[0] = 1.0
        elif how == "item of a view":
            view = w.view(-1)
            view[0] = 1.0
        elif how == "flag":
            F.relu(w, inplace=True)
        elif how == "flag by position":
            F.leaky_relu(w, 0.1, True)
        elif how == "method":
            w.mul_(2)
        return F.linear(x, w).sin().sum() + before

    return func


@pytest.mark.parametrize("how", ["item", "item of a view", "flag", "flag by position", "method"])
def test_writes_into_weight_expressions_are_exact_or_an_error(how: str) -> None:
    params, x = make_params(), torch.randn(4, 3).double()
    func = into_expressions(how)
    for check_ in ("first", "never"):
        with pytest.raises(NotImplementedError, match="writes into a parameter"):
            gramjd.gramian(func, check=check_)(params, x)
    compiled = torch.compile(gramjd.gramian(func), fullgraph=True, backend="aot_eager")
    try:
        got = compiled(params, x)
    except torch._dynamo.exc.Unsupported:  # the error of the transform, seen by Dynamo
        assert how != "flag by position"
        return
    assert_close(got, dense(func)(params, x))


def test_harmless_writes() -> None:
    check(gramjd.gramian(harmless), make_params(), torch.randn(4, 3).double())


def test_new_parameters_need_no_new_graph() -> None:
    x = torch.randn(4, 3).double()
    compiled = torch.compile(gramjd.gramian(mlp), fullgraph=True, backend="aot_eager")
    for stance in ("default", "fail_on_recompile"):
        params = make_params()
        with torch.compiler.set_stance(stance):
            assert_close(compiled(params, x), dense(mlp)(params, x))


def scaled(p: Params, x: Tensor, table: Tensor) -> Tensor:
    """The weight is derived from a parameter and from a tensor that all samples share."""
    return F.linear(x, p["w1"] * table).tanh().sum()


def test_new_arguments_need_no_new_graph() -> None:
    transformed = gramjd.gramian(scaled, in_dims=(None, 0, None))
    compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
    for stance in ("default", "fail_on_recompile"):
        args = make_params(), torch.randn(5, 3).double(), torch.randn(4, 1).double()
        with torch.compiler.set_stance(stance):
            found = compiled(*args)
        assert_close(found, transformed(*args))


def test_what_a_function_closes_over_is_guarded() -> None:
    """Its state is that of the call, not that of the tracing: nothing is baked in without a word."""
    params, x = make_params(), torch.randn(4, 3).double()
    model = nn.Dropout(1.0)
    scale = torch.ones(2, dtype=torch.float64)

    def func(p: Params, x: Tensor) -> Tensor:
        return model(mlp(p, x) * scale)

    compiled = torch.compile(
        gramjd.gramian(func, randomness="different"), fullgraph=True, backend="aot_eager"
    )
    assert not compiled(params, x).any()
    model.eval()
    assert_close(compiled(params, x), dense(mlp)(params, x))
    scale.mul_(2)
    assert_close(compiled(params, x), 4 * dense(mlp)(params, x))


COMPOSED: dict[str, Callable[..., Any]] = {
    "vmap": torch.func.vmap(gramjd.gramian(mlp), (0, None)),
    "grad": torch.func.grad(lambda p, x: logdet(gramjd.gramian(loss)(p, x)), (0, 1)),
    "jacrev": torch.func.jacrev(gramjd.gramian(loss), 1),
    "ntk": lambda p, x: gramjd.ntk(mlp, trace_axes=(1,))(p, x, x + 1),
    "no batch": lambda p, x: gramjd.gramian(mlp, in_dims=None)(p, x[0]),
    "tree": lambda p, x: gramjd.gramian(lambda p, x: {"a": loss(p, x), "b": mlp(p, x)})(p, x),
    "aux": gramjd.gramian(lambda p, x: (loss(p, x), {"h": 2 * x}), has_aux=True),
    "products": lambda p, x: (gramjd.jacobian(mlp)(p, x).jvp(p), gramjd.jacobian(mlp)(p, x).norms()),
}


@pytest.mark.parametrize("name", COMPOSED)
@pytest.mark.slow
def test_composition(name: str) -> None:
    params = make_params(2) if name == "vmap" else make_params()
    check(COMPOSED[name], params, torch.randn(3, 3).double())


@pytest.mark.slow
@pytest.mark.parametrize("func", [maml, inner_vmap, derived_inside, forward_over_reverse])
def test_transforms_inside(func: Callable[..., Tensor]) -> None:
    assert func in INSIDE
    check(gramjd.gramian(func), make_params(), torch.randn(4, 3).double())


def test_compiled_calls_are_verified_every_time_and_explain_says_so() -> None:
    model = torch.compile(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), backend="aot_eager")
    engine = gramjd.Engine(model, batch_dim=0)
    for _ in range(4):
        losses = model(torch.randn(6, 3)).square().sum(1)
        engine.compute_gramian(losses)
        assert "Verified against autograd's gradients in this call" in str(engine.explain(losses))
