"""The lazy Jacobian: a linear operator made of blocks."""

from gramjd.jacobian.lazy import Jacobian
from gramjd.jacobian.outputs import Output
from gramjd.jacobian.total import Sum

__all__ = ["Jacobian", "Output", "Sum"]
