"""Op rules: for an op with a parameter as one argument, the structured block of that argument."""

from gramjd.rules import bags, conv, einsum, elementwise, embedding, linear, norm, recurrent, shape  # noqa: F401
from gramjd.rules.decompositions import decomposition_of, is_fused, register_decomposition
from gramjd.rules.fallback import dense_rows, tensors_of
from gramjd.rules.registry import Call, register_rule, registered

__all__ = [
    "Call",
    "decomposition_of",
    "dense_rows",
    "is_fused",
    "register_decomposition",
    "register_rule",
    "registered",
    "tensors_of",
]
