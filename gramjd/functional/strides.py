"""The input of a group norm under ``vmap``, which does not tell memory formats other than the usual one.

torch asks for the memory format that strides suggest, forward and backward. Those of a ``channels_last``
tensor with one position or one channel suggest it, although the tensor is contiguous in the usual one, too.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from math import prod
from typing import Any

import torch
from torch import Tensor

from gramjd.internals import unseen_by_modes


def with_usual_strides(args: Any, kwargs: dict[str, Any], mode: AbstractContextManager[Any]
                       ) -> tuple[Any, dict[str, Any]]:  # fmt: skip
    """The arguments of a group norm; an input whose strides are of another format is copied under a mode.

    So a copy of what the mode tracks is tracked in turn.
    """
    x = args[0] if args else kwargs["input"]
    with unseen_by_modes():  # questions, no ops of the function
        if not isinstance(x, Tensor) or not x.is_contiguous():
            return args, kwargs
        usual = x.stride() == tuple([prod(x.shape[dim + 1 :]) for dim in range(x.ndim)])
    if usual:
        return args, kwargs
    with mode:
        x = x.clone(memory_format=torch.contiguous_format)
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "input": x})
