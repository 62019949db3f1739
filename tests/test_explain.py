"""``explain``: what it lists for real models, and what it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import gramjd
from gramjd import Explanation, explain


def gpt2() -> tuple[nn.Module, tuple[Any, ...]]:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config), (torch.randint(0, 50, (3, 6)),)


def encoder() -> tuple[nn.Module, tuple[Any, ...]]:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2), (torch.randn(3, 5, 8),)


class Block(nn.Module):
    """A residual block with group normalisation."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.a, self.b = (
            nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False),
            nn.Conv2d(outputs, outputs, 3, padding=1),
        )
        self.short = nn.Conv2d(inputs, outputs, 1, 2)
        self.norm, self.last = nn.GroupNorm(2, outputs), nn.GroupNorm(2, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.last(self.b(F.relu(self.norm(self.a(x))))) + self.short(x))


def resnet() -> tuple[nn.Module, tuple[Any, ...]]:
    body = nn.Sequential(nn.Conv2d(3, 4, 3), Block(4, 8), Block(8, 8))
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)), (
        torch.randn(3, 3, 9, 9),
    )


class Tagger(nn.Module):
    """Embedding, LSTM in both directions, a label for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(20, 6), nn.Linear(8, 3)
        self.lstm = nn.LSTM(6, 4, num_layers=2, bidirectional=True, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.tokens(ids))[0])


def tagger() -> tuple[nn.Module, tuple[Any, ...]]:
    return Tagger(), (torch.randint(0, 20, (3, 5)),)


class ViT(nn.Module):
    """Patches, a class token, positions, an encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 3)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(x), -1, -1), h], 1) + self.positions
        return self.head(self.encoder(h)[:, 0])


def vit() -> tuple[nn.Module, tuple[Any, ...]]:
    return ViT(), (torch.randn(3, 3, 8, 8),)


def loss(out: Any) -> Tensor:
    """One objective for each sample."""
    out = out if isinstance(out, Tensor) else out.logits
    return out.flatten(1).sin().sum(1)


@pytest.mark.parametrize("build", [gpt2, encoder, resnet, tagger, vit])
@pytest.mark.parametrize("train", [True, False])
def test_models_have_no_unexplained_dense_block(build: Callable[[], Any], train: bool) -> None:
    model, args = build()
    found = explain(model.train(train), *args, loss=loss)
    assert {row.parameter for row in found} == {name for name, _ in model.named_parameters()}
    dense = {row.parameter: row.reason for row in found if "Dense" in row.block and len(row.shape) > 1}
    assert set(dense) == ({"token", "positions"} if build is vit else set())
    assert all(dense.values())


def test_the_table() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    found = explain(model, torch.randn(5, 3))
    assert isinstance(found, Explanation) and len(found) == 4
    row = next(row for row in found if row.parameter == "0.weight")
    assert (row.shape, row.op, row.block, row.reason) == (
        (4, 3),
        "linear",
        "Outer(K=2, B=5, T=1, o=4, i=3)",
        "",
    )
    assert row.plan and row.multiply_adds > 0 and row.bytes > 0
    lines = str(found).splitlines()
    assert lines[0].split()[:4] == ["parameter", "shape", "op", "block"] and lines[-1].startswith("total")
    assert found.multiply_adds == sum(row.multiply_adds for row in found)


def test_the_program() -> None:
    """An engine tells its strategies, and what it replays after the backward pass."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.recurrent, self.last = nn.Linear(3, 4), nn.LSTM(4, 5), nn.Linear(5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.recurrent(self.first(x).transpose(0, 1))[0]).mean(0)

    model = Hidden()
    engine = gramjd.Engine(model, batch_dim=0)
    for _ in range(2):
        found = engine.explain(model(torch.randn(6, 5, 3)).square().sum(1))
        assert found.program == (
            "Strategies: ops for 8 parameters; 3 regions of the graph, 1 of them after the backward pass."
        )
        assert str(found).splitlines()[-2:] == [found.program, found.proof]
        assert f"<p>{found.program}</p><p>" in found._repr_html_()


def test_similar_rows_are_one_line() -> None:
    """Three or more that differ in numbers of the name alone, in all combinations of them."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, batch_first=True)
    model = nn.TransformerEncoder(layer, 4)
    found = explain(model, torch.randn(3, 5, 8), loss=lambda out: out.square().sum((1, 2)))
    lines = {line.split()[0]: line for line in str(found).splitlines()}
    assert "layers.{0-3}.norm{1,2}.bias" in lines and "layers.{0-3}.linear1.weight" in lines
    assert len(lines) == 12 and "4 × " in lines["layers.{0-3}.linear1.weight"]
    assert len(found) == 48 and "total" in lines
    layers = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 5)
    names = str(explain(nn.Sequential(*layers), torch.randn(3, 4)))
    assert "{" not in names and "0.weight" in names and "1.weight" in names
    assert repr(found).startswith("Explanation(parameters=48, rows=48, without_rule=0, multiply_adds=")
    some = [row for row in found if not row.parameter.startswith("layers.2.norm1")]
    assert "layers.3.norm2.bias" in str(Explanation(some))  # not all combinations


