"""Transforms that are made anew in every step: verified no more often than one that is kept."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from exactness import draw
from oracle import assert_close
from torch import Tensor, nn

import gramjd
from gramjd import CheckFailedError
from gramjd.blocks import Dense
from gramjd.rules import registry
from gramjd.verification import functions, schedule
from gramjd.verification.functions import identity

B, D = 5, 3
Step = Callable[[Tensor, Tensor], Tensor]  # of w and x, with a transform of its own
runs = [0]


def counted(w: Tensor, x: Tensor, scale: Any = 1.0) -> Tensor:
    """An objective that counts how often it ran."""
    runs[0] += 1
    return torch.mul((x @ w).tanh(), scale).square().sum()


class Owner:
    def __init__(self) -> None:
        self.target = draw(4)

    def loss(self, w: Tensor, x: Tensor) -> Tensor:
        return counted(w, x, self.target)


def by_lambda(w: Tensor, x: Tensor) -> Tensor:
    return gramjd.gramian(lambda w, x: counted(w, x, 2.0))(w, x)


def nested(w: Tensor, x: Tensor) -> Tensor:
    target, options = draw(4), {"power": 2, "layers": [nn.Identity]}

    def loss(w: Tensor, x: Tensor, n: int = 1, *, more: float = float(torch.rand(()))) -> Tensor:
        return counted(w, x, target * more) + 0 * options["power"] * n  # type: ignore[operator]

    return gramjd.gramian(loss)(w, x)


def of_helpers(w: Tensor, x: Tensor) -> Tensor:
    def helper(w: Tensor, x: Tensor) -> Tensor:
        return counted(w, x)

    return gramjd.gramian(lambda w, x: helper(w, x))(w, x)


def recursive(w: Tensor, x: Tensor) -> Tensor:
    def loss(w: Tensor, x: Tensor, depth: int = 1) -> Tensor:
        return loss(w, x, depth - 1) if depth else counted(w, x)

    return gramjd.gramian(loss)(w, x)


owner = Owner()
STEPS: dict[str, Step] = {
    "function": lambda w, x: gramjd.gramian(counted)(w, x),
    "lambda": by_lambda,
    "nested": nested,
    "helpers": of_helpers,
    "recursive": recursive,
    "method": lambda w, x: gramjd.gramian(owner.loss)(w, x),
    "partial": lambda w, x: gramjd.gramian(functools.partial(counted, scale=draw(4)))(w, x),
    "jacobian": lambda w, x: gramjd.jacobian(counted)(w, x).gramian(),
    "in a module": lambda w, x: gramjd.gramian(lambda w, x: counted(w, x, owner.target))(w, x),
}


@pytest.mark.parametrize("name", STEPS)
def test_verified_as_often_as_one_that_is_kept(name: str) -> None:
    w, verified = draw(D, 4), []
    for n in range(1, 10):
        before = runs[0]
        STEPS[name](w, draw(B, D))
        if runs[0] > before + 1:
            verified.append(n)
    assert verified == [1, 2, 4, 8]


def test_exact_whatever_is_closed_over() -> None:
    """Tensors and numbers that a function closes over are taken as they are at each step."""
    w, x = draw(D, 4), draw(B, D)
    for n in range(5):
        target = draw(4)

        def loss(w: Tensor, x: Tensor, target: Tensor = target, n: int = n) -> Tensor:
            return counted(w, x, target * n)

        rows = torch.func.vmap(torch.func.grad(loss), (None, 0))(w, x).flatten(1)
        assert_close(gramjd.gramian(loss)(w, x), rows @ rows.T)
        assert_close(gramjd.gramian(lambda w, x: loss(w, x))(w, x), rows @ rows.T)


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The rule of a product's second factor, wrong while the list says so."""
    rules, active = registry.rules_of(torch.mul), [False]
    assert rules is not None
    right = rules.entries["other"]

    def rule(c: Tensor, input: Tensor, other: Tensor) -> Any:
        block = right.rule(c, input, other)
        return Dense(1.01 * block.values) if active[0] else block

    monkeypatch.setitem(rules.entries, "other", registry.Entry(rule, right.needs, right.align, None))
    return active


def times(x: Tensor, s: Tensor) -> Tensor:
    return torch.mul(x, s)


def also_times(x: Tensor, s: Tensor) -> Tensor:
    return torch.mul(x, s)


