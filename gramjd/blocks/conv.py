"""The block of a convolution, which unfolds nothing until a plan asks for it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from gramjd.blocks.outer import Outer, weighted

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_WEIGHT_GRADIENTS = (conv1d_weight, conv2d_weight, conv3d_weight)


@dataclass(frozen=True)
class Conv:
    """Row ``Σ_t point_t ⊗ window_t``: a convolution, transposed or not.

    The windows slide over the input of a convolution, and the points are the cotangents of its
    output; a transposed convolution is the other way round. The cotangents carry K.

    Attributes:
        points: ``[K or 1, B, m, G, p, *out]``, of ``m`` calls of the op for each sample.
        windows: ``[K or 1, B, m, G, q, *padded]``.
        shape: of the parameter, ``[G * p, q, *kernel]``.
        stride: of the windows, in each dimension.
        dilation: likewise.
        origin: name of the op, for ``explain``; a rule leaves it empty.
    """

    points: Tensor
    windows: Tensor
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    origin: str = field(default="", kw_only=True, compare=False)

    @property
    def rows(self) -> tuple[int, int]:
        return max(self.points.shape[0], self.windows.shape[0]), self.points.shape[1]

    @property
    def kernel(self) -> tuple[int, ...]:
        return self.shape[2:]

    @property
    def T(self) -> int:
        """The number of positions ``T``."""
        return self.points.shape[2] * prod(self.points.shape[5:])

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """The factor of the parameter's first dimension, and that of the other dimensions, not unfolded."""
        return self.points, self.windows

    @property
    def grain(self) -> int:
        return prod(self.shape[1:])

    @property
    def kind(self) -> Hashable:
        """A key that is equal for blocks that can be joined."""
        x, y = self.points, self.windows
        sizes = x.shape[:2], x.shape[3:], y.shape[:2], y.shape[3:]
        return self.stride, self.dilation, sizes, x.dtype, y.dtype

    def samples(self, start: int, stop: int) -> Conv:
        return replace(self, points=self.points[:, start:stop], windows=self.windows[:, start:stop])

    def objectives(self, which: Tensor) -> Conv:
        """The block of some of the objectives."""
        points, windows = (f[which] if len(f) > 1 else f for f in self.factors)
        return replace(self, points=points, windows=windows)

    @staticmethod
    def join(blocks: Sequence[Conv]) -> Conv:
        """The sum of several blocks of one kind."""
        points = torch.cat([block.points for block in blocks], 2)
        return replace(blocks[0], points=points, windows=torch.cat([block.windows for block in blocks], 2))

    def to(self, dtype: torch.dtype) -> Conv:
        return replace(self, points=self.points.to(dtype), windows=self.windows.to(dtype))

    def taps(self, first: int = 0) -> Tensor:
        """The windows as a view, ``[K or 1, B, m, G, q, *out, *kernel]``.

        From the spatial dimension ``first`` on: those before stay as they are, and have no taps.
        """
        x = self.windows
        for d in range(first, len(self.kernel)):
            hole = self.dilation[d]
            x = x.unfold(5 + d, (self.kernel[d] - 1) * hole + 1, self.stride[d])[..., ::hole]  # appends one
            x = x.narrow(5 + d, 0, self.points.shape[5 + d])  # output padding adds windows
        return x

    def outer(self) -> Outer:
        """Unfolded: a linear map at every position."""
        n = len(self.kernel)
        points = self.points.flatten(5).permute(0, 1, 2, 5, 3, 4).flatten(2, 3)  # [., B, T, G, p]
        out, kernel = range(5, 5 + n), range(5 + n, 5 + 2 * n)
        windows = self.taps().permute([0, 1, 2, *out, 3, 4, *kernel])
        windows = windows.reshape(*windows.shape[:2], points.shape[2], points.shape[3], -1)
        if self.windows.shape[0] > 1:
            return Outer(windows, points[0], self.shape, transposed=True, origin=self.origin)
        return Outer(points, windows[0], self.shape, origin=self.origin)

    def features(self, start: int, stop: int) -> Conv:
        """The block of some of the ``p`` features of each group."""
        shape = (self.points.shape[3] * (stop - start), *self.shape[1:])
        return replace(self, points=self.points[:, :, :, :, start:stop], shape=shape)

    @property
    def lines(self) -> int:
        """Positions that ``positions`` can tell apart."""
        return self.points.shape[5]

    def positions(self, start: int, stop: int) -> Conv:
        """The block of some of the lines of the output."""
        reach = (self.kernel[0] - 1) * self.dilation[0] + 1
        windows = self.windows[:, :, :, :, :, start * self.stride[0] : (stop - 1) * self.stride[0] + reach]
        return replace(self, points=self.points[:, :, :, :, :, start:stop], windows=windows)

    def workspace(self, dtype: torch.dtype) -> int:
        """Elements that ``part`` needs for each sample besides its result: the unfolded windows."""
        (points, _, _, G, p), windows = self.points.shape[:5], self.windows.shape[0]
        return self.T * G * (points * p + windows * self.grain)

    def part(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """The entries from ``start`` to ``stop`` of all rows, ``[B, K, stop - start]``."""
        return self.outer().part(start, stop, dtype)

    def dense(self) -> Tensor:
        """All rows, ``[K, B, *shape]``."""
        return self.outer().dense()

    def vjp(self, w: Tensor) -> Tensor:
        """``Jᵀ w`` for ``w [K, B]``: an ordinary weight gradient."""
        points, windows = self._weighted(w)
        return weight_gradient(self, points.flatten(2, 3), windows.flatten(2, 3), self.points.shape[3])

    def sketch(self, w: Tensor, y: Tensor) -> Tensor:
        """``Jᵀ w`` as a matrix of ``grain`` columns times ``y [grain, n]``: a convolution with ``y``."""
        points, windows = self._weighted(w)  # [B, m, G, p, *out], [B, m, G, q, *padded]
        G, n = self.points.shape[3], y.shape[1]
        kernel = y.T.reshape(n, *self.shape[1:]).repeat(G, *[1] * (len(self.shape) - 1))
        convolve = _CONVOLUTIONS[len(self.kernel) - 1]
        windows = covered(self, windows.flatten(2, 3)).flatten(0, 1)
        out = convolve(windows, kernel, None, self.stride, 0, self.dilation, G)
        out = out.flatten(2).unflatten(1, (G, n))  # [B m, G, n, positions]
        return (points.flatten(0, 1).flatten(3) @ out.mT).sum(0).flatten(0, 1)

    def _weighted(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Points and windows without K, weighted by ``w [K, B]``."""
        if self.windows.shape[0] > 1:
            windows, points = weighted(self.windows, w, self.points[0])
            return points, windows
        return weighted(self.points, w, self.windows[0])

    def bound(self, w: Tensor) -> Tensor:
        """An upper bound of the norm of ``Jᵀ w`` that no cancellation lowers."""
        points = self.points.square().flatten(2).sum(2).sqrt()
        windows = self.windows.square().flatten(2).sum(2).sqrt() * prod(self.kernel) ** 0.5
        return (points * windows * w.abs()).sum()


def weight_gradient(block: Conv, points: Tensor, windows: Tensor, groups: int) -> Tensor:
    """Gradient of a convolution's weight from ``points [B, m, p, *out]``, ``windows [B, m, q, *padded]``."""
    points, windows = points.flatten(0, 1), covered(block, windows).flatten(0, 1)
    shape = (points.shape[1], windows.shape[1] // groups, *block.kernel)
    gradient = _WEIGHT_GRADIENTS[len(block.kernel) - 1]
    return gradient(windows, shape, points, block.stride, 0, block.dilation, groups)


def covered(block: Conv, windows: Tensor) -> Tensor:
    """Cut ``windows [B, m, q, *padded]`` to the entries that the kernel covers."""
    for d, size in enumerate(block.kernel):
        cover = (block.points.shape[5 + d] - 1) * block.stride[d] + (size - 1) * block.dilation[d] + 1
        windows = windows.narrow(3 + d, 0, cover)
    return windows
