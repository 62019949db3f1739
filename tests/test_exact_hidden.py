"""Samples that are mixed where the first batch does not show it: each Gramian is exact or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exactness import Net, draw, nodes, parameter
from oracle import assert_close, dense_gramian, needs_shapes
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gramjd
from gramjd import Engine


def near(h: Tensor, sharpness: float) -> Tensor:
    """Attention by distance; ``exp(-sharpness)`` is the weight of a sample's nearest one beside its own."""
    squares = (h.unsqueeze(0) - h.unsqueeze(1)).square().sum(2)
    closest = squares.detach().add(torch.eye(len(h)).double() * 1e9).min()
    return (-squares * (sharpness / closest)).softmax(1) @ h


# Functions of hidden values; ``m.gate`` is 0 in step 0, and samples meet from step 1 on.
MIXING: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "saturated attention": lambda m, h: near(h, 1 if m.step else 1e4),
    "nearly saturated attention": lambda m, h: near(h, 1 if m.step else 53),  # by 1e-23
    "attention behind a gate": lambda m, h: h + near(h, 1) * m.gate,
    "the mean behind a gate": lambda m, h: h + h.mean(0) * m.gate,
    "earlier samples behind a gate": lambda m, h: h + h.cumsum(0) * m.gate,
    "later samples behind a gate": lambda m, h: h + h.flip(0).cumsum(0).flip(0) * m.gate,
    "a neighbour behind a gate": lambda m, h: h + h.roll(1, 0) * m.gate,
    "the other half behind a gate": lambda m, h: h + h.roll(len(h) // 2, 0) * m.gate,
    "the first sample behind a gate": lambda m, h: h + h[:1] * m.gate,
    "behind a recurrent network": lambda m, h: h + m.network(h.unsqueeze(1))[0].mean(0) * m.gate,
    "behind a convolution": lambda m, h: h + m.convolution(h.T.unsqueeze(0))[0].T * m.gate,
    "a dead ReLU": lambda m, h: h + (h.mean(0) - (-9 if m.step else 9)).relu(),
    "a dead clamp": lambda m, h: h + (h.mean(0) - (0 if m.step else 9)).clamp(-3, 3),
    "the smaller one": lambda m, h: torch.minimum(h, h.mean(0) + (-9 if m.step else 9)),
    "chosen by a condition": lambda m, h: torch.where(h > (9 if m.step else -9), h, h.mean(0)),
    "masked": lambda m, h: h + h.cumsum(0).masked_fill(h < (-9 if m.step else 9), 0.0),
    "a deviation that is zero": lambda m, h: h + (h * m.gate).std(0),
    "a norm that is zero": lambda m, h: h + torch.linalg.vector_norm(h * m.gate, 3, 0),
    "distances that are zero": lambda m, h: h + torch.pdist(h * m.gate).mean(),
    "an exponent that is zero": lambda m, h: h + (h.mean(0).square() + 1) ** m.gate,
    "a product of zeros": lambda m, h: h + (h * m.gate).cumprod(0),
    "a sine of zero": lambda m, h: h + (h.mean(0) * m.gate).sinc(),
    "norms that are small enough": lambda m, h: h + torch.renorm(h, 2, 1, 0.1 if m.step else 1e9),
    "a factor that is no parameter": lambda m, h: h + h.mean(0) * m.step,
}


def model(mix: Callable[[Any, Tensor], Tensor]) -> nn.Module:
    """Of the parts that are used alone: a call with others would be checked every time."""
    parts = {"network": nn.GRU(5, 5, batch_first=True), "convolution": nn.Conv1d(5, 5, 3, padding=1)}
    used = {name: part for name, part in parts.items() if name in mix.__code__.co_names}

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.last(nn.functional.softplus(mix(m, m.first(x))) + m.gate).square().sum(1)

    found = Net(forward, first=nn.Linear(4, 5), last=nn.Linear(5, 3), gate=parameter(5), **used)
    found.step = 0
    return found


