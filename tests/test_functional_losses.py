"""Losses that transforms compute by other ops than torch does: the same values, Gramians and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

import gramjd
from gramjd.functional.losses import cross_entropy

SHAPES = {"sample": ((4,), ()), "batch": ((3, 4), (3,)), "places": ((2, 4, 5), (2, 5))}
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {"reduction": "none"},
    "ignored": {"reduction": "none", "ignore_index": 1},
    "mean": {},
    "sum": {"reduction": "sum", "ignore_index": 1},
    "weights": {"reduction": "none", "weight": torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)},
    "smoothed": {"reduction": "none", "label_smoothing": 0.1},
    "old names": {"reduce": False},
}


def draw(shape: tuple[int, ...], of: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(0, 4, of)
    labels.view(-1)[0] = 1
    return torch.randn(shape, dtype=torch.float64, requires_grad=True), labels


@pytest.mark.filterwarnings("ignore:.*reduce args will be deprecated")
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shapes", SHAPES)
def test_as_torch(shapes: str, options: str) -> None:
    x, y = draw(*SHAPES[shapes])
    found, want = cross_entropy(x, y, **OPTIONS[options]), F.cross_entropy(x, y, **OPTIONS[options])
    torch.testing.assert_close(found, want)
    cotangents = torch.randn_like(want)
    torch.testing.assert_close(*(torch.autograd.grad(each, x, cotangents)[0] for each in (found, want)))


def test_probabilities() -> None:
    x, _ = draw((3, 4), (3,))
    y = torch.rand(3, 4, dtype=torch.float64)
    found = cross_entropy(x, y, reduction="none")
    torch.testing.assert_close(found, F.cross_entropy(x, y, reduction="none"))


@pytest.mark.parametrize("label", [4, -1])
def test_labels_out_of_range(label: int) -> None:
    """Raise, as in torch: they are not taken for other labels."""
    x, y = draw((3, 4), (3,))
    with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"):
        cross_entropy(x, torch.full_like(y, label), reduction="none")


def test_other_labels() -> None:
    """Fewer labels than samples, which a gather would take, are an error, and bytes are labels."""
    x, y = draw((3, 4), (3,))
    with pytest.raises(ValueError, match="batch_size"):
        cross_entropy(x, y[:2], reduction="none")
    found = cross_entropy(x, y.to(torch.uint8), reduction="none")
    torch.testing.assert_close(found, cross_entropy(x, y, reduction="none"))


@pytest.mark.parametrize("ignore_index", [-100, 1])
def test_transforms(ignore_index: int) -> None:
    """The Gramian of losses of classes, one of which is ignored, is that of the rows of ordinary autograd."""
    torch.manual_seed(0)
    params = {"w": torch.randn(4, 6, dtype=torch.float64), "b": torch.randn(4, dtype=torch.float64)}
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.randint(0, 4, (9,))
    y[:2] = 1

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        out = F.linear(x, params["w"], params["b"])
        return F.cross_entropy(out, y, reduction="none", ignore_index=ignore_index)

    found = gramjd.gramian(loss)(params, x, y)
    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    losses = loss(leaves, x, y)
    rows = []
    for each in losses:
        grads = torch.autograd.grad(each, [*leaves.values()], retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    J = torch.stack(rows)
    torch.testing.assert_close(found, J @ J.T)
    values = gramjd.gramian_and_value(loss)(params, x, y)[1]
    torch.testing.assert_close(values, losses.detach())


def test_inside_other_transforms() -> None:
    """Under ``vmap`` over models, and differentiated twice."""
    torch.manual_seed(0)
    w = torch.randn(3, 4, 6, dtype=torch.float64)
    x, y = torch.randn(5, 6, dtype=torch.float64), torch.randint(0, 4, (5,))

    def loss(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w), y, reduction="none")

    each = vmap(gramjd.gramian(loss), (0, None, None))(w, x, y)
    torch.testing.assert_close(each, torch.stack([gramjd.gramian(loss)(one, x, y) for one in w]))

    def trace(w: Tensor) -> Tensor:
        return gramjd.gramian(loss)(w, x, y).trace()

    def wanted(w: Tensor) -> Tensor:
        rows = vmap(grad(lambda w, x, y: loss(w, x, y)), (None, 0, 0))(w, x, y)
        return rows.square().sum()

    torch.testing.assert_close(grad(trace)(w[0]), grad(wanted)(w[0]))
