"""Every differentiable op of torch's own test database, with its sample inputs: no Gramian is wrong.

Each float argument of an op is a parameter, or a parameter times a number of each sample. The numbers and the
batch size change in each step. What ``vmap`` refuses, the transforms may refuse; an engine takes all ops.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree

import gramjd
from gramjd import Engine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db

pytestmark = pytest.mark.filterwarnings("ignore")

SAMPLES = 4  # inputs of each op
STEPS = (3, 3, 4)  # batch sizes
LARGEST = 3000  # entries of all arguments


@dataclass(frozen=True)
class Case:
    """An op with all of its arguments."""

    op: Callable[..., Any]
    leaves: list[Any]  # of (input, args, kwargs)
    spec: Any
    where: list[int]  # the leaves that are floats

    @property
    def tensors(self) -> list[Tensor]:
        return [self.leaves[i].detach() for i in self.where]

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The results that have derivatives, as real tensors."""
        leaves = list(self.leaves)
        for i, t in zip(self.where, tensors, strict=True):
            leaves[i] = t
        given, args, kwargs = _pytree.tree_unflatten(leaves, self.spec)
        found, _ = _pytree.tree_flatten(self.op(given, *args, **kwargs))
        outs = [t for t in found if isinstance(t, Tensor) and (t.is_floating_point() or t.is_complex())]
        return [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in outs]

    def loss(self, tensors: Sequence[Tensor]) -> Tensor:
        return sum([(t * weights(t)).sum() for t in self(tensors)], torch.zeros((), dtype=torch.float64))

    def losses(self, tensors: Sequence[Tensor], samples: int) -> Tensor:
        """Of all samples at once, for tensors some of which have a batch dimension."""
        outs = self(tensors)
        if {t.shape[:1] for t in outs} != {(samples,)}:
            raise ValueError("no batch dimension")
        found = [(t * weights(t[0])).flatten(1).sum(1) if t.ndim > 1 else t for t in outs]
        return torch.stack(found).sum(0)


def weights(t: Tensor) -> Tensor:
    return torch.cos(1.3 * torch.arange(t.numel(), dtype=torch.float64)).view(t.shape)


