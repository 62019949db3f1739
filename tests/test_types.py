"""What type checkers are told of calls is what they return; ``make lint`` has mypy read the same file."""

from collections.abc import Callable

import pytest
import typed_calls

from gramjd import weighting


@pytest.mark.parametrize("calls", list(typed_calls.all_of_them()), ids=lambda calls: calls.__name__)
def test_calls_return_what_they_are_typed_as(calls: Callable[[], None]) -> None:
    calls()


def test_every_weighting_is_among_them() -> None:
    named = {name for name in weighting.__all__ if name.endswith("Weighting")}
    of_rows = {"ExcessMTLWeighting"}
    assert {type(each).__name__ for each in typed_calls.PLAIN} | of_rows == named - {
        "Weighting",
        "StatefulWeighting",
    }
