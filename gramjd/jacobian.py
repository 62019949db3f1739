"""The lazy Jacobian: a linear operator made of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from gramjd import gramians, plan, pytree
from gramjd.blocks import Block
from gramjd.pytree import PyTree, PyTreeSpec


@dataclass(frozen=True)
class Output:
    """Where the rows of one output stand among the objectives, and how it is shaped."""

    start: int  # its first objective
    shape: tuple[int, ...]  # with the batch dimension, if there is one
    batch_dim: int | None

    @property
    def objectives(self) -> int:
        """Objectives per sample."""
        sizes = [n for d, n in enumerate(self.shape) if d != self.batch_dim]
        return prod(sizes)

    @property
    def stop(self) -> int:
        return self.start + self.objectives


@dataclass(frozen=True, eq=False)
class Jacobian:
    """The Jacobian ``J`` of outputs with respect to parameters, as blocks; ``J`` is never stored.

    Made by :func:`gramjd.jacobian` and :meth:`gramjd.Engine.jacobian`.
    """

    blocks: Sequence[Sequence[Block]]  # of each parameter; none if the outputs do not depend on it
    parameters: Sequence[Tensor]
    parameters_spec: PyTreeSpec
    outputs: Sequence[Output]
    outputs_spec: PyTreeSpec
    samples: int

    @property
    def objectives(self) -> int:
        """Objectives per sample, of all outputs together."""
        return self.outputs[-1].stop

    def __repr__(self) -> str:
        shapes = [list(out.shape) for out in self.outputs]
        entries = sum(p.numel() for p in self.parameters)
        shown = shapes[0] if len(shapes) == 1 else shapes
        return f"Jacobian(outputs={shown}, parameters={len(self.parameters)}, entries={entries})"

    def gramian(self) -> PyTree:
        """The generalized Gramian ``G = J Jᵀ``.

        Returns:
            For a tensor output, ``[*shape, *reversed(shape)]``, exactly symmetric. For a PyTree of
            outputs, a PyTree of PyTrees as of ``torch.func.hessian``: entry ``[i][j]`` has shape
            ``[*shape_i, *reversed(shape_j)]``.
        """
        K, B = self.objectives, self.samples
        shares = [plan.gramian(blocks) for blocks in self.blocks if blocks]
        like = self.parameters[0] if not shares else shares[0]
        total = torch.zeros(K, B, K, B, dtype=like.dtype, device=like.device)
        for share in shares:
            total = total + share
        rows = [self._square(total, left) for left in self.outputs]
        return pytree.unflatten(self.outputs_spec, rows)

    def vjp(self, w: PyTree) -> PyTree:
        """``Jᵀ w``, the weighted gradient, without a second backward pass.

        Args:
            w: weights shaped like the outputs (a PyTree of tensors if they are one).

        Returns:
            A PyTree like the parameters, in their shapes and dtypes.

        Raises:
            ValueError: the weights are not shaped like the outputs.
        """
        given, spec = pytree.flatten(w)
        if spec != self.outputs_spec:
            raise ValueError(f"Expected weights in the structure {self.outputs_spec}, got {spec}.")
        rows = []
        for out, weights in zip(self.outputs, given, strict=True):
            if tuple(weights.shape) != out.shape:
                raise ValueError(f"Expected weights of shape {list(out.shape)}, got {list(weights.shape)}.")
            rows.append(gramians.rows_first(weights, out.batch_dim))
        stacked = torch.cat(rows)
        sums = [
            sum((block.vjp(stacked.to(p.dtype)) for block in blocks), torch.zeros_like(p))
            for p, blocks in zip(self.parameters, self.blocks, strict=True)
        ]
        return pytree.unflatten(self.parameters_spec, sums)

    def dense(self) -> PyTree:
        """``J`` itself: for each output, a PyTree like the parameters of ``[*shape, *p.shape]``."""
        found = []
        for out in self.outputs:
            rows = [
                self._dense_rows(p, blocks, out)
                for p, blocks in zip(self.parameters, self.blocks, strict=True)
            ]
            found.append(pytree.unflatten(self.parameters_spec, rows))
        return pytree.unflatten(self.outputs_spec, found)

    def _dense_rows(self, parameter: Tensor, blocks: Sequence[Block], out: Output) -> Tensor:
        zero = parameter.new_zeros(self.objectives, self.samples, *parameter.shape)
        rows = sum((block.dense() for block in blocks), zero)[out.start : out.stop]
        return gramians.from_rows(rows, out.shape, out.batch_dim)

    def _square(self, total: Tensor, left: Output) -> PyTree:
        """One row of blocks of the Gramian: ``left`` against every output."""
        found = []
        for right in self.outputs:
            part = total[left.start : left.stop, :, right.start : right.stop]
            rows = gramians.from_rows(part, left.shape, left.batch_dim)  # [*left, K₂, B]
            flat = rows.reshape(-1, right.objectives, self.samples).movedim(0, -1)
            both = gramians.from_rows(flat, right.shape, right.batch_dim).reshape(prod(right.shape), -1)
            found.append(gramians.mirror(both.mT, left.shape, right.shape))
        return pytree.unflatten(self.outputs_spec, found)
