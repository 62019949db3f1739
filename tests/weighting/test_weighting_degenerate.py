"""Thousands of degenerate Gramians through each solver: none may fail, each is certified."""

from collections.abc import Callable

import pytest
import torch
from gramian_cases import degenerate
from torch import Tensor

from gramjd.weighting import Certificate, cagrad, config, dualproj, fairgrad, mgda, nash_mtl, pcd, upgrad

SIZES = {1: 100, 2: 300, 3: 300, 4: 200, 6: 200, 8: 200, 12: 200, 16: 200, 24: 150, 32: 150}

Solver = Callable[[Tensor], tuple[Tensor, Certificate]]
SOLVERS: dict[str, Solver] = {
    "upgrad": lambda g: upgrad(g, certificate=True),
    "dualproj": lambda g: dualproj(g, certificate=True),
    "mgda": lambda g: mgda(g, certificate=True),
    "cagrad": lambda g: cagrad(g, 0.5, certificate=True),
    "cagrad_wide": lambda g: cagrad(g, 2.0, certificate=True),
    "nash_mtl": lambda g: nash_mtl(g, certificate=True),
    "fairgrad_2": lambda g: fairgrad(g, 2.0, certificate=True),
    "config": lambda g: config(g, certificate=True),
    "pcd": lambda g: pcd(g, certificate=True)[::2],
    "fairgrad_half": lambda g: fairgrad(g, 0.5, certificate=True),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_all_converge(name: str) -> None:
    worst, total = 0.0, 0
    for size, count in SIZES.items():
        weights, certificate = SOLVERS[name](degenerate(size, count, seed=size))
        assert weights.isfinite().all()
        assert certificate.converged.all(), (size, float(certificate.residual.max()))
        worst = max(worst, float(certificate.residual.max()))
        total += count
    assert total == 2000
    print(f"{name}: worst residual {worst:.1e}")
    assert worst < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SOLVERS)
def test_all_converge_when_rounded(name: str, dtype: torch.dtype) -> None:
    for size in (2, 5, 12):
        gramians = degenerate(size, 50, seed=100 + size).to(dtype)
        weights, certificate = SOLVERS[name](gramians)
        assert weights.dtype == dtype
        assert weights.isfinite().all()
        assert certificate.converged.all()


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize("name", SOLVERS)
def test_large_ones_converge(name: str, size: int) -> None:
    for seed in range(20):
        _, certificate = SOLVERS[name](degenerate(size, 1, seed)[0])
        assert certificate.converged
