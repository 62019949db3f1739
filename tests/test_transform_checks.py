"""The transforms' own proof: a wrong block is an error at the first call, or by the next audit."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exactness import Net, draw, parameter
from oracle import OLD, assert_close, dense_gramian
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import gramjd
from gramjd import CheckFailedError, NotSeparableError
from gramjd.blocks import Dense
from gramjd.rules import registry
from gramjd.verification import schedule
from gramjd.verification.schedule import is_due

B, D = 5, 3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Wrong:
    """The rule of a product's second factor, wrong where and when it is told to be."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.active = True
        rules = registry.rules_of(torch.mul)
        assert rules is not None
        right = rules.entries["other"]

        def rule(c: Tensor, input: Tensor, other: Tensor) -> Any:
            block = right.rule(c, input, other)
            return Dense(1.01 * block.values) if self.active else block

        monkeypatch.setitem(rules.entries, "other", registry.Entry(rule, right.needs, right.align, None))


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> Wrong:
    return Wrong(monkeypatch)


def scaled(p: dict[str, Tensor], x: Tensor) -> Tensor:
    return (torch.mul(x @ p["w"], p["s"]).tanh() + p["b"]).square().sum()


def parameters() -> dict[str, Tensor]:
    return {"w": draw(D, 4), "s": draw(4), "b": draw(4)}


class Counted:
    """A function that counts how often it ran."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.runs = function, 0

    def __call__(self, *args: Any) -> Any:
        self.runs += 1
        return self.function(*args)


@pytest.mark.parametrize(
    "transform", [gramjd.gramian, gramjd.gramian_and_value, gramjd.jacobian, gramjd.jacobian_and_value]
)
@pytest.mark.parametrize("check", ["first", "always"])
def test_a_wrong_rule(transform: Callable[..., Any], check: str, wrong: Wrong) -> None:
    with pytest.raises(CheckFailedError, match=r"respect to 's' is wrong.*by 0.01 .*mul.*register_rule"):
        transform(scaled, check=check)(parameters(), draw(B, D))
    transform(scaled, check="never")(parameters(), draw(B, D))
    with pytest.raises(CheckFailedError, match="'s' is wrong"):
        transform(lambda p: scaled(p, draw(D)).reshape(1), in_dims=None, check=check)(parameters())


def test_a_wrong_rule_of_a_kernel(wrong: Wrong) -> None:
    with pytest.raises(CheckFailedError, match="'s' is wrong"):
        gramjd.ntk(scaled)(parameters(), draw(B, D))
    gramjd.ntk(scaled, check="never")(parameters(), draw(B, D))
    with pytest.raises(CheckFailedError, match="'s' is wrong"):
        gramjd.ntk_dataset(scaled, parameters(), [draw(B, D)], progress=False)
    gramjd.ntk_dataset(scaled, parameters(), [draw(B, D)], progress=False, check="never")


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_one_wrong_entry(several: bool, chunk_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one objective of one sample; the last one, too."""
    rules = registry.rules_of(torch.mul)
    assert rules is not None
    right = rules.entries["other"]
    for place in ((0, 0), (0, B - 1), (-1, 2)):

        def rule(c: Tensor, input: Tensor, other: Tensor, place: Any = place) -> Any:
            values = right.rule(c, input, other).dense().clone()
            values[(*place, 1)] *= 1.1
            return Dense(values)

        monkeypatch.setitem(rules.entries, "other", registry.Entry(rule, right.needs, right.align, None))

        def function(p: dict[str, Tensor], x: Tensor) -> Any:
            loss = scaled(p, x)
            return {"a": loss, "b": torch.stack([loss.sin(), loss.cos()])} if several else loss

        with pytest.raises(CheckFailedError, match="'s' is wrong"):
            gramjd.gramian(function, chunk_size=chunk_size)(parameters(), draw(B, D))


