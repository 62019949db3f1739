"""What every block can do, against rows written out."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracle import assert_close
from torch import Tensor

from gramjd.blocks import Block, Conv, Dense, Lookup, Outer, merge, spread, transpose

V, D, K, B = 6, 4, 2, 3


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def blocks() -> dict[str, Block]:
    """Blocks of one parameter ``[V, D]``."""
    return {
        "outer": Outer(randn(K, B, 5, 1, V), randn(B, 5, 1, D), (V, D)),
        "outer one position": Outer(randn(K, B, 1, 1, V), randn(B, 1, 1, D), (V, D)),
        "transposed": Outer(randn(K, B, 2, 1, D), randn(B, 2, 1, V), (V, D), transposed=True),
        "grouped": Outer(randn(K, B, 3, 2, V // 2), randn(B, 3, 2, D), (V, D)),
        "lookup": Lookup(randn(K, B, 7, D), torch.randint(0, V, (B, 7)), (V, D)),
        "dense": Dense(randn(K, B, V, D)),
    }


def rows(*found: Block) -> Tensor:
    return sum((block.dense() for block in found), torch.zeros(())).reshape(K * B, -1)


def test_dense_rows_are_the_definition() -> None:
    found = blocks()
    outer, lookup = found["outer"], found["lookup"]
    assert isinstance(outer, Outer) and isinstance(lookup, Lookup)
    assert_close(outer.dense(), torch.einsum("kbto,bti->kboi", outer.c[..., 0, :], outer.a[..., 0, :]))
    onehot = torch.nn.functional.one_hot(lookup.ids, V).double()
    assert_close(lookup.dense(), torch.einsum("btv,kbtd->kbvd", onehot, lookup.c))


@pytest.mark.parametrize("kind", blocks())
def test_vjp_bound_transpose_spread(kind: str) -> None:
    block, w = blocks()[kind], randn(K, B)
    want = torch.tensordot(w, block.dense(), 2)
    assert_close(block.vjp(w), want)
    assert block.bound(w.abs()) >= want.norm()
    if kind != "grouped":
        assert_close(transpose(block).dense(), block.dense().mT)


def convolutions() -> dict[str, Conv]:
    """Blocks of kernels ``[4, 3, 2, 3]``, with cotangents for points or, transposed, for windows."""
    points, windows = randn(K, B, 2, 1, 4, 3, 3), randn(1, B, 2, 1, 3, 9, 9)
    grouped = {"points": randn(K, B, 1, 2, 2, 3, 3), "windows": randn(1, B, 1, 2, 3, 9, 9)}
    return {
        "convolution": Conv(points, windows, (4, 3, 2, 3), (2, 2), (1, 2)),
        "transposed convolution": Conv(
            points[:1], windows.repeat(K, 1, 1, 1, 1, 1, 1), (4, 3, 2, 3), (2, 1), (1, 1)
        ),
        "grouped convolution": Conv(shape=(4, 3, 2, 3), stride=(1, 1), dilation=(1, 1), **grouped),
    }


@pytest.mark.parametrize("kind", [*blocks(), *convolutions()])
def test_sketch(kind: str) -> None:
    """A matrix of weighted gradients times another, never formed."""
    block, w = {**blocks(), **convolutions()}[kind], randn(K, B)
    want, y = torch.tensordot(w, block.dense(), 2), randn(D if kind == "dense" else block.grain, 5)
    assert_close(block.sketch(w, y), want.reshape(-1, len(y)) @ y)


@pytest.mark.parametrize("kind", blocks())
def test_spread(kind: str) -> None:
    """Objectives of one shared sample, told apart again."""
    block = blocks()[kind]
    shared: Block
    if isinstance(block, Outer):
        shared = Outer(block.c.flatten(0, 1)[:, None], block.a[:1], block.shape, block.transposed)
    elif isinstance(block, Lookup):
        shared = Lookup(block.c.flatten(0, 1)[:, None], block.ids[:1], block.shape)
    else:
        shared = Dense(block.values.flatten(0, 1)[:, None])
    assert_close(spread(shared, B).dense(), shared.dense().view(K, B, V, D))


def test_merge_keeps_the_sum() -> None:
    for kinds in itertools.combinations_with_replacement(blocks(), 3):
        found = [blocks()[kind] for kind in kinds]
        assert_close(rows(*merge(found)), rows(*found))


@pytest.mark.parametrize("kind", blocks())
def test_parts(kind: str) -> None:
    """Any stretch of the flat parameter that starts and stops at a multiple of the block's grain."""
    block = blocks()[kind]
    flat = block.dense().flatten(2).transpose(0, 1)
    for start, stop in itertools.combinations(range(0, V * D + 1, block.grain), 2):
        assert_close(block.part(start, stop), flat[:, :, start:stop])
