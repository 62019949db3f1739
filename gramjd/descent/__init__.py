"""Steps of Jacobian descent in one call, and Jacobians of any tensors, without an engine to keep."""

from gramjd.descent.functions import grad, grad_and_value
from gramjd.descent.jacobians import jac
from gramjd.descent.recording import record
from gramjd.descent.step import backward
from gramjd.descent.tasks import mtl_backward

__all__ = ["backward", "grad", "grad_and_value", "jac", "mtl_backward", "record"]
