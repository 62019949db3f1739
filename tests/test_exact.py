"""Exact without changing the model: tables, tokens, shared weights and randomness."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exactness import Net, check, check_on, draw, objectives, parameter
from oracle import OLD, assert_close, dense_gramian
from torch import Tensor, nn

import gramjd
from gramjd import Engine

B, T, D = 3, 5, 4


# Batch-independent intermediate results.


def test_position_embeddings_looked_up_once() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.layer(x + m.positions(torch.arange(x.shape[1])))

    for steps in (T, B, 2 * B):  # as many as samples, and a multiple
        check_on(
            Net(forward, positions=nn.Embedding(8, D), layer=nn.Linear(D, D)),
            draw(B, steps, D),
        )


def test_relative_position_biases() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        bias = m.table((places[:, None] - places).clamp(-2, 2) + 2).permute(2, 0, 1)
        return (m.q(x) @ m.k(x).mT + bias.mean(0)).softmax(-1) @ x

    check_on(Net(forward, table=nn.Embedding(5, 2), q=nn.Linear(D, D), k=nn.Linear(D, D)), draw(B, T, D))


def test_learned_rotary_tables() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1])[:, None] * m.frequencies
        a, b = m.layer(x).chunk(2, -1)
        return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)

    check_on(Net(forward, frequencies=parameter(D // 2), layer=nn.Linear(D, D)), draw(B, T, D))


@pytest.mark.parametrize("repeat", ["expand", "repeat", "stack", "broadcast"])
def test_class_tokens(repeat: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        token = {
            "expand": lambda: m.token.expand(len(x), -1, -1),
            "repeat": lambda: m.token.repeat(len(x), 1, 1),
            "stack": lambda: torch.stack([m.token[0]] * len(x)),
            "broadcast": lambda: m.token + x.new_zeros(len(x), 1, 1),
        }[repeat]()
        return m.layer(torch.cat([token, x], 1))

    model = Net(forward, token=parameter(1, 1, D), layer=nn.Linear(D, D))
    # stack makes the samples itself, so that it is no function of one of them
    check_on(model, draw(B, T, D), rows=["token"] if repeat == "stack" else [])


def test_learned_queries() -> None:
    """Cross attention from queries that every sample shares."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.attention(m.queries.expand(len(x), -1, -1), x, x)[0] * m.scale.exp()

    attention = nn.MultiheadAttention(D, 2, dropout=0.2, batch_first=True)
    for samples in (B, 2):  # 2: as many as queries
        check_on(Net(forward, queries=parameter(2, D), attention=attention, scale=parameter(1)),
                 draw(samples, T, D))  # fmt: skip


def test_a_parameter_that_a_child_returns() -> None:
    def child(m: Any) -> Tensor:
        return m.table

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.layer(x) @ m.child()

    check_on(Net(forward, child=Net(child, table=parameter(D, 2)), layer=nn.Linear(D, D)), draw(B, D))


def test_a_parameter_that_the_model_returns() -> None:
    """The loss uses it outside every registered module, where no op is seen: rows for it alone."""

    def losses(m: nn.Module) -> Tensor:
        out, scale = m(draw(B, D))
        return (out * scale).sum(1)

    check(Net(lambda m, x: (m.layer(x), m.scale), layer=nn.Linear(D, D), scale=parameter(D)), losses,
          rows=["scale"])  # fmt: skip


@pytest.mark.parametrize("steps", [4, 2 * B])
def test_inputs_that_no_sample_owns(steps: int) -> None:
    """Coordinates ``[T, 2]`` for all samples: what uses them is of no one sample, so rows. No refusal."""

    def forward(m: Any, x: Tensor, at: Tensor) -> Tensor:
        return m.branch(x) @ m.trunk(at).tanh().T

    check_on(Net(forward, branch=nn.Linear(D, 3), trunk=nn.Linear(2, 3)), draw(B, D), draw(steps, 2),
             rows=["trunk"])  # fmt: skip


