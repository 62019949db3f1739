"""Op rules: for an op with a parameter as one argument, the structured block of that argument."""

from gramjd.decompositions import (
    bags,  # noqa: F401
    grouped,  # noqa: F401
    recurrent,  # noqa: F401
)
from gramjd.decompositions.registry import DECOMPOSITIONS, decomposition_of, register_decomposition
from gramjd.rules import alignment, contractions, conv, einsum, elementwise, embedding, linear, norm, shape  # noqa: F401
from gramjd.rules.fallback import SEPARABLE, dense_rows, tensors_of
from gramjd.rules.registry import Call, register_rule, registered

__all__ = [
    "DECOMPOSITIONS",
    "SEPARABLE",
    "Call",
    "decomposition_of",
    "dense_rows",
    "register_decomposition",
    "register_rule",
    "registered",
    "tensors_of",
]
