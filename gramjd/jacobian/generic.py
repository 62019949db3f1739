"""The types of a Jacobian's outputs and parameters, for type checkers.

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
        """A Jacobian of outputs of type ``Out`` with respect to parameters of type ``In``."""

else:
    Out = In = Any

    class Typed:
        """The base class that makes ``Jacobian[Out, In]`` valid in annotations."""

        __class_getitem__ = classmethod(GenericAlias)
