"""One step of Jacobian descent: turns a Jacobian and a weighting into gradients in ``.grad``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gramjd import distributed
from gramjd.engine.analysis.reach import Reach, reach
from gramjd.errors import NotCoveredError, NotFiniteError
from gramjd.jacobian import Jacobian, groups
from gramjd.jacobian.accumulate import accumulate
from gramjd.jacobian.lazy import Per
from gramjd.objectives import Weights, weigh

OVERFLOWED = (
    "The Gramian of the losses has NaN or infinite entries: something overflowed in the backward pass, or "
    "it divides by zero. Under a GradScaler, pass it as scaler=: it then skips the step and lowers its scale."
)

Weightings = Weights | Mapping[str, Weights]


@dataclass(frozen=True)
class Scaled:
    """An output times the scale of a ``GradScaler``; without one, as it is."""

    output: Tensor
    scale: float
    unscaled: Tensor
    skips: bool = False  # does somebody skip the step where gradients are infinite?

    @staticmethod
    def by(scaler: Any, output: Tensor) -> Scaled:
        """Scale an output, under autograd."""
        if scaler is None or not isinstance(output, Tensor):
            return Scaled(output, 1.0, output)
        with torch.enable_grad():
            scaled = scaler.scale(output)
        return Scaled(scaled, float(scaler.get_scale()), output, bool(scaler.is_enabled()))

    def attempt(
        self, step: Callable[[], Any], leaves: Callable[[], Iterable[Tensor]], per: Per = None
    ) -> Any:
        """Run ``step``; on an overflow that the scale may cause, set infinite gradients and raise nothing.

        By these ``scaler.step`` knows that it must skip the step, and ``scaler.update`` lowers the scale. The
        weights are NaN then; of groups there are none.
        """
        try:
            return step()
        except NotFiniteError:
            if not self.skips or not bool(torch.isfinite(self.unscaled.detach()).all()):
                raise
        found = list(leaves())
        accumulate(found, [torch.full_like(p, torch.inf) for p in found])
        return torch.full_like(self.unscaled.detach(), torch.nan) if per is None else {}


@dataclass(frozen=True)
class Step:
    """The request of a user for one step."""

    weighting: Weightings
    per: Per = None  # groups of parameters that get weights of their own
    flat: bool = False
    inputs: Sequence[Tensor] | None = None  # leaves that get gradients; all, if it is None
    scale: float = 1.0
    retain_graph: bool = False

    def __post_init__(self) -> None:
        if self.per is None and isinstance(self.weighting, Mapping):
            raise ValueError("Several weightings need per=..., the groups of parameters that they are for.")
        if self.per is not None and self.inputs is not None:
            raise ValueError("Choose the parameters by per= or by inputs=, not by both.")

    def take(self, jac: Jacobian | None, gramian: Any, output: Tensor, shape: Sequence[int],
             local: Callable[[Tensor], Tensor]) -> Any:  # fmt: skip
        """Add the gradients to ``.grad``; return the weights of all objectives, of this ``shape``.

        Args:
            jac: see :meth:`of_use`; without it, a backward pass runs.
            gramian: its, of each group where there are several; of all ranks.
            output: whose graph has the leaves.
            shape: of the objectives that the Gramian is of: with a process group, those of all ranks.
            local: from the weights of all objectives to those of ``output``.
        """
        if self.per is not None:
            assert jac is not None
            return self._of_groups(jac, gramian, reach([output]), shape, local)
        assert not isinstance(self.weighting, Mapping)
        weights = weigh(self.weighting, _finite(gramian), shape, flat=self.flat, scale=self.scale)
        mine = local(weights)
        if jac is not None:
            jac.backward(mine.to(jac.dtype))
        else:
            torch.autograd.backward(
                output, mine.to(output), retain_graph=self.retain_graph, inputs=self.inputs
            )
        return weights.to(output.device)

    def of_use(self, jac: Jacobian, output: Tensor) -> Jacobian | None:
        """The Jacobian of ``output`` by what the Gramian is of, if the step takes its gradients from it."""
        return jac if self.per is not None or self.by_factors(output, jac.parameters) else None

    def by_factors(self, output: Tensor, parameters: Sequence[Tensor]) -> bool:
        """Whether the Jacobian by these parameters has the gradients of all leaves, equal to autograd's."""
        found, known = reach([output]), {id(p) for p in parameters if p.is_leaf}
        if any(map(distributed.is_sharded, parameters)):  # the graph leads to gathered ones
            return self.inputs is None
        return self.inputs is None and not found.sparse and found.leaves.keys() <= known

    def _of_groups(self, jac: Jacobian, gramians: Mapping[str, Tensor], found: Reach, shape: Sequence[int],
                   local: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:  # fmt: skip
        """Each group by its own weights."""
        missing = found.leaves.keys() - {id(p) for p in jac.parameters}
        if missing and not any(map(distributed.is_sharded, jac.parameters)):
            shapes = [list(found.leaves[n].shape) for n in missing]
            raise NotCoveredError(
                f"With per=..., {len(missing)} leaf tensors of the losses' graph, of shapes {shapes[:3]}, "
                "are in no group, so they have no weights. Register their modules, too, or freeze them."
            )
        chosen = {name: self._weighting_of(name, gramians) for name in gramians}
        weights = {
            name: weigh(chosen[name], _finite(G), shape, flat=self.flat, scale=self.scale)
            for name, G in gramians.items()
        }
        for name, names in _members(jac.names, self.per).items():
            mine = jac.select(names)
            mine.backward(local(weights[name]).to(mine.device, jac.dtype))
        return weights

    def _weighting_of(self, group: str, groups: Mapping[str, Tensor]) -> Weights:
        if isinstance(self.weighting, Mapping):
            if self.weighting.keys() != groups.keys():
                raise ValueError(
                    f"There are weightings for {sorted(self.weighting)}, and groups {sorted(groups)}: give "
                    "each group one."
                )
            return self.weighting[group]
        if hasattr(self.weighting, "reset") and len(groups) > 1:
            raise ValueError(
                f"{type(self.weighting).__name__} remembers its calls, so that groups would share a memory. "
                "Pass a mapping from groups to weightings of their own."
            )
        return self.weighting


def _members(names: Sequence[str], per: Per) -> dict[str, list[str]]:
    """The names of each group's parameters."""
    assert per is not None
    return {group: [names[n] for n in which] for group, which in groups.partition(names, per).items()}


def _finite(gramian: Tensor) -> Tensor:
    if not bool(torch.isfinite(gramian).all()):
        raise NotFiniteError(OVERFLOWED)
    return gramian
