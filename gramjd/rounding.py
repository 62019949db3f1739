"""How far two computations of the same number may differ."""

from __future__ import annotations

import torch


def tolerance(dtype: torch.dtype) -> float:
    """Of two orders of adding up, relative to the norm of the result."""
    return min(10 * torch.finfo(dtype).eps ** (2 / 3), 0.02)
