"""The Gramian of all ranks' samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gramjd.distributed import ring
from gramjd.distributed.agreement import Statement, agree
from gramjd.distributed.factors import Manifest, describe
from gramjd.distributed.ranks import Ranks
from gramjd.distributed.ring import Own
from gramjd.distributed.traffic import round_of
from gramjd.errors import RankFailedError
from gramjd.internals import inside_transform
from gramjd.jacobian.outputs import Outputs
from gramjd.plan import Options
from gramjd.pytree import PyTree

if TYPE_CHECKING:
    from gramjd.jacobian.lazy import Jacobian


def gramian(jac: Jacobian, shares: Mapping[str, Sequence[int]], options: Options, group: Any, rows: str,
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
    like = jac.parameters[0]
    ranks = Ranks.of(group, like.device)
    with torch.no_grad():
        with taking_part(group, like.device):
            _check(jac, rows)
            manifest, tensors = describe(jac.parts)
            mine = Statement(_settings(jac, shares, options, rows) | dict(settings or {}), manifest)
        manifests = [said.manifest for said in agree(ranks, mine) if said.manifest is not None]
        if not any(manifest.samples_in_all for manifest in manifests):
            raise ValueError("No rank has a sample: there is no objective.")
        own = Own(jac.parts, tensors, jac.objectives, options, like, _dtype(manifests, options, like))
        found = {}
        for name, which in shares.items():
            total = ring.rows(ranks, round_of(tuple(manifests), tuple(which)), own)
            found[name] = _as_outputs(ranks, jac.outputs, manifests, total, rows == "all")
        return found


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
    """Does it hold on all ranks?"""
    found = Ranks.of(group, condition.device).gather(condition.to(torch.uint8))
    return torch.stack(found).all()


def _check(jac: Jacobian, rows: str) -> None:
    if rows not in ("all", "local"):
        raise ValueError(f"rows must be 'all' or 'local', not {rows!r}.")
    if inside_transform():
        raise NotImplementedError(
            "gramian(group=...) sends tensors to other processes, which no function transform sees "
            "through. Call it outside of vmap, grad, vjp and jvp."
        )
    if any(out.batch_dim is None for out in jac.outputs.each):
        raise ValueError(
            "gramian(group=...) puts the samples of all ranks in one Gramian, so the outputs need a "
            "batch dimension."
        )


def _settings(jac: Jacobian, shares: Mapping[str, Sequence[int]], options: Options, rows: str
              ) -> dict[str, Any]:  # fmt: skip
    """What all ranks must have in common, by what it is called in an error."""
    pairs = zip(jac.names, jac.parameters, strict=True)
    return {
        "parameters": [f"{name} {list(p.shape)} {p.dtype}" for name, p in pairs],
        "structure of the outputs": str(jac.outputs.spec),
        "outputs of one sample": [str(out.with_samples(1)) for out in jac.outputs.each],
        "groups of parameters": [f"{name}: {list(which)}" for name, which in shares.items()],
        "accumulate_dtype": options.accumulate_dtype,
        "rows": rows,
    }


def _dtype(manifests: Sequence[Manifest], options: Options, like: Tensor) -> torch.dtype:
    """In which all ranks' products are added up."""
    dtypes = {t.dtype for manifest in manifests for t in manifest.tensors if t.dtype.is_floating_point}
    return options.accumulated(*sorted(dtypes, key=str)) if dtypes else like.dtype


def _as_outputs(ranks: Ranks, local: Outputs, manifests: Sequence[Manifest], mine: Tensor, whole: bool
                ) -> PyTree:  # fmt: skip
    """This rank's rows ``[K, B, K, ΣB]`` → the Gramian in the shapes of the outputs."""
    sizes = [manifest.samples_in_all for manifest in manifests]
    each = [out.with_samples(sum(sizes)) for out in local.each]
    everything = replace(local, each=each, samples=sum(sizes))
    if not whole:
        return local.square(mine, everything)
    padded = F.pad(mine, (0, 0, 0, 0, 0, max(sizes) - mine.shape[1]))  # gathered tensors have one shape
    rows = [x[:, :size] for x, size in zip(ranks.gather(padded), sizes, strict=True)]
    return everything.square(torch.cat(rows, 1).to(mine.device), everything)