def test_when_results_are_verified() -> None:
    calls = [n for n in range(1, 3000) if is_due(n, 256)]
    assert calls == [1, 2, 4, 8, 16, 32, 64, 128, *range(256, 3000, 256)]
    assert [n for n in range(1, 30) if is_due(n, 10)] == [1, 2, 4, 8, 10, 20]
    assert [n for n in range(1, 300) if is_due(n, None)] == [1]
    assert all(is_due(n, 1) for n in range(1, 9))
    p, x = parameters(), draw(B, D)
    cases: list[tuple[dict[str, Any], set[int]]] = [
        ({}, {1, 2, 4, 8}),
        ({"audit": 3}, {1, 2, 3, 6, 9}),
        ({"audit": None}, {1}),
        ({"check": "always"}, set(range(1, 10))),
        ({"check": "never"}, set()),
    ]
    for options, verified in cases:
        function = Counted(scaled)
        gramian, found = gramjd.gramian(function, **options), set()
        for n in range(1, 10):
            before = function.runs
            gramian(p, x)
            if function.runs - before > 1:
                found.add(n)
        assert found == verified, options


def test_a_failed_audit_says_since_when(wrong: Wrong) -> None:
    wrong.active = False
    gramian, p = gramjd.gramian(scaled), parameters()
    for _ in range(4):
        gramian(p, draw(B, D))
    wrong.active = True
    for _ in range(3):
        gramian(p, draw(B, D))  # trusted
    with pytest.raises(CheckFailedError, match=r"since call 5 of this function.*this is call 8"):
        gramian(p, draw(B, D))


def test_after_a_failed_audit_each_result_is_verified(wrong: Wrong) -> None:
    wrong.active = False
    gramian, p = gramjd.gramian(scaled), parameters()
    gramian(p, draw(B, D))
    wrong.active = True
    with pytest.raises(CheckFailedError, match="since call 2"):
        gramian(p, draw(B, D))
    for wrong.active in (False, True) * 3:
        if wrong.active:
            with pytest.raises(CheckFailedError) as raised:
                gramian(p, draw(B, D))
            assert "since call" not in str(raised.value)
        else:
            gramian(p, draw(B, D))


def test_structures(wrong: Wrong) -> None:
    """What may change the rules is a structure of its own; the values and the number of samples are not."""

    def function(p: dict[str, Tensor], x: Tensor, y: Any = None, kind: str = "mean") -> Tensor:
        h = x @ p["w"]
        h = torch.mul(h, p["s"]) if h.ndim > 1 or kind == "sum" or x.dtype == torch.float32 else h * p["b"]
        return h.square().sum()

    gramian, p = gramjd.gramian(function, (0), (None, 0)), parameters()
    gramian(p, draw(B, D))
    gramian(p, draw(B + 2, D))
    with pytest.raises(CheckFailedError):
        gramian(p, draw(B, 2, D))
    with pytest.raises(CheckFailedError):
        gramjd.gramian(function, 0, (None, 0, None, None))(p, draw(B, D), None, "sum")
    several = gramjd.gramian(function, 0, (None, 0, None, None))
    several(p, draw(B, D), None, "mean")
    with pytest.raises(CheckFailedError):
        several(p, draw(B, D), None, "sum")
    single = {name: value.float() for name, value in p.items()}
    with pytest.raises(CheckFailedError):
        gramian(single, draw(B, D).float())


def test_a_batch_of_one_proves_nothing_for_more(wrong: Wrong) -> None:
    wrong.active = False
    gramian, p = gramjd.gramian(scaled), parameters()
    gramian(p, draw(1, D))
    wrong.active = True
    with pytest.raises(CheckFailedError):
        gramian(p, draw(B, D))


