"""The modules of an engine, and which parameters they hold at the time of asking."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gramjd import distributed
from gramjd.engine.recording.compiled import StandIns
from gramjd.engine.sharded import Lockstep, Shards, shards
from gramjd.internals import compiled_call, held_by, named_parameters


class Registry:
    """The modules of an engine, and what they hold at the time of asking."""

    def __init__(self, modules: Sequence[nn.Module], recurse: bool) -> None:
        self.modules, self.recurse, self.shards = modules, recurse, Shards()
        self.stand_ins: StandIns | None = None
        below = dict.fromkeys(m for mine in modules for m in (mine.modules() if recurse else [mine]))
        # to look for later ones in each forward takes too long
        self.constants = [weakref.ref(t) for module in below for t in _constants(module)]

    def named(self, whole: bool = False) -> dict[str, Tensor]:
        """Trainable parameters by name, each once: the optimizer's, or the ``whole`` of sharded ones."""
        seen: set[int] = set()
        found: dict[str, Tensor] = {}
        which = self.shards.in_forward if whole else self.shards.of_user
        for index, module in enumerate(self.modules):
            prefix = "" if len(self.modules) == 1 else f"{index}:{type(module).__name__}."
            for name, p in named_parameters(module, self.recurse):
                if self.shards.units:
                    path, _, last = name.rpartition(".")
                    p = which(module.get_submodule(path), last, p)
                if p.requires_grad and id(p) not in seen:
                    seen.add(id(p))
                    found[prefix + name] = p
        return found

    def held(self, below: nn.Module | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Trainable parameters, and the tensors that no sample owns: frozen ones, buffers and constants.

        Of all modules, or of those ``below`` a sharded one. A walk many times as fast as
        ``named_parameters``, for every forward takes it.
        """
        trainable: dict[int, Tensor] = {}
        batch_independent: dict[int, Tensor] = {}
        start = self.modules if below is None or not self.recurse else [below]
        for constant in [reference() for reference in self.constants]:
            if constant is not None and not constant.requires_grad:
                batch_independent[id(constant)] = constant
        stack: list[tuple[nn.Module, nn.Module | None]] = [(module, None) for module in start]
        seen = set(map(id, start))
        while stack:
            module, unit = stack.pop()
            kind: Any = type(module)
            unit = module if shards(kind) else unit
            if self.stand_ins is not None and compiled_call(module) is not None:
                self.stand_ins.note(module)
            parameters, buffers, children = held_by(module)
            if unit is not None:
                parameters = self._whole(module, parameters, unit)
            for p in parameters.values():
                if p is not None:
                    (trainable if p.requires_grad else batch_independent)[id(p)] = p
            for b in buffers.values():
                if b is not None:
                    batch_independent[id(b)] = b
            for child in children.values() if self.recurse else ():
                if child is not None and id(child) not in seen:
                    seen.add(id(child))
                    stack.append((child, unit))
        return list(trainable.values()), list(batch_independent.values())

    def _whole(self, module: nn.Module, parameters: Mapping[str, Tensor | None], unit: nn.Module
               ) -> dict[str, Tensor | None]:  # fmt: skip
        """The parameters of a module that are not sharded at the time: shards take no part in a forward."""
        for name, p in parameters.items():
            if p is not None:
                self.shards.note(module, name, p, unit)
        return {name: p for name, p in parameters.items() if p is not None and not distributed.is_sharded(p)}

    def lockstep(self) -> Lockstep | None:
        """The lockstep of a sharded model, which shows its sharded parameters from now on."""
        if not self.shards.units:
            return None
        if not self.shards.sharded:  # the engine has seen no other than gathered ones
            self.shards.release()
            self.held()
        for p in self.shards.sharded.values():
            return Lockstep(p.device_mesh, p.device, self.shards)  # type: ignore[attr-defined]
        return None

    def hooked(self) -> list[nn.Module]:
        """The modules whose calls are watched: those that have a registered parameter below them.

        Calls of scripted ones are left to the module that calls them: they take no hooks.
        """
        found = self.modules
        if self.recurse:
            below = dict.fromkeys(m for mine in self.modules for m in mine.modules())
            found = [m for m in below if next(m.parameters(), None) is not None]
        return [m for m in found if not isinstance(m, torch.jit.ScriptModule)]


def _constants(module: nn.Module) -> Iterator[Tensor]:
    """The tensors that are attributes of a module, by themselves or in a container: masks, tables."""
    for value in vars(module).values():
        some = (
            value.values()
            if isinstance(value, dict)
            else value
            if isinstance(value, (list, tuple))
            else [value]
        )
        yield from (each for each in some if isinstance(each, Tensor))
