"""The options that UPGrad and DualProj share: a preference, and TorchJD's projector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from gramjd.sketched import SketchedGramian
from gramjd.weighting._base import Weighting
from gramjd.weighting._options import not_negative, optional, vector


def _check_projector(name: str, value: Any) -> None:
    for eps in ("norm_eps", "reg_eps"):
        if not hasattr(value, eps):
            raise TypeError(
                f"A {name} is used for its norm_eps and reg_eps alone; {value!r} has none. Leave it "
                "out, and pass norm_eps and reg_eps instead."
            )
        not_negative(f"{name}.{eps}", getattr(value, eps))


DUAL_CONE = {
    "pref_vector": optional(vector),
    "projector": optional(_check_projector),
    "norm_eps": not_negative,
    "reg_eps": not_negative,
}


class DualConeWeighting(Weighting):
    """Keeps these options. The last assignment counts: a projector, or one of its two numbers."""

    if TYPE_CHECKING:

        def __call__(self, gramian: Tensor | SketchedGramian, /) -> Tensor: ...

    def __init__(
        self,
        pref_vector: Tensor | None = None,
        projector: Any = None,
        *,
        norm_eps: float = 1e-4,
        reg_eps: float = 1e-4,
    ) -> None:
        super().__init__()
        self.pref_vector = pref_vector
        self.norm_eps, self.reg_eps = norm_eps, reg_eps
        self.projector = projector

    @property
    def projector(self) -> Any:
        """The projector whose ``norm_eps`` and ``reg_eps`` are used, if there is one."""
        return self._projector

    @projector.setter
    def projector(self, value: Any) -> None:
        if value is None:
            self._forget_projector()
        self._projector = value

    @property
    def norm_eps(self) -> float:
        """The option ``norm_eps`` of the function; that of the projector, if there is one."""
        return self._norm_eps if self._projector is None else float(self._projector.norm_eps)

    @norm_eps.setter
    def norm_eps(self, value: float) -> None:
        self._forget_projector()
        self._norm_eps = value

    @property
    def reg_eps(self) -> float:
        """The option ``reg_eps`` of the function; that of the projector, if there is one."""
        return self._reg_eps if self._projector is None else float(self._projector.reg_eps)

    @reg_eps.setter
    def reg_eps(self, value: float) -> None:
        self._forget_projector()
        self._reg_eps = value

    _projector: Any = None

    def _forget_projector(self) -> None:
        """Forget the projector, but keep its numbers."""
        if self._projector is not None:
            self._norm_eps, self._reg_eps = self.norm_eps, self.reg_eps
            self._projector = None