class Silent(torch.autograd.Function):
    """A product, by a function that no mode looks into."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x * w

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return grad * w, grad * x


GATES: dict[str, Callable[[dict[str, Tensor], Tensor], Tensor]] = {
    "rezero": lambda p, x: (x + p["gate"] * torch.mul(x, p["s"]).sin()).square().sum(),
    "low rank": lambda p, x: (x @ (p["w"] + torch.mul(p["u"], p["s"]) @ p["gate"])).square().sum(),
    "layer scale": lambda p, x: (x + torch.mul(x, p["s"]).tanh() * p["gate"]).square().sum(),
}


@pytest.mark.parametrize("name", GATES)
def test_a_wrong_rule_behind_a_gate_of_zero(name: str, wrong: Wrong) -> None:
    p = {"s": draw(D), "gate": torch.zeros(D, D).double() if name == "low rank" else torch.zeros(D).double(),
         "w": draw(D, D), "u": draw(D, D)}  # fmt: skip
    with pytest.raises(CheckFailedError, match=r"'s'.*what is zero now"):
        gramjd.gramian(GATES[name])(p, draw(B, D))


@pytest.mark.parametrize("name", [*GATES, "custom function", "closed cell"])
def test_gates_that_open(name: str) -> None:
    """Uses that no op shows, behind a gate that is zero at first: exact at every step."""
    extra: dict[str, Callable[[dict[str, Tensor], Tensor], Tensor]] = {
        "custom function": lambda p, x: (x + p["gate"] * Silent.apply(x, p["s"]).sin()).square().sum(),
        "closed cell": lambda p, x: (x + p["gate"] * p["s"].clone().mul_(x).tanh()).square().sum(),
    }
    function = {**GATES, **extra}[name]
    p = {"s": draw(D), "gate": torch.zeros(D, D).double() if name == "low rank" else torch.zeros(D).double(),
         "w": draw(D, D), "u": draw(D, D)}  # fmt: skip
    if name == "closed cell":
        with pytest.raises(NotImplementedError, match="in place"):
            gramjd.gramian(function)(p, draw(B, D))
        return
    gramian = gramjd.gramian(function)
    for _ in range(4):
        x = draw(B, D)
        rows = torch.vmap(torch.func.grad(function), (None, 0))(p, x)
        flat = torch.cat([rows[key].flatten(1) for key in p], 1)
        assert_close(gramian(p, x), flat @ flat.T)
        p = {key: value + 0.1 * torch.randn_like(value) for key, value in p.items()}


def compiled(function: Callable[..., Any], p: Any, x: Tensor) -> Any:
    version = tuple(int(n) for n in torch.__version__.split(".")[:2])
    if version < (2, 13):
        pytest.skip("Dynamo traces these transforms as of torch 2.13")
    torch._dynamo.reset()
    return torch.compile(gramjd.gramian(function), fullgraph=True, backend="aot_eager")(p, x)


def dual(function: Callable[..., Any], p: Any, x: Tensor) -> Any:
    with forward_ad.dual_level():
        p = {name: forward_ad.make_dual(value, torch.ones_like(value)) for name, value in p.items()}
        return forward_ad.unpack_dual(gramjd.gramian(function)(p, x)).primal


ASIDE: dict[str, Callable[[Callable[..., Any], Any, Tensor], Any]] = {
    "vmap": lambda f, p, x: torch.vmap(gramjd.gramian(f), (None, 0))(p, torch.stack([x, x]))[1],
    "grad": lambda f, p, x: torch.func.grad_and_value(
        lambda p: ((g := gramjd.gramian(f)(p, x)).sum(), g), has_aux=True)(p)[1][1],
    "jvp": lambda f, p, x: torch.func.jvp(lambda p: gramjd.gramian(f)(p, x), (p,), (p,))[0],
    "jacrev": lambda f, p, x: torch.func.jacrev(
        lambda p: (gramjd.gramian(f)(p, x),) * 2, has_aux=True)(p)[1],
    "make_fx": lambda f, p, x: make_fx(gramjd.gramian(f))(p, x)(p, x),
    "compile": compiled,
    "forward mode": dual,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("name", ASIDE)
def test_skipped_inside_of_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p, x = parameters(), draw(B, D)
    want = gramjd.gramian(scaled)(p, x)
    monkeypatch.setattr("gramjd.verification.Verifier.verify", lambda *_: pytest.fail("was not skipped"))
    assert_close(ASIDE[name](scaled, p, x), want)


def test_not_skipped_under_autograd() -> None:
    """Where gradients of the Gramian are wanted, and under no_grad and inference mode."""
    p, x = {name: value.requires_grad_() for name, value in parameters().items()}, draw(B, D).requires_grad_()
    for context in (torch.enable_grad, torch.no_grad, *([] if OLD else [torch.inference_mode])):
        function = Counted(scaled)
        with context():
            gramian = gramjd.gramian(function)(p, x)
        assert function.runs == 4
        assert gramian.requires_grad is (context is torch.enable_grad)
    (got,) = torch.autograd.grad(gramjd.gramian(scaled)(p, x).sum(), [x])
    (want,) = torch.autograd.grad(gramjd.gramian(scaled, check="never")(p, x).sum(), [x])
    assert_close(got, want)


@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_random_functions(randomness: str, chunk_size: int | None) -> None:
    """Verified with the same random numbers, after which the generator is where it was without."""

    def noisy(w: Tensor, x: Tensor) -> Tensor:
        return F.dropout((x @ w).tanh(), 0.4).square().sum() + (w * torch.randn(D, 4).double()).sin().sum()

    w, x, found = draw(D, 4), draw(B, D), []
    for check in ("never", "always"):
        torch.manual_seed(3)
        options: Any = {"randomness": randomness, "chunk_size": chunk_size, "check": check}
        gramian = gramjd.gramian(noisy, **options)
        found.append((gramian(w, x), gramian(w, x), torch.rand(4)))
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)

    def batch_independent(w: Tensor) -> Tensor:
        return F.dropout(draw(B, D) @ w, 0.4).square().sum(1)

    gramjd.gramian(batch_independent, in_dims=None, check="always")(w)


NORMALIZED: dict[str, Callable[[dict[str, Tensor], Tensor], Tensor]] = {
    "layer": lambda p, x: F.layer_norm(x, (6,), p["s"], p["b"]),
    "group": lambda p, x: F.group_norm(x, 3, p["s"], p["b"]),
    "instance": lambda p, x: F.instance_norm(x.view(-1, 2, 3), weight=p["s"][:2], bias=p["b"][:2]),
}


@pytest.mark.parametrize("name", NORMALIZED)
def test_norms_inside_of_gradients(name: str) -> None:
    """torch's derivatives of their gradients are wrong under one more vmap: no reason to doubt ours."""

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return NORMALIZED[name](p, x @ p["w"]).tanh().square().sum()

    def adapted(p: dict[str, Tensor], x: Tensor) -> Tensor:
        inner = torch.func.grad(loss)(p, x)
        return loss({key: value - 0.1 * inner[key] for key, value in p.items()}, x.flip(0))

    def by_autograd(p: dict[str, Tensor], x: Tensor) -> Tensor:
        inner = torch.autograd.grad(loss(p, x), list(p.values()), create_graph=True)
        return loss({key: p[key] - 0.1 * g for key, g in zip(p, inner, strict=True)}, x.flip(0))

    p, x = {"w": draw(6, 6), "s": draw(6), "b": draw(6)}, draw(B, 4, 6)
    leaves = {key: value.clone().requires_grad_() for key, value in p.items()}
    out = torch.stack([by_autograd(leaves, sample) for sample in x])
    assert_close(gramjd.gramian(adapted)(p, x), dense_gramian(out, leaves.values()))


