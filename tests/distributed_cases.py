"""What the processes of ``test_distributed.py`` do, and the models that they do it with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import gramjd


class TiedTransformer(nn.Module):
    """A table of tokens that is the output layer, too, positions, and one pre-norm block."""

    def __init__(self, vocabulary: int = 11, width: int = 6) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(5, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        heads = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return F.linear(x, self.tokens.weight).mT  # [B, vocabulary, T]


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, bidirectional=True, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0]).mT  # [B, 3, T]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))


def cnn() -> nn.Module:
    convs = (
        nn.Conv2d(2, 4, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(4, 6, 3, stride=2, groups=2),
        nn.GroupNorm(2, 6),
    )
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(6 * 2 * 2, 3))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "mlp": (mlp, lambda n: torch.randn(n, 4)),
    "cnn": (cnn, lambda n: torch.randn(n, 2, 6, 6)),
    "transformer": (TiedTransformer, lambda n: torch.randint(11, (n, 5))),
    "lstm": (Tagger, lambda n: torch.randn(n, 4, 3)),
}


def make(name: str, samples: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A model, inputs and targets, the same in every process."""
    torch.manual_seed(1)
    create, draw = MODELS[name]
    model, x = create().double(), draw(samples)
    x = x.double() if x.is_floating_point() else x
    with torch.no_grad():
        out = model(x)
    return model, x, torch.randint(out.shape[1], (samples, *out.shape[2:]))


def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """``[B]``."""
    found = F.cross_entropy(model(x), y, reduction="none")
    return found.flatten(1).mean(1) if found.ndim > 1 else found


def sizes_of(size: int) -> list[int]:
    """Unequal numbers of samples, one rank without any."""
    return [[5], [2, 3], [3, 0, 2], [2, 1, 0, 3]][size - 1]


def own(rank: int, size: int, *tensors: Tensor) -> list[Tensor]:
    """The rank's share of samples."""
    sizes = sizes_of(size)
    return [t[sum(sizes[:rank]) : sum(sizes[: rank + 1])] for t in tensors]


def _local(name: str, rank: int, size: int) -> tuple[nn.Module, Tensor, Tensor]:
    model, x, y = make(name, sum(sizes_of(size)))
    return model, *own(rank, size, x, y)


def case_engine(rank: int, size: int) -> Any:
    """The whole Gramian and this rank's rows, of every model."""
    group = dist.group.WORLD
    found = {}
    for name in MODELS:
        model, x, y = _local(name, rank, size)
        engine = gramjd.Engine(model, batch_dim=0)
        losses = losses_of(model, x, y)
        whole = engine.compute_gramian(losses, group=group)
        found[name] = whole, engine.compute_gramian(losses, group=group, rows="local")
    return found


def functional(model: nn.Module, x: Tensor, y: Tensor, size: int) -> gramjd.Jacobian:
    """By the transform, two outputs a sample; for a rank without samples, one stands in for them."""

    def outputs(params: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        out = torch.func.functional_call(model, params, (x[None],))[0]
        return {"loss": F.cross_entropy(out, y), "logits": out}

    params = dict(model.named_parameters())
    if len(x):
        return gramjd.jacobian(outputs)(params, x, y)
    _, some_x, some_y = make("mlp", 1)
    return gramjd.jacobian(outputs)(params, some_x, some_y).without_samples()


def case_functional(rank: int, size: int) -> Any:
    """A PyTree of outputs, shares of parameters, and micro-batches."""
    model, x, y = _local("mlp", rank, size)
    jac, group = functional(model, x, y, size), dist.group.WORLD
    halves = [functional(model, x[half], y[half], size) for half in (slice(0, 1), slice(1, None))]
    return {
        "tree": jac.gramian(group=group),
        "rows": jac.gramian(group=group, rows="local"),
        "shares": jac.gramian("parameter", group=group),
        "micro": gramjd.Jacobian.cat(halves).gramian(group=group),
    }


def case_bfloat16(rank: int, size: int) -> Any:
    """Factors travel as they are, products are added up in float32."""
    model, x, y = _local("mlp", rank, size)
    engine = gramjd.Engine(model.bfloat16(), batch_dim=0)
    return engine.compute_gramian(losses_of(model, x.bfloat16(), y), group=dist.group.WORLD)


def case_subgroup(rank: int, size: int) -> Any:
    """Of all ranks but the last."""
    group = dist.new_group(list(range(size - 1)))
    if rank == size - 1:
        return None
    model, x, y = _local("mlp", rank, size)
    engine = gramjd.Engine(model, batch_dim=0)
    return engine.compute_gramian(losses_of(model, x, y), group=group)
