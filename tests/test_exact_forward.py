"""Exact without changing the model: masks, side effects, normalisation and layouts of its forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exactness import Net, check, check_on, draw, objectives, parameter
from oracle import assert_close, dense_gramian
from torch import Tensor, nn

import gramjd
from gramjd import Engine

B, T, D = 3, 5, 4


# Masks, in-place ops, side effects, control flow.


def test_padding_masks_whose_values_decide() -> None:
    """As Hugging Face does: no mask at all if nothing is padded."""

    def forward(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        scores = m.q(x) @ m.k(x).mT
        if not mask.all():
            scores = scores.masked_fill(~mask[:, None], torch.finfo(x.dtype).min)
        return scores.softmax(-1) @ x * mask[..., None]

    mask = torch.arange(T) < torch.tensor([5, 3, 2])[:, None]
    model = Net(forward, q=nn.Linear(D, D), k=nn.Linear(D, D))
    for given in (mask, torch.ones_like(mask)):
        check_on(model, draw(B, T, D), given)


FLOW: dict[str, Any] = {
    "ops in place": lambda m, x: m.b(m.a(x).mul_(2).add_(1).relu_()),
    "a parameter added in place": lambda m, x: m.a(x).add_(m.b.bias),
    "item": lambda m, x: m.b(m.a(x) * (1 + m.a(x).abs().max().item())),
    "branch": lambda m, x: m.b(m.a(x)) if m.a(x).sum() > 0 else m.a(m.b(x)),
    "loop until": lambda m, x: _until_small(m, x),
    "boolean indices": lambda m, x: m.b(
        m.a(x)[:, torch.tensor([True, False, True, True])].repeat(1, 2)[:, :D]
    ),
    "numpy": lambda m, x: m.b(m.a(x) * float(m.a(x).detach().numpy().mean())),
}


def _until_small(m: Any, x: Tensor) -> Tensor:
    while x.norm() > 1.0:
        x = m.a(x).tanh() / 2
    return m.b(x)


@pytest.mark.parametrize("name", list(FLOW))
def test_control_flow_and_in_place_ops(name: str) -> None:
    check_on(Net(FLOW[name], a=nn.Linear(D, D), b=nn.Linear(D, D)), draw(B, D))


def test_parameters_written_into_a_tensor() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        h = m.a(x)
        out[:, :2] = h[:, 2:]
        out[:, 2:] += h[:, :2] * m.scale
        return m.b(out)

    check_on(Net(forward, a=nn.Linear(D, D), b=nn.Linear(D, D), scale=parameter(2)), draw(B, D))


def test_side_effects_happen_once() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.calls += 1
        m.mean = 0.9 * m.mean + x.detach().mean(0)
        return m.layer(x - m.mean)

    model = Net(forward, layer=nn.Linear(D, 2), mean=torch.zeros(D), calls=0)
    check_on(model, draw(B, D))
    assert model.calls == 4  # two engines, two forwards each


# Normalisation over the batch.


@pytest.mark.parametrize("convolution", [False, True])
def test_batch_normalisation(convolution: bool) -> None:
    if convolution:
        layers = [nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)]
        x = draw(B, 2, 3, 3)
    else:
        layers, x = [nn.Linear(D, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)], draw(B, D)
    model = nn.Sequential(*layers).double()
    check_on(model, x, batch_dims=[None])
    engine = Engine(model, batch_dim=0)
    with pytest.raises(gramjd.NotSeparableError, match=r"batch normalisation in training.*batch_dim=None"):
        engine.compute_gramian(objectives(model(x)))
    engine.close()
    check_on(model.eval(), x)


def test_running_statistics_are_updated_once() -> None:
    model, x = nn.Sequential(nn.Linear(D, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double(), draw(B, D)
    twin = nn.BatchNorm1d(3).double()
    engine = Engine(model, batch_dim=None)
    engine.compute_gramian(objectives(model(x)))
    twin(model[0](x))
    assert torch.equal(model[1].running_mean, twin.running_mean)
    assert torch.equal(model[1].running_var, twin.running_var)
    assert model[1].num_batches_tracked == 1


# The batch in another dimension.


def test_time_first_inside() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h, _ = m.recurrent(m.layer(x.transpose(0, 1)))
        return m.head(h).transpose(0, 1)

    parts = {"layer": nn.Linear(D, D), "recurrent": nn.GRU(D, 3), "head": nn.Linear(3, 2)}
    for steps in (T, B):
        check_on(Net(forward, **parts), draw(B, steps, D))


def test_hidden_states_of_layers_first() -> None:
    """``[layers, batch, features]``, used as such."""

    def forward(m: Any, x: Tensor) -> Tensor:
        _, (h, c) = m.recurrent(x)
        return m.head(h).tanh().sum(0) * c.mean(0).sum(1, keepdim=True)

    recurrent = nn.LSTM(D, 3, num_layers=2, dropout=0.3, batch_first=True, bidirectional=True)
    check_on(Net(forward, recurrent=recurrent, head=nn.Linear(3, 2)), draw(B, T, D))


def test_features_first() -> None:
    model = Net(lambda m, x: (m.w @ x.T + m.b[:, None]).T, w=parameter(2, D), b=parameter(2))
    check_on(model, draw(B, D))


EINSUMS: dict[str, Any] = {
    "operands in a list": lambda m, x: torch.einsum("bti,io->bto", [x, m.w]),
    "three operands": lambda m, x: torch.einsum("bti,io,op->btp", x, m.w, m.u),
    "samples not first": lambda m, x: torch.einsum("bti,io,btk->tbok", x, m.w, x).transpose(0, 1),
    "numbered dimensions": lambda m, x: torch.einsum(x, [0, 1, 2], m.w, [2, 3], [0, 1, 3]),
}


@pytest.mark.parametrize("name", list(EINSUMS))
def test_einsums_however_written(name: str) -> None:
    check_on(Net(EINSUMS[name], w=parameter(5, 6), u=parameter(6, 5)), draw(3, 4, 5))


def test_dropout_of_parameters_alone() -> None:
    """Positions through dropout before they meet the batch: one mask for all samples."""
    dropped = Net(lambda m, x: x + F.dropout(m.u.narrow(0, 0, 4), 0.5), u=parameter(6, 5))
    check_on(dropped, draw(3, 4, 5))


def test_parameters_written_where_nothing_reads_at_first() -> None:
    """A share of nothing passes every check, but such a use is known not to be known."""

    def forward(m: Any, x: Tensor) -> Tensor:
        h = (x * m.scale).clone()
        h[:, 0].add_(m.scale)
        return torch.where(m.reads, h, x * m.scale)

    model = Net(forward, scale=parameter(D), reads=torch.zeros(1))
    model.reads = model.reads.bool()

    def losses(m: nn.Module) -> Tensor:
        out = objectives(m(draw(B, T, D)))
        model.reads = ~model.reads
        return out

    check(model, losses, rows=["scale"])


RANDOM = {  # ops without a rule that draw random numbers when they are given a parameter
    "alpha dropout": lambda m, x: x @ F.alpha_dropout(m.w, 0.5, training=True),
    "random slopes": lambda m, x: x @ F.rrelu(m.w, training=True),
    "gumbel": lambda m, x: x @ F.gumbel_softmax(m.w),
    "attention bias": lambda m, x: F.scaled_dot_product_attention(x, x, x, m.w, dropout_p=0.5),
    "a network of parameters alone": lambda m, x: x @ m.network(m.w.sin().unsqueeze(0))[0].squeeze(0),
}


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("checks", ["first", "never"])
@pytest.mark.parametrize("batch_dim", [0, None])
@pytest.mark.filterwarnings("ignore::gramjd.SlowPathWarning")
def test_ops_that_draw_random_numbers(name: str, checks: str, batch_dim: int | None) -> None:
    """They are not called again: that would draw other numbers, and move the user's generator."""
    network = nn.LSTM(D, D, num_layers=2, dropout=0.5, batch_first=True)
    model = Net(RANDOM[name], w=parameter(D, D), network=network)
    engine = Engine(model, batch_dim=batch_dim, check=checks)
    for _ in range(2):
        losses = objectives(model(draw(B, D, D)))
        before = torch.get_rng_state()
        assert_close(engine.compute_gramian(losses), dense_gramian(losses, model.parameters()))
        assert torch.equal(before, torch.get_rng_state())


def test_what_no_sample_has_a_part_in() -> None:
    """A model that gives parameters as they are, for the loss to compare with the batch."""
    target = draw(3, 5)
    check(Net(lambda m: m.u.tanh(), u=parameter(5)), lambda m: (m() - target).square().sum(1), rows=["u"])


def test_no_positions_chosen() -> None:
    def forward(m: Any, x: Any) -> Any:
        out = x.clone()
        chosen = x[..., 0] > 1e3
        out[chosen] = x[chosen] @ m.w
        return out + m.b

    check_on(Net(forward, w=parameter(5, 5), b=parameter(5)), draw(3, 4, 5))
