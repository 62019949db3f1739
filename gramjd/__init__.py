"""Gramians of Jacobians without the Jacobians: Jacobian descent for PyTorch."""

from gramjd.jacobian import Jacobian
from gramjd.rules import register_rule
from gramjd.transforms import gramian, jacobian

__all__ = ["Jacobian", "gramian", "jacobian", "register_rule"]
__version__ = "0.1.0"
