"""The cases: what each is, and how to make it with other sizes.

``CASES[name](**sizes)`` makes a :class:`~benchmarks.problem.Problem`; its defaults are the table's sizes.
``SMALL[name]`` are sizes for a test. Those of ``REAL`` are measured on demand alone, those of ``LARGE`` on a
GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from benchmarks.cases import images, perceptrons, real, sequences
from benchmarks.problem import Problem

CASES: dict[str, Callable[..., Problem]] = {
    "A": perceptrons.mlp,
    "B": images.grouped_cnn,
    "C": sequences.encoder,
    "D": perceptrons.kernel,
    "E": sequences.gpt2,
    "F": images.resnet,
    "G": sequences.tagger,
    "H": images.vit,
    "I": perceptrons.tasks,
    "J": perceptrons.two_losses,
}
REAL: dict[str, Callable[..., Problem]] = {
    "BERT": real.bert,
    "GPT-2": real.gpt2_small,
    "ResNet-18": real.resnet18,
    "ViT-S": real.vit_small,
}
LARGE: dict[str, Callable[..., Problem]] = {"GPT-2 medium": real.gpt2_medium}
TITLES = {
    "A": "MLP 4×1024, batch 64",
    "B": "grouped CNN, batch 64",
    "C": "transformer, 16×64 tokens",
    "D": "10-logit kernel of an MLP, batch 128",
    "E": "GPT-2, tied, 8×128 tokens",
    "F": "ResNet-18 shape, batch 32",
    "G": "LSTM tagger, 16×32 tokens",
    "H": "ViT, batch 32",
    "I": "4 tasks, shared trunk",
    "J": "2 losses a sample, batch 32",
    "BERT": "BERT-base, 8×128 tokens",
    "GPT-2": "GPT-2 small, 4×256 tokens",
    "ResNet-18": "ResNet-18, batch 64 of 64×64",
    "ViT-S": "ViT-S/16, batch 8 of 224×224",
    "GPT-2 medium": "GPT-2 medium, 4×512 tokens",
}
SMALL: dict[str, Mapping[str, int]] = {
    "A": {"batch": 4, "width": 8},
    "B": {"batch": 3},
    "C": {"batch": 3, "width": 8, "depth": 1, "length": 5, "vocabulary": 11},
    "D": {"batch": 4, "inputs": 6, "width": 5, "objectives": 3},
    "E": {"batch": 3, "width": 8, "depth": 1, "length": 5, "vocabulary": 11},
    "F": {"batch": 2, "width": 8, "size": 8},
    "G": {"batch": 3, "width": 4, "length": 5, "vocabulary": 11},
    "H": {"batch": 3, "width": 8, "depth": 1, "size": 8},
    "I": {"batch": 5, "width": 6},
    "J": {"batch": 4, "width": 6},
    "BERT": {"batch": 3, "width": 8, "depth": 1, "heads": 2, "length": 5, "vocabulary": 11},
    "GPT-2": {"batch": 3, "width": 8, "depth": 1, "heads": 2, "length": 5, "vocabulary": 11},
    "ResNet-18": {"batch": 2, "width": 4, "size": 32, "classes": 10},
    "ViT-S": {"batch": 2, "width": 8, "depth": 1, "heads": 2, "size": 8, "patch": 4, "classes": 10},
}


def make(name: str, device: str = "cpu", seed: int = 0, **sizes: int) -> Problem:
    """A case with its own random weights and data, the same for every implementation."""
    torch.manual_seed(seed)
    return {**CASES, **REAL, **LARGE}[name](**sizes).moved(torch.device(device))