def test_functions_that_are_not_pure() -> None:
    state = [1.0]

    def function(w: Tensor, x: Tensor) -> Tensor:
        state[0] *= 1.5
        return (w * x).sum() * state[0]

    with pytest.raises(CheckFailedError, match=r"other outputs when it was called again.*must be pure"):
        gramjd.gramian(function)(draw(D), draw(B, D))
    gramjd.gramian(function, check="never")(draw(D), draw(B, D))


def test_not_finite() -> None:
    """What cannot be compared is given as it is, and proved as soon as it can be."""
    function = Counted(scaled)
    gramian, p, x = gramjd.gramian(function), parameters(), draw(B, D)
    assert bool(gramian(p, x * torch.nan).isnan().all())
    assert bool(gramian(p, x * torch.nan).isnan().all())
    runs = function.runs
    gramian(p, x)
    assert function.runs == runs + 4

    def root(w: Tensor, x: Tensor) -> Tensor:
        return (w * x).sum().sqrt()

    assert not bool(gramjd.gramian(root)(torch.zeros(D), torch.ones(B, D)).isfinite().any())


def single(t: Tensor) -> Tensor:
    return t.to(torch.float32)


def half(t: Tensor) -> Tensor:
    return t.to(torch.bfloat16)


@pytest.mark.parametrize("cast", [single, half])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("scale", [1e-4, 1, 1e4])
def test_rounding_is_no_fault(cast: Callable[[Tensor], Tensor], autocast: bool, scale: float) -> None:
    """Deep, in few digits, with a gradient that is nothing but rounding (the keys' bias)."""
    width = 16
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(width, 2, 32, dropout=0.0, batch_first=True, norm_first=True), 3,
        enable_nested_tensor=False,
    )  # fmt: skip
    function, p = gramjd.functional_loss(model, lambda out: scale * out.square().mean((1, 2)))
    p = {name: cast(value) for name, value in p.items()}
    x = cast(torch.randn(4, 6, width))
    for _ in range(3):
        with torch.autocast("cpu", enabled=autocast):
            gramjd.gramian(function, check="always")(p, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_nothing_but_rounding(dtype: torch.dtype) -> None:
    """Angles and directions do not depend on a factor; softmax not on what is added to all."""
    functions: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda p, x: (p.abs() * torch.complex(x, x.sin())).angle().sum(),
        lambda p, x: F.normalize(p[0] * x, dim=0).sin().sum(),
        lambda p, x: (x + p[0]).softmax(0).square().sum(),
        lambda p, x: (x + p[0]).std(),
        lambda p, x: (p * x).sum() - (p * x).flip(0).sum(),
    ]
    for function in functions:
        for _ in range(5):
            gramjd.gramian(function, check="always")(torch.randn(D).to(dtype), torch.randn(B, D).to(dtype))


