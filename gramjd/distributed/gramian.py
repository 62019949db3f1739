"""The Gramian of all ranks' samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gramjd.complexes import as_real
from gramjd.contraction import Options, default_budget
from gramjd.contraction.outputs import Output, Outputs
from gramjd.distributed import ring, slices
from gramjd.distributed.agreement import Statement, agree
from gramjd.distributed.factors import Manifest, describe
from gramjd.distributed.ranks import Ranks
from gramjd.distributed.ring import Own
from gramjd.distributed.traffic import Plan, Problem, plan_of
from gramjd.errors import RankFailedError
from gramjd.internals import inside_transform
from gramjd.pytree import PyTree

if TYPE_CHECKING:
    from gramjd.jacobian.lazy import Jacobian


def gramian(jac: Jacobian[Any], shares: Mapping[str, Sequence[int]], options: Options, group: Any, rows: str,
            settings: Mapping[str, Any] | None = None) -> dict[str, PyTree]:  # fmt: skip
    """The shares of groups of parameters in the Gramian of all ranks' samples.

    Args:
        jac: of this rank's samples.
        shares: positions of the parameters of each group.
        options: of the contractions.
        group: the process group.
        rows: ``"all"``, or ``"local"`` for those of this rank's samples.
        settings: what else ranks must agree about.

    Raises:
        RanksDisagreeError: ranks have different models or settings.
        RankFailedError: another rank cannot take part.
    """
    like = as_real(jac.parameters[0])
    ranks = Ranks.of(group, like.device)
    with torch.no_grad():
        with taking_part(group, like.device):
            _check(jac, rows)
            manifest, tensors = describe(jac.intact)
            budget = _budget(options, like)
            mine = Statement(_settings(jac, shares, options, rows) | dict(settings or {}), manifest, budget)
        said = agree(ranks, mine)
        manifests = tuple(s.manifest for s in said if s.manifest is not None)
        if not any(manifest.samples_in_all for manifest in manifests):
            raise ValueError("No rank has a sample: there is no objective.")
        dtype = _dtype(manifests, options, like)
        own = Own(jac.parts, tensors, jac.objectives, options, like, dtype)
        budget = min(s.budget for s in said) // dtype.itemsize
        problem = Problem(manifests, jac.objectives, dtype.itemsize, budget, _is_summed(jac), rows == "all")
        found = {}
        for name, which in shares.items():
            plan = plan_of(problem, tuple(which))
            compute = _of_sums if problem.summed else _of_samples
            found[name] = compute(ranks, problem, plan, own, jac.outputs)
        return found


def _of_samples(ranks: Ranks, problem: Problem, plan: Plan, own: Own, local: Outputs) -> PyTree:
    """The Gramian, or this rank's rows of it, of objectives that each rank has for samples of its own."""
    sizes = problem.samples
    shares = []
    if plan.round.which or not plan.messages:
        shares.append(ring.rows(ranks, plan.round, own))
    if plan.messages:
        mine = slices.share(ranks, plan.messages, own, sizes, summed=False)
        shares.append(slices.add_up(ranks, mine, own, sizes))
    rows = sum(shares[1:], shares[0])  # [K, B, K, ΣB]
    each = [out.with_samples(sum(sizes)) for out in local.each]
    everything = replace(local, each=each, samples=sum(sizes))
    if not problem.whole:
        return local.square(rows, everything)
    padded = F.pad(rows, (0, 0, 0, 0, 0, max(sizes) - rows.shape[1]))  # gathered tensors have one shape
    strips = [x[:, :size] for x, size in zip(ranks.gather(padded), sizes, strict=True)]
    return everything.square(torch.cat(strips, 1).to(rows.device), everything)


