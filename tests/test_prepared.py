"""Prepared ops: those that are recorded are those of the function, or nothing is recorded."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from oracle import OLD, assert_close, dense_gramian
from torch import Tensor, nn
from torch.autograd.forward_ad import dual_level
from torch.utils._python_dispatch import TorchDispatchMode

import gramjd
from gramjd import Engine, prepared
from gramjd.blocks import Block
from gramjd.prepared import Prepared, record
from gramjd.uses.use import Use

Given = Sequence[Any]


def draws(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape) for shape in shapes]


def recorded(function: Callable[[Given], Any], tensors: Given) -> Prepared:
    _, ops = record(lambda given: (function(given), None), tensors)
    assert isinstance(ops, Prepared), ops
    return ops


def written_in_place(given: Given) -> list[Tensor]:
    x = given[0] * 2
    x[0].fill_(7.0)
    x.view(-1)[1:3].add_(1)
    x.t().mul_(3)
    return [x, x.sum()]


def several(given: Given) -> list[Tensor]:
    left, right = given[0].split(1)
    values, _ = given[0].max(1)
    return [left * right, values, torch.cat([left, right, left], 1)]


def out_of_new_memory(given: Given) -> list[Tensor]:
    x, y = given
    found = x.new_empty(2, 2)
    torch.mm(x, y.t(), out=found)
    return [found, found]


FUNCTIONS: dict[str, Callable[[Given], list[Tensor]]] = {
    "views of views": lambda given: [(given[0].t()[1:].unsqueeze(0) + 1).flatten()[2:], given[1][1]],
    "in place": written_in_place,
    "several results": several,
    "new memory": out_of_new_memory,
    "an argument again": lambda given: [given[1], given[0].view(-1), given[0].view(-1)],
    "another dtype": lambda given: [given[0].view(torch.int32) + 1, given[0].double(), given[0].half()],
    "complex": lambda given: [torch.view_as_real(torch.complex(given[0], given[1]).exp())],
    "complex results": lambda given: [torch.complex(given[0].double(), given[1].double()).conj() * 2],
    "constants": lambda given: [
        torch.full((2, 3), math.inf) + given[0],
        given[0] ** -math.inf,
        torch.ones(2),
    ],
    "einsum": lambda given: [torch.einsum("ij,kj->ik", *given), torch.tensordot(given[0], given[1], 2)],
    "indices": lambda given: [given[0][torch.arange(2), torch.tensor([1])[0:1].clone().zero_()]],
    "a convolution": lambda given: [F.conv1d(given[0][:, None], given[1][:, None, :2], padding=1)],
    "its gradient": lambda given: [
        torch.nn.grad.conv1d_weight(given[0][:, None], (1, 1, 2), given[1][:, None, :2])
    ],
}
SHAPES = ((2, 3), (2, 3))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_they_do_what_their_function_does(name: str) -> None:
    function = FUNCTIONS[name]
    tensors = draws(*SHAPES)
    if name == "indices":
        _, ops = record(lambda given: (function(given), None), tensors)
        assert "not among its arguments" in str(ops)  # a tensor that was made of Python numbers
        return
    ops = recorded(function, tensors)
    for _ in range(3):
        tensors = draws(*SHAPES)
        before = [t.clone() for t in tensors]
        found, wanted = ops.run(tensors), function(before)
        assert len(found) == len(wanted)
        for mine, other in zip(found, wanted, strict=True):
            assert mine.stride() == other.stride() and mine.dtype == other.dtype
            assert torch.equal(mine, other)
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_reshapes_of_reshapes_are_one_view_each() -> None:
    ops = recorded(lambda given: [given[0].t().unsqueeze(0)[:, 1:].transpose(1, 2) * 2], draws((4, 3)))
    assert ops.source.count("as_strided") == 1 and "transpose" not in ops.source
    same = recorded(lambda given: [given[0].t().t() * given[0]], draws((4, 3)))
    assert "as_strided" not in same.source


def test_arguments_may_be_missing() -> None:
    ops = recorded(lambda given: [given[1] * 2 if given[0] is None else given[0]], [None, torch.ones(2)])
    assert torch.equal(ops.run([None, torch.ones(2)])[0], torch.full((2,), 2.0))


CONSTANT = torch.ones(2, 3)

REFUSED: dict[str, tuple[Callable[[Given], list[Tensor]], str]] = {
    "item": (lambda given: [given[0] * given[1].sum().item()], "values of tensors"),
    "a branch": (lambda given: [given[0] if given[1].sum() > 0 else given[1]], "values of tensors"),
    "tolist": (lambda given: [given[0] * given[1].int()[0].tolist()[0]], "values of tensors"),
    "numpy": (lambda given: [given[0] * float(given[1].numpy()[0, 0])], "values of tensors"),
    "equal": (lambda given: [given[0] * torch.equal(*given)], "values of tensors|returns no tensor"),
    "nonzero": (lambda given: [given[0].nonzero()], "values of tensors"),
    "a mask": (lambda given: [given[0][given[1] > 0]], "values of tensors"),
    "unique": (lambda given: [given[0].unique()], "values of tensors"),
    "random": (lambda given: [given[0] + torch.randn(2, 3)], "values of tensors"),
    "dropout": (lambda given: [F.dropout(given[0])], "values of tensors"),
    "writes": (lambda given: [given[0].mul_(1.0)], "writes into an argument"),
    "writes into a view": (lambda given: [given[0][0].zero_(), given[0]], "writes into an argument"),
    "writes a result": (lambda given: [torch.add(*given, out=given[1])], "writes into an argument"),
    "another tensor": (lambda given: [given[0] + CONSTANT], "not among its arguments"),
    "resized": (lambda given: [(given[0] + 1).resize_(1)], "values of tensors|changes the size"),
    "squeezed": (lambda given: [(given[0][:1] + 1).squeeze_()], "values of tensors"),
    "long": (lambda given: [sum((given[0] for _ in range(4002)), start=given[0])], "more than 4000"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_repeated_is_not_recorded(name: str) -> None:
    function, reason = REFUSED[name]
    tensors = draws(*SHAPES)
    (found, others), ops = record(lambda given: (function(given), "others"), tensors)
    assert isinstance(ops, str) and others == "others"
    assert any(part in ops for part in reason.split("|")), ops
    if name not in ("random", "dropout"):
        assert torch.equal(found[0], function(tensors)[0])


def test_what_gives_other_numbers_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        prepared, "callable_of", lambda op: torch.sub if op is torch.ops.aten.add.Tensor else op._op
    )
    (found, _), ops = record(lambda given: ([given[0] + given[1]], None), draws(*SHAPES))
    assert ops == "its first run gave other numbers" and found[0].shape == (2, 3)


def test_signs_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """An even number of them that differ leaves the sum of all bits as it is."""
    wrong = {torch.ops.aten.abs.default: torch.neg}
    monkeypatch.setattr(prepared, "callable_of", lambda op: wrong.get(op, op._op))
    for size in (2, 2**16):
        _, ops = record(lambda given: ([given[0].abs()], None), [torch.rand(size)])
        assert ops == "its first run gave other numbers"


def counted(monkeypatch: pytest.MonkeyPatch, often: int = 0) -> tuple[Callable[[Given], Any], list[int]]:
    monkeypatch.setattr(prepared, "OFTEN", often)
    runs = [0]

    def function(given: Given) -> tuple[list[Tensor], None]:
        runs[0] += 1
        return [given[0] @ given[1].t()], None

    return function, runs


def test_a_function_runs_until_it_was_asked_often(monkeypatch: pytest.MonkeyPatch) -> None:
    function, runs = counted(monkeypatch, often=3)
    for call in range(1, 8):
        x, y = draws(*SHAPES)
        (found,), _ = prepared.call(function, "key", [x, y])
        assert torch.equal(found, x @ y.t()) and runs[0] == min(call, 4)


x = torch.randn(2, 3)
OTHERS: dict[str, tuple[list[Tensor], str]] = {
    "size": (draws((4, 3), (2, 3)), "key"),
    "strides": ([torch.randn(3, 2).t(), torch.randn(2, 3)], "key"),
    "offset": ([torch.randn(3, 3)[1:], torch.randn(2, 3)], "key"),
    "dtype": ([torch.randn(2, 3, dtype=torch.float64)] * 2, "key"),
    "shared memory": ([x, x], "key"),
    "key": (draws(*SHAPES), "another"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_they_are_for_tensors_like_those(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, runs = counted(monkeypatch)
    prepared.call(function, "key", draws(*SHAPES))
    prepared.call(function, "key", draws(*SHAPES))
    assert runs[0] == 1
    tensors, key = OTHERS[name]
    (found,), _ = prepared.call(function, key, tensors)
    assert runs[0] == 2 and torch.equal(found, tensors[0] @ tensors[1].t())


class Seen(TorchDispatchMode):
    """Counts ops."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_mode_of_the_user_sees_the_ops_and_nothing_is_recorded_under_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    function, runs = counted(monkeypatch)
    for expected in (1, 2):
        with Seen() as seen:
            prepared.call(function, "key", draws(*SHAPES))
        assert (runs[0], seen.count > 0) == (expected, True)
    prepared.call(function, "key", draws(*SHAPES))
    with Seen() as seen:
        prepared.call(function, "key", draws(*SHAPES))
    assert runs[0] == 3 and seen.count > 0


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize(
    "where", ["grad", "vmap", "requires grad", "forward", "autocast", "trace", "subclass"]
)
def test_nothing_prepared_runs_where_ops_are_transformed(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, runs = counted(monkeypatch)
    a, b = draws(*SHAPES)
    prepared.call(function, "key", [a, b])
    prepared.call(function, "key", [a, b])
    assert runs[0] == 1

    def called(a: Tensor, b: Tensor = b) -> Tensor:
        found: Tensor = prepared.call(function, "key", [a, b])[0][0]
        return found

    if where == "grad":
        assert_close(torch.func.grad(lambda a: called(a).sum())(a), b.sum(0).expand(2, 3))
    elif where == "vmap":
        assert_close(torch.vmap(called)(torch.stack([a, a]))[1], a @ b.t())
    elif where == "requires grad":
        (gradient,) = torch.autograd.grad(called(leaf := a.clone().requires_grad_()).sum(), leaf)
        assert_close(gradient, b.sum(0).expand(2, 3))
    elif where == "forward":
        with dual_level():
            called(a)
    elif where == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert called(a).dtype is torch.bfloat16
    elif where == "trace":
        traced = torch.jit.trace(lambda a: called(a), a, check_trace=False)
        assert_close(traced(2 * a), 2 * a @ b.t())
    else:
        called(a.as_subclass(type("Mine", (Tensor,), {})))
    assert runs[0] > 1


def test_without_gradients_leaves_are_ordinary_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    function, runs = counted(monkeypatch)
    a, b = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(2, 3))
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(prepared.call(function, "key", [a, b])[0][0], a @ b.t())
    assert runs[0] == 1