@pytest.mark.parametrize("value", [1.0, 1e-9, float("nan"), float("inf")])
def test_where_the_gradient_is_rounding(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that is not is wrong all the same."""
    rules = registry.rules_of(torch.mul)
    assert rules is not None
    right = rules.entries["other"]

    def rule(c: Tensor, input: Tensor, other: Tensor) -> Any:
        return Dense(right.rule(c, input, other).dense() + value)

    monkeypatch.setitem(rules.entries, "other", registry.Entry(rule, right.needs, right.align, None))
    for function in (lambda p, x: F.normalize(torch.mul(x, p), dim=0).sin().sum(),
                     lambda p, x: torch.mul(x, p).sum() * 0):  # fmt: skip
        with pytest.raises(CheckFailedError):
            gramjd.gramian(function)(torch.randn(1).double(), draw(B, D) + 2)


def test_nothing_of_the_users_is_kept() -> None:
    p, x = parameters(), draw(B, D)
    closed = draw(4)
    gramian = gramjd.gramian(lambda p, x: scaled(p, x) + (x @ p["w"] * closed).sum())
    gramian(p, x)
    refs = [weakref.ref(t) for t in (*p.values(), x)]
    del p, x
    gc.collect()
    assert all(ref() is None for ref in refs)


def test_few_structures_are_remembered() -> None:
    gramian = gramjd.gramian(lambda p, x, n: (x * p).narrow(0, n, 1).sum(), 0, (None, 0, None))
    for n in range(70):
        gramian(draw(80), draw(2, 80), n)
    (memory,) = schedule._MEMORIES.values()
    assert len(memory.seen) == 64


@pytest.mark.parametrize("options", [{"check": "often"}, {"audit": 0}, {"audit": 2.5}, {"audit": True}])
def test_options(options: dict[str, Any]) -> None:
    for transform in (gramjd.gramian, gramjd.jacobian, gramjd.gramian_and_value, gramjd.ntk):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
            transform(scaled, **options)  # type: ignore[operator]


# modules


class Listed(nn.Module):
    """Reads a parameter from a list, too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, 4)
        self.listed = list(self.linear.parameters())

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).square().sum(-1) + 0.3 * (x @ self.listed[0].T).square().sum(-1)


