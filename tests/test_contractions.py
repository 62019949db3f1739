"""Ops that contract or reduce dimensions of a parameter and the batch, in steps whose sizes collide."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from exactness import Net
from oracle import OLD, assert_close, dense_gramian
from steps import preparing
from torch import Tensor, nn
from torch.func import functional_call

import gramjd
from gramjd import Engine

pytestmark = pytest.mark.skipif(OLD, reason="the modes of torch 2.1 do not see all of these ops: rows")

Function = Callable[[Tensor, Tensor, int], Tensor]


def flat(x: Tensor, transposed: int) -> Tensor:
    """The rows of all samples, one sample after the other; transposed ones, if asked for."""
    return x.transpose(1, 1 + transposed).flatten(0, 1)


def regular(w: Tensor) -> Tensor:
    """A matrix that is not close to a singular one."""
    return w + 5 * torch.eye(4, dtype=w.dtype)


def lead(out: Tensor, dim: int) -> Tensor:
    """The output with its samples, which are in ``dim``, first."""
    return out.movedim(dim, 0)


# Functions of a parameter [4, 4], of samples [B, 4, 4] and of a setting, 0 or 1; the output begins with B.
FUNCTIONS: dict[str, Function] = {
    "tensordot": lambda w, x, s: torch.tensordot(x, w, ([2 - s], [s])),
    "tensordot of a weight": lambda w, x, s: lead(torch.tensordot(w, x, ([s], [2 - s])), 1),
    "tensordot of two dimensions": lambda w, x, s: torch.tensordot(x, w, dims=([1, 2], [s, 1 - s])),
    "tensordot of a number": lambda w, x, s: torch.tensordot(x, w, 1 + s),
    "tensordot of no dimension": lambda w, x, s: torch.tensordot(x[:, s], w[s], dims=0),
    "tensordot that sums a broadcast one": lambda w, x, s: torch.tensordot(x, w[s : s + 1], 1),
    "tensordot of an inner dimension": lambda w, x, s: torch.tensordot(x, w.reshape(2, 4, 2), ([2 - s], [1])),
    "tensordot of later samples": lambda w, x, s: lead(torch.tensordot(w, x.transpose(0, 1 + s), 1), 1 + s),
    "tensordot of flat samples": lambda w, x, s: torch.tensordot(flat(x, s), w, 1),
    "outer": lambda w, x, s: torch.outer(x[:, s, 0], w[s]),
    "outer of a weight": lambda w, x, s: torch.outer(w[s], x[:, s, 0]).T,
    "ger": lambda w, x, s: x[:, 0, s].ger(w[:, s]) + torch.ger(w[s], x[:, s, s]).T,
    "outer of flat samples": lambda w, x, s: torch.outer(x[:, s].flatten(), w[s]),
    "inner": lambda w, x, s: torch.inner(x.transpose(1, 1 + s), w),
    "inner of a weight": lambda w, x, s: lead(w.inner(x.transpose(1, 1 + s)), 1),
    "inner of a number": lambda w, x, s: torch.inner(x, w[s, 0]) + torch.inner(w[0, s], x),
    "vecdot": lambda w, x, s: torch.linalg.vecdot(x, w[s], dim=-1 - s * (w.ndim > 2)),
    "vecdot of a weight": lambda w, x, s: torch.linalg.vecdot(w, x, dim=-1 - s),
    "vecdot, broadcast": lambda w, x, s: torch.linalg.vecdot(x[:, :1], w, dim=1 + s),
    "vecdot of later samples": lambda w, x, s: lead(
        torch.linalg.vecdot(x.transpose(0, 1), w[:, None], dim=2 * s), s
    ),
    "kron": lambda w, x, s: torch.kron(x[:, s], w[s]),
    "kron of a weight": lambda w, x, s: torch.kron(w[s : s + 1], x),
    "cosine similarity": lambda w, x, s: F.cosine_similarity(x, w, dim=1 + s),
    "cosine similarity to prototypes": lambda w, x, s: F.cosine_similarity(
        (w[None], x[:, s, None])[s], (x[:, s, None], w[None])[s], dim=-1
    ),
    "cosine similarity of later samples": lambda w, x, s: lead(
        F.cosine_similarity(x.transpose(0, 1), w[:, None] if s else w[:, None, :], dim=2 * s), s
    ),
    "cosine similarity of flat samples": lambda w, x, s: F.cosine_similarity(flat(x, 0)[:, None], w, dim=2),
    "cosine similarity of chosen rows": lambda w, x, s: F.cosine_similarity(
        flat(x, 0)[s::2, None], w[None], 2
    ),
    "pairwise distance": lambda w, x, s: F.pairwise_distance(x, w, p=2 + s, keepdim=bool(s)),
    "pairwise distance to prototypes": lambda w, x, s: F.pairwise_distance(
        (w[None], x[:, s, None])[s], (x[:, s, None], w[None])[s], eps=1e-3
    ),
    "solve": lambda w, x, s: torch.linalg.solve(regular(w), x, left=bool(s)),
    "solve for a vector": lambda w, x, s: torch.linalg.solve(regular(w.cos()), x[:, s, :, None]),
    "solve by samples": lambda w, x, s: torch.linalg.solve(regular(x), w[None] if s else w[0]),
    "solve of weights": lambda w, x, s: x[:, s] @ torch.linalg.solve(regular(w), (w, w[0])[s]).sin(),
    "solve for columns": lambda w, x, s: torch.linalg.solve(regular(w), x[:, s].T).T,
    "solve for columns of flat samples": lambda w, x, s: torch.linalg.solve(regular(w), flat(x, 0).T).T,
    "solve for rows": lambda w, x, s: torch.linalg.solve(regular(w), x[:, s], left=False),
}

# Other samples of the same op, parameters made of parameters, and two of these at once.
WEIGHTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "itself": lambda w, v: w,
    "derived": lambda w, v: (w * v).T,
}
SETTINGS = [(4, 0), (4, 1), (4, 0), (3, 0), (4, 1), (2, 1), (1, 0), (4, 0), (8, 1), (4, 1), (16, 0)]


class Uses(nn.Module):
    def __init__(self, function: Function, weight: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.w, self.v = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.rand(4, 4) + 0.5)
        self.function, self.weight = function, weight
        self.double()

    def forward(self, x: Tensor, setting: int) -> Tensor:
        out = self.function(self.weight(self.w, self.v), self.first(x).tanh(), setting)
        out = out.sin().reshape(len(x), -1)
        return (out * torch.linspace(0.5, 2, out.shape[1], dtype=out.dtype)).sum(1)


def inputs(samples: int) -> Tensor:
    return torch.randn(samples, 4, 4, dtype=torch.float64)


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=list(WEIGHTS))
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=list(FUNCTIONS))
def test_steps(function: Function, weight: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Nothing is audited, and a slow path would be an error."""
    model = Uses(function, weight)
    for batch_dim in (0, None):
        with (
            preparing(at_once=True),
            Engine(model, batch_dim=batch_dim, audit=None, strategies=["ops"]) as engine,
        ):
            for samples, setting in SETTINGS:
                losses = model(inputs(samples), setting)
                assert_close(engine.compute_gramian(losses), dense_gramian(losses, model.parameters()))


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=list(WEIGHTS))
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=list(FUNCTIONS))
def test_transform(function: Function, weight: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = Uses(function, weight)
    params = {name: p.detach() for name, p in model.named_parameters()}
    for samples, setting in SETTINGS[:4]:
        x = inputs(samples)

        def per_sample(params: dict[str, Tensor], sample: Tensor, setting: int = setting) -> Tensor:
            return functional_call(model, params, (sample[None], setting))[0]

        want = dense_gramian(model(x, setting), model.parameters())
        assert_close(gramjd.gramian(per_sample)(params, x), want)


def test_blocks_of_contractions_are_factored() -> None:
    for name in ("tensordot", "tensordot of a weight", "inner", "vecdot of a weight"):
        model = Uses(FUNCTIONS[name], WEIGHTS["itself"])
        with Engine(model, batch_dim=0) as engine:
            found = engine.jacobian(model(inputs(8), 0))
        blocks = dict(zip(found.names, found.blocks, strict=True))["w"]
        assert [type(block) for block in blocks] == [gramjd.blocks.Outer], name


@pytest.mark.parametrize("sizes", [((2, 3), (4,)), ((), (4, 2)), ((2, 1, 3), (2, 2)), ((3,), (1, 2, 2))])
def test_an_engine_leaves_kronecker_products_as_they_are(sizes: tuple[tuple[int, ...], ...]) -> None:
    w, x = (torch.randn(size) for size in sizes)
    model = Net(lambda m, x: torch.kron(m.w, x), w=nn.Parameter(w)).float()
    with Engine(model, batch_dim=None):
        assert torch.equal(model(x), torch.kron(w, x))
