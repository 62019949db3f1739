"""Parameters that ``fully_shard`` spreads over ranks, and what ranks must do in step because of it.

During a forward, and again during a backward pass, a unit's modules hold *whole* parameters in place of the
sharded ones; their storage is empty in between. Recorded uses are of the whole ones. Most blocks follow from
inputs and cotangents alone and need no values; for those that do not, their units are gathered.

Every backward pass gathers units, too, which all ranks take part in. So ranks must run the same passes, and
agree about them beforehand.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gramjd.distributed import are_sharded, is_sharded
from gramjd.engine.analysis.regions import parameter_ids
from gramjd.engine.recording.recorded import CallMark
from gramjd.errors import NotCoveredError, RankFailedError, RanksDisagreeError

_FLAT = (
    "FullyShardedDataParallel keeps parameters in flat pieces, whose uses cannot be told apart. Shard the "
    "model with torch.distributed.fsdp.fully_shard in its place."
)

_IN_USE = (
    "Parameter {!r} is a DTensor in the forward itself, as tensor parallelism has it. Engine works on "
    "parameters that a rank has whole while it uses them: fully_shard, DistributedDataParallel."
)


@functools.lru_cache(maxsize=4096)
def shards(kind: type) -> bool:
    """Whether ``fully_shard`` made this type of module, which gathers its parameters before each call."""
    return hasattr(kind, "unshard") and hasattr(kind, "reshard")


def refuse_flat(modules: Iterable[nn.Module]) -> None:
    """Raise for the older kind of sharding.

    Raises:
        NotImplementedError: a module is wrapped by ``FullyShardedDataParallel``.
    """
    for module in modules:
        for m in module.modules():
            if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(m).__mro__):
                raise NotImplementedError(_FLAT)


@dataclass
class Shards:
    """The sharded parameters that an engine has seen, by module and name."""

    whole: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    sharded: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    units: dict[int, nn.Module] = field(default_factory=dict)  # by id of the whole parameter

    def note(self, module: nn.Module, name: str, p: Tensor, unit: nn.Module | None) -> None:
        """Note a parameter that a module holds at this time."""
        if is_sharded(p):
            self.sharded[id(module), name] = p
        elif unit is not None:
            self.whole[id(module), name] = p
            self.units[id(p)] = unit

    def in_forward(self, module: nn.Module, name: str, p: Tensor) -> Tensor:
        """The tensor that a forward uses."""
        return self.whole.get((id(module), name), p)

    def of_user(self, module: nn.Module, name: str, p: Tensor) -> Tensor:
        """The tensor that the optimizer has."""
        return self.sharded.get((id(module), name), p)

    def release(self) -> None:
        """Let units that are still gathered show their sharded parameters."""
        for unit in dict.fromkeys(self.units.values()):
            unit.reshard()  # type: ignore[operator]


def refuse_parallel(named: dict[str, Tensor], leaves: dict[int, Tensor]) -> None:
    """Raise where an op of the forward received a ``DTensor``.

    Raises:
        NotCoveredError: tensor parallelism.
    """
    sharded = compress(named.items(), are_sharded([*named.values()]))
    for name, p in sharded:
        if id(p) in leaves:
            raise NotCoveredError(_IN_USE.format(name))


@dataclass
class Lockstep:
    """The steps that the ranks of a sharded model take together, for one output."""

    mesh: Any  # DeviceMesh
    device: torch.device
    shards: Shards
    passes: bool = False  # does any rank need backward passes that measure and check?
    most: int = 0  # samples of a rank
    gathered: set[int] = field(default_factory=set)  # ids of nodes whose weights there are

    def agree(self, passes: bool, units: Sequence[nn.Module], samples: int, error: Exception | None) -> None:
        """Exchange whether passes are needed, which units are gathered, how many samples, and who failed.

        Raises:
            RankFailedError: another rank did.
            RanksDisagreeError: ranks would gather other units.
        """
        order = list(dict.fromkeys(self.shards.units.values()))
        names = repr([order.index(unit) for unit in units]).encode()
        digest = int.from_bytes(hashlib.sha256(names).digest()[:6], "big")
        mine = [int(passes), samples, int(error is not None), digest, -digest]
        said = torch.tensor(mine, dtype=torch.int64, device=self.device)
        for dim in range(self.mesh.ndim):
            dist.all_reduce(said, dist.ReduceOp.MAX, group=self.mesh.get_group(dim))
        anywhere, self.most, failed, high, low = said.tolist()
        if error is not None:
            raise error
        if failed:
            raise RankFailedError(
                "Another rank of the sharded model cannot take part; it raises what it failed by."
            )
        if high != -low:
            raise RanksDisagreeError(
                "The ranks would gather the weights of different modules: their forwards differ. Under "
                "fully_shard, all ranks must run the same computation; only samples may differ."
            )
        self.passes = bool(anywhere)

    @contextmanager
    def gather(self, nodes: Sequence[Any]) -> Iterator[None]:
        """A context in which the units of some nodes have their weights, for replays."""
        units = self.units_of(nodes)
        self.gathered = {id(node) for node in nodes}
        for unit in units:
            unit.unshard()  # type: ignore[operator]
        try:
            yield
        finally:
            for unit in units:
                unit.reshard()  # type: ignore[operator]

    def units_of(self, nodes: Sequence[Any]) -> list[nn.Module]:
        """The units of some nodes, in the order in which they were seen: the same on all ranks."""
        wanted = {id(self.shards.units.get(root)) for node in nodes for root in parameter_ids(node)}
        return [unit for unit in dict.fromkeys(self.shards.units.values()) if id(unit) in wanted]


def needs_weights(node: Any) -> bool:
    """Whether the blocks of a node need more than inputs and cotangents."""
    mark = node.record
    if isinstance(mark, CallMark) or mark.replay is not None or mark.record.derived:
        return True
    names = {slot.name for slot in mark.record.slots}
    return any(entry is None or names & set(entry.needs) for entry in mark.record.entries)
