"""Small networks, and their neural tangent kernels by definition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev


def fcn() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def cnn() -> nn.Module:
    """An image again, at the end: an output with several axes, of different sizes."""
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, (3, 2))).double()


SHAPES = {"fcn": (5,), "cnn": (2, 6, 4)}
MODELS = {"fcn": fcn, "cnn": cnn}


def inputs(name: str, samples: int) -> Tensor:
    return torch.randn(samples, *SHAPES[name], dtype=torch.float64)


def definition(model: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
    """``[B1, *S, *reversed(S), B2]``, from dense Jacobians."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def rows(x: Tensor) -> tuple[torch.Size, Tensor]:
        found = jacrev(lambda p: functional_call(model, p, (x,)))(params)
        shape = model(x).shape
        return shape, torch.cat([found[n].reshape(shape.numel(), -1) for n in params], 1)

    (left, j1), (right, j2) = rows(x1), rows(x2)
    n = len(left)
    both = (j1 @ j2.T).detach().reshape(*left, *right)
    return both.permute([*range(n), *reversed(range(n, 2 * n))])


def less(full: Tensor, trace_axes: Sequence[int], diagonal_axes: Sequence[int]) -> Tensor:
    """A kernel less the axes that the options take away: means and diagonals, one axis after the other."""
    n = full.ndim // 2
    names = [*range(n), *reversed(range(n))]  # of the axes still there, each twice
    for axis in [a % n for a in trace_axes]:
        first, second = (i for i, name in enumerate(names) if name == axis)
        full = torch.diagonal(full, dim1=first, dim2=second).mean(-1)
        names = [name for name in names if name != axis]
    for axis in [a % n for a in diagonal_axes]:
        first, second = (i for i, name in enumerate(names) if name == axis)
        full = torch.diagonal(full, dim1=first, dim2=second).movedim(-1, first)
        del names[second]
    return full
