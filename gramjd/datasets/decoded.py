"""Sketches that files hold in half precision, as an array of the numbers that they mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Decoded:
    """Rows in float32, decoded where they are read; ``numpy.asarray`` decodes all.

    What a file holds in float16 lacks the power of two of its row, and numpy has no bfloat16: whatever
    computed with that would be wrong without a word. So nothing but this array has it.

    Attributes:
        stored: as in the file, ``[N, *S, dim]``: float16, or the bits of bfloat16 as uint16.
        scales: ``[N, *S]``, what rows in float16 are multiplied with; ``None`` for bfloat16.
    """

    stored: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stored.shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        import numpy as np

        return np.dtype("float32")

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, index: Any) -> Any:
        """Rows by a number, a slice, or an array or list of numbers or of booleans; a copy."""
        import numpy as np

        if isinstance(index, tuple) or index is None or index is Ellipsis:
            raise TypeError(
                "Rows of sketches in half precision are chosen by numbers or a slice, and decoded by that; "
                "choose their columns afterwards: sketches[rows][..., columns]."
            )
        some = self.stored[index]
        if self.scales is None:
            return (some.astype(np.uint32) << 16).view(np.float32)
        wide = some.astype(np.float64) * self.scales[index][..., None]
        with np.errstate(over="ignore"):  # infinite, which products with it refuse
            return wide.astype(np.float32)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        if copy is False:
            raise ValueError("Sketches in half precision cannot be an array without a copy.")
        found = self[:]
        return found if dtype is None else found.astype(dtype)