def test_as_many_rows_as_samples_that_no_sample_owns_are_refused() -> None:
    """Nothing tells them from samples that are mixed; the error says how to tell."""

    def forward(m: Any, x: Tensor, at: Tensor) -> Tensor:
        return m.branch(x) @ m.trunk(at).tanh().T

    model = Net(forward, branch=nn.Linear(D, 3), trunk=nn.Linear(2, 3))
    engine = Engine(model, batch_dim=0)
    with pytest.raises(gramjd.NotSeparableError, match=r"'trunk.weight'.*no batch dimension.*\[1, \.\.\.\]"):
        engine.compute_gramian(model(draw(B, D), draw(B, 2)).sum(1))
    engine.close()
    at = draw(1, B, 2)  # the remedy
    check(model, lambda m: (m.branch(draw(B, D))[:, None] * m.trunk(at)).sum((1, 2)), rows=["trunk"])


# Weights that are shared.


def test_weights_tied_across_registered_roots() -> None:
    a, b, x = nn.Linear(D, D).double(), nn.Linear(D, D).double(), draw(B, D)
    b.weight = a.weight
    for batch_dim in (0, None):
        for roots in ((a, b), ([b, a],)):
            engine = Engine(*roots, batch_dim=batch_dim, strategies=["ops"])
            out = objectives(b(a(x).tanh()))
            assert_close(engine.compute_gramian(out), dense_gramian(out, [a.weight, a.bias, b.bias]))
            engine.close()


def test_weights_tied_across_modules_of_several_kinds() -> None:
    """An embedding, a linear layer and a convolution, each with the other's weight."""

    def forward(m: Any, ids: Tensor) -> Tensor:
        h = m.tokens(ids)
        h = h + F.conv1d(h.mT, m.tokens.weight[:D, :, None].tanh()).mT
        return m.head(h)

    model = Net(forward, tokens=nn.Embedding(7, D), head=nn.Linear(D, 7))
    model.head.weight = model.tokens.weight
    check_on(model, torch.randint(0, 7, (B, T)), rows=["tokens.weight"] if OLD else [])


def test_a_parent_that_uses_its_childs_weight_beside_calling_it() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.child(m.child(x)) @ m.child.weight.T + F.linear(x, m.child.weight, m.child.bias)

    check_on(Net(forward, child=nn.Linear(D, D)), draw(B, D))


# Randomness: the Gramian of the very forward that ran.

RANDOM: dict[str, Any] = {
    "functional dropout": lambda m, x: m.b(F.dropout(m.a(x), 0.5)),
    "dropout module": lambda m, x: m.b(m.dropout(m.a(x))),
    "dropout in place": lambda m, x: m.b(F.dropout(m.a(x), 0.5, inplace=True)),
    "alpha dropout": lambda m, x: m.b(F.alpha_dropout(m.a(x), 0.5, training=True)),
    "channel dropout": lambda m, x: m.b(F.dropout1d(m.a(x)[:, :, None], 0.5)[..., 0]),
    "attention's dropout_p": lambda m, x: F.scaled_dot_product_attention(
        *(f(x)[:, None, :, None] for f in (m.a, m.b, m.a)), dropout_p=0.5
    ),
    "stochastic depth by sample": lambda m, x: x + m.a(x) * x.new_empty(len(x), 1).bernoulli_(0.5),
    "stochastic depth by batch": lambda m, x: m.b(m.a(x) if torch.rand(()) < 0.5 else x),
    "noise on activations": lambda m, x: m.b(m.a(x) + torch.rand(x.shape, dtype=x.dtype)),
    "noise on a weight": lambda m, x: F.linear(x, m.a.weight + torch.randn_like(m.a.weight)) + m.b(x),
    "noise of a learned size": lambda m, x: m.a(x) + torch.randn_like(x) * m.b.bias.exp(),
    "a random gate of a weight": lambda m, x: F.linear(x, m.a.weight * (torch.rand(D, D) < 0.5)) + m.b(x),
}


@pytest.mark.parametrize("name", list(RANDOM))
def test_randomness(name: str) -> None:
    model = Net(RANDOM[name], a=nn.Linear(D, D), b=nn.Linear(D, D), dropout=nn.Dropout(0.5))
    check_on(model, draw(B, D), times=4)


def test_dropout_of_a_weight() -> None:
    """Its mask is drawn inside the op, which cannot be called again: rows for that weight alone."""
    model = Net(
        lambda m, x: F.linear(m.a(x), F.dropout(m.b.weight, 0.5)), a=nn.Linear(D, D), b=nn.Linear(D, D)
    )
    check_on(model, draw(B, D), rows=["b.weight"])
