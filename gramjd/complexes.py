"""Complex parameters as pairs of real ones, and gradients in torch's convention of them.

The gradient of a real loss by a complex parameter ``z`` is ``∂L/∂Re z + i ∂L/∂Im z``. Its real and
imaginary parts are the gradients by two real parameters, and the Gramian of these is ``Re(J Jᴴ)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gramjd.blocks import Block, Conv, Dense


def as_real(tensor: Tensor) -> Tensor:
    """``[*shape]`` complex → ``[*shape, 2]`` real; real ones as they are."""
    return torch.stack([tensor.real, tensor.imag], -1) if tensor.is_complex() else tensor


def as_given(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Inverse of :func:`as_real`, with the kind of numbers of a parameter."""
    return torch.complex(tensor[..., 0], tensor[..., 1]) if parameter.is_complex() else tensor


def entries(parameter: Tensor) -> int:
    """The number of real numbers in a parameter."""
    return parameter.numel() * (2 if parameter.is_complex() else 1)


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the real and imaginary parts."""
    return torch.empty((), dtype=dtype, device="meta").real.dtype if dtype.is_complex else dtype


def real_block(block: Block) -> Block:
    """A block of real rows, with a last dimension for real and imaginary parts where there were such."""
    c = block.values if isinstance(block, Dense) else block.points if isinstance(block, Conv) else block.c
    if not c.is_complex():
        return block
    return Dense(as_real(block.dense()), origin=block.origin)
