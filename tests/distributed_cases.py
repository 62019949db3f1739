"""What the processes of ``test_distributed.py`` do, and the models that they do it with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import gramjd
from gramjd.distributed import local_weights
from gramjd.weighting import upgrad


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


def _gradients(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters()]
    model.zero_grad()
    return found


def case_step(rank: int, size: int) -> Any:
    """Gradients by autograd and by the Jacobian, of every model under DDP, in several of its modes."""
    group = dist.group.WORLD
    found = {}
    for name in MODELS:
        for options in ({}, {"find_unused_parameters": True}, {"static_graph": True}):
            model, x, y = _local(name, rank, size)
            wrapped = DistributedDataParallel(model, **options)
            if "static_graph" in options:
                losses_of(wrapped, x, y).sum().backward()
                _gradients(wrapped)
            engine = gramjd.Engine(wrapped, batch_dim=0)
            for way in ("autograd", "jacobian"):
                losses = losses_of(wrapped, x, y)
                weights = upgrad(engine.compute_gramian(losses, group=group))
                share = local_weights(weights, losses, group)
                (losses if way == "autograd" else engine.jacobian(losses)).backward(share)
                found[(name, way, *options)] = weights, _gradients(wrapped)
    return found


def case_static_graph(rank: int, size: int) -> Any:
    model, x, y = _local("mlp", rank, size)
    wrapped = DistributedDataParallel(model, static_graph=True)
    try:
        gramjd.Engine(wrapped, batch_dim=0).compute_gramian(losses_of(wrapped, x, y), group=dist.group.WORLD)
    except gramjd.GramjdError as error:
        return type(error).__name__, str(error)


class TwoHeads(nn.Module):
    """One head for the samples of even ranks, one for those of odd ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.heads = nn.Linear(4, 5), nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)])

    def forward(self, x: Tensor, rank: int) -> Tensor:
        return self.heads[rank % 2](self.trunk(x).tanh())


def two_heads() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(2)
    return TwoHeads().double(), torch.randn(8, 4, dtype=torch.float64)


def case_unused(rank: int, size: int) -> Any:
    """Parameters that some ranks do not use."""
    model, x = two_heads()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    engine, group, found = gramjd.Engine(wrapped, batch_dim=0), dist.group.WORLD, []
    for way in ("autograd", "jacobian"):
        losses = wrapped(x[2 * rank : 2 * rank + 2], rank).square().sum(1)
        weights = engine.compute_gramian(losses, group=group).sum(0)
        share = local_weights(weights, losses, group)
        (losses if way == "autograd" else engine.jacobian(losses)).backward(share)
        found.append((weights, _gradients(model)))
    return found


def case_disagreement(rank: int, size: int) -> Any:
    """What every rank raises where the last one has something else than the others, by what that is."""
    odd, group, found = rank == size - 1, dist.group.WORLD, {}

    def attempt(name: str, engine: gramjd.Engine, losses: Callable[[], Tensor], **options: Any) -> None:
        try:
            engine.compute_gramian(losses(), group=group, **options)
        except Exception as error:
            found[name] = type(error).__name__, str(error)

    model = nn.Linear(4, 3).double()
    x = torch.randn(2, 4, dtype=torch.float64)

    def losses() -> Tensor:
        return model(x).square().sum(1)

    def mixed() -> Tensor:
        return losses() - losses().mean()

    def overflowing() -> Tensor:
        return losses() * 1e200

    engine = gramjd.Engine(model, batch_dim=0)
    attempt("check", gramjd.Engine(model, batch_dim=0, check="always" if odd else "first"), losses)
    attempt("batch_dim", gramjd.Engine(model, batch_dim=-1 if odd else 0), losses)
    attempt("rows", engine, losses, rows="local" if odd else "all")
    attempt("wrong rows", engine, losses, rows="some" if odd else "all")
    attempt("objectives", engine, lambda: model(x).square() if odd else losses())
    attempt("mixed", engine, mixed if odd else losses)
    attempt("overflow", engine, overflowing if odd else losses, rows="local")
    wider = nn.Linear(4, 5 if odd else 3).double()
    attempt("shapes", gramjd.Engine(wider, batch_dim=0), lambda: wider(x).square().sum(1))
    deeper = nn.Sequential(nn.Linear(4, 3), *([nn.Linear(3, 3)] if odd else [])).double()
    attempt("names", gramjd.Engine(deeper, batch_dim=0), lambda: deeper(x).square().sum(1))
    other = nn.Linear(4, 3).to(torch.float32 if odd else torch.float64)
    attempt("dtype", gramjd.Engine(other, batch_dim=0), lambda: other(x.to(other.weight)).square().sum(1))
    attempt("empty", engine, lambda: model(x[:0]).sum(1))
    weights = torch.ones(2 * size + odd)
    try:
        local_weights(weights, losses(), group)
    except ValueError as error:
        found["weights"] = "ValueError", str(error)
    found["after"] = engine.compute_gramian(losses(), group=group)
    return found