def _of_sums(ranks: Ranks, problem: Problem, plan: Plan, own: Own, outputs: Outputs) -> PyTree:
    """The Gramian of objectives of which each rank has a share."""
    K = own.objectives
    mine = torch.zeros(K, K, dtype=own.dtype, device=own.like.device)
    if plan.round.which:
        mine += ring.total(ranks, plan.round, own).view(K, K)
    if plan.messages:
        mine += slices.share(ranks, plan.messages, own, problem.samples, summed=True)
    first, *others = ranks.gather(mine)
    for other in others:  # in order: the same on every rank, and in every run
        first += other
    return outputs.square(first.view(K, 1, K, 1).to(mine.device), outputs)


@contextmanager
def taking_part(group: Any, device: torch.device) -> Iterator[None]:
    """A context before the ranks agree: where it raises, the others learn it, and need not wait."""
    try:
        yield
    except Exception as error:
        ranks = Ranks.of(group, device)
        with suppress(RankFailedError):
            agree(ranks, Statement({}, error=f"{type(error).__name__}: {error}"))
        raise


def everywhere(group: Any, condition: Tensor) -> Tensor:
    """Whether a condition holds on all ranks."""
    found = Ranks.of(group, condition.device).gather(condition.to(torch.uint8))
    return torch.stack(found).all()


def refuse_rows(rows: str) -> None:
    """Raise for ``rows`` without a group: one process has all of them."""
    if rows != "all":
        raise ValueError(
            f"rows={rows!r} needs group=...: without one, all rows are of this process's samples. Leave it "
            "out, or pass the process group."
        )


def _check(jac: Jacobian[Any], rows: str) -> None:
    if rows not in ("all", "local"):
        raise ValueError(f"rows must be 'all' or 'local', not {rows!r}.")
    if inside_transform():
        raise NotImplementedError(
            "gramian(group=...) sends tensors to other processes, which no function transform sees "
            "through. Call it outside of vmap, grad, vjp and jvp."
        )
    batched = [out.batch_dim is not None for out in jac.outputs.each]
    if any(batched) and not all(batched):
        raise ValueError(
            "With a group, either all outputs have a batch dimension, or none: then each rank has a share of "
            "objectives that are sums over ranks. Take one Gramian for each kind."
        )
    if rows == "local" and not any(batched):
        raise ValueError(
            "rows='local' are those of a rank's own samples, and objectives without a batch dimension are "
            "sums over all ranks. Leave rows out."
        )


def _settings(jac: Jacobian[Any], shares: Mapping[str, Sequence[int]], options: Options, rows: str
              ) -> dict[str, Any]:  # fmt: skip
    """The settings that all ranks must share, by their names in an error."""
    pairs = zip(jac.names, jac.parameters, strict=True)
    return {
        "parameters": [f"{name} {list(p.shape)} {p.dtype}" for name, p in pairs],
        "structure of the outputs": str(jac.outputs.spec),
        "outputs of one sample": [str(_of_one(out)) for out in jac.outputs.each],
        "groups of parameters": [f"{name}: {list(which)}" for name, which in shares.items()],
        "accumulate_dtype": options.accumulate_dtype,
        "rows": rows,
    }


def _of_one(out: Output) -> Output:
    return out if out.batch_dim is None else out.with_samples(1)


def _dtype(manifests: Sequence[Manifest], options: Options, like: Tensor) -> torch.dtype:
    """The dtype in which all ranks add up products."""
    dtypes = {t.dtype for manifest in manifests for t in manifest.tensors if t.dtype.is_floating_point}
    return options.accumulated(*sorted(dtypes, key=str)) if dtypes else like.dtype


def _is_summed(jac: Jacobian[Any]) -> bool:
    """Whether the objectives are sums over ranks, because they have no batch dimension."""
    return any(out.batch_dim is None for out in jac.outputs.each)


def _budget(options: Options, like: Tensor) -> int:
    """Bytes of a message: a power of two, so that ranks with about the same free memory say the same."""
    return 2 ** ((options.memory_budget or default_budget(like.device)).bit_length() - 1)
