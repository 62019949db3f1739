"""Measures the layout of a tensor: which of its entries belong to which sample.

With random sample weights ``v``, the cotangent of ``Σ_b v_b f_b`` at a use equals ``v``, broadcast
along the true layout, times the cotangent of ``Σ_b f_b``. A use with cross-sample dependence, or that
does not belong to any one sample, fits no layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import inf

import torch
from torch import Tensor

from gramjd.complexes import as_real
from gramjd.rounding import tolerance


@dataclass(frozen=True)
class Layout:
    """Samples lie in dimension ``dim``, of size ``B·n``, one after the other or interleaved."""

    dim: int
    sample_major: bool = True

    def split(self, tensor: Tensor, dim: int, samples: int) -> Tensor:
        """Samples of dimension ``dim`` first; what is left of it, ``n``, stays: ``[B, ..., n, ...]``."""
        n = tensor.shape[dim] // samples
        if self.sample_major and dim == 0:
            return tensor.unflatten(0, (samples, n)) if n > 1 else tensor.unsqueeze(1)
        sizes = (samples, n) if self.sample_major else (n, samples)
        return tensor.unflatten(dim, sizes).movedim(dim + (0 if self.sample_major else 1), 0)

    def cotangents(self, c: Tensor, samples: int) -> Tensor:
        """``[K, *y]`` → ``[K, B, *y]`` with ``n`` left of the batch dimension."""
        if self.sample_major and self.dim == 0:
            n = c.shape[1] // samples
            return c.unflatten(1, (samples, n)) if n > 1 else c.unsqueeze(2)
        return self.split(c, self.dim + 1, samples).transpose(0, 1)


@dataclass(frozen=True, eq=False)
class Scattered(Layout):
    """Every entry of dimension ``dim`` belongs to a sample of its own: tokens routed to an expert, nodes
    of graphs, packed sequences. As many places for each sample as the largest has, the rest zero."""

    sample_of: Tensor = field(default_factory=lambda: torch.zeros(0))  # [N]; B for entries of none
    samples: int = 1  # B

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """The entry in each place of each sample, and whether there is one, both ``[B, n]``."""
        counts = self.sample_of.bincount(minlength=self.samples)
        n = int(counts[: self.samples].max())
        order, at = self.sample_of.argsort(stable=True), torch.arange(n, device=self.sample_of.device)
        filled = at < counts[: self.samples, None]
        starts = (counts.cumsum(0) - counts)[: self.samples, None]
        return order[(starts + at) * filled], filled

    def split(self, tensor: Tensor, dim: int, samples: int) -> Tensor:
        """Empty places repeat some entry of the tensor."""
        return tensor.movedim(dim, 0)[self._places[0]].movedim(1, dim + 1)

    def cotangents(self, c: Tensor, samples: int) -> Tensor:
        found = self.split(c, self.dim + 1, samples)  # [B, K, ..., n, ...]
        filled = self._places[1]
        shape = [samples, *[1] * (found.ndim - 1)]
        shape[self.dim + 2] = filled.shape[1]
        return (found * filled.view(shape)).transpose(0, 1)

    def misfit(self, c: Tensor, probed: Tensor, v: Tensor) -> float:
        """The relative difference that it leaves with other weights; arguments as of :func:`measure`."""
        c, probed = as_real(c), as_real(probed)
        v = v.to(c.device).double()
        v = torch.cat([v, v.new_zeros(len(v), 1)], 1)  # entries of no sample have cotangents of zero
        rows = c.movedim(self.dim + 1, 1).flatten(2).double() if c.ndim > 2 else c.unsqueeze(-1).double()
        wanted = (
            probed.movedim(self.dim, 0).flatten(1).double()
            if probed.ndim > 1
            else probed.unsqueeze(-1).double()
        )
        weighted = torch.einsum("knm,kn->nm", rows, v[:, self.sample_of])
        size = float(weighted.norm())
        return float((weighted - wanted).norm()) / size if size else inf


ZERO = Layout(-1)  # every layout fits: the cotangents are zero, or there are none


def candidates(shape: Sequence[int], samples: int) -> Iterator[Layout]:
    """Every dimension of ``B`` samples, then of ``B·n``."""
    for dim, size in enumerate(shape):
        if size == samples:
            yield Layout(dim)
    for dim, size in enumerate(shape):
        if size > samples and size % samples == 0:
            yield Layout(dim)
            if samples > 1:
                yield Layout(dim, sample_major=False)


def measure(c: Tensor, probed: Tensor, v: Tensor, last: bool = True) -> tuple[Layout | None, float]:
    """The layout that fits a use's output best, and the relative difference that it leaves.

    Args:
        c: cotangents ``[K, *y]`` of the sums of the objectives over the samples.
        probed: cotangent ``[*y]`` of the objectives weighted by ``v``.
        v: ``[K, B]``.
        last: whether the samples may be in the last dimension.

    Returns:
        The layout, ``None`` if the output has no dimension for the samples, ``ZERO`` if every
        cotangent is zero.
    """
    K, samples = v.shape
    size = float(probed.norm())
    if size == 0:
        return (None, inf) if c.any() else (ZERO, 0.0)
    best: tuple[Layout | None, float] = (None, inf)
    for layout in candidates(probed.shape if last else probed.shape[:-1], samples):
        rows = layout.cotangents(c, samples)
        weights = v.to(c).reshape(K, samples, *[1] * (rows.ndim - 2))
        weighted = (rows * weights).sum(0) if K > 1 else rows[0] * weights[0]
        off = float(weighted.sub_(layout.split(probed, layout.dim, samples)).norm()) / size
        if off < best[1]:
            best = (layout, off)
        if off <= tolerance(c.dtype):
            break
    return best


def owned(c: Tensor, probed: Tensor, v: Tensor, noise: float = 0.0) -> Layout | None:
    """The layout in which every entry of one dimension has its own sample, if one fits.

    The weights of two samples may be close: whether ``sample_of`` is right is for the total to say,
    with other weights. The arguments are those of :func:`measure`, and the relative rounding of the
    cotangents, if it was measured.
    """
    if probed.ndim == 0:
        return None
    samples, v = v.shape[1], v.to(c.device).double()
    slack = min(64 * torch.finfo(c.dtype).eps, tolerance(c.dtype))
    dims = range(max(1, probed.ndim - 1))  # the last one holds features
    c, probed = as_real(c), as_real(probed)
    for dim in dims:
        rows = c.unsqueeze(-1).movedim(dim + 1, 1).flatten(2).double()  # [K, N, m]
        wanted = probed.unsqueeze(-1).movedim(dim, 0).flatten(1).double()  # [N, m]
        products, squares = torch.einsum("knm,nm->kn", rows, wanted), torch.einsum("knm,lnm->kln", rows, rows)
        distances = torch.einsum("kb,lb,kln->nb", v, v, squares) - 2 * products.T @ v
        sample_of = distances.argmin(1)
        weighted = torch.einsum("knm,kn->nm", rows, v[:, sample_of])
        off, size = (weighted - wanted).norm(dim=1), weighted.norm(dim=1)
        if bool((off <= tolerance(c.dtype) * size + slack * size.max() + noise * size.norm()).all()):
            sample_of = torch.where(rows.ne(0).any(2).any(0), sample_of, samples)
            return Scattered(dim, sample_of=sample_of, samples=samples)
    return None


def follows_samples(c: Tensor, probed: Tensor, v: Tensor, most: int = 4096) -> bool:
    """Whether every entry (of at most so many) belongs to some sample, in no regular layout.

    The arguments are those of :func:`measure`.
    """
    c, probed = as_real(c).flatten(1), as_real(probed).flatten()
    step = -(-len(probed) // most)
    c, probed = c[:, ::step], probed[::step]
    left = torch.full_like(probed, inf)
    for weights in v.to(c).unbind(1):
        left = torch.minimum(left, (weights @ c - probed).abs())
    return bool((left <= tolerance(c.dtype) * c.abs().max()).all())


def canonical(tensor: Tensor, dim: int | None, layout: Layout, size: int, samples: int) -> Tensor:
    """An argument of a call: ``[B, ...]``, shared where it has no samples.

    Args:
        tensor: the argument.
        dim: which of its dimensions meets the one of the output in which the samples are, if any.
        layout: of the output.
        size: of the output in that dimension.
        samples: ``B``.

    Raises:
        ValueError: its size there does not fit the output's.
    """
    if dim is None or (tensor.shape[dim] == 1 and size > 1):
        return tensor.unsqueeze(0).expand(samples, *tensor.shape)
    if tensor.shape[dim] == size:
        return layout.split(tensor, dim, samples)
    raise ValueError(
        f"an argument of shape {list(tensor.shape)} has {tensor.shape[dim]} entries where the output, "
        f"in the dimension that holds the samples, has {size}"
    )