def test_memory_is_freed_when_its_last_line_has_run() -> None:
    alive: list[int] = []

    class Alive(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            results.append(weakref.ref(found))
            alive.append(sum(r() is not None for r in results))
            return found

    results: list[weakref.ref[Tensor]] = []

    def function(given: Given) -> list[Tensor]:
        x = given[0]
        for _ in range(20):
            x = x * 2
        return [x]

    ops = recorded(function, draws((2, 3)))
    with Alive():
        ops.run(draws((2, 3)))
    assert len(alive) > 20 and max(alive) <= 3


def test_no_tensors_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    function, _ = counted(monkeypatch)
    tensors = draws(*SHAPES)
    references = [weakref.ref(t) for t in tensors]
    prepared.call(function, "key", tensors)
    del tensors
    gc.collect()
    assert [r() for r in references] == [None, None]


def test_what_is_the_same_in_all_calls_is_fetched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not kept; neither are the ops, nor the reads, by which it is made."""
    monkeypatch.setattr(prepared, "OFTEN", 0)
    prepared.forget()
    made: list[weakref.ref[Tensor]] = []

    def get() -> Tensor:
        found = torch.full((3,), float(len(torch.ones(2).tolist())))
        made.append(weakref.ref(found))
        return found

    def function(given: Given) -> tuple[list[Tensor], None]:
        return [given[0] * prepared.fetched(get) + prepared.fetched(get)], None

    for _ in range(3):
        x = torch.randn(4, 3)
        assert torch.equal(prepared.call(function, "key", [x])[0][0], x * 2 + 2)
        assert [each() for each in made] == [None] * len(made)
    (ops,) = prepared.all_ops()
    assert len(made) == 8  # two of the recording, and of each run
    assert "full" not in ops.source and "ones" not in ops.source


def test_those_that_were_not_used_for_longest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    function, _ = counted(monkeypatch)
    monkeypatch.setattr(prepared, "MOST", 3)
    for key in range(5):
        prepared.call(function, key, draws(*SHAPES))
    assert [known[0] for known in cast(Any, prepared._known)] == [2, 3, 4]


def test_threads_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    function, _ = counted(monkeypatch, often=5)
    wrong: list[object] = []

    def work() -> None:
        for _ in range(50):
            a, b = draws(*SHAPES)
            if not torch.equal(prepared.call(function, "key", [a, b])[0][0], a @ b.t()):
                wrong.append((a, b))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Whole steps.


class Mixed(nn.Module):
    """Weights at one and at many positions, a table, a convolution, a norm, and a weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv = nn.Embedding(9, 6), nn.Conv1d(6, 6, 3, padding=1, groups=2)
        self.norm, self.twice, self.last = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.table(ids).transpose(1, 2)).transpose(1, 2)
        x = self.twice(torch.tanh(self.twice(self.norm(x))))
        out: Tensor = self.last(x.mean(1)).logsumexp(1)
        return out


