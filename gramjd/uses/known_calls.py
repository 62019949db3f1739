"""Calls that earlier forwards made with the same parameters: what is known of them is not found out anew."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from gramjd.rules.registry import rules_of, version
from gramjd.uses.use import Derived, Record, describe

_MOST = 4096  # calls remembered
_INT = frozenset({int})
_OF_NUMBERS = (tuple, list, torch.Size)


class KnownCalls:
    """The records of calls of ops, by all that a record follows from.

    A record of a call of parameters themselves holds no other tensors. So calls with the same op, parameters
    and settings, and with tensors of the same types, shapes and dtypes, share one.
    """

    def __init__(self) -> None:
        self.records: dict[Hashable, Record] = {}
        self.tokens: list[Tensor] = []
        self.state: tuple[int, ...] = ()  # of the rules and the parameters of the last forward

    def of(self, parameters: Sequence[Tensor], alone: bool) -> KnownCalls:
        """The known calls of these parameters; drop those of others, which would keep them alive.

        Only if the engine is ``alone`` in watching a forward: else records could hold parameters of others.
        """
        state = version(), *map(id, parameters)
        if state != self.state:
            self.records.clear()
            self.state = state
        return self if alone else KnownCalls()

    def sources(self, count: int) -> list[Tensor]:
        """As many tensors for parameters that are other tensors in every call: the same ones each time."""
        while len(self.tokens) < count:
            self.tokens.append(torch.empty(0))
        return self.tokens[:count]

    def describe(self, op: Any, args: Sequence[Any], kwargs: dict[str, Any], sources: dict[int, Any],
                 derived: bool) -> tuple[Record, list[Any]]:  # fmt: skip
        """Describe a call, as :func:`gramjd.uses.use.describe` does."""
        if derived:
            return describe(op, args, kwargs, sources, derived)
        leaves: list[Any] = []
        key: list[Any] = [op, *kwargs]
        for value in (*args, *kwargs.values()):
            leaves.append(value)
            if isinstance(value, Tensor):
                source = sources.get(id(value))
                if type(source) is Derived:
                    return describe(op, args, kwargs, sources, derived)
                key += [0 if source is None else id(source), type(value), value.shape, value.dtype]
            elif value is None or isinstance(value, (bool, int, float, str)):
                key += [type(value), value]
            elif type(value) in _OF_NUMBERS and _INT.issuperset(map(type, value)):  # a shape, a stride
                key += [type(value), len(value), *value]
                if type(value) is not torch.Size:  # which PyTrees take for a leaf
                    leaves[-1:] = value
            else:  # what may change without another identity
                return describe(op, args, kwargs, sources, derived)
        known = self.records.get(tuple(key))
        if known is None:
            known, leaves = describe(op, args, kwargs, sources, derived)
            rules = rules_of(op)
            if rules is None or rules.only_structure:
                if len(self.records) >= _MOST:
                    self.records.clear()
                self.records[tuple(key)] = known
        return known, leaves