class Viewed(nn.Module):
    """Holds a transposed view of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, 4).double()
        self.view = [self.linear.weight.T]

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).square().sum(-1) + (x @ self.view[0]).square().sum(-1)


def closing(function: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    """A module whose forward closes over its parameter ``w``."""
    w = parameter(D)
    return Net(lambda _, x: function(x, w), w=w, other=nn.Linear(D, 2))


ALIASES: dict[str, Callable[[], nn.Module]] = {
    "list": Listed,
    "view": Viewed,
    "closure": lambda: closing(lambda x, w: torch.tanh(x @ w)),
    "closure, times zero": lambda: closing(lambda x, w: x.sum(-1) + 0 * (x @ w)),
    "in a list of arguments": lambda: closing(lambda x, w: torch.cat([x[0], w]).sin().sum().reshape(1)),
    "by a keyword": lambda: closing(lambda x, w: torch.mul(input=x, other=w).sum(-1)),
    "custom function": lambda: closing(lambda x, w: Silent.apply(x, w).sum(-1)),
    "clone": lambda: closing(lambda x, w: (x * w.clone()).sum(-1)),
}


@pytest.mark.parametrize("no_grad", [False, True])
@pytest.mark.parametrize("name", ALIASES)
def test_parameters_reached_past_functional_call(name: str, no_grad: bool) -> None:
    model = ALIASES[name]().double()
    function, p = gramjd.functional_loss(model)
    with torch.set_grad_enabled(not no_grad):
        for check in ("first", "never"):
            with pytest.raises(CheckFailedError, match=r"its parameter '(linear\.weight|w)' past .*Engine"):
                gramjd.gramian(function, check=check)(p, draw(B, D))
        with pytest.raises(CheckFailedError, match="past"):
            gramjd.ntk(function)(p, draw(B, D))


def test_a_loss_that_reads_a_parameter() -> None:
    model = nn.Linear(D, 2).double()
    function, p = gramjd.functional_loss(model, lambda out: out.sum(1) + model.weight.square().sum())
    with pytest.raises(CheckFailedError, match=r"'weight' past"):
        gramjd.gramian(function)(p, draw(B, D))


CONSTANTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "shape": lambda x, w: x.reshape(-1, w.shape[0]).sum(-1) * w.numel() * len(w) * w.size(0),
    "like": lambda x, w: (x * torch.ones_like(w) + w.new_ones(D)).sum(-1),
    "detached": lambda x, w: (x * w.detach()).sum(-1),
    "data": lambda x, w: (x * w.data).sum(-1),
    "type": lambda x, w: x.to(w.dtype).to(w.device).to(w).type_as(w).sum(-1) * w.requires_grad,
    "shape of another": lambda x, w: x.sum(-1, keepdim=True).expand_as(w if x.ndim == 1 else x).sum(-1),
}


def under_no_grad(x: Tensor, w: Tensor) -> Tensor:
    with torch.no_grad():
        constant = w * 2
    return (x * constant).sum(-1)


@pytest.mark.parametrize("name", [*CONSTANTS, "no_grad"])
def test_constants_that_are_meant(name: str) -> None:
    """Shapes, and values that the module itself takes for constants."""
    read = CONSTANTS.get(name, under_no_grad)
    w = parameter(D)
    model = Net(lambda m, x: read(x, w) * (x @ m.w).tanh() + m.other(x)[..., 0], w=w, other=nn.Linear(D, 2))
    function, p = gramjd.functional_loss(model)
    x = draw(B, D)
    model(x).sum().backward()
    found = gramjd.jacobian(function)(p, x).vjp(torch.ones(B).double())
    for key, value in model.named_parameters():
        assert_close(found[key], value.grad)


def test_the_modules_own_parameters_may_be_given() -> None:
    """Live instead of detached, and as constants where inputs are differentiated."""
    model = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    function, p = gramjd.functional_loss(model)
    x, live = draw(B, D), dict(model.named_parameters())
    assert_close(gramjd.gramian(function)(live, x), gramjd.gramian(function)(p, x))
    assert_close(function(live, x[0]), model(x)[0])
    by_input = gramjd.gramian(lambda x, p: function(p, x), in_dims=None)
    assert_close(by_input(x[0], live), by_input(x[0], p))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "no statistics": lambda: nn.BatchNorm1d(4, track_running_stats=False),
    "no statistics, in evaluation": lambda: nn.BatchNorm1d(4, track_running_stats=False).eval(),
    "no statistics, not affine": lambda: nn.BatchNorm1d(4, affine=False, track_running_stats=False).eval(),
    "in training": lambda: nn.BatchNorm1d(4),
    "in training, no momentum": lambda: nn.BatchNorm1d(4, momentum=None),
}


@pytest.mark.parametrize("name", NORMS)
def test_batch_norms_without_running_statistics(name: str) -> None:
    """As the module itself, a function of one sample cannot have statistics of the batch."""
    norm = NORMS[name]()
    model = nn.Sequential(nn.Linear(D, 4), nn.BatchNorm1d(4).eval(), norm, nn.Tanh()).double()
    function, p = gramjd.functional_loss(model, lambda out: out.flatten(1).sum(1))
    for x in (draw(B, D), draw(B, 4, D)):  # the latter has several values a channel
        with pytest.raises(
            NotSeparableError, match=r"BatchNorm1d '2' .*statistics of the batch.*batch_dim=None"
        ):
            gramjd.gramian(function)(p, x)
    compile_error = pytest.raises(Exception, match=r"(?s)statistics of the batch")
    if tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 13):
        torch._dynamo.reset()
        with compile_error:
            torch.compile(gramjd.gramian(function), fullgraph=True, backend="aot_eager")(p, draw(B, 4, D))


def test_batch_norms_that_are_fixed() -> None:
    model = nn.Sequential(nn.Linear(D, 4), nn.BatchNorm1d(4), nn.InstanceNorm1d(4), nn.Tanh()).double().eval()
    model.unused = nn.BatchNorm1d(4)  # type: ignore[assignment]
    model.unused.forward = lambda x: x  # type: ignore[method-assign]
    function, p = gramjd.functional_loss(model, lambda out: out.flatten(1).sum(1))
    p = {name: value for name, value in p.items() if "unused" not in name}
    x = draw(B, 4, D)
    model(x).sum().backward()
    found = gramjd.jacobian(function)(p, x).vjp(torch.ones(B).double())
    for key, value in model.named_parameters():
        if "unused" not in key:
            assert_close(found[key], value.grad)


class Old(torch.autograd.Function):
    """Of the style that transforms do not take."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].cos()


