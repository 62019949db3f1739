"""Random orders, drawn as TorchJD draws them, so that the same seed gives the same weights."""

from __future__ import annotations

import torch
from torch import Tensor


def random_orders(matrix: Tensor, generator: torch.Generator | None, size: int) -> Tensor:
    """One random order of ``range(size)`` for each row of ``[..., m, m]``: ``[..., m, size]``."""
    device = matrix.device if generator is None else generator.device
    rows = matrix[..., 0].numel()
    orders = [torch.randperm(size, generator=generator, device=device) for _ in range(rows)]
    return torch.stack(orders).to(matrix.device).reshape(*matrix.shape[:-1], size)
