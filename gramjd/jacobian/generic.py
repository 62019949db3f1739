"""What type checkers know of a Jacobian: of which type its outputs are, and its parameters.

At run time there is nothing: a base class whose subscripts mean nothing. The defaults of the type
variables need ``typing_extensions``, which is thus read by type checkers alone.
"""

from __future__ import annotations

from types import GenericAlias
from typing import TYPE_CHECKING, Any, Generic

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import TypeVar

    Out = TypeVar("Out", default=Tensor)  # a tensor, or a PyTree of them
    In = TypeVar("In", default=Any)  # the PyTree of parameters

    class Typed(Generic[Out, In]):
        """Of outputs of type ``Out`` and parameters of type ``In``."""

else:
    Out = In = Any

    class Typed:
        """``Jacobian[Out, In]``, for annotations."""

        __class_getitem__ = classmethod(GenericAlias)
