"""Random numbers by position: Philox4x32-10, in integer tensor ops that are the same on every device.

Each call of the generator is a function of a counter and a key alone, so that any row of a random matrix
can be made at any time, by any process (Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, 2011).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from gramjd.internals import constant_in_graphs

Key = tuple[int, int]
Number = TypeVar("Number", Tensor, int)

_ROUNDS = 10
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
SIGNS = 128  # of one call: 4 words of 32 bits
_NORMALS = 4


@constant_in_graphs
def key_of(*parts: object) -> Key:
    """A key that depends on all of some values."""
    found = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(found[:4], "little"), int.from_bytes(found[4:], "little")


def philox(counter: Sequence[Number], key: Key) -> list[Number]:
    """Four words of 32 random bits for counters of four such words, all in int64."""
    a, b, c, d = counter
    (first, second), (k, l) = _MULTIPLIERS, key  # noqa: E741
    for _ in range(_ROUNDS):
        x, y = a * first, c * second  # int64 wraps around; shifts keep its sign, which the mask takes away
        a, b, c, d = (y >> 32 & _LOW) ^ b ^ k, y & _LOW, (x >> 32 & _LOW) ^ d ^ l, x & _LOW
        k, l = k + _WEYL[0] & _LOW, l + _WEYL[1] & _LOW  # noqa: E741
    return [a, b, c, d]


def signs(rows: Tensor, dim: int, key: Key, dtype: torch.dtype) -> Tensor:
    """``[len(rows), dim]`` of -1 and 1: rows of these numbers of a random matrix."""
    words = torch.stack(_words(rows, -(-dim // SIGNS), key), -1)  # [rows, calls, 4]
    octets = torch.stack([words >> shift & 255 for shift in (0, 8, 16, 24)], -1).flatten(1)
    octets = octets[:, : -(-dim // 8)]
    bits = torch.arange(256, device=rows.device)[:, None] >> torch.arange(8, device=rows.device) & 1
    table = (2 * bits - 1).to(dtype)
    return table.index_select(0, octets.flatten()).view(len(rows), -1)[:, :dim]


def normals(rows: Tensor, dim: int, key: Key, dtype: torch.dtype) -> Tensor:
    """``[len(rows), dim]`` standard normal numbers, by Box and Muller in float64."""
    a, b, c, d = ((w.double() + 0.5) / 2**32 for w in _words(rows, -(-dim // _NORMALS), key))
    pairs = []
    for radius, angle in ((a, b), (c, d)):
        radius, angle = (-2 * radius.log()).sqrt(), 2 * math.pi * angle
        pairs += [radius * angle.cos(), radius * angle.sin()]
    return torch.stack(pairs, -1).flatten(1)[:, :dim].to(dtype)


def words(rows: Tensor, key: Key) -> Tensor:
    """``[len(rows)]`` integers of 32 random bits, by position."""
    return _words(rows, 1, key)[0].flatten()


def word(row: int, key: Key) -> int:
    """The integer of 32 random bits of one position."""
    return philox([row & _LOW, row >> 32, 0, 0], key)[0]


def _words(rows: Tensor, calls: int, key: Key) -> list[Tensor]:
    """Four words for each row and call, each ``[len(rows), calls]``."""
    number = torch.arange(calls, device=rows.device)
    low, high, number = torch.broadcast_tensors((rows & _LOW)[:, None], (rows >> 32)[:, None], number)
    return philox([low, high, number, torch.zeros_like(number)], key)