@pytest.mark.parametrize("budget", [None, 2**20])
@pytest.mark.parametrize("objectives", [False, True])
def test_steps_of_an_engine(objectives: bool, budget: int | None) -> None:
    """Data, parameters, lengths and batches move; every step is compared with the dense oracle."""
    model = Mixed().double()
    engine = Engine(model, batch_dim=0, audit=None, memory_budget=budget)
    before = 0
    for step in range(56):
        size, length = ((4, 5), (4, 5), (3, 5), (4, 7))[step % 4]
        ids = torch.randint(0, 9, (size, length))

        def losses(ids: Tensor = ids) -> Tensor:
            out = model(ids)
            return torch.stack([out, out.sin()], 1) if objectives else out

        exact = dense_gramian(losses(), list(model.parameters()))
        found = engine.compute_gramian(losses()) if step % 8 < 4 else engine.jacobian(losses()).gramian()
        assert_close(found, exact)
        weights = torch.randn(exact.shape[: exact.ndim // 2], dtype=exact.dtype)
        jacobian = engine.jacobian(losses())
        jacobian.gramian()
        mine = jacobian.vjp(weights)
        wanted = torch.autograd.grad(losses(), list(model.parameters()), weights)
        for (name, _), gradient in zip(model.named_parameters(), wanted, strict=True):
            assert_close(mine[name], gradient)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.1)
        before = before or (len(prepared.all_ops()) if step == 47 else 0)
    assert before and len(prepared.all_ops()) == before  # nothing new was recorded in the last steps


def test_steps_of_a_transform() -> None:
    model = Mixed().double()

    def loss(parameters: dict[str, Tensor], ids: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(model, parameters, (ids[None],)).squeeze(0)
        return out

    lazy = gramjd.jacobian(loss, audit=None)
    for _ in range(10):
        parameters = {name: torch.randn_like(p) for name, p in model.named_parameters()}
        ids, weights = torch.randint(0, 9, (4, 5)), torch.randn(4, dtype=torch.float64)
        jacobian = lazy(parameters, ids)
        dense = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, ids)
        rows = torch.cat([rows.flatten(1) for rows in dense.values()], 1)
        assert_close(jacobian.gramian(), rows @ rows.T)
        found = jacobian.vjp(weights)
        for name, rows in dense.items():
            assert_close(found[name], torch.tensordot(weights, rows, 1))
    assert len(prepared.all_ops()) == 3  # blocks, Gramian, weighted gradient


@pytest.mark.skipif(OLD, reason="torch 2.1 does not show slices: their uses have no records")
def test_uses_beside_those_of_derived_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what shares a parameter with a weight expression is built anew in each step."""
    shapes = {"table": (5, 4), "first": (4, 4), "bias": (4,), "shared": (4,), "last": (3, 4)}
    built, block = [], Use.block

    def func(p: dict[str, Tensor], x: Tensor) -> Tensor:
        h = torch.tanh(F.linear(x, p["first"], p["bias"])) + p["table"][:3].sin() * p["shared"]
        return F.linear(h * p["shared"], p["last"]).square().sum(0)

    def counted(use: Use, which: int) -> Block:
        built.append(use.record.origin)
        return block(use, which)

    monkeypatch.setattr(Use, "block", counted)
    for step in range(8):
        params = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
        x = torch.randn(6, 3, 4, dtype=torch.float64)
        built.clear()
        found = gramjd.gramian(func, check="never")(params, x)
        assert ("linear" in built) == (step <= prepared.OFTEN) and "Tensor.mul" in built, built
        leaves = {name: p.requires_grad_() for name, p in params.items()}
        outputs = torch.stack([func(leaves, one) for one in x])
        assert_close(found, dense_gramian(outputs, leaves.values()))


def test_settings_of_an_op_are_part_of_the_key() -> None:
    """Other windows of the same sizes are another ops."""

    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4, 1, 1, dtype=torch.float64))
            self.padding = 0

        def forward(self, x: Tensor) -> Tensor:
            out = F.conv2d(x, self.weight, padding=self.padding, stride=1 + self.padding)
            return out.square().flatten(1).sum(1)

    model = Uses()
    engine = Engine(model, batch_dim=0, audit=None)
    for step in range(20):
        model.padding = step % 2
        x = torch.randn(3, 4, 2, 2, dtype=torch.float64)
        exact = dense_gramian(model(x), list(model.parameters()))
        assert_close(engine.compute_gramian(model(x)), exact)


def test_a_rule_of_a_user_is_never_recorded() -> None:
    from gramjd.rules.registry import Entry

    ours = next(iter(gramjd.rules.registry._RULES.values())).entries
    assert all(entry.is_ours for entry in ours.values())
    theirs = Entry(test_a_rule_of_a_user_is_never_recorded, frozenset(), "left", None)  # type: ignore[arg-type]
    assert not theirs.is_ours


def test_parameters_without_uses_are_part_of_the_key() -> None:
    """The same uses, of one parameter among one, two and three."""

    def loss(params: list[Tensor], x: Tensor) -> Tensor:
        return (x @ params[0]).square().sum()

    w, x = torch.randn(3, 2).double(), torch.randn(4, 3).double()
    rows = torch.func.vmap(torch.func.grad(lambda w, x: loss([w], x)), (None, 0))(w, x).flatten(1)
    for others in ([], [torch.randn(2)], [torch.randn(2), torch.randn(1)], []):
        for _ in range(prepared.OFTEN + 2):
            jacobian = gramjd.jacobian(loss)([w, *others], x)
            assert [len(blocks) for blocks in jacobian.blocks] == [1, *[0] * len(others)]
            assert_close(jacobian.gramian(), rows @ rows.T)
