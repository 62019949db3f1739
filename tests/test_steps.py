"""Right or an error at every step: families of models whose samples move between the steps of one engine."""

from __future__ import annotations

import pytest
import steps_arguments  # noqa: F401
import steps_gates  # noqa: F401
import steps_modes  # noqa: F401
import steps_opaque  # noqa: F401
import steps_ragged  # noqa: F401
import steps_sizes  # noqa: F401
import steps_values  # noqa: F401
from oracle import OLD
from steps import FAMILIES, ORDERS, judge, preparing, projecting

LACKING = {"nested tensors", "samples chosen by aminmax"} if OLD else set()  # no jagged layout, no derivative
CASES = [
    (name, batch_dim)
    for name, this in FAMILIES.items()
    for batch_dim in this.batch_dims
    if name not in LACKING
]


@pytest.mark.parametrize("order", list(ORDERS))
@pytest.mark.parametrize(("name", "batch_dim"), CASES)
@pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors",
    "ignore:There is a performance drop",
    "ignore:index_reduce.* is in beta",
    "ignore:Sparse invariant checks",
    "ignore:The .grad attribute of a Tensor that is not a leaf",  # torch.compile looks at it
)
def test_every_step_is_exact_or_refused(name: str, batch_dim: int | None, order: str) -> None:
    with projecting(order == "each twice"), preparing(at_once=order != "backwards"):
        found = judge(FAMILIES[name], ORDERS[order], batch_dim)
    assert len(found) >= 4


def test_the_families_are_many() -> None:
    assert len(FAMILIES) >= 45