def cases(op: Any) -> Iterator[Case]:
    torch.manual_seed(0)
    samples = list(op.sample_inputs("cpu", torch.float64, requires_grad=True))
    for sample in samples[:: max(1, len(samples) // SAMPLES)][: SAMPLES + 1]:
        leaves, spec = _pytree.tree_flatten((sample.input, sample.args, sample.kwargs))
        where = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.requires_grad]
        tensors = [leaves[i] for i in where]
        sizes = [t.numel() for t in tensors]
        ordinary = all(t.layout is torch.strided and t.dtype == torch.float64 for t in tensors)
        if tensors and ordinary and 0 not in sizes and sum(sizes) <= LARGEST:
            leaves = [t.detach() if isinstance(t, Tensor) else t for t in leaves]
            yield Case(op, leaves, spec, where)


class Model(nn.Module):
    """One argument is a parameter, the others are times a number of each sample; or all are parameters so."""

    def __init__(self, case: Case, bare: int | None, batched: bool) -> None:
        super().__init__()
        self.case, self.bare, self.batched = case, bare, batched
        self.arguments = nn.ParameterList([nn.Parameter(t.clone()) for t in case.tensors])
        if bare is not None:
            for n, p in enumerate(self.arguments):
                p.requires_grad_(n == bare)

    def forward(self, noise: Tensor) -> Tensor:
        if self.batched:
            each = [
                p if n == self.bare else p * (1 + 0.05 * noise[:, n]).view(-1, *[1] * p.ndim)
                for n, p in enumerate(self.arguments)
            ]
            return self.case.losses(each, len(noise))
        return torch.stack([self.case.loss(scaled(list(self.arguments), self.bare, x)) for x in noise])


def trained(model: Model) -> list[Tensor]:
    return [p for p in model.arguments if p.requires_grad]


def scaled(tensors: Sequence[Tensor], bare: int | None, noise: Tensor) -> list[Tensor]:
    return [t if n == bare else t * (1 + 0.05 * noise[n]) for n, t in enumerate(tensors)]


def rows(losses: Sequence[Tensor], parameters: Sequence[Tensor]) -> Tensor | None:
    """The dense Jacobian by ordinary autograd; ``None`` where there is none that is finite."""
    found = []
    for loss in losses:
        if not loss.requires_grad:
            return None
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        pairs = zip(grads, parameters, strict=True)
        dense = [torch.zeros_like(p) if g is None else g.to_dense() for g, p in pairs]
        found.append(torch.cat([g.flatten() for g in dense]))
    J = torch.stack(found)
    return J if bool(J.isfinite().all()) else None


def assert_right(got: Tensor, J: Tensor, what: str) -> None:
    want = J @ J.T
    error = float((got - want).norm())
    assert error <= 1e-6 * float(want.norm()) + 1e-18, f"{what}: {error:.1e} of {float(want.norm()):.1e}"


def noises(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(samples, count, generator=generator, dtype=torch.float64) for samples in STEPS]


def runs_by_itself(case: Case, bare: int | None, batched: bool, noise: Tensor) -> bool:
    """Whether the op takes these arguments without an engine, and no sample of a batch depends on others."""
    models = [Model(case, bare, False), *[Model(case, bare, True)] * batched]
    try:
        losses = [model(noise) for model in models]
        found = [rows(list(each), trained(model)) for each, model in zip(losses, models, strict=True)]
    except Exception:
        return False
    if any(J is None for J in found) or not bool(losses[0].isfinite().all()):
        return False
    return torch.allclose(losses[0], losses[-1]) and torch.allclose(found[0], found[-1])


def check_engine(case: Case, bare: int | None, batched: bool) -> None:
    model = Model(case, bare, batched)
    with Engine(model, batch_dim=0) as engine:
        for step, noise in enumerate(noises(len(model.arguments))):
            if not runs_by_itself(case, bare, batched, noise):
                return
            losses = model(noise)
            J = rows(list(losses), trained(model))
            assert J is not None
            try:
                got = engine.compute_gramian(losses)
            except gramjd.NotSeparableError:
                if batched:
                    raise
                return  # a loop over samples of no dimension at all
            assert_right(got, J, f"engine, argument {bare}, batched {batched}, step {step}")


def check_transform(case: Case, bare: int | None) -> None:
    def loss(params: dict[str, Tensor], noise: Tensor) -> Tensor:
        tensors = [params.get(str(n), t) for n, t in enumerate(case.tensors)]
        return case.loss(scaled(tensors, bare, noise))

    def plain(params: dict[str, Tensor], noise: Tensor) -> tuple[Tensor, Tensor]:
        found, values = torch.vmap(torch.func.grad_and_value(loss), in_dims=(None, 0))(params, noise)
        return torch.cat([g.flatten(1) for g in found.values()], 1), values

    transform = gramjd.gramian_and_value(loss)
    for step, noise in enumerate(noises(len(case.where))):
        params = {str(n): t.clone() for n, t in enumerate(case.tensors) if bare is None or n == bare}
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        try:
            losses = [loss(leaves, x) for x in noise]
            again = [loss(params, x) for x in noise]
            J = rows(losses, list(leaves.values()))
        except Exception:
            return
        if J is None or not torch.allclose(torch.stack(losses), torch.stack(again)):  # random numbers
            return
        try:
            got, values = transform(params, noise)
        except Exception as error:
            right = False
            with contextlib.suppress(Exception):
                found, values = plain(params, noise)
                right = torch.allclose(found, J) and torch.allclose(values, torch.stack(losses))
            if right and "in place" not in str(error):
                raise
            return
        assert torch.allclose(values, torch.stack(losses)), f"values, argument {bare}, step {step}"
        assert_right(got, J, f"transform, argument {bare}, step {step}")


OPS = {
    op.formatted_name: op for op in op_db if op.supports_autograd and op.supports_dtype(torch.float64, "cpu")
}


@pytest.mark.parametrize("name", OPS)
def test_no_gramian_is_wrong(name: str) -> None:
    for case in cases(OPS[name]):
        count = len(case.where)
        for bare in (None, *range(min(3, count))):
            torch.manual_seed(1)
            check_transform(case, bare)
            check_engine(case, bare, batched=False)
            if bare is not None:
                check_engine(case, bare, batched=True)
