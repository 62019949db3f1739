"""Families in which modes, control flow, parameters, hooks or tying change between steps."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from exactness import Net, draw
from steps import At, family
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

EVAL_FIRST = "eval", "eval", "train", "eval", "train"
MIXED = {"mixed": lambda mode: mode == "train", "why": "batch norm in training mixes samples"}


def switched(net: nn.Module, *shape: int) -> tuple[nn.Module, At]:
    """Modes by name; losses of a batch of ``shape``."""
    net.double()

    def at(mode: str) -> Tensor:
        net.train(mode == "train")
        return net(draw(*shape)).square().flatten(1).sum(1)

    return net, at


@family(*EVAL_FIRST, batch_dims=(0, None), **MIXED)
def batch_norm_by_mode() -> tuple[nn.Module, At]:
    return switched(nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)), 8, 5)


@family(*EVAL_FIRST, batch_dims=(0, None), **MIXED)
def batch_norm_of_images_by_mode() -> tuple[nn.Module, At]:
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    return switched(net, 4, 2, 4, 4)


@family(*EVAL_FIRST, batch_dims=(0, None), **MIXED)
def batch_norm_without_affine_by_mode() -> tuple[nn.Module, At]:
    return switched(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False), nn.Linear(4, 1)), 4, 5)


@family(*EVAL_FIRST)
def instance_norm_by_mode() -> tuple[nn.Module, At]:
    net = nn.Sequential(nn.Conv1d(2, 3, 3), nn.InstanceNorm1d(3, affine=True, track_running_stats=True))
    return switched(net, 4, 2, 6)


@family(*EVAL_FIRST)
def dropout_by_mode() -> tuple[nn.Module, At]:
    return switched(nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 2)), 4, 5)


@family(*EVAL_FIRST)
def feature_dropout_by_mode() -> tuple[nn.Module, At]:
    return switched(
        nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.Dropout1d(0.5), nn.Conv1d(4, 2, 1)), 4, 2, 5
    )


@family(*EVAL_FIRST)
def transformer_by_mode() -> tuple[nn.Module, At]:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True)
    return switched(nn.Sequential(nn.Linear(3, 4), layer), 4, 3, 3)


@family(*EVAL_FIRST)
def recurrent_network_by_mode() -> tuple[nn.Module, At]:
    unit = nn.LSTM(3, 4, 2, dropout=0.5, batch_first=True)
    return switched(Net(lambda m, x: m.unit(x)[0], unit=unit), 4, 3, 3)


@family(*EVAL_FIRST)
def spectral_norm_by_mode() -> tuple[nn.Module, At]:
    return switched(nn.Sequential(parametrizations.spectral_norm(nn.Linear(5, 4)), nn.Tanh()), 4, 5)


@family(*EVAL_FIRST)
def randomised_relu_by_mode() -> tuple[nn.Module, At]:
    return switched(nn.Sequential(nn.Linear(5, 4), nn.RReLU(), nn.Linear(4, 2)), 4, 5)


@family("detach", "none", "detach", "no_grad", "none")
def detach_and_no_grad() -> tuple[nn.Module, At]:
    """A target from the same weights, with or without its derivatives."""

    def forward(m: Any, x: Tensor, kind: str) -> Tensor:
        with torch.no_grad() if kind == "no_grad" else nullcontext():
            target = m.g(m.f(x).tanh())
        target = target.detach() if kind == "detach" else target
        return (m.f(x) - target).square().sum(1)

    net = Net(forward, f=nn.Linear(3, 4), g=nn.Linear(4, 4))
    return net, lambda kind: net(draw(4, 3), kind)


@family(
    "other", "own", "other", "own", mixed=lambda kind: kind == "other", why="the mean of the batch is kept"
)
def statistics_that_are_detached_or_not() -> tuple[nn.Module, At]:
    def forward(m: Any, x: Tensor, kind: str) -> Tensor:
        h = m.f(x)
        mean = h.mean(0)
        return (h - (mean if kind == "other" else mean.detach())).tanh().square().sum(1)

    net = Net(forward, f=nn.Linear(3, 4))
    return net, lambda kind: net(draw(4, 3), kind)


@family("both", "first", "second", "both", "second")
def frozen_parameters() -> tuple[nn.Module, At]:
    net = Net(lambda m, x: m.second(m.first(x).tanh()), first=nn.Linear(3, 4), second=nn.Linear(4, 2))

    def at(kind: str) -> Tensor:
        net.first.requires_grad_(kind != "second")
        net.second.requires_grad_(kind != "first")
        return net(draw(4, 3)).square().sum(1)

    return net, at


@family(False, True, False, True)
def inputs_that_require_gradients() -> tuple[nn.Module, At]:
    net = Net(lambda m, x: m.f(x).tanh().square().sum(1), f=nn.Linear(3, 4))
    return net, lambda wanted: net(draw(4, 3).requires_grad_(wanted))


@family(0, 1, 2, 3)
def parameters_replaced() -> tuple[nn.Module, At]:
    """New parameters in the place of others, in the same modules."""
    net = Net(lambda m, x: m.second(m.first(x).tanh()), first=nn.Linear(3, 4), second=nn.Linear(4, 2))

    def at(step: int) -> Tensor:
        if step % 2:
            net.first.weight = nn.Parameter(draw(4, 3))
        else:
            net.second.weight.data = draw(2, 4)
        return net(draw(4, 3)).square().sum(1)

    return net, at


@family(0, 1, 2, 3)
def layers_of_another_width() -> tuple[nn.Module, At]:
    net = Net(lambda m, x: F.linear(m.first(x).tanh(), m.second.weight), first=nn.Linear(3, 4),
              second=nn.Linear(4, 2))  # fmt: skip

    def at(step: int) -> Tensor:
        net.first.weight, net.first.bias = nn.Parameter(draw(4 + step, 3)), nn.Parameter(draw(4 + step))
        net.second.weight = nn.Parameter(draw(2, 4 + step))
        return net(draw(4, 3)).square().sum(1)

    return net, at


@family("apart", "tied", "apart", "tied transposed", "tied", batch_dims=(0, None))
def weights_tied_later() -> tuple[nn.Module, At]:
    net = Net(
        lambda m, x: m.second(m.first(x).tanh()).tanh() + x, first=nn.Linear(4, 4), second=nn.Linear(4, 4)
    )

    def at(kind: str) -> Tensor:
        first = net.first.weight
        net.second.weight = first if kind == "tied" else nn.Parameter(draw(4, 4))
        h = net(draw(4, 4))
        return (h @ first if kind == "tied transposed" else h).square().sum(1)

    return net, at


@family("none", "forward", "none", "backward", "forward", "tensor")
def hooks_added_later() -> tuple[nn.Module, At]:
    """Each keeps samples apart, and the gradients are those that the hooks make."""
    net = Net(lambda m, x: m.second(m.first(x).tanh()), first=nn.Linear(3, 4), second=nn.Linear(4, 2))
    handles: list[Any] = []

    def at(kind: str) -> Tensor:
        while handles:
            handles.pop().remove()
        first: Any = net.first
        if kind == "forward":
            handles.append(
                first.register_forward_hook(lambda m, args, out: out * 2 + F.linear(args[0], m.weight))
            )
        if kind == "backward":
            handles.append(first.register_full_backward_hook(lambda m, found, given: (found[0],)))
        x = draw(4, 3).requires_grad_(kind == "backward")
        h = first(x).tanh()
        if kind == "tensor":
            h.register_hook(lambda g: 3 * g)
        return net.second(h).square().sum(1)

    return net, at


@family("eager", "checkpoint", "eager", "saved", "checkpoint")
def checkpoints_and_saved_tensor_hooks() -> tuple[nn.Module, At]:
    net = Net(lambda m, x: m.second(m.first(x).tanh()), first=nn.Linear(3, 4), second=nn.Linear(4, 2))

    def at(kind: str) -> Tensor:
        x = draw(4, 3)
        if kind == "checkpoint":
            return checkpoint(net, x, use_reentrant=False).square().sum(1)
        keep = torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t)
        with keep if kind == "saved" else nullcontext():
            return net(x).square().sum(1)

    return net, at


@family([0, 1, 2], [2, 1, 0], [1, 0, 2], [0, 1, 2])
def indices_in_a_checkpoint() -> tuple[nn.Module, At]:
    """Samples are moved inside, where no node of the graph shows it before the backward pass."""
    net = Net(lambda m, x, s: m.second(m.first(x).tanh()[torch.tensor(s)]), first=nn.Linear(3, 4),
              second=nn.Linear(4, 2))  # fmt: skip
    return net, lambda s: checkpoint(net, draw(3, 3), s, use_reentrant=False).square().sum(1)


@family([0, 1, 2, 3], [1, 0, 3, 2], [0, 1, 2, 3], [3, 2, 1, 0])
def indices_under_saved_tensor_hooks() -> tuple[nn.Module, At]:
    net = Net(lambda m, x, s: m.second(m.first(x).tanh()[torch.tensor(s)]), first=nn.Linear(3, 4),
              second=nn.Linear(4, 2))  # fmt: skip

    def at(s: list[int]) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            return net(draw(4, 3), s).square().sum(1)

    return net, at


@family(
    "rows", "mean", "rows", "mean", mixed=lambda kind: kind == "mean", why="the module is given their mean"
)
def a_module_called_with_other_samples() -> tuple[nn.Module, At]:
    """Ops and shapes are the same: a factor of data is the identity or the mean."""
    factors = {"rows": torch.eye(4).double(), "mean": torch.full((4, 4), 0.25).double()}
    net = Net(
        lambda m, x, f: m.second((f @ m.first(x)).tanh()), first=nn.Linear(3, 4), second=nn.Linear(4, 2)
    )
    return net, lambda kind: net(draw(4, 3), factors[kind]).square().sum(1)


@family("a", "b", "a", "c", "b")
def branches_of_control_flow() -> tuple[nn.Module, At]:
    def forward(m: Any, x: Tensor, kind: str) -> Tensor:
        return {"a": lambda: m.f(x).tanh(), "b": lambda: m.g(x).tanh(), "c": lambda: m.f(x) * m.g(x)}[kind]()

    net = Net(forward, f=nn.Linear(3, 4), g=nn.Linear(3, 4))
    return net, lambda kind: net(draw(4, 3), kind).square().sum(1)


@family(True, False, True, False)
def swapped_modules() -> tuple[nn.Module, At]:
    """Two layers of equal shapes take turns in two places."""

    def forward(m: Any, x: Tensor, turn: bool) -> Tensor:
        a, b = (m.f, m.g) if turn else (m.g, m.f)
        return b(a(x).tanh().transpose(0, 1)).transpose(0, 1)

    net = Net(forward, f=nn.Linear(3, 3), g=nn.Linear(3, 3))
    return net, lambda turn: net(draw(3, 3, 3), turn).square().sum((1, 2))


@family("plain", "weight norm", "plain", "weight norm")
def a_parametrization_added_later() -> tuple[nn.Module, At]:
    net = Net(lambda m, x: m.second(m.first(x).tanh()), first=nn.Linear(3, 4), second=nn.Linear(4, 2))

    def at(kind: str) -> Tensor:
        if kind == "weight norm" and not parametrize.is_parametrized(net.second):
            parametrizations.weight_norm(net.second)
        if kind == "plain" and parametrize.is_parametrized(net.second):
            parametrize.remove_parametrizations(net.second, "weight")
        return net(draw(4, 3)).square().sum(1)

    return net, at


@family(1, 2, 1, 3, 2)
def another_number_of_micro_batches() -> tuple[nn.Module, At]:
    net = Net(lambda m, x: m.second(m.first(x).tanh()), first=nn.Linear(3, 4), second=nn.Linear(4, 2))
    return net, lambda n: torch.cat([net(x) for x in draw(6, 3).chunk(n)]).square().sum(1)


@family("token", "sequence", "token", "sequence")
def losses_by_token_or_by_sequence() -> tuple[nn.Module, At]:
    net = Net(lambda m, x: m.f(x).tanh(), f=nn.Linear(3, 4))

    def at(kind: str) -> Tensor:
        losses = net(draw(4, 3, 3)).square().sum(2)
        return losses if kind == "token" else losses.mean(1)

    return net, at
