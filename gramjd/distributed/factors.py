"""The factors of blocks as tensors that can be sent, and what is known of those of other ranks.

A tensor that several blocks share (the input of the queries, keys and values of an attention layer, say)
is sent once, and of a tensor that was expanded, only what is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gramjd.blocks import Block
from gramjd.contraction.products import Part

_ALIGNED = 16  # bytes; every dtype's size divides it


@dataclass(frozen=True)
class Spec:
    """A tensor that is sent."""

    dtype: torch.dtype
    shape: tuple[int, ...]  # what is in memory
    expanded: tuple[int, ...]  # as the block has it

    @property
    def bytes(self) -> int:
        """The number of bytes of this tensor in a message."""
        size = torch.Size(self.shape).numel() * self.dtype.itemsize
        return -(-size // _ALIGNED) * _ALIGNED


@dataclass(frozen=True)
class Template:
    """A block without its factors."""

    type: type[Block]
    constants: tuple[tuple[str, Any], ...]
    factors: tuple[tuple[str, int], ...]  # the number of each in the manifest's list


@dataclass(frozen=True)
class Manifest:
    """A description of a rank's parts, and of the tensors that these contain."""

    samples: tuple[int, ...]  # of each part
    blocks: tuple[tuple[tuple[Template, ...], ...], ...]  # of each part, of each parameter
    tensors: tuple[Spec, ...]

    @cached_property
    def _hash(self) -> int:
        return hash((self.samples, self.blocks, self.tensors))

    def __hash__(self) -> int:
        return self._hash  # found once: a problem has as many manifests as there are ranks

    def __reduce__(self) -> Any:
        return Manifest, (self.samples, self.blocks, self.tensors)  # hashes differ between processes

    @property
    def samples_in_all(self) -> int:
        return sum(self.samples)

    def needed(self, which: Sequence[int]) -> list[int]:
        """Numbers of the tensors that the blocks of some parameters are made of, each once."""
        found = (
            number
            for mine in self.blocks
            for p in which
            for template in mine[p]
            for _, number in template.factors
        )
        return list(dict.fromkeys(found))

    def bytes(self, which: Sequence[int]) -> int:
        """The number of bytes of a message with the factors of some parameters."""
        return sum(self.tensors[number].bytes for number in self.needed(which))

    def parts(self, tensors: Mapping[int, Tensor], which: Sequence[int]) -> list[Part]:
        """The parts with the blocks of some parameters, none of the others."""
        chosen = set(which)

        def block(template: Template) -> Block:
            factors = {name: tensors[n].expand(self.tensors[n].expanded) for name, n in template.factors}
            make: Any = template.type
            block: Block = make(**dict(template.constants), **factors)
            return block

        return [
            Part([[block(t) for t in mine] if p in chosen else [] for p, mine in enumerate(blocks)], samples)
            for blocks, samples in zip(self.blocks, self.samples, strict=True)
        ]

    def meta(self) -> dict[int, Tensor]:
        """Tensors without memory, for the planner."""
        return {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in enumerate(self.tensors)}


def describe(parts: Sequence[Part]) -> tuple[Manifest, dict[int, Tensor]]:
    """The manifest of a rank's own parts, and its tensors by number."""
    numbers: dict[Any, int] = {}
    tensors: dict[int, Tensor] = {}
    specs: list[Spec] = []

    def number(tensor: Tensor) -> int:
        key = tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.numel()
        if key not in numbers:
            numbers[key] = len(specs)
            compact = _compact(tensor)
            tensors[len(specs)] = compact
            specs.append(Spec(tensor.dtype, tuple(compact.shape), tuple(tensor.shape)))
        return numbers[key]

    blocks = tuple(tuple(tuple(_template(b, number) for b in mine) for mine in part.blocks) for part in parts)
    return Manifest(tuple(part.samples for part in parts), blocks, tuple(specs)), tensors


def _compact(tensor: Tensor) -> Tensor:
    """One entry of every dimension along which all are the same memory."""
    for dim in range(tensor.ndim):
        if tensor.stride(dim) == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor.detach()


def _template(block: Block, number: Callable[[Tensor], int]) -> Template:
    values = {field.name: getattr(block, field.name) for field in fields(block)}
    factors = tuple((name, number(value)) for name, value in values.items() if isinstance(value, Tensor))
    constants = tuple((name, value) for name, value in values.items() if not isinstance(value, Tensor))
    return Template(type(block), constants, factors)


def pack(tensors: Mapping[int, Tensor], manifest: Manifest, which: Sequence[int], device: torch.device
         ) -> Tensor:  # fmt: skip
    """A message with the factors of some parameters, ``[bytes]``."""
    buffer = torch.empty(manifest.bytes(which), dtype=torch.uint8, device=device)
    for number, view in _views(buffer, manifest, which).items():
        view.copy_(tensors[number])
    return buffer


def unpack(buffer: Tensor, manifest: Manifest, which: Sequence[int], device: torch.device
           ) -> dict[int, Tensor]:  # fmt: skip
    """The tensors of a message, by number."""
    return _views(buffer.to(device), manifest, which)


def _views(buffer: Tensor, manifest: Manifest, which: Sequence[int]) -> dict[int, Tensor]:
    """The places of tensors in a message."""
    found, start = {}, 0
    for number in manifest.needed(which):
        spec = manifest.tensors[number]
        size = torch.Size(spec.shape).numel() * spec.dtype.itemsize
        found[number] = buffer[start : start + size].view(spec.dtype).view(spec.shape)
        start += spec.bytes
    return found
