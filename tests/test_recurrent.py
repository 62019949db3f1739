"""Recurrent networks against the dense oracle, through both faces: what torch fuses is replayed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import OLD, assert_close, dense_gramian
from torch import Tensor, nn
from torch.func import functional_call

import gramjd
from gramjd import Engine, pytree
from gramjd.blocks import Outer
from gramjd.decompositions import scans

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


# The closed form of the derivatives over time, and where it gives way to a replay step by step.


class Counted:
    """Counts the layers that take the closed form."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, scan = 0, scans.scan

        def counting(*args: Any) -> Any:
            self.count += 1
            return scan(*args)

        monkeypatch.setattr(scans, "scan", counting)


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def of_one(kind: type[nn.RNNBase]) -> tuple[Any, dict[str, Tensor]]:
    """Two objectives of one sequence ``[T, 3]``, as a function of parameters; two layers, both directions."""
    network = kind(3, 4, 2, bidirectional=True).double()

    def function(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        out, _ = functional_call(network, parameters, (x[:, None],))
        return torch.stack([out.sin().sum(), out[-1].square().sum()])

    return function, {name: p.detach() for name, p in network.named_parameters()}


def rows_of(function: Any, parameters: dict[str, Tensor], xs: Tensor) -> Tensor:
    """``[B, 2, P]`` by ordinary autograd, which can be differentiated once more."""
    leaves = list(parameters.values())
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(entry, leaves, create_graph=True)])
        for x in xs
        for entry in function(parameters, x)
    ]
    return torch.stack(rows).unflatten(0, (len(xs), 2))


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own use of it
def test_transforms_take_the_closed_form_and_compose(kind: type[nn.RNNBase], closed: Counted) -> None:
    function, parameters = of_one(kind)
    xs = torch.randn(3, 5, 3, dtype=torch.float64)
    leaves = {name: p.clone().requires_grad_() for name, p in parameters.items()}
    rows = rows_of(function, leaves, xs)
    want = torch.einsum("bkp,clp->bklc", rows, rows)
    gramian = gramjd.gramian(function)
    assert_close(gramian(parameters, xs), want)
    assert closed.count == 4  # layers and directions

    gradients = torch.func.grad(lambda p: gramian(p, xs).sin().sum())(parameters)
    assert closed.count == 4  # what is differentiated once more goes step by step
    expected = torch.autograd.grad(want.sin().sum(), list(leaves.values()))
    for name, g in zip(leaves, expected, strict=True):
        assert_close(gradients[name], g)

    both = {name: torch.stack([p, 1.1 * p]) for name, p in parameters.items()}
    found = torch.vmap(lambda p: gramian(p, xs))(both)
    assert closed.count == 8
    assert_close(found[0], want)
    assert_close(found[1], gramian({name: p[1] for name, p in both.items()}, xs))

    change = {name: torch.randn_like(p) for name, p in parameters.items()}
    count = closed.count
    _, tangent = torch.func.jvp(lambda p: gramian(p, xs), (parameters,), (change,))
    assert closed.count == count  # nor has it a derivative in forward mode
    after, before = (
        gramian({name: p + step * change[name] for name, p in parameters.items()}, xs)
        for step in (1e-5, -1e-5)
    )
    assert_close(tangent, (after - before) / 2e-5, 1e-6)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("learned", [False] if OLD else [False, True])  # modes of torch 2.1 see no start[0]
def test_first_states(kind: type[nn.RNNBase], learned: bool, closed: Counted) -> None:
    """Of another network, and of parameters: these take a replay step by step, which shows their uses."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.network = nn.Linear(3, 4), kind(3, 4)
            self.start = nn.Parameter(torch.randn(2, 1, 1, 4))

        def forward(self, x: Tensor) -> Tensor:
            h = self.start[0].expand(1, x.shape[1], 4) if learned else self.encoder(x[0])[None]
            cell = self.start[1].expand(1, x.shape[1], 4) if learned else h.cos()
            out, _ = self.network(
                x, (h.contiguous(), cell.contiguous()) if kind is nn.LSTM else h.contiguous()
            )
            return torch.as_tensor(out.square().sum((0, 2)))

    torch.manual_seed(3)
    net = Net().double()
    engine = Engine(net, batch_dim=0)
    for _ in range(7):
        x = torch.randn(5, 3, 3, dtype=torch.float64)
        losses = net(x)
        want = dense_gramian(losses, net.parameters())
        assert_close(engine.compute_gramian(losses), want)
    assert (closed.count == 0) == learned