class Unmapped(Silent):
    generate_vmap_rule = False


def checkpointed(p: Tensor, x: Tensor, **options: Any) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    found: Tensor = checkpoint(lambda a: (p * a).sin(), x, **options)
    return found.sum()


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "item": (lambda p, x: (p * x).sum() * x.sum().item(), r"value of a tensor \(\.item"),
    "if": (lambda p, x: (p * x).sum() if x.sum() > 0 else p.sum(), "or an if"),
    "float": (lambda p, x: (p * x).sum() * float(x.sum()), "float()"),
    "nonzero": (lambda p, x: (p * x)[x.nonzero()[:, 0]].sum(), "nonzero"),
    "mask": (lambda p, x: (p * x)[x > 0].sum(), "boolean mask"),
    "unique": (lambda p, x: (p * x.unique()[0]).sum(), "unique"),
    "numpy": (lambda p, x: (p * x).sum() * x.detach().numpy().sum(), "numpy"),
    "old function": (lambda p, x: Old.apply(p * x).sum(), "no setup_context"),
    "function without vmap": (lambda p, x: Unmapped.apply(p, x).sum(), "generate_vmap_rule=True"),
    "checkpoint": (lambda p, x: checkpointed(p, x, use_reentrant=False), "checkpoint"),
    "buffer": (lambda p, x: (torch.zeros(D).double().copy_(x) * p).sum(), "in place into a tensor"),
}


if OLD:  # which refuses it for a torch.autograd.Function that it is made of
    REFUSED["checkpoint"] = (REFUSED["checkpoint"][0], "generate_vmap_rule=True")


@pytest.mark.parametrize("name", REFUSED)
def test_what_transforms_cannot_take_names_the_engine(name: str) -> None:
    function, cause = REFUSED[name]
    p, x = draw(D), draw(B, D)
    for check in ("first", "never"):
        with pytest.raises(NotImplementedError, match=rf"The function .*{cause}.*Engine\(module") as caught:
            gramjd.gramian(function, check=check)(p, x)
        assert caught.value.__cause__ is not None and "file an issue" not in str(caught.value)


def test_other_errors_are_the_functions_own() -> None:
    def function(p: Tensor, x: Tensor) -> Tensor:
        raise RuntimeError("calling .item() is my own affair") if p.ndim > 1 else KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        gramjd.gramian(function)(draw(D), draw(B, D))
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied|size mismatch"):
        gramjd.gramian(lambda p, x: p @ x)(draw(2, 2), draw(B, D))


@pytest.mark.parametrize(
    ("channels", "shape"), [(6, (2, 3, 3, 3)), (1, (2, 3, 8, 8)), (6, (2, 3, 8, 8)), (6, (2, 3, 3, 3, 3))]
)
def test_group_norm_of_channels_last(channels: int, shape: tuple[int, ...]) -> None:
    """Also where one position or channel is left, so that strides alone tell the memory format."""
    flat = len(shape) == 4
    last = torch.channels_last if flat else torch.channels_last_3d
    conv = (nn.Conv2d if flat else nn.Conv3d)(3, channels, 3)
    norm = nn.GroupNorm(1, channels)
    with torch.no_grad():
        features = norm(conv(torch.randn(shape))).flatten(1).shape[1]
    model = nn.Sequential(conv, norm, nn.Flatten(), nn.Linear(features, 3))
    model.to(memory_format=last)  # type: ignore[call-overload]
    func, params = gramjd.functional_loss(model)
    twin = copy.deepcopy(model).double()
    for x in (torch.randn(shape), torch.randn(shape).to(memory_format=last)):
        J = gramjd.jacobian(func)(params, x)
        want = dense_gramian(twin(x.double()), [dict(twin.named_parameters())[name] for name in J.names])
        assert_close(J.gramian().double(), want, 1e-4)


