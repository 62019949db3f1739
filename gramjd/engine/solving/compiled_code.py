"""Compiled code whose backward pass writes into what it saved: a second pass is wrong then, without a word.

Torch compiles such code if it may ("donated buffers"), and refuses a second pass. But code that it finds in
its cache on disk, compiled with another setting, it does not refuse.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from gramjd.errors import CheckFailedError
from gramjd.rounding import tolerance

REMEDY = (
    "Start anew with torch._functorch.config.donated_buffer = False, set before the first call of what is "
    "compiled, and with an empty cache of the compiler (another TORCHINDUCTOR_CACHE_DIR): torch may take "
    "code from it that was compiled without that setting."
)

_repeatable: weakref.WeakSet[Any] = weakref.WeakSet()  # types of nodes


def refuse_unrepeatable(compiled: Iterable[Any], output: Tensor, names: Iterable[str],
                        gradients: Callable[[Tensor], Sequence[Tensor | None]]) -> None:  # fmt: skip
    """Differentiate an output twice, if there is compiled code in its graph that is met for the first time.

    Args:
        compiled: the types of the nodes that run compiled code.
        output: a tensor.
        names: of the inputs.
        gradients: of the inputs, for a cotangent of the output.

    Raises:
        CheckFailedError: the gradients differ.
        NoGraphError: torch refuses the second pass.
    """
    new = [kind for kind in compiled if kind not in _repeatable]
    if not new:
        return
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    for name, first, second in zip(names, gradients(v), gradients(v), strict=True):
        if first is None or second is None:
            continue
        off, size = (float(each.to_dense().norm()) for each in (second - first, first))
        if off > tolerance(first.dtype) * size:
            raise CheckFailedError(_WRITES.format(name))
    _repeatable.update(new)


_WRITES = (
    "A second backward pass through compiled code gives another gradient of {!r} than the first, since it "
    "writes into what it saved. " + REMEDY
)
