"""Meet each error of an `Engine` on purpose, print its message, and apply its remedy.

The three remedies are: say what is true (`batch_dim=None`, other losses), change the model a little (another
normalisation, checkpoints that are not reentrant), or let the function transforms do it.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gramjd
from gramjd import Engine

Case = tuple[type[Exception], Callable[[], Tensor], str, Callable[[], Tensor]]


def batch_norm(norm: nn.Module, batch_dim: int | None) -> Tensor:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), norm, nn.Linear(8, 1))
    engine = Engine(model, batch_dim=batch_dim)
    return engine.compute_gramian(model(torch.randn(6, 4)).squeeze(1))


def no_graph(keep: bool) -> Tensor:
    """`backward` frees the graph, unless it is told to keep it."""
    model = nn.Linear(4, 1)
    engine = Engine(model, batch_dim=0)
    losses = model(torch.randn(6, 4)).square().squeeze(1)
    losses.sum().backward(retain_graph=keep)
    return engine.compute_gramian(losses)


def not_covered(frozen: bool) -> Tensor:
    model = nn.Linear(4, 1).requires_grad_(not frozen)
    head = nn.Linear(1, 1)
    engine = Engine(model, batch_dim=0)
    return engine.compute_gramian(head(model(torch.randn(6, 4))).squeeze(1))


def overflow(log: Callable[[Tensor], Tensor]) -> Tensor:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    engine = Engine(model, batch_dim=0)
    return engine.compute_gramian(log(model(torch.randn(6, 4)).relu()).squeeze(1))


def checkpointed(reentrant: bool) -> Tensor:
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    engine = Engine(model, batch_dim=0)
    x = torch.randn(6, 4, requires_grad=True)
    return engine.compute_gramian(checkpoint(model, x, use_reentrant=reentrant).squeeze(1))


def gradient_penalty() -> Tensor:
    """A convolution takes part in a loss that contains a gradient of the model."""
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 1))
    engine = Engine(model, batch_dim=0)
    x = torch.randn(6, 1, 6, requires_grad=True)
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return engine.compute_gramian(slope.square().sum((1, 2)))


def gradient_penalty_as_a_function() -> Tensor:
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 1))
    function, params = gramjd.functional_loss(model)

    def penalty(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: function(params, x).sum())(x).square().sum()

    gramian: Tensor = gramjd.gramian(penalty)(params, torch.randn(6, 1, 6))
    return gramian


CASES: list[Case] = [
    (gramjd.NotSeparableError, lambda: batch_norm(nn.BatchNorm1d(8), 0),
     "batch_dim=None", lambda: batch_norm(nn.BatchNorm1d(8), None)),
    (gramjd.NotSeparableError, lambda: batch_norm(nn.BatchNorm1d(8), 0),
     "GroupNorm in place of BatchNorm1d", lambda: batch_norm(nn.GroupNorm(2, 8), 0)),
    (gramjd.NoGraphError, lambda: no_graph(False),
     "take the Gramian first, or retain_graph=True", lambda: no_graph(True)),
    (gramjd.NotCoveredError, lambda: not_covered(True),
     "unfreeze the registered modules, or register others", lambda: not_covered(False)),
    (gramjd.NotFiniteError, lambda: overflow(torch.log),
     "log(x + 1e-6)", lambda: overflow(lambda x: (x + 1e-6).log())),
    (gramjd.NotCoveredError, lambda: checkpointed(True),
     "use_reentrant=False", lambda: checkpointed(False)),
    (gramjd.SlowPathWarning, gradient_penalty,
     "a function transform", gradient_penalty_as_a_function),
]  # fmt: skip


def main() -> None:
    for kind, failing, remedy, working in CASES:
        with warnings.catch_warnings():
            warnings.simplefilter("error", gramjd.SlowPathWarning)
            try:
                failing()
            except kind as error:
                print(f"{type(error).__name__}: {error}")
            else:
                raise AssertionError(f"no {kind.__name__}")
            gramian = working()
        print(f"  Remedy: {remedy}. The Gramian has shape {list(gramian.shape)}.\n")


if __name__ == "__main__":
    main()
