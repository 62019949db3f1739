"""Objectives of a batch, from a model's output and its targets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """``[B, C]`` → ``[B]``."""
    return F.cross_entropy(logits, labels, reduction="none")


def token_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """``[B, T, V]`` → ``[B]``: the mean over the tokens of each sequence."""
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)


def outputs(logits: Tensor) -> Tensor:
    """The outputs themselves, as for a kernel."""
    return logits


class Several:
    """``K`` objectives of each sample: mixtures of its elementary losses ``[B, n]``."""

    def __init__(self, losses: int, objectives: int) -> None:
        self.mixture = torch.rand(losses, objectives) / losses

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        if logits.ndim == 2:  # squared distance of every output
            classes = torch.arange(logits.shape[1], device=logits.device)
            elementary = (logits - (labels[:, None] == classes).to(logits)).square()  # one_hot has no vmap
        else:
            elementary = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return elementary @ self.mixture.to(elementary)