class Tripled(torch.autograd.Function):
    """Twice its argument, but three times under ``vmap``: torch has rules that are as wrong."""

    factor = 3.0

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
        return Tripled.factor * x, in_dims[0]


class Halves(torch.autograd.Function):
    """The same number for each sample, of which the gradient alone is wrong under ``vmap``."""

    @staticmethod
    def forward(x: Tensor, g: Tensor) -> Tensor:
        return 2 * g

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, g: Tensor) -> Any:
        return g / 2, in_dims[1]


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return Halves.apply(ctx.saved_tensors[0], g)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
        return Doubled.apply(x), in_dims[0]


@pytest.mark.parametrize(("op", "outputs"), [(Tripled, True), (Doubled, False)])
def test_rules_of_vmap_that_are_wrong(op: Any, outputs: bool) -> None:
    """Both computations are by ``vmap``, and may be wrong alike: samples are compared without it."""

    def function(p: Tensor, x: Tensor) -> Tensor:
        out: Tensor = op.apply(p * x).sum()
        return out

    message = "without torch.vmap" if outputs else "differ from the gradient"
    for _ in range(2):  # not only in the first call
        with pytest.raises(CheckFailedError, match=message):
            gramjd.gramian(function)(draw(D), draw(B, D))


def test_rules_of_vmap_that_fail_the_proof_alone() -> None:
    """What ``torch.func`` makes of these ops under ``vmap`` is wrong, or an error; what we do is right."""

    def scattered(p: Tensor, x: Tensor) -> Tensor:
        return (torch.select_scatter(x[:, None] * x, p * x, 1, 2) * torch.linspace(1, 2, D)).sum()

    def stacked(p: Tensor, x: Tensor) -> Tensor:
        return (torch.column_stack([p * x, p]) ** 3).sum()

    def rolled(p: Tensor, x: Tensor) -> Tensor:
        return torch.roll(p[0] * x[0], 10)

    for function in (scattered, stacked, rolled):
        p, x = draw(D).requires_grad_(), draw(B, D)
        rows = [torch.autograd.grad(function(p, each), p)[0] for each in x]
        J = torch.stack(rows)
        for _ in range(3):
            assert_close(gramjd.gramian(function)(p.detach(), x), J @ J.T)


def test_a_wrong_rule_where_samples_do_not_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What all samples show together is overruled by what each shows, never by nothing."""
    rules = registry.rules_of(torch.mul)
    assert rules is not None
    right = rules.entries["other"]

    def rule(c: Tensor, input: Tensor, other: Tensor) -> Any:
        return Dense(1.5 * right.rule(c, input, other).dense())

    monkeypatch.setitem(rules.entries, "other", registry.Entry(rule, right.needs, right.align, None))

    def function(p: Tensor, x: Tensor) -> Tensor:
        if not torch._C._functorch.is_batchedtensor(x):
            raise ValueError("runs under vmap alone")
        return torch.mul(x, p).sin().sum()

    with pytest.raises(CheckFailedError, match="differ from the gradient"):
        gramjd.gramian(function)(draw(D), draw(B, D))


class First(torch.autograd.Function):
    """Under ``vmap``, all samples get what one of them gives."""

    which = 0

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> Any:
        return 2 * x[First.which].expand_as(x), in_dims[0]


@pytest.mark.parametrize("samples", [2, 3, 5])
@pytest.mark.parametrize("which", [0, -1, 1])
def test_a_rule_of_vmap_that_is_right_for_one_sample(
    which: int, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch's of ``index_fill``, which is so for the last one: the first call says so."""
    monkeypatch.setattr(First, "which", which)

    def function(p: Tensor, x: Tensor) -> Tensor:
        out: Tensor = First.apply(p * x).sum()
        return out

    with pytest.raises(CheckFailedError):
        gramjd.gramian(function)(draw(D), draw(samples, D))
