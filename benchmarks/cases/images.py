"""Cases of images: B, F and H."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases.objectives import cross_entropy
from benchmarks.cases.transformer import Block
from benchmarks.problem import Problem


def _classified(model: nn.Module, batch: int, size: int = 32) -> Problem:
    """Ten classes of colour images."""
    return Problem(
        model, (torch.randn(batch, 3, size, size),), (torch.randint(0, 10, (batch,)),), cross_entropy
    )


def grouped_cnn(batch: int = 64) -> Problem:
    """B: the CNN of TorchJD's own benchmarks, most of whose convolutions have groups."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(),
        nn.Conv2d(32, 64, 3, groups=32), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(64, 64, 3, groups=64), nn.MaxPool2d(3), nn.ReLU(), nn.Flatten(),
        nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip
    return _classified(model, batch)


class Residual(nn.Module):
    """A basic block (He et al., arXiv 1512.03385) with group normalisation."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.GroupNorm(8, channels), nn.GroupNorm(8, channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != channels:
            conv = nn.Conv2d(inputs, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.GroupNorm(8, channels))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(h + self.shortcut(x))


def resnet(batch: int = 32, width: int = 32, size: int = 32) -> Problem:
    """F: four stages of two blocks."""
    blocks: list[nn.Module] = []
    channels = width
    for stage in range(4):
        for number in range(2):
            wider = width * 2**stage
            blocks.append(Residual(channels, wider, 2 if stage and not number else 1))
            channels = wider
    stem = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.GroupNorm(8, width), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]
    return _classified(nn.Sequential(*stem, *blocks, *head), batch, size)


class VisionTransformer(nn.Module):
    """Patches, a class token and positions as parameters (Dosovitskiy et al., arXiv 2010.11929)."""

    def __init__(self, width: int, depth: int, size: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (size // 4) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(h), -1, -1), h], 1) + self.positions
        return self.head(self.norm(self.blocks(h))[:, 0])


def vit(batch: int = 32, width: int = 128, depth: int = 4, size: int = 32) -> Problem:
    """H: patches of 4×4."""
    return _classified(VisionTransformer(width, depth, size), batch, size)
