"""Recurrent networks against the dense oracle, through both faces: what torch fuses is replayed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import assert_close, dense_gramian
from torch import Tensor, nn
from torch.func import functional_call

import gramjd
from gramjd import Engine, pytree
from gramjd.blocks import Outer

OPTIONS: list[dict[str, Any]] = [
    {},
    {"bidirectional": True, "num_layers": 2, "batch_first": True},
    {"bias": False, "num_layers": 2, "batch_first": True},
]
NETWORKS = [(kind, kw) for kind in (nn.RNN, nn.GRU, nn.LSTM) for kw in OPTIONS]
NETWORKS += [
    (nn.RNN, {"nonlinearity": "relu"}),
    (nn.LSTM, {"proj_size": 2, "num_layers": 2, "bidirectional": True}),
    (nn.LSTM, {"proj_size": 2, "bias": False}),
]
CELLS = [nn.RNNCell, nn.GRUCell, nn.LSTMCell]


def state_of(network: nn.Module, out: Any) -> Tensor:
    """Something of the last state of every layer, ``[B]``."""
    last = torch.cat(out[1], -1) if isinstance(out[1], tuple) else out[1]
    return last.cos().sum((0, 2))


def objectives(network: nn.RNNBase, x: Tensor, hx: Any = None, several: bool = True) -> Tensor:
    """``[B]``, or ``[B, 2]`` from all outputs and from the last state."""
    out = network(x, hx)
    time = 1 if network.batch_first else 0
    scale = torch.linspace(1, 2, out[0].shape[2], dtype=x.dtype)
    found = [(out[0] * scale).sin().sum((time, 2)), state_of(network, out)]
    return torch.stack(found, 1) if several else found[0] + found[1]


def draw(network: nn.RNNBase, samples: int, steps: int = 7) -> Tensor:
    shape = (samples, steps, 3) if network.batch_first else (steps, samples, 3)
    return torch.randn(shape, dtype=torch.float64)


def check(network: nn.Module, loss: Any, *args: Any) -> None:
    """With a batch dimension and without, measured first and then from what is known."""
    torch.manual_seed(1)
    want = dense_gramian(loss(network, *args), network.parameters())
    for batch_dim in (0, None):
        engine = Engine(network, batch_dim=batch_dim, strategies=["ops"])
        for _ in range(2):
            torch.manual_seed(1)
            got = engine.jacobian(loss(network, *args))
            assert_close(got.gramian(), want)
            for blocks, parameter in zip(got.blocks, got.parameters, strict=True):
                assert parameter.ndim == 1 or {type(block) for block in blocks} == {Outer}
        engine.close()


def state(network: nn.RNNBase, samples: int) -> Any:
    """Hidden states of every layer, ``[layers, B, h]``; of an LSTM, cells as well."""
    layers = network.num_layers * (2 if network.bidirectional else 1)
    h = torch.randn(layers, samples, network.proj_size or network.hidden_size, dtype=torch.float64)
    cells = torch.randn(layers, samples, network.hidden_size, dtype=torch.float64)
    return (h, cells) if isinstance(network, nn.LSTM) else h


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
@pytest.mark.parametrize("given", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize(("kind", "kw"), NETWORKS)
def test_networks(kind: type[nn.RNNBase], kw: dict[str, Any], given: bool, several: bool) -> None:
    network = kind(3, 4, **kw).double()
    x, hx = draw(network, 5), state(network, 5) if given else None

    def loss(network: nn.Module, x: Tensor, hx: Any = None) -> Tensor:
        return objectives(network, x, hx, several)  # type: ignore[arg-type]

    check(network, loss, x, hx)
    want = dense_gramian(loss(network, x, hx), network.parameters())

    class Losses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor, hx: Any = None) -> Tensor:
            return loss(network, x, hx)

    def per_sample(params: dict[str, Tensor], x: Tensor, hx: Any = None) -> Tensor:
        batched = x.unsqueeze(0 if network.batch_first else 1)
        states = pytree.map(lambda h: h.unsqueeze(1), hx) if given else None
        return functional_call(Losses(), params, (batched, states))[0]  # type: ignore[no-any-return]

    params = {f"network.{name}": p.detach() for name, p in network.named_parameters()}
    in_dims = 0 if network.batch_first else 1
    got = gramjd.gramian(per_sample, in_dims=(None, in_dims, 1) if given else in_dims)
    assert_close(got(params, x, *([hx] if given else [])), want)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_sequence_without_a_batch_dimension(kind: type[nn.RNNBase]) -> None:
    """What a per-sample function is given, as it is."""
    network, x = kind(3, 4, 2).double(), torch.randn(5, 7, 3, dtype=torch.float64)
    params = {name: p.detach() for name, p in network.named_parameters()}
    got = gramjd.gramian(lambda p, x: functional_call(network, p, (x,))[0].sin().sum())(params, x)
    want = torch.stack([network(sample)[0].sin().sum() for sample in x])
    assert_close(got, dense_gramian(want, network.parameters()))


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_states_in_and_the_size_of_the_batch(kind: type[nn.RNNBase]) -> None:
    """States that are parameters themselves, layers in a row, and as many steps as samples."""

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.start = kind(3, 4), kind(4, 4), nn.Parameter(torch.randn(1, 1, 4))

        def forward(self, x: Tensor) -> Tensor:
            h = self.start.expand(1, x.shape[1], 4).contiguous()
            out, _ = self.first(x, (h, h.sin()) if kind is nn.LSTM else h)
            out, last = self.second(out.relu(), (h, h) if kind is nn.LSTM else h)
            return out.sin().sum((0, 2)) + state_of(self.second, (out, last))

    model = Stack().double()
    for steps, samples in ((4, 4), (6, 3), (6, 2)):
        x = torch.randn(steps, samples, 3, dtype=torch.float64)
        want = dense_gramian(model(x), model.parameters())
        assert_close(Engine(model, batch_dim=0, strategies=["ops"]).compute_gramian(model(x)), want)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_dropout_between_layers(kind: type[nn.RNNBase]) -> None:
    """The replay draws the numbers of the forward that ran, and leaves the generator alone."""
    network = kind(3, 4, num_layers=3, dropout=0.5).double()
    check(network, objectives, draw(network, 5))
    engine = Engine(network, batch_dim=0)
    loss = objectives(network, draw(network, 5))
    torch.rand(3)
    before = torch.get_rng_state()
    assert_close(engine.compute_gramian(loss), dense_gramian(loss, network.parameters()))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_packed_sequences(kind: type[nn.RNNBase]) -> None:
    network = kind(3, 4, num_layers=2, bidirectional=True, dropout=0.3).double()
    lengths = [6, 4, 4, 2, 1]
    packed = nn.utils.rnn.pack_sequence([torch.randn(n, 3, dtype=torch.float64) for n in lengths])

    def loss(network: nn.Module, packed: Any) -> Tensor:
        out = network(packed)
        padded, _ = nn.utils.rnn.pad_packed_sequence(out[0])
        return padded.sin().sum((0, 2)) + state_of(network, out)

    check(network, loss, packed)


def test_packed_sequences_that_are_not_sorted() -> None:
    """Packing moves the samples to other places, which their weights tell."""
    network = nn.GRU(3, 4).double()
    sequences = [torch.randn(n, 3, dtype=torch.float64) for n in (2, 5, 3)]

    def loss(network: nn.Module) -> Tensor:
        out, _ = network(nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False))
        return nn.utils.rnn.pad_packed_sequence(out)[0].sin().sum((0, 2))

    for batch_dim in (0, None):
        engine = Engine(network, batch_dim=batch_dim, strategies=["ops"])
        got = engine.compute_gramian(loss(network))
        assert_close(got, dense_gramian(loss(network), network.parameters()))
        engine.close()


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("bias", [True, False])
def test_cells(kind: type[nn.RNNCellBase], bias: bool) -> None:
    """One cell in a loop of the user's own."""

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = kind(3, 4, bias=bias)

        def forward(self, x: Tensor) -> Tensor:
            state, out = None, []
            for x_t in x.unbind(1):
                state = self.cell(x_t, state)
                out.append(torch.cat(state, 1) if isinstance(state, tuple) else state)
            return torch.stack(out, 1).sin().sum((1, 2))

    model, x = Loop().double(), torch.randn(5, 4, 3, dtype=torch.float64)
    check(model, lambda m, x: m(x), x)
    params = {name: p.detach() for name, p in model.named_parameters()}
    got = gramjd.gramian(lambda p, x: functional_call(model, p, (x[None],))[0])(params, x)
    assert_close(got, dense_gramian(model(x), model.parameters()))


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_a_float32_island_behind_a_network(kind: type[nn.RNNBase]) -> None:
    """Its rounding, of what a replay is given, is measured: far above float64's, and no mixing."""
    network = kind(3, 4, batch_first=True).double()
    engine, x = Engine(network, batch_dim=0, strategies=["ops"]), torch.randn(5, 3, 3, dtype=torch.float64)
    for _ in range(2):
        h = network(x)[0].float()
        losses = (h / h.norm(dim=-1, keepdim=True)).double().sin().sum((1, 2))
        assert_close(engine.compute_gramian(losses), dense_gramian(losses, network.parameters()), 1e-6)