class Passes(TorchDispatchMode):
    """Counts backward passes: each has one through the ``softplus`` of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.softplus_backward.default
        return func(*args, **(kwargs or {}))


def at(step: int, mixing: nn.Module, x: Tensor) -> Tensor:
    """The losses of a step; the gate opens as an optimizer would open it."""
    mixing.step = step  # type: ignore[assignment]
    with torch.no_grad():
        mixing.gate.fill_(0.4 * step)  # type: ignore[operator, union-attr]
    return mixing(x)


@pytest.mark.parametrize("samples", [2, 3, 4, 6, 16])
@pytest.mark.parametrize("name", list(MIXING))
@pytest.mark.filterwarnings("ignore::gramjd.SlowPathWarning")
def test_mixing_that_the_first_batch_does_not_show(name: str, samples: int) -> None:
    mixing = model(MIXING[name])
    engine, exact = Engine(mixing, batch_dim=0), Engine(mixing, batch_dim=None)
    for step in (0, 1, 0, 1):
        refused = False
        losses = at(step, mixing, draw(samples, 4))
        want = dense_gramian(losses, mixing.parameters())
        try:
            assert_close(engine.compute_gramian(losses), want)
        except gramjd.NotSeparableError:
            refused = True
        assert_close(exact.compute_gramian(losses), want)
    assert refused  # in the end; a convolution that had no derivatives at first goes by rows once


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "dense": lambda a, h: a @ h,
    "torch.sparse.mm": lambda a, h: torch.sparse.mm(a.to_sparse(), h),
    "torch.sparse.addmm": lambda a, h: torch.sparse.addmm(h, a.to_sparse(), h),
    "@": lambda a, h: a.to_sparse() @ h,
    "@, compressed": lambda a, h: a.to_sparse_csr() @ h,
    "from the right": lambda a, h: (h.T @ a.T.to_sparse()).T,
    "columns": lambda a, h: torch.stack([torch.mv(a.to_sparse(), column) for column in h.unbind(1)], 1),
    "batched": lambda a, h: torch.bmm(torch.stack([a]).to_sparse(), h.unsqueeze(0))[0],
}


@pytest.mark.parametrize("name", list(PRODUCTS))
@pytest.mark.filterwarnings("ignore::gramjd.SlowPathWarning", "ignore:Sparse CSR tensor support")
def test_an_adjacency_that_links_no_graphs_in_the_first_batch(name: str) -> None:
    """Graphs of three nodes each; an edge from one to another comes with the second batch."""
    net = Net(lambda m, a, x: m.last(PRODUCTS[name](a, m.first(x)).tanh()),
              first=nn.Linear(4, 5), last=nn.Linear(5, 3))  # fmt: skip
    engine = Engine(net, batch_dim=0)
    adjacency = torch.block_diag(*draw(4, 3, 3))
    for _ in range(2):
        losses = net(adjacency, draw(12, 4)).square().sum(1).view(4, 3).sum(1)
        assert_close(engine.compute_gramian(losses), dense_gramian(losses, net.parameters()))
    adjacency[0, 4] = 1.0
    losses = net(adjacency, draw(12, 4)).square().sum(1).view(4, 3).sum(1)
    with pytest.raises(gramjd.NotSeparableError):
        engine.compute_gramian(losses)


SEPARABLE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a gate": lambda m, h: h + h.sin() * m.gate,
    "a dead ReLU": lambda m, h: h + (h - 9).relu() + m.gate,
    "chosen by a condition": lambda m, h: torch.where(h > 0, h * m.gate.exp(), m.gate),
    "a recurrent network": lambda m, h: m.network(h.unsqueeze(1).expand(-1, 3, -1))[0].sum(1) * m.gate.exp(),
    "causal attention": lambda m, h: torch.nn.functional.scaled_dot_product_attention(
        *(h.unsqueeze(-1) * m.gate.exp() for _ in range(3)), is_causal=True).squeeze(-1),
    "causal attention with heads": lambda m, h: torch.nn.functional.scaled_dot_product_attention(
        *((h * m.gate.exp())[:, None, :, None] for _ in range(3)), is_causal=True)[:, 0, :, 0],
    "samples last": lambda m, h: (m.gate.exp().unsqueeze(1) * h.T).T.contiguous(),
    "a table for all": lambda m, h: h + m.gate.sin().cumsum(0),
}  # fmt: skip


_FUSED = "ScaledDotProductFlashAttentionForCpuBackward0"


@needs_shapes
@pytest.mark.parametrize("name", list(SEPARABLE))
def test_a_structure_that_keeps_samples_apart_is_known_once_all_pairs_are_proven(name: str) -> None:
    """A known structure pays one backward pass, whatever gates and selections it has."""
    separable = model(SEPARABLE[name])
    if name == "causal attention" and _FUSED in nodes(at(0, separable, draw(6, 4))):
        pytest.skip("from torch 2.14 on a kernel for heads takes samples for heads; measured in every call")
    engine, counts = Engine(separable, batch_dim=0, audit=None), []
    for step in (0, 1, 1, 0):  # two of the four patterns that six samples need in each of the first calls
        losses = at(step, separable, draw(6, 4))
        with Passes() as passes:
            gramian = engine.compute_gramian(losses)
        counts.append(passes.count)
        assert_close(gramian, dense_gramian(losses, separable.parameters()))
    known = counts[3]  # one pass; three calls where torch computes causal attention without batches
    assert counts[0] > known and counts[1] > known and counts[2] == known <= (3 if "attention" in name else 1)


HOOKED = MIXING["attention behind a gate"]


def assert_exact_then_refused(mixing: nn.Module) -> None:
    engine = Engine(mixing, batch_dim=0)
    losses = at(0, mixing, draw(4, 4))
    assert_close(engine.compute_gramian(losses), dense_gramian(losses, mixing.parameters()))
    with pytest.raises(gramjd.NotSeparableError):
        engine.compute_gramian(at(1, mixing, draw(4, 4)))


def test_hooks_on_modules_meet_no_nan() -> None:
    """They may keep what they see; such a model is checked in every call instead."""
    mixing, seen = model(HOOKED), list[Tensor]()
    mixing.get_submodule("last").register_full_backward_hook(lambda m, gi, go: seen.append(go[0].norm()))
    assert_exact_then_refused(mixing)
    assert seen and all(bool(size.isfinite()) for size in seen)


def test_a_hook_on_a_tensor_that_refuses_nan() -> None:
    def refuse(g: Tensor) -> None:
        if g.isnan().any():
            raise ArithmeticError("NaN")

    mixing = model(lambda m, h: (h.register_hook(refuse), HOOKED(m, h))[1])
    assert_exact_then_refused(mixing)


@needs_shapes
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_under_anomaly_detection() -> None:
    with torch.autograd.detect_anomaly(check_nan=True):
        assert_exact_then_refused(model(HOOKED))
        separable = model(SEPARABLE["a dead ReLU"])
        engine = Engine(separable, batch_dim=0, audit=None)
        for count in (4, 4, 1):  # measuring, two patterns; in the first call the proof of completeness, too
            losses = at(1, separable, draw(6, 4))
            with Passes() as passes:
                engine.compute_gramian(losses)
            assert passes.count == count
        assert torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled()