def squares_of(product: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda s, x: product(x, s).square().sum()


def test_what_is_another_function(wrong: list[bool]) -> None:
    """Other code, other objects that it closes over, other options: verified by themselves."""
    s, x = draw(D), draw(B, D)
    gramjd.gramian(squares_of(times))(s, x)
    gramjd.gramian(squares_of(torch.mul))(s, x)
    wrong[0] = True
    others: list[Callable[[], Any]] = [
        lambda: gramjd.gramian(squares_of(also_times))(s, x),
        lambda: gramjd.gramian(squares_of(lambda x, s: torch.mul(x, s)))(s, x),
        lambda: gramjd.gramian(lambda s, x: times(x, s).square().sum())(s, x),
        lambda: gramjd.gramian(squares_of(times), audit=None)(s, x),
        lambda: gramjd.gramian(squares_of(times), in_dims=(None, 1))(s, x.T),
        lambda: gramjd.gramian(squares_of(times), randomness="same")(s, x),
        lambda: gramjd.gramian(squares_of(times), chunk_size=2)(s, x),
        lambda: gramjd.gramian(squares_of(times), argnums=(0,))(s, x),
    ]
    for other in others:
        with pytest.raises(CheckFailedError, match="is wrong"):
            other()


def test_a_new_rule_ends_what_is_verified(wrong: list[bool]) -> None:
    s, x = draw(D), draw(B, D)
    for _ in range(2):
        gramjd.gramian(squares_of(times))(s, x)
    wrong[0] = True
    gramjd.gramian(squares_of(times))(s, x)  # the third call is not due

    def untouched(x: Tensor) -> Tensor:
        return x

    gramjd.register_rule(untouched, wrt="x")(_rule)
    with pytest.raises(CheckFailedError, match="is wrong"):
        gramjd.gramian(squares_of(times))(s, x)


def _rule(c: Tensor, x: Tensor) -> Dense:
    return Dense(c)


class Unhashable:
    """A callable without a hash, as dataclasses are."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return True

    def __call__(self, w: Tensor, x: Tensor) -> Tensor:
        return counted(w, x)


class Slotted:
    """A callable that takes no weak reference."""

    __slots__ = ()

    def __call__(self, w: Tensor, x: Tensor) -> Tensor:
        return counted(w, x)


def test_callables() -> None:
    """A callable object is recognised by its identity, and verified anew where that cannot be told."""
    w, x = draw(D, 4), draw(B, D)
    for function, verified in ((Unhashable(), [1, 2, 4]), (Slotted(), [1, 2, 3, 4])):
        found = []
        for n in range(1, 5):
            before = runs[0]
            gramjd.gramian(function)(w, x)
            if runs[0] > before + 1:
                found.append(n)
        assert found == verified
    assert identity(Unhashable()) != identity(Unhashable())


def test_functions_of_one_code_in_two_modules() -> None:
    """The same code reads other globals."""
    text, found = "def loss(w, x):\n    return helper(w, x)\n", []
    code = compile(text, "<none>", "exec")
    for helper in (counted, times):
        names: dict[str, Any] = {"helper": helper, "__name__": __name__}
        exec(code, names)
        found.append(names["loss"])
    assert found[0].__code__ is found[1].__code__ or found[0].__code__ == found[1].__code__
    assert identity(found[0]) != identity(found[1])


def test_nothing_is_kept_alive() -> None:
    def step() -> list[weakref.ref[Any]]:
        model, w, target, held = nn.Linear(D, 4).double(), draw(D, 4), draw(4), Owner()
        loss = lambda w, x: (model(x) * counted(w, x, target) * held.target).sum()  # noqa: E731
        gramjd.gramian(loss)(w, draw(B, D))
        return [weakref.ref(x) for x in (model, w, target, held, loss)]

    references = step()
    assert len(schedule._MEMORIES) == 1
    gc.collect()
    assert [reference() for reference in references] == [None] * 5


def test_an_identity_ends_with_its_object() -> None:
    """Whatever takes the memory of an object that is gone is another object."""
    first = Owner()
    key, same = functions.Same(first), functions.Same(first)
    assert key == same and hash(key) == hash(same)
    del first
    gc.collect()
    second = Owner()
    key.number = functions.Same(second).number
    assert key != same and key != functions.Same(second) and key == key


def test_few_functions_are_remembered() -> None:
    w, x, kept = draw(D, 4), draw(B, D), []
    for n in range(schedule._FUNCTIONS + 10):
        kept.append(lambda w, x, n=n: counted(w, x) * n)
        gramjd.gramian(kept[-1])(w, x)
    assert len(schedule._MEMORIES) == schedule._FUNCTIONS