def test_pairs_of_blocks_and_reasons() -> None:
    """A tied weight has rows for both uses and for the pair; an op without a rule is named."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.points = nn.Embedding(7, 4), nn.Parameter(torch.randn(3, 4))

        def forward(self, ids: Tensor) -> Tensor:
            h = self.table(ids)
            return (h @ self.table.weight.T).sum((1, 2)) + torch.cdist(h, self.points).sum((1, 2))

    found = list(explain(Tied().double(), torch.randint(0, 7, (3, 5))))
    ops = [row.op for row in found if row.parameter == "table.weight"]
    assert len(ops) == 3 and any(" × " in op for op in ops) and "embedding" in ops
    (points,) = (row for row in found if row.parameter == "points")
    assert points.reason == "no rule covers it" and points.op.startswith("cdist")


def test_a_function_is_explained_by_its_jacobian() -> None:
    def f(w: Tensor, x: Tensor) -> Tensor:
        return (x @ w).tanh().sum()

    (row,) = explain(gramjd.jacobian(f)(torch.randn(3, 4), torch.randn(5, 3)))
    assert row.block.startswith("Outer(K=1, B=5") and "matmul" in row.op


def test_errors_and_nothing_left_behind() -> None:
    model = nn.LSTM(3, 4, batch_first=True)
    with pytest.raises(TypeError, match="loss="):
        explain(model, torch.randn(2, 5, 3))
    assert not model._forward_hooks and not model._forward_pre_hooks
    with pytest.raises(TypeError, match="not a function"):
        explain(loss)  # type: ignore[arg-type]
    jac = gramjd.jacobian(lambda w, x: (w * x).sum())(torch.randn(3), torch.randn(2, 3))
    with pytest.raises(TypeError, match="as it is"):
        explain(jac, torch.randn(2))


def test_engine_explains_its_output() -> None:
    model = nn.Linear(3, 2)
    engine = gramjd.Engine(model, batch_dim=0)
    found = engine.explain(model(torch.randn(4, 3)).sum(1))
    assert [(row.parameter, row.op) for row in found] == [("bias", "linear"), ("weight", "linear")]


@pytest.mark.parametrize("case", ["shared", "other cotangents", "no room", "positions"])
def test_a_bias_that_shares_the_products_of_its_weight(case: str) -> None:
    """What is listed is what is run: multiply-adds of the products, counted."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(300, 200)), nn.Parameter(torch.randn(300))

        def forward(self, x: Tensor) -> Tensor:
            bias = self.bias * 2 if case == "other cotangents" else self.bias
            return F.linear(x, self.weight, bias).square()

    samples = 400 if case == "no room" else 8
    x = torch.randn(samples, *([3] if case == "positions" else []), 200)
    model = Layer()
    engine = gramjd.Engine(model, batch_dim=0, strategies=["ops"], memory_budget=2**20)
    out = model(x)
    losses = out.flatten(1).sum(1)
    listed = {row.parameter: row for row in engine.explain(losses)}
    assert (listed["bias"].plan == "with its weight") == (case == "shared")
    J = engine.jacobian(losses)
    with FlopCounterMode(display=False) as counter:
        J.gramian(memory_budget=2**20)
    run, found = counter.get_total_flops() / 2, sum(row.multiply_adds for row in listed.values())
    if case == "shared":
        assert run == samples**2 * (200 + 300) <= found <= 1.01 * run
        assert listed["bias"].multiply_adds == 0
    else:
        assert listed["bias"].multiply_adds == samples**2 * 300


def test_a_list_of_losses() -> None:
    model, x = nn.Linear(4, 2), torch.randn(6, 4)
    found = gramjd.explain(model, x, loss=lambda out: [out[:, 0], out[:, 1].square()])
    want = gramjd.explain(model, x, loss=lambda out: torch.stack([out[:, 0], out[:, 1].square()], 1))
    assert str(found) == str(want)
