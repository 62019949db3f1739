"""Random models (:mod:`fuzz`) are exact or refused: 500 in every run, more by ``make fuzz``."""

from __future__ import annotations

import os
from collections import Counter

import hypothesis.strategies as st
import pytest
from fuzz import FORWARDS, LOSSES, MIXED_LOSSES, Recipe, outcome
from fuzz_ops import OPS, SEPARABLE
from fuzz_program import Instruction
from hypothesis import HealthCheck, given, settings

BY_HAND = os.environ.get("GRAMJD_FUZZ")  # how many; these are other ones every time, and counted


def instructions(ops: list[str], fewest: int, most: int) -> st.SearchStrategy[tuple[Instruction, ...]]:
    one = st.builds(
        Instruction, st.sampled_from(ops), st.integers(0, 63), st.integers(0, 8 * 9 * 5 * 7 * 11 * 13)
    )
    return st.lists(one, min_size=fewest, max_size=most).map(tuple)


def recipes(body: st.SearchStrategy[tuple[Instruction, ...]], losses: list[str]) -> st.SearchStrategy[Recipe]:
    sizes = st.fixed_dictionaries(
        {"B": st.integers(2, 4), "T": st.sampled_from([2, 3, 4, 6]), "D": st.integers(2, 4)}
    ).map(lambda sizes: {**sizes, "V": 8, "3": 3})
    first = st.integers(0, 13).map(lambda a: (Instruction("linear", 0, a),))
    return st.builds(
        Recipe,
        sizes,
        st.tuples(first, body).map(lambda both: both[0] + both[1]),
        st.lists(instructions(list(SEPARABLE), 1, 3), max_size=2).map(tuple),
        loss=st.sampled_from(losses),
        forwards=st.sampled_from(["one", *FORWARDS]),
        registered=st.sampled_from(["model", "model", "modules", "roots", "inner roots", "some modules"]),
        engines=st.sampled_from(["batch", "none", "both"]),
        frozen=st.sampled_from([False, False, True]),
        training=st.booleans(),
        seed=st.integers(0, 2**16),
    )


SEPARATE = recipes(instructions(list(SEPARABLE), 2, 7), list(LOSSES))
MIXED = recipes(instructions([*OPS, "mix", "mix"], 2, 7), [*LOSSES, *MIXED_LOSSES])
RECIPES = st.one_of(SEPARATE, SEPARATE, SEPARATE, MIXED)


@pytest.mark.filterwarnings("ignore::gramjd.SlowPathWarning", "ignore:There is a performance drop")
def test_random_models_are_exact_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    counts: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    failed: list[tuple[str, Recipe]] = []
    chosen = settings(
        max_examples=int(BY_HAND or 500),
        derandomize=BY_HAND is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )

    @chosen
    @given(RECIPES)
    def check(recipe: Recipe) -> None:
        found, did = outcome(recipe)
        counts.update(found)
        notes.update(did)
        for each in found:
            if "wrong" in each or "foreign" in each or "unwarranted" in each:
                failed.append((each, recipe))

    check()
    with capsys.disabled():
        print()
        for table in counts, notes:
            print("\n".join(f"{n:6} {name}" for name, n in table.most_common()), "\n")
        for each in failed:
            print(each)
    assert not failed
