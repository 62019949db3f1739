"""The lazy Jacobian: a linear operator made of blocks."""

from gramjd.contraction.accumulator import Factors, FactorsOrSum, GramianSum, Sink
from gramjd.contraction.outputs import Output
from gramjd.jacobian.lazy import Jacobian
from gramjd.jacobian.sketches import SketchSum

__all__ = ["Factors", "FactorsOrSum", "GramianSum", "Jacobian", "Output", "Sink", "SketchSum"]
