"""The rows of a Jacobian: which output's entry of which sample each of them is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from gramjd import gramians, pytree
from gramjd.pytree import PyTree, PyTreeSpec


@dataclass(frozen=True)
class Output:
    """The place of one output's rows among the objectives, and its shape."""

    start: int  # its first objective
    shape: tuple[int, ...]  # with the batch dimension, if there is one
    batch_dim: int | None

    @property
    def objectives(self) -> int:
        """The number of objectives per sample."""
        return prod([n for d, n in enumerate(self.shape) if d != self.batch_dim])

    @property
    def samples(self) -> int:
        """1 without a batch dimension."""
        return 1 if self.batch_dim is None else self.shape[self.batch_dim]

    @property
    def stop(self) -> int:
        return self.start + self.objectives

    def with_samples(self, samples: int) -> Output:
        """Return the output with another number of samples."""
        assert self.batch_dim is not None
        shape = list(self.shape)
        shape[self.batch_dim] = samples
        return replace(self, shape=tuple(shape))


@dataclass(frozen=True)
class Outputs:
    """All outputs of a function: the rows ``(k, b)`` as the user sees them."""

    each: Sequence[Output]
    spec: PyTreeSpec
    samples: int

    @property
    def objectives(self) -> int:
        """Objectives per sample, of all outputs together: ``K``."""
        return self.each[-1].stop

    @property
    def rows(self) -> int:
        return self.objectives * self.samples

    def pack(self, values: PyTree, what: str) -> tuple[Tensor, bool]:
        """Values shaped like the outputs as ``[n, K, B]``, and whether they are a batch (else ``n = 1``)."""
        given, spec = pytree.flatten(values)
        if spec != self.spec:
            raise ValueError(f"Expected {what} in the structure {self.spec}, got {spec}.")
        shapes = [tuple(value.shape) for value in given]
        batched = shapes[0][1:] == self.each[0].shape and len(shapes[0]) > len(self.each[0].shape)
        rows = []
        for out, value, shape in zip(self.each, given, shapes, strict=True):
            if (shape[1:] if batched else shape) != out.shape or (batched and not shape):
                raise ValueError(
                    f"Expected {what} of shape {list(out.shape)}, or a batch of them with one dimension "
                    f"more in front, got {list(shape)}."
                )
            value = value if batched else value.unsqueeze(0)
            flat = gramians.rows_first(value.movedim(0, -1), out.batch_dim, len(out.shape))
            rows.append(flat.movedim(-1, 0))
        return torch.cat(rows, 1), batched

    def unpack(self, rows: Tensor) -> PyTree:
        """``[K, B, ...]`` → a tensor ``[*shape, ...]`` for each output."""
        return pytree.unflatten(
            self.spec,
            [gramians.from_rows(rows[out.start : out.stop], out.shape, out.batch_dim) for out in self.each],
        )

    def square(self, total: Tensor, right: Outputs) -> PyTree:
        """``[K₁, B₁, K₂, B₂]`` → ``[*shape, *reversed(right shape)]`` for each pair of outputs."""
        return pytree.unflatten(self.spec, [self._row(total, left, right) for left in self.each])

    def _row(self, total: Tensor, left: Output, right: Outputs) -> PyTree:
        found = []
        for out in right.each:
            part = total[left.start : left.stop, :, out.start : out.stop]
            if part.shape != total.shape:
                part = part.clone()  # a view would keep the whole alive
            rows = gramians.from_rows(part, left.shape, left.batch_dim)  # [*left, K₂, B₂]
            flipped = rows.movedim((-2, -1), (0, 1))
            found.append(
                gramians.mirror(gramians.from_rows(flipped, out.shape, out.batch_dim), len(out.shape))
            )
        return pytree.unflatten(right.spec, found)

    def ravel(self, values: PyTree) -> Tensor:
        """``[*shape, ...]`` for each output → ``[rows, ...]``: the outputs' entries one after the other."""
        pairs = zip(self.each, pytree.leaves(values), strict=True)
        return torch.cat([x.reshape(prod(out.shape), *x.shape[len(out.shape) :]) for out, x in pairs])

    def unravel(self, flat: Tensor) -> PyTree:
        """Inverse of :meth:`ravel`: ``[rows, ...]`` → ``[*shape, ...]`` for each output."""
        parts = flat.split([prod(out.shape) for out in self.each])
        shaped = [x.reshape(*out.shape, *flat.shape[1:]) for out, x in zip(self.each, parts, strict=True)]
        return pytree.unflatten(self.spec, shaped)
