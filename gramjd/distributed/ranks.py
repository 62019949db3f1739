"""The ranks of a process group, and what they send one another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

if dist.is_available():
    # Where these are imported after a group exists (DistributedDataParallel does so), default arguments hold
    # that group for ever; its threads outlive it and abort gloo's process now and then while Python ends.
    import torch.distributed.nn

_ON_HOST = ("gloo", "mpi")  # backends that want what is sent in the memory of the host


@dataclass(frozen=True)
class Ranks:
    """A process group as its member of number ``rank`` sees it."""

    group: Any  # dist.ProcessGroup, which not every build of torch has
    rank: int
    size: int
    device: torch.device  # where tensors must be to be sent

    @staticmethod
    def of(group: Any, device: torch.device) -> Ranks:
        """The ranks of a process group, or of a device mesh of one dimension.

        Raises:
            TypeError: it is neither.
            ValueError: this process is not in the group.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError(
                "group= needs torch.distributed: call torch.distributed.init_process_group first, or leave "
                "group out for the samples of this process alone."
            )
        if hasattr(group, "get_group"):
            group = group.get_group()
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("This process is not in the group that it was given; only its members may call.")
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "group must be a torch.distributed process group (torch.distributed.group.WORLD for all "
                f"processes) or a DeviceMesh of one dimension, not a {type(group).__name__}."
            )
        backend = dist.get_backend(group)
        where = torch.device("cpu") if backend in _ON_HOST else device
        return Ranks(group, dist.get_rank(group), dist.get_world_size(group), where)

    def gather_objects(self, mine: Any) -> list[Any]:
        """Gather an object of every rank, in order of ranks; objects are pickled."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine, group=self.group)
        return found

    def gather(self, mine: Tensor) -> list[Tensor]:
        """The tensors of all ranks, which have one shape and dtype."""
        mine = mine.to(self.device).contiguous()
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, group=self.group)
        return found

    def exchange(self, sent: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """A flat tensor to each rank, and one of a known length from each."""
        flat = torch.cat(list(sent))
        buffer = torch.empty(sum(lengths), dtype=flat.dtype, device=self.device)
        sizes = [len(mine) for mine in sent]
        dist.all_to_all_single(buffer, flat.to(self.device), list(lengths), sizes, group=self.group)
        return list(buffer.to(flat.device).split(list(lengths)))

    def start(self, sent: Sequence[tuple[int, Tensor]], received: Sequence[tuple[int, Tensor]]) -> Transfer:
        """Begin to send tensors to ranks and to receive others into buffers; empty ones do not travel."""
        ops = [
            dist.P2POp(op, tensor, dist.get_global_rank(self.group, rank), self.group)
            for op, pairs in ((dist.isend, sent), (dist.irecv, received))
            for rank, tensor in pairs
            if tensor.numel()
        ]
        works = dist.batch_isend_irecv(ops) if ops else []
        return Transfer(works, [tensor for _, tensor in [*sent, *received]])

    def swap(self, to: int, sent: Tensor, source: int, shape: Sequence[int]) -> Tensor:
        """Send a tensor to one rank, and receive one of some shape from a rank."""
        buffer = torch.empty(tuple(shape), dtype=sent.dtype, device=self.device)
        self.start([(to, sent.to(self.device).contiguous())], [(source, buffer)]).wait()
        return buffer.to(sent.device)


@dataclass(frozen=True)
class Transfer:
    """Tensors on their way."""

    works: Sequence[Any]
    tensors: Sequence[Tensor]  # alive until they have arrived

    def wait(self) -> None:
        for work in self.works:
            work.wait()
